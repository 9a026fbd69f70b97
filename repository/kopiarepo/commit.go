package kopiarepo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/repository"
)

// Commit makes the point visible. In order: everything is flushed; names are made
// durable; every blob that the point needs is looked at; what would stop the
// repository is copied; the inventory is renewed; and one atomic put of the record
// makes the point exist.
func (w *writer) Commit(ctx context.Context, info *repository.CommitInfo) (_ *repository.Proof, err error) {
	w.mu.Lock()
	if w.ended {
		w.mu.Unlock()
		return nil, errEnded
	}
	w.mu.Unlock()
	if err := w.ready(ctx); err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.ended = true
	w.mu.Unlock()

	outer := ctx
	ctx, done := w.r.store.guard(ctx)
	var saved manifest.ID
	defer func() {
		if err = done(err); err == nil {
			return
		}
		orphan := saved
		if errors.Is(err, repository.ErrOutcomeUnknown) {
			orphan = "" // the record may exist, and needs it
		}
		ectx, ended := w.r.store.guard(outer)
		if cerr := ended(w.end(ectx, orphan)); cerr != nil {
			w.r.cfg.Logger.Warn("what a failed commit left is for maintenance to remove", "point", w.id, "error", cerr)
		}
		err = fmt.Errorf("commit of point %s: %w", w.id, err)
	}()

	root, disks, err := w.buildTree(ctx)
	if err != nil {
		return nil, err
	}
	if saved, err = w.saveSnapshot(ctx, root); err != nil {
		return nil, err
	}
	if err := w.r.dir.sync(ctx); err != nil {
		return nil, err
	}
	packs, count, bytes, err := w.inspect(ctx, root)
	if err != nil {
		return nil, errors.Join(w.stoodStill(), err)
	}
	if err := w.r.protect(ctx); err != nil {
		return nil, err
	}
	packsSum, err := w.r.writePacks(ctx, w.spec.Chain, w.id, packs)
	if err != nil {
		return nil, err
	}
	head, headSum := w.r.inv.position()
	body := recordBody{
		Name: w.spec.Name, Run: w.spec.Run, Parent: w.spec.Parent,
		Created: info.Created.UTC(), Committed: w.r.cfg.Clock().UTC(), Labels: info.Labels, Meta: info.Meta,
		Disks: disks, Files: w.files, Snapshot: string(saved), Root: root.ObjectID.String(),
		Packs: packsSum, PackCount: len(packs), PackBytes: bytes, Inventory: head, InvSum: headSum,
	}
	if w.parent != nil {
		body.ParentSum = w.parent.e.sum
	}
	c, e, err := w.record(ctx, &body)
	if err != nil {
		return nil, err
	}
	// From here on the point exists, whatever happens.
	w.finish(ctx, c, e)
	return repository.NewProof(repository.ProofFacts{
		Point: *e.point(), Record: repository.Digest(e.sum), BlobsChecked: count, BytesChecked: bytes,
	})
}

// ready checks what can be checked before anything is done.
func (w *writer) ready(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range w.disks {
		if err := d.unfinished(); err != nil {
			return fmt.Errorf("commit of point %s: %w", w.id, err)
		}
	}
	for name, id := range w.fobjs {
		if id == object.EmptyID {
			return fmt.Errorf("commit of point %s: file %s is still being stored", w.id, name)
		}
	}
	slices.SortFunc(w.files, func(a, b fileBody) int { return strings.Compare(a.Name, b.Name) })
	return w.fenced(ctx)
}

func (w *writer) fenced(ctx context.Context) error {
	if w.spec.Lock == nil {
		return nil
	}
	return w.spec.Lock.Check(ctx)
}

// saveSnapshot saves the point as kopia's snapshot, drops the checkpoints that it
// replaces in the same stroke, and flushes.
func (w *writer) saveSnapshot(ctx context.Context, root *snapshot.DirEntry) (manifest.ID, error) {
	saved, err := snapshot.SaveSnapshot(ctx, w.sess.w, w.manifestOf(root, kindComplete))
	if err != nil {
		return "", fmt.Errorf("save snapshot: %w", err)
	}
	w.cpMu.Lock()
	defer w.cpMu.Unlock()
	if err := w.fresh(); err != nil {
		return saved, err
	}
	w.lastSaved = w.r.cfg.Clock()
	for _, id := range []manifest.ID{w.checkpoint, w.pin} {
		if id == "" {
			continue
		}
		if err := w.sess.w.DeleteManifest(ctx, id); err != nil {
			return saved, fmt.Errorf("drop checkpoint: %w", err)
		}
	}
	if err := w.sess.flush(ctx); err != nil {
		return saved, fmt.Errorf("flush: %w", err)
	}
	w.checkpoint, w.pin = "", ""
	return saved, nil
}

// inspect returns the packs that the point needs, and how many blobs of how many
// bytes were found stored. If maintenance of another process came meanwhile, or
// something is missing, which it may have moved, all of it is found out anew.
func (w *writer) inspect(ctx context.Context, root *snapshot.DirEntry) (packs []blob.ID, count int, bytes int64, first error) {
	if err := w.r.inv.load(ctx); err != nil {
		return nil, 0, 0, err
	}
	maintained, err := w.maintained(ctx)
	if err != nil {
		return nil, 0, 0, err
	}
	if !maintained {
		if packs, err = w.packs(ctx, root); err != nil {
			return nil, 0, 0, err
		}
		count, bytes, first = w.r.checkStored(ctx, packs)
		if first == nil || !errors.Is(first, repository.ErrDamaged) {
			return packs, count, bytes, first
		}
	}
	for attempt := 0; ; attempt++ {
		if err := errors.Join(w.sess.dr.Refresh(ctx), w.r.inv.load(ctx)); err != nil {
			return nil, 0, 0, errors.Join(first, err)
		}
		exact, err := w.r.newWalker(w.sess.dr).packs(ctx, root.ObjectID)
		if err != nil {
			return nil, 0, 0, errors.Join(first, fmt.Errorf("what the point needs is not there any more; run the backup again: %w", err))
		}
		packs = sortedPacks(exact)
		if err := w.r.takeIn(ctx, w.sess.dr, packs, attempt); err != nil {
			return nil, 0, 0, errors.Join(first, err)
		}
		count, bytes, err = w.r.checkStored(ctx, packs)
		if err == nil || !errors.Is(err, repository.ErrDamaged) || attempt == maxRereads {
			return packs, count, bytes, err
		}
	}
}

// maintained reports whether maintenance began since the run did. The engine notes
// that in its schedule first of all.
func (w *writer) maintained(ctx context.Context) (bool, error) {
	now, err := w.r.schedule(ctx)
	return now != w.schedule, err
}

// schedule returns the digest of the engine's schedule; zero if it has none.
func (r *Repository) schedule(ctx context.Context) (sum, error) {
	b, err := r.dir.get(ctx, blobFile(scheduleBlob), maxSmallBlob)
	if isAbsent(err) {
		return sum{}, nil
	}
	return sumOf(b), err
}

// packs returns every pack that the point needs. Blobs that nobody vouches for
// yet are taken into the inventory: what the point needs of them was read.
func (w *writer) packs(ctx context.Context, root *snapshot.DirEntry) ([]blob.ID, error) {
	set := map[blob.ID]bool{}
	precise := false
	for id, state := range w.sess.used() {
		set[id] = true
		if state != packUnknown {
			continue
		}
		if err := w.r.adopt(ctx, id); err != nil {
			return nil, fmt.Errorf("blob %s: %w", id, err)
		}
	}
	inherits := slices.ContainsFunc(w.disks, func(d *diskWriter) bool { return d.parent != nil })
	if inherits {
		list, err := w.r.readPacks(ctx, w.parent.e.ID)
		if err != nil {
			return nil, err
		}
		precise = list == nil
		for _, id := range list {
			set[id] = true
		}
	}
	for id := range set {
		if w.r.inv.wasDeleted(string(id)) {
			precise = true // maintenance moved what was in it
		}
	}
	if precise {
		exact, err := w.r.newWalker(w.sess.dr).packs(ctx, root.ObjectID)
		if err != nil {
			return nil, err
		}
		set = exact
	}
	return sortedPacks(set), nil
}

// checkStored looks at every pack, and at the critical blobs, without which no
// point can be read.
func (r *Repository) checkStored(ctx context.Context, packs []blob.ID) (count int, bytes int64, err error) {
	ids := slices.Clone(packs)
	for _, e := range r.inv.all() {
		// The schedule changes all the time, and no point needs it.
		if isEngineBlob(blob.ID(e.Name)) && e.Name != scheduleBlob {
			ids = append(ids, blob.ID(e.Name))
		}
	}
	sizes := make([]int64, len(ids))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i, id := range ids {
		g.Go(func() error {
			if r.isQuarantined(id) {
				return fmt.Errorf("%w: blob %s is quarantined", repository.ErrDamaged, id)
			}
			n, known, err := r.stored(ctx, id)
			if err == nil && !known {
				err = fmt.Errorf("%w: blob %s is not in the inventory", repository.ErrDamaged, id)
			}
			sizes[i] = n
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return 0, 0, err
	}
	for _, n := range sizes {
		bytes += n
	}
	return len(ids), bytes, nil
}

// record puts the record: the commit.
func (w *writer) record(ctx context.Context, body *recordBody) (*chain, *entry, error) {
	c, e, err := w.r.appendRecord(ctx, w.spec.Chain, func(c *chain, h *recordHeader) ([]byte, error) {
		if err := errors.Join(w.stoodStill(), w.fenced(ctx)); err != nil {
			return nil, err
		}
		if l := w.spec.Lock; l != nil {
			if c.lock[l.Name()] > l.Epoch() {
				return nil, fmt.Errorf("lock %s: %w: a later holder has committed", l.Name(), repository.ErrFenced)
			}
			h.Lock, h.Epoch = l.Name(), l.Epoch()
		}
		for _, other := range c.live {
			if other.body.Run == w.spec.Run {
				return nil, fmt.Errorf("run %s: %w", w.spec.Run, repository.ErrExists)
			}
		}
		h.Kind, h.ID = kindPoint, w.id
		h.Points++
		h.Seq = h.Points
		b, err := json.Marshal(body)
		return deflate(b), err
	})
	if err != nil {
		return nil, nil, err
	}
	e.body = *body
	return c, e, nil
}

// finish does what may be done late.
func (w *writer) finish(ctx context.Context, c *chain, e *entry) {
	ctx = context.WithoutCancel(ctx)
	ref := e.ref()
	c.live[e.ID] = e
	c.points = e.Points
	c.advance(e.Log, &ref)
	if err := w.r.writeAnchor(ctx, c); err != nil {
		w.r.cfg.Logger.Warn("the anchor of a chain was not renewed", "chain", c.name, "error", err)
	}
	if err := w.sess.close(ctx); err != nil {
		w.r.cfg.Logger.Warn("the storage engine's writer was not closed", "error", err)
	}
	w.r.mu.Lock()
	delete(w.r.active, w.id)
	w.r.mu.Unlock()
}
