//go:build !(darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd || windows)

package journal

import (
	"errors"
	"fmt"
	"os"
)

// lockFile refuses: without a lock nobody could tell a live run from a dead one.
func lockFile(f *os.File, _ bool) (bool, error) {
	return false, &os.PathError{Op: "lock", Path: f.Name(), Err: fmt.Errorf("no file locks on this system: %w", errors.ErrUnsupported)}
}
