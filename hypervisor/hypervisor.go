package hypervisor

import (
	"context"
	"io"
	"iter"
)

// Hypervisor is one endpoint: a vCenter, a Hyper-V host, a XAPI pool, a libvirt
// daemon. It is safe for concurrent use.
type Hypervisor interface {
	// Info tells what this endpoint is and can do. It does no I/O.
	Info() Info

	// VMs lists virtual machines that match q, in no particular order. An error
	// comes last and at most once: it means that the listing is incomplete.
	VMs(ctx context.Context, q Query) iter.Seq2[*VM, error]

	// VM returns the current definition of one VM, or ErrNotFound. The caller
	// owns the result.
	VM(ctx context.Context, id VMID) (*VM, error)

	// CreateSnapshot freezes all disks of the VM that can be frozen, except the
	// excluded ones, at one instant. opts may be nil. When the achieved
	// consistency would be below opts.MinConsistency it returns ErrQuiesce or
	// ErrQuiesceTimeout and leaves nothing. When the context ends, what was begun
	// is undone on a context of the driver's own before it returns.
	CreateSnapshot(ctx context.Context, id VMID, opts *SnapshotOptions) (Snapshot, error)

	// OpenSnapshot attaches to a snapshot that an earlier process created, to
	// resume it or to release it. ErrNotFound once it is gone.
	OpenSnapshot(ctx context.Context, ref SnapshotRef) (Snapshot, error)

	// Snapshots lists unreleased snapshots of this VM that Holdfast created, in
	// any process: it finds orphans, also those whose CreateSnapshot was never
	// answered.
	Snapshots(ctx context.Context, id VMID) iter.Seq2[SnapshotRef, error]

	// Baselines lists what Holdfast left on the platform for later incremental
	// backups. Platforms that keep nothing list nothing.
	Baselines(ctx context.Context, id VMID) iter.Seq2[Baseline, error]

	// ForgetBaseline removes what a baseline keeps on the platform. It is
	// idempotent, and does nothing where nothing is kept. Other baselines stay
	// valid. A baseline that shares its object with others (one libvirt
	// checkpoint covers several disks) is removed for its own disk, or when the
	// platform cannot do that, with the last of them.
	ForgetBaseline(ctx context.Context, b Baseline) error

	// Close gives back local resources: connections and goroutines. It is
	// idempotent and does not release snapshots.
	Close() error
}

// Snapshot is a frozen instant of a VM. It must be released exactly once by
// somebody, in this process or, through OpenSnapshot, in another.
type Snapshot interface {
	// Ref identifies the snapshot across processes.
	Ref() SnapshotRef

	// VM is the definition as of the snapshot. Disks that are not part of the
	// snapshot are listed too, each with its Reason.
	VM() *VM

	// Consistency tells what was achieved, and by which means.
	Consistency() Achieved

	// Extents yields what has to be read from a disk. With since == nil: every
	// extent that may hold data. Otherwise: every extent that may have changed
	// since that baseline. Extents are sorted, disjoint, non-empty and inside the
	// disk. Too much is allowed, too little never. An error comes last and voids
	// everything yielded before it. ErrBaselineInvalid means that only a full
	// read is safe; it is also the answer for a baseline that was not named in
	// SnapshotOptions.Since, of another disk or of another VM. See
	// BaselineReason for the cause.
	Extents(ctx context.Context, disk DiskID, since *Baseline) iter.Seq2[Extent, error]

	// OpenDisk opens a disk for reading at random. ctx governs the reader's life.
	// errors.ErrUnsupported: the transport is sequential, see Streamer.
	OpenDisk(ctx context.Context, disk DiskID) (DiskReader, error)

	// Baseline returns the baseline of a disk at this instant, or
	// ErrBaselineInvalid if the disk is not tracked.
	Baseline(disk DiskID) (Baseline, error)

	// Release removes the snapshot and keeps the new baselines of the named
	// disks; nil keeps none, and naming a disk that has none is no error. It is
	// idempotent. Readers of the snapshot fail afterwards.
	Release(ctx context.Context, keep []DiskID) error
}

// DiskReader reads a frozen disk. ReadAt may be called concurrently, reads
// exactly len(p) bytes at a byte offset, and returns io.EOF at the end of the
// disk; p is not retained.
type DiskReader interface {
	io.ReaderAt
	io.Closer
	Size() int64
}

// HoleReader is optional on a DiskReader: it tells, where the transport knows
// for free, that a range holds zeros only.
type HoleReader interface {
	// ReadHole behaves as ReadAt. When hole is true, all of p reads as zeros and
	// its content is undefined: the caller must not look at it.
	ReadHole(p []byte, off int64) (n int, hole bool, err error)
}

// Streamer is optional on a Snapshot: sequential transports deliver ascending
// extents once. The byte slice is valid during the call alone; nil stands for
// an extent of zeros.
type Streamer interface {
	Stream(ctx context.Context, disk DiskID, since *Baseline, yield func(Extent, []byte) error) error
}

// Target is a Hypervisor that can also receive VMs.
type Target interface {
	Hypervisor

	// CreateVM makes a VM that is marked incomplete, cannot be started, and has
	// empty disks that read as zeros. Its name must be free (ErrExists).
	CreateVM(ctx context.Context, spec *VMSpec) (*VM, error)

	// OpenDiskWriter opens a disk of an incomplete VM for writing.
	OpenDiskWriter(ctx context.Context, id VMID, disk DiskID) (DiskWriter, error)

	// OpenDisk opens a disk of a powered-off VM for reading.
	OpenDisk(ctx context.Context, id VMID, disk DiskID) (DiskReader, error)

	// FinishVM makes an incomplete VM complete: it may be started afterwards.
	// It is idempotent.
	FinishVM(ctx context.Context, id VMID) error

	// SetPower changes the power state and returns when it is reached.
	SetPower(ctx context.Context, id VMID, p Power) error

	// DeleteVM removes a VM that Holdfast created, with its disks. It is
	// idempotent. A VM that Holdfast did not create is refused.
	DeleteVM(ctx context.Context, id VMID) error
}

// DiskWriter fills a disk of a new VM. One goroutine per disk writes ascending,
// non-overlapping ranges; what is never written reads as zeros. A driver with
// Capabilities.RandomWrite accepts any order.
type DiskWriter interface {
	io.WriterAt
	io.Closer // without Commit before it: abandons what was written

	// WriteZeroes makes n bytes at off read as zeros, with holes where possible.
	WriteZeroes(off, n int64) error

	// Commit makes everything durable. The writer accepts nothing afterwards.
	Commit() error
}

// Thawer is optional: platforms whose guests are frozen by us can be told to
// thaw. It is idempotent. A nil error means that the guest was seen thawed, or
// is not running; anything else means that it may still be frozen.
type Thawer interface {
	Thaw(ctx context.Context, id VMID) error
}
