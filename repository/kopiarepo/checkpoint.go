package kopiarepo

import (
	"context"
	"fmt"
	"time"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"

	"github.com/holdfast-backup/holdfast/repository"
)

// kopia collects what no snapshot refers to after a day. A long run therefore
// saves an incomplete snapshot of what it has stored so far now and then, and one
// of its parent, whose blocks it will refer to, before anything else.

const (
	checkpointReason = "checkpoint"
	pinName          = "holdfast" // a pinned snapshot is never expired by the stock program
	tagPoint         = "tag:holdfast-point"
	tagRun           = "tag:holdfast-run"
	tagName          = "tag:holdfast-name"
	tagKind          = "tag:holdfast-kind"
	kindCheckpoint   = "checkpoint"
	kindComplete     = "point"
)

// manifestOf describes a snapshot of this point.
func (w *writer) manifestOf(root *snapshot.DirEntry, kind string) *snapshot.Manifest {
	m := &snapshot.Manifest{
		Source: source(w.spec.Chain), Description: w.spec.Name,
		StartTime: fs.UTCTimestampFromTime(w.start), EndTime: fs.UTCTimestampFromTime(w.r.cfg.Clock()),
		RootEntry: root, Pins: []string{pinName},
		Tags: map[string]string{tagPoint: string(w.id), tagRun: w.spec.Run, tagKind: kind},
	}
	if w.spec.Name != "" {
		m.Tags[tagName] = w.spec.Name
	}
	if kind == kindCheckpoint {
		m.IncompleteReason = checkpointReason
	}
	if s := root.DirSummary; s != nil {
		m.Stats.TotalFileSize = s.TotalFileSize
		m.Stats.TotalFileCount = int32(min(s.TotalFileCount, 1<<31-1))
		m.Stats.TotalDirectoryCount = int32(min(s.TotalDirCount, 1<<31-1))
	}
	return m
}

// pinParent keeps the parent's blocks, whatever becomes of the parent.
func (w *writer) pinParent(ctx context.Context) error {
	w.cpMu.Lock()
	defer w.cpMu.Unlock()
	s, err := w.r.newSession(ctx, "pin")
	if err != nil {
		return err
	}
	pin, err := w.savePin(ctx, s)
	if err == nil {
		err = s.flush(ctx)
	}
	if cerr := s.close(ctx); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	w.pin = pin
	return w.r.dir.sync(ctx)
}

// savePin saves a snapshot of the parent's tree as of now.
func (w *writer) savePin(ctx context.Context, s *session) (manifest.ID, error) {
	id, err := object.ParseID(w.parent.e.body.Root)
	if err != nil {
		return "", err
	}
	root := &snapshot.DirEntry{Name: "/", Type: snapshot.EntryTypeDirectory, Permissions: 0o700, ObjectID: id}
	return snapshot.SaveSnapshot(ctx, s.w, w.manifestOf(root, kindCheckpoint))
}

// maxUnsaved is how long a run may go without a checkpoint. Maintenance by another
// host waits for orphanAge; the other half is for clocks that differ.
const maxUnsaved = orphanAge / 2

// fresh returns an error if so long nothing was saved that maintenance may have
// removed what the run has stored: because the machine was suspended, say. The caller
// holds cpMu.
func (w *writer) fresh() error {
	if d := elapsed(w.lastSaved, w.r.cfg.Clock()); d > maxUnsaved {
		return fmt.Errorf("%w: nothing was saved for %v, in which maintenance of another process may have removed what the run had stored",
			repository.ErrStale, d.Round(time.Second))
	}
	return nil
}

// stoodStill is fresh for a caller that does not hold cpMu.
func (w *writer) stoodStill() error {
	w.cpMu.Lock()
	defer w.cpMu.Unlock()
	return w.fresh()
}

// elapsed returns the time between two moments by the clock of the day, or by the
// monotonic one, which may stop while the machine is suspended, if that is more.
func elapsed(from, to time.Time) time.Duration {
	return max(to.Sub(from), to.Round(0).Sub(from.Round(0)))
}

// maybeCheckpoint saves a checkpoint if one is due and nobody else is at it.
func (w *writer) maybeCheckpoint(ctx context.Context) error {
	if !w.cpMu.TryLock() {
		return nil
	}
	defer w.cpMu.Unlock()
	if err := w.fresh(); err != nil {
		return err
	}
	now := w.r.cfg.Clock()
	if w.unsaved.Load() < w.r.cfg.CheckpointBytes && elapsed(w.lastSaved, now) < w.r.cfg.CheckpointEvery {
		return nil
	}
	w.unsaved.Store(0)
	w.lastSaved = now
	gctx, done := w.r.store.guard(ctx)
	if err := done(w.saveCheckpoint(gctx)); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	return nil
}

func (w *writer) saveCheckpoint(ctx context.Context) error {
	dir := w.newDir()
	w.mu.Lock()
	disks := append([]*diskWriter(nil), w.disks...)
	for name, id := range w.fobjs {
		if id != object.EmptyID {
			dir.file(fileEntry(name), 1, id)
		}
	}
	w.mu.Unlock()
	for _, d := range disks {
		if err := w.checkpointDisk(ctx, d, dir); err != nil {
			return fmt.Errorf("disk %s: %w", d.id, err)
		}
	}
	root, err := w.putDir(ctx, "/", dir)
	if err != nil {
		return err
	}
	id, err := snapshot.SaveSnapshot(ctx, w.sess.w, w.manifestOf(root, kindCheckpoint))
	if err != nil {
		return err
	}
	if old := w.checkpoint; old != "" {
		if err := w.sess.w.DeleteManifest(ctx, old); err != nil {
			return err
		}
	}
	w.checkpoint = id
	if old := w.pin; old != "" { // renewed too: what is old belongs to nobody
		if w.pin, err = w.savePin(ctx, w.sess); err != nil {
			w.pin = old
			return err
		}
		if err := w.sess.w.DeleteManifest(ctx, old); err != nil {
			return err
		}
	}
	if err := w.sess.flush(ctx); err != nil {
		return err
	}
	return w.r.protect(ctx)
}

// checkpointDisk adds the sealed segments of a disk, and for each open one an
// object that refers to its blocks.
func (w *writer) checkpointDisk(ctx context.Context, d *diskWriter, dir *dirBuilder) error {
	type open struct {
		s      int64
		blocks []object.ID
		length int64
	}
	var opens []open
	d.mu.Lock()
	for s, seg := range d.sealed {
		dir.file(fmt.Sprintf("%s-%s", diskDir(d.id), eight(s)), d.segmentLen(s), seg.object)
		if seg.digests != object.EmptyID {
			dir.file(fmt.Sprintf("%s-%s-digests", diskDir(d.id), eight(s)), int64(leavesOf(d.segmentLen(s)))*32, seg.digests)
		}
	}
	for s, seg := range d.open {
		o := open{s: s}
		for index, blk := range seg.blocks {
			// A short last block would not fit between others; it is one block.
			if blk.ready && blk.leaves != nil && d.blockLen(index) == d.blockSize {
				o.blocks = append(o.blocks, blk.id)
				o.length += int64(d.blockSize)
			}
		}
		if len(o.blocks) > 0 {
			opens = append(opens, o)
		}
	}
	d.mu.Unlock()
	for _, o := range opens {
		id, err := w.putIndex(ctx, o.blocks, o.length, d.blockSize)
		if err != nil {
			return err
		}
		dir.file(fmt.Sprintf("%s-%s-open", diskDir(d.id), eight(o.s)), o.length, id)
	}
	return nil
}
