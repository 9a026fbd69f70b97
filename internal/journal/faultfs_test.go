package journal

import "sync/atomic"

// faultFS is an FS in which one operation fails, before or after its effect, and that counts what
// is open. Of a read nothing arrives; a close and the end of a lock always have their effect.
type faultFS struct {
	FS
	ops    int
	at     int // the operation that fails; 0 is none
	after  bool
	what   string // what failed
	opened atomic.Int64
}

func (f *faultFS) op(name string, effect func() error) error {
	f.ops++
	if f.ops != f.at {
		return effect()
	}
	f.what = name
	if f.after {
		_ = effect() // its answer is lost
	}
	return errInjected
}

func (f *faultFS) MkdirAll(dir string) error {
	return f.op("MkdirAll", func() error { return f.FS.MkdirAll(dir) })
}

func (f *faultFS) ReadDir(dir string) (out []Info, err error) {
	err = f.op("ReadDir", func() (err error) { out, err = f.FS.ReadDir(dir); return err })
	if err != nil {
		out = nil
	}
	return out, err
}

func (f *faultFS) Rename(from, to string) error {
	return f.op("Rename", func() error { return f.FS.Rename(from, to) })
}

func (f *faultFS) Remove(name string) error {
	return f.op("Remove", func() error { return f.FS.Remove(name) })
}

func (f *faultFS) SyncDir(dir string) error {
	return f.op("SyncDir", func() error { return f.FS.SyncDir(dir) })
}

// Lock fails without effect only: who gets no unlock cannot call it.
func (f *faultFS) Lock(name string) (func() error, error) {
	if err := f.op("Lock", func() error { return nil }); err != nil {
		return nil, err
	}
	unlock, err := f.FS.Lock(name)
	if err != nil {
		return nil, err
	}
	f.opened.Add(1)
	return func() error {
		err := unlock()
		f.opened.Add(-1)
		return f.op("unlock", func() error { return err })
	}, nil
}

// open fails without a file; a file that was made is there all the same.
func (f *faultFS) open(name string, open func() (File, error)) (File, error) {
	var file File
	err := f.op(name, func() (err error) { file, err = open(); return err })
	if err != nil {
		if file != nil {
			_ = file.Close()
		}
		return nil, err
	}
	f.opened.Add(1)
	return &faultFile{file, f}, nil
}

func (f *faultFS) Create(name string) (File, error) {
	return f.open("Create", func() (File, error) { return f.FS.Create(name) })
}

func (f *faultFS) Open(name string) (File, error) {
	return f.open("Open", func() (File, error) { return f.FS.Open(name) })
}

type faultFile struct {
	File
	fs *faultFS
}

func (f *faultFile) ReadAt(p []byte, off int64) (n int, err error) {
	err = f.fs.op("ReadAt", func() (err error) { n, err = f.File.ReadAt(p, off); return err })
	if err != nil {
		n = 0
	}
	return n, err
}

func (f *faultFile) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.fs.op("WriteAt", func() (err error) { n, err = f.File.WriteAt(p, off); return err })
	return n, err
}

func (f *faultFile) Size() (n int64, err error) {
	err = f.fs.op("Size", func() (err error) { n, err = f.File.Size(); return err })
	return n, err
}

func (f *faultFile) Truncate(size int64) error {
	return f.fs.op("Truncate", func() error { return f.File.Truncate(size) })
}

func (f *faultFile) Sync() error { return f.fs.op("Sync", f.File.Sync) }

func (f *faultFile) TryLock() (ok bool, err error) {
	err = f.fs.op("TryLock", func() (err error) { ok, err = f.File.TryLock(); return err })
	return ok && err == nil, err
}

func (f *faultFile) Close() error {
	err := f.File.Close()
	f.fs.opened.Add(-1)
	return f.fs.op("Close", func() error { return err })
}
