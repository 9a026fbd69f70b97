// Package journal is the intent journal of a run: the append-only file that says what a run has
// done to a hypervisor, so that after a kill at any moment the next run, or "holdfast recover",
// can undo it.
//
// # Vocabulary
//
// An obligation is something that must be undone or declared kept: a frozen guest, a snapshot, a
// half-made VM. It is intended (durable before the side effect), confirmed (the effect's handle is
// known) and discharged (undone, or kept on purpose). A run is alive while its owner holds the
// operating system's lock on the journal file; a dead run with open obligations must be adopted
// and cleaned up by somebody.
//
// # Life of a journal
//
//	j, err := journal.Create(dir, run, head, opts)
//	id, err := j.Intend(journal.Obligation{Kind: journal.Snapshot, VM: "web1", Object: name})
//	ref := createSnapshot(name)     // the side effect
//	err = j.Confirm(id, ref)
//	removeSnapshot(ref)             // the undo
//	err = j.Discharge(id)
//	err = j.Close(true)             // <dir>/<run>.journal becomes <dir>/<run>.done
//
// and after a crash: [List], then for each dead run [Adopt], undo [Journal.Open] in the order
// given, Discharge, Close.
//
// # Format
//
// The file begins with the 8 bytes "hfjrnl1\n". Records follow without padding, little-endian:
//
//	offset  size  field
//	0       4     n, length of the payload, 1 to 256 KiB
//	4       4     CRC-32C over bytes 0-3, 8-23 and the payload
//	8       8     sequence number, 1 for the first record
//	16      8     the highest sequence number that was known durable when this one was written
//	24      n     one JSON object
//
// The last field separates the two kinds of damage. A record that cannot be read is a torn tail,
// and ignored, as long as nothing proves that it had been durable: no record after it claims so.
// When one does, something durable was lost, and the journal is refused with a [DamageError].
package journal

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"strings"
	"time"
)

// Kind says what an obligation is about. The list is closed.
type Kind string

// The kinds of obligation.
const (
	Thaw         Kind = "thaw"          // a guest was frozen and must be thawed
	PowerOff     Kind = "power-off"     // a VM that we started
	ExportJob    Kind = "export-job"    // a backup job, export or lease that blocks other operations on the VM
	Process      Kind = "process"       // a helper process, mount or device attachment of ours
	Snapshot     Kind = "snapshot"      // a snapshot on the hypervisor
	Baseline     Kind = "baseline"      // a change-tracking anchor that is not declared kept yet
	IncompleteVM Kind = "incomplete-vm" // a VM that a restore has begun
	ScratchFile  Kind = "scratch-file"  // a file on the hypervisor's side
	LocalFile    Kind = "local-file"    // a file on this host
)

// unknownOrder sorts kinds of a newer version last.
const unknownOrder = 1000

// Order returns the place of k in the canonical undo order thaw, unblock, detach, remove, delete:
// the smaller is undone first. A kind that this version does not know comes last.
func (k Kind) Order() int {
	switch k {
	case Thaw:
		return 10
	case ExportJob:
		return 20
	case PowerOff:
		return 30 // before what the running VM uses is taken away
	case Process:
		return 31
	case Snapshot:
		return 40
	case Baseline:
		return 41 // a snapshot may still refer to it
	case IncompleteVM:
		return 50
	case ScratchFile:
		return 51
	case LocalFile:
		return 52
	}
	return unknownOrder
}

// Valid reports whether k is one of the kinds of this package.
func (k Kind) Valid() bool { return k.Order() != unknownOrder }

// ID names an obligation within its run. Journals give IDs; callers only hand them back.
type ID string

// Obligation is one thing to undo. It must hold all that is needed to find the object again when
// the answer of the call that made it is lost, and no secret.
type Obligation struct {
	ID       ID                `json:"id"`
	Kind     Kind              `json:"kind"`
	Endpoint string            `json:"endpoint,omitempty"` // URL of the hypervisor; a password is removed
	VM       string            `json:"vm,omitempty"`       // VM identity in the driver's terms
	Object   string            `json:"object,omitempty"`   // name of the object; holds the run ID
	Data     map[string]string `json:"data,omitempty"`     // whatever else the undo needs
	Deadline time.Time         `json:"deadline,omitzero"`  // undo by then at the latest; zero is no deadline
}

// Header describes a run. It holds no secret.
type Header struct {
	Run        string    `json:"run"`
	Command    string    `json:"command,omitempty"`
	Host       string    `json:"host,omitempty"`
	PID        int       `json:"pid,omitempty"`
	Endpoint   string    `json:"endpoint,omitempty"`   // URL of the hypervisor; a password is removed
	Repository string    `json:"repository,omitempty"` // location; a password is removed
	VMs        []string  `json:"vms,omitempty"`
	Start      time.Time `json:"start,omitzero"`
}

// Options are what a journal gets from outside. nil is the zero Options.
type Options struct {
	Now func() time.Time // clock of the records; nil leaves their times zero
	FS  FS               // nil is [OS]
}

func (o *Options) now() time.Time {
	if o == nil || o.Now == nil {
		return time.Time{}
	}
	return o.Now().UTC()
}

func (o *Options) fs() FS {
	if o == nil || o.FS == nil {
		return OS()
	}
	return o.FS
}

// Conditions that an *Error wraps.
var (
	ErrAlive    = errors.New("the run is alive: another process holds its journal")
	ErrNotFound = errors.New("no such journal")
	ErrExist    = errors.New("a journal of that run exists")
	ErrRunName  = errors.New("run name must be 1 to 100 of A-Z a-z 0-9 . _ - and begin with a letter or digit")
	ErrClosed   = errors.New("journal is closed")
	ErrBroken   = errors.New("journal failed before and takes no more records")
	ErrOpen     = errors.New("obligations are open: the journal stays for recovery")
	ErrFull     = errors.New("journal has reached its size limit")
	ErrTooLarge = errors.New("record is larger than a journal takes")
	ErrKind     = errors.New("unknown kind of obligation")
	ErrUnknown  = errors.New("unknown obligation")
	ErrDamaged  = errors.New("journal is damaged: durable records are lost")
	ErrFormat   = errors.New("journal holds a record that this version does not understand")
)

// Error is what every operation of this package returns. It wraps the condition or the cause.
type Error struct {
	Op  string // the operation, such as "intend"
	Run string // the run, or the directory when no run is concerned
	Err error
}

// Error implements error.
func (e *Error) Error() string { return fmt.Sprintf("journal %s %s: %v", e.Op, e.Run, e.Err) }

// Unwrap returns the condition or the cause.
func (e *Error) Unwrap() error { return e.Err }

func opErr(op, run string, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Op: op, Run: run, Err: err}
}

// DamageError says that durable records of a journal cannot be read. It is an ErrDamaged. What
// could be read is still listed; [Salvage] makes a journal of it.
type DamageError struct {
	Offset int64  // where the first unreadable record begins, in bytes
	Seq    uint64 // its sequence number
}

// Error implements error.
func (e *DamageError) Error() string {
	return fmt.Sprintf("%v: record %d at byte %d", ErrDamaged, e.Seq, e.Offset)
}

// Is makes errors.Is(err, ErrDamaged) true.
func (e *DamageError) Is(target error) bool { return target == ErrDamaged }

const (
	liveSuffix    = ".journal"
	doneSuffix    = ".done"
	damagedSuffix = ".damaged"
	tempSuffix    = ".salvage"
	lockName      = "lock"
	maxRunName    = 100
	keepDone      = 50
)

func checkRun(run string) error {
	if run == "" || len(run) > maxRunName {
		return ErrRunName
	}
	for i, c := range []byte(run) {
		alnum := c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !alnum && (i == 0 || (c != '.' && c != '_' && c != '-')) {
			return ErrRunName
		}
	}
	return nil
}

// withoutPassword removes the password of a URL. A text that is no URL but may hold credentials
// loses everything between the scheme and the last @.
func withoutPassword(s string) string {
	if !strings.Contains(s, "@") {
		return s
	}
	u, err := url.Parse(s)
	if err == nil && u.Host != "" {
		if _, has := u.User.Password(); has {
			u.User = url.User(u.User.Username())
			return u.String()
		}
		return s
	}
	scheme, rest, found := strings.Cut(s, "://")
	if !found {
		return s // a path
	}
	return scheme + "://" + rest[strings.LastIndex(rest, "@")+1:]
}

func notExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
