package journal

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"
)

// FS is the file system under journals. It exists so that tests can fail and cut off every
// operation; [OS] is the real one. Names are paths as [filepath.Join] makes them. Errors about
// missing and existing files match [fs.ErrNotExist] and [fs.ErrExist].
type FS interface {
	// MkdirAll makes a directory and its parents, durably, readable by the owner alone.
	MkdirAll(dir string) error
	// Create makes a file that must not exist, for reading and writing, for the owner alone.
	Create(name string) (File, error)
	// Open opens an existing file for reading and writing.
	Open(name string) (File, error)
	// ReadDir returns the files of a directory.
	ReadDir(dir string) ([]Info, error)
	// Rename renames within a directory and replaces what is there.
	Rename(from, to string) error
	Remove(name string) error
	// SyncDir makes the names in a directory durable.
	SyncDir(dir string) error
	// Lock waits for the exclusive lock of the file name, which it makes if it is missing.
	// The lock ends with unlock and with the process.
	Lock(name string) (unlock func() error, err error)
}

// File is one open file of an FS.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Size() (int64, error)
	Truncate(size int64) error
	// Sync makes content and size durable.
	Sync() error
	// TryLock takes the exclusive lock of the file unless another open file holds it. The lock
	// ends with Close and with the process.
	TryLock() (bool, error)
}

// Info describes a file.
type Info struct {
	Name    string
	Size    int64
	ModTime time.Time
}

// locked runs f under the lock of the directory. It is held for file operations only.
func locked(fsys FS, dir string, f func() error) error {
	unlock, err := fsys.Lock(filepath.Join(dir, lockName))
	if err != nil {
		return err
	}
	return errors.Join(f(), unlock())
}

// OS returns the file system of the operating system. It relies on whole-file locks, which
// network file systems may not have: keep journals on a local disk.
func OS() FS { return osFS{} }

type osFS struct{}

type osFile struct{ *os.File }

func (osFS) MkdirAll(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	var made []string
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(d); err == nil {
			break
		} else if !notExist(err) {
			return err
		}
		made = append(made, d)
		if filepath.Dir(d) == d {
			break
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, d := range made {
		if err := syncDir(filepath.Dir(d)); err != nil {
			return err
		}
	}
	return nil
}

func (osFS) Create(name string) (File, error) {
	return openFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
}

func (osFS) Open(name string) (File, error) { return openFile(name, os.O_RDWR) }

func openFile(name string, flag int) (File, error) {
	f, err := os.OpenFile(name, flag, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osFS) ReadDir(dir string) ([]Info, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []Info
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		i, err := e.Info()
		if notExist(err) {
			continue // removed in between
		}
		if err != nil {
			return nil, err
		}
		out = append(out, Info{Name: e.Name(), Size: i.Size(), ModTime: i.ModTime()})
	}
	return out, nil
}

func (osFS) Rename(from, to string) error { return os.Rename(from, to) }
func (osFS) Remove(name string) error     { return os.Remove(name) }
func (osFS) SyncDir(dir string) error     { return syncDir(dir) }

func (osFS) Lock(name string) (func() error, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err := lockFile(f, true); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f.Close, nil
}

func (f osFile) Size() (int64, error) {
	i, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return i.Size(), nil
}

func (f osFile) TryLock() (bool, error) { return lockFile(f.File, false) }
