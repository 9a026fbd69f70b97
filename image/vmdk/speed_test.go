package vmdk

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestSpeedAgainstQemu encodes and decodes the same disks with qemu-img and with this package, in
// turn, and compares the medians. The time that qemu-img takes to start is taken off. It runs where
// HOLDFAST_BENCH is set: its value is the number of rounds, and 1 stands for 5.
func TestSpeedAgainstQemu(t *testing.T) {
	rounds, err := strconv.Atoi(os.Getenv("HOLDFAST_BENCH"))
	if err != nil {
		t.Skip("HOLDFAST_BENCH is not set")
	}
	if rounds == 1 {
		rounds = 5
	}
	needTool(t, "qemu-img")
	s := seed(t)
	const size = 128 << 20
	for i, c := range []struct {
		name string
		disk func(*rand.Rand, int) []byte
	}{{"mixed", sparseDisk}, {"words", wordsDisk}, {"program", programDisk(t)}} {
		t.Run(c.name, func(t *testing.T) {
			compareSpeed(t, c.disk(rand.New(rand.NewPCG(s, uint64(i))), size), rounds)
		})
	}
}

// wordsDisk is full of text that compresses to about a third, in short matches.
func wordsDisk(r *rand.Rand, size int) []byte {
	words := make([]string, 5000)
	for i := range words {
		b := make([]byte, 2+r.IntN(9))
		for k := range b {
			b[k] = byte('a' + r.IntN(26))
		}
		words[i] = string(b)
	}
	zipf := rand.NewZipf(r, 1.1, 4, uint64(len(words)-1))
	b := make([]byte, 0, size+16)
	for len(b) < size {
		b = append(append(b, words[zipf.Uint64()]...), ' ')
	}
	return b[:size]
}

// programDisk is full of machine code and its tables: this program, repeated.
func programDisk(t *testing.T) func(*rand.Rand, int) []byte {
	path, err := os.Executable()
	require.NoError(t, err)
	p, err := os.ReadFile(path)
	require.NoError(t, err)
	return func(_ *rand.Rand, size int) []byte { return bytes.Repeat(p, size/len(p)+1)[:size] }
}

func compareSpeed(t *testing.T, disk []byte, rounds int) {
	dir, size := t.TempDir(), int64(len(disk))
	at := func(name string) string { return filepath.Join(dir, name) }
	require.NoError(t, os.WriteFile(at("raw"), disk, 0o600))
	took := func(f func()) float64 {
		start := time.Now()
		f()
		return time.Since(start).Seconds()
	}
	var start, theirEnc, ourEnc, theirDec, ourDec []float64
	for range rounds {
		start = append(start, took(func() { run(t, "qemu-img", "--version") }))
		theirEnc = append(theirEnc, took(func() {
			run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", at("raw"), at("their.vmdk"))
		}))
		ourEnc = append(ourEnc, took(func() { encodeFile(t, at("raw"), at("our.vmdk"), size) }))
		theirDec = append(theirDec, took(func() {
			run(t, "qemu-img", "convert", "-f", "vmdk", "-O", "raw", at("our.vmdk"), at("their.raw"))
		}))
		ourDec = append(ourDec, took(func() { decodeFile(t, at("our.vmdk"), at("our.raw"), size) }))
	}
	got, err := os.ReadFile(at("our.raw"))
	require.NoError(t, err)
	same(t, disk, got, "our decode of our encode")
	got, err = os.ReadFile(at("their.raw"))
	require.NoError(t, err)
	same(t, disk, got, "qemu-img's decode of our encode")
	their, err := os.Stat(at("their.vmdk"))
	require.NoError(t, err)
	our, err := os.Stat(at("our.vmdk"))
	require.NoError(t, err)
	median := func(v []float64) float64 { slices.Sort(v); return v[len(v)/2] }
	ratio, begin := float64(our.Size())/float64(their.Size()), median(start)
	enc, dec := (median(theirEnc)-begin)/median(ourEnc), (median(theirDec)-begin)/median(ourDec)
	t.Logf("encode %.2f x qemu-img, decode %.2f x, size %.3f x, compressed to %.2f",
		enc, dec, ratio, float64(our.Size())/float64(size))
	require.GreaterOrEqual(t, enc, 1.0, "encode")
	require.GreaterOrEqual(t, dec, 1.0, "decode")
	require.LessOrEqual(t, ratio, 1.05, "size")
}

func encodeFile(t *testing.T, from, to string, size int64) {
	in, err := os.Open(from)
	require.NoError(t, err)
	defer func() { _ = in.Close() }()
	out, err := os.Create(to)
	require.NoError(t, err)
	w, err := NewStreamWriter(out, size, nil)
	require.NoError(t, err)
	buf := make([]byte, 2<<20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		n, err := in.ReadAt(buf, off)
		if int64(n) < min(int64(len(buf)), size-off) {
			require.NoError(t, err)
		}
		_, err = w.WriteAt(buf[:n], off)
		require.NoError(t, err)
	}
	require.NoError(t, w.Commit())
	require.NoError(t, out.Close())
}

func decodeFile(t *testing.T, from, to string, size int64) {
	in, err := os.Open(from)
	require.NoError(t, err)
	defer func() { _ = in.Close() }()
	out, err := os.Create(to)
	require.NoError(t, err)
	require.NoError(t, out.Truncate(size))
	d, err := NewDecoder(in, nil)
	require.NoError(t, err)
	require.NoError(t, d.Decode(context.Background(), func(off int64, p []byte) error {
		_, err := out.WriteAt(p, off)
		return err
	}))
	require.NoError(t, out.Close())
}
