package fakes

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// diskWriter fills a private image that Commit makes the disk's. ctx governs
// its life.
type diskWriter struct {
	ctx    context.Context
	handle *handle

	mu  sync.Mutex // guards img and end
	img *image
	end int64 // everything below was passed by an ascending writer
}

var _ hypervisor.DiskWriter = (*diskWriter)(nil)

// errAscending refuses a write behind one that was made.
var errAscending = errors.New("writes must ascend on this platform")

// OpenDiskWriter implements hypervisor.Target.
func (h *Hypervisor) OpenDiskWriter(ctx context.Context, id hypervisor.VMID, disk hypervisor.DiskID) (hypervisor.DiskWriter, error) {
	if err := h.begin(ctx, Call{Op: OpOpenDiskWriter, VM: id, Disk: disk}); err != nil {
		return nil, err
	}
	w := h.world
	w.mu.Lock()
	defer w.mu.Unlock()
	v, d, err := w.find(id, disk)
	switch {
	case err != nil:
		return nil, fail("OpenDiskWriter", id, disk, err)
	case v.owner == "":
		return nil, fail("OpenDiskWriter", id, disk, hypervisor.ErrNotOurs)
	case !v.unready:
		return nil, fail("OpenDiskWriter", id, disk, fmt.Errorf("the VM is complete: %w", hypervisor.ErrBusy))
	case d.writer != nil:
		return nil, fail("OpenDiskWriter", id, disk, fmt.Errorf("the disk is being written: %w", hypervisor.ErrBusy))
	}
	x := &handle{conn: h, vm: id, disk: disk, kind: "writer"}
	d.writer = &diskWriter{ctx: ctx, handle: x, img: d.img.freeze()}
	w.open[x] = struct{}{}
	return d.writer, nil
}

func (dw *diskWriter) begin(op Op, off, n int64) error {
	x := dw.handle
	x.conn.world.report(Call{Op: op, VM: x.vm, Disk: x.disk, Offset: off, Length: n})
	if err := dw.ctx.Err(); err != nil {
		return fail(string(op), x.vm, x.disk, err)
	}
	if x.closed.Load() {
		return fail(string(op), x.vm, x.disk, fmt.Errorf("the writer is closed, or its VM or connection is: %w", hypervisor.ErrUnavailable))
	}
	return nil
}

func (dw *diskWriter) change(op Op, off, n int64, f func()) error {
	if err := dw.begin(op, off, n); err != nil {
		return err
	}
	dw.mu.Lock()
	defer dw.mu.Unlock()
	err := dw.img.check(off, n)
	if err == nil && off < dw.end && !dw.handle.conn.world.opts.RandomWrite {
		err = fmt.Errorf("%w: %d after %d", errAscending, off, dw.end)
	}
	if err != nil {
		return fail(string(op), dw.handle.vm, dw.handle.disk, err)
	}
	f()
	dw.end = max(dw.end, off+n)
	return nil
}

// WriteAt implements io.WriterAt.
func (dw *diskWriter) WriteAt(p []byte, off int64) (int, error) {
	err := dw.change(OpWriteAt, off, int64(len(p)), func() { dw.img.write(p, off) })
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteZeroes implements hypervisor.DiskWriter.
func (dw *diskWriter) WriteZeroes(off, n int64) error {
	return dw.change(OpWriteZeroes, off, n, func() { dw.img.zero(off, n, true) })
}

// Commit implements hypervisor.DiskWriter.
func (dw *diskWriter) Commit() error {
	if err := dw.begin(OpCommit, 0, 0); err != nil {
		return err
	}
	x := dw.handle
	w := x.conn.world
	dw.mu.Lock()
	defer dw.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	_, d, err := w.find(x.vm, x.disk)
	if err != nil {
		return fail("Commit", x.vm, x.disk, err)
	}
	d.img = dw.img.freeze()
	w.drop(x)
	return nil
}

// Close implements io.Closer: what was not committed is forgotten. It is
// idempotent.
func (dw *diskWriter) Close() error {
	x := dw.handle
	w := x.conn.world
	w.report(Call{Op: OpCloseWriter, VM: x.vm, Disk: x.disk})
	w.mu.Lock()
	defer w.mu.Unlock()
	if !x.closed.Load() {
		w.drop(x)
	}
	return nil
}
