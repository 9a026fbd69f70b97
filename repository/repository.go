package repository

import (
	"context"
	"io"
	"iter"
	"time"
)

// Repository stores restore points. It is safe for concurrent use.
type Repository interface {
	// Info tells what this repository is. It does no I/O.
	Info() Info

	// Begin starts a restore point. Nothing of it is visible before its Commit.
	// An unknown or unreadable parent is an error: begin without one instead.
	Begin(ctx context.Context, spec *PointSpec) (Writer, error)

	// Points lists points that match q, by chain, then by sequence. A point that
	// was committed and has vanished, and a record that cannot be trusted, are
	// listed too, with a State that says so. An error comes last and at most once:
	// the listing is incomplete.
	Points(ctx context.Context, q Query) iter.Seq2[*Point, error]

	// Open opens a committed point for reading. ErrNotFound if there is none,
	// ErrDamaged if its record or map cannot be trusted.
	Open(ctx context.Context, id PointID) (Reader, error)

	// Delete removes a point for good, under a lock that the caller holds
	// (LockMaintenance). Space comes back with Maintain. Deleting a point that
	// was deleted before is not an error.
	Delete(ctx context.Context, id PointID, lock Lock) error

	// Verify checks what is stored. Damage is not an error but a finding in the
	// report; an error means that the check itself could not be finished. That a
	// point is deleted meanwhile is no damage.
	Verify(ctx context.Context, opts *VerifyOptions) (*VerifyReport, error)

	// Maintain gives back space and renews what protects the repository, under
	// LockMaintenance. It never removes what a committed point needs.
	Maintain(ctx context.Context, lock Lock, opts *MaintainOptions) (*MaintainReport, error)

	// Lock takes a named lease. It returns a *LockedError, which matches
	// ErrLocked, when somebody else holds it. It does not wait.
	Lock(ctx context.Context, name string, opts LockOptions) (Lock, error)

	// PutNote stores a small named value outside of points, durably and
	// authenticated, replacing an older one: open obligations, for example. Names
	// are [a-z0-9./-]{1,128}, values at most MaxNote bytes.
	PutNote(ctx context.Context, name string, value []byte) error
	// Notes lists notes whose names begin with prefix, sorted by name. One that
	// cannot be trusted is an error that names it; it comes last.
	Notes(ctx context.Context, prefix string) iter.Seq2[Note, error]
	// DeleteNote removes a note. It is idempotent.
	DeleteNote(ctx context.Context, name string) error

	// Close gives back local resources. Locks are not released. It is idempotent.
	Close() error
}

// Writer is one restore point being written. Its methods may be called
// concurrently, except Commit and Abort, which come last. Exactly one of the two
// ends it; Abort after either does nothing.
type Writer interface {
	// ID is the point's identity, fixed from the beginning.
	ID() PointID

	// DigestKey is the key of the chain's leaf digests. The caller computes
	// Block.Leaves with it.
	DigestKey() DigestKey

	// Disk starts a disk of this point. IDs are [A-Za-z0-9._-]{1,64}, unique in
	// the point.
	Disk(ctx context.Context, spec DiskSpec) (DiskWriter, error)

	// File stores a small file (at most MaxFile bytes) beside the disks:
	// configuration, firmware state. Names are [A-Za-z0-9._-]{1,64}, unique.
	File(ctx context.Context, name string, r io.Reader) error

	// Commit makes the point visible with one atomic put, after everything it
	// needs was found stored in full. On any error the point does not exist,
	// unless the error matches ErrOutcomeUnknown: look for the run in Points.
	Commit(ctx context.Context, info *CommitInfo) (*Proof, error)

	// Abort drops the point. What was uploaded is left to maintenance.
	Abort(ctx context.Context) error
}

// DiskWriter takes the blocks of one disk. Blocks never written are inherited
// from the parent's disk of the same ID if DiskSpec.Inherit was set, and zeros
// otherwise.
type DiskWriter interface {
	// WriteBlock stores a block, replacing nothing: each index is written at most
	// once. It may be called concurrently; Data and Leaves are not retained.
	WriteBlock(ctx context.Context, b Block) error

	// Advance promises that every block with an index below next was written or
	// never will be, so that maps of whole segments can be stored and forgotten.
	// Not calling it costs memory, nothing else.
	Advance(ctx context.Context, next int64) error

	// Close ends the disk. Commit refuses a point with an open disk.
	Close(ctx context.Context) error

	// Stats tells what was done so far.
	Stats() DiskStats
}

// Reader reads one committed point. It is safe for concurrent use.
type Reader interface {
	Point() *Point
	DigestKey() DigestKey
	// Disk opens a disk; ErrNotFound if the point has none of this ID.
	Disk(ctx context.Context, id string) (DiskReader, error)
	// File opens a stored file; ErrNotFound.
	File(ctx context.Context, name string) (io.ReadCloser, error)
	Close() error
}

// DiskReader reads a disk of a point. ReadAt and ReadBlock may be called
// concurrently. A block that is damaged is an error that matches ErrDamaged and
// names the range; it is never returned as data or zeros.
type DiskReader interface {
	io.ReaderAt
	io.Closer
	Size() int64
	BlockSize() int

	// ReadBlock reads one whole block with the digests that were stored with it.
	// Data is nil for a block of zeros, else a prefix of buf, which must hold
	// BlockSize bytes. The engine has authenticated the data; comparing the
	// leaves with digests of one's own proves it independently of the engine.
	ReadBlock(ctx context.Context, index int64, buf []byte) (Block, error)

	// Extents yields the ranges that hold data, ascending and disjoint, in whole
	// blocks (clipped at the end of the disk). Everything else is zeros. An error
	// comes last.
	Extents(ctx context.Context) iter.Seq2[Extent, error]

	// Leaves returns the digests stored for a block without reading the block.
	Leaves(ctx context.Context, index int64) ([]Digest, error)
}

// Limits on small values, in bytes.
const (
	MaxNote = 1 << 20
	MaxFile = 64 << 20
)

// Info describes a repository. It holds no secret.
type Info struct {
	ID            string // 32 or more lower-case hex digits, fixed at creation
	Engine        string // "kopia 0.23.1", "memory"
	Location      string
	SegmentBytes  int64 // span of one map segment at the default block size
	FormatVersion int
	Created       time.Time
}

// Repo8 is the short form of the ID that object names on hypervisors carry.
func (i Info) Repo8() string { return i.ID[:min(8, len(i.ID))] }

// Note is a small named value.
type Note struct {
	Name  string
	Value []byte
}
