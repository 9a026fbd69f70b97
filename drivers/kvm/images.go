package kvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/image/qcow2"
)

// noSpace gives a full file system the contract's condition.
func noSpace(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", hypervisor.ErrNoSpace, err)
	}
	return err
}

// emptyImage makes, or makes anew, the unfinished image of a disk: it reads as
// zeros. flag is added to the open flags.
func (d *Driver) emptyImage(f *fileNote, flag int) (err error) {
	file, err := d.files.open(f.Path+partialSuffix, os.O_RDWR|os.O_CREATE|flag)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if err := file.Truncate(0); err != nil {
		return err
	}
	if f.Format == "raw" {
		if err := file.Truncate(f.Size); err != nil {
			return noSpace(err)
		}
		return noSpace(file.Sync())
	}
	w, err := qcow2.NewWriter(file, f.Size)
	if err != nil {
		return err
	}
	return noSpace(w.Commit())
}

// diskWriter fills the unfinished image of one disk. It lives as long as the
// context of OpenDiskWriter.
type diskWriter struct {
	ctx  context.Context //nolint:containedctx // governs the writer's life
	vm   hypervisor.VMID
	note fileNote
	d    *Driver
	file hostFile
	qcow *qcow2.Writer // nil for raw

	mu   sync.Mutex
	done bool // committed or closed
	ok   bool // committed
}

var errWriterClosed = errors.New("the writer is closed")

// OpenDiskWriter opens a disk of an incomplete VM of ours for writing in
// ascending order. ctx governs the writer's life.
func (d *Driver) OpenDiskWriter(ctx context.Context, id hypervisor.VMID, disk hypervisor.DiskID) (hypervisor.DiskWriter, error) {
	w, err := d.openWriter(ctx, id, disk)
	if err != nil {
		return nil, fail("OpenDiskWriter", id, disk, hypervisor.Hint(err), err)
	}
	return w, nil
}

func (d *Driver) openWriter(ctx context.Context, id hypervisor.VMID, disk hypervisor.DiskID) (*diskWriter, error) {
	if !d.ep.local {
		return nil, d.remoteOnly("OpenDiskWriter", id)
	}
	n, err := d.readNotes(ctx, string(id), xmlInactive)
	if err != nil {
		return nil, err
	}
	if err := n.ours(); err != nil {
		return nil, err
	}
	if n.Created.Incomplete == "" {
		return nil, fmt.Errorf("the VM is complete: %w", errors.ErrUnsupported)
	}
	note := n.Created.disk(disk)
	if note == nil {
		return nil, hypervisor.ErrNotFound
	}
	file, err := d.files.open(note.Path+partialSuffix, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	w := &diskWriter{d: d, ctx: ctx, vm: id, note: *note, file: file}
	err = file.Truncate(0)
	switch {
	case err != nil:
	case note.Format == "raw":
		err = file.Truncate(note.Size)
	default:
		w.qcow, err = qcow2.NewWriter(file, note.Size)
	}
	if err != nil {
		return nil, errors.Join(noSpace(err), file.Close())
	}
	return w, nil
}

// disk finds a disk by slot or by the ID it had where it came from.
func (c *createdNote) disk(id hypervisor.DiskID) *fileNote {
	for i := range c.Files {
		f := &c.Files[i]
		if f.Disk != "" && (f.Disk == string(id) || f.Alias == string(id)) {
			return f
		}
	}
	return nil
}

func (w *diskWriter) fail(op string, err error) error {
	return fail(op, w.vm, hypervisor.DiskID(w.note.Disk), "", noSpace(err))
}

// begin checks a change of n bytes at off; the lock is held.
func (w *diskWriter) begin(off, n int64) error {
	switch {
	case w.done:
		return errWriterClosed
	case off < 0 || n < 0 || n > w.note.Size || off > w.note.Size-n:
		return fmt.Errorf("%d bytes at %d are outside the disk of %d bytes", n, off, w.note.Size)
	}
	return w.ctx.Err()
}

func (w *diskWriter) WriteAt(p []byte, off int64) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.begin(off, int64(len(p))); err != nil {
		return 0, w.fail("WriteAt", err)
	}
	var n int
	var err error
	if w.qcow != nil {
		n, err = w.qcow.WriteAt(p, off)
	} else {
		n, err = w.file.WriteAt(p, off)
	}
	return n, w.fail("WriteAt", err)
}

// WriteZeroes leaves holes.
func (w *diskWriter) WriteZeroes(off, n int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.begin(off, n); err != nil {
		return w.fail("WriteZeroes", err)
	}
	if w.qcow != nil {
		return w.fail("WriteZeroes", w.qcow.WriteZeroes(off, n))
	}
	if n == 0 {
		return nil
	}
	err := w.file.punch(off, n)
	if err != nil {
		zeros := make([]byte, min(n, 1<<20))
		for err = nil; n > 0 && err == nil; {
			k := min(n, int64(len(zeros)))
			_, err = w.file.WriteAt(zeros[:k], off)
			off, n = off+k, n-k
		}
	}
	return w.fail("WriteZeroes", err)
}

// Commit makes the image valid and durable, under its temporary name.
func (w *diskWriter) Commit() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.begin(0, 0); err != nil {
		return w.fail("Commit", err)
	}
	var err error
	if w.qcow != nil {
		err = w.qcow.Commit()
	} else {
		err = w.file.Sync()
	}
	if err == nil {
		w.ok = true
	}
	w.done = true
	return w.fail("Commit", err)
}

// Close without Commit makes the disk empty again.
func (w *diskWriter) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return nil
	}
	err := w.file.Close()
	w.file, w.done = nil, true
	if !w.ok {
		err = errors.Join(err, w.d.emptyImage(&w.note, 0))
	}
	return w.fail("Close", err)
}

// imageReader reads an image file of a VM that is off.
type imageReader struct {
	io.ReaderAt
	ctx  context.Context //nolint:containedctx // governs the reader's life
	fail func(error) error
	size int64
	file hostFile
}

func (r *imageReader) Size() int64  { return r.size }
func (r *imageReader) Close() error { return r.file.Close() }

// ReadAt ends with the context of OpenDisk.
func (r *imageReader) ReadAt(p []byte, off int64) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, r.fail(err)
	}
	n, err := r.ReaderAt.ReadAt(p, off)
	if err == io.EOF { // the end of the disk is returned bare
		return n, err
	}
	return n, r.fail(err)
}

// OpenDisk opens a disk of a VM that is off. Images with backing files cannot be
// read without QEMU: make a snapshot for that.
func (d *Driver) OpenDisk(ctx context.Context, id hypervisor.VMID, disk hypervisor.DiskID) (hypervisor.DiskReader, error) {
	r, err := d.openImage(ctx, id, disk)
	if err != nil {
		return nil, fail("OpenDisk", id, disk, hypervisor.Hint(err), err)
	}
	return r, nil
}

func (d *Driver) openImage(ctx context.Context, id hypervisor.VMID, disk hypervisor.DiskID) (*imageReader, error) {
	if !d.ep.local {
		return nil, d.remoteOnly("OpenDisk", id)
	}
	m, err := d.inventory(ctx, string(id), false)
	if err != nil {
		return nil, err
	}
	path, format := "", ""
	if c := m.notes.Created; m.Incomplete {
		if f := c.disk(disk); f != nil {
			path, format = f.Path+partialSuffix, f.Format
		}
	} else {
		slot := string(disk)
		if c != nil && c.disk(disk) != nil {
			slot = c.disk(disk).Disk
		}
		if x := findDisk(m.dom, slot); x != nil {
			path, format = sourcePath(x.Source), diskFormat(x)
			if path == "" {
				return nil, fmt.Errorf("the disk is neither file nor block device: %w", errors.ErrUnsupported)
			}
		}
	}
	switch {
	case path == "":
		return nil, hypervisor.ErrNotFound
	case m.active():
		return nil, fmt.Errorf("the VM is not off: %w", hypervisor.ErrBusy)
	case format != "raw" && format != "qcow2":
		return nil, fmt.Errorf("format %s: %w", format, errors.ErrUnsupported)
	}
	file, err := d.files.open(path, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	r := &imageReader{ctx: ctx, file: file, fail: func(err error) error { return fail("ReadAt", id, disk, "", err) }}
	end, err := file.Seek(0, io.SeekEnd) // also the size of a block device
	if err == nil && format == "qcow2" {
		var img *qcow2.Image
		if img, err = qcow2.Open(file, end); err == nil {
			r.ReaderAt, r.size = img, img.Size()
		}
	} else {
		r.ReaderAt, r.size = file, end
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return r, nil
}

// syncDir makes the names in a directory durable.
func (d *Driver) syncDir(dir string) error {
	f, err := d.files.open(filepath.Clean(dir), os.O_RDONLY)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
