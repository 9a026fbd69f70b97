package campaign_test

import (
	"context"
	"fmt"
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

// latencies are how long the calls of a run take: the user gives up as the call begins
// that takes no time, and in the middle of the others.
var latencies = []time.Duration{0, callTime, 250 * time.Millisecond, time.Second}

// cancellation is one run that its user gives up.
type cancellation struct {
	shot
	latency time.Duration
}

func (x cancellation) String() string { return fmt.Sprintf("%s|%v", x.shot, x.latency) }

// replay is the command that makes the run again, and no other.
func (x cancellation) replay(seed uint64) string {
	return fmt.Sprintf("HOLDFAST_CANCEL='%s' HOLDFAST_SEED=%d go test -count=1 -v -run '^TestCancel$' ./internal/campaign", x, seed)
}

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
// HOLDFAST_CANCEL is one cancellation that is repeated.
func TestCancel(t *testing.T) {
	want := func(x cancellation) bool { return hashOf(x.String())%64 == 0 }
	nightly, only := os.Getenv("HOLDFAST_FAULTS") == "all", os.Getenv("HOLDFAST_CANCEL")
	index, of := tally.Shard(t)
	switch {
	case only != "":
		want = func(x cancellation) bool { return x.String() == only }
	case nightly:
		want = func(x cancellation) bool { return tally.Mine(index, of, x.String()) }
	}
	var mu sync.Mutex
	var lags []time.Duration
	runs, missed, violations := 0, 0, 0
	t.Run("each", func(t *testing.T) {
		for i := range stories {
			s := &stories[i]
			t.Run(s.name, func(t *testing.T) {
				t.Parallel()
				if only != "" && !strings.HasPrefix(only, s.name+"|") {
					return
				}
				seed, dir := seedOf(t, s.name), t.TempDir()
				for _, c := range calls(t, s, seed, dir) {
					if c.seam == seamJournal {
						continue // they cannot be canceled
					}
					for _, latency := range latencies {
						x := cancellation{shot{s, c, cancels}, latency}
						if !want(x) {
							continue
						}
						in := &injector{target: c, mode: cancels, latency: latency}
						var lag time.Duration
						err := bubble(t, func() (err error) {
							lag, err = x.canceled(in, seed, dir)
							return err
						})
						if err == nil && lag > idle {
							err = violation("data begins to move %v after the user gave up", lag)
						}
						mu.Lock()
						runs++
						if in.wasHit() {
							lags = append(lags, lag)
						} else {
							missed++
						}
						if err != nil {
							violations++
							t.Errorf("%s: %v\nreplay with: %s", x, err, x.replay(seed))
						}
						mu.Unlock()
					}
				}
			})
		}
	})
	if only != "" {
		require.Equal(t, 1, runs, "HOLDFAST_CANCEL=%s is not a cancellation of this campaign", only)
		return
	}
	slices.Sort(lags)
	require.NotEmpty(t, lags)
	require.LessOrEqual(t, missed*200, runs, "cancellations that hit nothing")
	p999 := lags[(len(lags)-1)*999/1000]
	t.Logf("%d cancellations, %d violations; data begins to move for the last time %v later at most, %v at p99.9", len(lags), violations, lags[len(lags)-1], p999)
	if !nightly {
		require.Greater(t, len(lags), 100)
		return
	}
	require.GreaterOrEqual(t, len(lags)*of*10, 9*10_000, "the share of one of %d parts", of)
	if of == 1 {
		require.GreaterOrEqual(t, len(lags), 10_000)
	}
	tally.Record(t, tally.Campaign{
		Name:    "cancel",
		About:   "Each story is canceled at each call, as it begins and in the middle of it: on a virtual clock, each call taking 40 ms, 250 ms or 1 s.",
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
