package kopiarepo_test

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
)

// TestVerifyWhilePruned deletes points, and by maintenance their data, at some storage
// operation of a verification by another process: that is not damage.
func TestVerifyWhilePruned(t *testing.T) {
	ctx := context.Background()
	rnd := seed(t)
	base := t.TempDir() + "/base"
	c := newClock()
	cfg := config(base)
	cfg.Clock = c.Now
	r := create(t, cfg)
	var ids []repository.PointID
	var last *image
	for k := range 3 {
		last = newImage(3*mib+700, mib)
		last.fill(rnd, int64(k))
		proof, err := backup(ctx, r, map[string]*image{"d": last}, backupOptions{chain: "vm", run: fmt.Sprintf("r%d", k)})
		require.NoError(t, err)
		ids = append(ids, proof.Point().ID)
	}
	require.NoError(t, r.Close())
	c.Advance(50 * time.Hour)
	for _, level := range []repository.VerifyLevel{repository.VerifyRecords, repository.VerifyBlobs, repository.VerifyData} {
		stride := 80 // a sample; at night most operations are tried
		if os.Getenv("HOLDFAST_NIGHTLY") != "" {
			stride = 3
		}
		for at := 1 + rnd.IntN(stride); ; at += 1 + rnd.IntN(2*stride) {
			cfg.Dir = copyTree(t, base)
			other := open(t, cfg)
			n, pruned := 0, false
			var mu sync.Mutex
			checked := cfg
			checked.StorageHook = func(context.Context, kopiarepo.StorageOp) (func(error) error, error) {
				mu.Lock()
				defer mu.Unlock()
				if n++; n == at {
					pruned = true
					for _, id := range ids[:2] {
						deletePoint(ctx, t, other, id)
					}
					for range 3 {
						c.Advance(26 * time.Hour)
						maintain(ctx, t, other)
					}
				}
				return nil, nil
			}
			r := open(t, checked)
			rep, err := r.Verify(ctx, &repository.VerifyOptions{Level: level})
			require.NoError(t, err, "level %v, pruned at operation %d", level, at)
			require.Empty(t, rep.Damages, "level %v, pruned at operation %d", level, at)
			require.NoError(t, compare(ctx, other, ids[2], map[string]*image{"d": last}))
			require.NoError(t, r.Close())
			require.NoError(t, other.Close())
			if !pruned {
				require.Greater(t, n, 20)
				break
			}
		}
	}
}
