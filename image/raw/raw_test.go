package raw

import (
	"bytes"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
)

// seed returns the seed of this run, taken from HOLDFAST_SEED for a replay, and prints it.
func seed(t *testing.T) uint64 {
	t.Helper()
	s := rand.Uint64()
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		var err error
		s, err = strconv.ParseUint(v, 10, 64)
		require.NoError(t, err)
	}
	t.Logf("HOLDFAST_SEED=%d", s)
	return s
}

// firstDifference returns the first offset at which a and b differ, -1 for none.
func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

func TestRandomWrites(t *testing.T) {
	s := seed(t)
	for round := range uint64(50) {
		r := rand.New(rand.NewPCG(s, round))
		size := r.Int64N(4 << 20)
		truth := make([]byte, size)
		path := filepath.Join(t.TempDir(), "disk.raw")
		w, err := Create(path, size)
		require.NoError(t, err)
		require.Equal(t, size, w.Size())
		for pos := int64(0); pos < size; {
			n := min(size-pos, 1+r.Int64N(300<<10))
			p := truth[pos : pos+n]
			switch r.IntN(4) {
			case 0: // skipped
			case 1:
				require.NoError(t, w.WriteZeroes(pos, n))
			case 2: // zeros with some data
				p[r.Int64N(n)] = 1
				_, err = w.WriteAt(p, pos)
			default:
				for i := range p {
					p[i] = byte(r.Uint32())
				}
				_, err = w.WriteAt(p, pos)
			}
			require.NoError(t, err)
			pos += n
		}
		require.NoFileExists(t, path)
		require.NoError(t, w.Commit())
		require.NoError(t, w.Close())
		got, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, -1, firstDifference(truth, got), "round %d", round)
		require.NoFileExists(t, path+PartialSuffix)
	}
}

func TestRules(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d")
	_, err := Create(path, -1)
	require.ErrorIs(t, err, ErrSize)
	w, err := Create(path, 1000)
	require.NoError(t, err)
	_, err = Create(path, 1000)
	require.ErrorIs(t, err, fs.ErrExist, "the partial file is there")
	_, err = w.WriteAt(make([]byte, 10), 100)
	require.NoError(t, err)
	_, err = w.WriteAt(make([]byte, 10), 109)
	require.ErrorIs(t, err, ErrOrder)
	require.ErrorIs(t, w.WriteZeroes(0, 5), ErrOrder)
	_, err = w.WriteAt(make([]byte, 10), 991)
	require.ErrorIs(t, err, ErrBounds)
	require.ErrorIs(t, w.WriteZeroes(1<<62, 1<<62), ErrBounds)
	require.ErrorIs(t, w.WriteZeroes(-1, 1), ErrBounds)
	_, err = w.WriteAt([]byte{1}, 999)
	require.NoError(t, err, "a refused write does no harm")
	require.NoError(t, w.Close())
	require.NoError(t, w.Close())
	_, err = w.WriteAt([]byte{1}, 999)
	require.ErrorIs(t, err, ErrClosed)
	require.ErrorIs(t, w.Commit(), ErrClosed)
	left, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	require.Empty(t, left, "close without commit removes")
}

func TestNameTakenMeanwhile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d")
	w, err := Create(path, 10)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, []byte("precious"), 0o600))
	require.ErrorIs(t, w.Commit(), fs.ErrExist)
	require.NoError(t, w.Close())
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "precious", string(got))
	require.NoFileExists(t, path+PartialSuffix)
	_, err = Create(path, 10)
	require.ErrorIs(t, err, fs.ErrExist)
}

// An error of the file is final: bytes are missing.
func TestBrokenFile(t *testing.T) {
	w, err := Create(filepath.Join(t.TempDir(), "d"), 10)
	require.NoError(t, err)
	require.NoError(t, w.f.Close())
	_, err = w.WriteAt([]byte{1}, 0)
	require.ErrorIs(t, err, fs.ErrClosed)
	require.ErrorIs(t, w.Commit(), fs.ErrClosed)
	require.NoError(t, w.Close())
}
