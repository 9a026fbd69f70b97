package kopiarepo

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/maintenance"

	"github.com/holdfast-backup/holdfast/repository"
)

// orphanAge is how long something that no record explains is left alone: it may
// belong to a run of another process. Longer than any checkpoint interval.
const orphanAge = 24 * time.Hour

// Maintain gives back space and renews what protects the repository. kopia decides
// what can go, with its full safety margins; what it wants deleted is collected,
// the inventory is renewed first, and the lease is checked again before each
// batch. On an error the report says what was done.
func (r *Repository) Maintain(ctx context.Context, lock repository.Lock, opts *repository.MaintainOptions) (*repository.MaintainReport, error) {
	if err := r.check(ctx); err != nil {
		return nil, err
	}
	if err := holdsMaintenance(ctx, lock); err != nil {
		return nil, fmt.Errorf("maintain: %w", err)
	}
	r.maintaining.Lock()
	defer r.maintaining.Unlock()
	m := &maintainer{r: r, lock: lock, full: opts != nil && opts.Full, report: &repository.MaintainReport{}}
	gctx, done := r.store.guard(ctx)
	err := done(m.run(gctx))
	if err != nil {
		err = fmt.Errorf("maintain: %w", err)
	}
	return m.report, err
}

func holdsMaintenance(ctx context.Context, lock repository.Lock) error {
	if lock == nil {
		return fmt.Errorf("%w: the caller holds no lock", repository.ErrFenced)
	}
	if lock.Name() != repository.LockMaintenance {
		return fmt.Errorf("%w: lock %q was given, %q is needed", repository.ErrFenced, lock.Name(), repository.LockMaintenance)
	}
	return lock.Check(ctx)
}

type maintainer struct {
	r      *Repository
	dr     repo.DirectRepository
	lock   repository.Lock
	full   bool
	report *repository.MaintainReport
}

func (m *maintainer) note(format string, args ...any) {
	m.report.Notes = append(m.report.Notes, fmt.Sprintf(format, args...))
}

func (m *maintainer) run(ctx context.Context) (err error) {
	r := m.r
	if err := r.inv.load(ctx); err != nil {
		return err
	}
	if m.report.BlobsBefore, m.report.BytesBefore, err = r.usage(ctx); err != nil {
		return err
	}
	if m.dr, err = r.eng.open(ctx); err != nil {
		return err
	}
	if err := m.finishDeletes(ctx); err != nil {
		return fmt.Errorf("finish deletions: %w", err)
	}
	engineErr := m.runEngine(ctx)
	if engineErr != nil && ctx.Err() != nil {
		return engineErr
	}
	if engineErr != nil {
		m.note("the storage engine could not finish: %v", engineErr)
	}
	if err := m.lock.Check(ctx); err != nil {
		return err
	}
	if m.report.Ran {
		if err := m.renew(ctx); err != nil {
			return errors.Join(engineErr, err)
		}
	}
	if m.report.BlobsAfter, m.report.BytesAfter, err = r.usage(ctx); err != nil {
		return err
	}
	return engineErr
}

// usage counts what is stored.
func (r *Repository) usage(ctx context.Context) (files, bytes int64, err error) {
	var walk func(dir string) error
	walk = func(dir string) error {
		entries, err := r.dir.list(ctx, dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			name := strings.TrimPrefix(dir+"/"+e.Name(), "./")
			if e.IsDir() {
				if err := walk(name); err != nil {
					return err
				}
				continue
			}
			if info, err := e.Info(); err == nil {
				files++
				bytes += info.Size()
			}
		}
		return nil
	}
	err = walk(".")
	return files, bytes, err
}

// runEngine runs kopia's maintenance, and then deletes what it wanted deleted.
func (m *maintainer) runEngine(ctx context.Context) error {
	r := m.r
	r.store.beginDeletes()
	defer r.store.endDeletes()
	gctx, done := r.store.guard(ctx)
	err := repo.DirectWriteSession(gctx, m.dr, repo.WriteSessionOptions{Purpose: "maintain"},
		func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			before, err := maintenance.GetSchedule(ctx, w)
			if err != nil {
				return err
			}
			mode := maintenance.ModeAuto
			if m.full {
				mode = maintenance.ModeFull
			}
			runErr := r.eng.exclusive(ctx, w, mode, func(ctx context.Context, p maintenance.RunParameters) error {
				if p.Mode == maintenance.ModeFull {
					return m.fullCycle(ctx, w, p.MaintenanceStartTime)
				}
				return maintenance.Run(ctx, p, maintenance.SafetyFull)
			})
			after, err := maintenance.GetSchedule(ctx, w)
			if err != nil {
				return errors.Join(runErr, err)
			}
			// A nil error is no proof that anything was done.
			fullRan := !after.NextFullMaintenanceTime.Equal(before.NextFullMaintenanceTime)
			m.report.Ran = m.full || fullRan || !after.NextQuickMaintenanceTime.Equal(before.NextQuickMaintenanceTime)
			return runErr
		})
	err = done(err)
	ids := r.store.collected()
	if len(ids) > 0 {
		// What replaces the old must be safe before the old goes.
		derr := m.deleteBlobs(ctx, ids)
		if derr == nil {
			r.maps.clear()
		}
		err = errors.Join(err, derr)
	}
	return err
}

const deleteBatch = 64

// deleteBlobs deletes blobs of kopia for good.
func (m *maintainer) deleteBlobs(ctx context.Context, ids []blob.ID) error {
	r := m.r
	if err := m.lock.Check(ctx); err != nil {
		return err
	}
	if err := r.protect(ctx); err != nil {
		return err
	}
	names := make([]string, len(ids))
	for i, id := range ids {
		names[i] = string(id)
	}
	doomed := map[blob.ID]bool{}
	for _, id := range ids {
		doomed[id] = true
	}
	if err := m.replacementsStored(ctx, doomed); err != nil {
		return err
	}
	r.inv.deleted(names)
	if err := r.inv.flush(ctx, false); err != nil {
		return err
	}
	for i, id := range ids {
		if i%deleteBatch == 0 {
			if err := m.lock.Check(ctx); err != nil {
				return err
			}
		}
		if err := r.store.erase(ctx, id); err != nil {
			return err
		}
		if critical(string(id)) {
			for _, file := range copiesOf(id) {
				if err := r.dir.remove(ctx, file); err != nil {
					return err
				}
			}
		}
	}
	return r.dir.sync(ctx)
}

// replacementsStored looks at what this handle stored: it may replace what goes.
func (m *maintainer) replacementsStored(ctx context.Context, doomed map[blob.ID]bool) error {
	for id, put := range m.r.store.allPut() {
		if doomed[id] || !inventoried(string(id)) {
			continue
		}
		n, _, err := m.r.stored(ctx, id)
		if err != nil {
			return err
		}
		if n != put.size {
			return fmt.Errorf("%w: blob %s has %d bytes, not %d", repository.ErrDamaged, id, n, put.size)
		}
	}
	return nil
}
