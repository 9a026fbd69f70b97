package main

import (
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/restore"
)

// event is one line of --events. Which fields it has depends on Event.
type event struct {
	Event  string    `json:"event"`
	Time   time.Time `json:"time"`
	VM     string    `json:"vm,omitempty"`
	Run    string    `json:"run,omitempty"`
	Stage  string    `json:"stage,omitempty"`
	State  string    `json:"state,omitempty"` // enter or exit
	Error  string    `json:"error,omitempty"` // of a stage that failed
	Disk   string    `json:"disk,omitempty"`
	Mode   string    `json:"mode,omitempty"`
	Reason string    `json:"reason,omitempty"`
	Detail string    `json:"detail,omitempty"`
	Size   *int64    `json:"size,omitempty"` // bytes, as the next two
	Done   *int64    `json:"done,omitempty"`
	Read   *int64    `json:"read,omitempty"`
	// Audited is what was read to audit change tracking, in bytes; Leaves were
	// compared, of which Wrong differ.
	Audited *int64 `json:"audited,omitempty"`
	Leaves  *int64 `json:"leaves,omitempty"`
	Wrong   *int64 `json:"wrong,omitempty"`
	Code    string `json:"code,omitempty"` // of an error
	Text    string `json:"text,omitempty"`
	Hint    string `json:"hint,omitempty"`
}

// Values of event.Event and event.State.
const (
	eventStage    = "stage"
	eventDisk     = "disk"
	eventAudit    = "audit"
	eventProgress = "progress"
	eventNotice   = "notice"
	eventError    = "error"

	stateEnter = "enter"
	stateExit  = "exit"
)

// watcher shows what happens. Its methods may be called concurrently.
type watcher interface {
	watch(event)
	// end is called once, when the work that was watched is over.
	end()
}

func (p *program) now() time.Time { return p.clock.Now().UTC() }

// watcher picks how to show what happens.
func (p *program) watcher() watcher {
	switch {
	case p.events:
		return &eventLines{p: p, limit: limiter{every: eventEvery}}
	case p.terminal(p.stderr):
		return newBars(p, true)
	}
	return &plainLines{p: p, brief: p.json, limit: limiter{every: plainEvery, patient: true}}
}

// passing is a watcher for steps that tell the outcome themselves: nothing of it
// stays on the screen.
func (p *program) passing() watcher {
	switch {
	case p.events:
		return p.watcher()
	case p.terminal(p.stderr):
		return newBars(p, false)
	}
	return &plainLines{p: p, brief: true}
}

// backupEvents hands the events of a backup to w.
func backupEvents(p *program, w watcher) *backup.Events {
	return &backup.Events{
		Stage: func(e backup.StageEvent) {
			w.watch(stageEvent(e.Time, e.VM, e.Run, string(e.Stage), e.Done, e.Err))
		},
		Disk: func(e backup.DiskEvent) {
			w.watch(event{Event: eventDisk, Time: p.now(), VM: e.VM, Disk: string(e.Disk), Mode: string(e.Mode), Reason: string(e.Reason), Detail: e.Detail, Size: &e.Size})
		},
		Audit: func(e backup.AuditEvent) {
			w.watch(event{Event: eventAudit, Time: p.now(), VM: e.VM, Disk: string(e.Disk), Audited: &e.Bytes, Leaves: &e.Leaves, Wrong: &e.Wrong})
		},
		Progress: func(e backup.ProgressEvent) {
			w.watch(event{Event: eventProgress, Time: p.now(), VM: e.VM, Disk: string(e.Disk), Size: &e.Size, Done: &e.Done, Read: &e.Read, Audited: &e.Audited})
		},
		Notice: func(e backup.NoticeEvent) {
			w.watch(event{Event: eventNotice, Time: p.now(), VM: e.VM, Text: e.Text})
		},
	}
}

// restoreEvents hands the events of a restore of vm to w.
func restoreEvents(p *program, w watcher, vm string) *restore.Events {
	return &restore.Events{
		Stage: func(stage string, done bool, err error) {
			w.watch(stageEvent(p.now(), vm, "", stage, done, err))
		},
		Progress: func(disk hypervisor.DiskID, done, size int64) {
			w.watch(event{Event: eventProgress, Time: p.now(), VM: vm, Disk: string(disk), Size: &size, Done: &done})
		},
		Notice: func(text string) {
			w.watch(event{Event: eventNotice, Time: p.now(), VM: vm, Text: text})
		},
	}
}

func stageEvent(at time.Time, vm, run, stage string, done bool, err error) event {
	e := event{Event: eventStage, Time: at.UTC(), VM: vm, Run: run, Stage: stage, State: stateEnter}
	if done {
		e.State = stateExit
	}
	if err != nil {
		e.Error = message(err)
	}
	return e
}

// eventEvery is how often progress of a disk is reported.
const eventEvery = 200 * time.Millisecond

// eventLines writes each event as a line of JSON on stderr, at once: programs
// wait for them.
type eventLines struct {
	p     *program
	limit limiter
}

func (l *eventLines) watch(e event) {
	if e.Event == eventProgress && !l.limit.pass(e) {
		return
	}
	l.p.writeJSON(l.p.stderr, e)
}

func (l *eventLines) end() {}

// limiter lets progress of each disk pass now and then, and always its end.
type limiter struct {
	every   time.Duration
	patient bool // the first one waits too, and the end passes only after others
	mu      sync.Mutex
	disks   map[string]*limited
}

type limited struct {
	last     time.Time
	passed   bool
	complete bool
}

func (l *limiter) pass(e event) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.disks == nil {
		l.disks = map[string]*limited{}
	}
	key := e.VM + "/" + e.Disk
	d := l.disks[key]
	if d == nil {
		d = &limited{last: e.Time}
		l.disks[key] = d
		if l.patient {
			return false
		}
		d.last = e.Time.Add(-l.every)
	}
	complete := e.Done != nil && e.Size != nil && *e.Done >= *e.Size
	switch {
	case d.complete:
		return false
	case complete && (d.passed || !l.patient):
	case e.Time.Sub(d.last) < l.every:
		return false
	}
	d.last, d.passed, d.complete = e.Time, true, complete
	return true
}
