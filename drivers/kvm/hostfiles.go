package kvm

import (
	"io"
	"io/fs"
	"os"
)

// hostFiles are the files of the daemon's host that the driver makes, changes and
// removes. It is an interface so that tests can fail every operation. Its methods are
// those of package os.
type hostFiles interface {
	stat(path string) (fs.FileInfo, error)
	lstat(path string) (fs.FileInfo, error)
	readDir(path string) ([]fs.DirEntry, error)
	open(path string, flag int) (hostFile, error)
	remove(path string) error
	rename(from, to string) error
	// space returns how many bytes an unprivileged writer may still use in the file
	// system of path, and its size.
	space(path string) (free, total int64, err error)
}

// hostFile is an open file of hostFiles.
type hostFile interface {
	io.Reader
	io.Writer
	io.ReaderAt
	io.WriterAt
	io.Seeker
	io.Closer
	Sync() error
	Truncate(size int64) error
	// punch makes a range read as zeros and gives its space back.
	punch(off, n int64) error
}

// osFiles are the files of this host.
type osFiles struct{}

type osFile struct{ *os.File }

func (osFiles) stat(path string) (fs.FileInfo, error)      { return os.Stat(path) }
func (osFiles) lstat(path string) (fs.FileInfo, error)     { return os.Lstat(path) }
func (osFiles) readDir(path string) ([]fs.DirEntry, error) { return os.ReadDir(path) }
func (osFiles) remove(path string) error                   { return os.Remove(path) }
func (osFiles) rename(from, to string) error               { return os.Rename(from, to) }

func (osFiles) space(path string) (free, total int64, err error) { return freeSpace(path) }

// open makes files that the owner alone may use. With an error the file is of no use.
func (osFiles) open(path string, flag int) (hostFile, error) {
	f, err := os.OpenFile(path, flag, 0o600)
	return osFile{f}, err
}

func (f osFile) punch(off, n int64) error { return punch(f.File, off, n) }
