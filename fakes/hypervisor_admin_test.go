package fakes_test

import (
	"context"
	"errors"
	"io"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

// What an administrator does to a disk decides with which reason its baseline
// is refused; the other disk is not touched by it.
func TestReasonsForInvalidBaselines(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(w *fakes.World, vm hypervisor.VMID) error
		want hypervisor.Reason
		both bool // the other disk is invalid too
	}{
		"resized":  {func(w *fakes.World, vm hypervisor.VMID) error { return w.ResizeDisk(vm, "disk0", 9*mib) }, hypervisor.ReasonDiskResized, false},
		"replaced": {func(w *fakes.World, vm hypervisor.VMID) error { return w.ReplaceDisk(vm, "disk0", 3*mib+512) }, hypervisor.ReasonDiskReplaced, false},
		"tracking lost": {func(w *fakes.World, vm hypervisor.VMID) error {
			return w.LoseTracking(vm, "disk0", "")
		}, hypervisor.ReasonTrackingLost, false},
		"inconsistent": {func(w *fakes.World, vm hypervisor.VMID) error {
			return w.LoseTracking(vm, "disk0", hypervisor.ReasonInconsistent)
		}, hypervisor.ReasonInconsistent, false},
		"redefined": {func(w *fakes.World, vm hypervisor.VMID) error { return w.Redefine(vm) }, hypervisor.ReasonBaselineMissing, true},
		"removed and added": {func(w *fakes.World, vm hypervisor.VMID) error {
			err := w.RemoveDisk(vm, "disk0")
			_, aerr := w.AddDisk(vm, fakes.DiskConfig{ID: "disk0", Size: 3*mib + 512})
			return errors.Join(err, aerr)
		}, hypervisor.ReasonDiskReplaced, false},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			w, vm := twoDisks(fakes.Options{})
			h := w.Connect()
			s, err := h.CreateSnapshot(ctx, vm, nil)
			require.NoError(t, err)
			disks := []hypervisor.DiskID{"disk0", "disk1"}
			var since []hypervisor.Baseline
			for _, d := range disks {
				b, err := s.Baseline(d)
				require.NoError(t, err)
				since = append(since, b)
			}
			require.NoError(t, s.Release(ctx, disks))

			require.NoError(t, c.do(w, vm))
			s, err = h.CreateSnapshot(ctx, vm, &hypervisor.SnapshotOptions{Since: since})
			require.NoError(t, err)
			require.Equal(t, c.want, refusal(ctx, s, &since[0]))
			if c.both {
				require.Equal(t, c.want, refusal(ctx, s, &since[1]))
			} else {
				require.Empty(t, refusal(ctx, s, &since[1]))
			}
			_, err = s.Baseline("disk0")
			require.NoError(t, err, "the next one can be incremental again")
			require.NoError(t, s.Release(ctx, nil))
		})
	}
}

func refusal(ctx context.Context, s hypervisor.Snapshot, since *hypervisor.Baseline) hypervisor.Reason {
	for _, err := range s.Extents(ctx, since.Disk, since) {
		if err != nil {
			return hypervisor.BaselineReason(err)
		}
	}
	return ""
}

func TestShrunkDiskShowsZerosWhenGrown(t *testing.T) {
	w, vm := twoDisks(fakes.Options{})
	require.NoError(t, w.GuestWrite(vm, "disk0", mib-10, []byte("0123456789abcdefghij")))
	require.NoError(t, w.ResizeDisk(vm, "disk0", mib))
	require.NoError(t, w.ResizeDisk(vm, "disk0", 2*mib))
	got := truth(t, w, vm, "disk0")
	require.Equal(t, "0123456789\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", string(got[mib-10:mib+10]))
}

func TestGuestWritesStayInsideTheDisk(t *testing.T) {
	w, vm := twoDisks(fakes.Options{})
	const size = 3*mib + 512
	require.Error(t, w.GuestWrite(vm, "disk0", size-1, []byte("ab")))
	require.Error(t, w.GuestWrite(vm, "disk0", -1, []byte("a")))
	require.Error(t, w.GuestDiscard(vm, "disk0", size, 1))
	require.Error(t, w.GuestZero(vm, "disk0", 0, -1))
	require.ErrorIs(t, w.GuestWrite(vm, "none", 0, nil), hypervisor.ErrNotFound)
	require.ErrorIs(t, w.GuestWrite("none", "disk0", 0, nil), hypervisor.ErrNotFound)
}

// A tracker that lies shows it in nothing but the bytes.
func TestLyingTrackerDropsChanges(t *testing.T) {
	ctx := context.Background()
	w, vm := twoDisks(fakes.Options{Seed: 7, Granularity: 512})
	h := w.Connect()
	s, err := h.CreateSnapshot(ctx, vm, nil)
	require.NoError(t, err)
	b, err := s.Baseline("disk0")
	require.NoError(t, err)
	require.NoError(t, s.Release(ctx, []hypervisor.DiskID{"disk0"}))

	require.NoError(t, w.SetLying(vm, "disk0", 0.5))
	require.NoError(t, w.GuestWrite(vm, "disk0", 0, make([]byte, 1000*512)))
	s, err = h.CreateSnapshot(ctx, vm, &hypervisor.SnapshotOptions{Since: []hypervisor.Baseline{b}})
	require.NoError(t, err)
	var told int64
	for e, err := range hypervisor.CheckedExtents(ctx, s, "disk0", &b) {
		require.NoError(t, err)
		told += e.Length / 512
	}
	require.InDelta(t, 500, told, 100)
	require.NoError(t, s.Release(ctx, nil))
}

// A process that dies inside CreateSnapshot leaves what the platform has by
// then, and another finds it.
func TestProcessDiesInsideCreateSnapshot(t *testing.T) {
	for step, want := range map[fakes.Op][]string{
		fakes.StepFreeze:     nil,
		fakes.StepFreezeDisk: {fakes.LeftFrozen},
		fakes.StepThaw:       {fakes.LeftFrozen, fakes.LeftSnapshot},
	} {
		t.Run(string(step), func(t *testing.T) {
			ctx := context.Background()
			w, vm := twoDisks(fakes.Options{OnCall: func(c fakes.Call) {
				if c.Op == step {
					runtime.Goexit()
				}
			}})
			done := make(chan struct{})
			opts := &hypervisor.SnapshotOptions{Name: "holdfast-0123abcd-run1-snap", Quiesce: hypervisor.FilesystemConsistent}
			go func() {
				defer close(done)
				_, _ = w.Connect().CreateSnapshot(ctx, vm, opts) // does not return
			}()
			<-done
			var kinds []string
			for _, l := range w.Leftovers() {
				kinds = append(kinds, l.Kind)
			}
			require.Equal(t, want, kinds)
			removeAll(t, w)
			require.Empty(t, w.Leftovers())
		})
	}
}

func TestFreezeIsMeasuredOnTheClock(t *testing.T) {
	ctx := context.Background()
	clk := fakes.NewClock(epoch)
	w, vm := twoDisks(fakes.Options{Clock: clk, SnapshotTime: 3 * time.Second})
	var frozen, thawed []byte
	require.NoError(t, w.SetGuest(vm, fakes.Guest{
		Agent: true, Level: hypervisor.ApplicationConsistent, FreezeTime: 2 * time.Second,
		OnFreeze: func() { frozen = []byte("flushed"); _ = w.GuestWrite(vm, "disk0", 0, frozen) },
		OnThaw:   func() { thawed = []byte("goes on"); _ = w.GuestWrite(vm, "disk0", 0, thawed) },
	}))
	type result struct {
		s   hypervisor.Snapshot
		err error
	}
	done := make(chan result, 1)
	go func() {
		s, err := w.Connect().CreateSnapshot(ctx, vm, &hypervisor.SnapshotOptions{Quiesce: hypervisor.ApplicationConsistent})
		done <- result{s, err}
	}()
	for _, d := range []time.Duration{2 * time.Second, 3 * time.Second} {
		require.NoError(t, clk.WaitTimers(ctx, 1))
		clk.Advance(d)
	}
	r := <-done
	require.NoError(t, r.err)
	require.Equal(t, hypervisor.Achieved{
		Level: hypervisor.ApplicationConsistent, AcrossDisks: true, Means: "fake guest agent", Frozen: 5 * time.Second,
	}, r.s.Consistency())
	rd, err := r.s.OpenDisk(ctx, "disk0")
	require.NoError(t, err)
	requireSame(t, frozen, readAll(t, io.NewSectionReader(rd, 0, 7), 7))
	require.Equal(t, string(thawed), string(truth(t, w, vm, "disk0")[:7]))
}

func TestSnapshotSlowerThanTheFreezeAllows(t *testing.T) {
	ctx := context.Background()
	for _, minimum := range []hypervisor.Consistency{hypervisor.CrashConsistent, hypervisor.FilesystemConsistent} {
		clk := fakes.NewClock(epoch)
		w, vm := twoDisks(fakes.Options{Clock: clk, SnapshotTime: 20 * time.Second})
		done := make(chan error, 1)
		var s hypervisor.Snapshot
		go func() {
			var err error
			s, err = w.Connect().CreateSnapshot(ctx, vm, &hypervisor.SnapshotOptions{
				Quiesce: hypervisor.FilesystemConsistent, MinConsistency: minimum,
			})
			done <- err
		}()
		require.NoError(t, clk.WaitTimers(ctx, 1))
		clk.Advance(hypervisor.DefaultQuiesceTimeout)
		if minimum > hypervisor.CrashConsistent {
			require.ErrorIs(t, <-done, hypervisor.ErrQuiesceTimeout)
			require.Empty(t, w.Leftovers())
			continue
		}
		require.NoError(t, clk.WaitTimers(ctx, 1))
		require.False(t, w.Frozen(vm))
		clk.Advance(20*time.Second - hypervisor.DefaultQuiesceTimeout)
		require.NoError(t, <-done)
		require.Equal(t, hypervisor.CrashConsistent, s.Consistency().Level)
		require.NotEmpty(t, s.Consistency().Reason)
		require.Equal(t, hypervisor.DefaultQuiesceTimeout, s.Consistency().Frozen)
	}
}

func TestOfflineGuestsNeedNoFreeze(t *testing.T) {
	ctx := context.Background()
	w, vm := twoDisks(fakes.Options{})
	require.NoError(t, w.SetPower(vm, hypervisor.PoweredOff))
	s, err := w.Connect().CreateSnapshot(ctx, vm, &hypervisor.SnapshotOptions{MinConsistency: hypervisor.ApplicationConsistent})
	require.NoError(t, err)
	require.Equal(t, "offline", s.Consistency().Means)
	require.NoError(t, w.SetPower(vm, hypervisor.Paused))
	_, err = w.Connect().CreateSnapshot(ctx, vm, &hypervisor.SnapshotOptions{MinConsistency: hypervisor.FilesystemConsistent})
	require.ErrorIs(t, err, hypervisor.ErrQuiesce)
}

// A thaw that fails after a freeze that failed is an obligation, and the error
// says so.
func TestFailedSnapshotWithPendingThaw(t *testing.T) {
	ctx := context.Background()
	w, vm := twoDisks(fakes.Options{})
	require.NoError(t, w.SetGuest(vm, fakes.Guest{Agent: true, Freeze: fakes.FreezeHangs, ThawFails: -1}))
	_, err := w.Connect().CreateSnapshot(ctx, vm, &hypervisor.SnapshotOptions{
		MinConsistency: hypervisor.FilesystemConsistent, QuiesceTimeout: time.Millisecond,
	})
	require.ErrorIs(t, err, hypervisor.ErrQuiesceTimeout)
	require.ErrorIs(t, err, hypervisor.ErrThawPending)
	require.True(t, w.Frozen(vm))
	require.Len(t, w.Leftovers(), 1)
}

func TestStorageIsExact(t *testing.T) {
	ctx := context.Background()
	w := fakes.NewWorld(fakes.Options{})
	w.AddStorage("pool", 10*mib)
	h := w.Connect()
	spec := &hypervisor.VMSpec{
		Name: "a", Owner: "holdfast-00000000-run1-vm", Placement: hypervisor.Placement{Storage: "pool"},
		Disks: []hypervisor.DiskSpec{{ID: "disk0", Size: 10 * mib}},
	}
	vm, err := h.CreateVM(ctx, spec)
	require.NoError(t, err)
	spec.Name, spec.Disks[0].Size = "b", 1
	_, err = h.CreateVM(ctx, spec)
	require.ErrorIs(t, err, hypervisor.ErrNoSpace)
	require.NotEmpty(t, hypervisor.Hint(err))
	require.NoError(t, h.DeleteVM(ctx, vm.ID))
	_, err = h.CreateVM(ctx, spec)
	require.NoError(t, err)
	spec.Name, spec.NICs = "c", []hypervisor.NIC{{Network: "nowhere"}}
	_, err = h.CreateVM(ctx, spec)
	require.ErrorIs(t, err, hypervisor.ErrNotFound)
}

// Close is what the death of a process does: handles go, snapshots stay.
func TestCloseDropsHandles(t *testing.T) {
	ctx := context.Background()
	w, vm := twoDisks(fakes.Options{})
	h := w.Connect()
	s, err := h.CreateSnapshot(ctx, vm, nil)
	require.NoError(t, err)
	r, err := s.OpenDisk(ctx, "disk0")
	require.NoError(t, err)
	require.Len(t, w.Leftovers(), 2)
	require.NoError(t, h.Close())
	_, err = r.ReadAt(make([]byte, 1), 0)
	require.ErrorIs(t, err, hypervisor.ErrUnavailable)
	left := w.Leftovers()
	require.Len(t, left, 1)
	require.Equal(t, fakes.LeftSnapshot, left[0].Kind)
	_, err = h.VM(ctx, vm)
	require.ErrorIs(t, err, hypervisor.ErrUnavailable)
}

// The same seed gives the same platform.
func TestSeed(t *testing.T) {
	ctx := context.Background()
	var seen []*hypervisor.VM
	for range 2 {
		w, id := twoDisks(fakes.Options{Seed: 42})
		vm, err := w.Connect().VM(ctx, id)
		require.NoError(t, err)
		vm.Attachments = nil
		seen = append(seen, vm)
	}
	require.Equal(t, seen[0], seen[1])
}
