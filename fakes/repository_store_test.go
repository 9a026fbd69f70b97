package fakes_test

import (
	"bytes"
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

func leavesOf(w repository.Writer, b []byte) []repository.Digest {
	return digest.New(w.DigestKey()).Leaves(nil, b)
}

func openStore(t *testing.T, opts fakes.RepositoryOptions) (*fakes.Store, *fakes.Repository) {
	t.Helper()
	store := fakes.NewStore()
	r, err := store.Open(t.Context(), opts)
	require.NoError(t, err)
	return store, r
}

func states(t *testing.T, r repository.Repository) (out []repository.State) {
	t.Helper()
	for p, err := range r.Points(t.Context(), repository.Query{}) {
		require.NoError(t, err)
		out = append(out, p.State)
	}
	return out
}

func TestStoreFull(t *testing.T) {
	ctx := t.Context()
	store, r := openStore(t, fakes.RepositoryOptions{})
	block := bytes.Repeat([]byte("a"), repository.DefaultBlockSize)
	first, err := writePoint(ctx, r, repository.PointSpec{Chain: "vm", Run: "r1"}, 4<<20, map[int64][]byte{0: block})
	require.NoError(t, err)
	store.SetCapacity(store.Bytes() + 1000)
	_, err = writePoint(ctx, r, repository.PointSpec{Chain: "vm", Run: "r2"}, 4<<20, map[int64][]byte{1: bytes.Repeat([]byte("b"), repository.DefaultBlockSize)})
	require.ErrorIs(t, err, repository.ErrNoSpace)
	require.Equal(t, []repository.State{repository.Committed}, states(t, r))
	_, err = readDisk(ctx, r, first)
	require.NoError(t, err)
	// Room can be made from the reserve.
	m, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{})
	require.NoError(t, err)
	require.NoError(t, r.Delete(ctx, first, m))
	rep, err := r.Maintain(ctx, m, nil)
	require.NoError(t, err)
	require.Zero(t, rep.BytesAfter)
	_, err = writePoint(ctx, r, repository.PointSpec{Chain: "vm", Run: "r3"}, 4<<20, map[int64][]byte{1: block})
	require.NoError(t, err)
}

func TestStoreReadOnly(t *testing.T) {
	ctx := t.Context()
	store, r := openStore(t, fakes.RepositoryOptions{})
	p, err := writePoint(ctx, r, repository.PointSpec{Chain: "vm", Run: "r1"}, 4<<20, nil)
	require.NoError(t, err)
	store.SetReadOnly(true)
	_, err = r.Begin(ctx, &repository.PointSpec{Chain: "vm", Run: "r2"})
	require.ErrorIs(t, err, repository.ErrReadOnly)
	require.ErrorIs(t, r.PutNote(ctx, "n", nil), repository.ErrReadOnly)
	_, err = readDisk(ctx, r, p)
	require.NoError(t, err)
}

func TestStoreThatIsNoRepository(t *testing.T) {
	store, _ := openStore(t, fakes.RepositoryOptions{})
	_, err := store.Damage("format", fakes.BlobFlip)
	require.NoError(t, err)
	_, err = store.Open(t.Context(), fakes.RepositoryOptions{})
	require.ErrorIs(t, err, repository.ErrDamaged)
	store, r := openStore(t, fakes.RepositoryOptions{})
	require.NoError(t, r.PutNote(t.Context(), "n", nil))
	_, err = store.Damage("format", fakes.BlobLost)
	require.NoError(t, err)
	_, err = store.Open(t.Context(), fakes.RepositoryOptions{})
	require.ErrorIs(t, err, repository.ErrNotRepository, "a new one beside the rest of an old one would hide it")
}

func TestStoreSeedMakesIdentity(t *testing.T) {
	_, a := openStore(t, fakes.RepositoryOptions{Seed: 1})
	_, b := openStore(t, fakes.RepositoryOptions{Seed: 1})
	_, c := openStore(t, fakes.RepositoryOptions{Seed: 2})
	require.Equal(t, a.Info().ID, b.Info().ID)
	require.NotEqual(t, a.Info().ID, c.Info().ID)
}

func TestStoreHookSeesEveryOperation(t *testing.T) {
	ctx := t.Context()
	store, r := openStore(t, fakes.RepositoryOptions{})
	before := store.Ops()
	var seen atomic.Int64
	kinds := map[fakes.StoreOpKind]bool{}
	store.SetHook(func(_ context.Context, op fakes.StoreOp) fakes.StoreFault {
		if want := before + seen.Add(1); op.Seq != want || op.Process != 1 {
			t.Errorf("%s, want #%d of process 1", op, want)
		}
		kinds[op.Kind] = true
		return fakes.StoreFault{}
	})
	s := newStory(1)
	require.NoError(t, s.run(ctx, r))
	require.Equal(t, store.Ops()-before, seen.Load())
	for _, k := range []fakes.StoreOpKind{
		fakes.StorePut, fakes.StoreTouch, fakes.StoreDelete, fakes.StoreGet, fakes.StoreList,
	} {
		require.True(t, kinds[k], "no %s in the story", k)
	}
}

func TestStoreHoldDelays(t *testing.T) {
	_, r := openStore(t, fakes.RepositoryOptions{})
	store, r2 := openStore(t, fakes.RepositoryOptions{})
	hold, held := make(chan struct{}), make(chan struct{})
	store.SetHook(func(_ context.Context, _ fakes.StoreOp) fakes.StoreFault {
		close(held)
		return fakes.StoreFault{Hold: hold}
	})
	done := make(chan error, 1)
	go func() { done <- r2.PutNote(t.Context(), "n", nil) }()
	<-held
	require.Empty(t, store.Names("notes/"))
	require.NoError(t, r.PutNote(t.Context(), "n", nil), "another store goes on")
	close(hold)
	require.NoError(t, <-done)
	require.Equal(t, []string{"notes/n"}, store.Names("notes/"))
}

// TestRecordsCannotBeMoved damages records in ways that only authentication, the
// place in the chain, or later records can tell.
func TestRecordsCannotBeMoved(t *testing.T) {
	ctx := t.Context()
	store, r := openStore(t, fakes.RepositoryOptions{})
	for i := range 3 {
		_, err := writePoint(ctx, r, repository.PointSpec{Chain: "vm", Run: fmt.Sprint("r", i)}, 4<<20, nil)
		require.NoError(t, err)
	}
	records := store.Names("records/")
	require.Len(t, records, 3)
	all := []repository.State{repository.Committed, repository.Committed, repository.Committed}
	require.Equal(t, all, states(t, r))

	require.NoError(t, store.Swap(records[0], records[1]))
	require.Equal(t, []repository.State{repository.Untrusted, repository.Untrusted, repository.Committed}, states(t, r))
	require.NoError(t, store.Swap(records[0], records[1]))

	for _, how := range fakes.BlobDamages() {
		undo, err := store.Damage(records[1], how)
		require.NoError(t, err)
		want := repository.Untrusted
		if how == fakes.BlobLost {
			want = repository.Vanished
		}
		require.Equal(t, []repository.State{repository.Committed, want, repository.Committed}, states(t, r), "%s", how)
		undo()
	}
	require.Equal(t, all, states(t, r))
}

func TestMaintenanceRemovesNothingWhileSomethingIsUnreadable(t *testing.T) {
	ctx := t.Context()
	store, r := openStore(t, fakes.RepositoryOptions{})
	block := bytes.Repeat([]byte("a"), repository.DefaultBlockSize)
	for i := range 2 {
		block[0] = byte(i)
		_, err := writePoint(ctx, r, repository.PointSpec{Chain: "vm", Run: fmt.Sprint("r", i)}, 4<<20, map[int64][]byte{int64(i): block})
		require.NoError(t, err)
	}
	m, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{})
	require.NoError(t, err)
	blocks := store.Names("blocks/")
	for _, prefix := range []string{"records/", "maps/", "disks/"} {
		undo, err := store.Damage(store.Names(prefix)[0], fakes.BlobTruncate)
		require.NoError(t, err)
		rep, err := r.Maintain(ctx, m, nil)
		require.NoError(t, err)
		require.NotEmpty(t, rep.Notes, prefix)
		require.Equal(t, blocks, store.Names("blocks/"), prefix)
		undo()
	}
	rep, err := r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(t, err)
	require.True(t, rep.OK(), "%+v", rep.Damages)
}

func TestMaintenanceGivesUpOldPins(t *testing.T) {
	ctx := t.Context()
	clock := fakes.NewClock(time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC))
	store, r := openStore(t, fakes.RepositoryOptions{Clock: clock.Now})
	begin := func(run string) repository.Writer {
		w, err := r.Begin(ctx, &repository.PointSpec{Chain: "vm", Run: run})
		require.NoError(t, err)
		d, err := w.Disk(ctx, repository.DiskSpec{ID: "d", Size: 1 << 20, BlockSize: 1 << 20})
		require.NoError(t, err)
		b := bytes.Repeat([]byte(run), 1<<20)[:1<<20]
		require.NoError(t, d.WriteBlock(ctx, repository.Block{Data: b, Leaves: leavesOf(w, b)}))
		require.NoError(t, d.Close(ctx))
		return w
	}
	maintain := func() {
		m, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{})
		require.NoError(t, err)
		_, err = r.Maintain(ctx, m, nil)
		require.NoError(t, err)
		require.NoError(t, m.Release(ctx))
	}
	old := begin("old")
	clock.Advance(23 * time.Hour)
	maintain()
	require.Len(t, store.Names("blocks/"), 1)
	clock.Advance(2 * time.Hour)
	young := begin("young")
	maintain()
	require.Len(t, store.Names("blocks/"), 1, "what the crashed one left is collected, the young one's is not")
	_, err := old.Commit(ctx, &repository.CommitInfo{})
	require.Error(t, err, "a point that was given up cannot come back")
	_, err = young.Commit(ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	require.Len(t, states(t, r), 1)
}

// TestUnstoredBlockPoisonsTheDisk holds a caller that ignores an error of
// WriteBlock: the block must not become zeros or the parent's silently.
func TestUnstoredBlockPoisonsTheDisk(t *testing.T) {
	ctx := t.Context()
	store, r := openStore(t, fakes.RepositoryOptions{})
	w, err := r.Begin(ctx, &repository.PointSpec{Chain: "vm", Run: "r"})
	require.NoError(t, err)
	d, err := w.Disk(ctx, repository.DiskSpec{ID: "d", Size: 4 << 20, BlockSize: 1 << 20})
	require.NoError(t, err)
	b := bytes.Repeat([]byte("a"), 1<<20)
	block := repository.Block{Index: 2, Data: b, Leaves: leavesOf(w, b)}
	store.SetHook(fakes.StoreFaultOn(fakes.StorePut, "blocks/", 1, fakes.StoreFault{Err: repository.ErrNoSpace}))
	require.ErrorIs(t, d.WriteBlock(ctx, block), repository.ErrNoSpace)
	require.ErrorIs(t, d.Advance(ctx, 4), repository.ErrNoSpace)
	require.ErrorIs(t, d.Close(ctx), repository.ErrNoSpace)
	_, err = w.Commit(ctx, nil)
	require.Error(t, err)
	require.NoError(t, d.WriteBlock(ctx, block), "another try")
	require.NoError(t, d.Close(ctx))
	_, err = w.Commit(ctx, nil)
	require.NoError(t, err)
	got, err := readDisk(ctx, r, w.ID())
	require.NoError(t, err)
	require.True(t, bytes.Equal(b, got[2<<20:3<<20]))
}

// TestRunIsCommittedOnce retries a run whose acknowledgement was lost.
func TestRunIsCommittedOnce(t *testing.T) {
	ctx := t.Context()
	_, r := openStore(t, fakes.RepositoryOptions{})
	_, err := writePoint(ctx, r, repository.PointSpec{Chain: "vm", Run: "r1"}, 4<<20, nil)
	require.NoError(t, err)
	_, err = writePoint(ctx, r, repository.PointSpec{Chain: "vm", Run: "r1"}, 4<<20, nil)
	require.ErrorIs(t, err, repository.ErrExists)
	require.Len(t, states(t, r), 1)
}
