package hypervisortest

import (
	"encoding/json"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// retained skips checks that need a platform which keeps baselines.
func retained(f func(e *env)) func(e *env) {
	return tracked(func(e *env) {
		e.need(e.caps.Baselines, "Capabilities.Baselines")
		f(e)
	})
}

// refused makes a snapshot since b and requires that Extents of disk refuses
// it, and that everything else about the snapshot works.
func (e *env) refused(disk hypervisor.DiskID, b hypervisor.Baseline) {
	e.Helper()
	want := e.frozen(disk)
	s := e.snapshot(&hypervisor.SnapshotOptions{Since: []hypervisor.Baseline{b}})
	err := e.extentsErr(s, disk, &b)
	e.fails(err, hypervisor.ErrBaselineInvalid)
	require.NotEmpty(e, hypervisor.BaselineReason(err))
	require.Contains(e, reasons, hypervisor.BaselineReason(err))
	e.same(want, e.readAll(s, disk), "a full read is still possible")
	e.release(s)
}

var baselineChecks = []check{
	{"baseline/filled", tracked(func(e *env) {
		name := e.name("snap")
		s := e.snapshot(&hypervisor.SnapshotOptions{Name: name})
		for d, b := range e.baselinesOf(s) {
			require.Equal(e, e.hv.Info().Platform, b.Platform)
			require.Equal(e, e.h.VM, b.VM)
			require.Equal(e, d, b.Disk)
			require.Equal(e, name, b.Name)
			again, err := s.Baseline(d)
			require.NoError(e, err)
			require.Equal(e, b, again)
		}
	})},
	{"baseline/can-be-serialised", tracked(func(e *env) {
		base := e.contents()
		since := e.baseline()
		p, err := json.Marshal(since)
		require.NoError(e, err)
		var read map[hypervisor.DiskID]hypervisor.Baseline
		require.NoError(e, json.Unmarshal(p, &read))
		e.write(e.disks[0], 0, e.random(e.sector))
		e.incremental(base, read)
	})},
	{"baseline/outlives-the-process", tracked(func(e *env) {
		base := e.contents()
		hv := e.reconnect()
		s, err := hv.CreateSnapshot(e.ctx, e.h.VM, nil)
		require.NoError(e, err)
		e.releaseLater(s)
		since := e.baselinesOf(s)
		require.NoError(e, s.Release(e.ctx, e.disks))
		e.write(e.disks[0], 5*e.sector, e.random(e.sector))
		e.incremental(base, since)
	})},
	{"baseline/bogus", tracked(func(e *env) {
		e.refused(e.disks[0], hypervisor.Baseline{
			Platform: e.hv.Info().Platform, VM: e.h.VM, Disk: e.disks[0], Name: e.name("snap"), Token: "bogus",
		})
	})},
	{"baseline/bogus-token-under-a-known-name", tracked(func(e *env) {
		b := e.baseline()[e.disks[0]]
		b.Token = "bogus"
		e.refused(e.disks[0], b)
	})},
	{"baseline/empty", tracked(func(e *env) {
		e.refused(e.disks[0], hypervisor.Baseline{Disk: e.disks[0]})
	})},
	{"baseline/of-another-disk", tracked(func(e *env) {
		e.refused(e.disks[1], e.baseline()[e.disks[0]])
	})},
	{"baseline/of-another-vm", tracked(func(e *env) {
		e.need(e.h.OtherVM != "", "Harness.OtherVM")
		b := e.otherBaseline()
		e.refused(e.disks[0], b)
		b.VM, b.Disk = e.h.VM, e.disks[0] // as if it were ours
		e.refused(e.disks[0], b)
	})},
	{"baseline/not-named-in-since", tracked(func(e *env) {
		b := e.baseline()[e.disks[0]]
		s := e.snapshot(nil)
		e.fails(e.extentsErr(s, e.disks[0], &b), hypervisor.ErrBaselineInvalid)
		own, err := s.Baseline(e.disks[0])
		require.NoError(e, err)
		e.fails(e.extentsErr(s, e.disks[0], &own), hypervisor.ErrBaselineInvalid)
	})},
	{"baseline/one-bad-does-not-spoil-the-others", tracked(func(e *env) {
		good := e.baseline()[e.disks[1]]
		base := e.frozen(e.disks[1])
		bad := hypervisor.Baseline{
			Platform: e.hv.Info().Platform, VM: e.h.VM, Disk: e.disks[0], Name: e.name("snap"), Token: "bogus",
		}
		e.write(e.disks[1], 0, e.random(e.sector))
		want := e.frozen(e.disks[1])
		s := e.snapshot(&hypervisor.SnapshotOptions{Since: []hypervisor.Baseline{bad, good}})
		e.fails(e.extentsErr(s, e.disks[0], &bad), hypervisor.ErrBaselineInvalid)
		e.same(want, e.overlay(s, e.disks[1], &good, base), "the disk with a good baseline")
	})},
	{"baseline/unknown-disk", func(e *env) {
		_, err := e.snapshot(nil).Baseline("no-such-disk")
		e.fails(err)
	}},
	{"baseline/listed-when-kept", retained(func(e *env) {
		require.Empty(e, e.kept())
		s := e.snapshot(nil)
		made := e.baselinesOf(s)
		e.release(s, e.disks...)
		require.ElementsMatch(e, values(e.disks, made), e.kept())
	})},
	{"baseline/not-listed-when-not-kept", tracked(func(e *env) {
		s := e.snapshot(nil)
		b := e.baselinesOf(s)[e.disks[0]]
		e.release(s)
		require.Empty(e, e.kept())
		if e.caps.Baselines {
			e.refused(e.disks[0], b)
		}
	})},
	{"baseline/some-kept", retained(func(e *env) {
		base := e.contents()
		s := e.snapshot(nil)
		made := e.baselinesOf(s)
		e.release(s, e.disks[1])
		require.Equal(e, []hypervisor.Baseline{made[e.disks[1]]}, e.kept())
		e.write(e.disks[1], 0, e.random(e.sector))
		e.incremental(base, map[hypervisor.DiskID]hypervisor.Baseline{e.disks[1]: made[e.disks[1]]})
	})},
	{"baseline/same-from-another-connection", retained(func(e *env) {
		e.baseline()
		var got []hypervisor.Baseline
		for b, err := range e.reconnect().Baselines(e.ctx, e.h.VM) {
			require.NoError(e, err)
			got = append(got, b)
		}
		require.Subset(e, got, e.kept())
		require.NotEmpty(e, e.kept())
	})},
	{"baseline/forgotten-is-invalid", retained(func(e *env) {
		b := e.baseline()[e.disks[0]]
		require.NoError(e, e.hv.ForgetBaseline(e.ctx, b))
		require.NotContains(e, e.kept(), b)
		e.refused(e.disks[0], b)
	})},
	{"baseline/forgotten-twice", func(e *env) {
		b := hypervisor.Baseline{
			Platform: e.hv.Info().Platform, VM: e.h.VM, Disk: e.disks[0], Name: e.name("snap"), Token: "bogus",
		}
		if e.caps.ChangeTracking {
			b = e.baseline()[e.disks[0]]
		}
		require.NoError(e, e.hv.ForgetBaseline(e.ctx, b))
		require.NoError(e, e.hv.ForgetBaseline(e.ctx, b))
	}},
	{"baseline/forgetting-keeps-other-disks", retained(func(e *env) {
		base := e.contents()
		made := e.baseline()
		require.NoError(e, e.hv.ForgetBaseline(e.ctx, made[e.disks[0]]))
		e.write(e.disks[1], e.size(e.disks[1])-e.sector, e.random(e.sector))
		e.incremental(base, map[hypervisor.DiskID]hypervisor.Baseline{e.disks[1]: made[e.disks[1]]})
	})},
	{"baseline/forgetting-older-keeps-newer", retained(func(e *env) { checkForget(e, 0) })},
	{"baseline/forgetting-middle-keeps-oldest", retained(func(e *env) { checkForget(e, 1) })},
	{"baseline/forgetting-newer-keeps-older", retained(func(e *env) { checkForget(e, 2) })},
	{"baseline/nothing-kept-as-declared", func(e *env) {
		e.need(!e.caps.Baselines, "a platform without Capabilities.Baselines")
		s := e.snapshot(nil)
		e.release(s, e.disks...)
		for b, err := range e.hv.Baselines(e.ctx, e.h.VM) {
			require.NoError(e, err)
			require.Failf(e, "a baseline is listed", "%v", b)
		}
	}},
	{"baseline/none-without-tracking", func(e *env) {
		e.need(!e.caps.ChangeTracking, "a platform without Capabilities.ChangeTracking")
		s := e.snapshot(nil)
		for _, d := range e.disks {
			_, err := s.Baseline(d)
			e.fails(err, hypervisor.ErrBaselineInvalid)
		}
	}},
	{"baseline/vm-not-found", func(e *env) {
		for _, err := range e.hv.Baselines(e.ctx, "holdfast-suite-no-such-vm") {
			e.fails(err, hypervisor.ErrNotFound)
		}
	}},
}

// checkForget makes three generations, forgets one, and checks what changed
// since each of the others.
func checkForget(e *env, forget int) {
	e.Helper()
	var gens []generation
	for range 3 {
		gens = append(gens, generation{base: e.contents(), since: e.baseline()})
		e.randomOps(3)
	}
	for _, b := range gens[forget].since {
		require.NoError(e, e.hv.ForgetBaseline(e.ctx, b))
	}
	require.Len(e, e.kept(), 2*len(e.disks))
	e.randomOps(2)
	for i, g := range gens {
		if i != forget {
			e.release(e.incremental(g.base, g.since))
		}
	}
}

// otherBaseline makes a baseline of the other VM, forgotten at the end.
func (e *env) otherBaseline() hypervisor.Baseline {
	e.Helper()
	s, err := e.hv.CreateSnapshot(e.ctx, e.h.OtherVM, nil)
	require.NoError(e, err)
	e.releaseLater(s)
	for _, d := range s.VM().Disks {
		if d.Snapshottable && d.Tracking == hypervisor.TrackingBlocks {
			b, err := s.Baseline(d.ID)
			require.NoError(e, err)
			require.NoError(e, s.Release(e.ctx, []hypervisor.DiskID{d.ID}))
			e.later(func() { require.NoError(e, e.hv.ForgetBaseline(e.ctx, b)) })
			return b
		}
	}
	require.Fail(e, "Harness.OtherVM has no tracked disk")
	return hypervisor.Baseline{}
}

func values[K comparable, V any](keys []K, m map[K]V) []V {
	var out []V
	for _, k := range keys {
		out = append(out, m[k])
	}
	return out
}
