package kopiarepo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// writer is a point being written.
type writer struct {
	r      *Repository
	spec   repository.PointSpec
	id     repository.PointID
	key    repository.DigestKey
	hasher *digest.Hasher
	sess   *session
	start  time.Time
	parent *tree // nil: none

	schedule sum // of the engine's maintenance, when the run began

	mu    sync.Mutex
	ended bool
	disks []*diskWriter
	files []fileBody
	fobjs map[string]object.ID

	zeroMu sync.Mutex
	zeros  map[int]object.ID        // blocks of zeros, by length
	zsegs  map[segmentKey]object.ID // segments of zeros

	unsaved    atomic.Int64 // bytes since the last checkpoint
	cpMu       sync.Mutex
	lastSaved  time.Time
	checkpoint manifest.ID // of the segments so far
	pin        manifest.ID // of the parent
}

var _ repository.Writer = (*writer)(nil)

// Begin starts a restore point.
func (r *Repository) Begin(ctx context.Context, spec *repository.PointSpec) (_ repository.Writer, err error) {
	if err := r.check(ctx); err != nil {
		return nil, err
	}
	ctx, done := r.store.guard(ctx)
	defer func() { err = done(err) }()
	if !validChain(spec.Chain) || !runPattern.MatchString(spec.Run) {
		return nil, fmt.Errorf("chain %q or run %q is not a valid name", spec.Chain, spec.Run)
	}
	if spec.Lock != nil {
		if err := spec.Lock.Check(ctx); err != nil {
			return nil, err
		}
	}
	if err := r.inv.load(ctx); err != nil {
		return nil, err
	}
	if err := r.loadQuarantine(ctx); err != nil {
		return nil, err
	}
	c, err := r.loadChain(ctx, spec.Chain)
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(slices.Collect(maps.Values(c.live)), func(e *entry) bool { return e.body.Run == spec.Run }) {
		return nil, fmt.Errorf("run %s of chain %s: %w", spec.Run, spec.Chain, repository.ErrExists)
	}
	w := &writer{
		r: r, spec: *spec, start: r.cfg.Clock().UTC(),
		fobjs: map[string]object.ID{}, zeros: map[int]object.ID{}, zsegs: map[segmentKey]object.ID{},
	}
	w.lastSaved = r.cfg.Clock()
	if w.schedule, err = r.schedule(ctx); err != nil {
		return nil, err
	}
	if w.id, err = r.newPointID(w.start); err != nil {
		return nil, err
	}
	if err := w.inheritFrom(ctx, c); err != nil {
		return nil, err
	}
	w.hasher = digest.New(w.key)
	if w.sess, err = r.newSession(ctx, "point"); err != nil {
		return nil, err
	}
	r.mu.Lock()
	r.active[w.id] = true
	r.mu.Unlock()
	if w.parent != nil {
		if err := w.pinParent(ctx); err != nil {
			return nil, errors.Join(fmt.Errorf("pin the parent: %w", err), w.Abort(ctx))
		}
	}
	return w, nil
}

func (r *Repository) newPointID(now time.Time) (repository.PointID, error) {
	var b [8]byte
	if _, err := io.ReadFull(r.cfg.Rand, b[:]); err != nil {
		return "", err
	}
	return repository.PointID(fmt.Sprintf("%s-%x", now.Format("20060102-150405"), b)), nil
}

// inheritFrom opens the parent and takes over the chain's digest key; a chain
// without one gets a new one.
func (w *writer) inheritFrom(ctx context.Context, c *chain) error {
	if w.spec.Parent != "" {
		e := c.live[w.spec.Parent]
		if e == nil {
			return fmt.Errorf("parent %s in chain %s: %w", w.spec.Parent, c.name, repository.ErrNotFound)
		}
		t, err := w.r.openTree(ctx, e)
		if err == nil {
			err = w.r.checkPacks(ctx, t)
		}
		if err != nil {
			return fmt.Errorf("parent %s: %w", w.spec.Parent, err)
		}
		w.parent, w.key = t, repository.DigestKey(t.cfg.DigestKey)
		return nil
	}
	newest := slices.SortedFunc(maps.Values(c.live), func(a, b *entry) int { return int(b.Log - a.Log) })
	for _, e := range newest {
		t, err := w.r.openTree(ctx, e)
		if err == nil {
			w.key = repository.DigestKey(t.cfg.DigestKey)
			return nil
		}
		if ctx.Err() != nil {
			return err
		}
	}
	_, err := io.ReadFull(w.r.cfg.Rand, w.key[:])
	return err
}

func (w *writer) ID() repository.PointID          { return w.id }
func (w *writer) DigestKey() repository.DigestKey { return w.key }

var errEnded = errors.New("the point was committed or aborted")

// Disk starts a disk.
func (w *writer) Disk(ctx context.Context, spec repository.DiskSpec) (repository.DiskWriter, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	d := &diskWriter{w: w, id: spec.ID, open: map[int64]*openSegment{}, sealed: map[int64]sealedSegment{}}
	if !partPattern.MatchString(spec.ID) {
		return nil, fmt.Errorf("disk ID %q is not valid", spec.ID)
	}
	if spec.Inherit {
		if w.parent == nil {
			return nil, fmt.Errorf("disk %s: there is no parent to inherit from", spec.ID)
		}
		m, err := w.parent.disk(ctx, spec.ID)
		if err != nil {
			return nil, err
		}
		if spec.BlockSize == 0 {
			spec.BlockSize = m.blockSize
		}
		if m.size != spec.Size || m.blockSize != spec.BlockSize {
			return nil, fmt.Errorf("disk %s has %d bytes in blocks of %d, its parent %d in blocks of %d",
				spec.ID, spec.Size, spec.BlockSize, m.size, m.blockSize)
		}
		if d.sums, err = m.segmentSums(ctx); err != nil {
			return nil, err
		}
		d.parent = m
	}
	d.geometry = geometry{spec.Size, spec.BlockSize}
	if err := d.valid(); err != nil {
		return nil, fmt.Errorf("disk %s: %w", spec.ID, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return nil, errEnded
	}
	for _, other := range w.disks {
		if other.id == spec.ID {
			return nil, fmt.Errorf("disk %s: %w", spec.ID, repository.ErrExists)
		}
	}
	w.disks = append(w.disks, d)
	return d, nil
}

// File stores a small file.
func (w *writer) File(ctx context.Context, name string, rd io.Reader) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if !partPattern.MatchString(name) {
		return fmt.Errorf("file name %q is not valid", name)
	}
	w.mu.Lock()
	_, taken := w.fobjs[name]
	ended := w.ended
	if !taken && !ended {
		w.fobjs[name] = object.EmptyID
	}
	w.mu.Unlock()
	if ended {
		return errEnded
	}
	if taken {
		return fmt.Errorf("file %s: %w", name, repository.ErrExists)
	}
	err := w.storeFile(ctx, name, rd)
	if err != nil {
		w.mu.Lock()
		delete(w.fobjs, name)
		w.mu.Unlock()
	}
	return err
}

func (w *writer) storeFile(ctx context.Context, name string, rd io.Reader) error {
	b, err := io.ReadAll(io.LimitReader(rd, repository.MaxFile+1))
	if err != nil {
		return fmt.Errorf("file %s: %w", name, err)
	}
	if len(b) > repository.MaxFile {
		return fmt.Errorf("file %s has more than %d bytes", name, repository.MaxFile)
	}
	out, err := w.sess.put(ctx, b, "", w.r.cfg.Compressor)
	if err != nil {
		return fmt.Errorf("file %s: %w", name, err)
	}
	w.mu.Lock()
	w.fobjs[name] = out.id
	w.files = append(w.files, fileBody{Name: name, Size: int64(len(b))})
	w.mu.Unlock()
	return nil
}

// zeroBlock returns the object of n zeros, stored once.
func (w *writer) zeroBlock(ctx context.Context, n int) (object.ID, error) {
	w.zeroMu.Lock()
	defer w.zeroMu.Unlock()
	if id, ok := w.zeros[n]; ok {
		return id, nil
	}
	out, err := w.sess.put(ctx, make([]byte, n), "", DefaultCompressor)
	if err != nil {
		return object.EmptyID, err
	}
	w.zeros[n] = out.id
	return out.id, nil
}

// zeroSegment returns the object of a segment of zeros.
func (w *writer) zeroSegment(ctx context.Context, g geometry, s int64) (object.ID, error) {
	key := segmentKey{length: g.segmentLen(s), blockSize: g.blockSize}
	w.zeroMu.Lock()
	id, ok := w.zsegs[key]
	w.zeroMu.Unlock()
	if ok {
		return id, nil
	}
	blocks := make([]object.ID, g.segmentBlocks(s))
	for i := range blocks {
		z, err := w.zeroBlock(ctx, repository.BlockLen(key.length, g.blockSize, int64(i)))
		if err != nil {
			return object.EmptyID, err
		}
		blocks[i] = z
	}
	id, err := w.putIndex(ctx, blocks, key.length, g.blockSize)
	if err != nil {
		return object.EmptyID, err
	}
	w.zeroMu.Lock()
	w.zsegs[key] = id
	w.zeroMu.Unlock()
	return id, nil
}

// Abort drops the point.
func (w *writer) Abort(ctx context.Context) error {
	w.mu.Lock()
	ended := w.ended
	w.ended = true
	w.mu.Unlock()
	if ended {
		return nil
	}
	gctx, done := w.r.store.guard(ctx)
	return done(w.end(gctx, ""))
}

// end gives back what the writer holds, and removes what it made known to the
// engine, orphan among it, if the point was not committed.
func (w *writer) end(ctx context.Context, orphan manifest.ID) error {
	ctx = context.WithoutCancel(ctx)
	err := w.sess.close(ctx)
	w.cpMu.Lock()
	ids := []manifest.ID{w.checkpoint, w.pin, orphan}
	w.checkpoint, w.pin = "", ""
	w.cpMu.Unlock()
	ids = slices.DeleteFunc(ids, func(id manifest.ID) bool { return id == "" })
	if len(ids) > 0 {
		err = errors.Join(err, w.r.dropSnapshots(ctx, ids))
	}
	w.r.mu.Lock()
	delete(w.r.active, w.id)
	w.r.mu.Unlock()
	return errors.Join(err, w.r.protect(ctx))
}

// dropSnapshots deletes manifests of kopia.
func (r *Repository) dropSnapshots(ctx context.Context, ids []manifest.ID) error {
	s, err := r.newSession(ctx, "drop")
	if err != nil {
		return err
	}
	for _, id := range ids {
		if derr := s.w.DeleteManifest(ctx, id); derr != nil && !errors.Is(derr, manifest.ErrNotFound) {
			err = errors.Join(err, derr)
		}
	}
	return errors.Join(err, s.flush(ctx), s.close(ctx))
}

// source is where kopia lists the points of a chain.
func source(chain string) snapshot.SourceInfo {
	return snapshot.SourceInfo{Host: kopiaHost, UserName: kopiaUser, Path: "/" + chain}
}
