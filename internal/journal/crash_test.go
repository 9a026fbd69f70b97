package journal

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// seed returns the seed of this run, taken from HOLDFAST_SEED for a replay, and prints it.
func seed(t *testing.T) uint64 {
	t.Helper()
	s := rand.Uint64()
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		var err error
		s, err = strconv.ParseUint(v, 10, 64)
		require.NoError(t, err)
	}
	t.Logf("HOLDFAST_SEED=%d", s)
	return s
}

var kinds = []Kind{Thaw, PowerOff, ExportJob, Process, Snapshot, Baseline, IncompleteVM, ScratchFile, LocalFile}

// truth is what a correct journal holds: the handle of every open obligation.
type truth map[ID]string

// story runs random operations of one owner and keeps what was acknowledged.
type story struct {
	fs     *crashFS
	opts   *Options
	j      *Journal
	born   bool  // Create was acknowledged
	closed bool  // Close(keep) without obligations was acknowledged or is under way
	acked  truth // what must be there
	maybe  truth // what may be there instead: acked plus the operation that was cut off
}

func newStory(c *crashFS) *story {
	clock := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return &story{
		fs: c, acked: truth{}, maybe: truth{},
		opts: &Options{FS: c, Now: func() time.Time { clock = clock.Add(time.Second); return clock }},
	}
}

func (s *story) settle() { s.acked = maps.Clone(s.maybe) }

// create makes the journal, or adopts what an earlier story left.
func (s *story) begin(adopt bool) (err error) {
	if adopt {
		if s.j, err = Adopt("d", "run1", s.opts); err != nil {
			return err // what was visible to a new process may still not be durable
		}
		got := handles(s.j.Open())
		if !maps.Equal(got, s.acked) && !maps.Equal(got, s.maybe) {
			return fmt.Errorf("adopted %v, want %v or %v", got, s.acked, s.maybe)
		}
		s.born, s.acked, s.maybe = true, got, maps.Clone(got)
		return nil
	}
	s.j, err = Create("d", "run1", Header{Command: "backup", VMs: []string{"web1"}}, s.opts)
	s.born = s.born || err == nil
	return err
}

// step does one random operation.
func (s *story) step(r *rand.Rand) error {
	ids := slices.Sorted(maps.Keys(s.acked))
	switch n := r.IntN(10); {
	case n == 0:
		return s.j.Stage("transfer", "web1", r.IntN(2) == 0)
	case n == 1:
		return s.j.Note("web1", fmt.Sprintf("note %d \n \x00", r.IntN(100)))
	case n < 5 || len(ids) == 0:
		next := formatID(s.j.nextID + 1)
		s.maybe[next] = ""
		id, err := s.j.Intend(Obligation{Kind: kinds[r.IntN(len(kinds))], VM: "web1", Object: "holdfast-run1"})
		if err == nil {
			s.settle()
			if id != next {
				return fmt.Errorf("got ID %q, want %q", id, next)
			}
		}
		return err
	case n < 7:
		id, handle := ids[r.IntN(len(ids))], fmt.Sprintf("handle-%d", r.IntN(1000))
		s.maybe[id] = handle
		err := s.j.Confirm(id, handle)
		if err == nil {
			s.settle()
		}
		return err
	default:
		id := ids[r.IntN(len(ids))]
		delete(s.maybe, id)
		err := s.j.Discharge(id)
		if err == nil {
			s.settle()
		}
		return err
	}
}

func (s *story) tell(r *rand.Rand, adopt bool, steps int) error {
	if err := s.begin(adopt); err != nil {
		return err
	}
	for range steps {
		if err := s.step(r); err != nil {
			return err
		}
	}
	if r.IntN(2) == 0 {
		for _, id := range slices.Sorted(maps.Keys(s.acked)) {
			delete(s.maybe, id)
			if err := s.j.Discharge(id); err != nil {
				return err
			}
			s.settle()
		}
	}
	s.closed = len(s.acked) == 0
	err := s.j.Close(true)
	if !s.closed && errors.Is(err, ErrOpen) && !errors.Is(err, errDead) {
		return nil
	}
	return err
}

func handles(open []OpenObligation) truth {
	out := truth{}
	for _, o := range open {
		out[o.ID] = o.Handle
	}
	return out
}

// check lists what a power cut left and compares it with what had been acknowledged.
func (s *story) check(t *testing.T, c *crashFS, what string) {
	t.Helper()
	opts := &Options{FS: c}
	live, err := List("d", opts)
	require.NoError(t, err, what)
	done, err := History("d", opts)
	require.NoError(t, err, what)
	for _, e := range append(slices.Clone(live), done...) {
		require.NoError(t, e.Err, what)
		require.False(t, e.Alive, what)
		require.Equal(t, "run1", e.Header.Run, what)
		require.Truef(t, slices.IsSortedFunc(e.Open, func(a, b OpenObligation) int {
			return a.Kind.Order() - b.Kind.Order()
		}), "%s: undo order", what)
	}
	switch {
	case !s.born:
		require.LessOrEqual(t, len(live), 1, what)
		for _, e := range live {
			require.Empty(t, e.Open, what)
		}
		return
	case s.closed:
		require.Len(t, append(live, done...), 1, what)
		require.Empty(t, append(live, done...)[0].Open, what)
		return
	}
	require.Len(t, live, 1, "%s: an acknowledged journal is lost", what)
	require.Empty(t, done, what)
	got := handles(live[0].Open)
	if !maps.Equal(got, s.acked) && !maps.Equal(got, s.maybe) {
		require.Equal(t, s.acked, got, "%s (or with the unacknowledged operation: %v)", what, s.maybe)
	}
}

// Every operation of the file system is the last one once, and the unsynced bytes are cut at
// every length, with the names of before and after the unsynced renames.
func TestCrashAnywhere(t *testing.T) {
	s0 := seed(t)
	for round := range uint64(3) {
		kill := 1
		for {
			c := newCrashFS()
			c.killAt = kill
			s := newStory(c)
			err := s.tell(rand.New(rand.NewPCG(s0, round)), false, 20)
			for keep := range c.pendingBytes() + 1 {
				for _, late := range []bool{false, true} {
					s.check(t, c.clone(late, keep, nil), fmt.Sprintf("round %d killed at %d, kept %d, late %v", round, kill, keep, late))
				}
			}
			if err == nil {
				require.Less(t, c.ops, kill)
				break
			}
			require.ErrorIs(t, err, errDead, "round %d killed at %d", round, kill)
			kill++
		}
		require.Greater(t, kill, 30, "the story is too short to mean anything")
	}
}

// Crash, recover, crash in recovery, and so on, with pieces of unsynced writes that survive out
// of order; at the end a recovery goes through.
func TestCrashAndRecoverRepeatedly(t *testing.T) {
	s0 := seed(t)
	for round := range uint64(1500) {
		r := rand.New(rand.NewPCG(s0, round))
		c := newCrashFS()
		s := newStory(c)
		visible := false
		for life := range 4 {
			what := fmt.Sprintf("round %d life %d", round, life)
			c.killAt = c.ops + 1 + r.IntN(120)
			s.fs, s.opts.FS = c, c
			err := s.tell(r, visible, 10)
			var shuffle *rand.Rand
			if r.IntN(2) == 0 {
				shuffle = r
			}
			power := c.clone(r.IntN(2) == 0, r.IntN(c.pendingBytes()+1), shuffle)
			s.check(t, power, what)
			if c.killed(); r.IntN(2) == 0 {
				s.check(t, c, what) // only the process died: what it wrote is there, synced or not
			} else {
				c = power
			}
			if s.closed {
				break
			}
			if err != nil {
				require.ErrorIs(t, err, errDead, what)
			}
			live, err := List("d", &Options{FS: c})
			require.NoError(t, err, what)
			visible = len(live) == 1
		}
		if !s.born || s.closed {
			continue
		}
		j, err := Adopt("d", "run1", &Options{FS: c})
		require.NoError(t, err, "round %d", round)
		for _, o := range j.Open() {
			require.NoError(t, j.Discharge(o.ID))
		}
		require.NoError(t, j.Close(false))
		live, err := List("d", &Options{FS: c})
		require.NoError(t, err)
		require.Empty(t, live)
	}
}

// A dead owner's unsynced records are visible to its heir. The heir must not call them durable
// before they are: the power may go while the heir writes, and take them.
func TestHeirSyncsFirst(t *testing.T) {
	r := rand.New(rand.NewPCG(seed(t), 1))
	for kill := 1; ; kill++ {
		c := newCrashFS()
		j, err := Create("d", "run1", Header{}, &Options{FS: c})
		require.NoError(t, err)
		require.NoError(t, j.Note("", "visible, not durable"))
		c.killed()
		c.killAt = c.ops + kill
		_, err = Adopt("d", "run1", &Options{FS: c})
		for range 50 {
			live, err := List("d", &Options{FS: c.clone(true, 0, r)})
			require.NoError(t, err)
			require.NoError(t, live[0].Err)
		}
		if err == nil {
			break
		}
	}
}

// Each operation fails once, a write after some of its bytes, and life goes on.
func TestFaultOnce(t *testing.T) {
	s0 := seed(t)
	failed := 0
	for at := 1; ; at++ {
		c := newCrashFS()
		r := rand.New(rand.NewPCG(s0, uint64(at)))
		part := r.IntN(400)
		hit := false
		c.fault = func(op int) (int, bool) { hit = hit || op == at; return part, op == at }
		opts := &Options{FS: c}
		j, err := Create("d", "run1", Header{}, opts)
		if err != nil {
			require.ErrorIs(t, err, errInjected)
			j, err = Create("d", "run1", Header{}, opts)
			require.NoError(t, err, "a failed Create must not block the next one (operation %d)", at)
		}
		must, mustNot := map[ID]bool{}, map[ID]bool{}
		for i := range 12 {
			_ = j.Note("", "not synced") // durable with the next obligation, or lost with it
			id, err := j.Intend(Obligation{Kind: Snapshot, Object: fmt.Sprint(i)})
			if err != nil {
				failed++
				require.True(t, errors.Is(err, errInjected) || errors.Is(err, ErrBroken), "%v", err)
				continue
			}
			must[id] = true
			if i%3 == 0 {
				delete(must, id)
				if err := j.Discharge(id); err == nil {
					mustNot[id] = true
				}
			}
		}
		closeErr := j.Close(true)
		if hit {
			require.Error(t, closeErr) // obligations are open
		}
		for _, late := range []bool{false, true} {
			live, err := List("d", &Options{FS: c.clone(late, 1<<20, nil)})
			require.NoError(t, err)
			require.Len(t, live, 1)
			require.NoError(t, live[0].Err)
			got := handles(live[0].Open)
			for id := range must {
				require.Contains(t, got, id, "operation %d failed: an acknowledged intent is lost", at)
			}
			for id := range mustNot {
				require.NotContains(t, got, id, "operation %d failed: an acknowledged discharge is lost", at)
			}
		}
		if !hit {
			break
		}
	}
	require.Greater(t, failed, 10)
}

// Many goroutines share one journal; the power goes at a random operation.
func TestConcurrentOwnersCrash(t *testing.T) {
	s0 := seed(t)
	for round := range uint64(60) {
		r := rand.New(rand.NewPCG(s0, round))
		c := newCrashFS()
		opts := &Options{FS: c}
		j, err := Create("d", "run1", Header{}, opts)
		require.NoError(t, err)
		c.mu.Lock()
		c.killAt = c.ops + 1 + r.IntN(200)
		if round == 0 {
			c.killAt = 0
		}
		c.mu.Unlock()
		var mu sync.Mutex
		must, mustNot := map[ID]bool{}, map[ID]bool{}
		var wg sync.WaitGroup
		for g := range 16 {
			wg.Go(func() {
				for i := range 8 {
					id, err := j.Intend(Obligation{Kind: Snapshot, Object: fmt.Sprint(g, i)})
					if err != nil {
						return
					}
					mu.Lock()
					must[id] = true
					mu.Unlock()
					_ = j.Stage("transfer", fmt.Sprint(g), i%2 == 0)
					_ = j.Open()
					if i%2 == 0 {
						mu.Lock()
						delete(must, id)
						mu.Unlock()
						if j.Discharge(id) == nil {
							mu.Lock()
							mustNot[id] = true
							mu.Unlock()
						}
					}
				}
			})
		}
		wg.Wait()
		if round == 0 {
			require.Len(t, must, 64)
		}
		for range 20 {
			live, err := List("d", &Options{FS: c.clone(true, r.IntN(c.pendingBytes()+1), r)})
			require.NoError(t, err)
			require.Len(t, live, 1)
			require.NoError(t, live[0].Err)
			got := handles(live[0].Open)
			for id := range must {
				require.Contains(t, got, id, "round %d", round)
			}
			for id := range mustNot {
				require.NotContains(t, got, id, "round %d", round)
			}
		}
	}
}

// Records that wait together share one write and one fsync.
func TestGroupCommit(t *testing.T) {
	c := newCrashFS()
	j, err := Create("d", "run1", Header{}, &Options{FS: c})
	require.NoError(t, err)
	before := c.syncs
	j.token <- struct{}{} // a writer is busy
	var wg sync.WaitGroup
	errs := make([]error, 10)
	for i := range errs {
		wg.Go(func() { _, errs[i] = j.Intend(Obligation{Kind: Thaw}) })
	}
	for waiting := 0; waiting < len(errs); runtime.Gosched() {
		j.mu.Lock()
		if waiting = 0; j.batch != nil {
			waiting = len(j.batch.records)
		}
		j.mu.Unlock()
	}
	<-j.token
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	require.Equal(t, before+1, c.syncs)
	require.Len(t, j.Open(), 10)
}
