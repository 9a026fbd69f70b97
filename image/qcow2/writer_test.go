package qcow2

import (
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// writeRandom writes random data with holes through w, in random pieces, and the same to truth.
func writeRandom(t *testing.T, r *rand.Rand, w *Writer, truth io.WriterAt, size, maxPiece int64) {
	t.Helper()
	for pos := int64(0); pos < size; {
		n := min(size-pos, 1+r.Int64N(maxPiece))
		if r.IntN(2) == 0 { // aligned ends exercise whole clusters
			n = min(size-pos, (n+writeCluster-1)&^(writeCluster-1))
		}
		p := make([]byte, n)
		switch r.IntN(5) {
		case 0: // skipped
		case 1:
			require.NoError(t, w.WriteZeroes(pos, n))
		case 2: // zeros, some data
			p[r.Int64N(n)] = 1
			fallthrough
		default:
			if r.IntN(3) > 0 {
				for i := range p {
					p[i] = byte(r.Uint32())
				}
			}
			_, err := w.WriteAt(p, pos)
			require.NoError(t, err)
			_, err = truth.WriteAt(p, pos)
			require.NoError(t, err)
		}
		pos += n
	}
}

// newTruth returns a sparse raw file of size bytes.
func newTruth(t *testing.T, dir string, size int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "truth.raw"))
	require.NoError(t, err)
	t.Cleanup(func() { _ = f.Close() })
	require.NoError(t, f.Truncate(size))
	return f
}

// judge lets qemu-img check the image and compare it with the truth.
func judge(t *testing.T, image, truth string) {
	t.Helper()
	run(t, "qemu-img", "check", "-f", "qcow2", image)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", truth, image)
}

func TestWriterAgainstQemu(t *testing.T) {
	needTool(t, "qemu-img")
	s := seed(t)
	sizes := []int64{1, 512, 513, writeCluster - 512, writeCluster, writeCluster + 512, 3*writeCluster + 1}
	for round := range uint64(40) {
		r := rand.New(rand.NewPCG(s, round))
		size := r.Int64N(24 << 20)
		if int(round) < len(sizes) {
			size = sizes[round]
		}
		dir := t.TempDir()
		path := filepath.Join(dir, "disk.qcow2")
		w, err := Create(path, size)
		require.NoError(t, err)
		require.Equal(t, (size+511)/512*512, w.Size())
		truth := newTruth(t, dir, w.Size())
		writeRandom(t, r, w, truth, w.Size(), 1<<20)
		require.NoFileExists(t, path)
		require.NoError(t, w.Commit())
		require.NoError(t, w.Close())
		judge(t, path, truth.Name())

		m, err := open(t, path)
		require.NoError(t, err)
		require.Equal(t, w.Size(), m.Size())
		got, err := io.ReadAll(io.NewSectionReader(m, 0, m.Size()))
		require.NoError(t, err)
		want, err := os.ReadFile(truth.Name())
		require.NoError(t, err)
		require.Equal(t, -1, firstDifference(want, got), "round %d", round)
		for e, err := range m.Extents() { // nothing allocated is all zero, cluster by cluster
			require.NoError(t, err)
			for off := e.Offset; off < e.Offset+e.Length; off += writeCluster {
				end := min(off+writeCluster, m.Size())
				require.NotEqual(t, -1, firstDifference(make([]byte, end-off), want[off:end]), "round %d at %d", round, off)
			}
		}
	}
}

func TestWriterLargeSparse(t *testing.T) {
	needTool(t, "qemu-img")
	const tib = int64(1) << 40
	for name, c := range map[string]struct {
		size int64
		at   []int64
	}{
		"empty disk":       {0, nil},
		"all zero":         {1 << 30, nil},
		"last sector":      {3<<30 + 512, []int64{3 << 30}},
		"around L2 tables": {2 << 30, []int64{512<<20 - 512, 512 << 20, 1536<<20 - 100}},
		"8 TiB":            {8 * tib, []int64{0, 5*tib + 12345, 8*tib - 512}},
		"15 TiB odd":       {15*tib + 512, []int64{1 << 20, 15 * tib}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "disk.qcow2")
			w, err := Create(path, c.size)
			require.NoError(t, err)
			truth := newTruth(t, dir, c.size)
			for i, off := range c.at {
				p := []byte{byte(i + 1), 2, 3}
				_, err := w.WriteAt(p, off)
				require.NoError(t, err)
				_, err = truth.WriteAt(p, off)
				require.NoError(t, err)
			}
			require.NoError(t, w.Commit())
			judge(t, path, truth.Name())
		})
	}
}

// thin drops clusters of data, so that an image of many GiB can be checked without the bytes.
type thin struct {
	*os.File
	drop bool
}

func (f *thin) WriteAt(p []byte, off int64) (int, error) {
	if f.drop && len(p) == 64*writeCluster {
		return len(p), nil
	}
	return f.File.WriteAt(p, off)
}

// An image with several refcount blocks, and with a number of clusters near the edge of a block.
func TestWriterManyRefcountBlocks(t *testing.T) {
	needTool(t, "qemu-img")
	for _, extra := range []int64{0, 484, 485, 486, 487, 488, 489, 490, 491, 492, 40000} {
		const size = 64 << 40
		f, err := os.Create(filepath.Join(t.TempDir(), "disk.qcow2"))
		require.NoError(t, err)
		w, err := NewWriter(&thin{f, true}, size)
		require.NoError(t, err)
		p := make([]byte, 64*writeCluster)
		for i := range p {
			p[i] = 1
		}
		pos := int64(0)
		for range refEntries/64 - 8 {
			_, err := w.WriteAt(p, pos)
			require.NoError(t, err)
			pos += int64(len(p))
		}
		for range extra {
			_, err := w.WriteAt(p[:writeCluster], pos)
			require.NoError(t, err)
			pos += 3 * writeCluster
		}
		require.NoError(t, w.Commit())
		require.NoError(t, f.Close())
		run(t, "qemu-img", "check", "-f", "qcow2", f.Name())
		require.NoError(t, os.Remove(f.Name()))
	}
}

func TestWriterRules(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d")
	_, err := Create(path, -1)
	require.ErrorIs(t, err, ErrSize)
	_, err = Create(path, MaxSize+1)
	require.ErrorIs(t, err, ErrSize)
	require.NoFileExists(t, path+PartialSuffix)
	w, err := Create(path, 1000)
	require.NoError(t, err)
	require.Equal(t, int64(1024), w.Size())
	_, err = Create(path, 1000)
	require.ErrorIs(t, err, fs.ErrExist)
	_, err = w.WriteAt(make([]byte, 10), 100)
	require.NoError(t, err)
	_, err = w.WriteAt(make([]byte, 10), 109)
	require.ErrorIs(t, err, ErrOrder)
	require.ErrorIs(t, w.WriteZeroes(0, 5), ErrOrder)
	_, err = w.WriteAt(make([]byte, 10), 1015)
	require.ErrorIs(t, err, ErrBounds)
	require.ErrorIs(t, w.WriteZeroes(1<<62, 1<<62), ErrBounds)
	_, err = w.WriteAt([]byte{1}, 1023)
	require.NoError(t, err, "a refused write does no harm")
	require.NoError(t, w.Close())
	require.NoError(t, w.Close())
	_, err = w.WriteAt([]byte{1}, 1023)
	require.ErrorIs(t, err, ErrClosed)
	require.ErrorIs(t, w.Commit(), ErrClosed)
	left, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	require.Empty(t, left)
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
}

// One write across the border of two L2 tables, with data, zeros and data.
func TestWriterRunAcrossTables(t *testing.T) {
	needTool(t, "qemu-img")
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.qcow2")
	w, err := Create(path, 1<<30)
	require.NoError(t, err)
	truth := newTruth(t, dir, 1<<30)
	p := make([]byte, 5<<20)
	for i := range p {
		if i < 3<<20 || i >= 4<<20 {
			p[i] = byte(i>>16 + 1)
		}
	}
	for _, f := range []io.WriterAt{w, truth} {
		_, err := f.WriteAt(p, 510<<20)
		require.NoError(t, err)
	}
	require.NoError(t, w.Commit())
	judge(t, path, truth.Name())
}

func BenchmarkWriter(b *testing.B) {
	p := make([]byte, 1<<20)
	for i := range p {
		p[i] = byte(i)
	}
	for name, block := range map[string][]byte{"data": p, "zeros": make([]byte, 1<<20)} {
		b.Run(name, func(b *testing.B) {
			w, err := NewWriter(nowhere{}, MaxSize)
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(1 << 20)
			b.ReportAllocs()
			for i := int64(0); b.Loop(); i++ {
				if _, err := w.WriteAt(block, i<<20); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

type nowhere struct{}

func (nowhere) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (nowhere) Sync() error                            { return nil }

var errDisk = errors.New("no space")

// failing fails operation number at, and counts.
type failing struct {
	f   *os.File
	at  int
	ops int
}

func (f *failing) step() error {
	f.ops++
	if f.ops == f.at {
		return errDisk
	}
	return nil
}

func (f *failing) WriteAt(p []byte, off int64) (int, error) {
	if err := f.step(); err != nil {
		return 0, err
	}
	return f.f.WriteAt(p, off)
}

func (f *failing) Sync() error { return f.step() }

// Each operation of the file fails once: the error surfaces, Commit does not succeed, and until
// the header is written, which is last, what is left is no image.
func TestWriterFaults(t *testing.T) {
	for at := 1; ; at++ {
		f, err := os.Create(filepath.Join(t.TempDir(), "disk.qcow2"))
		require.NoError(t, err)
		out := &failing{f: f, at: at}
		w, err := NewWriter(out, 2<<30)
		require.NoError(t, err)
		var first error
		for i := range int64(20) {
			if _, err := w.WriteAt([]byte{1, 2, 3}, i*100<<20); first == nil {
				first = err
			} else {
				require.ErrorIs(t, err, errDisk, "an error is final")
			}
		}
		err = w.Commit()
		info, serr := f.Stat()
		require.NoError(t, serr)
		if out.ops < at {
			require.NoError(t, err)
			_, err = Open(f, info.Size())
			require.NoError(t, err)
			require.Greater(t, at, 25)
			break
		}
		require.ErrorIs(t, err, errDisk, "operation %d", at)
		require.ErrorIs(t, w.Commit(), errDisk)
		if out.ops > at { // an operation came after the failed one
			t.Fatalf("the writer went on after operation %d failed", at)
		}
		_, err = Open(f, info.Size())
		// 20 clusters, 4 L2 tables, L1, refcount block and table, fsync, header (not written).
		if at <= 20+4+1+2+1+1 {
			require.ErrorIs(t, err, ErrCorrupt, "operation %d", at)
		}
		require.NoError(t, f.Close())
	}
}

// The memory of a writer does not grow with the disk: one L2 table at a time.
func TestWriterHoldsOneTable(t *testing.T) {
	needTool(t, "qemu-img")
	f, err := os.Create(filepath.Join(t.TempDir(), "disk.qcow2"))
	require.NoError(t, err)
	defer f.Close()
	w, err := NewWriter(f, MaxSize)
	require.NoError(t, err)
	pos, p := int64(0), []byte{9}
	allocs := testing.AllocsPerRun(1, func() { // runs it twice
		for range 200 {
			if _, err := w.WriteAt(p, pos); err != nil {
				t.Error(err)
			}
			pos += 100 << 30
		}
	})
	require.Less(t, allocs, 10.0, "200 tables")
	_, err = w.WriteAt([]byte{9}, MaxSize-1)
	require.NoError(t, err)
	require.NoError(t, w.Commit())
	run(t, "qemu-img", "check", "-f", "qcow2", f.Name())
	m, err := open(t, f.Name())
	require.NoError(t, err)
	p = []byte{1, 1}
	n, err := m.ReadAt(p, MaxSize-1)
	require.ErrorIs(t, err, io.EOF)
	require.Equal(t, 1, n)
	require.Equal(t, byte(9), p[0])
}
