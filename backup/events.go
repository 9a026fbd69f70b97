package backup

import (
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// Stage is a state of the run's state machine.
type Stage string

// Stages, in their order.
const (
	StagePlan      Stage = "plan"
	StagePreflight Stage = "preflight"
	StageSnapshot  Stage = "snapshot"
	StageTransfer  Stage = "transfer"
	StageCommit    Stage = "commit"
	StageRelease   Stage = "release"
)

// Stages lists the stages of a backup in their order.
func Stages() []Stage {
	return []Stage{StagePlan, StagePreflight, StageSnapshot, StageTransfer, StageCommit, StageRelease}
}

// Events are called while a run goes on, each if it is set. They may be called
// concurrently, must return soon, and must not call back into the run.
type Events struct {
	Stage    func(StageEvent)
	Disk     func(DiskEvent)
	Audit    func(AuditEvent)
	Progress func(ProgressEvent)
	Notice   func(NoticeEvent)
}

// StageEvent says that a stage was entered or left.
type StageEvent struct {
	Run   string
	VM    string
	Stage Stage
	Done  bool // false: entered
	Err   error
	Time  time.Time
}

// DiskEvent says how a disk will be treated.
type DiskEvent struct {
	VM     string
	Disk   hypervisor.DiskID
	Mode   Mode
	Reason Reason
	Detail string
	Size   int64 // bytes
}

// ProgressEvent tells how far a disk is.
type ProgressEvent struct {
	VM   string
	Disk hypervisor.DiskID
	Done int64 // everything below this offset is stored, bytes
	Size int64
	Read int64 // bytes read from the hypervisor so far, without Audited
	// Audited is how many bytes were read to audit the change tracking.
	Audited int64
}

// AuditEvent says what the audit of a disk's change tracking found. A wrong leaf
// makes the disk a full: a DiskEvent says so next.
type AuditEvent struct {
	VM     string
	Disk   hypervisor.DiskID
	Leaves int64 // compared
	Bytes  int64 // read for it
	Wrong  int64 // of Leaves: differ
}

// NoticeEvent is something that a person should know and that fails nothing.
type NoticeEvent struct {
	VM   string
	Text string
}

func (e *Events) stage(ev StageEvent) {
	if e.Stage != nil {
		e.Stage(ev)
	}
}

func (e *Events) disk(ev DiskEvent) {
	if e.Disk != nil {
		e.Disk(ev)
	}
}

func (e *Events) audit(ev AuditEvent) {
	if e.Audit != nil {
		e.Audit(ev)
	}
}

func (e *Events) progress(ev ProgressEvent) {
	if e.Progress != nil {
		e.Progress(ev)
	}
}

func (e *Events) notice(vm, text string) {
	if e.Notice != nil {
		e.Notice(NoticeEvent{VM: vm, Text: text})
	}
}
