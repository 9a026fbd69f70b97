package restore

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/internal/journal"
	"github.com/holdfast-backup/holdfast/internal/manifest"
	"github.com/holdfast-backup/holdfast/repository"
)

// Options steer a restore. The zero value restores everything in the point.
type Options struct {
	// Disks names the disks to restore; none: all that the point holds.
	Disks []hypervisor.DiskID

	// InFlight is how many blocks are fetched at once; memory is bounded by it.
	// Zero means four per core, at least eight.
	InFlight int

	// StateDir holds the journal, so that Recover of package backup removes what
	// a killed restore left. Empty: no journal.
	StateDir  string
	JournalFS journal.FS // where it lies; nil: in the file system. Tests of this module set it.
	// Endpoint and Location go into the journal and must hold no secret.
	Endpoint, Location string

	Events *Events // may be nil

	// CleanupTimeout bounds what is done after a failure; zero: two minutes.
	CleanupTimeout time.Duration

	Clock clock.Clock // nil: the real one
	Rand  io.Reader   // of run IDs; nil: crypto/rand
}

// Events are called while a restore goes on, each if it is set. They may be
// called concurrently and must return soon.
type Events struct {
	Stage    func(stage string, done bool, err error)
	Progress func(disk hypervisor.DiskID, done, size int64) // bytes
	Notice   func(text string)
}

func (e *Events) stage(s string, done bool, err error) {
	if e.Stage != nil {
		e.Stage(s, done, err)
	}
}

func (e *Events) progress(d hypervisor.DiskID, done, size int64) {
	if e.Progress != nil {
		e.Progress(d, done, size)
	}
}

func (e *Events) notice(s string) {
	if e.Notice != nil {
		e.Notice(s)
	}
}

// Result tells what a restore did.
type Result struct {
	Run      string
	Point    repository.PointID
	VM       *hypervisor.VM // the new VM; nil for files
	Disks    []DiskResult
	Files    []string // paths written beside the disks
	Missing  []Missing
	Started  time.Time
	Finished time.Time
}

// DiskResult tells what was restored of one disk.
type DiskResult struct {
	ID       hypervisor.DiskID
	Path     string // of the file; empty for a VM
	Size     int64  // bytes
	Data     int64  // bytes that are not zeros
	Verified bool   // the digest tree of what was written has the root of the record
}

// Missing is a disk of the VM that the point does not hold.
type Missing struct {
	ID     hypervisor.DiskID
	Reason hypervisor.Reason
}

func (o *Options) withDefaults() Options {
	var out Options
	if o != nil {
		out = *o
	}
	if out.InFlight <= 0 {
		out.InFlight = max(8, 4*runtime.GOMAXPROCS(0))
	}
	if out.Events == nil {
		out.Events = &Events{}
	}
	if out.CleanupTimeout <= 0 {
		out.CleanupTimeout = 2 * time.Minute
	}
	if out.Clock == nil {
		out.Clock = clock.Real()
	}
	if out.Rand == nil {
		out.Rand = rand.Reader
	}
	return out
}

func (o *Options) newRun() (string, error) {
	var r [5]byte
	if _, err := io.ReadFull(o.Rand, r[:]); err != nil {
		return "", fmt.Errorf("run ID: %w", err)
	}
	return strings.ToLower(o.Clock.Now().UTC().Format("20060102t150405")) + hex.EncodeToString(r[:]), nil
}

// job is what both kinds of restore share.
type job struct {
	o      *Options
	reader repository.Reader
	man    *manifest.Manifest
	disks  []*manifest.Disk
	res    *Result
	j      *journal.Journal // may be nil
}

// begin opens the point and the journal.
func begin(reader repository.Reader, o *Options, command string) (*job, error) {
	pt := reader.Point()
	man, err := manifest.Parse(pt)
	if err != nil {
		return nil, err
	}
	j := &job{o: o, reader: reader, man: man, res: &Result{Point: pt.ID, Started: o.Clock.Now()}}
	if err := j.choose(); err != nil {
		return nil, err
	}
	if j.res.Run, err = o.newRun(); err != nil {
		return nil, err
	}
	if o.StateDir == "" {
		return j, nil
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	j.j, err = journal.Create(filepath.Join(o.StateDir, "journal"), j.res.Run, journal.Header{
		Command: command, Host: host, PID: os.Getpid(), Endpoint: o.Endpoint, VMs: []string{man.VM.Name}, Start: o.Clock.Now(),
	}, &journal.Options{Now: o.Clock.Now, FS: o.JournalFS})
	if err != nil {
		return nil, fmt.Errorf("state directory %s: %w", o.StateDir, err)
	}
	return j, nil
}

// choose picks the disks and lists what the point does not hold.
func (j *job) choose() error {
	want := map[hypervisor.DiskID]bool{}
	for _, id := range j.o.Disks {
		d := j.man.Disk(id)
		if d == nil || !d.Mode.Stored() {
			return &hypervisor.Error{Op: "restore", Disk: id, Hint: "see what a point holds with: holdfast points", Err: fmt.Errorf("point %s holds no such disk: %w", j.res.Point, hypervisor.ErrNotFound)}
		}
		want[id] = true
	}
	for i := range j.man.Disks {
		d := &j.man.Disks[i]
		switch {
		case !d.Mode.Stored():
			j.res.Missing = append(j.res.Missing, Missing{ID: d.ID, Reason: d.Reason})
		case len(want) == 0 || want[d.ID]:
			j.disks = append(j.disks, d)
		}
	}
	return nil
}

// intend records an obligation before its effect; the result discharges it.
func (j *job) intend(o journal.Obligation) (discharge func() error, err error) {
	if j.j == nil {
		return func() error { return nil }, nil
	}
	o.Endpoint = j.o.Endpoint
	id, err := j.j.Intend(o)
	if err != nil {
		return nil, err
	}
	return func() error { return j.j.Discharge(id) }, nil
}

func (j *job) stage(name string, do func() error) error {
	j.o.Events.stage(name, false, nil)
	if j.j != nil {
		if err := j.j.Stage(name, j.man.VM.Name, true); err != nil {
			return err
		}
	}
	err := do()
	if err == nil && j.j != nil {
		err = j.j.Stage(name, j.man.VM.Name, false)
	}
	j.o.Events.stage(name, true, err)
	return err
}
