package directio_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/directio"
)

func create(t *testing.T, dir string) (*directio.File, string) {
	t.Helper()
	path := filepath.Join(dir, "f")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	require.NoError(t, err)
	return directio.New(f), path
}

func random(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		require.NoError(t, err)
		seed = n
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// dirs are places with different file systems, where there are such.
func dirs(t *testing.T) []string {
	out := []string{t.TempDir()}
	if dir, err := os.MkdirTemp("/dev/shm", "directio"); err == nil {
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		out = append(out, dir)
	}
	return out
}

// TestStream writes streams of many lengths in pieces of many lengths.
func TestStream(t *testing.T) {
	rnd := random(t)
	for _, dir := range dirs(t) {
		for _, size := range []int{0, 1, 4095, 65536, 1 << 20, 1<<20 + 1, 3<<20 + 4096, 5<<20 - 1} {
			f, path := create(t, dir)
			want := make([]byte, size)
			for i := range want {
				want[i] = byte(rnd.Uint32())
			}
			w := directio.NewWriter(f)
			for rest := want; len(rest) > 0; {
				k := min(len(rest), 1+rnd.IntN(1<<19))
				n, err := w.Write(rest[:k])
				require.NoError(t, err)
				require.Equal(t, k, n)
				rest = rest[k:]
			}
			require.NoError(t, w.Flush())
			require.NoError(t, f.Sync())
			require.NoError(t, f.Close())
			same(t, want, path)
		}
	}
}

// TestBothWays mixes writes that can go around the cache with such that cannot.
func TestBothWays(t *testing.T) {
	rnd := random(t)
	for _, dir := range dirs(t) {
		f, path := create(t, dir)
		want := make([]byte, 8<<20+777)
		require.NoError(t, f.Truncate(int64(len(want))))
		data := make([]byte, 1<<20)
		for range 200 {
			for i := range data {
				data[i] = byte(rnd.Uint32())
			}
			n, off, from := 1+rnd.IntN(len(data)), rnd.IntN(len(want)), 0
			if rnd.IntN(2) == 0 {
				n, off = max(n&^4095, 4096), off&^4095
			}
			if rnd.IntN(4) == 0 {
				from = rnd.IntN(n)
			}
			p := data[from:n]
			p = p[:min(len(p), len(want)-off)]
			copy(want[off:], p)
			k, err := f.WriteAt(p, int64(off))
			require.NoError(t, err)
			require.Equal(t, len(p), k)
		}
		require.NoError(t, f.Sync())
		require.NoError(t, f.Close())
		same(t, want, path)
	}
}

func same(t *testing.T, want []byte, path string) {
	t.Helper()
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Len(t, got, len(want), path)
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("%s differs at byte %d of %d", path, i, len(want))
		}
	}
}

func TestClosedFileFails(t *testing.T) {
	f, _ := create(t, t.TempDir())
	_, err := f.WriteAt(make([]byte, 1<<20), 0)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	_, err = f.WriteAt(make([]byte, 1<<20), 0)
	require.ErrorIs(t, err, os.ErrClosed)
	require.ErrorIs(t, f.Close(), os.ErrClosed)
}

// BenchmarkWrite compares the two ways.
func BenchmarkWrite(b *testing.B) {
	data := bytes.Repeat([]byte("holdfast"), 1<<17)
	for _, direct := range []bool{true, false} {
		b.Run(fmt.Sprintf("direct=%v", direct), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "f")
			f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
			require.NoError(b, err)
			w := directio.New(f)
			b.SetBytes(int64(len(data)))
			off := int64(0)
			for b.Loop() {
				if direct {
					_, err = w.WriteAt(data, off)
				} else {
					_, err = f.WriteAt(data, off)
				}
				require.NoError(b, err)
				off = (off + int64(len(data))) % (1 << 30)
			}
			require.NoError(b, f.Sync())
			require.NoError(b, w.Close())
		})
	}
}
