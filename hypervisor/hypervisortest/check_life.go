package hypervisortest

import (
	"context"
	"errors"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

var releaseChecks = []check{
	{"release/twice", func(e *env) {
		s := e.snapshot(nil)
		e.release(s)
		e.release(s)
		e.release(s, e.disks...)
	}},
	{"release/twice-keeps-what-was-kept", retained(func(e *env) {
		s := e.snapshot(nil)
		e.release(s, e.disks...)
		kept := e.kept()
		require.NotEmpty(e, kept)
		e.release(s)
		require.ElementsMatch(e, kept, e.kept())
	})},
	{"release/by-another-handle", func(e *env) {
		s := e.snapshot(nil)
		again, err := e.hv.OpenSnapshot(e.ctx, s.Ref())
		require.NoError(e, err)
		e.release(again)
		e.fails(e.extentsErr(s, e.disks[0], nil))
		e.release(s)
	}},
	{"release/with-open-readers", func(e *env) {
		s := e.snapshot(nil)
		r := e.open(s, e.disks[0])
		e.release(s)
		_ = r.Close() // may fail: the snapshot is gone
		require.Empty(e, e.snapshots(e.hv, e.h.VM))
	}},
	{"release/cancelled-can-be-repeated", func(e *env) {
		s := e.snapshot(nil)
		if err := s.Release(e.cancelled(), nil); err != nil {
			e.fails(err, context.Canceled)
		} else {
			require.Empty(e, e.snapshots(e.hv, e.h.VM), "released, as it said")
		}
		e.release(s)
		require.Empty(e, e.snapshots(e.hv, e.h.VM))
	}},
}

var contextChecks = []check{
	{"cancelled/VMs", func(e *env) {
		var last error
		for vm, err := range e.hv.VMs(e.cancelled(), hypervisor.Query{}) {
			require.NoError(e, last, "something came after an error")
			if err != nil {
				require.Nil(e, vm)
			}
			last = err
		}
		e.fails(last, context.Canceled)
	}},
	{"cancelled/VM", func(e *env) {
		_, err := e.hv.VM(e.cancelled(), e.h.VM)
		e.fails(err, context.Canceled)
	}},
	{"cancelled/CreateSnapshot", func(e *env) {
		_, err := e.hv.CreateSnapshot(e.cancelled(), e.h.VM, nil)
		e.fails(err, context.Canceled)
		require.Empty(e, e.snapshots(e.hv, e.h.VM))
	}},
	{"cancelled/CreateSnapshot-at-any-moment", func(e *env) {
		for i := range 12 {
			ctx, cancel := context.WithTimeout(e.ctx, time.Duration(i*i)*50*time.Microsecond)
			s, err := e.hv.CreateSnapshot(ctx, e.h.VM, nil)
			cancel()
			if err == nil {
				e.releaseLater(s)
				e.release(s)
			} else {
				e.fails(err, context.DeadlineExceeded)
			}
			require.Empty(e, e.snapshots(e.hv, e.h.VM))
			require.Empty(e, e.kept())
		}
	}},
	{"cancelled/OpenSnapshot", func(e *env) {
		_, err := e.hv.OpenSnapshot(e.cancelled(), e.snapshot(nil).Ref())
		e.fails(err, context.Canceled)
	}},
	{"cancelled/Snapshots", func(e *env) {
		e.snapshot(nil)
		var last error
		for _, err := range e.hv.Snapshots(e.cancelled(), e.h.VM) {
			last = err
		}
		e.fails(last, context.Canceled)
	}},
	{"cancelled/Baselines", func(e *env) {
		e.need(e.caps.Baselines, "Capabilities.Baselines")
		e.baseline()
		var last error
		for _, err := range e.hv.Baselines(e.cancelled(), e.h.VM) {
			last = err
		}
		e.fails(last, context.Canceled)
	}},
	{"cancelled/ForgetBaseline", retained(func(e *env) {
		b := e.baseline()[e.disks[0]]
		e.fails(e.hv.ForgetBaseline(e.cancelled(), b), context.Canceled)
		require.NoError(e, e.hv.ForgetBaseline(e.ctx, b))
	})},
	{"cancelled/Extents", func(e *env) {
		s := e.snapshot(nil)
		var last error
		for _, err := range s.Extents(e.cancelled(), e.disks[0], nil) {
			last = err
		}
		e.fails(last, context.Canceled)
	}},
	{"cancelled/OpenDisk", func(e *env) {
		e.need(e.caps.RandomRead, "Capabilities.RandomRead")
		_, err := e.snapshot(nil).OpenDisk(e.cancelled(), e.disks[0])
		e.fails(err, context.Canceled)
	}},
	{"cancelled/Thaw", func(e *env) {
		t, ok := e.hv.(hypervisor.Thawer)
		e.need(ok, "a Thawer")
		e.fails(t.Thaw(e.cancelled(), e.h.VM), context.Canceled)
	}},
	{"cancelled/deadline-is-told-apart", func(e *env) {
		ctx, cancel := context.WithDeadline(e.ctx, time.Unix(1, 0))
		defer cancel()
		_, err := e.hv.VM(ctx, e.h.VM)
		e.fails(err, context.DeadlineExceeded)
	}},
	{"concurrency/all-methods", checkConcurrency},
}

// checkConcurrency calls everything that may be called at once at once; the
// race detector is the judge, besides the errors.
func checkConcurrency(e *env) {
	d := e.disks[0]
	want := e.frozen(d)
	s := e.snapshot(nil)
	var tasks []func() error
	for range 3 {
		tasks = append(tasks,
			func() error { _, err := e.hv.VM(e.ctx, e.h.VM); return err },
			func() error {
				for _, err := range e.hv.VMs(e.ctx, hypervisor.Query{}) {
					if err != nil {
						return err
					}
				}
				return nil
			},
			func() error {
				for _, err := range e.hv.Snapshots(e.ctx, e.h.VM) {
					if err != nil {
						return err
					}
				}
				return nil
			},
			func() error {
				for _, err := range e.hv.Baselines(e.ctx, e.h.VM) {
					if err != nil {
						return err
					}
				}
				return nil
			},
			func() error {
				if s.VM().Disk(d) == nil || s.Ref().VM != e.h.VM {
					return errors.New("definition or ref is wrong")
				}
				return nil
			},
			func() error {
				for _, err := range s.Extents(e.ctx, d, nil) {
					if err != nil {
						return err
					}
				}
				return nil
			},
			func() error {
				return hypervisor.Read(e.ctx, s, d, nil, func(x hypervisor.Extent, p []byte) error {
					if p != nil && string(p) != string(want[x.Offset:x.End()]) {
						return errors.New("wrong bytes")
					}
					return nil
				})
			},
		)
	}
	errs := make(chan error, len(tasks))
	for _, f := range tasks {
		go func() { errs <- f() }()
	}
	for range tasks {
		require.NoError(e, <-errs)
	}
}

var closeChecks = []check{
	{"close/twice", func(e *env) {
		hv := e.reconnect()
		require.NoError(e, hv.Close())
		require.NoError(e, hv.Close())
	}},
	{"close/info-still-works", func(e *env) {
		hv := e.reconnect()
		want := hv.Info()
		require.NoError(e, hv.Close())
		require.Equal(e, want, hv.Info())
	}},
	{"close/keeps-snapshots", func(e *env) {
		hv := e.reconnect()
		s, err := hv.CreateSnapshot(e.ctx, e.h.VM, nil)
		require.NoError(e, err)
		ref := s.Ref()
		require.NoError(e, hv.Close())
		require.Equal(e, []hypervisor.SnapshotRef{ref}, e.snapshots(e.hv, e.h.VM))
		again, err := e.hv.OpenSnapshot(e.ctx, ref)
		require.NoError(e, err)
		e.readAll(again, e.disks[0])
		e.release(again)
	}},
	{"close/does-not-reach-other-connections", func(e *env) {
		hv := e.reconnect()
		d := e.disks[0]
		want := e.frozen(d)
		s := e.snapshot(nil)
		require.NoError(e, hv.Close())
		e.same(want, e.readAll(s, d), "by the connection that is open")
	}},
}

var quiesceChecks = []check{
	{"quiesce/level-is-reached-or-explained", func(e *env) {
		for c := hypervisor.CrashConsistent; c <= hypervisor.ApplicationConsistent; c++ {
			s := e.snapshot(&hypervisor.SnapshotOptions{Quiesce: c})
			got := s.Consistency()
			require.NotEmpty(e, got.Means, "the means of %s", c)
			require.LessOrEqual(e, got.Level, hypervisor.ApplicationConsistent)
			if got.Level < c {
				require.NotEmpty(e, got.Reason, "%s was asked, %s is there, and no word why", c, got.Level)
			}
			if e.vm.Power == hypervisor.PoweredOn {
				require.LessOrEqual(e, got.Level, max(c, hypervisor.CrashConsistent), "more than was asked")
				require.LessOrEqual(e, got.Level, e.caps.MaxConsistency, "more than is declared")
			}
			e.release(s)
		}
	}},
	{"quiesce/more-than-the-platform-can", func(e *env) {
		e.need(e.caps.MaxConsistency < hypervisor.ApplicationConsistent, "a platform with a lower MaxConsistency")
		e.need(e.vm.Power == hypervisor.PoweredOn, "a running VM")
		e.below(e.caps.MaxConsistency+1, hypervisor.ErrQuiesce)
	}},
	{"quiesce/works", func(e *env) {
		e.guestIs(GuestWorks)
		s := e.snapshot(&hypervisor.SnapshotOptions{
			Quiesce: hypervisor.FilesystemConsistent, MinConsistency: hypervisor.FilesystemConsistent,
		})
		got := s.Consistency()
		require.GreaterOrEqual(e, got.Level, hypervisor.FilesystemConsistent)
		require.GreaterOrEqual(e, got.Frozen, time.Duration(0))
		require.False(e, got.ThawPending)
		e.thawed()
	}},
	{"quiesce/minimum-alone-asks-the-guest", func(e *env) {
		e.guestIs(GuestWorks)
		s := e.snapshot(&hypervisor.SnapshotOptions{MinConsistency: hypervisor.FilesystemConsistent})
		require.GreaterOrEqual(e, s.Consistency().Level, hypervisor.FilesystemConsistent)
	}},
	{"quiesce/not-asked-not-done", func(e *env) {
		e.guestIs(GuestHangs)
		require.Equal(e, hypervisor.CrashConsistent, e.snapshot(nil).Consistency().Level)
		e.thawed()
	}},
	{"quiesce/no-agent-degrades", func(e *env) { e.degrades(GuestAbsent) }},
	{"quiesce/failing-agent-degrades", func(e *env) { e.degrades(GuestFails) }},
	{"quiesce/hanging-agent-degrades", func(e *env) { e.degrades(GuestHangs) }},
	{"quiesce/no-agent-below-minimum", func(e *env) {
		e.guestIs(GuestAbsent)
		e.below(hypervisor.FilesystemConsistent, hypervisor.ErrQuiesce)
	}},
	{"quiesce/failing-agent-below-minimum", func(e *env) {
		e.guestIs(GuestFails)
		e.below(hypervisor.FilesystemConsistent, hypervisor.ErrQuiesce)
	}},
	{"quiesce/hanging-agent-below-minimum", func(e *env) {
		e.guestIs(GuestHangs)
		e.below(hypervisor.FilesystemConsistent, hypervisor.ErrQuiesceTimeout)
		e.thawed()
	}},
	{"quiesce/cancelled-while-the-guest-hangs", func(e *env) {
		e.guestIs(GuestHangs)
		ctx, cancel := context.WithTimeout(e.ctx, e.hang/2)
		defer cancel()
		_, err := e.hv.CreateSnapshot(ctx, e.h.VM, &hypervisor.SnapshotOptions{
			Quiesce: hypervisor.FilesystemConsistent, QuiesceTimeout: 30 * time.Second,
		})
		e.fails(err, context.DeadlineExceeded)
		require.Empty(e, e.snapshots(e.hv, e.h.VM))
		e.thawed()
	}},
	{"quiesce/thaw-of-a-guest-that-runs", func(e *env) {
		t, ok := e.hv.(hypervisor.Thawer)
		e.need(ok, "a Thawer")
		e.guestIs(GuestWorks)
		require.NoError(e, t.Thaw(e.ctx, e.h.VM))
		require.NoError(e, t.Thaw(e.ctx, e.h.VM))
	}},
}

func (e *env) guestIs(m GuestMode) {
	e.Helper()
	e.need(e.h.SetGuest != nil, "Harness.SetGuest")
	e.need(e.caps.MaxConsistency >= hypervisor.FilesystemConsistent, "a platform that quiesces")
	e.guest = true
	require.NoError(e, e.h.SetGuest(m))
}

// thawed requires that the guest runs, where the harness can see it.
func (e *env) thawed() {
	e.Helper()
	if e.h.Frozen != nil {
		frozen, err := e.h.Frozen()
		require.NoError(e, err)
		require.False(e, frozen, "the guest is frozen")
	}
}

// degrades requires that a guest which cannot be quiesced is told of, not
// hidden, when no minimum is set.
func (e *env) degrades(m GuestMode) {
	e.Helper()
	e.guestIs(m)
	s := e.snapshot(&hypervisor.SnapshotOptions{Quiesce: hypervisor.ApplicationConsistent, QuiesceTimeout: e.hang})
	got := s.Consistency()
	require.Equal(e, hypervisor.CrashConsistent, got.Level)
	require.NotEmpty(e, got.Reason)
	e.thawed()
	e.readAll(s, e.disks[0])
}

// below requires that a minimum which cannot be reached fails and leaves
// nothing.
func (e *env) below(minimum hypervisor.Consistency, cond error) {
	e.Helper()
	s, err := e.hv.CreateSnapshot(e.ctx, e.h.VM, &hypervisor.SnapshotOptions{
		Quiesce: minimum, MinConsistency: minimum, QuiesceTimeout: e.hang,
	})
	if err == nil {
		e.releaseLater(s)
	}
	e.fails(err, cond)
	require.Empty(e, e.snapshots(e.hv, e.h.VM))
	require.Empty(e, e.kept())
}

var diskChecks = []check{
	{"disks/not-in-the-snapshot", func(e *env) {
		found := false
		s := e.snapshot(nil)
		for _, d := range s.VM().Disks {
			if d.Snapshottable {
				continue
			}
			found = true
			require.NotEmpty(e, d.Reason, "disk %s", d.ID)
			e.fails(e.extentsErr(s, d.ID, nil))
			_, err := s.OpenDisk(e.ctx, d.ID)
			e.fails(err)
			_, err = s.Baseline(d.ID)
			e.fails(err)
		}
		e.need(found, "a disk that snapshots do not include")
	}},
	{"disks/reasons-fit", func(e *env) {
		for _, d := range e.vm.Disks {
			if d.Snapshottable {
				continue
			}
			switch {
			case d.Attrs.Removable:
				require.Equal(e, hypervisor.ReasonCDROM, d.Reason, "disk %s", d.ID)
			case d.Attrs.ReadOnly:
				require.Equal(e, hypervisor.ReasonReadOnly, d.Reason, "disk %s", d.ID)
			case d.Backing == hypervisor.RDMPhysical:
				require.Equal(e, hypervisor.ReasonRDMPhysical, d.Reason, "disk %s", d.ID)
			case d.Backing == hypervisor.Passthrough:
				require.Equal(e, hypervisor.ReasonPassthrough, d.Reason, "disk %s", d.ID)
			case d.Attrs.Shared:
				require.Equal(e, hypervisor.ReasonShared, d.Reason, "disk %s", d.ID)
			case d.Attrs.Independent:
				require.Equal(e, hypervisor.ReasonIndependent, d.Reason, "disk %s", d.ID)
			}
		}
	}},
	{"disks/physical-mappings-are-not-snapshotted", func(e *env) {
		for _, d := range e.vm.Disks {
			if d.Backing == hypervisor.RDMPhysical || d.Backing == hypervisor.Passthrough {
				require.False(e, d.Snapshottable, "disk %s is %s", d.ID, d.Backing)
			}
		}
	}},
	{"disks/untracked-are-read-whole", func(e *env) {
		e.need(e.caps.ChangeTracking, "Capabilities.ChangeTracking")
		var disk *hypervisor.Disk
		for i, d := range e.vm.Disks {
			if d.Snapshottable && d.Tracking == hypervisor.TrackingNone {
				disk = &e.vm.Disks[i]
			}
		}
		e.need(disk != nil, "a disk that is not tracked")
		b := hypervisor.Baseline{
			Platform: e.hv.Info().Platform, VM: e.h.VM, Disk: disk.ID, Name: e.name("snap"), Token: "bogus",
		}
		want := e.frozen(disk.ID)
		s := e.snapshot(&hypervisor.SnapshotOptions{Since: []hypervisor.Baseline{b}})
		e.same(want, e.overlay(s, disk.ID, nil, nil), "the disk that is not tracked")
		e.fails(e.extentsErr(s, disk.ID, &b), hypervisor.ErrBaselineInvalid)
		_, err := s.Baseline(disk.ID)
		e.fails(err, hypervisor.ErrBaselineInvalid)
	}},
}
