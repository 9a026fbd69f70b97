//go:build !unix || solaris || illumos || aix || netbsd || openbsd || dragonfly

package restore

import "errors"

func freeBytes(string) (int64, error) { return 0, errors.ErrUnsupported }

// syncDir does nothing: this system has no way to sync a directory.
func syncDir(string) error { return nil }
