package backup

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/internal/journal"
	"github.com/holdfast-backup/holdfast/internal/lease"
	"github.com/holdfast-backup/holdfast/repository"
)

// Quiesce is a wish for consistency.
type Quiesce int

// Wishes. Auto quiesces where an agent answers and is content with a
// crash-consistent point elsewhere; a level that was named and missed makes the
// run degraded.
const (
	QuiesceAuto Quiesce = iota
	QuiesceCrash
	QuiesceFilesystem
	QuiesceApplication
)

// String returns "auto", "crash", "filesystem" or "application".
func (q Quiesce) String() string {
	if q == QuiesceAuto {
		return "auto"
	}
	return hypervisor.Consistency(q - 1).String()
}

// ParseQuiesce is the inverse of String.
func ParseQuiesce(s string) (Quiesce, error) {
	if strings.EqualFold(s, "auto") {
		return QuiesceAuto, nil
	}
	c, err := hypervisor.ParseConsistency(s)
	if err != nil {
		return 0, fmt.Errorf("%q is not a consistency level: use auto, crash, filesystem or application", s)
	}
	return Quiesce(c) + 1, nil
}

// level is what to ask the hypervisor for.
func (q Quiesce) level() hypervisor.Consistency {
	if q == QuiesceAuto {
		return hypervisor.ApplicationConsistent
	}
	return hypervisor.Consistency(q - 1)
}

// Options steer a run. The zero value is what most callers want, but for
// StateDir: without it a run that is killed can be cleaned up by the next run of
// the same VM alone.
type Options struct {
	Quiesce        Quiesce
	MinConsistency hypervisor.Consistency // below it the run fails and leaves nothing
	QuiesceTimeout time.Duration          // zero: hypervisor.DefaultQuiesceTimeout
	VSS            *hypervisor.VSSOptions

	Full            bool                // read every disk in full
	ExcludeDisks    []hypervisor.DiskID // leave out, by rule of the user
	FailUnprotected bool                // fail before the snapshot if a disk cannot be protected

	// BlockSize is the block size of disks without an earlier point, in bytes;
	// zero means repository.DefaultBlockSize.
	BlockSize int
	// InFlight is how many blocks are read, hashed and stored at once; memory is
	// bounded by InFlight blocks. Zero means four per core, at least eight.
	InFlight int

	// StateDir holds the journal. Empty: no journal.
	StateDir string
	// JournalFS is where StateDir lies; nil: in the file system. Tests of this
	// module set it, to fail each operation of it.
	JournalFS journal.FS
	// Endpoint and Location are how Recover finds the hypervisor and the
	// repository again; they go into the journal and must hold no secret.
	Endpoint, Location string

	// Guard thaws the guest should this process die while it is frozen; may be
	// nil.
	Guard Guard

	// Audit says how much of each disk an incremental reads again to audit the
	// change tracking. A disk whose tracking is caught lying is read in full at
	// once and again by the next run, and the run is degraded. Disks that can
	// only be streamed are not audited.
	Audit AuditRate
	// AuditSeed decides which leaves are read; zero: a random one, which
	// Result.AuditSeed tells.
	AuditSeed uint64

	Events *Events      // may be nil
	Logger *slog.Logger // nil: nothing is logged

	// CleanupTimeout bounds what is done after a failure or a cancellation; zero
	// means two minutes.
	CleanupTimeout time.Duration

	// Holder names this process in leases; Takeover tells whether another holder
	// is dead; LeaseTTL is how long a lease lasts unrenewed. Zero values: made
	// from this process, its host, and repository.DefaultTTL.
	Holder   string
	Takeover func(holder string) bool
	LeaseTTL time.Duration

	Clock clock.Clock // nil: the real one
	Rand  io.Reader   // of run IDs and audits; nil: crypto/rand
}

// Guard is a watchdog outside this process. It is armed before a guest is told
// to freeze, and thaws it when the deadline comes or this process dies first.
type Guard interface {
	Arm(ctx context.Context, vm hypervisor.VMID, deadline time.Duration) (disarm func() error, err error)
}

func (o *Options) withDefaults() Options {
	var out Options
	if o != nil {
		out = *o
	}
	if out.BlockSize == 0 {
		out.BlockSize = repository.DefaultBlockSize
	}
	if out.InFlight <= 0 {
		out.InFlight = max(8, 4*runtime.GOMAXPROCS(0))
	}
	if out.Events == nil {
		out.Events = &Events{}
	}
	if out.Logger == nil {
		out.Logger = slog.New(slog.DiscardHandler)
	}
	if out.CleanupTimeout <= 0 {
		out.CleanupTimeout = 2 * time.Minute
	}
	if out.QuiesceTimeout <= 0 {
		out.QuiesceTimeout = hypervisor.DefaultQuiesceTimeout
	}
	if out.Takeover == nil {
		out.Takeover = lease.Dead
	}
	if out.Clock == nil {
		out.Clock = clock.Real()
	}
	if out.Rand == nil {
		out.Rand = rand.Reader
	}
	return out
}

func (o *Options) check() error {
	if !repository.ValidBlockSize(o.BlockSize) {
		return fmt.Errorf("block size %d is not valid: use a power of two from %d to %d bytes", o.BlockSize, repository.LeafSize, repository.MaxBlockSize)
	}
	if o.Quiesce < QuiesceAuto || o.Quiesce > QuiesceApplication {
		return fmt.Errorf("consistency %d is not valid", int(o.Quiesce))
	}
	if o.MinConsistency > o.Quiesce.level() {
		return fmt.Errorf("minimum consistency %s is above the level asked for, %s", o.MinConsistency, o.Quiesce)
	}
	return o.Audit.check()
}

// newSeed returns the seed of a run's audits, never zero.
func newSeed(o *Options) (uint64, error) {
	if o.AuditSeed != 0 || o.Audit.Off {
		return o.AuditSeed, nil
	}
	var b [8]byte
	if _, err := io.ReadFull(o.Rand, b[:]); err != nil {
		return 0, fmt.Errorf("seed of the audit: %w", err)
	}
	return max(1, binary.LittleEndian.Uint64(b[:])), nil
}

// newRun returns a run ID: it sorts by time and is unique.
func newRun(o *Options) (string, error) {
	var r [5]byte
	if _, err := io.ReadFull(o.Rand, r[:]); err != nil {
		return "", fmt.Errorf("run ID: %w", err)
	}
	return strings.ToLower(o.Clock.Now().UTC().Format("20060102t150405")) + hex.EncodeToString(r[:]), nil
}
