// Package manifest is the document that a restore point carries about its VM:
// written by backup, read by restore, opaque to repositories.
package manifest

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

// Version is the version that this package writes.
const Version = 1

// Names of files in a point.
const (
	NativeFile       = "native-config"
	AttachmentPrefix = "attachment-"
)

// Labels of a point, for listings that do not read the document.
const (
	LabelPlatform    = "platform"
	LabelConsistency = "consistency"
	LabelUUID        = "uuid"
	LabelStatus      = "status"
)

// Manifest describes a VM as of its snapshot.
type Manifest struct {
	Version     int              `json:"version"`
	Source      Source           `json:"source"`
	VM          VM               `json:"vm"`
	Consistency Consistency      `json:"consistency"`
	Disks       []Disk           `json:"disks"`
	NICs        []hypervisor.NIC `json:"nics,omitempty"`
	Native      string           `json:"native_format,omitempty"` // format of NativeFile, empty: none
	Attachments []Attachment     `json:"attachments,omitempty"`
	Degraded    []string         `json:"degraded,omitempty"`
}

// Source is where the VM was.
type Source struct {
	Platform hypervisor.Platform `json:"platform"`
	Endpoint string              `json:"endpoint"`
	Product  string              `json:"product,omitempty"`
	Version  string              `json:"version,omitempty"`
}

// VM is the VM apart from its disks and networks.
type VM struct {
	ID       hypervisor.VMID       `json:"id"`
	UUID     string                `json:"uuid"`
	Name     string                `json:"name"`
	Host     string                `json:"host,omitempty"`
	Power    hypervisor.PowerState `json:"power"`
	Hardware hypervisor.Hardware   `json:"hardware"`
	Tags     map[string]string     `json:"tags,omitempty"`
	Guest    hypervisor.GuestInfo  `json:"guest"`
}

// Consistency is what was asked for and what was reached.
type Consistency struct {
	Asked   string                 `json:"asked"`
	Minimum hypervisor.Consistency `json:"minimum"`
	Level   hypervisor.Consistency `json:"level"`
	Means   string                 `json:"means,omitempty"`
	Across  bool                   `json:"across_disks"`
	Memory  bool                   `json:"memory,omitempty"`
	Frozen  time.Duration          `json:"frozen_ns,omitempty"`
	Reason  string                 `json:"reason,omitempty"`
}

// Mode says how a disk was treated.
type Mode string

// Modes.
const (
	Full        Mode = "full"
	Incremental Mode = "incremental"
	Excluded    Mode = "excluded"    // by a named rule
	Unprotected Mode = "unprotected" // it could not be protected; see the reason
)

// Stored reports whether a disk of this mode is in the point.
func (m Mode) Stored() bool { return m == Full || m == Incremental }

// Disk is a disk of the VM, whether it is in the point or not.
type Disk struct {
	ID        hypervisor.DiskID    `json:"id"`
	Mode      Mode                 `json:"mode"`
	Reason    hypervisor.Reason    `json:"reason"`
	Detail    string               `json:"detail,omitempty"`
	Size      int64                `json:"size"`
	Content   string               `json:"content,omitempty"`
	Backing   hypervisor.Backing   `json:"backing,omitempty"`
	Attrs     hypervisor.Attrs     `json:"attrs"`
	Bus       string               `json:"bus,omitempty"`
	Slot      int                  `json:"slot"`
	Storage   string               `json:"storage,omitempty"`
	Format    string               `json:"format,omitempty"`
	Baseline  *hypervisor.Baseline `json:"baseline,omitempty"`
	ReadBytes int64                `json:"read_bytes"`
	Audit     *Audit               `json:"audit,omitempty"` // nil: nothing was audited
}

// Audit is what re-reading a sample of a disk's unchanged leaves found.
type Audit struct {
	Bytes    int64                `json:"bytes"` // read for it; not in Disk.ReadBytes
	Seed     uint64               `json:"seed,string"`
	Leaves   int64                `json:"leaves"`            // compared with the parent's
	Wrong    int64                `json:"wrong"`             // of Leaves: differ, so the change tracking lied
	Offsets  []int64              `json:"offsets,omitempty"` // of the first wrong leaves, bytes
	Suspects []repository.PointID `json:"suspects,omitempty"`
	Error    string               `json:"error,omitempty"` // why it is not complete
}

// Lied reports whether the change tracking was caught. a may be nil.
func (a *Audit) Lied() bool { return a != nil && a.Wrong > 0 }

// Attachment is a stored part of the VM: NVRAM, a kernel.
type Attachment struct {
	Name string `json:"name"`
	Kind string `json:"kind"`
	Size int64  `json:"size"`
	File string `json:"file"` // name in the point
}

// Disk returns the disk with this ID, or nil.
func (m *Manifest) Disk(id hypervisor.DiskID) *Disk {
	for i := range m.Disks {
		if m.Disks[i].ID == id {
			return &m.Disks[i]
		}
	}
	return nil
}

// Parse reads the document of a point and checks that it agrees with the
// point's record.
func Parse(p *repository.Point) (*Manifest, error) {
	if len(p.Meta) == 0 {
		return nil, fmt.Errorf("point %s has no document: it was not made by Holdfast's backup", p.ID)
	}
	var m Manifest
	if err := json.Unmarshal(p.Meta, &m); err != nil {
		return nil, fmt.Errorf("document of point %s: %w", p.ID, err)
	}
	if m.Version < 1 || m.Version > Version {
		return nil, fmt.Errorf("document of point %s has version %d, and this program reads up to %d: use a newer one: %w", p.ID, m.Version, Version, errors.ErrUnsupported)
	}
	for i := range m.Disks {
		d := &m.Disks[i]
		if !hypervisor.ValidDiskID(d.ID) {
			return nil, fmt.Errorf("document of point %s: %q is no disk ID", p.ID, d.ID)
		}
		if !d.Mode.Stored() {
			continue
		}
		if r := p.Disk(string(d.ID)); r == nil || r.Size != d.Size {
			return nil, fmt.Errorf("document of point %s does not agree with its record about disk %s", p.ID, d.ID)
		}
	}
	return &m, nil
}

// Chain returns the name of the chain of a VM: it follows the VM's UUID, which
// survives renaming and moving, and falls back on the endpoint's own ID.
func Chain(platform hypervisor.Platform, vm *hypervisor.VM) string {
	id := vm.UUID
	if id == "" {
		id = string(vm.ID)
	}
	out := []byte(string(platform) + "-")
	for _, c := range []byte(id) {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '.', c == '_', c == '-':
			out = append(out, c)
		case c >= 'A' && c <= 'Z':
			out = append(out, c+'a'-'A')
		default:
			out = fmt.Appendf(out, "_%02x", c)
		}
	}
	return string(out[:min(len(out), 128)])
}
