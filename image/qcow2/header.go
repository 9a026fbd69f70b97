package qcow2

import (
	"encoding/binary"
	"io"
	"math"
)

// Header field offsets and lengths, in bytes.
const (
	headerV2       = 72
	headerV3       = 104
	headerWritten  = 112
	compressionOff = 104

	extEnd      = 0
	extBitmaps  = 0x23852875
	extDataFile = 0x44415441
)

const (
	compressionZlib = 0
	compressionZstd = 1
)

// header is what the reader needs of an image header, checked.
type header struct {
	version     uint32
	clusterBits uint
	size        int64
	l1Size      int64
	l1Off       int64
	dirty       bool
	compression byte

	bitmaps    int // number of bitmaps, 0 when there are none or they are stale
	bitmapDir  int64
	bitmapSize int64
}

func (h *header) clusterSize() int64 { return 1 << h.clusterBits }

// l2Entries is the number of entries of an L2 table.
func (h *header) l2Entries() int64 { return h.clusterSize() / 8 }

// readFull reads len(p) bytes at off, or fails with ErrCorrupt at the end of the file.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF { // bare: a wrapped one is no end of the file
		return corrupt("the file ends at %d, within a structure", off+int64(n))
	}
	return err
}

// parseHeader reads and checks the header and its extensions.
func parseHeader(r io.ReaderAt, fileSize int64) (*header, error) {
	if fileSize < headerV2 {
		return nil, corrupt("%d bytes are too few for a header", fileSize)
	}
	b := make([]byte, headerWritten)
	if err := readFull(r, b[:min(fileSize, headerWritten)], 0); err != nil {
		return nil, err
	}
	be := binary.BigEndian
	if be.Uint32(b) != magic {
		return nil, corrupt("no qcow2 magic")
	}
	h := &header{version: be.Uint32(b[4:])}
	if h.version != 2 && h.version != 3 {
		return nil, unsupported("qcow2 version %d", h.version)
	}
	if be.Uint64(b[8:]) != 0 || be.Uint32(b[16:]) != 0 {
		return nil, ErrBackingFile
	}
	bits := be.Uint32(b[20:])
	if bits < minClusterBits || bits > maxClusterBits {
		return nil, corrupt("cluster_bits is %d", bits)
	}
	h.clusterBits = uint(bits)
	if be.Uint32(b[32:]) != 0 {
		return nil, ErrEncrypted
	}
	length, autoclear, err := h.parseV3(b, fileSize)
	if err != nil {
		return nil, err
	}
	if err := h.parseTables(b, fileSize); err != nil {
		return nil, err
	}
	return h, h.parseExtensions(r, length, fileSize, autoclear)
}

// parseV3 checks what version 3 adds. It returns the length of the header and its autoclear bits.
func (h *header) parseV3(b []byte, fileSize int64) (length int64, autoclear uint64, err error) {
	if h.version == 2 {
		return headerV2, 0, nil
	}
	if fileSize < headerV3 {
		return 0, 0, corrupt("%d bytes are too few for a header", fileSize)
	}
	be := binary.BigEndian
	length = int64(be.Uint32(b[100:]))
	if length < headerV3 || length%8 != 0 || length > h.clusterSize() || length > fileSize {
		return 0, 0, corrupt("header_length is %d", length)
	}
	features := be.Uint64(b[72:])
	switch {
	case features&featureDataFile != 0:
		return 0, 0, ErrDataFile
	case features&featureCorrupt != 0:
		return 0, 0, corrupt("it is marked so")
	case features&featureExtendedL2 != 0:
		return 0, 0, unsupported("extended L2 entries")
	case features&^(featureDirty|featureCompression) != 0:
		return 0, 0, unsupported("incompatible features %#x", features)
	}
	h.dirty = features&featureDirty != 0
	if length > compressionOff {
		h.compression = b[compressionOff]
	}
	if (h.compression != compressionZlib) != (features&featureCompression != 0) {
		return 0, 0, corrupt("compression type %d does not agree with the feature bit", h.compression)
	}
	if h.compression > compressionZstd {
		return 0, 0, unsupported("compression type %d", h.compression)
	}
	return length, be.Uint64(b[88:]), nil
}

// parseTables checks size and L1 table.
func (h *header) parseTables(b []byte, fileSize int64) error {
	be := binary.BigEndian
	size, l1Size, l1Off := be.Uint64(b[24:]), int64(be.Uint32(b[36:])), be.Uint64(b[40:])
	if size > math.MaxInt64-(1<<maxClusterBits) {
		return corrupt("the disk has %d bytes", size)
	}
	h.size, h.l1Size = int64(size), l1Size
	covers := h.clusterSize() * h.l2Entries() // at most 2^39
	need := h.size / covers
	if h.size%covers != 0 {
		need++
	}
	if need*8 > maxL1Bytes || l1Size*8 > maxL1Bytes {
		return unsupported("an L1 table of %d entries", max(need, l1Size))
	}
	if l1Size < need {
		return corrupt("the L1 table has %d entries and the disk needs %d", l1Size, need)
	}
	h.l1Size = need // more entries are allowed and mean nothing
	if need == 0 {
		return nil
	}
	if l1Off == 0 || l1Off%uint64(h.clusterSize()) != 0 || l1Off > math.MaxInt64 ||
		int64(l1Off) > fileSize-need*8 {
		return corrupt("the L1 table of %d bytes lies at %d in a file of %d", need*8, l1Off, fileSize)
	}
	h.l1Off = int64(l1Off)
	return nil
}

// parseExtensions walks the header extensions in the rest of the first cluster.
func (h *header) parseExtensions(r io.ReaderAt, off, fileSize int64, autoclear uint64) error {
	end := min(h.clusterSize(), fileSize)
	var b [24]byte
	for off+8 <= end {
		if err := readFull(r, b[:8], off); err != nil {
			return err
		}
		kind, n := binary.BigEndian.Uint32(b[:]), int64(binary.BigEndian.Uint32(b[4:]))
		off += 8
		if kind == extEnd {
			return nil
		}
		if n > end-off {
			return corrupt("header extension %#x of %d bytes at %d", kind, n, off)
		}
		switch kind {
		case extDataFile:
			return ErrDataFile
		case extBitmaps:
			if n != 24 {
				return corrupt("bitmaps extension of %d bytes", n)
			}
			if err := readFull(r, b[:24], off); err != nil {
				return err
			}
			// Without the bit some program that knows no bitmaps has changed the disk since.
			if autoclear&autoclearBitmaps != 0 {
				if err := h.parseBitmaps(b[:24], fileSize); err != nil {
					return err
				}
			}
		}
		off += (n + 7) &^ 7
	}
	return nil
}

func (h *header) parseBitmaps(b []byte, fileSize int64) error {
	count := binary.BigEndian.Uint32(b)
	size, off := binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:])
	switch {
	case count == 0 || count > maxBitmaps:
		return corrupt("%d bitmaps", count)
	case size > maxBitmapDir || int64(size) < int64(count)*bitmapEntry:
		return corrupt("bitmap directory of %d bytes for %d bitmaps", size, count)
	case off == 0 || off%uint64(h.clusterSize()) != 0 || off > math.MaxInt64 || int64(off) > fileSize-int64(size):
		return corrupt("bitmap directory at %d", off)
	}
	h.bitmaps, h.bitmapDir, h.bitmapSize = int(count), int64(off), int64(size)
	return nil
}
