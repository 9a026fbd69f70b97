package repositorytest_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/repositorytest"
)

// bench is what one harness works on.
type bench struct {
	store    *fakes.Store
	standing []*standing
}

// standing is a damage that was not taken back.
type standing struct {
	object string
	how    fakes.BlobDamage
	undo   func()
}

// fakeHarness is a harness of the memory repository with everything optional.
// wrap may put something around each value; nil: nothing.
func fakeHarness(t repositorytest.T, wrap func(*bench, repository.Repository) repository.Repository) *repositorytest.Harness {
	store := fakes.NewStore()
	b := &bench{store: store}
	clock := fakes.NewClock(time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC))
	open := func(ctx context.Context) (repository.Repository, error) {
		r, err := store.Open(ctx, fakes.RepositoryOptions{Clock: clock.Now, Seed: 7})
		if err != nil || wrap == nil {
			return r, err
		}
		return wrap(b, r), nil
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
			if data, _ := store.Blob(object); len(data) == 0 && how != repositorytest.Lost {
				return nil, errors.ErrUnsupported
			}
			undo, err := store.Damage(object, fakes.BlobDamage(how))
			if err != nil {
				return nil, err
			}
			d := &standing{object, fakes.BlobDamage(how), undo}
			b.standing = append(b.standing, d)
			return func() {
				b.standing = slices.DeleteFunc(b.standing, func(x *standing) bool { return x == d })
				d.undo()
			}, nil
		},
	}
}

func TestMemoryRepository(t *testing.T) {
	repositorytest.Run(t, func(t repositorytest.T) *repositorytest.Harness { return fakeHarness(t, nil) })
}
