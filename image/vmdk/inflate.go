package vmdk

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"io"
)

// compressedBound is the most that one compressed grain takes: what deflate needs for data that
// do not compress, with room for writers that split them into small blocks.
func compressedBound(grain int64) int64 { return grain + grain/8 + 1024 }

func zero(b []byte) bool {
	for len(b) >= 8 {
		if binary.LittleEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// inflater inflates one grain at a time.
type inflater struct {
	in    []byte // marker, data, padding
	size  int64  // of the data
	least int64  // bytes of the grain that lie on the disk
	at    int64
	out   []byte
	src   bytes.Reader
	z     io.ReadCloser
	ready chan error
}

func (f *inflater) inflate() { f.ready <- f.expand(f.in[12:12+f.size], f.least) }

// expand inflates b, in the format of zlib (RFC 1950), into out: exactly one grain, with a right
// checksum, and nothing behind it. The last grain of a disk may end with the disk, after least
// bytes, as qemu-img has it; the rest of out is then zeros.
func (f *inflater) expand(b []byte, least int64) error {
	if len(b) < 6 {
		return corrupt("%d bytes of compressed data", len(b))
	}
	if b[0]&15 != 8 || b[0]>>4 > 7 || b[1]&32 != 0 || binary.BigEndian.Uint16(b)%31 != 0 {
		return corrupt("compressed data begin with %#x", b[:2])
	}
	f.src.Reset(b[2 : len(b)-4])
	if f.z == nil {
		f.z = flate.NewReader(&f.src)
	} else if err := f.z.(flate.Resetter).Reset(&f.src, nil); err != nil {
		return corrupt("compressed data: %v", err)
	}
	if _, err := io.ReadFull(f.z, f.out[:least]); err != nil {
		return corrupt("compressed data: %v", err)
	}
	n := int64(len(f.out))
	switch _, err := io.ReadFull(f.z, f.out[least:]); {
	case err == io.EOF: // bare: nothing came, and the data ended well
		clear(f.out[least:])
		n = least
	case err != nil:
		return corrupt("compressed data: %v", err)
	default:
		var more [1]byte
		if n, err := f.z.Read(more[:]); n != 0 || err != io.EOF {
			return corrupt("compressed data: more than a grain, or %v", err)
		}
	}
	if f.src.Len() != 0 {
		return corrupt("%d bytes behind the compressed data", f.src.Len())
	}
	if sum := sum32(f.out[:n]); sum != binary.BigEndian.Uint32(b[len(b)-4:]) {
		return corrupt("checksum %#x instead of %#x", sum, b[len(b)-4:])
	}
	return nil
}
