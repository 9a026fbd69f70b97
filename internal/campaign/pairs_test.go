package campaign_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/tally"
)

// pair is two faults: the second strikes soon after the first, while it is cleaned up
// after, or in the recovery of a process that the first one killed.
type pair struct {
	shot
	then int    // calls after the first
	roll uint64 // chooses the second mode
}

func (x pair) run(in *injector, seed uint64, dir string) error {
	in.then, in.roll = x.then, x.roll
	return x.shot.run(in, seed, dir)
}

// draw makes a pair of a seed.
func draw(seed uint64, known map[*story][]target) pair {
	rnd := rand.New(rand.NewPCG(seed, 9))
	s := &stories[rnd.IntN(len(stories))]
	c := known[s][rnd.IntN(len(known[s]))]
	ways := c.modes()
	return pair{shot{s, c, ways[rnd.IntN(len(ways))]}, 1 + rnd.IntN(1<<rnd.IntN(7)), rnd.Uint64()}
}

// TestPairs lets two faults happen, at random. HOLDFAST_PAIRS is how many in all,
// HOLDFAST_PAIR the seed of one that is repeated.
func TestPairs(t *testing.T) {
	count := uint64(150)
	if s := os.Getenv("HOLDFAST_PAIRS"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		count = n
	}
	known := map[*story][]target{}
	for i := range stories {
		s := &stories[i]
		known[s] = calls(t, s, hashOf(s.name), t.TempDir())
	}
	if s := os.Getenv("HOLDFAST_PAIR"); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		x := draw(seed, known)
		in := &injector{target: x.target, mode: x.mode}
		err = bubble(t, func() error { return x.run(in, hashOf(x.story.name), t.TempDir()) })
		t.Logf("%s, then %d calls later: %s", x.shot, x.then, in.second)
		require.NoError(t, err)
		return
	}
	index, of := tally.Shard(t)
	var mu sync.Mutex
	runs, both, violations := 0, 0, 0
	t.Run("each", func(t *testing.T) {
		const workers = 4
		for w := range uint64(workers) {
			t.Run(fmt.Sprint(w), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				for n := uint64(index)*workers + w; n < count; n += uint64(of) * workers {
					x := draw(n, known)
					in := &injector{target: x.target, mode: x.mode}
					err := bubble(t, func() error { return x.run(in, hashOf(x.story.name), dir) })
					mu.Lock()
					runs++
					if in.second != "" {
						both++
					}
					if err != nil {
						violations++
						t.Errorf("%s, then %d calls later: %s: %v\nreplay with: HOLDFAST_PAIR=%d go test -count=1 -v -run '^TestPairs$' ./internal/campaign", x.shot, x.then, in.second, err, n)
					}
					mu.Unlock()
				}
			})
		}
	})
	t.Logf("%d pairs, in %d of which the second fault struck; %d violations", runs, both, violations)
	require.Greater(t, both*2, runs, "pairs whose second fault struck")
	if os.Getenv("HOLDFAST_PAIRS") != "" {
		tally.Record(t, tally.Campaign{
			Name: "pairs", About: "Two faults in one story, the second while the first is cleaned up after or recovered from.",
			Command:    fmt.Sprintf("HOLDFAST_PAIRS=%d go test -timeout 90m -run '^TestPairs$' ./internal/campaign", count),
			Counts:     []tally.Count{{Name: "pairs", Value: int64(runs)}, {Name: "of which both struck", Value: int64(both)}},
			Violations: int64(violations),
		})
	}
}

// again recovers in a process that the second fault strikes, if the first one killed
// the one before; what it says does not count.
func (e *env) again(in *injector) {
	second := &injector{mode: failBefore, then: in.then, roll: in.roll, hit: true}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	second.cancel = cancel
	p, err := e.start(ctx, second)
	if err == nil {
		_ = p.recover(ctx) // the next one has to do the rest
	}
	e.store.SetHook(nil)
	in.second = second.second
	if second.second == lost {
		p.fs.Kill()
		e.disk.PowerCut()
	}
}
