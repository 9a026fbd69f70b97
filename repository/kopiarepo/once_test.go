package kopiarepo_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

// TestARunIsCommittedOnce: a run that did not hear of its commit and tries again, also
// while the first attempt is still under way, makes no second point.
func TestARunIsCommittedOnce(t *testing.T) {
	ctx := context.Background()
	rnd := seed(t)
	cfg := config(t.TempDir())
	first, second := create(t, cfg), open(t, cfg)
	m := newImage(2*mib, mib)
	m.fill(rnd, 0)
	o := backupOptions{chain: "vm", run: "r1"}
	w, err := second.Begin(ctx, &repository.PointSpec{Chain: "vm", Run: "r1"})
	require.NoError(t, err)
	require.NoError(t, w.File(ctx, "config", newReader([]byte("config"))))
	proof, err := backup(ctx, first, map[string]*image{"d": m}, o)
	require.NoError(t, err)
	_, err = w.Commit(ctx, &repository.CommitInfo{Created: time.Unix(1_700_000_000, 0)})
	require.ErrorIs(t, err, repository.ErrExists)
	_, err = backup(ctx, second, map[string]*image{"d": m}, o)
	require.ErrorIs(t, err, repository.ErrExists)
	list := points(t, second, repository.Query{Run: "r1"})
	require.Len(t, list, 1)
	require.Equal(t, proof.Point().ID, list[0].ID)
}
