//go:build linux

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

// TestB4TwoHosts: two hosts, one VM. The lease keeps the second out while the first
// lives. When the first hangs in the middle of a backup for longer than its lease,
// the second takes over, cleans up and commits; the first then goes on, and is
// fenced: it commits nothing, and takes nothing of the second away.
func TestB4TwoHosts(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	vm := r.lab.VM(t, kvmlab.Spec{Name: "b4h", Disks: []kvmlab.Disk{{Size: 16*mib + 512, Data: []kvmlab.Range{{Len: 8 * mib}}, Seed: 1}}})
	first := r.matrix(opBackup, vm)
	first.order.TTL = 4 * time.Second
	r.backup(vm.Name)
	r.scribble(vm, kvmlab.Paused, "vda")
	require.False(t, first.child(nil))
	calls := first.listed()

	second := *r
	second.state = filepath.Join(r.lab.Dir, "state-of-the-second")
	second.env = append(slices.Clone(r.env), "HOLDFAST_STATE_DIR="+second.state)

	for i, p := range calls {
		if !slices.Contains([]string{"backup-begin", "abort-job", "checkpoint-delete"}, p.name) {
			continue
		}
		t.Logf("the first host hangs at call %d of %d, %s", i+1, len(calls), p.name)
		r.scribble(vm, kvmlab.Paused, "vda")
		truth := r.truth(vm, "vda")
		before := r.points()
		cmd, out := first.command(&moment{Call: i, After: true, Stop: true})
		require.NoError(t, cmd.Start())
		stopped(t, cmd.Process.Pid)
		begin := time.Now()

		o := second.run(second.backupArgs(vm.Name)...)
		if took := time.Since(begin); took < first.order.TTL/2 {
			require.NotZero(t, o.code, "%s", o)
			require.Contains(t, line(t, o).Error.Message, "locked", "%s", o)
		}
		var won *backupLine
		require.Eventually(t, func() bool {
			o = second.run(second.backupArgs(vm.Name)...)
			if o.code == 0 {
				won = line(t, o)
			}
			return o.code == 0
		}, time.Minute, time.Second, "the lease runs out")
		second.same(won.Point, truth)

		require.NoError(t, cmd.Process.Signal(syscall.SIGCONT))
		err := cmd.Wait()
		committed := len(r.points()) - len(before) - 1
		t.Logf("the first host ends with %v: %s", err, out)
		require.GreaterOrEqual(t, committed, 0)
		if p.name == "backup-begin" {
			require.Error(t, err)
			require.Contains(t, out.String(), "lease was lost")
			require.Zero(t, committed, "a fenced host commits nothing")
		}
		r.recovered(vm)
		r.nothingLeft(vm)
		r.scribble(vm, kvmlab.Paused, "vda")
		truth = r.truth(vm, "vda")
		l := second.backup(vm.Name)
		require.Equal(t, map[string]string{"vda": inc}, l.modes(), "the baseline of the second is still there")
		second.same(l.Point, truth)
	}
	r.must("verify", "--repo", r.repo)
}

// stopped waits until a process stands still.
func stopped(t *testing.T, pid int) {
	t.Helper()
	require.Eventually(t, func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return false
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		return strings.HasPrefix(rest, "T")
	}, 30*time.Second, 20*time.Millisecond)
}
