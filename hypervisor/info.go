package hypervisor

// Platform names a family of hypervisors.
type Platform string

// The platforms that Holdfast knows.
const (
	VMware Platform = "vmware"
	HyperV Platform = "hyperv"
	Xen    Platform = "xen"
	KVM    Platform = "kvm"
	Fake   Platform = "fake" // in-memory, package fakes
)

// Info describes an endpoint. It holds no secret.
type Info struct {
	Platform     Platform
	Product      string // as the endpoint calls itself, "QEMU", "VMware ESXi"
	Version      string
	Endpoint     string // host or URL without user and password
	Transport    string // which connection leaf or data path is in use
	Capabilities Capabilities
}

// Capabilities are product-wide facts that a caller can plan with. They are
// data: what a VM or disk can do is told by VM and Disk.
type Capabilities struct {
	ChangeTracking bool        // incremental extents are possible for some disks
	AtomicDisks    bool        // all disks of a snapshot share one instant
	MaxConsistency Consistency // the highest level that the platform can reach
	RandomRead     bool        // Snapshot.OpenDisk works; else Streamer
	RandomWrite    bool        // DiskWriter accepts any order
	Memory         bool        // memory state can be part of a snapshot
	Baselines      bool        // the platform keeps baselines between runs
}
