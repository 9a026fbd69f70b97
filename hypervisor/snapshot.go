package hypervisor

import (
	"fmt"
	"strings"
	"time"
)

// Consistency orders how consistent a frozen disk is: compare with <.
type Consistency int

// Levels of consistency. The zero value asks the guest for nothing.
const (
	CrashConsistent       Consistency = iota // as after a power cut
	FilesystemConsistent                     // file systems were flushed and frozen
	ApplicationConsistent                    // applications took part
)

// String returns "crash", "filesystem" or "application".
func (c Consistency) String() string {
	switch c {
	case CrashConsistent:
		return "crash"
	case FilesystemConsistent:
		return "filesystem"
	case ApplicationConsistent:
		return "application"
	}
	return fmt.Sprintf("consistency(%d)", int(c))
}

// ParseConsistency is the inverse of String.
func ParseConsistency(s string) (Consistency, error) {
	for c := CrashConsistent; c <= ApplicationConsistent; c++ {
		if strings.EqualFold(s, c.String()) {
			return c, nil
		}
	}
	return 0, fmt.Errorf("%q is not a consistency level: use crash, filesystem or application", s)
}

// MarshalText encodes the level as its name.
func (c Consistency) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText decodes a name.
func (c *Consistency) UnmarshalText(b []byte) (err error) {
	*c, err = ParseConsistency(string(b))
	return err
}

// DefaultQuiesceTimeout bounds a freeze when SnapshotOptions says nothing. It is
// well below the 10 s after which Windows thaws by itself.
const DefaultQuiesceTimeout = 8 * time.Second

// SnapshotOptions say how a snapshot is to be made. The zero value is a
// crash-consistent snapshot of all disks without incremental reading.
type SnapshotOptions struct {
	// Name is the owner name of the snapshot and of everything made for it, see
	// Name. Empty: the driver makes one that belongs to no repository.
	Name string

	// Quiesce is the level to try for, MinConsistency the level below which the
	// snapshot fails and leaves nothing.
	Quiesce, MinConsistency Consistency

	// QuiesceTimeout is the longest time that the guest may stay frozen, counted
	// from the moment the freeze is issued; zero means DefaultQuiesceTimeout.
	QuiesceTimeout time.Duration

	VSS          *VSSOptions
	ExcludeDisks []DiskID

	// Since lists the baselines that Extents may be asked about. An invalid one
	// does not fail the snapshot: Extents says so later.
	Since []Baseline
}

// VSSOptions steer the shadow copy service in Windows guests.
type VSSOptions struct {
	// Full asks for a backup type that lets applications truncate their logs.
	// The default, copy, leaves logs to the in-guest tool that may own them.
	Full bool
}

// SnapshotRef identifies a snapshot across processes. It can be serialised.
type SnapshotRef struct {
	Platform Platform `json:"platform"`
	VM       VMID     `json:"vm"`
	Name     string   `json:"name"`  // owner name
	Token    string   `json:"token"` // opaque
}

// Baseline is a change-tracking anchor of one disk. It can be serialised.
type Baseline struct {
	Platform Platform `json:"platform"`
	VM       VMID     `json:"vm"`
	Disk     DiskID   `json:"disk"`
	Name     string   `json:"name"`  // owner name of the snapshot it came from
	Token    string   `json:"token"` // opaque
}

// Extent is a byte range of a disk. Zero: it is known to read as zeros.
type Extent struct {
	Offset int64
	Length int64
	Zero   bool
}

// End returns the offset behind the extent.
func (e Extent) End() int64 { return e.Offset + e.Length }
