package directio

import (
	"errors"
	"os"
	"syscall"
)

// openDirect opens an existing file once more, or returns nil: some file systems
// have no way around the cache.
func openDirect(name string) *os.File {
	f, err := os.OpenFile(name, os.O_WRONLY|syscall.O_DIRECT, 0)
	if err != nil {
		return nil
	}
	return f
}

// refused reports whether a write failed by the manner of writing alone.
func refused(err error) bool {
	return errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EOPNOTSUPP)
}
