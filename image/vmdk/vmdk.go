// Package vmdk reads VMware's disk images and writes the streamOptimized kind.
//
// A [Disk] reads at random: flat extents, hosted sparse files (KDMV, compressed or not), the delta
// files of hosts (COWD), disks of several extents, and deltas over a parent. A [Decoder] reads a
// streamOptimized image from a stream, once, and accepts no end but the marked one. A
// [StreamWriter] writes such a stream from ascending writes, compressing on all cores, in a
// bounded amount of memory.
//
// The package opens no file that an image names: the caller's [Opener] does, and it alone decides
// what a name may reach. It never allocates what a length field merely claims.
//
// Refused with an error that matches [errors.ErrUnsupported]: SESPARSE and raw device extents,
// access modes other than RW, RDONLY and NOACCESS, and format features not known here.
package vmdk

import (
	"errors"
	"fmt"
)

const (
	sector = 512

	magicSparse = 0x564d444b // "KDMV"
	magicCOWD   = 0x44574f43 // "COWD"

	flagNewlines   = 1 << 0
	flagRedundant  = 1 << 1
	flagZeroGrain  = 1 << 2
	flagCompressed = 1 << 16
	flagMarkers    = 1 << 17

	gdAtEnd = 1<<64 - 1

	markerEOS    = 0
	markerGT     = 1
	markerGD     = 2
	markerFooter = 3

	maxGrain      = 2 << 20 // bytes
	maxGTEs       = 4096
	maxGDBytes    = 32 << 20
	maxOverhead   = 256 << 20
	maxDescriptor = 1 << 20
	maxExtents    = 8192

	tableCacheBytes = 4 << 20
	grainCacheBytes = 4 << 20
	maxCached       = 256 // blocks of either cache, which is searched linearly

	// MaxSize is the largest disk that this package reads or writes, in bytes.
	MaxSize = 64 << 40
)

// Conditions that an *Error wraps.
var (
	// ErrCorrupt says that the image breaks the format.
	ErrCorrupt = errors.New("image is corrupt")
	// ErrTruncated says that a stream or file ends before the image does. It matches ErrCorrupt.
	ErrTruncated = fmt.Errorf("%w: it ends too early", ErrCorrupt)
	// ErrDigest says that length or SHA-1 of a stream are not what was expected.
	ErrDigest = errors.New("stream is not the one expected")
	// ErrParent says that a delta was opened without the parent it is based on, or with another.
	ErrParent = errors.New("parent is missing or does not match")
	// ErrClosed says that a writer is committed or closed, or a decoder used up.
	ErrClosed = errors.New("closed")
	// ErrOrder says that a write begins before the end of the one before it.
	ErrOrder = errors.New("write is not ascending")
	// ErrBounds says that an access reaches outside the disk.
	ErrBounds = errors.New("access is outside the disk")
	// ErrSize says that a size is negative or larger than MaxSize.
	ErrSize = errors.New("size is not usable")
)

// Error is what every operation of this package returns, but for [io.EOF] and errors of a callback.
type Error struct {
	Op  string // the operation, such as "open"
	Off int64  // a byte offset: in the file or stream for "open" and "decode", on the disk otherwise
	Err error
}

// Error implements error.
func (e *Error) Error() string { return fmt.Sprintf("vmdk %s at %d: %v", e.Op, e.Off, e.Err) }

// Unwrap returns the condition or the cause.
func (e *Error) Unwrap() error { return e.Err }

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}

func missingGrains(n, want int64) error {
	return fmt.Errorf("%w: %d grains of %d", ErrTruncated, n, want)
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errors.ErrUnsupported)
}

func divUp(n, d int64) int64 { return (n + d - 1) / d }

func roundUp(n, d int64) int64 { return divUp(n, d) * d }
