//go:build amd64 || arm64

package partial

import (
	"os"
	"syscall"
)

// writeRange is SYNC_FILE_RANGE_WRITE of sync_file_range(2): begin to write all
// dirty pages of the range, and do not wait.
const writeRange = 2

// beginStoring is a hint. What became of it, the sync at the end tells.
func beginStoring(f *os.File) { _ = syscall.SyncFileRange(int(f.Fd()), 0, 0, writeRange) }
