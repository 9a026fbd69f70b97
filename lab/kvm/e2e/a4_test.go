//go:build linux

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/internal/journal"
	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

// kills says how many kills TestA4Kill makes: 10 unless HOLDFAST_KILLS names
// another number.
func kills(t *testing.T) int {
	v := os.Getenv("HOLDFAST_KILLS")
	if v == "" {
		return 10
	}
	n, err := strconv.Atoi(v)
	require.NoError(t, err)
	return n
}

// TestA4Kill kills the command with SIGKILL in every stage, then recovers and backs
// up again: nothing is left but the declared baseline, every committed point
// verifies, and the next backup is incremental.
func TestA4Kill(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	vm := r.lab.VM(t, kvmlab.Spec{Name: "a4", Disks: []kvmlab.Disk{
		{Size: 128*mib + 512, Data: []kvmlab.Range{{Len: 100 * mib}}, Seed: 1},
		{Size: 16*mib - 512, Data: []kvmlab.Range{{Len: 8 * mib}}, Seed: 2},
	}})
	r.backup(vm.Name)
	truths := map[string]map[string]string{}
	hit := map[backup.Stage]int{}
	stages := backup.Stages()
	total := kills(t)
	for round, tries := 0, 0; round < total; tries++ {
		require.Less(t, tries, 6*total, "kills do not hit: %v", hit)
		stage := stages[tries%len(stages)]
		r.scribble(vm, kvmlab.Paused, "vda", "vdb")
		if stage == backup.StageTransfer { // something to transfer
			vm.Write("vda", 0, 60*mib, byte(round+1))
		}
		truth := r.truth(vm, "vda", "vdb")
		delay := time.Duration(r.rnd.Int64N(int64(8 * time.Millisecond)))
		p := r.start(func(p *proc, e event) {
			if e.Event == "stage" && e.Stage == string(stage) && e.State == "enter" {
				<-time.After(delay)
				p.kill()
			}
		}, r.backupArgs(vm.Name)...)
		if o := p.wait(); o.code == 0 {
			truths[line(t, o).Point] = truth
			continue // the run was faster than the kill
		}
		at, ok := r.killedIn()
		if !ok {
			r.recovered(vm)
			continue
		}
		hit[at]++
		round++
		t.Logf("kill %d in stage %s", round, at)
		r.recovered(vm)
		for _, p := range r.points() {
			if truths[p] == nil {
				truths[p] = truth // a point that was committed before the kill
			}
		}
		r.scribble(vm, kvmlab.Paused, "vda")
		truth = r.truth(vm, "vda", "vdb")
		next := r.backup(vm.Name)
		require.Equal(t, map[string]string{"vda": inc, "vdb": inc}, next.modes(), "after a kill in %s", at)
		r.same(next.Point, truth)
		r.nothingLeft(vm)
	}
	t.Logf("%d kills, by the stage of the journal: %v", total, hit)
	for _, s := range stages {
		require.Positive(t, hit[s], "no kill in stage %s: %v", s, hit)
	}
	r.must("verify", "--repo", r.repo)
}

// killedIn reads from the journal in which stage the run died.
func (r *rig) killedIn() (backup.Stage, bool) {
	r.t.Helper()
	entries, err := journal.List(backup.JournalDir(r.state), nil)
	require.NoError(r.t, err)
	for _, e := range entries {
		if e.Alive || len(e.Stages) == 0 {
			continue
		}
		last := e.Stages[len(e.Stages)-1]
		if !last.Done {
			return backup.Stage(last.Name), true
		}
		// Between two stages: nothing was going on.
	}
	return "", false
}

// recovered runs recover, which must close everything.
func (r *rig) recovered(vm *kvmlab.VM) {
	r.t.Helper()
	o := r.must("recover", "--repo", r.repo)
	r.t.Logf("recover: %s", o.stdout)
	require.False(r.t, vm.JobActive())
	r.nothingLeft(vm)
	left, err := filepath.Glob(filepath.Join(backup.JournalDir(r.state), "*.journal"))
	require.NoError(r.t, err)
	require.Empty(r.t, left)
}

// points lists the IDs of all points.
func (r *rig) points() []string {
	r.t.Helper()
	o := r.must("points", "--repo", r.repo, "--json")
	var out []string
	for _, l := range jsonLines(r.t, o.stdout) {
		id, ok := l["point"].(string)
		require.True(r.t, ok, "%v", l)
		require.Equal(r.t, "committed", l["state"], "%v", l)
		out = append(out, id)
	}
	require.NotEmpty(r.t, out, fmt.Sprint(o))
	return out
}
