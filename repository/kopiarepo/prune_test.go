package kopiarepo_test

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
)

// usage adds up the sizes of the files of a repository.
func usage(t testing.TB, dir string) (n int64) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		n += info.Size()
		return err
	}))
	return n
}

func maintain(ctx context.Context, t testing.TB, r *kopiarepo.Repository) *repository.MaintainReport {
	t.Helper()
	l, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{Holder: "test"})
	require.NoError(t, err)
	rep, err := r.Maintain(ctx, l, &repository.MaintainOptions{Full: true})
	require.NoError(t, err)
	require.NoError(t, l.Release(ctx))
	return rep
}

func deletePoint(ctx context.Context, t testing.TB, r *kopiarepo.Repository, id repository.PointID) {
	t.Helper()
	l, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{Holder: "test"})
	require.NoError(t, err)
	require.NoError(t, r.Delete(ctx, id, l))
	require.NoError(t, r.Delete(ctx, id, l), "deleting twice")
	require.NoError(t, l.Release(ctx))
}

// TestPruneGivesSpaceBack prunes 30 points to one and moves the clock past kopia's
// safety times: what is left takes hardly more than a new repository with that
// point.
func TestPruneGivesSpaceBack(t *testing.T) {
	ctx := context.Background()
	rnd := seed(t)
	c := newClock()
	dir := t.TempDir()
	cfg := config(dir)
	cfg.Clock = c.Now
	r := create(t, cfg)
	m := newImage(2*gib+3*mib+512, mib)
	for range 60 {
		m.fill(rnd, rnd.Int64N(m.count()))
	}
	used := sortedIndexes(m.blocks)
	var ids []repository.PointID
	parent := repository.PointID("")
	for k := range 30 {
		var changed []int64
		if k > 0 {
			for range 15 {
				i := used[rnd.IntN(len(used))]
				m.fill(rnd, i)
				changed = append(changed, i)
			}
			changed = dedupe(changed)
		}
		proof, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{
			chain: "vm", run: fmt.Sprintf("r%d", k), parent: parent, changed: map[string][]int64{"d": changed}, workers: 2,
		})
		require.NoError(t, err)
		parent = proof.Point().ID
		ids = append(ids, parent)
		c.Advance(24 * time.Hour)
	}
	for _, id := range ids[:len(ids)-1] {
		deletePoint(ctx, t, r, id)
	}
	for k := range 6 {
		c.Advance(26 * time.Hour)
		rep := maintain(ctx, t, r)
		t.Logf("maintenance %d: %d -> %d bytes, %d -> %d blobs %v", k, rep.BytesBefore, rep.BytesAfter, rep.BlobsBefore, rep.BlobsAfter, rep.Notes)
		require.True(t, rep.Ran)
	}
	require.NoError(t, compare(ctx, r, parent, map[string]*image{"d": m}))
	rep, err := r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(t, err)
	require.Empty(t, rep.Damages)

	fresh := t.TempDir()
	cfg.Dir = fresh
	f := create(t, cfg)
	_, err = backup(ctx, f, map[string]*image{"d": m}, backupOptions{chain: "vm", run: "r0", workers: 2})
	require.NoError(t, err)
	left, ideal := usage(t, dir), usage(t, fresh)
	t.Logf("%d bytes are left, a new repository has %d", left, ideal)
	require.LessOrEqual(t, float64(left), 1.2*float64(ideal))
}

// TestMaintenanceRemovesWhatKilledWritersLeft, and not what is being written.
func TestMaintenanceRemovesWhatKilledWritersLeft(t *testing.T) {
	dir := t.TempDir()
	c := newClock()
	cfg := config(dir)
	cfg.Clock = c.Now
	r := create(t, cfg)
	dead := filepath.Join(dir, "holdfast", "packs", "dead.tmp.0123456789abcdef")
	alive := filepath.Join(dir, "holdfast", "records", "alive.tmp.0123456789abcdef")
	for _, f := range []string{dead, alive} {
		require.NoError(t, os.MkdirAll(filepath.Dir(f), 0o700))
		require.NoError(t, os.WriteFile(f, []byte("half"), 0o600))
	}
	old := time.Now().Add(-25 * time.Hour)
	require.NoError(t, os.Chtimes(dead, old, old))
	c.Advance(30 * time.Hour)
	maintain(context.Background(), t, r)
	require.NoFileExists(t, dead)
	require.FileExists(t, alive)
}

func dedupe(in []int64) []int64 {
	set := map[int64][]byte{}
	for _, i := range in {
		set[i] = nil
	}
	return sortedIndexes(set)
}
