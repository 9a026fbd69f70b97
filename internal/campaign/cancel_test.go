package campaign_test

import (
	"context"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/internal/tally"
)

const (
	callTime = 40 * time.Millisecond  // of every call to hypervisor and repository
	idle     = 250 * time.Millisecond // after a cancellation no data begins to move later than this
)

// canceled is a run that its user gives up in the middle of a call, or with latency
// zero as it begins: what is begun must be ended and everything given back, by the run
// itself, before its deadline.
func (x shot) canceled(in *injector, seed uint64, dir string) (lag time.Duration, err error) {
	e := newEnv(seed, dir, x.story.o)
	defer func() { must(os.RemoveAll(e.out())) }()
	x.story.begin(e)
	owed, err := e.debts()
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	in.cancel = cancel
	p, err := e.start(ctx, in)
	if err == nil {
		err = x.story.act(ctx, p)
	}
	cancel()
	end := clock.Real().Now()
	synctest.Wait()
	e.store.SetHook(nil)
	if !in.wasHit() {
		return 0, nil // counted by the caller
	}
	if in.gave.IsZero() {
		in.gave = end // it was over before the middle of its last call
	}
	if err := x.honest(in, err); err != nil {
		return 0, err
	}
	if took := end.Sub(in.gave); took > cleanup {
		return 0, violation("it ends %v after it was canceled", took)
	}
	if err := e.mayExist(in); err != nil {
		return 0, err
	}
	if now, err := e.debts(); err != nil {
		return 0, err
	} else if now > owed {
		return 0, violation("I2: it leaves %d obligations to recover", now-owed)
	}
	if owed == 0 && !x.story.orphans {
		if err := e.check(); err != nil {
			return 0, err
		}
	}
	if in.last.IsZero() {
		return 0, nil
	}
	return in.last.Sub(in.gave), nil
}

// TestCancel cancels every story at every call, in the middle of it and as it begins.
func TestCancel(t *testing.T) {
	mine := func(shot) bool { return true }
	nightly := os.Getenv("HOLDFAST_FAULTS") == "all"
	if nightly {
		mine = shard(t)
	}
	var mu sync.Mutex
	var lags []time.Duration
	runs, missed, violations := 0, 0, 0
	t.Run("each", func(t *testing.T) {
		for i := range stories {
			s := &stories[i]
			t.Run(s.name, func(t *testing.T) {
				t.Parallel()
				seed, dir := seedOf(t, s.name), t.TempDir()
				for _, c := range calls(t, s, seed, dir) {
					if c.seam == seamJournal {
						continue // they cannot be canceled
					}
					for _, latency := range []time.Duration{0, callTime} {
						x := shot{s, c, cancels}
						if !mine(x) || !nightly && hashOf(x.String())%32 != 0 {
							continue
						}
						in := &injector{target: c, mode: cancels, latency: latency}
						var lag time.Duration
						err := bubble(t, func() (err error) {
							lag, err = x.canceled(in, seed, dir)
							return err
						})
						mu.Lock()
						runs++
						if in.wasHit() {
							lags = append(lags, lag)
						} else {
							missed++
						}
						if err != nil {
							violations++
							t.Errorf("%s, calls of %v: %v\nreplay with: HOLDFAST_SEED=%d HOLDFAST_FAULTS=all go test -count=1 -run '^TestCancel$/^each$/^%s$' ./internal/campaign",
								x, latency, err, seed, strings.ReplaceAll(s.name, " ", "_"))
						}
						mu.Unlock()
					}
				}
			})
		}
	})
	slices.Sort(lags)
	require.NotEmpty(t, lags)
	require.LessOrEqual(t, missed*200, runs, "cancellations that hit nothing")
	p999 := lags[(len(lags)-1)*999/1000]
	t.Logf("%d cancellations, %d violations; data begins to move for the last time %v later at most, %v at p99.9", len(lags), violations, lags[len(lags)-1], p999)
	require.LessOrEqual(t, p999, idle)
	if !nightly {
		require.Greater(t, len(lags), 100)
		return
	}
	tally.Record(t, tally.Campaign{
		Name:    "cancel",
		About:   "Each story is canceled at each call, as it begins and in the middle of it: on a virtual clock, each call taking 40 ms.",
		Command: "HOLDFAST_FAULTS=all go test -timeout 60m -run '^TestCancel$' ./internal/campaign",
		Counts: []tally.Count{
			{Name: "cancellations", Value: int64(len(lags))},
			{Name: "of them with data that began to move more than 250 ms later", Value: int64(len(lags) - countUpTo(lags, idle))},
		},
		Violations: int64(violations),
	})
}

func countUpTo(sorted []time.Duration, limit time.Duration) int {
	n, _ := slices.BinarySearch(sorted, limit+1)
	return n
}

// debts counts the open obligations that recover would find.
func (e *env) debts() (int, error) {
	p := e.plain()
	n := 0
	for note, err := range p.repo.Notes(context.Background(), "obligations/") {
		if err != nil {
			return 0, violation("note %s: %w", note.Name, err)
		}
		n++
	}
	open, err := p.open()
	return n + open, err
}
