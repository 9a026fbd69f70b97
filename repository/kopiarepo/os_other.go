//go:build !linux && !darwin && !freebsd

package kopiarepo

import "errors"

func diskSpace(string) (size, free int64, err error) { return 0, 0, errors.ErrUnsupported }
