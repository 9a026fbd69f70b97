//go:build linux || darwin || freebsd

package kopiarepo

import "golang.org/x/sys/unix"

// diskSpace returns the size and the free space of the volume of dir in bytes.
func diskSpace(dir string) (size, free int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0, err
	}
	return int64(st.Blocks) * int64(st.Bsize), int64(st.Bavail) * int64(st.Bsize), nil //nolint:unconvert // types differ by system
}
