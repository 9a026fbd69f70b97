//go:build linux

package e2e

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/internal/journal"
	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

// guest boots the tiny guest, which writes to its disk all the time.
func (r *rig) guest(g kvmlab.Guest) *kvmlab.VM {
	r.t.Helper()
	vm := r.lab.VM(r.t, kvmlab.Spec{Name: "a5", Power: kvmlab.Running, Guest: &g, Disks: []kvmlab.Disk{{Size: 128 * mib, Ext4: true}}})
	r.t.Logf("guest answers after %v", vm.WaitGuest())
	return vm
}

// imageOf restores a point and returns the raw image of its first disk.
func (r *rig) imageOf(point string) string {
	r.t.Helper()
	dir := filepath.Join(r.lab.Dir, "image-"+point)
	r.must("restore", "--repo", r.repo, "--point", point, "--to", "file:"+dir+"?format=raw")
	return filepath.Join(dir, "vda.raw")
}

// TestA5FreezeDiscriminates proves that the freeze does something: under writes, a
// file system that was frozen wants no recovery, and one that was not does.
func TestA5FreezeDiscriminates(t *testing.T) {
	r := newRig(t)
	vm := r.guest(kvmlab.Guest{Writer: true})
	for _, c := range []struct {
		level    string
		recovery bool
	}{{"filesystem", false}, {"crash", true}, {"auto", false}} {
		o := r.must(r.backupArgs(vm.Name, "--consistency", c.level)...)
		l := line(t, o)
		require.Equal(t, "success", l.Status, "%s", o)
		if c.recovery {
			require.Equal(t, "crash", l.Consistency)
		} else {
			require.Equal(t, "filesystem", l.Consistency)
			require.Positive(t, l.FrozenMS)
			require.Less(t, l.FrozenMS, 10_000.0)
		}
		img := r.imageOf(l.Point)
		needs, err := kvmlab.NeedsRecovery(img)
		require.NoError(t, err)
		require.Equal(t, c.recovery, needs, "needs_recovery with --consistency %s", c.level)
	}
	frozen, err := vm.TryFrozen()
	require.NoError(t, err)
	require.False(t, frozen)
	calls := vm.HookCalls()
	require.GreaterOrEqual(t, len(calls), 4, "the freeze hook ran for each freeze and thaw: %v", calls)
	r.nothingLeft(vm)

	// The point that was taken under a freeze boots as a new VM, its agent answers,
	// and its log is what the image holds.
	vm.StopWriter()
	vm.Sh("sync")
	o := r.must(r.backupArgs(vm.Name, "--consistency", "filesystem")...)
	point := line(t, o).Point
	want, err := kvmlab.LogInImage(r.imageOf(point))
	require.NoError(t, err)
	require.NotEmpty(t, want)
	name := r.lab.Name("booted")
	r.must("restore", "--repo", r.repo, "--point", point, "--to", r.lab.URI, "--name", name, "--storage", r.lab.Dir)
	_, err = r.lab.Virsh("start", name)
	require.NoError(t, err)
	_, err = r.lab.WaitGuest(name, true)
	require.NoError(t, err)
	size, sum, err := r.lab.BootLog(name)
	require.NoError(t, err)
	require.Equal(t, int64(len(want)), size)
	require.Equal(t, sha256hex(want), sum)
}

// TestA5NoAgent: crash-consistent with the reason; a minimum fails and leaves
// nothing.
func TestA5NoAgent(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	vm := r.lab.VM(t, kvmlab.Spec{Name: "a5n", Disks: []kvmlab.Disk{{Size: 8 * mib, Data: []kvmlab.Range{{Len: mib}}}}})
	l := line(t, r.must(r.backupArgs(vm.Name)...))
	require.Equal(t, "success", l.Status)
	require.Equal(t, "crash", l.Consistency)
	before := vm.Checkpoints()
	o := r.run(r.backupArgs(vm.Name, "--min-consistency", "filesystem")...)
	require.Equal(t, 1, o.code, "%s", o)
	require.Equal(t, before, vm.Checkpoints())
	r.nothingLeft(vm)
	require.Len(t, r.points(), 1)
}

// TestA5HookSleeps: a freeze hook that sleeps for a minute is given up at the
// deadline, and the guest ends thawed.
func TestA5HookSleeps(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	vm := r.guest(kvmlab.Guest{HookSleep: 60 * time.Second})
	begin := time.Now()
	o := r.run(r.backupArgs(vm.Name, "--consistency", "filesystem", "--quiesce-timeout", "3s")...)
	took := time.Since(begin)
	require.Equal(t, 3, o.code, "%s", o)
	l := line(t, o)
	require.Equal(t, "degraded", l.Status)
	require.Equal(t, "crash", l.Consistency)
	require.Less(t, took, 50*time.Second, "it did not wait for the hook")
	r.thawed(vm, 90*time.Second)
}

// thawed waits for the agent to answer again, runs recover, and wants a guest that
// is not frozen.
func (r *rig) thawed(vm *kvmlab.VM, d time.Duration) {
	r.t.Helper()
	require.Eventually(r.t, func() bool {
		o := r.run("recover", "--repo", r.repo)
		frozen, err := vm.TryFrozen()
		return err == nil && !frozen && o.code == 0
	}, d, time.Second)
	r.nothingLeft(vm)
}

// TestA5AgentStopped: an agent that stops in the middle leaves the run degraded
// and an obligation open, which recover closes once the agent goes on.
func TestA5AgentStopped(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	vm := r.guest(kvmlab.Guest{})
	vm.StopAgent()
	o := r.run(r.backupArgs(vm.Name, "--consistency", "filesystem", "--quiesce-timeout", "2s")...)
	require.Equal(t, 3, o.code, "%s", o)
	l := line(t, o)
	require.Equal(t, "degraded", l.Status)
	require.Contains(t, strings.Join(l.Degraded, "\n"), "recover")
	o = r.run("recover", "--repo", r.repo)
	require.Equal(t, 3, o.code, "the obligation stays open while the agent is stopped: %s", o)
	vm.ContinueAgent()
	r.thawed(vm, 30*time.Second)
}

// TestA5KilledWhileFrozen: the main process is killed at random moments of the
// freeze window; the guard thaws the guest by the deadline and a second, and the
// next backup is incremental. One kill in five falls here.
func TestA5KilledWhileFrozen(t *testing.T) {
	r := newRig(t)
	const (
		deadline = 6 * time.Second
		hook     = 2 * time.Second
	)
	vm := r.guest(kvmlab.Guest{HookSleep: hook})
	r.backup(vm.Name, "--consistency", "crash")
	total := max(1, kills(t)/5)
	for round, tries := 0, 0; round < total; tries++ {
		require.Less(t, tries, 3*total, "kills miss the window")
		freezes, thaws := hookCalls(vm, "freeze"), hookCalls(vm, "thaw")
		delay := time.Duration(r.rnd.Int64N(int64(hook)))
		killed := make(chan time.Time, 1)
		p := r.start(func(p *proc, e event) {
			if e.Event == "stage" && e.Stage == "snapshot" && e.State == "enter" {
				time.AfterFunc(delay, func() {
					killed <- time.Now()
					p.kill()
				})
			}
		}, r.backupArgs(vm.Name, "--consistency", "filesystem", "--quiesce-timeout", deadline.String())...)
		o := p.wait()
		require.Equal(t, -1, o.code, "%s", o)
		at := <-killed
		if hookCalls(vm, "freeze") > freezes && r.owes(journal.Thaw) {
			round++
			t.Logf("kill %d, %v after the snapshot stage began", round, delay)
			require.Eventually(t, func() bool {
				if hookCalls(vm, "thaw") == thaws { // the freeze may still be to come
					return false
				}
				blocked, err := vm.TryBlocked()
				return err == nil && !blocked
			}, time.Until(at.Add(deadline+time.Second)), 100*time.Millisecond, "thawed by deadline + 1 s")
		}
		r.thawed(vm, 30*time.Second)
		require.Equal(t, map[string]string{"vda": inc}, r.backup(vm.Name, "--consistency", "crash").modes())
		r.nothingLeft(vm)
	}
	r.must("verify", "--repo", r.repo)
}

// hookCalls counts how often the guest's freeze hook was called for something.
func hookCalls(vm *kvmlab.VM, what string) (n int) {
	for _, c := range vm.HookCalls() {
		if c.What == what {
			n++
		}
	}
	return n
}

// owes says whether a dead run has an open obligation of a kind.
func (r *rig) owes(kind journal.Kind) bool {
	r.t.Helper()
	entries, err := journal.List(backup.JournalDir(r.state), nil)
	require.NoError(r.t, err)
	for _, e := range entries {
		for _, o := range e.Open {
			if !e.Alive && o.Kind == kind {
				return true
			}
		}
	}
	return false
}
