package vmdk

import (
	"fmt"
	"io"
	"iter"
	"math"
	"sort"
)

// Extent is a byte range of the disk.
type Extent struct {
	Offset, Length int64
	Zero           bool // said to be zeros; false: may hold data
}

// Opener opens a file that a descriptor names and returns it with its size in bytes. The name is
// untrusted: it may be absolute or lead out of a folder, and the opener decides whether it may.
// The file stays the opener's: a Disk closes nothing.
type Opener func(name string) (io.ReaderAt, int64, error)

// Disk is an open disk. Its methods may be called concurrently when the readers under it may, and
// what they read must not change. A Disk holds about 8 MiB per sparse extent that is read.
type Disk struct {
	size   int64
	desc   *Descriptor
	parts  []part
	parent *Disk
}

// part is an extent of the disk.
type part struct {
	off, size int64
	src       source
}

// Open opens a disk that is one file of fileSize bytes: a hosted sparse file, streamOptimized or
// not, or a COWD delta. What is not allocated in it is parent's, which may be nil for a disk that
// is based on none. COWD files have no descriptor that says so: for them nil means zeros.
func Open(r io.ReaderAt, fileSize int64, parent *Disk) (*Disk, error) {
	s, err := openSparse(r, fileSize)
	if err != nil {
		return nil, &Error{Op: "open", Err: err}
	}
	d := &Disk{size: s.h.size, parts: []part{{size: s.h.size, src: s}}}
	if s.h.descSize > 0 {
		if s.h.descOff > fileSize-s.h.descSize {
			return nil, &Error{Op: "open", Off: s.h.descOff, Err: ErrTruncated}
		}
		b := make([]byte, s.h.descSize) // at most 1 MiB
		if err := readFull(r, b, s.h.descOff); err != nil {
			return nil, &Error{Op: "open", Off: s.h.descOff, Err: err}
		}
		desc, _, err := parseDescriptor(b)
		if err != nil {
			return nil, &Error{Op: "open", Off: s.h.descOff, Err: err}
		}
		if len(desc.Extents) != 1 || desc.Size() != s.h.size {
			return nil, &Error{Op: "open", Off: s.h.descOff, Err: corrupt("descriptor of %d extents, %d bytes, header of %d bytes",
				len(desc.Extents), desc.Size(), s.h.size)}
		}
		d.desc = desc
	}
	return d, d.adopt(parent)
}

// OpenDisk opens a disk by its descriptor: monolithic or split, flat, sparse, or a host's kinds
// (vmfs, vmfsSparse). What is not allocated in it is parent's, which must be nil exactly when the
// descriptor names none.
func OpenDisk(desc *Descriptor, open Opener, parent *Disk) (*Disk, error) {
	d := &Disk{desc: desc}
	if len(desc.Extents) == 0 || len(desc.Extents) > maxExtents {
		return nil, &Error{Op: "open", Err: corrupt("%d extents", len(desc.Extents))}
	}
	for i, e := range desc.Extents {
		if e.Size < 0 || e.Size%sector != 0 || e.Size > MaxSize-d.size {
			return nil, &Error{Op: "open", Err: fmt.Errorf("extent %d: %w", i, ErrSize)}
		}
		src, err := openExtent(e, open)
		if err != nil {
			return nil, &Error{Op: "open", Err: fmt.Errorf("extent %d (%q): %w", i, e.Name, err)}
		}
		d.parts = append(d.parts, part{off: d.size, size: e.Size, src: src})
		d.size += e.Size
	}
	return d, d.adopt(parent)
}

func openExtent(e ExtentLine, open Opener) (source, error) {
	switch e.Access {
	case "RW", "RDONLY":
	case "NOACCESS":
		return nil, unsupported("extent without access")
	default:
		return nil, corrupt("access mode %q", e.Access)
	}
	switch e.Type {
	case "ZERO":
		return &flat{}, nil
	case "FLAT", "VMFS", "SPARSE", "VMFSSPARSE":
	default:
		return nil, unsupported("extent of type %q", e.Type)
	}
	r, n, err := open(e.Name)
	if err != nil {
		return nil, err
	}
	if e.Type == "FLAT" || e.Type == "VMFS" {
		if e.Offset < 0 || e.Size > n || e.Offset > n-e.Size {
			return nil, fmt.Errorf("%w: %d bytes at %d in a file of %d", ErrTruncated, e.Size, e.Offset, n)
		}
		return &flat{r: r, off: e.Offset}, nil
	}
	s, err := openSparse(r, n)
	if err != nil {
		return nil, err
	}
	if s.h.size != e.Size {
		return nil, corrupt("the file holds %d bytes of disk, the descriptor says %d", s.h.size, e.Size)
	}
	return s, nil
}

// adopt checks and sets the parent.
func (d *Disk) adopt(parent *Disk) error {
	var err error
	switch {
	case d.desc != nil && (d.desc.ParentCID != NoParent) != (parent != nil):
		err = fmt.Errorf("%w: the parent has content ID %08x", ErrParent, d.desc.ParentCID)
	case parent == nil:
	case d.desc != nil && parent.desc != nil && parent.desc.CID != d.desc.ParentCID:
		err = fmt.Errorf("%w: content ID %08x instead of %08x", ErrParent, parent.desc.CID, d.desc.ParentCID)
	}
	if err != nil {
		return &Error{Op: "open", Err: err}
	}
	d.parent = parent
	return nil
}

// Size returns the size of the disk in bytes.
func (d *Disk) Size() int64 { return d.size }

// Descriptor returns the descriptor, nil when a sparse file has none. It must not be changed.
func (d *Disk) Descriptor() *Descriptor { return d.desc }

// flat is an extent whose bytes lie as they are, or are zeros when r is nil.
type flat struct {
	r   io.ReaderAt
	off int64
}

func (f *flat) status(_, limit int64) (kind, int64, error) {
	if f.r == nil {
		return zeroed, limit, nil
	}
	return data, limit, nil
}

func (f *flat) readAt(p []byte, off int64) error { return readFull(f.r, p, f.off+off) }

// status says what lies at off, which is inside the disk, and for how long. A data range comes
// with where to read it.
func (d *Disk) status(off, limit int64) (k kind, n int64, src source, at int64, err error) {
	i := sort.Search(len(d.parts), func(i int) bool { return d.parts[i].off > off }) - 1
	for d.parts[i].off+d.parts[i].size <= off { // empty extents
		i--
	}
	p := d.parts[i]
	k, n, err = p.src.status(off-p.off, min(limit, p.off+p.size-off))
	if err != nil {
		return 0, 0, nil, 0, err
	}
	if k == hole && d.parent != nil {
		if off >= d.parent.size { // the delta has grown
			return hole, n, nil, 0, nil
		}
		return d.parent.status(off, min(n, d.parent.size-off))
	}
	return k, n, p.src, off - p.off, nil
}

// ReadAt reads len(p) bytes of the disk at byte offset off. At the end of the disk it returns
// io.EOF. It may be called concurrently. p is not retained.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, &Error{Op: "read", Off: off, Err: ErrBounds}
	}
	if off >= d.size {
		return 0, io.EOF
	}
	short := int64(len(p)) > d.size-off
	if short {
		p = p[:d.size-off]
	}
	for n := 0; n < len(p); {
		k, run, src, at, err := d.status(off+int64(n), int64(len(p)-n))
		if err == nil {
			if q := p[n : n+int(run)]; k == data {
				err = src.readAt(q, at)
			} else {
				clear(q)
			}
		}
		if err != nil {
			return n, &Error{Op: "read", Off: off + int64(n), Err: err}
		}
		n += int(run)
	}
	if short {
		return len(p), io.EOF
	}
	return len(p), nil
}

// Extents yields the allocated ranges of the disk and its parents, ascending and disjoint: those
// that may hold data and, marked, those that are explicitly zero. Everything else reads as zeros
// too. Ranges of one sort that touch are joined. An error comes last and voids what was yielded
// before. It may be called concurrently, and the result consumed more than once.
func (d *Disk) Extents() iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		var cur Extent
		for off := int64(0); off < d.size; {
			k, n, _, _, err := d.status(off, math.MaxInt64-off)
			if err != nil {
				yield(Extent{}, &Error{Op: "extents", Off: off, Err: err})
				return
			}
			next := Extent{Offset: off, Length: n, Zero: k == zeroed}
			off += n
			if k == hole {
				continue
			}
			if cur.Length > 0 && cur.Offset+cur.Length == next.Offset && cur.Zero == next.Zero {
				cur.Length += n
				continue
			}
			if cur.Length > 0 && !yield(cur, nil) {
				return
			}
			cur = next
		}
		if cur.Length > 0 {
			yield(cur, nil)
		}
	}
}
