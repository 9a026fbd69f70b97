//go:build !linux

package kvm

import (
	"errors"
	"os"
)

// The daemon's files are reachable on a libvirt host alone, which runs Linux.

func freeSpace(string) (free, total int64, err error) { return 0, 0, errors.ErrUnsupported }

func fileIdentity(string) (string, error) { return "", errors.ErrUnsupported }

func punch(*os.File, int64, int64) error { return errors.ErrUnsupported }
