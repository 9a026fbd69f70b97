package fakes_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/repository"
)

// storeRand returns randomness that HOLDFAST_SEED replays.
func storeRand(t *testing.T) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		seed = n
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 2))
}

// story is a scripted life of a repository: each step may fail, and truth holds
// what every acknowledged point must read as.
type story struct {
	rng     *rand.Rand
	truth   map[repository.PointID][]byte
	deleted map[repository.PointID]bool // deletion was asked for, whether acknowledged or not
	acked   map[repository.PointID]int  // acknowledged, when the log was so long
	log     func() int
}

const (
	storySize  = 4*repository.LeafSize + 999
	storyBlock = repository.LeafSize
)

var storyOptions = fakes.RepositoryOptions{SegmentBlocks: 2}

func newStory(seed uint64) *story {
	return &story{
		rng:     rand.New(rand.NewPCG(seed, 3)),
		truth:   map[repository.PointID][]byte{},
		deleted: map[repository.PointID]bool{},
		acked:   map[repository.PointID]int{},
		log:     func() int { return 0 },
	}
}

// run lives through four points, a deletion, maintenance and a note, and returns
// the first error.
func (s *story) run(ctx context.Context, r repository.Repository) error {
	lock, err := r.Lock(ctx, "vm", repository.LockOptions{Holder: "story"})
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	var parent repository.PointID
	content := make([]byte, storySize)
	for k := range 4 {
		content = bytes.Clone(content)
		var write []int64
		for i := range repository.Blocks(storySize, storyBlock) {
			if k == 0 && i%3 != 1 || s.rng.IntN(8) == 0 {
				n := repository.BlockLen(storySize, storyBlock, i)
				for j := range 8 {
					content[i*storyBlock+int64(j%n)] = byte(s.rng.IntN(256))
				}
				write = append(write, i)
			}
		}
		id, err := s.point(ctx, r, lock, k, parent, content, write)
		if id != "" {
			s.truth[id] = content // reported, or perhaps visible: must be right then
		}
		if err != nil {
			return fmt.Errorf("point %d: %w", k, err)
		}
		s.acked[id] = s.log()
		if err := r.PutNote(ctx, "open/run", []byte(id)); err != nil {
			return fmt.Errorf("note %d: %w", k, err)
		}
		if k == 2 {
			if err := s.prune(ctx, r, parent); err != nil {
				return fmt.Errorf("prune: %w", err)
			}
		}
		parent = id
	}
	return lock.Release(ctx)
}

func (s *story) prune(ctx context.Context, r repository.Repository, id repository.PointID) error {
	m, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{Holder: "story"})
	if err != nil {
		return err
	}
	s.deleted[id] = true
	if err := r.Delete(ctx, id, m); err != nil {
		return err
	}
	if _, err := r.Maintain(ctx, m, nil); err != nil {
		return err
	}
	return m.Release(ctx)
}

// point returns the ID once the commit was tried.
func (s *story) point(ctx context.Context, r repository.Repository, lock repository.Lock, k int, parent repository.PointID, content []byte, write []int64) (repository.PointID, error) {
	w, err := r.Begin(ctx, &repository.PointSpec{Chain: "vm", Run: fmt.Sprint("r", k), Parent: parent, Lock: lock})
	if err != nil {
		return "", err
	}
	d, err := w.Disk(ctx, repository.DiskSpec{ID: "d", Size: storySize, BlockSize: storyBlock, Inherit: parent != ""})
	if err != nil {
		return "", err
	}
	for _, i := range write {
		b := content[i*storyBlock:][:repository.BlockLen(storySize, storyBlock, i)]
		if err := d.WriteBlock(ctx, repository.Block{Index: i, Data: b, Leaves: leavesOf(w, b)}); err != nil {
			return "", err
		}
		if err := d.Advance(ctx, i); err != nil {
			return "", err
		}
	}
	if err := d.Close(ctx); err != nil {
		return "", err
	}
	if err := w.File(ctx, "config", bytes.NewReader([]byte("config"))); err != nil {
		return "", err
	}
	_, err = w.Commit(ctx, &repository.CommitInfo{Created: time.Unix(int64(k), 0)})
	return w.ID(), err
}

// survives opens the store, which is what it was after so many operations of the
// log, as the next process and checks the promise: what is listed as committed is
// bit-exact, what was acknowledged is listed or was deleted, and the repository
// goes on working.
func (s *story) survives(ctx context.Context, store *fakes.Store, log int) error {
	r, err := store.Open(ctx, storyOptions)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	listed := map[repository.PointID]bool{}
	for p, err := range r.Points(ctx, repository.Query{}) {
		if err != nil {
			return err
		}
		if p.State != repository.Committed {
			return fmt.Errorf("point %s is %s: %s", p.ID, p.State, p.Detail)
		}
		listed[p.ID] = true
		got, err := readDisk(ctx, r, p.ID)
		if err != nil {
			return fmt.Errorf("point %s: %w", p.ID, err)
		}
		if !bytes.Equal(got, s.truth[p.ID]) {
			return fmt.Errorf("point %s reads wrong", p.ID)
		}
	}
	for id, at := range s.acked {
		if at <= log && !listed[id] && !s.deleted[id] {
			return fmt.Errorf("point %s was acknowledged and is gone", id)
		}
	}
	rep, err := r.Verify(ctx, nil)
	if err != nil || !rep.OK() {
		return fmt.Errorf("verify: %w, %+v", err, rep)
	}
	// Life goes on: maintenance after the lease of the dead, then one more point.
	m, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{Takeover: func(string) bool { return true }})
	if err != nil {
		return err
	}
	if _, err := r.Maintain(ctx, m, nil); err != nil {
		return err
	}
	next, err := writePoint(ctx, r, repository.PointSpec{Chain: "vm", Run: "after"}, 999, map[int64][]byte{0: bytes.Repeat([]byte("x"), 999)})
	if err != nil {
		return err
	}
	rep, err = r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	if err != nil || !rep.OK() || len(rep.Points) != len(listed)+1 {
		return fmt.Errorf("verify after point %s: %w, %+v", next, err, rep)
	}
	return nil
}

func TestRepositoryStorySurvivesEveryCrashPoint(t *testing.T) {
	ctx := t.Context()
	seed := storeRand(t).Uint64()
	store := fakes.NewStore()
	r, err := store.Open(ctx, storyOptions)
	require.NoError(t, err)
	store.Record()
	s := newStory(seed)
	s.log = func() int { return len(store.Log()) }
	require.NoError(t, s.run(ctx, r))
	log := store.Log()
	require.Greater(t, len(log), 40)
	require.Equal(t, store.Names(""), store.ReplayTo(len(log)).Names(""))
	for k := range len(log) + 1 {
		require.NoError(t, s.survives(ctx, store.ReplayTo(k), k), "after %d operations", k)
	}
}

func TestRepositoryTornPutsAreNoticed(t *testing.T) {
	ctx := t.Context()
	store := fakes.NewStore()
	r, err := store.Open(ctx, storyOptions)
	require.NoError(t, err)
	store.Record()
	s := newStory(storeRand(t).Uint64())
	require.NoError(t, s.run(ctx, r))
	for k, op := range store.Log() {
		if op.Kind != fakes.StorePut {
			continue
		}
		for _, keep := range []int64{0, op.Size / 2, op.Size - 1} {
			torn := store.ReplayTorn(k+1, keep)
			r, err := torn.Open(ctx, storyOptions)
			require.NoError(t, err, "%s", op)
			for p, err := range r.Points(ctx, repository.Query{}) {
				require.NoError(t, err)
				got, err := readDisk(ctx, r, p.ID)
				if err == nil {
					require.True(t, bytes.Equal(s.truth[p.ID], got), "%s, %d bytes kept: point %s reads wrong", op, keep, p.ID)
				} else {
					require.ErrorIs(t, err, repository.ErrDamaged)
				}
			}
		}
	}
}

// TestRepositoryFaultAtEveryOperation lets each operation of the story fail,
// before or after its effect, or kill the process there.
func TestRepositoryFaultAtEveryOperation(t *testing.T) {
	ctx := t.Context()
	seed := storeRand(t).Uint64()
	boom := errors.New("storage broke")
	for name, fault := range map[string]fakes.StoreFault{
		"fails before": {Err: boom},
		"fails after":  {Err: boom, After: true},
		"kill before":  {Kill: true},
		"kill after":   {Kill: true, After: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			struck := 0
			for k := int64(1); ; k++ {
				store := fakes.NewStore()
				r, err := store.Open(ctx, storyOptions)
				require.NoError(t, err)
				hit := false
				at := fakes.StoreFaultAt(k, fault)
				store.SetHook(func(ctx context.Context, op fakes.StoreOp) fakes.StoreFault {
					if fault.After && !op.Kind.Mutates() {
						return fakes.StoreFault{} // the same as failing before
					}
					f := at(ctx, op)
					hit = hit || f != fakes.StoreFault{}
					return f
				})
				s := newStory(seed)
				err = s.run(ctx, r)
				store.SetHook(nil)
				if !hit {
					require.NoError(t, err)
					break
				}
				struck++
				if err == nil {
					// What comes after a commit, or is looked at again, may be forgiven.
					require.False(t, fault.Kill, "operation %d: a killed process goes on", k)
					require.Len(t, s.acked, 4)
				} else if fault.Kill {
					require.ErrorIs(t, err, fakes.ErrKilled)
				} else {
					require.ErrorIs(t, err, boom, "operation %d", k)
				}
				require.NoError(t, s.survives(ctx, store, 0), "operation %d", k)
			}
			require.Greater(t, struck, 40)
		})
	}
}

func TestRepositoryHangsUntilCanceled(t *testing.T) {
	store := fakes.NewStore()
	r, err := store.Open(t.Context(), storyOptions)
	require.NoError(t, err)
	store.SetHook(fakes.StoreFaultOn(fakes.StorePut, "records/", 1, fakes.StoreFault{Hang: true, After: true}))
	ctx, cancel := context.WithCancel(t.Context())
	reached := make(chan struct{})
	hang := fakes.StoreFaultOn(fakes.StorePut, "records/", 1, fakes.StoreFault{Hang: true, After: true})
	store.SetHook(func(ctx context.Context, op fakes.StoreOp) fakes.StoreFault {
		f := hang(ctx, op)
		if f.Hang {
			close(reached)
		}
		return f
	})
	done := make(chan error, 1)
	go func() {
		_, err := writePoint(ctx, r, repository.PointSpec{Chain: "vm", Run: "r"}, storySize, nil)
		done <- err
	}()
	<-reached
	cancel()
	err = <-done
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorIs(t, err, repository.ErrOutcomeUnknown)
	n := 0
	for p, err := range r.Points(t.Context(), repository.Query{Run: "r"}) {
		require.NoError(t, err)
		require.Equal(t, repository.Committed, p.State)
		n++
	}
	require.Equal(t, 1, n, "the run can be found, as ErrOutcomeUnknown says")
}

// A commit that is canceled before its record is put did not happen, and says so.
func TestRepositoryCanceledCommitIsKnown(t *testing.T) {
	for k := 1; ; k++ {
		store := fakes.NewStore()
		r, err := store.Open(t.Context(), storyOptions)
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		n, put := 0, false
		store.SetHook(func(_ context.Context, op fakes.StoreOp) fakes.StoreFault {
			put = put || op.Kind == fakes.StorePut && strings.HasPrefix(op.Name, "records/")
			if n++; n == k {
				cancel()
			}
			return fakes.StoreFault{}
		})
		_, err = writePoint(ctx, r, repository.PointSpec{Chain: "vm", Run: "r"}, storySize, nil)
		cancel()
		if n < k {
			require.True(t, put, "the campaign of this test reaches the record")
			return
		}
		if !put {
			require.ErrorIs(t, err, context.Canceled, "operation %d", k)
			require.NotErrorIs(t, err, repository.ErrOutcomeUnknown, "operation %d", k)
		}
	}
}
