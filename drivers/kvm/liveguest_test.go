package kvm

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

// guestVM is a running VM with a real qemu-ga; vda holds its file system.
func (l *lab) guestVM(g kvmlab.Guest) *kvmlab.VM {
	l.t.Helper()
	vm := l.VM(l.t, kvmlab.Spec{Power: kvmlab.Running, Guest: &g, Disks: []kvmlab.Disk{{Size: 128 * mib, Ext4: true}}})
	vm.WaitGuest()
	return vm
}

// image backs vda up under the given level, and returns it as a raw file.
func (l *lab) image(vm *kvmlab.VM, level hypervisor.Consistency) (string, hypervisor.Achieved) {
	l.t.Helper()
	s := l.snap(vm, &hypervisor.SnapshotOptions{Quiesce: level, MinConsistency: level})
	content, _ := l.read(s, "vda", nil, nil)
	require.NoError(l.t, s.Release(l.ctx, nil))
	path := filepath.Join(l.Dir, "image-"+level.String())
	require.NoError(l.t, os.WriteFile(path, content, 0o600))
	return path, s.Consistency()
}

// TestLiveFreezeMakesTheDifference: with a writer in the guest, the file system
// wants recovery without a freeze and wants none with it.
func TestLiveFreezeMakesTheDifference(t *testing.T) {
	l := newLab(t)
	vm := l.guestVM(kvmlab.Guest{Writer: true})
	crash, got := l.image(vm, hypervisor.CrashConsistent)
	require.Equal(t, hypervisor.CrashConsistent, got.Level)
	frozen, got := l.image(vm, hypervisor.FilesystemConsistent)
	require.Equal(t, hypervisor.FilesystemConsistent, got.Level)
	require.Positive(t, got.Frozen)
	require.Less(t, got.Frozen, hypervisor.DefaultQuiesceTimeout)
	t.Logf("frozen for %s", got.Frozen)
	needs, err := kvmlab.NeedsRecovery(crash)
	require.NoError(t, err)
	require.True(t, needs, "without a freeze")
	needs, err = kvmlab.NeedsRecovery(frozen)
	require.NoError(t, err)
	require.False(t, needs, "with a freeze")
	still, err := vm.TryFrozen()
	require.NoError(t, err)
	require.False(t, still)
	l.clean(vm)
}

func TestLiveSilentAgent(t *testing.T) {
	l := newLab(t)
	vm := l.guestVM(kvmlab.Guest{})
	vm.StopAgent()
	_, err := l.d.CreateSnapshot(l.ctx, id(vm), &hypervisor.SnapshotOptions{
		Quiesce: hypervisor.FilesystemConsistent, MinConsistency: hypervisor.FilesystemConsistent,
	})
	require.ErrorIs(t, err, hypervisor.ErrQuiesceTimeout)
	require.ErrorIs(t, err, hypervisor.ErrThawPending)
	require.False(t, vm.JobActive())
	require.Empty(t, vm.Checkpoints())
	vm.ContinueAgent()
	require.NoError(t, l.until(func() error { return l.d.Thaw(l.ctx, id(vm)) }))
	frozen, err := vm.TryFrozen()
	require.NoError(t, err)
	require.False(t, frozen)
	_, got := l.image(vm, hypervisor.FilesystemConsistent)
	require.Equal(t, hypervisor.FilesystemConsistent, got.Level)
}

// TestLiveSlowHook: the freeze hook takes longer than the deadline.
func TestLiveSlowHook(t *testing.T) {
	l := newLab(t)
	vm := l.guestVM(kvmlab.Guest{HookSleep: 20 * time.Second})
	start := time.Now()
	s := l.snap(vm, &hypervisor.SnapshotOptions{Quiesce: hypervisor.FilesystemConsistent})
	got := s.Consistency()
	require.Less(t, time.Since(start), 30*time.Second)
	require.Equal(t, hypervisor.CrashConsistent, got.Level)
	require.NotEmpty(t, got.Reason)
	require.True(t, got.ThawPending, "the guest may freeze later")
	require.NoError(t, s.Release(l.ctx, nil))
	require.NoError(t, l.until(func() error { return l.d.Thaw(l.ctx, id(vm)) }))
	frozen, err := vm.TryFrozen()
	require.NoError(t, err)
	require.False(t, frozen)
}

func TestLiveNoAgent(t *testing.T) {
	l := newLab(t)
	vm := l.guestVM(kvmlab.Guest{NoAgent: true})
	s := l.snap(vm, &hypervisor.SnapshotOptions{Quiesce: hypervisor.FilesystemConsistent})
	require.Equal(t, hypervisor.CrashConsistent, s.Consistency().Level)
	require.Contains(t, s.Consistency().Reason, "qemu-guest-agent")
	require.NoError(t, s.Release(l.ctx, nil))
	_, err := l.d.CreateSnapshot(l.ctx, id(vm), &hypervisor.SnapshotOptions{MinConsistency: hypervisor.FilesystemConsistent})
	require.ErrorIs(t, err, hypervisor.ErrQuiesce)
	l.clean(vm)
}

// until repeats f for a minute, until it succeeds.
func (l *lab) until(f func() error) error {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(time.Minute)
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-limit:
			return errors.Join(errors.New("not within a minute"), err)
		}
	}
}
