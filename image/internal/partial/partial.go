// Package partial makes files that are there complete, under their name, or not at
// all.
package partial

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/holdfast-backup/holdfast/internal/directio"
)

// Suffix is what the name of a file ends in until it is committed.
const Suffix = ".partial"

// File is a file that gets its name when it is complete.
type File struct {
	*directio.File
	path string
}

// Create makes path+Suffix, readable by the owner alone. Neither that nor path may
// exist.
func Create(path string) (*File, error) {
	if _, err := os.Lstat(path); err == nil {
		return nil, &fs.PathError{Op: "create", Path: path, Err: fs.ErrExist}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f, err := os.OpenFile(path+Suffix, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return &File{File: directio.New(f), path: path}, nil
}

// End gives the file, which must be synced, its name, durably, or removes it. A file that has come to path meanwhile is
// not replaced.
func (p *File) End(commit bool) error {
	tmp := p.path + Suffix
	if !commit {
		err := p.Close()
		if errors.Is(err, fs.ErrClosed) {
			err = nil // closed by a commit that failed
		}
		if rm := os.Remove(tmp); !errors.Is(rm, fs.ErrNotExist) { // gone when a commit came that far
			err = errors.Join(err, rm)
		}
		return err
	}
	// Closed first, because some systems do not rename an open file.
	if err := p.Close(); err != nil {
		return err
	}
	err := os.Link(tmp, p.path)
	switch {
	case err == nil:
		err = os.Remove(tmp)
	case errors.Is(err, fs.ErrExist):
		return err
	default: // no hard links here
		if err = os.Rename(tmp, p.path); err != nil {
			return err
		}
	}
	if err == nil {
		err = syncDir(filepath.Dir(p.path))
	}
	if err != nil { // what is not surely there shall not be there
		err = errors.Join(err, os.Remove(p.path))
	}
	return err
}

// syncDir makes the names in a directory durable, on systems where that can be asked for.
func syncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
