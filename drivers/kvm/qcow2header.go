package kvm

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// header is what the driver wants to know of a qcow2 file. It is only read of
// files that the domain's definition calls qcow2: no format is ever guessed.
type header struct {
	version    uint32
	size       int64
	backing    string // as written in the file, empty if none
	backFormat string // empty: not said
	dataFile   bool
	corrupt    bool
}

const (
	qcow2Magic     = 0x514649fb
	qcow2V3Fixed   = 104
	maxBackingName = 1023
	maxHeaderExts  = 1 << 16
	extBackFormat  = 0xe2792aca
	maxChain       = 200
)

// readHeader reads the header of a qcow2 image.
func readHeader(r io.ReaderAt) (*header, error) {
	var b [qcow2V3Fixed]byte
	n, err := r.ReadAt(b[:], 0)
	if n < 72 {
		return nil, fmt.Errorf("qcow2 header: %d bytes: %w", n, io.ErrUnexpectedEOF)
	}
	if err != nil && n < len(b) && err != io.EOF { // ReaderAt returns it bare
		return nil, err
	}
	be := binary.BigEndian
	if be.Uint32(b[0:]) != qcow2Magic {
		return nil, fmt.Errorf("qcow2 header: no magic")
	}
	h := &header{version: be.Uint32(b[4:]), size: int64(be.Uint64(b[24:]))}
	if h.version != 2 && h.version != 3 || h.size < 0 {
		return nil, fmt.Errorf("qcow2 header: version %d, size %d", h.version, h.size)
	}
	length := int64(72)
	if h.version == 3 {
		if n < qcow2V3Fixed {
			return nil, fmt.Errorf("qcow2 header: %d bytes: %w", n, io.ErrUnexpectedEOF)
		}
		incompatible := be.Uint64(b[72:])
		h.corrupt = incompatible&(1<<1) != 0
		h.dataFile = incompatible&(1<<2) != 0
		length = int64(be.Uint32(b[100:]))
	}
	nameOff, nameLen := be.Uint64(b[8:]), be.Uint32(b[16:])
	if nameOff != 0 && nameLen > 0 {
		if nameLen > maxBackingName || nameOff > 1<<21 {
			return nil, fmt.Errorf("qcow2 header: backing file name of %d bytes at %d", nameLen, nameOff)
		}
		name := make([]byte, nameLen)
		if _, err := r.ReadAt(name, int64(nameOff)); err != nil {
			return nil, fmt.Errorf("qcow2 backing file name: %w", err)
		}
		h.backing = string(name)
	}
	return h, h.extensions(r, length)
}

// extensions walks the header extensions that follow the fixed header.
func (h *header) extensions(r io.ReaderAt, off int64) error {
	if off < 72 || off > maxHeaderExts {
		return fmt.Errorf("qcow2 header: length %d", off)
	}
	var e [8]byte
	for off < maxHeaderExts {
		if _, err := r.ReadAt(e[:], off); err != nil {
			return nil // a file of the bare header has none
		}
		kind, n := binary.BigEndian.Uint32(e[:]), int64(binary.BigEndian.Uint32(e[4:]))
		if kind == 0 {
			return nil
		}
		if kind == extBackFormat {
			if n > 64 {
				return fmt.Errorf("qcow2 header: backing format name of %d bytes", n)
			}
			name := make([]byte, n)
			if _, err := r.ReadAt(name, off+8); err != nil {
				return fmt.Errorf("qcow2 backing format: %w", err)
			}
			h.backFormat = string(name)
		}
		off += 8 + (n+7)/8*8
	}
	return nil
}

// headerOf reads the header of the qcow2 image at path.
func headerOf(path string) (*header, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	return readHeader(f)
}

// chainBottom follows backing files down and returns the path of the last one
// that is a file, and the top image's header (nil if it cannot be read). A disk
// keeps its bottom when a snapshot puts an overlay on it and when that is
// committed, so the bottom tells what is in the slot.
func chainBottom(path, format string) (bottom string, top *header) {
	bottom = path
	for depth := 0; format == "qcow2" && depth < maxChain; depth++ {
		h, err := headerOf(bottom)
		if depth == 0 {
			top = h
		}
		if err != nil || h.backing == "" {
			break
		}
		next := h.backing
		if !filepath.IsAbs(next) {
			if !plainPath(next) {
				break
			}
			next = filepath.Join(filepath.Dir(bottom), next)
		}
		if _, err := os.Stat(next); err != nil {
			break
		}
		bottom, format = next, h.backFormat
	}
	return bottom, top
}

// plainPath reports whether a backing file name is a path rather than a URL or a
// JSON description.
func plainPath(s string) bool {
	for i := range len(s) {
		switch s[i] {
		case ':':
			return false
		case '/':
			return true
		}
	}
	return true
}
