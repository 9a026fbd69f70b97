package journal

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"sort"
	"sync"
	"time"
)

var (
	errDead     = errors.New("the process is dead")
	errInjected = errors.New("injected")
)

// crashFS is a file system in memory that knows what would survive a power cut. A file that is
// created or renamed survives under its name once its directory is synced; bytes survive once
// their file is synced; anything else may survive in part.
type crashFS struct {
	mu      sync.Mutex
	now     map[string]*inode // names as the process sees them
	durable map[string]*inode // names that survive for sure
	ops     int               // operations so far
	syncs   int
	killAt  int                             // operation from which on everything fails without effect; 0 is never
	fault   func(op int) (n int, fail bool) // fails operation op after n bytes of a write
	dirLock chan struct{}
	ticks   int
}

type inode struct {
	data    []byte // what the process sees
	synced  []byte // what survives for sure
	pending []write
	holder  *crashFile
	mod     time.Time
}

// write is an unsynced change: bytes at an offset, or a new size when data is nil.
type write struct {
	off  int64
	data []byte
}

func (w write) apply(b []byte) []byte {
	if w.data == nil {
		for int64(len(b)) < w.off {
			b = append(b, 0)
		}
		return b[:w.off:w.off]
	}
	for int64(len(b)) < w.off+int64(len(w.data)) {
		b = append(b, 0)
	}
	copy(b[w.off:], w.data)
	return b
}

func newCrashFS() *crashFS {
	return &crashFS{now: map[string]*inode{}, durable: map[string]*inode{}, dirLock: make(chan struct{}, 1)}
}

// step counts an operation and says whether it may happen. The caller holds mu.
func (c *crashFS) step() error {
	c.ops++
	if c.killAt > 0 && c.ops >= c.killAt {
		return errDead
	}
	if c.fault != nil {
		if _, fail := c.fault(c.ops); fail {
			return errInjected
		}
	}
	return nil
}

func (c *crashFS) do(f func() error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.step(); err != nil {
		return err
	}
	return f()
}

func pathErr(op, name string, err error) error { return &fs.PathError{Op: op, Path: name, Err: err} }

func (c *crashFS) MkdirAll(string) error { return c.do(func() error { return nil }) }

func (c *crashFS) Create(name string) (f File, err error) {
	err = c.do(func() error {
		if c.now[name] != nil {
			return pathErr("create", name, fs.ErrExist)
		}
		c.ticks++
		c.now[name] = &inode{mod: time.Unix(int64(c.ticks), 0)}
		f = &crashFile{fs: c, node: c.now[name]}
		return nil
	})
	return f, err
}

func (c *crashFS) Open(name string) (f File, err error) {
	err = c.do(func() error {
		if c.now[name] == nil {
			return pathErr("open", name, fs.ErrNotExist)
		}
		f = &crashFile{fs: c, node: c.now[name]}
		return nil
	})
	return f, err
}

func (c *crashFS) ReadDir(string) (out []Info, err error) {
	err = c.do(func() error {
		for name, n := range c.now {
			out = append(out, Info{Name: filepath.Base(name), Size: int64(len(n.data)), ModTime: n.mod})
		}
		sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
		return nil
	})
	return out, err
}

func (c *crashFS) Rename(from, to string) error {
	return c.do(func() error {
		if c.now[from] == nil {
			return pathErr("rename", from, fs.ErrNotExist)
		}
		c.now[to] = c.now[from]
		delete(c.now, from)
		return nil
	})
}

func (c *crashFS) Remove(name string) error {
	return c.do(func() error {
		if c.now[name] == nil {
			return pathErr("remove", name, fs.ErrNotExist)
		}
		delete(c.now, name)
		return nil
	})
}

func (c *crashFS) SyncDir(string) error {
	return c.do(func() error {
		c.durable = make(map[string]*inode, len(c.now))
		for k, v := range c.now {
			c.durable[k] = v
		}
		return nil
	})
}

func (c *crashFS) Lock(string) (func() error, error) {
	c.dirLock <- struct{}{}
	if err := c.do(func() error { return nil }); err != nil {
		<-c.dirLock
		return nil, err
	}
	return func() error { <-c.dirLock; return nil }, nil
}

type crashFile struct {
	fs     *crashFS
	node   *inode
	closed bool
}

func (f *crashFile) do(fn func() error) error {
	return f.fs.do(func() error {
		if f.closed {
			return fs.ErrClosed
		}
		return fn()
	})
}

func (f *crashFile) ReadAt(p []byte, off int64) (n int, err error) {
	err = f.do(func() error {
		n = copy(p, f.node.data[min(off, int64(len(f.node.data))):])
		return nil
	})
	return n, err
}

func (f *crashFile) WriteAt(p []byte, off int64) (n int, err error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.closed {
		return 0, fs.ErrClosed
	}
	n = len(p)
	if err = f.fs.step(); errors.Is(err, errDead) {
		return 0, err
	} else if err != nil {
		n, _ = f.fs.fault(f.fs.ops)
		n = min(n, len(p))
	}
	w := write{off, append([]byte{}, p[:n]...)}
	f.node.pending = append(f.node.pending, w)
	f.node.data = w.apply(f.node.data)
	return n, err
}

func (f *crashFile) Truncate(size int64) error {
	return f.do(func() error {
		w := write{off: size}
		f.node.pending = append(f.node.pending, w)
		f.node.data = w.apply(f.node.data)
		return nil
	})
}

// Sync that fails loses what it should have written, and the next one does not notice: so real
// systems behave.
func (f *crashFile) Sync() error {
	err := f.do(func() error {
		f.fs.syncs++
		for _, w := range f.node.pending {
			f.node.synced = w.apply(f.node.synced)
		}
		f.node.pending = nil
		return nil
	})
	if errors.Is(err, errInjected) {
		f.fs.mu.Lock()
		f.node.pending = nil
		f.fs.mu.Unlock()
	}
	return err
}

func (f *crashFile) Size() (n int64, err error) {
	err = f.do(func() error { n = int64(len(f.node.data)); return nil })
	return n, err
}

func (f *crashFile) TryLock() (ok bool, err error) {
	err = f.do(func() error {
		if f.node.holder == nil {
			f.node.holder = f
		}
		ok = f.node.holder == f
		return nil
	})
	return ok, err
}

func (f *crashFile) Close() error {
	return f.do(func() error {
		f.closed = true
		if f.node.holder == f {
			f.node.holder = nil
		}
		return nil
	})
}

// killed ends the process, not the machine: locks go, everything written stays.
func (c *crashFS) killed() {
	c.killAt = 0
	for _, n := range c.now {
		n.holder = nil
	}
}

// pendingBytes is the largest number of unsynced bytes of any file.
func (c *crashFS) pendingBytes() int {
	most := 0
	for _, n := range c.now {
		sum := 0
		for _, w := range n.pending {
			sum += len(w.data) + 1
		}
		most = max(most, sum)
	}
	return most
}

// clone returns what a machine finds after a power cut now. Names survive as the process saw them
// when late is set, else as they were last synced. Of the unsynced bytes of each file the first
// keep survive, in order; with shuffle, a random set of 48-byte pieces does instead.
func (c *crashFS) clone(late bool, keep int, shuffle *rand.Rand) *crashFS {
	out := newCrashFS()
	names := c.durable
	if late {
		names = c.now
	}
	for name, n := range names {
		b := append([]byte{}, n.synced...)
		left := keep
		for _, w := range n.pending {
			switch {
			case shuffle != nil:
				for p := 0; p < len(w.data); p += 48 {
					if shuffle.IntN(2) == 0 {
						b = write{w.off + int64(p), w.data[p:min(p+48, len(w.data))]}.apply(b)
					}
				}
			case left <= 0:
			case w.data == nil:
				b, left = w.apply(b), left-1
			default:
				b = write{w.off, w.data[:min(left, len(w.data))]}.apply(b)
				left -= len(w.data) + 1
			}
		}
		out.now[name] = &inode{data: b, synced: append([]byte{}, b...), mod: n.mod}
		out.durable[name] = out.now[name]
	}
	return out
}
