package qcow2

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
	"unicode/utf8"
)

// bitmapEntry is the length of a bitmap directory entry without name and extra data.
const bitmapEntry = 24

const (
	bitmapInUse = 1 << 0
	bitmapAuto  = 1 << 1
	bitmapKnown = bitmapInUse | bitmapAuto | 1<<2
	bitmapDirty = 1 // the only type
)

// Bitmap describes a persistent dirty bitmap of an image.
type Bitmap struct {
	Name         string
	Granularity  int64 // bytes of disk per bit
	Enabled      bool  // it records writes when the image is opened
	Inconsistent bool  // a program died while it had the bitmap in memory: its content is lost
}

// Bitmaps returns the persistent dirty bitmaps that the image holds, in file order. There are
// none when a program that knows no bitmaps has written to the image since. It may be called
// concurrently.
func (m *Image) Bitmaps() ([]Bitmap, error) {
	h := m.h
	if h.bitmaps == 0 {
		return nil, nil
	}
	r := bufio.NewReader(io.NewSectionReader(m.r, h.bitmapDir, h.bitmapSize))
	var out []Bitmap
	left := h.bitmapSize
	for range h.bitmaps {
		b, n, err := readBitmap(r, left)
		if err != nil {
			return nil, &Error{Op: "bitmaps", Off: h.bitmapDir + h.bitmapSize - left, Err: err}
		}
		out, left = append(out, b), left-n
	}
	if left != 0 {
		return nil, &Error{Op: "bitmaps", Off: h.bitmapDir, Err: corrupt("%d bytes behind the last entry", left)}
	}
	return out, nil
}

// readBitmap reads one directory entry of at most left bytes and returns its length.
func readBitmap(r io.Reader, left int64) (Bitmap, int64, error) {
	var e [bitmapEntry]byte
	if left < bitmapEntry {
		return Bitmap{}, 0, corrupt("bitmap directory is too short")
	}
	if err := readStream(r, e[:]); err != nil {
		return Bitmap{}, 0, err
	}
	be := binary.BigEndian
	flags, bits := be.Uint32(e[12:]), e[17]
	name, extra := int64(be.Uint16(e[18:])), int64(be.Uint32(e[20:]))
	total := (bitmapEntry + extra + name + 7) &^ 7
	switch {
	case total > left:
		return Bitmap{}, 0, corrupt("bitmap entry of %d bytes where %d are left", total, left)
	case name == 0 || name > maxBitmapName:
		return Bitmap{}, 0, corrupt("bitmap name of %d bytes", name)
	case flags&^uint32(bitmapKnown) != 0:
		return Bitmap{}, 0, corrupt("bitmap flags %#x", flags)
	case e[16] != bitmapDirty:
		return Bitmap{}, 0, unsupported("bitmap type %d", e[16])
	case bits < 9 || bits > 31:
		return Bitmap{}, 0, corrupt("bitmap granularity of 2^%d", bits)
	}
	if _, err := io.CopyN(io.Discard, r, extra); err != nil {
		return Bitmap{}, 0, streamError(err)
	}
	p := make([]byte, total-bitmapEntry-extra) // below 1 KiB
	if err := readStream(r, p); err != nil {
		return Bitmap{}, 0, err
	}
	if !utf8.Valid(p[:name]) {
		return Bitmap{}, 0, corrupt("bitmap name is not UTF-8")
	}
	return Bitmap{
		Name: string(p[:name]), Granularity: 1 << bits,
		Enabled: flags&bitmapAuto != 0, Inconsistent: flags&bitmapInUse != 0,
	}, total, nil
}

func readStream(r io.Reader, p []byte) error {
	_, err := io.ReadFull(r, p)
	return streamError(err)
}

func streamError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return corrupt("the file ends within a structure")
	}
	return err
}
