package raw

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestStaysSparse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d")
	w, err := Create(path, 1<<40)
	require.NoError(t, err)
	_, err = w.WriteAt(make([]byte, 8<<20), 0) // zeros
	require.NoError(t, err)
	require.NoError(t, w.WriteZeroes(8<<20, 1<<30))
	_, err = w.WriteAt([]byte{1}, 1<<40-1)
	require.NoError(t, err)
	require.NoError(t, w.Commit())
	i, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, int64(1<<40), i.Size())
	require.LessOrEqual(t, i.Sys().(*syscall.Stat_t).Blocks*512, int64(128<<10))
}
