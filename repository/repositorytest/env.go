package repositorytest

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

// Block sizes and a length that most checks use.
const (
	small   = repository.LeafSize
	normal  = repository.DefaultBlockSize
	oddTail = 12_345
)

// env is what a check works with.
type env struct {
	T
	h    *Harness
	repo repository.Repository
	ctx  context.Context
	rng  *rand.Rand
	runs int
}

func newEnv(t T, h *Harness) *env {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err, "HOLDFAST_SEED")
		seed = n
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	return &env{T: t, h: h, repo: h.Repository, ctx: t.Context(), rng: rand.New(rand.NewPCG(seed, 1))}
}

// reopen opens the repository as another process would.
func (e *env) reopen() repository.Repository {
	e.Helper()
	r, err := e.h.Reopen(e.ctx)
	require.NoError(e, err, "reopen")
	e.Cleanup(func() {
		if err := r.Close(); err != nil {
			e.Errorf("close a reopened repository: %v", err)
		}
	})
	return r
}

// run makes a run ID.
func (e *env) run() string {
	e.runs++
	return fmt.Sprintf("run%04d", e.runs)
}

// lock takes a lock that must be free.
func (e *env) lock(name string) repository.Lock {
	e.Helper()
	l, err := e.repo.Lock(e.ctx, name, repository.LockOptions{Holder: "the suite"})
	require.NoError(e, err, "lock %s", name)
	return l
}

// withMaintenance calls f under the maintenance lock.
func (e *env) withMaintenance(f func(l repository.Lock)) {
	e.Helper()
	l := e.lock(repository.LockMaintenance)
	f(l)
	require.NoError(e, l.Release(e.ctx))
}

func (e *env) deletePoint(id repository.PointID) {
	e.Helper()
	e.withMaintenance(func(l repository.Lock) {
		require.NoError(e, e.repo.Delete(e.ctx, id, l), "delete %s", id)
	})
}

// list collects a listing.
func list(ctx context.Context, repo repository.Repository, q repository.Query) (out []*repository.Point, err error) {
	for p, err := range repo.Points(ctx, q) {
		if err != nil {
			return out, err
		}
		out = append(out, p)
	}
	return out, nil
}

func (e *env) list(repo repository.Repository, q repository.Query) []*repository.Point {
	e.Helper()
	out, err := list(e.ctx, repo, q)
	require.NoError(e, err, "list points")
	return out
}

// ids returns the IDs of committed points in a listing.
func ids(points []*repository.Point) []repository.PointID {
	out := []repository.PointID{}
	for _, p := range points {
		if p.State == repository.Committed {
			out = append(out, p.ID)
		}
	}
	return out
}

// sameJSON compares documents by meaning.
func sameJSON(t T, want, got json.RawMessage) {
	t.Helper()
	if len(want) == 0 {
		require.Empty(t, got)
		return
	}
	require.JSONEq(t, string(want), string(got))
}
