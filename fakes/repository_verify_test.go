package fakes_test

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/repository"
)

// TestRepositoryVerifyWhilePruned deletes points and their data at each operation of a
// verification by another process: that is not damage.
func TestRepositoryVerifyWhilePruned(t *testing.T) {
	for k := 1; ; k++ {
		store := fakes.NewStore()
		r, err := store.Open(t.Context(), storyOptions)
		require.NoError(t, err)
		s := newStory(3)
		require.NoError(t, s.run(t.Context(), r))
		other, err := store.Open(t.Context(), storyOptions)
		require.NoError(t, err)
		ops := 0
		store.SetHook(func(context.Context, fakes.StoreOp) fakes.StoreFault {
			if ops++; ops == k {
				store.SetHook(nil)
				for id := range s.acked {
					require.NoError(t, s.prune(t.Context(), other, id))
				}
			}
			return fakes.StoreFault{}
		})
		rep, err := r.Verify(t.Context(), &repository.VerifyOptions{Level: repository.VerifyData})
		require.NoError(t, err, "pruned at operation %d", k)
		require.Empty(t, rep.Damages, "pruned at operation %d", k)
		if ops < k {
			require.Greater(t, k, 20)
			return
		}
	}
}
