package kopiarepo

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/content/indexblob"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/repo/maintenancestats"
	"github.com/kopia/kopia/snapshot/snapshotgc"
)

// The full cycle is kopia's, step by step and with its full safety margins, but
// for what is written anew. kopia writes anew the contents of every short pack,
// those that were deleted too, which makes them young again: in a repository that
// is maintained once a day they never go. And it leaves packs of which 60 % are
// needed. We write anew only what is needed, of packs that hold much that is not.
const (
	// thinPercent: a pack of which more than this is garbage is thin.
	thinPercent = 12
	minGarbage  = 64 << 10
	// fewShort: this many short packs are not worth joining.
	fewShort = 8
	// packOverhead and entryOverhead are what a pack holds besides contents: random
	// padding, and kopia's own index of it.
	packOverhead  = 8 << 10
	entryOverhead = 128
)

func (m *maintainer) fullCycle(ctx context.Context, w repo.DirectRepositoryWriter, start time.Time) error {
	// A point that cannot be walked stops collection, which then frees nothing
	// that any point needs; the other steps go on.
	gcErr := snapshotgc.Run(ctx, w, true, maintenance.SafetyFull, start)
	if gcErr != nil {
		gcErr = fmt.Errorf("collection: %w", gcErr)
		if ctx.Err() != nil {
			return gcErr
		}
	}
	s, err := maintenance.GetSchedule(ctx, w)
	if err != nil {
		return errors.Join(gcErr, err)
	}
	if gcErr == nil {
		if err := m.dropDeleted(ctx, w, s); err != nil {
			return fmt.Errorf("forget deleted contents: %w", err)
		}
	}
	rewritten := lastEnd(s, maintenance.TaskRewriteContentsFull, maintenance.TaskRewriteContentsQuick)
	var rewriteErr error
	switch now := w.Time(); {
	case rewritten.IsZero() || !now.Before(rewritten.Add(maintenance.SafetyFull.MinRewriteToOrphanDeletionDelay)):
		if err := m.deleteOrphans(ctx, w, s, start); err != nil {
			return fmt.Errorf("delete packs: %w", err)
		}
		if rewriteErr = m.rewriteThin(ctx, w, s); rewriteErr != nil {
			rewriteErr = fmt.Errorf("write packs anew: %w", rewriteErr)
		}
	default:
		m.note("packs are not deleted yet: what was in them was written anew less than an hour ago")
	}
	if ctx.Err() != nil {
		return errors.Join(gcErr, rewriteErr, ctx.Err())
	}
	return errors.Join(gcErr, rewriteErr, m.indexes(ctx, w, s))
}

// dropDeleted makes the index forget contents that two collections, far enough
// apart, found unneeded.
func (m *maintainer) dropDeleted(ctx context.Context, w repo.DirectRepositoryWriter, s *maintenance.Schedule) error {
	before := safeDropTime(s.Runs[maintenance.TaskSnapshotGarbageCollection])
	if before.IsZero() {
		return nil
	}
	return maintenance.ReportRun(ctx, w, maintenance.TaskDropDeletedContentsFull, s, func() (maintenancestats.Kind, error) {
		return w.ContentManager().CompactIndexes(ctx, indexblob.CompactOptions{
			AllIndexes: true, DropDeletedBefore: before,
			DisableEventualConsistencySafety: maintenance.SafetyFull.DisableEventualConsistencySafety,
		})
	})
}

// safeDropTime returns the time before which deleted contents may be forgotten:
// the start of a successful collection that ended long enough before the start of
// the latest one, and a margin. Whatever was found unneeded by mistake in the
// former was taken back by the latter.
func safeDropTime(runs []maintenance.RunInfo) time.Time {
	var latest maintenance.RunInfo
	for _, run := range runs {
		if run.Success && run.Start.After(latest.Start) {
			latest = run
		}
	}
	var out time.Time
	for _, run := range runs {
		if run.Success && latest.Start.Sub(run.End) > maintenance.SafetyFull.MarginBetweenSnapshotGC && run.Start.After(out) {
			out = run.Start
		}
	}
	if out.IsZero() {
		return out
	}
	return out.Add(-maintenance.SafetyFull.DropContentFromIndexExtraMargin)
}

func lastEnd(s *maintenance.Schedule, tasks ...maintenance.TaskType) (out time.Time) {
	for _, task := range tasks {
		for _, run := range s.Runs[task] {
			if run.Success && run.End.After(out) {
				out = run.End
			}
		}
	}
	return out
}

func (m *maintainer) deleteOrphans(ctx context.Context, w repo.DirectRepositoryWriter, s *maintenance.Schedule, start time.Time) error {
	return maintenance.ReportRun(ctx, w, maintenance.TaskDeleteOrphanedBlobsFull, s, func() (maintenancestats.Kind, error) {
		return maintenance.DeleteUnreferencedPacks(ctx, w, maintenance.DeleteUnreferencedPacksOptions{NotAfterTime: start}, maintenance.SafetyFull)
	})
}

// rewriteThin writes anew what is needed of packs that hold much that is not. The
// old packs go in a later cycle.
func (m *maintainer) rewriteThin(ctx context.Context, w repo.DirectRepositoryWriter, s *maintenance.Schedule) error {
	ids, err := m.thin(ctx)
	if err != nil || len(ids) == 0 {
		return err
	}
	return maintenance.ReportRun(ctx, w, maintenance.TaskRewriteContentsFull, s, func() (maintenancestats.Kind, error) {
		return maintenance.RewriteContents(ctx, w, &maintenance.RewriteContentsOptions{ContentIDs: ids}, maintenance.SafetyFull)
	})
}

// thin returns the contents that are to be written anew.
func (m *maintainer) thin(ctx context.Context) ([]content.ID, error) {
	type usage struct{ live, entries int64 }
	packs := map[blob.ID]*usage{}
	cr := m.dr.ContentReader()
	err := cr.IterateContents(ctx, content.IterateOptions{}, func(ci content.Info) error {
		u := packs[ci.PackBlobID]
		if u == nil {
			u = &usage{}
			packs[ci.PackBlobID] = u
		}
		u.live += int64(ci.PackedLength)
		u.entries++
		return ctx.Err()
	})
	if err != nil {
		return nil, err
	}
	chosen := map[blob.ID]bool{}
	short := map[byte][]blob.ID{}
	err = m.r.store.ListBlobs(ctx, "", func(bm blob.Metadata) error {
		u := packs[bm.BlobID]
		if u == nil || m.r.isQuarantined(bm.BlobID) {
			return nil
		}
		garbage := bm.Length - u.live - packOverhead - u.entries*entryOverhead
		if garbage > minGarbage && garbage*100 > bm.Length*thinPercent {
			chosen[bm.BlobID] = true
		}
		if u.live < maxPackSize*6/10 {
			short[bm.BlobID[0]] = append(short[bm.BlobID[0]], bm.BlobID)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, ids := range short {
		if len(ids) > fewShort {
			for _, id := range ids {
				chosen[id] = true
			}
		}
	}
	if len(chosen) == 0 {
		return nil, nil
	}
	var out []content.ID
	err = cr.IterateContents(ctx, content.IterateOptions{}, func(ci content.Info) error {
		if chosen[ci.PackBlobID] {
			out = append(out, ci.ContentID)
		}
		return ctx.Err()
	})
	return out, err
}

// indexes compacts kopia's indexes and removes those that were replaced.
func (m *maintainer) indexes(ctx context.Context, w repo.DirectRepositoryWriter, s *maintenance.Schedule) error {
	em, ok, err := w.ContentManager().EpochManager(ctx)
	if err != nil || !ok {
		return err
	}
	for _, step := range []struct {
		task maintenance.TaskType
		run  func() (maintenancestats.Kind, error)
	}{
		{maintenance.TaskEpochCompactSingle, func() (maintenancestats.Kind, error) { return em.MaybeCompactSingleEpoch(ctx) }},
		{maintenance.TaskEpochAdvance, func() (maintenancestats.Kind, error) { return em.MaybeAdvanceWriteEpoch(ctx) }},
		{maintenance.TaskEpochGenerateRange, func() (maintenancestats.Kind, error) { return em.MaybeGenerateRangeCheckpoint(ctx) }},
		{maintenance.TaskEpochCleanupMarkers, func() (maintenancestats.Kind, error) { return em.CleanupMarkers(ctx) }},
		{maintenance.TaskEpochDeleteSupersededIndexes, func() (maintenancestats.Kind, error) { return em.CleanupSupersededIndexes(ctx) }},
	} {
		if err := maintenance.ReportRun(ctx, w, step.task, s, step.run); err != nil {
			return fmt.Errorf("%s: %w", step.task, err)
		}
	}
	return nil
}
