package kopiarepo

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/internal/directio"
	"github.com/holdfast-backup/holdfast/repository"
)

// dirStore does atomic, durable operations on files under one directory. Names
// are slash-separated and relative. It is safe for concurrent use.
type dirStore struct {
	root string
	hook StorageHook
	n    atomic.Int64
	// clock gives files their times; nil: the file system does.
	clock func() time.Time

	mu    sync.Mutex
	dirty map[string]struct{} // directories whose entries are not yet durable
}

func newDirStore(root string, hook StorageHook) *dirStore {
	return &dirStore{root: root, hook: hook, dirty: map[string]struct{}{}}
}

func (d *dirStore) path(name string) string { return filepath.Join(d.root, filepath.FromSlash(name)) }

// do runs one numbered operation through the hook.
func (d *dirStore) do(ctx context.Context, kind OpKind, name string, f func() error) error {
	n := d.n.Add(1)
	if err := ctx.Err(); err != nil {
		return err
	}
	if d.hook == nil {
		return classify(kind, name, f())
	}
	after, err := d.hook(ctx, StorageOp{N: n, Kind: kind, Name: name})
	if err == nil {
		err = f()
		if after != nil {
			err = after(err)
		}
	}
	return classify(kind, name, err)
}

// classify makes conditions that callers match out of errors of the system.
func classify(kind OpKind, name string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, repository.ErrNoSpace) || errors.Is(err, repository.ErrReadOnly):
		return err
	case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%s %s: %w: %w", kind, name, repository.ErrNoSpace, err)
	case kind.Writes() && (errors.Is(err, syscall.EROFS) || errors.Is(err, fs.ErrPermission)):
		return fmt.Errorf("%s %s: %w: %w", kind, name, repository.ErrReadOnly, err)
	}
	return fmt.Errorf("%s %s: %w", kind, name, err)
}

const tempInfix = ".tmp."

func tempName(name string) string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return fmt.Sprintf("%s%s%x", name, tempInfix, b)
}

// writeTemp writes a durable temporary file beside name.
func (d *dirStore) writeTemp(name string, write func(io.Writer) error) (string, error) {
	temp := d.path(tempName(name))
	plain, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		if err = d.mkdirs(path.Dir(name)); err != nil {
			return "", err
		}
		plain, err = os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	}
	if err != nil {
		return "", err
	}
	f := directio.New(plain)
	w := directio.NewWriter(f)
	err = errors.Join(write(w), w.Flush())
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(temp)
		return "", err
	}
	return temp, nil
}

func (d *dirStore) mkdirs(dir string) error {
	if dir == "." || dir == "/" {
		return os.MkdirAll(d.root, 0o700)
	}
	if _, err := os.Stat(d.path(dir)); err == nil {
		return nil
	}
	if err := d.mkdirs(path.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(d.path(dir), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	d.markDirty(path.Dir(dir))
	return nil
}

func (d *dirStore) markDirty(dir string) {
	d.mu.Lock()
	d.dirty[dir] = struct{}{}
	d.mu.Unlock()
}

// put creates or replaces a file atomically. Its content is durable when put
// returns, its name after the next sync. A time that is not zero becomes the
// file's.
func (d *dirStore) put(ctx context.Context, name string, mtime time.Time, write func(io.Writer) error) error {
	return d.do(ctx, OpPut, name, func() error {
		temp, err := d.writeTemp(name, write)
		if err != nil {
			return err
		}
		err = d.setTime(temp, mtime)
		if err == nil {
			err = os.Rename(temp, d.path(name))
		}
		if err != nil {
			_ = os.Remove(temp)
			return err
		}
		d.markDirty(path.Dir(name))
		return nil
	})
}

// setTime gives a file a time; if that is zero, the clock's.
func (d *dirStore) setTime(file string, t time.Time) error {
	if t.IsZero() && d.clock != nil {
		t = d.clock()
	}
	if t.IsZero() {
		return nil
	}
	return os.Chtimes(file, t, t)
}

func (d *dirStore) putBytes(ctx context.Context, name string, data []byte) error {
	return d.put(ctx, name, time.Time{}, writeAll(data))
}

func writeAll(data []byte) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	}
}

// create makes a file that did not exist, atomically and durably. It fails with
// fs.ErrExist if the name is taken.
func (d *dirStore) create(ctx context.Context, name string, data []byte) error {
	return d.do(ctx, OpCreate, name, func() error {
		temp, err := d.writeTemp(name, func(w io.Writer) error {
			_, err := w.Write(data)
			return err
		})
		if err != nil {
			return err
		}
		if err = d.setTime(temp, time.Time{}); err == nil {
			err = os.Link(temp, d.path(name))
		}
		_ = os.Remove(temp)
		if err != nil {
			return err
		}
		if err := syncDir(filepath.Dir(d.path(name))); err != nil {
			return fmt.Errorf("%w: %w", errNotDurable, err)
		}
		return d.syncDirty(path.Dir(name))
	})
}

// errNotDurable: the effect is there, but a power cut may undo it.
var errNotDurable = errors.New("the new name could not be made durable")

// get reads a whole file of at most limit bytes.
func (d *dirStore) get(ctx context.Context, name string, limit int64) ([]byte, error) {
	var data []byte
	err := d.do(ctx, OpGet, name, func() error {
		f, err := os.Open(d.path(name))
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if info.Size() > limit {
			return fmt.Errorf("%w: file has %d bytes, at most %d were expected", repository.ErrDamaged, info.Size(), limit)
		}
		data = make([]byte, info.Size())
		_, err = io.ReadFull(f, data)
		return err
	})
	return data, err
}

// readRange gives length bytes at offset to write; a negative length: all.
func (d *dirStore) readRange(ctx context.Context, name string, offset, length int64, write func([]byte) error) error {
	return d.do(ctx, OpGet, name, func() error {
		f, err := os.Open(d.path(name))
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		buf := readBuffers.Get().(*[]byte)
		defer readBuffers.Put(buf)
		section := io.Reader(f)
		if length >= 0 {
			section = io.NewSectionReader(f, offset, length)
		}
		for {
			n, err := section.Read(*buf)
			if n > 0 {
				if err := write((*buf)[:n]); err != nil {
					return err
				}
			}
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
		}
	})
}

var readBuffers = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

func (d *dirStore) stat(ctx context.Context, name string) (size int64, mtime time.Time, err error) {
	err = d.do(ctx, OpStat, name, func() error {
		info, err := os.Stat(d.path(name))
		if err == nil {
			size, mtime = info.Size(), info.ModTime()
		}
		return err
	})
	return size, mtime, err
}

// remove deletes a file; that it is not there is no error. The deletion is
// durable after the next sync.
func (d *dirStore) remove(ctx context.Context, name string) error {
	return d.do(ctx, OpDelete, name, func() error {
		err := os.Remove(d.path(name))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil {
			d.markDirty(path.Dir(name))
		}
		return err
	})
}

// list returns the entries of one directory, sorted by name; none if it does not
// exist. Temporary files are left out.
func (d *dirStore) list(ctx context.Context, dir string) ([]fs.DirEntry, error) {
	var out []fs.DirEntry
	err := d.do(ctx, OpList, dir, func() error {
		entries, err := os.ReadDir(d.path(dir))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		for _, e := range entries {
			if !strings.Contains(e.Name(), tempInfix) {
				out = append(out, e)
			}
		}
		return err
	})
	return out, err
}

// sync makes the names that were put or removed so far durable.
func (d *dirStore) sync(ctx context.Context) error {
	return d.do(ctx, OpSync, ".", func() error { return d.syncDirty("") })
}

func (d *dirStore) syncDirty(done string) error {
	d.mu.Lock()
	dirs := d.dirty
	d.dirty = map[string]struct{}{}
	d.mu.Unlock()
	if done != "" {
		delete(dirs, done)
	}
	for dir := range dirs {
		if err := syncDir(d.path(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			d.mu.Lock()
			for dir := range dirs {
				d.dirty[dir] = struct{}{}
			}
			d.mu.Unlock()
			return fmt.Errorf("directory %s: %w", dir, err)
		}
		delete(dirs, dir)
	}
	return nil
}

// removeTemps deletes temporary files older than age under dir, left behind by
// writers that were killed. One that is being written carries the file system's time,
// whatever the clock says.
func (d *dirStore) removeTemps(ctx context.Context, age time.Duration) error {
	return filepath.WalkDir(d.root, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || !strings.Contains(e.Name(), tempInfix) {
			return err
		}
		info, err := e.Info()
		if err != nil || time.Since(info.ModTime()) < age {
			return nil //nolint:nilerr // it went away by itself
		}
		rel, err := filepath.Rel(d.root, p)
		if err != nil {
			return err
		}
		return d.remove(ctx, filepath.ToSlash(rel))
	})
}
