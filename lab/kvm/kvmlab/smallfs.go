package kvmlab

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// SmallFS is a file system of a few megabytes, for tests that fill it.
type SmallFS struct {
	// Dir is the mount point.
	Dir string

	t testing.TB
}

// NewSmallFS mounts a tmpfs of size bytes and unmounts it when the test ends. It
// skips the test (class "kvm") where mounting is not permitted.
func NewSmallFS(t testing.TB, size int64) *SmallFS {
	t.Helper()
	dir, err := os.MkdirTemp("", fmt.Sprintf("hf-lab-%d-fs-", os.Getpid()))
	if err != nil {
		t.Fatalf("lab: %v", err)
	}
	if _, err := tool("mount", "-t", "tmpfs", "-o", "mode=0755,size="+strconv.FormatInt(size, 10), "hf-lab", dir); err != nil {
		_ = os.Remove(dir)
		Missing(t, "kvm", fmt.Sprintf("permission to mount (%v)", err))
	}
	t.Cleanup(func() {
		if _, err := tool("umount", dir); err != nil {
			// Somebody holds a file open: the directory goes, the rest with its holder.
			_, lazy := tool("umount", "-l", dir)
			t.Errorf("lab: %v", errors.Join(err, lazy))
		}
		_ = os.Remove(dir)
	})
	return &SmallFS{Dir: dir, t: t}
}

// Free returns the bytes that are free.
func (f *SmallFS) Free() int64 {
	f.t.Helper()
	free, err := f.TryFree()
	if err != nil {
		f.t.Fatalf("lab: %v", err)
	}
	return free
}

// TryFree is Free for any goroutine.
func (f *SmallFS) TryFree() (int64, error) {
	out, err := tool("stat", "-f", "-c", "%a %S", f.Dir)
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(out)
	if len(fields) != 2 {
		return 0, fmt.Errorf("stat -f %s: %q", f.Dir, out)
	}
	blocks, err := strconv.ParseInt(fields[0], 10, 64)
	if err != nil {
		return 0, err
	}
	unit, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil {
		return 0, err
	}
	return blocks * unit, nil
}

// TryFill is the neighbour that fills the file system: it writes a file until at
// most leave bytes are free. Calls add up; Release removes all of it.
func (f *SmallFS) TryFill(leave int64) error {
	file, err := os.OpenFile(filepath.Join(f.Dir, "neighbour"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	for {
		free, err := f.TryFree()
		if err != nil || free <= leave {
			return err
		}
		n, err := io.CopyN(file, ones{}, free-leave)
		if err != nil || n == 0 {
			return err
		}
	}
}

// Release removes what TryFill wrote.
func (f *SmallFS) Release() {
	f.t.Helper()
	if err := os.Remove(filepath.Join(f.Dir, "neighbour")); err != nil && !errors.Is(err, os.ErrNotExist) {
		f.t.Fatalf("lab: %v", err)
	}
}

// ReadOnly remounts the file system read-only, or writable again.
func (f *SmallFS) ReadOnly(on bool) {
	f.t.Helper()
	mode := "rw"
	if on {
		mode = "ro"
	}
	if _, err := tool("mount", "-o", "remount,"+mode, f.Dir); err != nil {
		f.t.Fatalf("lab: %v", err)
	}
}

// ones reads as 0xff bytes without end.
type ones struct{}

func (ones) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 0xff
	}
	return len(p), nil
}
