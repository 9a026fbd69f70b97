package kopiarepo_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
)

// TestInventoryIsReadByManyAtOnce has many readers in one process while another one
// adds entries: each is applied once, in order.
func TestInventoryIsReadByManyAtOnce(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir() + "/repo"
	m, _ := small(t, dir)
	r, other := open(t, config(dir)), open(t, config(dir))
	ended := make(chan struct{})
	var g errgroup.Group
	for range 8 {
		g.Go(func() error {
			for {
				lost, err := r.LoadInventory(ctx)
				if err == nil && len(lost) > 0 {
					err = fmt.Errorf("lost: %v", lost)
				}
				select {
				case <-ended:
					return err
				default:
				}
				if err != nil {
					return err
				}
			}
		})
	}
	for i := range 8 {
		_, err := backup(ctx, other, map[string]*image{"d": m}, backupOptions{chain: "vm", run: fmt.Sprintf("more%d", i)})
		require.NoError(t, err)
	}
	close(ended)
	require.NoError(t, g.Wait())
}

// TestUnfinishedInventoryEntry kills maintenance when of an entry of the inventory, and
// one of them holds everything, only the copy is there: the entries before it count,
// and the next process goes on.
func TestUnfinishedInventoryEntry(t *testing.T) {
	ctx := context.Background()
	base := t.TempDir() + "/base"
	m, id := small(t, base)
	for k := int64(1); ; k++ {
		cfg := config(copyTree(t, base))
		var entries atomic.Int64
		cfg.StorageHook = func(_ context.Context, op kopiarepo.StorageOp) (func(error) error, error) {
			if op.Kind == kopiarepo.OpCreate && strings.HasPrefix(op.Name, "holdfast/inventory/") {
				entries.Add(1)
			}
			if entries.Load() >= k {
				return nil, errInjected
			}
			return nil, nil
		}
		r, err := kopiarepo.Open(ctx, cfg)
		require.NoError(t, err)
		lock, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{})
		require.NoError(t, err)
		_, err = r.Maintain(ctx, lock, &repository.MaintainOptions{Full: true})
		_ = r.Close() // it is dead
		if entries.Load() < k {
			require.NoError(t, err)
			require.Greater(t, k, int64(2))
			return
		}
		require.ErrorIs(t, err, errInjected)

		r = open(t, config(cfg.Dir))
		rep, err := r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData})
		require.NoError(t, err)
		require.Empty(t, rep.Damages)
		_, known, err := r.VerifyFile(ctx, "kopia.repository.f")
		require.NoError(t, err)
		require.True(t, known, "entry %d: the inventory knows of nothing that was stored", k)
		lock, err = r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{Takeover: func(string) bool { return true }})
		require.NoError(t, err)
		_, err = r.Maintain(ctx, lock, &repository.MaintainOptions{Full: true})
		require.NoError(t, err)
		require.NoError(t, lock.Release(ctx))
		_, err = backup(ctx, r, map[string]*image{"d": m}, backupOptions{chain: "vm", run: "r2", parent: id})
		require.NoError(t, err)
	}
}
