package campaign_test

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/tally"
	"github.com/holdfast-backup/holdfast/repository"
)

func pointsOf(run string) repository.Query { return repository.Query{Run: run} }

// shard deals the shots to the parts of a campaign.
func shard(t *testing.T) func(shot) bool {
	i, n := tally.Shard(t)
	return func(x shot) bool { return tally.Mine(i, n, x.String()) }
}

// summary is what a campaign counts.
type summary struct {
	mu         sync.Mutex
	stories    int
	calls      int
	runs       int
	missed     int // the call was not made this time
	violations int
	fired      map[string]map[mode]int // by kind of call
	example    map[string]shot         // without a mode, by kind of call
}

func newSummary() *summary {
	return &summary{fired: map[string]map[mode]int{}, example: map[string]shot{}}
}

func (s *summary) story(st *story, calls []target) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stories++
	s.calls += len(calls)
	for _, c := range calls {
		k := c.kind()
		if old, ok := s.example[k]; !ok || len(c.modes()) > len(old.modes()) || len(c.modes()) == len(old.modes()) && st.name+c.String() < old.story.name+old.target.String() {
			s.example[k] = shot{story: st, target: c}
		}
	}
}

func (s *summary) violated() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.violations++
	return s.violations
}

func (s *summary) shot(x shot, hit bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.runs++
	if !hit {
		s.missed++
		return
	}
	if s.fired[x.kind()] == nil {
		s.fired[x.kind()] = map[mode]int{}
	}
	s.fired[x.kind()][x.mode]++
}

// never lists a shot for each way in which a kind of call has not failed yet, when the
// campaign is one that has to do all of them.
func (s *summary) never() (out []shot) {
	if how := os.Getenv("HOLDFAST_FAULTS"); how == "" || how == "errors" {
		return nil
	}
	for _, k := range slices.Sorted(maps.Keys(s.example)) {
		x := s.example[k]
		for _, m := range x.modes() {
			if s.fired[k][m] == 0 {
				out = append(out, shot{x.story, x.target, m})
			}
		}
	}
	return out
}

// everyKind lists the kinds of calls: all that these stories can make. The readers of
// the in-memory hypervisor know their holes, so their ReadAt is not called; restores
// read nothing back from a target; only a failed beginning removes a journal.
var everyKind = []string{
	"hypervisor Attachment.Close",
	"hypervisor Attachment.Open",
	"hypervisor Attachment.Read",
	"hypervisor Baselines",
	"hypervisor Baselines.next",
	"hypervisor Close",
	"hypervisor CreateSnapshot",
	"hypervisor CreateVM",
	"hypervisor DeleteVM",
	"hypervisor DiskReader.Close",
	"hypervisor DiskReader.ReadHole",
	"hypervisor DiskWriter.Close",
	"hypervisor DiskWriter.Commit",
	"hypervisor DiskWriter.WriteAt",
	"hypervisor DiskWriter.WriteZeroes",
	"hypervisor FinishVM",
	"hypervisor ForgetBaseline",
	"hypervisor OpenDiskWriter",
	"hypervisor OpenSnapshot",
	"hypervisor SetPower",
	"hypervisor Snapshot.Baseline",
	"hypervisor Snapshot.Extents",
	"hypervisor Snapshot.Extents.next",
	"hypervisor Snapshot.OpenDisk",
	"hypervisor Snapshot.Release",
	"hypervisor Snapshot.Stream",
	"hypervisor Snapshot.Stream.next",
	"hypervisor Snapshots",
	"hypervisor Snapshots.next",
	"hypervisor Thaw",
	"hypervisor VM",
	"hypervisor VMs",
	"hypervisor VMs.next",
	"journal close",
	"journal create",
	"journal lock",
	"journal mkdir",
	"journal open",
	"journal read",
	"journal readdir",
	"journal rename",
	"journal size",
	"journal sync",
	"journal syncdir",
	"journal truncate",
	"journal trylock",
	"journal unlock",
	"journal write",
	"storage delete",
	"storage get",
	"storage list",
	"storage put",
	"storage touch",
}

var everyMode = []mode{failBefore, failAfter, persistent, short, hang, cancels, delay, killBefore, killAfter, torn, lost, stale}

// table is which kinds of calls failed how often in which way.
func (s *summary) table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-40s", "")
	for _, m := range everyMode {
		fmt.Fprintf(&b, "%12s", m)
	}
	for _, k := range slices.Sorted(maps.Keys(s.fired)) {
		fmt.Fprintf(&b, "\n%-40s", k)
		for _, m := range everyMode {
			n := fmt.Sprint(s.fired[k][m])
			if !slices.Contains(s.example[k].modes(), m) {
				n = "-"
			}
			fmt.Fprintf(&b, "%12s", n)
		}
	}
	return b.String()
}

// report prints the figures, and fails when they are not those of a campaign.
func (s *summary) report(t *testing.T) {
	t.Logf("\n%s\n%d stories, %d calls, %d runs, %d violations; %d calls were not made again", s.table(), s.stories, s.calls, s.runs, s.violations, s.missed)
	for name := range s.example {
		require.Contains(t, everyKind, name, "a kind of call that the list does not have")
	}
	for _, name := range everyKind {
		require.Contains(t, s.example, name, "a kind of call that no story makes")
	}
	require.LessOrEqual(t, s.missed*200, s.runs, "shots that hit nothing")
	how := os.Getenv("HOLDFAST_FAULTS")
	if how == "" || how == "errors" {
		require.GreaterOrEqual(t, s.runs, 200)
		return
	}
	for k, x := range s.example {
		for _, m := range x.modes() {
			require.Positive(t, s.fired[k][m], "%s never failed by %s", k, m)
		}
	}
	require.GreaterOrEqual(t, s.stories, 30)
	require.GreaterOrEqual(t, s.calls, 1500)
	index, of := tally.Shard(t)
	if of == 1 {
		require.GreaterOrEqual(t, s.runs, 8000)
	}
	counts := []tally.Count{{Name: "runs", Value: int64(s.runs)}}
	if index == 0 { // the same in each shard
		counts = append(counts, tally.Count{Name: "stories", Value: int64(s.stories)}, tally.Count{Name: "calls", Value: int64(s.calls)},
			tally.Count{Name: "kinds of calls", Value: int64(len(s.example))})
	}
	tally.Record(t, tally.Campaign{
		Name: "faults-" + how, About: "Each call of each story to hypervisor, repository and journal fails, in each way.",
		Command:    "HOLDFAST_FAULTS=" + how + " go test -timeout 60m -run '^TestEveryFault$' ./internal/campaign",
		Counts:     counts,
		Violations: int64(s.violations),
	})
}
