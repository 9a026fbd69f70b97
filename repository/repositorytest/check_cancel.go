package repositorytest

import (
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

func cancelChecks() []Check {
	return []Check{
		{"CanceledRepositoryMethods", checkCancelRepository},
		{"CanceledWriter", checkCancelWriter},
		{"CanceledCommit", checkCancelCommit},
		{"CanceledReader", checkCancelReader},
		{"CanceledLock", checkCancelLock},
	}
}

// canceled calls each method with a canceled context.
func (e *env) canceled(calls map[string]func(ctx context.Context) error) {
	e.Helper()
	ctx, cancel := context.WithCancel(e.ctx)
	cancel()
	for _, name := range slices.Sorted(maps.Keys(calls)) {
		require.ErrorIs(e, calls[name](ctx), context.Canceled, name)
	}
}

func checkCancelRepository(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(3*small, small, 1)
	p := e.commit(one(d))
	l := e.lock(repository.LockMaintenance)
	require.NoError(t, e.repo.PutNote(e.ctx, "n", []byte("v")))
	e.canceled(map[string]func(ctx context.Context) error{
		"Begin": func(ctx context.Context) error {
			_, err := e.repo.Begin(ctx, &repository.PointSpec{Chain: "vm-1", Run: "r"})
			return err
		},
		"Points": func(ctx context.Context) error { _, err := list(ctx, e.repo, repository.Query{}); return err },
		"Open":   func(ctx context.Context) error { _, err := e.repo.Open(ctx, p.ID); return err },
		"Delete": func(ctx context.Context) error { return e.repo.Delete(ctx, p.ID, l) },
		"Verify": func(ctx context.Context) error { _, err := e.repo.Verify(ctx, nil); return err },
		"Maintain": func(ctx context.Context) error {
			_, err := e.repo.Maintain(ctx, l, &repository.MaintainOptions{Full: true})
			return err
		},
		"Lock": func(ctx context.Context) error {
			_, err := e.repo.Lock(ctx, "vm-1", repository.LockOptions{})
			return err
		},
		"PutNote":    func(ctx context.Context) error { return e.repo.PutNote(ctx, "m", nil) },
		"DeleteNote": func(ctx context.Context) error { return e.repo.DeleteNote(ctx, "n") },
		"Notes": func(ctx context.Context) error {
			for _, err := range e.repo.Notes(ctx, "") {
				if err != nil {
					return err
				}
			}
			return nil
		},
	})
	require.NoError(t, l.Release(e.ctx))
	require.Equal(t, []string{"n=v"}, e.notes(e.repo, ""), "a canceled method does nothing")
	e.expectOne(p.ID, d)
	require.NoError(t, e.lock("vm-1").Release(e.ctx))
}

func checkCancelWriter(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(20*small, small, 1)
	w, dw := e.openDisk(d.size, d.bs)
	hash := digest.New(w.DigestKey())
	require.NoError(t, dw.WriteBlock(e.ctx, d.block(hash, 0)))
	e.canceled(map[string]func(ctx context.Context) error{
		"Disk": func(ctx context.Context) error {
			_, err := w.Disk(ctx, repository.DiskSpec{ID: "d2", Size: small, BlockSize: small})
			return err
		},
		"File":       func(ctx context.Context) error { return w.File(ctx, "f", strings.NewReader("x")) },
		"WriteBlock": func(ctx context.Context) error { return dw.WriteBlock(ctx, d.block(hash, 1)) },
		"Advance":    func(ctx context.Context) error { return dw.Advance(ctx, 1) },
		"Close":      func(ctx context.Context) error { return dw.Close(ctx) },
	})
	// Nothing was lost: the writer goes on with a context that lives.
	for i := int64(1); i < d.count(); i++ {
		require.NoError(t, dw.WriteBlock(e.ctx, d.block(hash, i)), "block %d after a canceled attempt", i)
	}
	require.NoError(t, dw.Close(e.ctx))
	require.NoError(t, w.File(e.ctx, "f", strings.NewReader("x")))
	_, err := w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	require.NoError(t, e.compare(e.repo, w.ID(), map[string]*disk{"d1": d}, map[string][]byte{"f": []byte("x")}))
}

func checkCancelCommit(t T, h *Harness) {
	e := newEnv(t, h)
	w, err := e.write(e.repo, one(e.random(3*small, small, 1)))
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(e.ctx)
	cancel()
	proof, err := w.Commit(ctx, &repository.CommitInfo{})
	require.ErrorIs(t, err, context.Canceled)
	require.Nil(t, proof)
	e.invisible(w.ID())
	if err := w.Abort(ctx); err != nil { // it may or may not need storage
		require.ErrorIs(t, err, context.Canceled)
	}
	require.NoError(t, w.Abort(e.ctx))
	e.invisible(w.ID())
}

func checkCancelReader(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(3*small, small, 1)
	plan := one(d)
	plan.files = map[string][]byte{"f": []byte("x")}
	p := e.commit(plan)
	rd, err := e.repo.Open(e.ctx, p.ID)
	require.NoError(t, err)
	defer func() { require.NoError(t, rd.Close()) }()
	dr, err := rd.Disk(e.ctx, "d1")
	require.NoError(t, err)
	defer func() { require.NoError(t, dr.Close()) }()
	e.canceled(map[string]func(ctx context.Context) error{
		"Disk": func(ctx context.Context) error { _, err := rd.Disk(ctx, "d1"); return err },
		"File": func(ctx context.Context) error { _, err := rd.File(ctx, "f"); return err },
		"ReadBlock": func(ctx context.Context) error {
			_, err := dr.ReadBlock(ctx, 0, make([]byte, small))
			return err
		},
		"Extents": func(ctx context.Context) error { _, err := extentsOnly(ctx, dr); return err },
		"Leaves":  func(ctx context.Context) error { _, err := dr.Leaves(ctx, 0); return err },
	})
	require.NoError(t, readCompare(dr, d, 0, int(d.size)), "its own context lives")

	ctx, cancel := context.WithCancel(e.ctx)
	mine, err := rd.Disk(ctx, "d1")
	require.NoError(t, err)
	require.NoError(t, readCompare(mine, d, 0, 1))
	cancel()
	_, err = mine.ReadAt(make([]byte, 1), 2*small)
	require.ErrorIs(t, err, context.Canceled, "the context given to Disk governs ReadAt")
	require.NoError(t, mine.Close())
}

func extentsOnly(ctx context.Context, d repository.DiskReader) (n int, err error) {
	for _, err := range d.Extents(ctx) {
		if err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

func checkCancelLock(t T, h *Harness) {
	e := newEnv(t, h)
	l := e.lock("vm-1")
	e.canceled(map[string]func(ctx context.Context) error{
		"Check": l.Check,
		"Renew": l.Renew,
	})
	ctx, cancel := context.WithCancel(e.ctx)
	cancel()
	if err := l.Release(ctx); err != nil {
		require.ErrorIs(t, err, context.Canceled, "release")
		require.NoError(t, l.Check(e.ctx))
		require.NoError(t, l.Release(e.ctx))
	}
	require.NoError(t, e.lock("vm-1").Release(e.ctx))
}
