package kvmlab_test

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

func guestVM(t *testing.T, g kvmlab.Guest) (*kvmlab.Lab, *kvmlab.VM) {
	t.Helper()
	lab := kvmlab.Connect(t)
	kvmlab.NeedTool(t, "mke2fs")
	kvmlab.NeedTool(t, "debugfs")
	vm := lab.VM(t, kvmlab.Spec{
		Power: kvmlab.Running, Guest: &g, Disks: []kvmlab.Disk{{Size: 64 * mib}},
	})
	t.Logf("guest up after %v", vm.WaitGuest())
	return lab, vm
}

func TestGuestFreezesAndThaws(t *testing.T) {
	t.Parallel()
	lab, vm := guestVM(t, kvmlab.Guest{Writer: true})
	frozen, err := vm.TryFrozen()
	require.NoError(t, err)
	require.False(t, frozen)
	_, err = lab.Virsh("domfsfreeze", vm.Name)
	require.NoError(t, err)
	frozen, err = vm.TryFrozen()
	require.NoError(t, err)
	require.True(t, frozen)
	blocked, err := vm.TryBlocked()
	require.NoError(t, err)
	require.True(t, blocked)
	found, err := lab.Leftovers([]*kvmlab.VM{vm})
	require.NoError(t, err)
	require.Equal(t, []kvmlab.Leftover{{Kind: kvmlab.LeftFrozen, Domain: vm.Name, ID: vm.Name}}, found)

	// Nothing moves while it is frozen, and the copy needs no journal replay.
	tr := vm.Truth("vda")
	require.NoError(t, vm.Truth("vda").CompareRaw(tr.Path))
	dirty, err := kvmlab.NeedsRecovery(tr.Path)
	require.NoError(t, err)
	require.False(t, dirty, "frozen")

	_, err = lab.Virsh("domfsthaw", vm.Name)
	require.NoError(t, err)
	frozen, err = vm.TryFrozen()
	require.NoError(t, err)
	require.False(t, frozen)
	blocked, err = vm.TryBlocked()
	require.NoError(t, err)
	require.False(t, blocked)
	calls := vm.HookCalls()
	require.Len(t, calls, 2)
	require.Equal(t, "freeze", calls[0].What)
	require.Equal(t, "thaw", calls[1].What)
	require.Greater(t, calls[1].At, calls[0].At)

	vm.Suspend()
	dirty, err = kvmlab.NeedsRecovery(vm.Truth("vda").Path)
	require.NoError(t, err)
	require.True(t, dirty, "not frozen")
}

func TestGuestLogSurvivesACopy(t *testing.T) {
	t.Parallel()
	lab, vm := guestVM(t, kvmlab.Guest{Writer: true})
	vm.Sh("while [ $(wc -l < /mnt/log) -lt 50 ]; do usleep 50000; done")
	vm.StopWriter()
	want := vm.Sh("cat /mnt/log")
	require.True(t, strings.HasPrefix(want, "line 0\nline 1\n"), "%.40q", want)
	tr := vm.Truth("vda")
	got, err := kvmlab.LogInImage(tr.Path)
	require.NoError(t, err)
	requireSameText(t, want, string(got))

	// A second machine boots from the copy, beside the first, and starts its writer.
	copied := lab.VM(t, kvmlab.Spec{
		Power: kvmlab.Running, Guest: &kvmlab.Guest{Writer: true},
		Disks: []kvmlab.Disk{{Size: tr.Size, From: tr.Path}},
	})
	copied.WaitGuest()
	size, digest, err := lab.BootLog(copied.Name)
	require.NoError(t, err)
	sum := sha256.Sum256([]byte(want))
	require.Equal(t, int64(len(want)), size)
	require.Equal(t, hex.EncodeToString(sum[:]), digest)
	requireSameText(t, want, vm.Sh("cat /mnt/log"))
}

// requireSameText names the first differing offset instead of printing both texts.
func requireSameText(t *testing.T, want, got string) {
	t.Helper()
	for i := range min(len(want), len(got)) {
		if want[i] != got[i] {
			t.Fatalf("texts differ at offset %d", i)
		}
	}
	if len(want) != len(got) {
		t.Fatalf("texts of %d and %d bytes, equal so far", len(want), len(got))
	}
}

func TestAgentCanBeStoppedFromOutside(t *testing.T) {
	t.Parallel()
	_, vm := guestVM(t, kvmlab.Guest{})
	vm.StopAgent()
	_, err := vm.TryAgent("guest-ping", nil)
	require.Error(t, err)
	require.Equal(t, "T", strings.TrimSpace(vm.Sh("sed -n 's/^State:[^A-Z]*\\([A-Z]\\).*/\\1/p' /proc/$(cat /run/ga.pid)/status")))
	vm.ContinueAgent()
	eventually(t, 20*time.Second, func() bool { _, err := vm.TryAgent("guest-ping", nil); return err == nil })
	vm.KillAgent()
	_, err = vm.TryAgent("guest-ping", nil)
	require.Error(t, err)
	vm.StartAgent()
	eventually(t, 20*time.Second, func() bool { _, err := vm.TryAgent("guest-ping", nil); return err == nil })
}

// eventually asks until f is true; each call of f takes time of its own.
func eventually(t *testing.T, d time.Duration, f func() bool) {
	t.Helper()
	require.Eventually(t, f, d, 100*time.Millisecond)
}

func TestFreezeHookSleepsAndFails(t *testing.T) {
	t.Parallel()
	lab, vm := guestVM(t, kvmlab.Guest{HookSleep: 2 * time.Second})
	_, err := lab.Virsh("domfsfreeze", vm.Name)
	require.NoError(t, err)
	_, err = lab.Virsh("domfsthaw", vm.Name)
	require.NoError(t, err)
	calls := vm.HookCalls()
	require.Len(t, calls, 2)
	require.GreaterOrEqual(t, calls[1].At-calls[0].At, 1900*time.Millisecond)

	vm.SetHookSleep(0)
	vm.Sh("touch /run/hook_fail")
	_, err = lab.Virsh("domfsfreeze", vm.Name)
	require.Error(t, err)
	frozen, err := vm.TryFrozen()
	require.NoError(t, err)
	require.False(t, frozen)
}

func TestGuestWithoutAgentHasItsControlPort(t *testing.T) {
	t.Parallel()
	lab, vm := guestVM(t, kvmlab.Guest{NoAgent: true})
	require.Equal(t, "/mnt\n", vm.Sh("grep -o /mnt /proc/mounts"))
	_, err := vm.TryAgent("guest-ping", nil)
	require.Error(t, err)
	_, err = vm.TrySh("echo broken; exit 3")
	require.ErrorContains(t, err, "exit status 3: broken")
	require.Contains(t, vm.Console(), "holdfast guest is up")
	_, err = lab.GuestSh(vm.Name, "true")
	require.NoError(t, err)
}
