// Package journaltest is a disk in memory for journals: it outlives the processes
// that use it, knows what a power cut would leave, and lets a hook fail each
// operation.
package journaltest

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/internal/journal"
)

// ErrKilled is what every operation of a killed process returns.
var ErrKilled = errors.New("this process was killed")

// Disk holds files. A name survives a power cut once its directory is synced, bytes
// do once their file is. It is safe for concurrent use, and holds no mutex while a
// hook runs.
type Disk struct {
	mu      sync.Mutex
	names   map[string]*inode // as processes see them
	durable map[string]*inode // as a power cut would leave them
	locks   map[string]chan struct{}
	ticks   int64
}

type inode struct {
	data   []byte
	synced []byte
	holder *file
	mod    time.Time
}

// NewDisk returns an empty disk.
func NewDisk() *Disk {
	return &Disk{names: map[string]*inode{}, durable: map[string]*inode{}, locks: map[string]chan struct{}{}}
}

// Clone returns a disk as this one is now, which no process uses.
func (d *Disk) Clone() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := NewDisk()
	c.ticks = d.ticks
	copies := map[*inode]*inode{}
	for _, m := range []struct{ from, to map[string]*inode }{{d.names, c.names}, {d.durable, c.durable}} {
		for name, n := range m.from {
			if copies[n] == nil {
				// Bytes are never changed in place.
				copies[n] = &inode{data: n.data, synced: n.synced, mod: n.mod}
			}
			m.to[name] = copies[n]
		}
	}
	return c
}

// PowerCut takes away whatever was not durable. Processes must be killed before.
func (d *Disk) PowerCut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.names = maps.Clone(d.durable)
	for _, n := range d.names {
		n.data, n.holder = slices.Clone(n.synced), nil
	}
	d.locks = map[string]chan struct{}{}
}

// OpKind says what an operation does.
type OpKind string

// Kinds of operations.
const (
	OpMkdir    OpKind = "mkdir"
	OpCreate   OpKind = "create"
	OpOpen     OpKind = "open"
	OpReadDir  OpKind = "readdir"
	OpRename   OpKind = "rename"
	OpRemove   OpKind = "remove"
	OpSyncDir  OpKind = "syncdir"
	OpLock     OpKind = "lock"
	OpUnlock   OpKind = "unlock"
	OpRead     OpKind = "read"
	OpWrite    OpKind = "write"
	OpSize     OpKind = "size"
	OpTruncate OpKind = "truncate"
	OpSync     OpKind = "sync"
	OpTryLock  OpKind = "trylock"
	OpClose    OpKind = "close"
)

// Op is one operation.
type Op struct {
	Kind OpKind
	Name string // base name of the file or directory
}

// Fault is what happens to an operation. The zero value is nothing.
type Fault struct {
	Err   error // is returned instead of the result
	After bool  // when the effect has happened; an operation that fails by itself does so
	Short bool  // a write stores half of its bytes and fails with Err
	Kill  bool  // the process ends here, before the effect or with After after it
}

// Hook decides about each operation, in the goroutine of the caller; nil lets all
// pass.
type Hook func(Op) Fault

// Process is what one process sees of a Disk. Make one with Disk.Process.
type Process struct {
	disk *Disk
	hook Hook

	mu    sync.Mutex
	dead  bool
	files map[*file]struct{}
	held  map[string]chan struct{}
}

var _ journal.FS = (*Process)(nil)

// Process returns the disk for one more process.
func (d *Disk) Process(hook Hook) *Process {
	return &Process{disk: d, hook: hook, files: map[*file]struct{}{}, held: map[string]chan struct{}{}}
}

// Kill ends the process: its locks go, and every operation from now on is ErrKilled.
// What it has written stays.
func (p *Process) Kill() {
	p.mu.Lock()
	p.dead = true
	files, held := p.files, p.held
	p.files, p.held = map[*file]struct{}{}, map[string]chan struct{}{}
	p.mu.Unlock()
	for _, l := range held {
		<-l
	}
	p.disk.mu.Lock()
	defer p.disk.mu.Unlock()
	for f := range files {
		f.unlock()
	}
}

func (p *Process) alive() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead {
		return ErrKilled
	}
	return nil
}

// do runs an operation with what the hook wants of it. Only effect runs under the
// disk's mutex.
func (p *Process) do(op Op, effect func() error) error {
	return p.short(op, func(bool) error { return effect() })
}

func (p *Process) short(op Op, effect func(half bool) error) error {
	if err := p.alive(); err != nil {
		return err
	}
	var f Fault
	if p.hook != nil {
		op.Name = filepath.Base(op.Name)
		f = p.hook(op)
	}
	if f.Kill && !f.After {
		p.half(f, effect)
		p.Kill()
	}
	if err := p.alive(); err != nil { // killed here, or by another goroutine while this one was asked
		return err
	}
	if f.Err != nil && !f.After && !f.Kill {
		p.half(f, effect)
		return fmt.Errorf("%s %s: %w", op.Kind, op.Name, f.Err)
	}
	p.disk.mu.Lock()
	err := effect(false)
	p.disk.mu.Unlock()
	if err != nil {
		return err
	}
	if f.Kill {
		p.Kill()
		return ErrKilled
	}
	if f.Err != nil {
		return fmt.Errorf("%s %s: %w", op.Kind, op.Name, f.Err)
	}
	return nil
}

func (p *Process) half(f Fault, effect func(half bool) error) {
	if !f.Short {
		return
	}
	p.disk.mu.Lock()
	defer p.disk.mu.Unlock()
	_ = effect(true) // it fails anyway
}

func missing(op OpKind, name string) error {
	return &fs.PathError{Op: string(op), Path: name, Err: fs.ErrNotExist}
}

// MkdirAll implements journal.FS: directories are not kept.
func (p *Process) MkdirAll(dir string) error {
	return p.do(Op{OpMkdir, dir}, func() error { return nil })
}

// Create implements journal.FS.
func (p *Process) Create(name string) (journal.File, error) {
	f := &file{p: p, name: name}
	err := p.do(Op{OpCreate, name}, func() error {
		d := p.disk
		if d.names[name] != nil {
			return &fs.PathError{Op: "create", Path: name, Err: fs.ErrExist}
		}
		d.ticks++
		f.node = &inode{mod: time.Unix(d.ticks, 0)}
		d.names[name] = f.node
		return nil
	})
	return p.opened(f, err)
}

// Open implements journal.FS.
func (p *Process) Open(name string) (journal.File, error) {
	f := &file{p: p, name: name}
	err := p.do(Op{OpOpen, name}, func() error {
		if f.node = p.disk.names[name]; f.node == nil {
			return missing(OpOpen, name)
		}
		return nil
	})
	return p.opened(f, err)
}

func (p *Process) opened(f *file, err error) (journal.File, error) {
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.files[f] = struct{}{}
	return f, nil
}

// ReadDir implements journal.FS.
func (p *Process) ReadDir(dir string) (out []journal.Info, err error) {
	err = p.do(Op{OpReadDir, dir}, func() error {
		for name, n := range p.disk.names {
			if filepath.Dir(name) == filepath.Clean(dir) {
				out = append(out, journal.Info{Name: filepath.Base(name), Size: int64(len(n.data)), ModTime: n.mod})
			}
		}
		return nil
	})
	slices.SortFunc(out, func(a, b journal.Info) int { return strings.Compare(a.Name, b.Name) })
	return out, err
}

// Rename implements journal.FS.
func (p *Process) Rename(from, to string) error {
	return p.do(Op{OpRename, from}, func() error {
		n := p.disk.names[from]
		if n == nil {
			return missing(OpRename, from)
		}
		delete(p.disk.names, from)
		p.disk.names[to] = n
		return nil
	})
}

// Remove implements journal.FS.
func (p *Process) Remove(name string) error {
	return p.do(Op{OpRemove, name}, func() error {
		if p.disk.names[name] == nil {
			return missing(OpRemove, name)
		}
		delete(p.disk.names, name)
		return nil
	})
}

// SyncDir implements journal.FS.
func (p *Process) SyncDir(dir string) error {
	return p.do(Op{OpSyncDir, dir}, func() error {
		p.disk.durable = maps.Clone(p.disk.names)
		return nil
	})
}

// Lock implements journal.FS.
func (p *Process) Lock(name string) (func() error, error) {
	var l chan struct{}
	err := p.do(Op{OpLock, name}, func() error {
		if l = p.disk.locks[name]; l == nil {
			l = make(chan struct{}, 1)
			p.disk.locks[name] = l
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	l <- struct{}{}
	p.mu.Lock()
	dead := p.dead
	if !dead {
		p.held[name] = l
	}
	p.mu.Unlock()
	if dead {
		<-l
		return nil, ErrKilled
	}
	return func() error {
		// It ends even when it reports an error, as a lock ends with its file.
		err := p.do(Op{OpUnlock, name}, func() error { return nil })
		p.mu.Lock()
		_, mine := p.held[name]
		delete(p.held, name)
		p.mu.Unlock()
		if mine {
			<-l
		}
		return err
	}, nil
}
