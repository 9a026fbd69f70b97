package hypervisor

// Identity says what happens to UUIDs and MAC addresses of a restored VM.
type Identity string

// Identity policies. New is the default: a copy beside the original cannot
// collide with it. Keep is refused while the original exists.
const (
	IdentityNew  Identity = "new"
	IdentityKeep Identity = "keep"
)

// VMSpec describes a VM that a Target is to create. Hardware, disks and NICs are
// typed, so that any platform can build it; Native is a hint that only the
// platform it came from uses.
type VMSpec struct {
	Name        string
	Owner       string // owner name of the run, see Name
	Identity    Identity
	UUID        string // used with IdentityKeep
	Hardware    Hardware
	Disks       []DiskSpec
	NICs        []NIC // MACs are used with IdentityKeep; Network is already mapped
	Placement   Placement
	Native      *NativeConfig
	Attachments []Attachment
}

// DiskSpec is a disk of a VM to create.
type DiskSpec struct {
	ID      DiskID
	Size    int64  // bytes
	Bus     string // as in Disk
	Slot    int
	Format  string // wish; empty: the target's default
	Storage string // empty: Placement.Storage
}

// Placement says where a VM goes. Empty fields mean the endpoint's default.
type Placement struct {
	Host    string
	Storage string // datastore, pool, directory
	Folder  string
	Pool    string // resource pool
}
