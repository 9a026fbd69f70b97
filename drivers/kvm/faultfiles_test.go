package kvm

import (
	"context"
	"io/fs"
	"strings"
	"sync/atomic"
)

// faultFiles are files of this host one of whose operations fails: they count with the
// calls to the daemon. What is opened is counted too. Nothing fails under the guard,
// which looks at its own time,.
type faultFiles struct {
	osFiles
	f      *faults
	opened atomic.Int64
}

// onFile names operations of files; they know no context.
const onFile = "file "

func fileCall[T any](f *faults, name string, effect func() (T, error)) (T, error) {
	if strings.HasPrefix(way(), "guard") {
		return effect()
	}
	return call(context.Background(), f, onFile+name, effect)
}

func fileDo(f *faults, name string, effect func() error) error {
	_, err := fileCall(f, name, func() (struct{}, error) { return struct{}{}, effect() })
	return err
}

func (f *faultFiles) stat(path string) (fs.FileInfo, error) {
	return fileCall(f.f, "stat", func() (fs.FileInfo, error) { return f.osFiles.stat(path) })
}

func (f *faultFiles) lstat(path string) (fs.FileInfo, error) {
	return fileCall(f.f, "lstat", func() (fs.FileInfo, error) { return f.osFiles.lstat(path) })
}

func (f *faultFiles) readDir(path string) ([]fs.DirEntry, error) {
	return fileCall(f.f, "readDir", func() ([]fs.DirEntry, error) { return f.osFiles.readDir(path) })
}

func (f *faultFiles) remove(path string) error {
	return fileDo(f.f, "remove", func() error { return f.osFiles.remove(path) })
}

func (f *faultFiles) rename(from, to string) error {
	return fileDo(f.f, "rename", func() error { return f.osFiles.rename(from, to) })
}

func (f *faultFiles) space(path string) (free, total int64, err error) {
	p, err := fileCall(f.f, "space", func() (p pair[int64, int64], err error) {
		p.a, p.b, err = f.osFiles.space(path)
		return p, err
	})
	return p.a, p.b, err
}

func (f *faultFiles) open(path string, flag int) (hostFile, error) {
	var file hostFile
	_, err := fileCall(f.f, "open", func() (_ struct{}, err error) {
		file, err = f.osFiles.open(path, flag)
		return struct{}{}, err
	})
	if err != nil {
		if file != nil {
			_ = file.Close()
		}
		return nil, err
	}
	f.opened.Add(1)
	return &faultFile{file, f}, nil
}

type faultFile struct {
	hostFile
	fs *faultFiles
}

func (f *faultFile) Read(p []byte) (int, error) {
	return fileCall(f.fs.f, "Read", func() (int, error) { return f.hostFile.Read(p) })
}

func (f *faultFile) Write(p []byte) (int, error) {
	return fileCall(f.fs.f, "Write", func() (int, error) { return f.hostFile.Write(p) })
}

func (f *faultFile) ReadAt(p []byte, off int64) (int, error) {
	return fileCall(f.fs.f, "ReadAt", func() (int, error) { return f.hostFile.ReadAt(p, off) })
}

func (f *faultFile) WriteAt(p []byte, off int64) (int, error) {
	return fileCall(f.fs.f, "WriteAt", func() (int, error) { return f.hostFile.WriteAt(p, off) })
}

func (f *faultFile) Seek(off int64, whence int) (int64, error) {
	return fileCall(f.fs.f, "Seek", func() (int64, error) { return f.hostFile.Seek(off, whence) })
}

func (f *faultFile) Sync() error { return fileDo(f.fs.f, "Sync", f.hostFile.Sync) }

func (f *faultFile) Truncate(size int64) error {
	return fileDo(f.fs.f, "Truncate", func() error { return f.hostFile.Truncate(size) })
}

func (f *faultFile) punch(off, n int64) error {
	return fileDo(f.fs.f, "punch", func() error { return f.hostFile.punch(off, n) })
}

// Close always has its effect.
func (f *faultFile) Close() error {
	err := f.hostFile.Close()
	f.fs.opened.Add(-1)
	return fileDo(f.fs.f, "Close", func() error { return err })
}
