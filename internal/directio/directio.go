// Package directio writes large files around the page cache, where the system
// can. Copying into the cache was the largest single cost of a backup and of a
// restore (docs/performance.md), and what is written there pushes out what the
// guests of the machine had in it.
package directio

import (
	"io"
	"os"
	"sync"
	"unsafe"
)

const (
	// align is what memory, offset and length of a direct write are multiples of,
	// in bytes. No device in use wants more than a page.
	align = 4096
	// least is the smallest write worth the way around the cache, in bytes.
	least = 64 << 10
	// chunk is what a Writer collects, in bytes.
	chunk = 1 << 20
)

// File is a file that is written. Its methods but WriteAt and Close are those of
// the os.File; Sync makes durable what came either way. It is not safe for
// concurrent use.
type File struct {
	*os.File
	direct *os.File // a second descriptor of the same file; nil: the cache is used
	tried  bool
}

// New takes over f, which is open for writing under its present name.
func New(f *os.File) *File { return &File{File: f} }

// WriteAt writes p at byte offset off: around the cache as far as memory and
// offset allow it, and through it where they do not or the file system refuses.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	n := 0
	if k := len(p) - len(p)%align; k >= least && off%align == 0 && aligned(p) && f.canDirect() {
		var err error
		n, err = f.direct.WriteAt(p[:k], off)
		if err != nil {
			if !refused(err) {
				return n, err
			}
			err = f.direct.Close() // this file system wants something else
			f.direct = nil
			if err != nil {
				return n, err
			}
		}
	}
	if n == len(p) {
		return n, nil
	}
	k, err := f.File.WriteAt(p[n:], off+int64(n))
	return n + k, err
}

// canDirect opens the way around the cache when it is first wanted.
func (f *File) canDirect() bool {
	if !f.tried {
		f.tried = true
		f.direct = openDirect(f.Name())
	}
	return f.direct != nil
}

// Close closes the file. Nothing is synced.
func (f *File) Close() error {
	err := f.File.Close()
	if d := f.direct; d != nil {
		f.direct = nil
		if derr := d.Close(); err == nil {
			err = derr
		}
	}
	return err
}

func aligned(p []byte) bool { return uintptr(unsafe.Pointer(unsafe.SliceData(p)))%align == 0 }

// buffers are aligned, as all large allocations of Go's are.
var buffers = sync.Pool{New: func() any { b := make([]byte, chunk); return &b }}

// Writer writes a stream to a file from its beginning. It must be flushed.
type Writer struct {
	f   *File
	buf *[]byte
	n   int   // bytes collected
	off int64 // offset of the first of them
}

var _ io.Writer = (*Writer)(nil)

// NewWriter returns a Writer to f, which must be empty.
func NewWriter(f *File) *Writer { return &Writer{f: f} }

// Write collects p and writes what is complete.
func (w *Writer) Write(p []byte) (int, error) {
	if w.buf == nil {
		w.buf = buffers.Get().(*[]byte)
	}
	done := 0
	for done < len(p) {
		k := copy((*w.buf)[w.n:], p[done:])
		w.n += k
		done += k
		if w.n == chunk {
			if err := w.write(); err != nil {
				return done - k, err
			}
		}
	}
	return done, nil
}

func (w *Writer) write() error {
	_, err := w.f.WriteAt((*w.buf)[:w.n], w.off)
	w.off += int64(w.n)
	w.n = 0
	return err
}

// Flush writes the rest and gives back the memory, whatever comes of it.
func (w *Writer) Flush() error {
	if w.buf == nil {
		return nil
	}
	err := w.write()
	buffers.Put(w.buf)
	w.buf = nil
	return err
}
