package fakes

import (
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
)

// Options say what kind of platform a World is. The zero value is one that can
// do everything and keeps baselines, as libvirt does.
type Options struct {
	Clock clock.Clock // nil: clock.Real()
	Seed  uint64      // of everything random: UUIDs, MACs, the lies of a tracker

	// Granularity of change tracking in bytes; zero means 64 KiB.
	Granularity int64

	NoTracking     bool // the platform never tells what changed
	NoBaselines    bool // baselines are strings, nothing is kept, as on vSphere
	NoQuiesce      bool // the platform cannot freeze guests
	Sequential     bool // snapshots are Streamers, OpenDisk is unsupported
	RandomWrite    bool // DiskWriters accept any order; otherwise they refuse it
	NonAtomicDisks bool // the disks of a snapshot are frozen one after another
	OneSnapshot    bool // a second snapshot of a VM is ErrBusy, as on libvirt

	// SnapshotTime is how long a snapshot takes on the clock, the guest being
	// frozen if that was asked.
	SnapshotTime time.Duration

	Product  string // empty: "fakes"
	Endpoint string // empty: "memory"

	// OnCall, if set, runs at the start of every call and of the steps inside
	// CreateSnapshot ("freeze", "freeze-disk", "thaw"), in the goroutine of the
	// caller and without a lock held, so it may do anything, guest writes too.
	// Calls made from inside it are reported as well.
	OnCall func(Call)
}

// DefaultStorage and DefaultNetwork exist in every World.
const (
	DefaultStorage = "default"
	DefaultNetwork = "default"
)

// VMConfig describes a VM that an administrator makes. It is foreign to
// Holdfast, as all VMs are that Holdfast backs up.
type VMConfig struct {
	Name     string
	UUID     string // empty: a random one
	Host     string
	Power    hypervisor.PowerState // empty: on
	Hardware hypervisor.Hardware   // empty fields get usual values
	Disks    []DiskConfig
	NICs     []hypervisor.NIC // empty ID, MAC, Network and Model get values
	Tags     map[string]string
	Guest    Guest
	Native   hypervisor.NativeConfig // empty: a short JSON text
	NVRAM    []byte                  // not nil: an attachment "nvram"
	Owner    string                  // of a VM that Holdfast made earlier
}

// DiskConfig describes a disk. Backing and Attrs decide whether a snapshot
// includes it and whether changes are tracked.
type DiskConfig struct {
	ID      hypervisor.DiskID // empty: disk0, disk1, ...
	Size    int64             // bytes
	Backing hypervisor.Backing
	Attrs   hypervisor.Attrs
	Bus     string // empty: "virtio"
	Format  string // empty: "fake"
	Storage string // empty: DefaultStorage

	Untracked bool              // like a raw file: every backup reads all of it
	Refuse    hypervisor.Reason // not empty: no snapshot, for this reason
}

// classify returns whether a snapshot includes the disk, how it is tracked, and
// why if one of the two is not so.
func (c *DiskConfig) classify(opts *Options) (snapshot bool, t hypervisor.Tracking, why hypervisor.Reason) {
	no := hypervisor.TrackingNone
	switch {
	case c.Refuse != "":
		return false, no, c.Refuse
	case c.Attrs.Removable:
		return false, no, hypervisor.ReasonCDROM
	case c.Attrs.ReadOnly:
		return false, no, hypervisor.ReasonReadOnly
	case c.Backing == hypervisor.RDMPhysical:
		return false, no, hypervisor.ReasonRDMPhysical
	case c.Backing == hypervisor.Passthrough:
		return false, no, hypervisor.ReasonPassthrough
	case c.Attrs.Shared:
		return false, no, hypervisor.ReasonShared
	case c.Attrs.Independent:
		return false, no, hypervisor.ReasonIndependent
	case c.Backing == hypervisor.Network, c.Untracked, opts.NoTracking:
		return true, no, hypervisor.ReasonNeverTracked
	}
	return true, hypervisor.TrackingBlocks, ""
}

// Guest describes the system inside a VM. The zero value has no agent.
type Guest struct {
	OS     string
	Family string // "linux", "windows"
	Agent  bool   // an agent answers
	Why    string // why there is no agent; empty: a standard text

	// Level is the best that the agent reaches; zero means file system.
	Level hypervisor.Consistency

	Freeze     FreezeMode
	FreezeTime time.Duration // how long a freeze takes on the clock
	// ThawFails is how many thaws fail before one works; negative: all.
	ThawFails int

	// OnFreeze and OnThaw, if set, run when the guest has frozen and thawed, in
	// the goroutine that made it so, without a lock held. A guest that flushes
	// its caches does so in OnFreeze.
	OnFreeze, OnThaw func()
}

// FreezeMode is what a guest does when it is told to freeze.
type FreezeMode int

// Freeze modes. A guest that hangs is frozen and does not answer: it has to be
// thawed. A guest that fails answers with an error and runs on.
const (
	FreezeWorks FreezeMode = iota
	FreezeFails
	FreezeHangs
)
