package vmdk

import (
	"encoding/binary"
	"io"
	"math"
)

// header is a checked header of a sparse file. Offsets and sizes are in bytes.
type header struct {
	cowd       bool
	compressed bool
	markers    bool
	zeroGrain  bool
	version    uint32
	flags      uint32
	size       int64 // of the disk
	grain      int64
	gtes       int64 // entries of a grain table
	gd         int64 // -1: the footer says it
	descOff    int64
	descSize   int64
	overhead   int64
}

// gdEntries is the number of grain tables the disk needs.
func (h *header) gdEntries() int64 { return divUp(h.size, h.grain*h.gtes) }

// grains is the number of grains, the last one perhaps partial.
func (h *header) grains() int64 { return divUp(h.size, h.grain) }

// readFull reads len(p) bytes at off, or fails with ErrTruncated at the end of the file.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF { // bare: a wrapped one is no end of the file
		return ErrTruncated
	}
	return err
}

// inBytes turns a number of sectors into bytes.
func inBytes(n uint64) (int64, error) {
	if n > math.MaxInt64/sector {
		return 0, corrupt("%d sectors", n)
	}
	return int64(n) * sector, nil
}

// parseHeader checks the header in b, one sector.
func parseHeader(b []byte) (*header, error) {
	le := binary.LittleEndian
	switch le.Uint32(b) {
	case magicSparse:
		return parseHosted(b)
	case magicCOWD:
		return parseCOWD(b)
	}
	return nil, corrupt("no magic of a sparse file")
}

func parseHosted(b []byte) (*header, error) {
	le := binary.LittleEndian
	h := &header{version: le.Uint32(b[4:]), flags: le.Uint32(b[8:]), gtes: int64(le.Uint32(b[44:]))}
	if h.version < 1 || h.version > 3 {
		return nil, unsupported("sparse file version %d", h.version)
	}
	h.compressed = h.flags&flagCompressed != 0
	h.markers = h.flags&flagMarkers != 0
	h.zeroGrain = h.flags&flagZeroGrain != 0
	if h.flags&^(flagNewlines|flagRedundant|flagZeroGrain|flagCompressed|flagMarkers) != 0 {
		return nil, unsupported("flags %#x", h.flags)
	}
	if h.flags&flagNewlines != 0 && string(b[73:77]) != "\n \r\n" {
		return nil, corrupt("it went through a change of line ends")
	}
	algorithm := le.Uint16(b[77:])
	if h.compressed && algorithm != 1 || !h.compressed && algorithm > 1 {
		return nil, unsupported("compression algorithm %d", algorithm)
	}
	if h.markers && !h.compressed {
		return nil, unsupported("markers without compression")
	}
	grain := le.Uint64(b[20:])
	if grain == 0 || grain&(grain-1) != 0 || grain > maxGrain/sector {
		return nil, corrupt("grains of %d sectors", grain)
	}
	h.grain = int64(grain) * sector
	if h.gtes < 1 || h.gtes > maxGTEs {
		return nil, corrupt("grain tables of %d entries", h.gtes)
	}
	for _, f := range []struct {
		at  int
		dst *int64
	}{{12, &h.size}, {28, &h.descOff}, {36, &h.descSize}, {64, &h.overhead}} {
		var err error
		if *f.dst, err = inBytes(le.Uint64(b[f.at:])); err != nil {
			return nil, err
		}
	}
	h.gd = -1
	if gd := le.Uint64(b[56:]); gd != gdAtEnd {
		var err error
		if h.gd, err = inBytes(gd); err != nil {
			return nil, err
		}
	}
	if h.descSize > maxDescriptor || (h.descSize > 0 && h.descOff < sector) {
		return nil, corrupt("descriptor of %d bytes at %d", h.descSize, h.descOff)
	}
	return h, h.checkSize()
}

func parseCOWD(b []byte) (*header, error) {
	le := binary.LittleEndian
	h := &header{cowd: true, version: le.Uint32(b[4:]), gtes: maxGTEs}
	if h.version != 1 {
		return nil, unsupported("COWD version %d", h.version)
	}
	h.size = int64(le.Uint32(b[12:])) * sector
	grain := le.Uint32(b[16:])
	if grain == 0 || grain > maxGrain/sector {
		return nil, corrupt("grains of %d sectors", grain)
	}
	h.grain = int64(grain) * sector
	h.gd = int64(le.Uint32(b[20:])) * sector
	if n := int64(le.Uint32(b[24:])); n < h.gdEntries() {
		return nil, corrupt("grain directory of %d entries, the disk needs %d", n, h.gdEntries())
	}
	return h, h.checkSize()
}

func (h *header) checkSize() error {
	if h.size > MaxSize {
		return unsupported("a disk of %d bytes", h.size)
	}
	if h.gdEntries()*4 > maxGDBytes {
		return unsupported("a grain directory of %d entries", h.gdEntries())
	}
	return nil
}

// encode returns the header of a streamOptimized file, one sector.
func (h *header) encode() []byte {
	b := make([]byte, sector)
	le := binary.LittleEndian
	le.PutUint32(b[0:], magicSparse)
	le.PutUint32(b[4:], 3)
	le.PutUint32(b[8:], flagNewlines|flagCompressed|flagMarkers)
	le.PutUint64(b[12:], uint64(h.size/sector))
	le.PutUint64(b[20:], uint64(h.grain/sector))
	le.PutUint64(b[28:], uint64(h.descOff/sector))
	le.PutUint64(b[36:], uint64(h.descSize/sector))
	le.PutUint32(b[44:], uint32(h.gtes))
	gd := uint64(gdAtEnd)
	if h.gd >= 0 {
		gd = uint64(h.gd / sector)
	}
	le.PutUint64(b[56:], gd)
	le.PutUint64(b[64:], uint64(h.overhead/sector))
	copy(b[73:], "\n \r\n")
	le.PutUint16(b[77:], 1)
	return b
}
