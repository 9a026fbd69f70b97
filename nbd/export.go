package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"slices"
	"syscall"
)

// Backend is what a server needs of an export: a size and reads. Size is asked once per connection. All
// methods, also of the optional interfaces, are called concurrently.
//
// Errors reach the client as protocol errors: an [Errno] in the chain as itself, fs.ErrPermission as
// EPERM, fs.ErrInvalid as EINVAL, the operating system's ENOSPC and ENOMEM as such, everything else as
// EIO.
type Backend interface {
	// Size returns the size in bytes.
	Size() int64
	// ReaderAt reads within 0..Size; the buffer is the server's and must not be retained.
	io.ReaderAt
}

// ContextReader is an optional interface of a Backend: it is used instead of ReadAt and learns when the
// connection is gone or the server stops.
type ContextReader interface {
	ReadAtContext(ctx context.Context, p []byte, off int64) (int, error)
}

// Writer is an optional interface of a Backend that makes an export writable. The buffer must not be
// retained.
type Writer interface {
	io.WriterAt
}

// Zeroer is an optional interface of a writable Backend. Without it the server writes zeroes. flags may
// hold CommandNoHole and CommandFastZero; a backend that is not fast answers the latter with ENOTSUP.
type Zeroer interface {
	WriteZeroes(off, n int64, flags CommandFlags) error
}

// Trimmer is an optional interface of a writable Backend.
type Trimmer interface {
	Trim(off, n int64) error
}

// Flusher is an optional interface of a writable Backend. Flush returns when every change acknowledged
// before is on stable storage.
type Flusher interface {
	Flush() error
}

// StatusProvider is an optional interface of a Backend that offers metadata contexts. When it offers
// base:allocation, extents with StateZero are sent as holes in structured reads, without reading them.
type StatusProvider interface {
	// MetaContexts lists the names of the contexts.
	MetaContexts() []string
	// Extents walks the extents of one context that overlap n bytes at off, in ascending order. They may
	// pass the range on both sides. Ranges left out have flags 0, which means allocated data in
	// base:allocation and clean in a dirty bitmap.
	Extents(ctx context.Context, name string, off, n int64) iter.Seq2[Extent, error]
}

// Export is a Backend with the way it is presented. It must not be changed while it is served.
type Export struct {
	// Backend holds the data.
	Backend Backend
	// Description is free text for clients, at most 4096 bytes.
	Description string
	// ReadOnly refuses changes although the Backend could take them.
	ReadOnly bool
	// MultiConn promises that Flush on one connection covers the changes made through all of them. Read-
	// only exports offer several connections regardless.
	MultiConn bool
	// BlockSizes are advertised and enforced when Minimum is not zero; else 1, 4096 and the server's
	// largest payload are advertised.
	BlockSizes BlockSizes
}

// ExportSource finds the exports of a server. It is called concurrently.
type ExportSource interface {
	// ListExports returns the names that clients may see.
	ListExports(ctx context.Context) ([]string, error)
	// OpenExport returns the export with this name, which may be one that is not listed. An error
	// matching ErrUnknownExport tells the client so; any other refuses it by policy.
	OpenExport(ctx context.Context, name string) (*Export, error)
}

// ExportMap is a fixed set of exports by name. The empty name is the default export.
type ExportMap map[string]*Export

// ListExports returns the names in order.
func (m ExportMap) ListExports(context.Context) ([]string, error) {
	return slices.Sorted(maps.Keys(m)), nil
}

// OpenExport returns the export with this name.
func (m ExportMap) OpenExport(_ context.Context, name string) (*Export, error) {
	if e := m[name]; e != nil {
		return e, nil
	}
	return nil, fmt.Errorf("%w: %q", ErrUnknownExport, name)
}

var _ ExportSource = ExportMap(nil)

// writer returns the backend's Writer, or nil when the export takes no changes.
func (e *Export) writer() Writer {
	if e.ReadOnly {
		return nil
	}
	w, _ := e.Backend.(Writer)
	return w
}

// flags returns the transmission flags of the export.
func (e *Export) flags(structured bool) Flags {
	f := FlagHasFlags
	if structured {
		f |= FlagSendDF
	}
	if e.writer() == nil {
		return f | FlagReadOnly | FlagCanMultiConn
	}
	f |= FlagSendWriteZeroes
	if e.MultiConn {
		f |= FlagCanMultiConn
	}
	if _, ok := e.Backend.(Flusher); ok {
		f |= FlagSendFlush | FlagSendFUA
	}
	if _, ok := e.Backend.(Trimmer); ok {
		f |= FlagSendTrim
	}
	if _, ok := e.Backend.(Zeroer); ok {
		f |= FlagSendFastZero
	}
	return f
}

// sizes returns the size constraints to advertise.
func (e *Export) sizes(maxRequest int64) BlockSizes {
	s := e.BlockSizes
	if s.Minimum == 0 {
		s = BlockSizes{Minimum: 1, Preferred: 4096, Maximum: maxRequest}
	}
	s.Maximum = min(s.Maximum, maxRequest)
	if s.Maximum == 0 {
		s.Maximum = maxRequest
	}
	s.Preferred = max(s.Preferred, s.Minimum, 512)
	s.Maximum = max(s.Maximum, s.Preferred)
	return s
}

// check reports an export that cannot be presented.
func (e *Export) check() error {
	m := e.BlockSizes.Minimum
	switch {
	case e.Backend == nil:
		return errors.New("nbd: export without a backend")
	case m < 0 || m > maxMinBlock || m&(m-1) != 0 || e.BlockSizes.Preferred > maxPayload ||
		e.BlockSizes.Preferred&(e.BlockSizes.Preferred-1) != 0 || e.BlockSizes.Maximum < 0:
		return fmt.Errorf("nbd: export with block sizes %+v", e.BlockSizes)
	case len(e.Description) > maxString:
		return errors.New("nbd: description of the export is too long")
	}
	return nil
}

// errnoOf translates a backend's error for the wire.
func errnoOf(err error) Errno {
	var e Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e) && e != 0:
		return e
	case errors.Is(err, context.Canceled), errors.Is(err, ErrClosed):
		return ESHUTDOWN
	case errors.Is(err, syscall.ENOSPC):
		return ENOSPC
	case errors.Is(err, syscall.ENOMEM):
		return ENOMEM
	case errors.Is(err, fs.ErrPermission), errors.Is(err, ErrReadOnly):
		return EPERM
	case errors.Is(err, fs.ErrInvalid), errors.Is(err, ErrOutOfRange), errors.Is(err, ErrUnaligned):
		return EINVAL
	}
	return EIO
}
