package backup

import (
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/manifest"
)

// Mode says how a disk is treated.
type Mode = manifest.Mode

// Modes of a disk.
const (
	Full        = manifest.Full
	Incremental = manifest.Incremental
	Excluded    = manifest.Excluded
	Unprotected = manifest.Unprotected
)

// Manifest is the document that every restore point carries.
type Manifest = manifest.Manifest

// Reason says why a disk has its mode: a word from a closed list, of which the
// hypervisor package has the part that drivers give.
type Reason = hypervisor.Reason

// Reasons that pipelines give.
const (
	ReasonChanged       Reason = "changed-blocks" // incremental, as it should be
	ReasonFirst         Reason = "first"
	ReasonRequested     Reason = "requested"
	ReasonDiskAdded     Reason = "disk-added"
	ReasonAuditMismatch Reason = "audit-mismatch"
	ReasonUser          Reason = "rule-user"
	ReasonReadError     Reason = "read-error"
)

// exclusion returns the mode of a disk that a snapshot does not include: left
// out by a rule that nobody has to look at, or unprotected.
func exclusion(r Reason) (Mode, Reason) {
	switch r {
	case hypervisor.ReasonCDROM, hypervisor.ReasonReadOnly, ReasonUser:
		return Excluded, r
	case "":
		return Unprotected, hypervisor.ReasonRefused
	}
	return Unprotected, r
}
