package campaign_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/internal/journal/journaltest"
)

func newDisk() *journaltest.Disk { return journaltest.NewDisk() }

// seedOf is the seed of a story: fixed, unless HOLDFAST_SEED is set.
func seedOf(t testing.TB, name string) uint64 {
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		return n
	}
	return hashOf(name)
}

func hashOf(s string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(s)) // never fails
	return h.Sum64()
}

// shot is one run: a story, and what goes wrong in it.
type shot struct {
	story *story
	target
	mode mode
}

func (x shot) String() string { return fmt.Sprintf("%s|%s|%s", x.story.name, x.target, x.mode) }

// replay is the command that makes the shot again.
func (x shot) replay(seed uint64) string {
	return fmt.Sprintf("HOLDFAST_FAULT='%s' HOLDFAST_SEED=%d go test -count=1 -v -run '^TestEveryFault$' ./internal/campaign", x, seed)
}

// fire makes one run in a bubble of its own, in which time is virtual and no
// goroutine may be left behind. A shot without a mode counts.
func fire(t *testing.T, x shot, seed uint64, dir string) (in *injector, err error) {
	in = &injector{target: x.target, mode: x.mode}
	err = bubble(t, func() error { return x.run(in, seed, dir) })
	return in, err
}

// bubble runs do where time is virtual; a goroutine that is left and waits for ever is
// an error, and so is a panic.
func bubble(t *testing.T, do func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = violation("I4: %v", r)
		}
	}()
	synctest.Test(t, func(*testing.T) {
		defer func() {
			if r := recover(); r != nil {
				err = violation("panic: %v\n%s", r, debug.Stack())
			}
		}()
		err = do()
	})
	return err
}

// run is the whole of a run: what was before, the act with its fault, and whether the
// promise holds after recover and after the next clean backup.
func (x shot) run(in *injector, seed uint64, dir string) error {
	e := newEnv(seed, dir, x.story.o)
	defer func() { must(os.RemoveAll(e.out())) }()
	x.story.begin(e)
	acked := len(e.points)

	ctx, cancel := context.WithCancel(context.Background())
	in.cancel = cancel
	p, err := e.start(ctx, in)
	if err == nil {
		err = x.story.act(ctx, p)
	}
	cancel()
	synctest.Wait()
	e.store.SetHook(nil)
	if x.mode == lost || in.second == lost {
		p.fs.Kill()
		e.disk.PowerCut()
	}
	if err := x.honest(in, err); err != nil {
		return err
	}
	if err == nil && x.swallowed(in, p.told.String()) {
		return violation("I6: nobody hears that %s failed", x.target)
	}
	if in.wasKilled() {
		e.claims = e.claims[:0:0]
		e.points = e.points[:acked]
	} else if err := e.mayExist(in); err != nil {
		return err
	}
	if in.then > 0 && in.wasKilled() {
		e.again(in)
	}
	if brokenStory && !in.wasKilled() && in.wasHit() {
		e.disk = newDisk() // and with it the journal
		for _, n := range e.store.Names("notes/") {
			_, err := e.store.Damage(n, fakes.BlobLost)
			must(err)
		}
	}
	if err := e.plain().recover(context.Background()); err != nil {
		return violation("recover: %w", err)
	}
	if err := e.check(); err != nil && !x.story.orphans {
		return fmt.Errorf("after recover: %w", err)
	}
	if x.story.after != nil {
		x.story.after(e)
	}
	for _, vm := range e.vms {
		e.scribble(vm)
		res, err := e.plain().backup(context.Background(), vm, nil)
		if err != nil {
			return violation("the next backup: %w", err)
		}
		if len(res.Degraded) > 0 && !x.story.degraded {
			return violation("the next backup is degraded: %v", res.Degraded)
		}
	}
	if err := e.check(); err != nil {
		return fmt.Errorf("after the next backup: %w", err)
	}
	if err := e.plain().recover(context.Background()); err != nil {
		return violation("recover after the next backup: %w", err)
	}
	return nil
}

// honest says whether the act's error is one that its fault explains.
func (x shot) honest(in *injector, err error) error {
	switch {
	case errors.Is(err, errViolation):
		return err
	case in.wasKilled(), err == nil:
		return nil
	case x.story.refused != nil && errors.Is(err, x.story.refused):
		return nil
	case x.mode == "" || !in.wasHit():
		return violation("it fails without a fault: %w", err)
	case in.second != "" && (errors.Is(err, errBroken) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)):
		return nil
	case x.mode == hang || x.mode == cancels:
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			return nil
		}
	case x.mode == delay || x.mode == stale || in.second == stale:
		return nil // a list that misses what was just stored is a reason of its own
	case errors.Is(err, errBroken):
		return nil
	}
	return violation("I6: the cause is lost: %w", err)
}

// forgiven are the kinds of calls that may fail without a word.
var forgiven = map[string]string{
	"hypervisor Attachment.Close":    "all of it was read, and was right",
	"hypervisor DiskReader.Close":    "all of it was read, and was right",
	"hypervisor Close":               "nothing is asked of it any more",
	"hypervisor Snapshot.Baseline":   "the next run reads in full, and says why",
	"hypervisor DiskReader.ReadHole": "of a disk whose tracking lied already, which the run says",
	"storage delete pins/":           "maintenance gives it up",
}

// forgivenOnce are those of which one may fail: recover looks at each journal twice.
var forgivenOnce = []string{"journal open", "journal trylock", "journal size", "journal read", "journal close"}

// swallowed tells whether a call failed, and neither the act nor the result of a run
// says so.
func (x shot) swallowed(in *injector, told string) bool {
	if x.mode != failBefore && x.mode != persistent || !in.wasHit() || in.wasKilled() || in.second != "" {
		return false
	}
	kind := x.kind()
	if x.mode == failBefore && slices.Contains(forgivenOnce, kind) {
		return false
	}
	if x.seam == seamStorage {
		kind += " " + x.what
	}
	return forgiven[kind] == "" && !strings.Contains(told, errBroken.Error())
}

// mayExist allows a run that did not hear of its commit to have made a point, and no
// other one.
func (e *env) mayExist(in *injector) error {
	repo := e.plain().repo
	for i, c := range e.claims {
		if c.Point != "" {
			continue
		}
		for pt, err := range repo.Points(context.Background(), pointsOf(c.Run)) {
			if err != nil {
				return violation("I1: listing of points: %w", err)
			}
			if x := in.target; in.second == "" && (x.seam != seamStorage || x.op != string(fakes.StorePut) || x.what != "records/") {
				return violation("I5: run %s failed and made point %s", c.Run, pt.ID)
			}
			e.claims[i].Point = pt.ID
		}
	}
	return nil
}

// calls runs a story without a fault and returns its calls.
func calls(t *testing.T, s *story, seed uint64, dir string) []target {
	in, err := fire(t, shot{story: s}, seed, dir)
	require.NoError(t, err, "story %s without a fault", s.name)
	out := in.trace
	slices.SortFunc(out, func(a, b target) int { return cmp.Compare(a.String(), b.String()) })
	return slices.Compact(out)
}

// amount says which shots are fired.
func amount(t *testing.T) func(shot) bool {
	switch how := os.Getenv("HOLDFAST_FAULTS"); how {
	case "":
		return func(x shot) bool { return hashOf(x.String())%128 == 0 }
	case "ci":
		// Every call in two ways or three of its ten.
		return func(x shot) bool {
			ways := x.modes()
			i, n := uint64(slices.Index(ways, x.mode)), uint64(len(ways))
			return (i+hashOf(x.story.name+x.target.String()))%n < 2
		}
	case "errors":
		// Every other call simply fails, once or from then on.
		return func(x shot) bool {
			return (x.mode == failBefore || x.mode == persistent) && hashOf(x.String())%4 == 0
		}
	case "all":
		return shard(t)
	default:
		t.Fatalf("HOLDFAST_FAULTS=%s: use ci, errors or all", how)
		return nil
	}
}

// TestEveryFault fires at every call of every story.
func TestEveryFault(t *testing.T) {
	want, only := amount(t), os.Getenv("HOLDFAST_FAULT")
	sum := newSummary()
	t.Run("each", func(t *testing.T) {
		for i := range stories {
			s := &stories[i]
			t.Run(s.name, func(t *testing.T) {
				t.Parallel()
				if only != "" && !strings.HasPrefix(only, s.name+"|") {
					return
				}
				seed, dir := seedOf(t, s.name), t.TempDir()
				list := calls(t, s, seed, dir)
				sum.story(s, list)
				for _, c := range list {
					for _, m := range c.modes() {
						x := shot{s, c, m}
						if only != "" && x.String() == only || only == "" && want(x) {
							sum.fire(t, x, seed, dir)
						}
					}
				}
			})
		}
	})
	if only != "" {
		require.Positive(t, sum.runs, "HOLDFAST_FAULT=%s is not a shot of this campaign", only)
		return
	}
	t.Run("rest", func(t *testing.T) {
		for _, x := range sum.never() {
			sum.fire(t, x, seedOf(t, x.story.name), t.TempDir())
		}
	})
	sum.report(t)
}

// fire makes a shot and says how to repeat one that breaks the promise.
func (s *summary) fire(t *testing.T, x shot, seed uint64, dir string) {
	in, err := fire(t, x, seed, dir)
	s.shot(x, in.wasHit())
	if err == nil {
		return
	}
	t.Errorf("%s: %v\nreplay with: %s", x, err, x.replay(seed))
	if s.violated() > 20 || os.Getenv("HOLDFAST_FAULTS") == "errors" {
		t.FailNow()
	}
}
