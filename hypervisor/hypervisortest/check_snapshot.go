package hypervisortest

import (
	"encoding/json"
	"errors"
	"sync/atomic"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

var snapshotChecks = []check{
	{"snapshot/vm-not-found", func(e *env) {
		_, err := e.hv.CreateSnapshot(e.ctx, "holdfast-suite-no-such-vm", nil)
		e.fails(err, hypervisor.ErrNotFound)
		for _, err := range e.hv.Snapshots(e.ctx, "holdfast-suite-no-such-vm") {
			e.fails(err, hypervisor.ErrNotFound)
		}
	}},
	{"snapshot/nil-options", func(e *env) {
		s := e.snapshot(nil)
		require.Zero(e, s.Consistency().Frozen, "the guest was not to be asked")
		require.False(e, s.Consistency().ThawPending)
	}},
	{"snapshot/ref-filled", func(e *env) {
		ref := e.snapshot(nil).Ref()
		require.Equal(e, e.hv.Info().Platform, ref.Platform)
		require.Equal(e, e.h.VM, ref.VM)
		require.True(e, hypervisor.IsOurs(ref.Name), "a name of the driver's own: %q", ref.Name)
	}},
	{"snapshot/has-the-owner-name", func(e *env) {
		name := e.name("snap")
		s := e.snapshot(&hypervisor.SnapshotOptions{Name: name})
		require.Equal(e, name, s.Ref().Name)
		require.Equal(e, name, e.snapshots(e.hv, e.h.VM)[0].Name)
	}},
	{"snapshot/names-differ", func(e *env) {
		a := e.snapshot(nil)
		e.release(a)
		b := e.snapshot(nil)
		require.NotEqual(e, a.Ref(), b.Ref())
	}},
	{"snapshot/ref-can-be-serialised", func(e *env) {
		s := e.snapshot(nil)
		p, err := json.Marshal(s.Ref())
		require.NoError(e, err)
		var ref hypervisor.SnapshotRef
		require.NoError(e, json.Unmarshal(p, &ref))
		again, err := e.hv.OpenSnapshot(e.ctx, ref)
		require.NoError(e, err)
		require.Equal(e, s.Ref(), again.Ref())
		e.releaseLater(again)
	}},
	{"snapshot/listed-until-released", func(e *env) {
		require.Empty(e, e.snapshots(e.hv, e.h.VM))
		s := e.snapshot(nil)
		require.Equal(e, []hypervisor.SnapshotRef{s.Ref()}, e.snapshots(e.hv, e.h.VM))
		e.release(s)
		require.Empty(e, e.snapshots(e.hv, e.h.VM))
	}},
	{"snapshot/not-listed-for-another-vm", func(e *env) {
		e.need(e.h.OtherVM != "", "Harness.OtherVM")
		e.snapshot(nil)
		require.Empty(e, e.snapshots(e.hv, e.h.OtherVM))
	}},
	{"snapshot/definition", func(e *env) {
		s := e.snapshot(nil)
		vm := s.VM()
		require.Equal(e, e.vm.ID, vm.ID)
		require.Equal(e, e.vm.UUID, vm.UUID)
		require.Equal(e, e.vm.Name, vm.Name)
		require.Equal(e, e.vm.Hardware, vm.Hardware)
		require.Equal(e, e.vm.NICs, vm.NICs)
		require.Equal(e, diskIDs(e.vm), diskIDs(vm), "all disks, also those that are not part of it")
		checkDisks(e, vm, e.caps)
		vm.Disks[0].ID = "changed"
		require.Equal(e, diskIDs(e.vm), diskIDs(s.VM()), "the caller may change what it got")
	}},
	{"snapshot/opened-by-another-process", func(e *env) {
		want := map[hypervisor.DiskID][]byte{}
		for _, d := range e.disks {
			want[d] = e.frozen(d)
		}
		s := e.snapshot(nil)
		e.write(e.disks[0], 0, e.random(e.sector))
		other := e.reconnect()
		again, err := other.OpenSnapshot(e.ctx, s.Ref())
		require.NoError(e, err)
		require.Equal(e, s.Ref(), again.Ref())
		require.Equal(e, s.Consistency().Level, again.Consistency().Level)
		require.Equal(e, diskIDs(s.VM()), diskIDs(again.VM()))
		for _, d := range e.disks {
			e.same(want[d], e.readAll(again, d), "read by the other process")
		}
		require.NoError(e, again.Release(e.ctx, nil))
		require.Empty(e, e.snapshots(e.hv, e.h.VM))
	}},
	{"snapshot/orphan-found-and-released", func(e *env) {
		hv := e.reconnect()
		s, err := hv.CreateSnapshot(e.ctx, e.h.VM, &hypervisor.SnapshotOptions{Name: e.name("snap")})
		require.NoError(e, err)
		e.releaseLater(s)
		require.NoError(e, hv.Close())
		refs := e.snapshots(e.hv, e.h.VM)
		require.Len(e, refs, 1)
		orphan, err := e.hv.OpenSnapshot(e.ctx, refs[0])
		require.NoError(e, err)
		require.NoError(e, orphan.Release(e.ctx, nil))
		require.Empty(e, e.snapshots(e.hv, e.h.VM))
		e.undo = nil // its connection is closed, and it is released
	}},
	{"snapshot/open-after-release", func(e *env) {
		s := e.snapshot(nil)
		e.release(s)
		_, err := e.hv.OpenSnapshot(e.ctx, s.Ref())
		e.fails(err, hypervisor.ErrNotFound)
	}},
	{"snapshot/open-bogus", func(e *env) {
		_, err := e.hv.OpenSnapshot(e.ctx, hypervisor.SnapshotRef{
			Platform: e.hv.Info().Platform, VM: e.h.VM, Name: e.name("snap"), Token: "bogus",
		})
		e.fails(err, hypervisor.ErrNotFound)
	}},
	{"snapshot/keeps-its-instant", func(e *env) {
		for _, d := range e.disks {
			e.write(d, 0, e.random(4*e.sector))
		}
		want := map[hypervisor.DiskID][]byte{}
		for _, d := range e.disks {
			want[d] = e.frozen(d)
		}
		s := e.snapshot(nil)
		for _, d := range e.disks {
			e.write(d, 0, e.random(4*e.sector))
			e.write(d, e.size(d)-e.sector, e.random(e.sector))
			off, n := e.place(d, 1<<20)
			e.write(d, off, e.random(n))
		}
		for _, d := range e.disks {
			e.same(want[d], e.readAll(s, d), "disk "+string(d)+" as of the snapshot")
			e.same(want[d], e.overlay(s, d, nil, nil), "disk "+string(d)+" by its extents")
		}
	}},
	{"snapshot/keeps-its-instant-under-load", func(e *env) {
		d := e.disks[0]
		want := e.frozen(d)
		s := e.snapshot(nil)
		stop := e.load(func(n int) error {
			off := int64(n*7919) % (e.size(d) / e.sector) * e.sector
			return e.h.GuestWrite(d, make([]byte, e.sector), off)
		})
		for range 3 {
			e.same(want, e.readAll(s, d), "read while the guest writes")
		}
		stop()
	}},
	{"snapshot/all-disks-one-instant", checkOneInstant},
	{"snapshot/across-disks-as-declared", func(e *env) {
		require.Equal(e, e.caps.AtomicDisks, e.snapshot(nil).Consistency().AcrossDisks)
	}},
	{"snapshot/excluded-disk", func(e *env) {
		out := e.disks[0]
		s := e.snapshot(&hypervisor.SnapshotOptions{ExcludeDisks: []hypervisor.DiskID{out}})
		d := s.VM().Disk(out)
		require.NotNil(e, d, "it is still listed")
		require.False(e, d.Snapshottable)
		require.NotEmpty(e, d.Reason)
		e.fails(e.extentsErr(s, out, nil))
		_, err := s.OpenDisk(e.ctx, out)
		e.fails(err)
		_, err = s.Baseline(out)
		e.fails(err)
		e.readAll(s, e.disks[1])
	}},
	{"snapshot/second-works-or-is-busy", func(e *env) {
		first := e.snapshot(nil)
		second, err := e.hv.CreateSnapshot(e.ctx, e.h.VM, nil)
		if err != nil {
			e.fails(err, hypervisor.ErrBusy)
			require.Equal(e, []hypervisor.SnapshotRef{first.Ref()}, e.snapshots(e.hv, e.h.VM))
			return
		}
		e.releaseLater(second)
		require.Len(e, e.snapshots(e.hv, e.h.VM), 2)
		e.release(second)
		e.readAll(first, e.disks[0])
	}},
	{"snapshot/foreign-ones-are-left-alone", func(e *env) {
		e.need(e.h.AddForeignSnapshot != nil, "Harness.AddForeignSnapshot")
		check, remove, err := e.h.AddForeignSnapshot()
		require.NoError(e, err)
		e.later(func() { require.NoError(e, remove()) })
		require.Empty(e, e.snapshots(e.hv, e.h.VM))
		s, err := e.hv.CreateSnapshot(e.ctx, e.h.VM, nil)
		if err != nil {
			e.fails(err, hypervisor.ErrBusy)
		} else {
			e.releaseLater(s)
			require.Equal(e, []hypervisor.SnapshotRef{s.Ref()}, e.snapshots(e.hv, e.h.VM))
			e.release(s)
		}
		require.NoError(e, check())
	}},
}

func diskIDs(vm *hypervisor.VM) []hypervisor.DiskID {
	var ids []hypervisor.DiskID
	for _, d := range vm.Disks {
		ids = append(ids, d.ID)
	}
	return ids
}

// load runs f over and over in the background and returns when it has run a
// few times. The returned function stops it and fails the check on its error.
func (e *env) load(f func(n int) error) (stop func()) {
	e.Helper()
	quit, ticks, done := make(chan struct{}), make(chan struct{}, 16), make(chan error, 1)
	var stopped atomic.Bool
	go func() {
		for n := 1; ; n++ {
			select {
			case <-quit:
				done <- nil
				return
			default:
			}
			if err := f(n); err != nil {
				done <- err
				close(ticks)
				return
			}
			select {
			case ticks <- struct{}{}:
			default:
			}
		}
	}()
	stop = func() {
		if !stopped.Swap(true) {
			close(quit)
			require.NoError(e, <-done, "guest writes in the background")
		}
	}
	e.later(stop)
	for range 3 {
		<-ticks
	}
	return stop
}

// checkOneInstant has a guest that numbers its writes and makes each on one
// disk before the same on another. What a snapshot holds must be something that
// was there at one moment.
func checkOneInstant(e *env) {
	e.need(e.caps.AtomicDisks, "Capabilities.AtomicDisks")
	first, second := e.disks[0], e.disks[1]
	mark := func(n int) []byte {
		p := make([]byte, e.sector)
		for i := range 8 {
			p[i] = byte(n >> (8 * i))
		}
		return p
	}
	put := func(n int) error {
		return errors.Join(e.h.GuestWrite(first, mark(n), 0), e.h.GuestWrite(second, mark(n), 0))
	}
	require.NoError(e, put(0))
	for range 3 {
		stop := e.load(put)
		s := e.snapshot(nil)
		stop()
		a, b := e.counter(s, first), e.counter(s, second)
		if a != b && a != b+1 {
			require.Failf(e, "disks of different instants", "write %d is on disk %s, write %d on disk %s that comes after it", a, first, b, second)
		}
		e.release(s)
	}
}

func (e *env) counter(s hypervisor.Snapshot, disk hypervisor.DiskID) (n int) {
	e.Helper()
	p := e.readAll(s, disk)
	for i := range 8 {
		n |= int(p[i]) << (8 * i)
	}
	return n
}
