// Package raw writes raw disk images: sparse files that hold the bytes of a disk and nothing else.
//
// A [Writer] has the methods of the qcow2 one, so that a restore can take either.
package raw

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/holdfast-backup/holdfast/image/internal/partial"
)

// PartialSuffix is what the name of a file ends in until it is committed.
const PartialSuffix = partial.Suffix

// hole is the unit in which written zeros become holes, in bytes.
const hole = 64 << 10

// Conditions that an *Error wraps.
var (
	// ErrClosed says that a writer is committed or closed.
	ErrClosed = errors.New("writer is closed")
	// ErrOrder says that a write begins before the end of the one before it.
	ErrOrder = errors.New("write is not ascending")
	// ErrBounds says that a write reaches outside the disk.
	ErrBounds = errors.New("write is outside the disk")
	// ErrSize says that a size is negative.
	ErrSize = errors.New("disk size is negative")
)

// Error is what every operation of this package returns.
type Error struct {
	Op  string // the operation, such as "write"
	Off int64  // byte offset on the disk
	Err error
}

// Error implements error.
func (e *Error) Error() string { return fmt.Sprintf("raw image %s at %d: %v", e.Op, e.Off, e.Err) }

// Unwrap returns the condition or the cause.
func (e *Error) Unwrap() error { return e.Err }

// Writer writes a fresh raw image. Writes come from one goroutine, ascending and without overlap;
// what is skipped, zeroed or written as zeros is a hole where the file system has holes. After an
// error of the file the writer takes nothing more and Commit fails.
type Writer struct {
	f     *partial.File
	size  int64
	pos   int64  // first byte that may still be written
	zeros []byte // never changed
	err   error
	done  bool
}

// Create returns a Writer for a new file of size bytes at path. Until Commit the file is called
// path+[PartialSuffix]; Close without Commit removes it. Neither name may exist, else the error is
// an [fs.ErrExist].
func Create(path string, size int64) (*Writer, error) {
	if size < 0 {
		return nil, &Error{Op: "create", Off: size, Err: ErrSize}
	}
	f, err := partial.Create(path)
	if err == nil {
		if err = f.Truncate(size); err != nil {
			err = errors.Join(err, f.End(false))
		}
	}
	if err != nil {
		return nil, &Error{Op: "create", Err: err}
	}
	return &Writer{f: f, size: size, zeros: make([]byte, hole)}, nil
}

// Size returns the size of the disk in bytes.
func (w *Writer) Size() int64 { return w.size }

// admit checks a range before anything is done. Its errors leave the writer usable.
func (w *Writer) admit(op string, off, n int64) error {
	switch {
	case w.err != nil:
		return w.err
	case w.done:
		return &Error{Op: op, Off: off, Err: ErrClosed}
	case off < 0 || n < 0 || off > w.size || n > w.size-off:
		return &Error{Op: op, Off: off, Err: ErrBounds}
	case off < w.pos:
		return &Error{Op: op, Off: off, Err: ErrOrder}
	}
	return nil
}

// WriteAt writes p to the disk at byte offset off, which must not be before the end of the last
// write. Pieces between multiples of 64 KiB that are zero take no space. p is not retained.
func (w *Writer) WriteAt(p []byte, off int64) (int, error) {
	if err := w.admit("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	for n := 0; n < len(p); {
		isZero, k := w.piece(p[n:], off+int64(n))
		if !isZero {
			if _, err := w.f.WriteAt(p[n:n+k], off+int64(n)); err != nil {
				w.err = &Error{Op: "write", Off: off + int64(n), Err: err}
				return n, w.err
			}
		}
		n += k
	}
	w.pos = off + int64(len(p))
	return len(p), nil
}

// piece returns the length of the head of p that is all holes or holds none.
func (w *Writer) piece(p []byte, off int64) (isZero bool, n int) {
	for n < len(p) {
		k := min(len(p)-n, int(hole-(off+int64(n))%hole))
		z := bytes.Equal(p[n:n+k], w.zeros[:k])
		if n > 0 && z != isZero {
			break
		}
		isZero, n = z, n+k
	}
	return isZero, n
}

// WriteZeroes makes n bytes at off zero, in the manner of WriteAt. It only leaves a hole.
func (w *Writer) WriteZeroes(off, n int64) error {
	if err := w.admit("zero", off, n); err != nil {
		return err
	}
	w.pos = off + n
	return nil
}

// Commit makes the file and its name durable. What was not written is zero.
func (w *Writer) Commit() error {
	if err := w.admit("commit", w.size, 0); err != nil {
		return err
	}
	w.done = true
	err := w.f.Sync()
	if err == nil {
		err = w.f.End(true)
	}
	if err != nil {
		w.err = &Error{Op: "commit", Off: w.pos, Err: err}
		return w.err
	}
	w.f = nil
	return nil
}

// Close removes the file unless it is committed. It is idempotent.
func (w *Writer) Close() error {
	w.done = true
	if w.f == nil {
		return nil
	}
	f := w.f
	w.f = nil
	if err := f.End(false); err != nil {
		return &Error{Op: "close", Err: err}
	}
	return nil
}
