package qcow2

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"io"
)

// Image is an open image. Its methods may be called concurrently when the ReaderAt under it may.
type Image struct {
	r        io.ReaderAt
	fileSize int64
	h        *header
	l1       []uint64
	tables   cache // L2 tables by file offset
	clusters cache // inflated clusters by L2 entry
}

// Open reads header and L1 table of the image in r, a file of fileSize bytes. r stays the
// caller's and must not change while the image is read.
func Open(r io.ReaderAt, fileSize int64) (*Image, error) {
	h, err := parseHeader(r, fileSize)
	if err != nil {
		return nil, &Error{Op: "open", Err: err}
	}
	m := &Image{r: r, fileSize: fileSize, h: h, l1: make([]uint64, 0, h.l1Size)}
	m.tables.limit = min(maxCached, l2CacheBytes>>h.clusterBits)
	m.clusters.limit = min(maxCached, dataCacheBytes>>h.clusterBits)
	buf := make([]byte, min(h.l1Size*8, 64<<10))
	for left := h.l1Size * 8; left > 0; left -= int64(len(buf)) {
		buf = buf[:min(left, int64(len(buf)))]
		off := h.l1Off + h.l1Size*8 - left
		if err := readFull(r, buf, off); err != nil {
			return nil, &Error{Op: "open", Off: off, Err: err}
		}
		for i := 0; i < len(buf); i += 8 {
			m.l1 = append(m.l1, binary.BigEndian.Uint64(buf[i:]))
		}
	}
	return m, nil
}

// Size returns the virtual size of the disk in bytes.
func (m *Image) Size() int64 { return m.h.size }

// ClusterSize returns the size of a cluster in bytes.
func (m *Image) ClusterSize() int64 { return m.h.clusterSize() }

// Dirty reports whether the program that wrote the image last did not close it in an orderly
// way. The disk can be read; reference counts may be wrong.
func (m *Image) Dirty() bool { return m.h.dirty }

// kind says what a guest cluster is.
type kind int

const (
	hole       kind = iota // not allocated: reads as zeros
	zero                   // said to be zeros
	data                   // lies in the file as it is
	compressed             // lies in the file deflated
)

// place says where a guest cluster is: at a file offset for data, in an L2 entry for compressed.
type place struct {
	kind  kind
	off   int64
	entry uint64
}

// table returns the L2 table behind an L1 entry, nil for none.
func (m *Image) table(l1 uint64) ([]byte, error) {
	if l1 == 0 {
		return nil, nil
	}
	off, cs := int64(l1&offsetMask), m.h.clusterSize()
	if l1&^(offsetMask|flagCopied) != 0 || off%cs != 0 || off > m.fileSize-cs {
		return nil, corrupt("L1 entry %#x", l1)
	}
	if off == 0 {
		return nil, nil
	}
	return m.tables.get(uint64(off), func() ([]byte, error) {
		b := make([]byte, cs)
		return b, readFull(m.r, b, off)
	})
}

// decode interprets an L2 entry.
func (m *Image) decode(e uint64) (place, error) {
	if e&flagCompressed != 0 {
		if e&flagCopied != 0 {
			return place{}, corrupt("compressed L2 entry %#x", e)
		}
		return place{kind: compressed, entry: e}, nil
	}
	off := int64(e & offsetMask)
	if e&^(offsetMask|flagCopied|flagZero) != 0 || off%m.h.clusterSize() != 0 ||
		(e&flagZero != 0 && m.h.version < 3) {
		return place{}, corrupt("L2 entry %#x", e)
	}
	switch {
	case e&flagZero != 0:
		return place{kind: zero}, nil
	case off == 0:
		return place{kind: hole}, nil
	}
	return place{kind: data, off: off}, nil
}

// find returns the place of the guest cluster with index i.
func (m *Image) find(i int64) (place, error) {
	n := m.h.l2Entries()
	t, err := m.table(m.l1[i/n])
	if err != nil || t == nil {
		return place{}, err
	}
	return m.decode(binary.BigEndian.Uint64(t[i%n*8:]))
}

// ReadAt reads len(p) bytes of the disk at byte offset off. At the end of the disk it returns
// io.EOF. It may be called concurrently. p is not retained.
func (m *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, &Error{Op: "read", Off: off, Err: ErrBounds}
	}
	if off >= m.h.size {
		return 0, io.EOF
	}
	short := int64(len(p)) > m.h.size-off
	if short {
		p = p[:m.h.size-off]
	}
	for n := 0; n < len(p); {
		k, err := m.readRun(p[n:], off+int64(n))
		if err != nil {
			return n, &Error{Op: "read", Off: off + int64(n), Err: err}
		}
		n += k
	}
	if short {
		return len(p), io.EOF
	}
	return len(p), nil
}

// readRun fills the head of p from clusters that need one read, and returns its length.
func (m *Image) readRun(p []byte, off int64) (int, error) {
	cs := m.h.clusterSize()
	in := off % cs
	pl, err := m.find(off / cs)
	if err != nil {
		return 0, err
	}
	n := min(int64(len(p)), cs-in)
	switch pl.kind {
	case compressed:
		b, err := m.inflate(pl.entry)
		if err != nil {
			return 0, err
		}
		return copy(p[:n], b[in:]), nil
	case data:
		for n < int64(len(p)) {
			next, err := m.find((off + n) / cs)
			if err != nil {
				return 0, err
			}
			if next.kind != data || next.off != pl.off+in+n {
				break
			}
			n = min(int64(len(p)), n+cs)
		}
		return int(n), readFull(m.r, p[:n], pl.off+in)
	}
	clear(p[:n])
	return int(n), nil
}

// inflate returns the content of a compressed cluster. The caller must not change it.
func (m *Image) inflate(entry uint64) ([]byte, error) {
	if m.h.compression != compressionZlib {
		return nil, unsupported("zstd-compressed cluster")
	}
	shift := 62 - (m.h.clusterBits - 8)
	off := int64(entry & (1<<shift - 1))
	sectors := int64(entry&(flagCompressed-1)>>shift) + 1
	size := min(sectors*sector-off%sector, m.fileSize-off) // the last one may end with the file
	if off == 0 || size <= 0 {
		return nil, corrupt("compressed L2 entry %#x", entry)
	}
	return m.clusters.get(entry, func() ([]byte, error) {
		in := make([]byte, size) // at most two clusters
		if err := readFull(m.r, in, off); err != nil {
			return nil, err
		}
		out := make([]byte, m.h.clusterSize())
		fr := flate.NewReader(bytes.NewReader(in))
		if _, err := io.ReadFull(fr, out); err != nil {
			return nil, corrupt("compressed cluster at %d: %v", off, err)
		}
		return out, nil
	})
}
