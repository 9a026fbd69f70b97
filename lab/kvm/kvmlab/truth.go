package kvmlab

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
)

// Truth is the content of a disk at one moment, as a raw sparse file in the lab's
// directory.
type Truth struct {
	Path string
	// Size is in bytes.
	Size int64
}

// Truth reads the current content of a disk, whatever its format and layers: off,
// paused, or running with nobody writing (a running guest must be paused, frozen
// or idle, or the truth is no point in time). QEMU's caches are flushed first, for
// another process reads the image.
func (v *VM) Truth(disk string) Truth {
	v.t.Helper()
	tr, err := v.TryTruth(disk)
	if err != nil {
		v.t.Fatalf("lab: truth of %s: %v", disk, err)
	}
	return tr
}

// TryTruth is Truth for any goroutine.
func (v *VM) TryTruth(disk string) (Truth, error) {
	state, err := v.lab.Virsh("domstate", v.Name)
	if err == nil && state != "shut off" && state != "crashed" {
		if err := v.TryWrite(WriteOp{Disk: disk, Kind: flush}); err != nil {
			return Truth{}, err
		}
	}
	src, format, err := v.trySource(disk)
	if err != nil {
		return Truth{}, err
	}
	v.lab.mu.Lock()
	v.lab.next++
	path := filepath.Join(v.lab.Dir, "truth-"+strconv.Itoa(v.lab.next)+".raw")
	v.lab.mu.Unlock()
	return ImageTruth(src, format, path)
}

// ImageTruth converts an image that nobody writes to the raw file path.
func ImageTruth(image, format, path string) (Truth, error) {
	if _, err := tool("qemu-img", "convert", "-q", "-U", "-f", format, "-O", "raw", image, path); err != nil {
		return Truth{}, err
	}
	fi, err := os.Stat(path)
	if err != nil {
		return Truth{}, err
	}
	return Truth{Path: path, Size: fi.Size()}, nil
}

// SHA256 returns the digest of the whole content.
func (tr Truth) SHA256() ([sha256.Size]byte, error) {
	var sum [sha256.Size]byte
	f, err := os.Open(tr.Path)
	if err != nil {
		return sum, err
	}
	h := sha256.New()
	_, err = io.Copy(h, f)
	if err := errors.Join(err, f.Close()); err != nil {
		return sum, err
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

// CompareRaw returns nil if the raw file at path holds exactly the truth, and
// otherwise an error that names the first differing offset or the two sizes.
func (tr Truth) CompareRaw(path string) error {
	off, err := FirstDifference(tr.Path, path)
	if err != nil {
		return err
	}
	if off >= 0 {
		return fmt.Errorf("%s differs from the truth %s at offset %d", path, tr.Path, off)
	}
	return nil
}

// FirstDifference returns the first byte offset at which two files differ, -1 if
// they are equal. Files of different sizes differ at the end of the shorter one if
// not before.
func FirstDifference(a, b string) (off int64, err error) {
	fa, err := os.Open(a)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, fa.Close()) }()
	fb, err := os.Open(b)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, fb.Close()) }()
	bufA, bufB := make([]byte, 1<<20), make([]byte, 1<<20)
	for off = 0; ; {
		na, errA := io.ReadFull(fa, bufA)
		nb, errB := io.ReadFull(fb, bufB)
		n := min(na, nb)
		if !bytes.Equal(bufA[:n], bufB[:n]) {
			for i := range n {
				if bufA[i] != bufB[i] {
					return off + int64(i), nil
				}
			}
		}
		off += int64(n)
		if na != nb {
			return off, nil
		}
		if errA != nil || errB != nil {
			if isEnd(errA) && isEnd(errB) {
				return -1, nil
			}
			return 0, errors.Join(errA, errB)
		}
	}
}

func isEnd(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}
