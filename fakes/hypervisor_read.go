package fakes

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync/atomic"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// streamChunk is the most that Stream hands over at once, in bytes.
const streamChunk = 1 << 20

// handle is an open reader or writer of a connection.
type handle struct {
	conn   *Hypervisor
	vm     hypervisor.VMID
	disk   hypervisor.DiskID
	kind   string     // "reader" or "writer"
	snap   *snapState // nil for disks of a Target
	closed atomic.Bool
}

// drop closes a handle and takes it off the list. The lock is held.
func (w *World) drop(x *handle) {
	x.closed.Store(true)
	delete(w.open, x)
	if x.kind != "writer" {
		return
	}
	if _, d, err := w.find(x.vm, x.disk); err == nil && d.writer != nil && d.writer.handle == x {
		d.writer = nil
	}
}

// Extents implements hypervisor.Snapshot.
func (s *snapshot) Extents(ctx context.Context, disk hypervisor.DiskID, since *hypervisor.Baseline) iter.Seq2[hypervisor.Extent, error] {
	return func(yield func(hypervisor.Extent, error) bool) {
		list, err := s.extents(ctx, OpExtents, disk, since)
		if err != nil {
			yield(hypervisor.Extent{}, err)
			return
		}
		for _, e := range list {
			if err := s.alive(ctx, OpExtents, disk); err != nil {
				yield(hypervisor.Extent{}, err)
				return
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

func (s *snapshot) alive(ctx context.Context, op Op, disk hypervisor.DiskID) error {
	if err := ctx.Err(); err != nil {
		return fail(string(op), s.vm, disk, err)
	}
	if s.s.gone.Load() {
		return fail(string(op), s.vm, disk, hypervisor.ErrNotFound)
	}
	return nil
}

func (s *snapshot) extents(ctx context.Context, op Op, disk hypervisor.DiskID, since *hypervisor.Baseline) ([]hypervisor.Extent, error) {
	if err := s.begin(ctx, op, disk); err != nil {
		return nil, err
	}
	f, err := s.frozen(op, disk)
	if err != nil {
		return nil, err
	}
	if since == nil {
		return f.img.allocated(), nil
	}
	set, named := f.changes[*since]
	if !named {
		set.err = &hypervisor.BaselineError{
			Reason: hypervisor.ReasonBaselineMissing,
			Err:    errors.New("it was not named when the snapshot was made"),
		}
	}
	if set.err != nil {
		return nil, fail(string(op), s.vm, disk, set.err)
	}
	var out []hypervisor.Extent
	for _, e := range set.extents {
		for _, part := range f.img.split(e) {
			out = appendExtent(out, part)
		}
	}
	return out, nil
}

// Stream implements hypervisor.Streamer.
func (s streamSnapshot) Stream(ctx context.Context, disk hypervisor.DiskID, since *hypervisor.Baseline, yield func(hypervisor.Extent, []byte) error) error {
	list, err := s.extents(ctx, OpStream, disk, since)
	if err != nil {
		return err
	}
	f, err := s.frozen(OpStream, disk)
	if err != nil {
		return err
	}
	buf := make([]byte, streamChunk)
	for _, e := range list {
		if e.Zero {
			if err := s.alive(ctx, OpStream, disk); err != nil {
				return err
			}
			if err := yield(e, nil); err != nil {
				return err
			}
			continue
		}
		for off := e.Offset; off < e.End(); {
			if err := s.alive(ctx, OpStream, disk); err != nil {
				return err
			}
			p := buf[:min(streamChunk, e.End()-off)]
			if _, err := f.img.readAt(p, off); err != nil {
				return fail(string(OpStream), s.vm, disk, err)
			}
			if err := yield(hypervisor.Extent{Offset: off, Length: int64(len(p))}, p); err != nil {
				return err
			}
			off += int64(len(p))
		}
	}
	return nil
}

// OpenDisk implements hypervisor.Snapshot.
func (s *snapshot) OpenDisk(ctx context.Context, disk hypervisor.DiskID) (hypervisor.DiskReader, error) {
	if err := s.begin(ctx, OpOpenDisk, disk); err != nil {
		return nil, err
	}
	f, err := s.frozen(OpOpenDisk, disk)
	if err != nil {
		return nil, err
	}
	if s.h.world.opts.Sequential {
		return nil, fail(string(OpOpenDisk), s.vm, disk, errors.ErrUnsupported)
	}
	return s.h.openReader(ctx, f.img, &handle{vm: s.vm, disk: disk, snap: s.s}), nil
}

func (h *Hypervisor) openReader(ctx context.Context, img *image, x *handle) *diskReader {
	x.conn, x.kind = h, "reader"
	h.world.mu.Lock()
	defer h.world.mu.Unlock()
	h.world.open[x] = struct{}{}
	return &diskReader{ctx: ctx, img: img, handle: x}
}

// diskReader reads an image that nobody writes. ctx governs its life.
type diskReader struct {
	ctx    context.Context
	img    *image
	handle *handle
}

var (
	_ hypervisor.DiskReader = (*diskReader)(nil)
	_ hypervisor.HoleReader = (*diskReader)(nil)
)

func (r *diskReader) begin(op Op, off int64, n int) error {
	x := r.handle
	x.conn.world.report(Call{Op: op, VM: x.vm, Disk: x.disk, Offset: off, Length: int64(n)})
	if err := r.ctx.Err(); err != nil {
		return fail(string(op), x.vm, x.disk, err)
	}
	if x.closed.Load() {
		return fail(string(op), x.vm, x.disk, fmt.Errorf("the reader is closed, or its snapshot or connection is: %w", hypervisor.ErrUnavailable))
	}
	if off < 0 {
		return fail(string(op), x.vm, x.disk, fmt.Errorf("negative offset %d", off))
	}
	return nil
}

// ReadAt implements io.ReaderAt.
func (r *diskReader) ReadAt(p []byte, off int64) (int, error) {
	if err := r.begin(OpReadAt, off, len(p)); err != nil {
		return 0, err
	}
	return r.img.readAt(p, off)
}

// ReadHole implements hypervisor.HoleReader.
func (r *diskReader) ReadHole(p []byte, off int64) (n int, hole bool, err error) {
	if err := r.begin(OpReadHole, off, len(p)); err != nil {
		return 0, false, err
	}
	if int64(len(p)) <= r.img.size-off && r.img.hole(off, int64(len(p))) {
		return len(p), true, nil
	}
	n, err = r.img.readAt(p, off)
	return n, false, err
}

// Size implements hypervisor.DiskReader.
func (r *diskReader) Size() int64 { return r.img.size }

// Close implements io.Closer. It is idempotent.
func (r *diskReader) Close() error {
	x := r.handle
	w := x.conn.world
	w.report(Call{Op: OpCloseReader, VM: x.vm, Disk: x.disk})
	w.mu.Lock()
	defer w.mu.Unlock()
	if !x.closed.Load() {
		w.drop(x)
	}
	return nil
}
