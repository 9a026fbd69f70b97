package vmdk

import (
	"encoding/binary"
	"io"
	"sync"
)

// kind says what a range of an extent is.
type kind int

const (
	hole kind = iota // not allocated: the parent's, or zeros
	zeroed
	data
)

// source is an extent of a disk. Offsets are relative to it.
type source interface {
	// status says what lies at off, and how many bytes from there, at least 1 and at most limit,
	// are of that kind.
	status(off, limit int64) (kind, int64, error)
	// readAt fills p from a range that status called data.
	readAt(p []byte, off int64) error
}

// sparse is an extent with grain tables.
type sparse struct {
	r        io.ReaderAt
	fileSize int64
	h        *header
	gd       []uint32
	tables   cache // grain tables by sector
	grains   cache // inflated grains by index
	pool     sync.Pool
}

// openSparse reads header and grain directory.
func openSparse(r io.ReaderAt, fileSize int64) (*sparse, error) {
	if fileSize < sector {
		return nil, ErrTruncated
	}
	b := make([]byte, sector)
	if err := readFull(r, b, 0); err != nil {
		return nil, err
	}
	h, err := parseHeader(b)
	if err != nil {
		return nil, err
	}
	if h.gd < 0 {
		if h, err = readFooter(r, fileSize, h); err != nil {
			return nil, err
		}
	}
	n := h.gdEntries() * 4
	if n > 0 && (h.gd < sector || h.gd > fileSize-n) {
		return nil, corrupt("grain directory of %d bytes at %d in a file of %d", n, h.gd, fileSize)
	}
	s := &sparse{r: r, fileSize: fileSize, h: h}
	s.tables.limit = int(min(maxCached, tableCacheBytes/(h.gtes*4)))
	s.grains.limit = int(min(maxCached, grainCacheBytes/h.grain))
	s.pool.New = func() any { return &inflater{} }
	raw := make([]byte, n) // at most 32 MiB, all in the file
	if err := readFull(r, raw, h.gd); n > 0 && err != nil {
		return nil, err
	}
	s.gd = make([]uint32, n/4)
	for i := range s.gd {
		s.gd[i] = binary.LittleEndian.Uint32(raw[i*4:])
	}
	return s, nil
}

// readFooter completes h, which it returns, by the header at the end of a file: marker, footer and
// end of stream.
func readFooter(r io.ReaderAt, fileSize int64, h *header) (*header, error) {
	b := make([]byte, 3*sector)
	if fileSize < int64(len(b)) || fileSize%sector != 0 {
		return nil, ErrTruncated
	}
	if err := readFull(r, b, fileSize-int64(len(b))); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if le.Uint64(b) != 1 || le.Uint32(b[8:]) != 0 || le.Uint32(b[12:]) != markerFooter || !zero(b[2*sector:]) {
		return nil, corrupt("no footer and end of stream at the end of the file")
	}
	f, err := parseHeader(b[sector:])
	if err != nil {
		return nil, err
	}
	if f.cowd || f.gd < 0 || f.size != h.size || f.grain != h.grain || f.gtes != h.gtes || f.flags != h.flags {
		return nil, corrupt("the footer is not that of this header")
	}
	h.gd = f.gd
	return h, nil
}

// table returns the grain table with index i, nil for none.
func (s *sparse) table(i int64) ([]byte, error) {
	e := s.gd[i]
	if e == 0 {
		return nil, nil
	}
	off, n := int64(e)*sector, s.h.gtes*4
	if off > s.fileSize-n {
		return nil, corrupt("grain table %d at %d in a file of %d", i, off, s.fileSize)
	}
	return s.tables.get(uint64(e), func() ([]byte, error) {
		b := make([]byte, n)
		return b, readFull(s.r, b, off)
	})
}

// decode interprets the entry of grain i.
func (s *sparse) decode(e uint32, i int64) (kind, error) {
	switch {
	case e == 0:
		return hole, nil
	case e == 1 && s.h.zeroGrain:
		return zeroed, nil
	}
	need := int64(1)
	if !s.h.compressed {
		need = min(s.h.grain, s.h.size-i*s.h.grain)
	}
	if off := int64(e) * sector; off < s.h.overhead || off > s.fileSize-need {
		return 0, corrupt("grain %d at %d in a file of %d", i, off, s.fileSize)
	}
	return data, nil
}

func (s *sparse) status(off, limit int64) (kind, int64, error) {
	h := s.h
	end := min(off+limit, h.size)
	var what kind
	var t []byte
	tableAt := int64(-1)
	for pos := off; pos < end; {
		g := pos / h.grain
		if g/h.gtes != tableAt {
			var err error
			tableAt = g / h.gtes
			if t, err = s.table(tableAt); err != nil {
				return 0, 0, err
			}
		}
		k, next := hole, (tableAt+1)*h.gtes
		if t != nil {
			var err error
			next = g + 1
			if k, err = s.decode(binary.LittleEndian.Uint32(t[g%h.gtes*4:]), g); err != nil {
				return 0, 0, err
			}
		}
		if pos == off {
			what = k
		} else if k != what {
			return what, pos - off, nil
		}
		pos = min(next*h.grain, end)
	}
	return what, end - off, nil
}

// entry returns the sector of the data grain i.
func (s *sparse) entry(i int64) (uint32, error) {
	t, err := s.table(i / s.h.gtes)
	if err != nil {
		return 0, err
	}
	if t == nil {
		return 0, corrupt("grain %d has no table", i)
	}
	return binary.LittleEndian.Uint32(t[i%s.h.gtes*4:]), nil
}

func (s *sparse) readAt(p []byte, off int64) error {
	for len(p) > 0 {
		g, in := off/s.h.grain, off%s.h.grain
		n := min(int64(len(p)), s.h.grain-in)
		e, err := s.entry(g)
		if err != nil {
			return err
		}
		if s.h.compressed {
			b, err := s.inflate(e, g)
			if err != nil {
				return err
			}
			copy(p[:n], b[in:])
		} else {
			for n < int64(len(p)) { // grains that follow each other in the file take one read
				next, err := s.entry((off + n) / s.h.grain)
				if err != nil {
					return err
				}
				if int64(next)*sector != int64(e)*sector+in+n {
					break
				}
				n = min(int64(len(p)), n+s.h.grain)
			}
			if err := readFull(s.r, p[:n], int64(e)*sector+in); err != nil {
				return err
			}
		}
		p, off = p[n:], off+n
	}
	return nil
}

// inflate returns grain i, which lies at sector e. The caller must not change it.
func (s *sparse) inflate(e uint32, i int64) ([]byte, error) {
	return s.grains.get(uint64(i), func() ([]byte, error) {
		off, head := int64(e)*sector, int64(4)
		if s.h.markers {
			head = 12
		}
		var m [12]byte
		if err := readFull(s.r, m[:head], off); err != nil {
			return nil, err
		}
		size := int64(binary.LittleEndian.Uint32(m[head-4:]))
		if s.h.markers && binary.LittleEndian.Uint64(m[:]) != uint64(i*(s.h.grain/sector)) {
			return nil, corrupt("grain %d has the marker of another at %d", i, off)
		}
		if size == 0 || size > compressedBound(s.h.grain) || off+head > s.fileSize-size {
			return nil, corrupt("grain %d of %d compressed bytes at %d", i, size, off)
		}
		f := s.pool.Get().(*inflater)
		defer s.pool.Put(f)
		if int64(cap(f.in)) < size {
			f.in = make([]byte, compressedBound(s.h.grain))
		}
		f.in, f.out = f.in[:size], make([]byte, s.h.grain)
		if err := readFull(s.r, f.in, off+head); err != nil {
			return nil, err
		}
		return f.out, f.expand(f.in, min(s.h.grain, s.h.size-i*s.h.grain))
	})
}
