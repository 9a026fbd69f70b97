package backup

import (
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

// Status is how a run ended.
type Status string

// Statuses. Degraded: a restore point was committed, and something that was
// promised or named is missing: a disk, a consistency level, or an obligation
// that only Recover can close.
const (
	Success  Status = "success"
	Degraded Status = "degraded"
	Failed   Status = "failed"
)

// Result tells what a run did. It is returned beside an error too.
type Result struct {
	Run         string
	VM          VMRef
	Chain       string
	Parent      repository.PointID // empty: nothing was inherited
	Consistency hypervisor.Achieved
	Disks       []DiskResult
	Degraded    []string // why the run is degraded
	// AuditSeed decided which leaves were audited: Options.AuditSeed draws the
	// same ones again.
	AuditSeed uint64
	Started   time.Time
	Finished  time.Time

	proof *repository.Proof
	err   error
}

// VMRef names a VM.
type VMRef struct {
	ID   hypervisor.VMID
	UUID string
	Name string
}

// DiskResult tells what was done about one disk.
type DiskResult struct {
	ID        hypervisor.DiskID
	Mode      Mode
	Reason    Reason
	Detail    string
	Size      int64 // bytes
	ReadBytes int64 // read from the hypervisor to be stored
	// AuditedBytes were read from the hypervisor to audit its change tracking;
	// they are not in ReadBytes. What differs is read twice and counts once.
	// Audit is what came out of it.
	AuditedBytes int64
	Audit        AuditResult
	Stats        repository.DiskStats
	Root         repository.Digest // of the stored disk
}

// Status is Success only when the repository proved the commit and nothing is
// missing.
func (r *Result) Status() Status {
	switch {
	case r.proof == nil || r.err != nil:
		return Failed
	case len(r.Degraded) > 0:
		return Degraded
	}
	return Success
}

// Point is the ID of the committed point; empty if there is none.
func (r *Result) Point() repository.PointID {
	if r.proof == nil {
		return ""
	}
	return r.proof.Point().ID
}

// Proof is the repository's proof of the commit; nil if there is none.
func (r *Result) Proof() *repository.Proof { return r.proof }

// Err is why the run failed.
func (r *Result) Err() error { return r.err }

func (r *Result) degrade(why string) { r.Degraded = append(r.Degraded, why) }

// Audited adds up what was read to audit change tracking, in bytes.
func (r *Result) Audited() (n int64) {
	for _, d := range r.Disks {
		n += d.AuditedBytes
	}
	return n
}

// Totals adds up the disks.
func (r *Result) Totals() (size, read, stored int64) {
	for _, d := range r.Disks {
		if d.Mode.Stored() {
			size += d.Size
		}
		read += d.ReadBytes
		stored += d.Stats.Stored
	}
	return size, read, stored
}
