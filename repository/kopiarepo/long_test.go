package kopiarepo_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// TestLongRunsSurviveCollection: a run that takes days, with deletion of its
// parent and maintenance in between, loses neither what it has stored nor what it
// inherits.
func TestLongRunsSurviveCollection(t *testing.T) {
	ctx := context.Background()
	rnd := seed(t)
	c := newClock()
	cfg := config(t.TempDir())
	cfg.Clock = c.Now
	cfg.CheckpointBytes = 4 * mib
	r := create(t, cfg)
	m := newImage(3*gib+5*mib+77, mib)
	for range 20 {
		m.fill(rnd, rnd.Int64N(m.count()))
	}
	proof, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{chain: "vm", run: "r0"})
	require.NoError(t, err)
	parent := proof.Point().ID

	next := m.clone()
	w, err := r.Begin(ctx, &repository.PointSpec{Chain: "vm", Run: "r1", Parent: parent})
	require.NoError(t, err)
	d, err := w.Disk(ctx, repository.DiskSpec{ID: "d", Size: m.size, BlockSize: m.bs, Inherit: true})
	require.NoError(t, err)
	h := digest.New(w.DigestKey())
	require.NoError(t, w.File(ctx, "config", newReader([]byte("config"))))
	deletePoint(ctx, t, r, parent)
	other := open(t, cfg) // maintenance is done by another process
	for k := range int64(24) {
		i := k * (m.count() - 1) / 23
		next.fill(rnd, i)
		require.NoError(t, d.WriteBlock(ctx, next.block(h, i)))
		require.NoError(t, d.Advance(ctx, i))
		c.Advance(6 * time.Hour)
		if k%4 == 3 {
			maintain(ctx, t, other)
		}
	}
	require.NoError(t, d.Close(ctx))
	_, err = w.Commit(ctx, &repository.CommitInfo{Created: c.Now()})
	require.NoError(t, err)
	for k := range 4 {
		c.Advance(30 * time.Hour)
		rep := maintain(ctx, t, other)
		t.Log(k, rep.BytesBefore, rep.BytesAfter, rep.Notes)
	}
	require.NoError(t, compare(ctx, other, w.ID(), map[string]*image{"d": next}))
	rep, err := other.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(t, err)
	require.Empty(t, rep.Damages)
}

// TestManyAtOnce: several chains are backed up by two processes while others read.
func TestManyAtOnce(t *testing.T) {
	ctx := context.Background()
	rnd := seed(t)
	cfg := config(t.TempDir())
	first := create(t, cfg)
	second := open(t, cfg)
	shared := newImage(20*mib, mib)
	for i := range shared.count() {
		shared.fill(rnd, i)
	}
	type result struct {
		id  repository.PointID
		m   *image
		err error
	}
	const n = 6
	results := make(chan result, n)
	for k := range n {
		m := shared.clone()
		m.fill(rnd, int64(k))
		go func() {
			r := first
			if k%2 == 1 {
				r = second
			}
			proof, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{
				chain: fmt.Sprintf("vm-%d", k/3), run: fmt.Sprintf("r%d", k), workers: 3,
			})
			if err != nil {
				results <- result{err: err}
				return
			}
			results <- result{proof.Point().ID, m, compare(ctx, r, proof.Point().ID, map[string]*image{"d": m})}
		}()
	}
	third := open(t, cfg)
	for range n {
		got := <-results
		require.NoError(t, got.err)
		require.NoError(t, compare(ctx, third, got.id, map[string]*image{"d": got.m}))
	}
	for _, name := range []string{"vm-0", "vm-1"} {
		list := points(t, third, repository.Query{Chain: name})
		require.Len(t, list, 3)
		for i, p := range list {
			require.Equal(t, int64(i+1), p.Sequence)
		}
	}
	rep, err := third.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(t, err)
	require.Empty(t, rep.Damages)
}
