package hypervisor

import (
	"context"
	"io"
	"time"
)

// VMID identifies a VM at one endpoint, opaque to everybody but the driver. It
// survives renaming.
type VMID string

// DiskID is the stable slot of a disk in its VM: [A-Za-z0-9._-]{1,64}.
type DiskID string

// Query narrows a listing. The zero value matches every VM.
type Query struct {
	Name string // exact name
	UUID string // exact UUID, any case
	// Owner matches VMs that Holdfast created and whose owner name has this
	// prefix, see Name.
	Owner string
}

// VM is the definition of a virtual machine at one moment. It is data: the
// caller may change it.
type VM struct {
	ID          VMID
	UUID        string // lower case, with dashes; identity across renames
	Name        string
	Host        string // where it runs, if the platform says so
	Power       PowerState
	Hardware    Hardware
	Disks       []Disk
	NICs        []NIC
	Tags        map[string]string
	Guest       GuestInfo
	Native      NativeConfig
	Attachments []Attachment

	// Owner is the owner name of the Holdfast run that created this VM, empty
	// for all others. Incomplete: a restore has not finished it.
	Owner      string
	Incomplete bool
}

// Disk returns the disk with this ID, or nil.
func (v *VM) Disk(id DiskID) *Disk {
	for i := range v.Disks {
		if v.Disks[i].ID == id {
			return &v.Disks[i]
		}
	}
	return nil
}

// PowerState is what a VM is doing.
type PowerState string

// Power states. Suspended means saved to disk; Paused, held in memory.
const (
	PoweredOn    PowerState = "on"
	PoweredOff   PowerState = "off"
	Paused       PowerState = "paused"
	Suspended    PowerState = "suspended"
	PowerUnknown PowerState = "unknown"
)

// Power is a wish for Target.SetPower.
type Power string

// Power wishes. PowerOff is abrupt; Shutdown asks the guest.
const (
	PowerOn  Power = "on"
	PowerOff Power = "off"
	Shutdown Power = "shutdown"
)

// Hardware is what a VM has apart from disks and networks.
type Hardware struct {
	CPUs           int
	CoresPerSocket int
	MemoryBytes    int64
	Firmware       Firmware
	SecureBoot     bool
	TPM            bool
	Arch           string   // "x86_64"
	Machine        string   // platform's machine type, "pc-q35-7.2"
	Boot           []string // boot order: disk IDs, NIC IDs, "cdrom"
}

// Firmware is what starts a VM.
type Firmware string

// Firmware kinds.
const (
	BIOS Firmware = "bios"
	UEFI Firmware = "uefi"
)

// NIC is a network card.
type NIC struct {
	ID        string
	MAC       string // lower case, colons
	Network   string
	Model     string
	Connected bool
}

// GuestInfo is what is known of the system inside.
type GuestInfo struct {
	OS       string // as the platform names it, may be empty
	Family   string // "linux", "windows" or empty
	Agent    bool   // an agent that can quiesce is configured and answers
	AgentWhy string // why not
}

// NativeConfig is the platform's own description of a VM, verbatim.
type NativeConfig struct {
	Format string // "libvirt-domain-xml", "vmx", "xapi-record", ...
	Data   []byte
}

// Attachment is a part of a VM that is neither configuration nor disk: NVRAM,
// TPM state, a kernel.
type Attachment struct {
	Name string // [A-Za-z0-9._-]{1,64}, unique in the VM
	Kind string // "nvram", "tpm", "kernel", "initrd", ...
	Size int64  // bytes; -1 if unknown until read
	// Open reads it from the start. The caller closes the result.
	Open func(ctx context.Context) (io.ReadCloser, error)
}

// Disk is one slot of a VM and what is in it.
type Disk struct {
	ID         DiskID
	Content    string // identity of what is in the slot; differs after a replacement
	Size       int64  // bytes
	Backing    Backing
	Attrs      Attrs
	Bus        string // "virtio", "scsi", "sata", "nvme", "ide"
	Controller string
	Slot       int
	Storage    string // datastore, pool or path
	Format     string // "qcow2", "raw", "vmdk", ...

	// Snapshottable: a snapshot includes this disk. Tracking: how changes are
	// known. Reason says why one of the two is not so; callers must show it.
	Snapshottable bool
	Tracking      Tracking
	Reason        Reason
	Detail        string // for a person, may be empty
}

// Backing says how storage enters the VM.
type Backing string

// Backings.
const (
	File        Backing = "file"
	BlockVolume Backing = "block"
	RDMVirtual  Backing = "rdm-virtual"
	RDMPhysical Backing = "rdm-physical"
	Passthrough Backing = "passthrough"
	Network     Backing = "network"
)

// Attrs are properties of a disk that decide how it can be protected.
type Attrs struct {
	Shared      bool // writable by several VMs
	Independent bool // left out of snapshots by configuration
	ReadOnly    bool
	Removable   bool // CD-ROM, floppy
	Encrypted   bool
	Ephemeral   bool // content does not outlive a power cycle
}

// Tracking says how changes of a disk become known.
type Tracking string

// Tracking kinds.
const (
	TrackingNone   Tracking = "none"   // every backup reads all of it
	TrackingBlocks Tracking = "blocks" // the platform tells changed blocks
)

// Reason is a word from a closed list that says why a disk is treated as it is.
// The words below can come from drivers; package backup has the rest.
type Reason string

// Reasons that a driver can give.
const (
	ReasonCDROM           Reason = "rule-cdrom"
	ReasonReadOnly        Reason = "rule-readonly"
	ReasonShared          Reason = "shared"
	ReasonIndependent     Reason = "independent"
	ReasonRDMPhysical     Reason = "rdm-physical"
	ReasonPassthrough     Reason = "passthrough"
	ReasonRefused         Reason = "snapshot-refused"
	ReasonNeverTracked    Reason = "never-tracked"
	ReasonTrackingLost    Reason = "tracking-lost"
	ReasonInconsistent    Reason = "tracking-inconsistent"
	ReasonBaselineMissing Reason = "baseline-missing"
	ReasonDiskResized     Reason = "disk-resized"
	ReasonDiskReplaced    Reason = "disk-replaced"
	ReasonChainUnhealthy  Reason = "chain-unhealthy"
)

// Achieved is the consistency that a snapshot has.
type Achieved struct {
	Level       Consistency
	Memory      bool          // memory state is part of it
	AcrossDisks bool          // all disks share one instant
	Means       string        // "qemu-guest-agent fsfreeze", "offline", "none"
	Frozen      time.Duration // how long the guest was frozen
	Reason      string        // why the asked level was not reached, empty if it was
	// ThawPending: the guest was told to freeze, and was not seen thawed. An
	// obligation to thaw it stays open.
	ThawPending bool
}
