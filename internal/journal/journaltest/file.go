package journaltest

import (
	"io"
	"io/fs"
	"slices"
)

// file is an open file of a process.
type file struct {
	p      *Process
	name   string
	node   *inode
	closed bool // under the disk's mutex
}

func (f *file) do(kind OpKind, effect func() error) error {
	return f.p.do(Op{kind, f.name}, func() error {
		if f.closed {
			return fs.ErrClosed
		}
		return effect()
	})
}

func (f *file) ReadAt(p []byte, off int64) (n int, err error) {
	err = f.do(OpRead, func() error {
		if off < int64(len(f.node.data)) {
			n = copy(p, f.node.data[off:])
		}
		if n < len(p) {
			return io.EOF
		}
		return nil
	})
	if err != nil && err != io.EOF { //nolint:errorlint // ours, never wrapped
		n = 0
	}
	return n, err
}

func (f *file) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.p.short(Op{OpWrite, f.name}, func(half bool) error {
		if f.closed {
			return fs.ErrClosed
		}
		b := p
		if half {
			b = p[:len(p)/2]
		}
		end := int(off) + len(b)
		data := slices.Clone(f.node.data) // nobody else's view changes
		if end > len(data) {
			data = append(data, make([]byte, end-len(data))...)
		}
		copy(data[off:], b)
		f.node.data, n = data, len(b)
		return nil
	})
	return n, err
}

func (f *file) Size() (n int64, err error) {
	err = f.do(OpSize, func() error {
		n = int64(len(f.node.data))
		return nil
	})
	return n, err
}

func (f *file) Truncate(size int64) error {
	return f.do(OpTruncate, func() error {
		data := make([]byte, size)
		copy(data, f.node.data)
		f.node.data = data
		return nil
	})
}

func (f *file) Sync() error {
	return f.do(OpSync, func() error {
		f.node.synced = slices.Clone(f.node.data)
		return nil
	})
}

func (f *file) TryLock() (ok bool, err error) {
	err = f.do(OpTryLock, func() error {
		if f.node.holder == nil {
			f.node.holder = f
		}
		ok = f.node.holder == f
		return nil
	})
	return ok && err == nil, err
}

// Close gives the file back even when it reports an error, as close(2) does.
func (f *file) Close() error {
	err := f.do(OpClose, func() error { return nil })
	f.p.mu.Lock()
	delete(f.p.files, f)
	f.p.mu.Unlock()
	f.p.disk.mu.Lock()
	defer f.p.disk.mu.Unlock()
	f.unlock()
	return err
}

func (f *file) unlock() {
	f.closed = true
	if f.node.holder == f {
		f.node.holder = nil
	}
}
