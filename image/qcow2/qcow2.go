// Package qcow2 reads and writes QEMU's copy-on-write disk images, versions 2 and 3.
//
// A [Writer] makes a fresh version 3 image from ascending writes, with holes for zeros, in a
// bounded amount of memory. An [Image] reads one image file and nothing else: it is strict, it
// never opens another file that an image names (backing file, external data file), and it never
// allocates what a length field merely claims.
//
// Not supported, and refused with an error that matches [errors.ErrUnsupported]: backing files,
// external data files, encryption, extended L2 entries, zstd-compressed clusters (those only
// when they are read), and incompatible features not known here. Internal snapshots are ignored:
// the active disk is what is read.
package qcow2

import (
	"errors"
	"fmt"
)

const (
	magic = 0x514649fb // "QFI\xfb"

	minClusterBits = 9
	maxClusterBits = 21

	maxL1Bytes     = 32 << 20 // as QEMU; with it one parse stays below 64 MiB
	maxBitmaps     = 65535
	maxBitmapDir   = 64 << 20
	maxBitmapName  = 1023
	l2CacheBytes   = 8 << 20
	dataCacheBytes = 4 << 20
	maxCached      = 256 // blocks of either cache, which is searched linearly

	sector = 512

	flagCopied     = 1 << 63
	flagCompressed = 1 << 62
	flagZero       = 1
	offsetMask     = 0x00fffffffffffe00

	featureDirty       = 1 << 0
	featureCorrupt     = 1 << 1
	featureDataFile    = 1 << 2
	featureCompression = 1 << 3
	featureExtendedL2  = 1 << 4
	autoclearBitmaps   = 1 << 0
)

// Conditions that an *Error wraps.
var (
	// ErrCorrupt says that the image breaks the format.
	ErrCorrupt = errors.New("image is corrupt")
	// ErrBackingFile says that the image holds only changes to another one, which is never opened.
	ErrBackingFile = fmt.Errorf("image has a backing file: %w", errors.ErrUnsupported)
	// ErrDataFile says that the data lies in another file, which is never opened.
	ErrDataFile = fmt.Errorf("image has an external data file: %w", errors.ErrUnsupported)
	// ErrEncrypted says that the image is encrypted.
	ErrEncrypted = fmt.Errorf("image is encrypted: %w", errors.ErrUnsupported)
	// ErrClosed says that a writer is committed or closed.
	ErrClosed = errors.New("writer is closed")
	// ErrOrder says that a write begins before the end of the one before it.
	ErrOrder = errors.New("write is not ascending")
	// ErrBounds says that a write reaches outside the disk.
	ErrBounds = errors.New("write is outside the disk")
	// ErrSize says that a virtual size is negative or larger than 64 TiB.
	ErrSize = errors.New("virtual size is not usable")
)

// Error is what every operation of this package returns, but for [io.EOF].
type Error struct {
	Op  string // the operation, such as "open"
	Off int64  // a byte offset: in the file for "open" and "bitmaps", on the disk otherwise
	Err error
}

// Error implements error.
func (e *Error) Error() string { return fmt.Sprintf("qcow2 %s at %d: %v", e.Op, e.Off, e.Err) }

// Unwrap returns the condition or the cause.
func (e *Error) Unwrap() error { return e.Err }

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errors.ErrUnsupported)
}
