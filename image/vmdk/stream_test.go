package vmdk

import (
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/require"
)

func TestStreamRoundTrip(t *testing.T) {
	s := seed(t)
	sizes := []int{0, 512, 65024, 65536, 66048, 32 << 20, 64<<20 + 512}
	for i := range 20 {
		r := rand.New(rand.NewPCG(s, uint64(i)))
		size := r.IntN(4<<11) * 512
		if i < len(sizes) {
			size = sizes[i]
		}
		what := fmt.Sprintf("round %d, size %d", i, size)
		disk := spotted(r, size)
		stream := encode(t, r, disk, &StreamOptions{Workers: 1 + r.IntN(4), Level: 1 + r.IntN(6)})
		sum := sha1.Sum(stream)
		got, err := decode(stream, &DecoderOptions{Workers: 1 + r.IntN(4), Size: int64(len(stream)), SHA1: sum[:]})
		require.NoError(t, err, what)
		same(t, disk, got, what)

		d, err := Open(bytes.NewReader(stream), int64(len(stream)), nil)
		require.NoError(t, err, what)
		same(t, disk, readAll(t, d), what+", at random")
		checkExtents(t, d, disk, what)
	}
}

// checkExtents says that everything outside the extents of d is zero, and that they are in order.
func checkExtents(t *testing.T, d *Disk, disk []byte, what string) {
	t.Helper()
	end := int64(0)
	for e, err := range d.Extents() {
		require.NoError(t, err, what)
		require.GreaterOrEqual(t, e.Offset, end, what)
		require.Positive(t, e.Length, what)
		require.True(t, zero(disk[end:e.Offset]), "%s: data between %d and %d", what, end, e.Offset)
		if e.Zero {
			require.True(t, zero(disk[e.Offset:e.Offset+e.Length]), "%s: data at %v", what, e)
		}
		end = e.Offset + e.Length
	}
	require.True(t, zero(disk[end:]), "%s: data behind %d", what, end)
}

func TestWriterIsDeterministic(t *testing.T) {
	r := rand.New(rand.NewPCG(seed(t), 0))
	disk := sparseDisk(r, 3<<20)
	one := encode(t, r, disk, &StreamOptions{Workers: 1})
	same(t, one, encode(t, r, disk, &StreamOptions{Workers: 7}), "seven workers")
}

func TestWriterRefuses(t *testing.T) {
	w, err := NewStreamWriter(io.Discard, 1000, nil)
	require.NoError(t, err)
	require.Equal(t, int64(1024), w.Size())
	_, err = w.WriteAt(make([]byte, 10), 1020)
	require.ErrorIs(t, err, ErrBounds)
	_, err = w.WriteAt([]byte{1}, 5)
	require.NoError(t, err)
	_, err = w.WriteAt([]byte{1}, 5)
	require.ErrorIs(t, err, ErrOrder)
	require.NoError(t, w.Commit())
	require.ErrorIs(t, w.Commit(), ErrClosed)
	require.NoError(t, w.Close())
	for _, size := range []int64{-1, MaxSize + 1} {
		_, err = NewStreamWriter(io.Discard, size, nil)
		require.ErrorIs(t, err, ErrSize)
	}
	for _, o := range []StreamOptions{{Name: "a\"b"}, {CID: NoParent}, {CID: NoParent - 1}, {Level: 10}, {Level: -1}} {
		_, err = NewStreamWriter(io.Discard, 0, &o)
		require.ErrorIs(t, err, errors.ErrUnsupported, "%+v", o)
	}
}

// limited fails after n bytes.
type limited struct{ n int }

var errFull = errors.New("full")

func (l *limited) Write(p []byte) (int, error) {
	if l.n -= len(p); l.n < 0 {
		return max(0, len(p)+l.n), errFull
	}
	return len(p), nil
}

func TestWriterReportsAFailingStream(t *testing.T) {
	r := rand.New(rand.NewPCG(seed(t), 0))
	disk := sparseDisk(r, 2<<20)
	whole := len(encode(t, r, disk, nil))
	for n := 0; n < whole; n += 1 + r.IntN(whole/20) {
		w, err := NewStreamWriter(&limited{n: n}, int64(len(disk)), nil)
		if err == nil {
			_, err = w.WriteAt(disk, 0)
			if err == nil {
				err = w.Commit()
			}
			require.ErrorIs(t, w.Commit(), errFull)
			require.NoError(t, w.Close())
		}
		require.ErrorIs(t, err, errFull, "%d of %d bytes", n, whole)
	}
}

func TestCreateStream(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.vmdk")
	w, err := CreateStream(path, 1<<20, nil)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	_, err = os.Stat(path + PartialSuffix)
	require.ErrorIs(t, err, os.ErrNotExist)
	w, err = CreateStream(path, 1<<20, nil)
	require.NoError(t, err)
	_, err = w.WriteAt([]byte("x"), 70000)
	require.NoError(t, err)
	require.NoError(t, w.Commit())
	require.NoError(t, w.Close())
	d, err := openPath(t, path, nil)
	require.NoError(t, err)
	require.Equal(t, byte('x'), readAll(t, d)[70000])
	_, err = CreateStream(path, 1<<20, nil)
	require.ErrorIs(t, err, os.ErrExist)
}

// TestNoShorterStreamIsAccepted cuts a stream at every sector and around it.
func TestNoShorterStreamIsAccepted(t *testing.T) {
	r := rand.New(rand.NewPCG(seed(t), 0))
	stream := encode(t, r, smallDisk(r), nil)
	for n := 0; n < len(stream); n += 512 {
		for _, cut := range []int{n, n + 1, n + 511} {
			_, err := decode(stream[:cut], nil)
			require.ErrorIs(t, err, ErrTruncated, "cut at %d of %d", cut, len(stream))
		}
	}
}

// TestDamagedStreams takes away sectors and shifts them.
func TestDamagedStreams(t *testing.T) {
	r := rand.New(rand.NewPCG(seed(t), 0))
	stream := encode(t, r, smallDisk(r), nil)
	for at := writeOverhead; at < len(stream); at += 512 {
		without := append(bytes.Clone(stream[:at]), stream[at+512:]...)
		_, err := decode(without, nil)
		require.ErrorIs(t, err, ErrCorrupt, "without the sector at %d of %d", at, len(stream))
		shifted := append(append(bytes.Clone(stream[:at]), 7), stream[at:]...)
		_, err = decode(shifted, nil)
		require.ErrorIs(t, err, ErrCorrupt, "shifted at %d of %d", at, len(stream))
	}
	_, err := decode(append(bytes.Clone(stream), 0, 0, 0), nil)
	require.NoError(t, err, "zeros behind the end")
	_, err = decode(append(bytes.Clone(stream), 0, 0, 1), nil)
	require.ErrorIs(t, err, ErrCorrupt)
	_, err = decode(append(bytes.Clone(stream), 0), &DecoderOptions{Size: int64(len(stream))})
	require.ErrorIs(t, err, ErrDigest)
	_, err = decode(stream, &DecoderOptions{SHA1: make([]byte, 20)})
	require.ErrorIs(t, err, ErrDigest)
}

// edit returns stream with a change.
func edit(stream []byte, f func(b []byte)) []byte {
	b := bytes.Clone(stream)
	f(b)
	return b
}

func TestHostileStreams(t *testing.T) {
	disk := bytes.Repeat([]byte("data"), 40<<10) // 2.5 grains
	stream := encode(t, rand.New(rand.NewPCG(1, 1)), disk, nil)
	le := binary.LittleEndian
	first := writeOverhead
	second := first + int(roundUp(12+int64(le.Uint32(stream[first+8:])), 512))
	end := len(stream)
	for name, b := range map[string][]byte{
		"magic":              edit(stream, func(b []byte) { b[0] = 'X' }),
		"capacity":           edit(stream, func(b []byte) { le.PutUint64(b[12:], 1<<62) }),
		"capacity wraps":     edit(stream, func(b []byte) { le.PutUint64(b[12:], 1<<55) }),
		"grain":              edit(stream, func(b []byte) { le.PutUint64(b[20:], 127) }),
		"huge grain":         edit(stream, func(b []byte) { le.PutUint64(b[20:], 1<<40) }),
		"no grain":           edit(stream, func(b []byte) { le.PutUint64(b[20:], 0) }),
		"tables":             edit(stream, func(b []byte) { le.PutUint32(b[44:], 1<<31) }),
		"no tables":          edit(stream, func(b []byte) { le.PutUint32(b[44:], 0) }),
		"descriptor":         edit(stream, func(b []byte) { le.PutUint64(b[36:], 1<<50) }),
		"descriptor outside": edit(stream, func(b []byte) { le.PutUint64(b[28:], 127) }),
		"overhead":           edit(stream, func(b []byte) { le.PutUint64(b[64:], 1<<50) }),
		"line ends":          edit(stream, func(b []byte) { b[74] = '\n' }),
		"lba outside":        edit(stream, func(b []byte) { le.PutUint64(b[first:], 128*3) }),
		"lba wraps":          edit(stream, func(b []byte) { le.PutUint64(b[first:], 1<<63) }),
		"lba within a grain": edit(stream, func(b []byte) { le.PutUint64(b[second:], 129) }),
		"grain twice":        edit(stream, func(b []byte) { le.PutUint64(b[second:], 0) }),
		"huge compressed":    edit(stream, func(b []byte) { le.PutUint32(b[first+8:], 1<<31) }),
		"short compressed":   edit(stream, func(b []byte) { le.PutUint32(b[first+8:], 20) }),
		"checksum":           edit(stream, func(b []byte) { b[first+11+int(le.Uint32(b[first+8:]))] ^= 1 }),
		"compressed bit":     edit(stream, func(b []byte) { b[first+40] ^= 4 }),
		"marker type":        edit(stream, func(b []byte) { le.PutUint32(b[end-512+12:], 9) }),
		"end announces":      edit(stream, func(b []byte) { b[end-512] = 1 }),
		"footer size":        edit(stream, func(b []byte) { b[end-1536] = 2 }),
		"footer other":       edit(stream, func(b []byte) { b[end-1024+12]++ }),
		"footer no gd":       edit(stream, func(b []byte) { le.PutUint64(b[end-1024+56:], gdAtEnd) }),
		"footer wrong gd":    edit(stream, func(b []byte) { b[end-1024+56]++ }),
		"footer missing":     append(bytes.Clone(stream[:end-1536]), make([]byte, 512)...),
		"ends at once":       append(bytes.Clone(stream[:first]), make([]byte, 512)...),
	} {
		_, err := decode(b, nil)
		var e *Error
		require.ErrorAs(t, err, &e, name)
		if !errors.Is(err, ErrCorrupt) {
			require.ErrorIs(t, err, errors.ErrUnsupported, name)
		}
	}
}

func TestDecoderEndsWithItsCallback(t *testing.T) {
	stream := encode(t, rand.New(rand.NewPCG(1, 1)), bytes.Repeat([]byte("data"), 1<<20), nil)
	d, err := NewDecoder(iotest.HalfReader(bytes.NewReader(stream)), nil)
	require.NoError(t, err)
	require.Equal(t, int64(4<<20), d.Size())
	require.Equal(t, "streamOptimized", d.Descriptor().CreateType)
	require.Equal(t, uint32(defaultCID), d.Descriptor().CID)
	mine := errors.New("mine")
	require.Equal(t, mine, d.Decode(context.Background(), func(int64, []byte) error { return mine }))
	var e *Error
	require.ErrorAs(t, d.Decode(context.Background(), nil), &e)
	require.ErrorIs(t, e, ErrClosed)

	d, err = NewDecoder(bytes.NewReader(stream), nil)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	err = d.Decode(ctx, func(int64, []byte) error { cancel(); return nil })
	require.ErrorIs(t, err, context.Canceled)

	broken := io.MultiReader(bytes.NewReader(stream[:writeOverhead+700]), iotest.ErrReader(errFull))
	d, err = NewDecoder(broken, nil)
	require.NoError(t, err)
	err = d.Decode(context.Background(), func(int64, []byte) error { return nil })
	require.ErrorIs(t, err, errFull)
	require.NotErrorIs(t, err, ErrCorrupt)
}
