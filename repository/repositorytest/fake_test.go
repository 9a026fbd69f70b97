package repositorytest_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/repositorytest"
)

// fakeHarness is a harness of the memory repository with everything optional.
// wrap may put something around each value; nil: nothing.
func fakeHarness(t repositorytest.T, wrap func(*fakes.Store, repository.Repository) repository.Repository) *repositorytest.Harness {
	store := fakes.NewStore()
	clock := fakes.NewClock(time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC))
	open := func(ctx context.Context) (repository.Repository, error) {
		r, err := store.Open(ctx, fakes.RepositoryOptions{Clock: clock.Now, Seed: 7})
		if err != nil || wrap == nil {
			return r, err
		}
		return wrap(store, r), nil
	}
	r, err := open(t.Context())
	if err != nil {
		t.Errorf("open: %v", err)
		t.FailNow()
	}
	return &repositorytest.Harness{
		Repository: r,
		Reopen:     open,
		Advance:    clock.Advance,
		Objects: func() []string {
			var out []string
			for _, n := range store.Names("") {
				// The format has no copy; a lock protects nothing that is stored.
				if n != "format" && !strings.HasPrefix(n, "locks/") {
					out = append(out, n)
				}
			}
			return out
		},
		Damage: func(object string, how repositorytest.Damage) (func(), error) {
			if b, _ := store.Blob(object); len(b) == 0 && how != repositorytest.Lost {
				return nil, errors.ErrUnsupported
			}
			return store.Damage(object, fakes.BlobDamage(how))
		},
	}
}

func TestMemoryRepository(t *testing.T) {
	repositorytest.Run(t, func(t repositorytest.T) *repositorytest.Harness { return fakeHarness(t, nil) })
}
