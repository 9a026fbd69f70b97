package vmdk

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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

// needTool skips the test when a program is missing, or fails it where tools are required.
func needTool(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err == nil {
			continue
		}
		if slices.Contains(strings.Split(os.Getenv("HOLDFAST_REQUIRE"), ","), "tools") {
			t.Fatalf("%s is required and missing", name)
		}
		t.Skipf("%s is missing", name)
	}
}

// run runs a program and returns its output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %s\n%s", name, strings.Join(args, " "), out)
	return string(out)
}

// same fails the test at the first offset at which want and got differ.
func same(t *testing.T, want, got []byte, what string) {
	t.Helper()
	if bytes.Equal(want, got) {
		return
	}
	for i := range min(len(want), len(got)) {
		if want[i] != got[i] {
			t.Fatalf("%s: first difference at %d of %d", what, i, len(want))
		}
	}
	t.Fatalf("%s: %d bytes instead of %d", what, len(got), len(want))
}

// sparseDisk returns a disk of size bytes with holes, text, noise and constant bytes.
func sparseDisk(r *rand.Rand, size int) []byte {
	b := make([]byte, size)
	for off := 0; off < size; {
		n := min(size-off, 1+r.IntN(300<<10))
		p := b[off : off+n]
		switch r.IntN(4) {
		case 0:
			for i := range p {
				p[i] = byte(r.Uint32())
			}
		case 1:
			for i := range p {
				p[i] = "the quick brown fox jumps over it"[(i*7+i/64)%33]
			}
		case 2:
			p[r.IntN(n)] = 1
		}
		off += n
	}
	return b
}

// spotted returns a disk like sparseDisk where it is small. A larger one has data at both ends and
// where a grain table of 32 MiB ends.
func spotted(r *rand.Rand, size int) []byte {
	if size <= 8<<20 {
		return sparseDisk(r, size)
	}
	b := make([]byte, size)
	for off := 0; off < size; off += 32 << 20 {
		at := max(0, off-300<<10)
		copy(b[at:], sparseDisk(r, 600<<10))
	}
	end := sparseDisk(r, 300<<10)
	copy(b[size-len(end):], end)
	return b
}

// smallDisk is four and a half grains: text, noise, a hole, more noise, text.
func smallDisk(r *rand.Rand) []byte {
	b := make([]byte, 4*writeGrain+writeGrain/2)
	copy(b, bytes.Repeat([]byte("text"), 9000))
	for _, off := range []int{writeGrain, 3*writeGrain + 100} {
		for i := range 5000 {
			b[off+i] = byte(r.Uint32())
		}
	}
	copy(b[4*writeGrain:], "the end")
	return b
}

// encode writes disk as a stream, in pieces and with zeros left out now and then.
func encode(t *testing.T, r *rand.Rand, disk []byte, opts *StreamOptions) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := NewStreamWriter(&out, int64(len(disk)), opts)
	require.NoError(t, err)
	for off := 0; off < len(disk); {
		n := min(len(disk)-off, 1+r.IntN(200<<10))
		if p := disk[off : off+n]; zero(p) && r.IntN(2) == 0 {
			require.NoError(t, w.WriteZeroes(int64(off), int64(n)))
		} else {
			_, err := w.WriteAt(p, int64(off))
			require.NoError(t, err)
		}
		off += n
	}
	require.NoError(t, w.Commit())
	require.NoError(t, w.Close())
	require.Equal(t, int64(out.Len()), w.Written())
	return out.Bytes()
}

// decode reads a stream to its end.
func decode(stream []byte, opts *DecoderOptions) ([]byte, error) {
	d, err := NewDecoder(bytes.NewReader(stream), opts)
	if err != nil {
		return nil, err
	}
	if d.Size() > 1<<30 {
		return nil, ErrSize
	}
	disk := make([]byte, d.Size())
	return disk, d.Decode(context.Background(), func(off int64, p []byte) error {
		copy(disk[off:], p)
		return nil
	})
}

// readAll reads all of d.
func readAll(t *testing.T, d *Disk) []byte {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(d, 0, d.Size()))
	require.NoError(t, err)
	return b
}

// file opens a file for the length of the test.
func file(t *testing.T, path string) (*os.File, int64) {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	t.Cleanup(func() { _ = f.Close() })
	i, err := f.Stat()
	require.NoError(t, err)
	return f, i.Size()
}

// openPath opens a disk by the path of its descriptor or sparse file.
func openPath(t *testing.T, path string, parent *Disk) (*Disk, error) {
	t.Helper()
	f, n := file(t, path)
	head := make([]byte, 4)
	_, err := f.ReadAt(head, 0)
	require.NoError(t, err)
	if s := string(head); s == "KDMV" || s == "COWD" {
		return Open(f, n, parent)
	}
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	desc, err := ParseDescriptor(text)
	require.NoError(t, err)
	return OpenDisk(desc, func(name string) (io.ReaderAt, int64, error) {
		f, n := file(t, filepath.Join(filepath.Dir(path), filepath.Base(name)))
		return f, n, nil
	}, parent)
}
