package hypervisortest

import (
	"fmt"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// tracked skips checks that need incremental extents.
func tracked(f func(e *env)) func(e *env) {
	return func(e *env) {
		e.need(e.caps.ChangeTracking, "Capabilities.ChangeTracking")
		f(e)
	}
}

// after checks one incremental on all disks, over what change does to them.
func after(change func(e *env, d hypervisor.DiskID)) func(e *env) {
	return tracked(func(e *env) {
		for _, d := range e.disks {
			e.write(d, 0, e.random(8*e.sector))
			e.write(d, e.size(d)-2*e.sector, e.random(2*e.sector))
		}
		base := e.contents()
		since := e.baseline()
		for _, d := range e.disks {
			change(e, d)
		}
		e.incremental(base, since)
	})
}

// contents returns a copy of what all disks hold.
func (e *env) contents() map[hypervisor.DiskID][]byte {
	e.Helper()
	out := map[hypervisor.DiskID][]byte{}
	for _, d := range e.disks {
		out[d] = e.frozen(d)
	}
	return out
}

var changeChecks = []check{
	{"changes/keystone", tracked(checkKeystone)},
	{"changes/none", after(func(*env, hypervisor.DiskID) {})},
	{"changes/first-sector", after(func(e *env, d hypervisor.DiskID) { e.write(d, 0, e.random(e.sector)) })},
	{"changes/last-sector", after(func(e *env, d hypervisor.DiskID) {
		e.write(d, e.size(d)-e.sector, e.random(e.sector))
	})},
	{"changes/whole-disk", after(func(e *env, d hypervisor.DiskID) {
		e.write(d, 0, e.random(e.size(d)/e.sector*e.sector))
	})},
	{"changes/overlapping", after(func(e *env, d hypervisor.DiskID) {
		at := e.size(d) / 3 / e.sector * e.sector
		for i := range int64(4) {
			e.write(d, at+i*e.sector, e.random(3*e.sector))
		}
	})},
	{"changes/scattered", after(func(e *env, d hypervisor.DiskID) {
		for off := int64(0); off < e.size(d)-e.sector; off += e.size(d) / 16 / e.sector * e.sector {
			e.write(d, off, e.random(e.sector))
		}
	})},
	{"changes/zeros-written", after(func(e *env, d hypervisor.DiskID) {
		e.write(d, 2*e.sector, make([]byte, 4*e.sector))
	})},
	{"changes/zeroed", func(e *env) {
		e.need(e.h.Zero != nil, "Harness.Zero")
		after(func(e *env, d hypervisor.DiskID) { e.clear(e.h.Zero, d, e.sector, 4*e.sector) })(e)
	}},
	{"changes/discarded", func(e *env) {
		e.need(e.h.Discard != nil, "Harness.Discard")
		after(func(e *env, d hypervisor.DiskID) {
			e.clear(e.h.Discard, d, 0, e.size(d)/2/e.sector*e.sector)
		})(e)
	}},
	{"changes/end-discarded", func(e *env) {
		e.need(e.h.Discard != nil, "Harness.Discard")
		after(func(e *env, d hypervisor.DiskID) {
			n := min(e.size(d)/e.sector, 512) * e.sector
			e.clear(e.h.Discard, d, e.size(d)-n, n)
		})(e)
	}},
	{"changes/one-disk-only", tracked(func(e *env) {
		base := e.contents()
		since := e.baseline()
		e.write(e.disks[1], e.sector, e.random(e.sector))
		e.incremental(base, since)
	})},
	{"changes/made-while-the-snapshot-is-there", tracked(func(e *env) {
		base := e.contents()
		s := e.snapshot(nil)
		since := e.baselinesOf(s)
		for _, d := range e.disks {
			e.write(d, e.size(d)-e.sector, e.random(e.sector))
			e.write(d, 0, e.random(e.sector))
		}
		for _, d := range e.disks {
			e.same(base[d], e.readAll(s, d), "the first snapshot")
		}
		e.release(s, e.disks...)
		e.incremental(base, since)
	})},
	{"changes/under-load", tracked(func(e *env) {
		d := e.disks[0]
		s := e.snapshot(nil)
		since := e.baselinesOf(s)[d]
		base := e.readAll(s, d)
		stop := e.load(func(n int) error {
			p := make([]byte, e.sector)
			p[0], p[1], p[2] = byte(n), byte(n>>8), byte(n>>16)
			return e.h.GuestWrite(d, p, int64(n*4099)%(e.size(d)/e.sector)*e.sector)
		})
		e.release(s, d)
		second := e.snapshot(&hypervisor.SnapshotOptions{Since: []hypervisor.Baseline{since}})
		got := e.overlay(second, d, &since, base)
		e.same(e.readAll(second, d), got, "base content overlaid with the changes")
		stop()
	})},
	{"changes/a-failed-run-loses-nothing", tracked(func(e *env) {
		base := e.contents()
		since := e.baseline()
		for _, d := range e.disks {
			e.write(d, 0, e.random(e.sector))
		}
		s := e.incremental(base, since)
		for _, d := range e.disks {
			e.write(d, 4*e.sector, e.random(e.sector))
		}
		e.release(s) // keeps no new baseline: the old one stays
		for _, d := range e.disks {
			e.write(d, 9*e.sector, e.random(e.sector))
		}
		e.incremental(base, since)
	})},
	{"changes/asked-by-another-process", tracked(func(e *env) {
		base := e.contents()
		since := e.baseline()
		opts := &hypervisor.SnapshotOptions{}
		for _, d := range e.disks {
			e.write(d, 3*e.sector, e.random(e.sector))
			opts.Since = append(opts.Since, since[d])
		}
		want := e.contents()
		other := e.reconnect()
		s, err := other.OpenSnapshot(e.ctx, e.snapshot(opts).Ref())
		require.NoError(e, err)
		for _, d := range e.disks {
			b := since[d]
			e.same(want[d], e.overlay(s, d, &b, base[d]), "base content overlaid with the changes")
		}
		e.release(s)
	})},
	{"changes/since-two-baselines-at-once", tracked(func(e *env) {
		d := e.disks[0]
		var since []hypervisor.Baseline
		var bases [][]byte
		for range 2 {
			bases = append(bases, e.frozen(d))
			since = append(since, e.baseline()[d])
			off, n := e.place(d, 64<<10)
			e.write(d, off, e.random(n))
		}
		want := e.frozen(d)
		s := e.snapshot(&hypervisor.SnapshotOptions{Since: since})
		valid := 0
		for i := range since {
			if err := e.extentsErr(s, d, &since[i]); err != nil {
				e.fails(err, hypervisor.ErrBaselineInvalid) // one at a time is enough
				continue
			}
			valid++
			e.same(want, e.overlay(s, d, &since[i], bases[i]), fmt.Sprintf("since baseline %d", i))
		}
		require.Positive(e, valid)
	})},
}

// generation is a baseline of each disk and what the disks held then.
type generation struct {
	since map[hypervisor.DiskID]hypervisor.Baseline
	base  map[hypervisor.DiskID][]byte
}

// checkKeystone replays random guest operations over several generations. Each
// snapshot asks each disk about a random one of the baselines that are kept.
func checkKeystone(e *env) {
	var kept []generation
	for round := range 6 {
		now := generation{base: e.contents()}
		since := map[hypervisor.DiskID]hypervisor.Baseline{}
		base := map[hypervisor.DiskID][]byte{}
		for _, d := range e.disks {
			if len(kept) > 0 {
				g := kept[e.rnd.IntN(len(kept))]
				since[d], base[d] = g.since[d], g.base[d]
			}
		}
		s := e.incremental(base, since)
		now.since = e.baselinesOf(s)
		e.randomOps(4) // these belong to the next generation
		e.release(s, e.disks...)
		kept = append(kept, now)
		if len(kept) > 3 {
			for _, b := range kept[0].since {
				require.NoError(e, e.hv.ForgetBaseline(e.ctx, b))
			}
			kept = kept[1:]
		}
		e.randomOps(8 + round)
	}
}

// randomOps does n guest operations on each disk.
func (e *env) randomOps(n int) {
	e.Helper()
	for _, d := range e.disks {
		for range n {
			off, length := e.place(d, 96<<10)
			switch op := e.rnd.IntN(10); {
			case op == 0:
				e.write(d, e.size(d)-e.sector, e.random(e.sector))
			case op == 1:
				e.write(d, off, make([]byte, length))
			case op == 2 && e.h.Discard != nil:
				e.clear(e.h.Discard, d, off, length)
			case op == 3 && e.h.Zero != nil:
				e.clear(e.h.Zero, d, off, length)
			case op == 4:
				e.write(d, off, e.random(length))
				e.write(d, off+length/2/e.sector*e.sector, e.random(e.sector))
			default:
				e.write(d, off, e.random(length))
			}
		}
	}
}
