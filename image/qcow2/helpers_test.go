package qcow2

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"os/exec"
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

// open opens an image file for the length of the test.
func open(t *testing.T, path string) (*Image, error) {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	t.Cleanup(func() { _ = f.Close() })
	i, err := f.Stat()
	require.NoError(t, err)
	return Open(f, i.Size())
}

// small is a version 3 image with clusters of 512 bytes and a disk of 7 clusters less 100 bytes:
// data, explicit zero, hole, compressed, data behind it in the file, data, hole.
// Its clusters: 0 header, 1 L1, 2 L2, 3-5 data, 6 compressed, 7 bitmap directory.
func small() (image, disk []byte) {
	const cs = 512
	b := make([]byte, 8*cs)
	be := binary.BigEndian
	be.PutUint32(b[0:], magic)
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], 9)
	be.PutUint64(b[24:], 7*cs-100)
	be.PutUint32(b[36:], 1)
	be.PutUint64(b[40:], cs)
	be.PutUint64(b[88:], autoclearBitmaps)
	be.PutUint32(b[96:], 4)
	be.PutUint32(b[100:], headerWritten)
	be.PutUint32(b[112:], extBitmaps)
	be.PutUint32(b[116:], 24)
	be.PutUint32(b[120:], 1)
	be.PutUint64(b[128:], 32)
	be.PutUint64(b[136:], 7*cs)

	be.PutUint64(b[cs:], 2*cs|flagCopied)
	disk = make([]byte, 7*cs-100)
	for i := range 3 {
		copy(b[(3+i)*cs:], bytes.Repeat([]byte{byte('a' + i)}, cs))
	}
	var z bytes.Buffer
	fw, err := flate.NewWriter(&z, 9)
	if err != nil {
		panic(err)
	}
	packed := bytes.Repeat([]byte("deflated"), cs/8)
	_, _ = fw.Write(packed)
	_ = fw.Close()
	copy(b[6*cs:], z.Bytes())
	l2 := b[2*cs:]
	be.PutUint64(l2[0:], 3*cs|flagCopied)
	be.PutUint64(l2[8:], flagZero)
	be.PutUint64(l2[24:], 6*cs|flagCompressed)
	be.PutUint64(l2[32:], 4*cs|flagCopied)
	be.PutUint64(l2[40:], 5*cs|flagCopied)
	be.PutUint64(l2[64:], 5*cs|flagCopied) // behind the end of the disk
	copy(disk[0:], b[3*cs:4*cs])
	copy(disk[3*cs:], packed)
	copy(disk[4*cs:], b[4*cs:6*cs])

	dir := b[7*cs:]
	be.PutUint32(dir[12:], bitmapInUse|bitmapAuto)
	dir[16], dir[17] = bitmapDirty, 16
	be.PutUint16(dir[18:], 7)
	copy(dir[24:], "nightly")
	return b, disk
}
