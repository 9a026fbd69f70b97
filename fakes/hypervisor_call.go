package fakes

import "github.com/holdfast-backup/holdfast/hypervisor"

// Op names a method of the contract, or a step inside one.
type Op string

// The operations that OnCall and WithFaults report.
const (
	OpVMs            Op = "VMs"
	OpVM             Op = "VM"
	OpCreateSnapshot Op = "CreateSnapshot"
	OpOpenSnapshot   Op = "OpenSnapshot"
	OpSnapshots      Op = "Snapshots"
	OpBaselines      Op = "Baselines"
	OpForgetBaseline Op = "ForgetBaseline"
	OpClose          Op = "Close"

	// Each element of an iteration, and its end, is a step of its own.
	OpNextVM       Op = "VMs.next"
	OpNextSnapshot Op = "Snapshots.next"
	OpNextBaseline Op = "Baselines.next"
	OpNextExtent   Op = "Snapshot.Extents.next"
	OpNextStream   Op = "Snapshot.Stream.next"

	OpExtents  Op = "Snapshot.Extents"
	OpOpenDisk Op = "Snapshot.OpenDisk"
	OpBaseline Op = "Snapshot.Baseline"
	OpStream   Op = "Snapshot.Stream"
	OpRelease  Op = "Snapshot.Release"

	OpReadAt      Op = "DiskReader.ReadAt"
	OpReadHole    Op = "DiskReader.ReadHole"
	OpCloseReader Op = "DiskReader.Close"

	OpCreateVM       Op = "CreateVM"
	OpOpenDiskWriter Op = "OpenDiskWriter"
	OpOpenTargetDisk Op = "OpenDisk"
	OpFinishVM       Op = "FinishVM"
	OpSetPower       Op = "SetPower"
	OpDeleteVM       Op = "DeleteVM"

	OpWriteAt     Op = "DiskWriter.WriteAt"
	OpWriteZeroes Op = "DiskWriter.WriteZeroes"
	OpCommit      Op = "DiskWriter.Commit"
	OpCloseWriter Op = "DiskWriter.Close"

	OpThaw Op = "Thaw"

	OpOpenAttachment Op = "Attachment.Open"
	OpReadAttachment Op = "Attachment.Read"
	OpCloseAttached  Op = "Attachment.Close"

	// Steps inside CreateSnapshot of the in-memory hypervisor.
	StepFreeze     Op = "freeze"
	StepFreezeDisk Op = "freeze-disk"
	StepThaw       Op = "thaw"
)

// Call is one call of the contract. Fields that do not apply are zero.
type Call struct {
	N      int // number of the call, from 1, without gaps
	Op     Op
	VM     hypervisor.VMID
	Disk   hypervisor.DiskID
	Name   string // owner name of the object, or name of the attachment
	Offset int64  // of reads, writes and streamed or listed extents, in bytes
	Length int64
}

// report numbers a call and runs the hook. No lock may be held.
func (w *World) report(c Call) {
	w.mu.Lock()
	w.calls++
	c.N = w.calls
	w.mu.Unlock()
	if w.opts.OnCall != nil {
		w.opts.OnCall(c)
	}
}
