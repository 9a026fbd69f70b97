package vmdk

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestMovedGrain changes where a grain belongs, and what tables and directory say. The checksums of
// the grains stay right, and the order ascends.
func TestMovedGrain(t *testing.T) {
	r := rand.New(rand.NewPCG(seed(t), 0))
	stream := encode(t, r, smallDisk(r), nil) // grain 2 is a hole
	le := binary.LittleEndian
	gd := int(le.Uint64(stream[len(stream)-1024+56:])) * 512
	gt := int(le.Uint32(stream[gd:])) * 512
	third := int(le.Uint32(stream[gt+3*4:])) * 512
	require.Equal(t, uint64(3*128), le.Uint64(stream[third:]))
	require.Zero(t, le.Uint32(stream[gt+2*4:]))
	for name, b := range map[string][]byte{
		"grain moved":         edit(stream, func(b []byte) { le.PutUint64(b[third:], 2*128) }),
		"entry elsewhere":     edit(stream, func(b []byte) { b[gt]++ }),
		"entry lost":          edit(stream, func(b []byte) { clear(b[gt : gt+4]) }),
		"entry of a hole":     edit(stream, func(b []byte) { copy(b[gt+2*4:], b[gt:gt+4]) }),
		"entry behind all":    edit(stream, func(b []byte) { b[gt+6*4] = 1 }),
		"directory lost":      edit(stream, func(b []byte) { clear(b[gd : gd+4]) }),
		"directory elsewhere": edit(stream, func(b []byte) { b[gd]++ }),
		"marker not a table":  edit(stream, func(b []byte) { b[gt-512+12] = 2 }),
	} {
		_, err := decode(b, nil)
		require.ErrorIs(t, err, ErrCorrupt, name)
	}
}

// TestSlackOfAGrain puts bytes where a stream has none: behind the compressed data, inside the length
// that the marker claims and outside of it.
func TestSlackOfAGrain(t *testing.T) {
	stream := tinyStream(t, false)
	le := binary.LittleEndian
	const first = 2 * sector
	size := int(le.Uint32(stream[first+8:]))
	require.Less(t, 12+size+4, sector)
	inside := edit(stream, func(b []byte) { // the checksum moves on by one
		le.PutUint32(b[first+8:], uint32(size+1))
		copy(b[first+12+size-3:first+12+size+1], b[first+12+size-4:first+12+size])
	})
	for name, b := range map[string][]byte{
		"inside": inside, "outside": edit(stream, func(b []byte) { b[first+sector-1] = 1 }),
	} {
		_, err := decode(b, nil)
		require.ErrorIs(t, err, ErrCorrupt, name)
	}
	d, err := Open(bytes.NewReader(inside), int64(len(inside)), nil)
	require.NoError(t, err)
	_, err = d.ReadAt(make([]byte, 1), 0)
	require.ErrorIs(t, err, ErrCorrupt)
}

func TestFrontTables(t *testing.T) {
	h := &header{size: 3*4*512 - 512, grain: 512, gtes: 4} // three tables, the last grain is missing
	const at = 1024
	table := func(dir [3]uint32, entries ...uint32) []byte {
		b := make([]byte, 2048)
		for i, e := range dir {
			binary.LittleEndian.PutUint32(b[i*4:], e)
		}
		for i, e := range entries {
			binary.LittleEndian.PutUint32(b[512+i/4*512+i%4*4:], e)
		}
		return b
	}
	f, err := newFrontTables(h, at, table([3]uint32{3, 0, 4}, 9, 0, 10, 11, 12, 0, 0, 77))
	require.NoError(t, err)
	require.Equal(t, int64(4), f.want, "77 belongs to no grain")
	require.ErrorIs(t, f.admit(1, 9*512), ErrCorrupt)
	require.ErrorIs(t, f.admit(5, 9*512), ErrCorrupt)
	for i, e := range map[int64]int64{0: 9, 2: 10, 3: 11, 8: 12} {
		require.ErrorIs(t, f.complete(), ErrTruncated)
		require.NoError(t, f.admit(i, e*512))
	}
	require.NoError(t, f.complete())
	for _, dir := range [][3]uint32{{3, 3}, {4, 3}, {1}, {2}, {6}, {1 << 31}} {
		_, err := newFrontTables(h, at, table(dir))
		require.ErrorIs(t, err, ErrCorrupt, "%v", dir)
	}
}

// TestClaimsCostNothing opens what claims to be large and is not.
func TestClaimsCostNothing(t *testing.T) {
	stream := encode(t, rand.New(rand.NewPCG(1, 1)), make([]byte, 1<<20), nil)
	le := binary.LittleEndian
	claim := func(f func(h []byte)) []byte {
		return edit(stream, func(b []byte) {
			f(b[:512])
			f(b[len(b)-1024:])
		})
	}
	bare := func(h []byte) { clear(h[28:44]) } // without a descriptor, whose size would not fit
	for name, b := range map[string][]byte{
		"disk": claim(func(h []byte) { bare(h); le.PutUint64(h[12:], MaxSize/512) }),
		"grains": claim(func(h []byte) {
			bare(h)
			le.PutUint64(h[12:], MaxSize/512)
			le.PutUint64(h[20:], maxGrain/512)
		}),
		"front tables": claim(func(h []byte) {
			bare(h)
			le.PutUint64(h[12:], MaxSize/512)
			le.PutUint64(h[56:], 1)
			le.PutUint64(h[64:], maxOverhead/512)
		}),
		"descriptor": claim(func(h []byte) { le.PutUint64(h[36:], maxDescriptor/512); le.PutUint64(h[64:], maxOverhead/512) }),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := drain(b)
		runtime.ReadMemStats(&after)
		require.ErrorIs(t, err, ErrCorrupt, name)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(4<<20), "%s: decoder", name)

		runtime.ReadMemStats(&before)
		_, err = Open(bytes.NewReader(b), int64(len(b)), nil)
		runtime.ReadMemStats(&after)
		require.ErrorIs(t, err, ErrCorrupt, name)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(4<<20), "%s: disk", name)
	}
}

// drain decodes without making the disk.
func drain(stream []byte) (int64, error) {
	d, err := NewDecoder(bytes.NewReader(stream), nil)
	if err != nil {
		return 0, err
	}
	err = d.Decode(context.Background(), func(int64, []byte) error { return nil })
	return d.DataBytes(), err
}

// endless gives zeros, and calls stop after a while.
type endless struct {
	n    int
	stop func()
}

func (e *endless) Read(p []byte) (int, error) {
	if e.n++; e.n == 100 {
		e.stop()
	}
	clear(p)
	return len(p), nil
}

// TestEndlessZeros ends only by its context, or by the length that is expected.
func TestEndlessZeros(t *testing.T) {
	stream := encode(t, rand.New(rand.NewPCG(1, 1)), make([]byte, 1<<20), nil)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	d, err := NewDecoder(io.MultiReader(bytes.NewReader(stream), &endless{stop: cancel}), nil)
	require.NoError(t, err)
	require.ErrorIs(t, d.Decode(ctx, nil), context.Canceled)
	d, err = NewDecoder(io.MultiReader(bytes.NewReader(stream), &endless{stop: func() {}}), &DecoderOptions{Size: int64(len(stream))})
	require.NoError(t, err)
	require.ErrorIs(t, d.Decode(context.Background(), nil), ErrDigest)
}

// TestRemainsOfADescriptor has what qemu leaves when a content ID becomes shorter: the end of the
// text that was there before.
func TestRemainsOfADescriptor(t *testing.T) {
	const head, tail = "# Disk DescriptorFile\nversion=1\n", "\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW 8 ZERO\nddb.a = \"1\"\n"
	b := make([]byte, 4096)
	for _, cid := range []string{"CID=12345678", "CID=123", "CID=1234567", "CID=1", "CID=12", "CID=12345678", "CID=1"} {
		copy(b, head+cid+tail+"\x00")
		d, err := ParseDescriptor(b)
		require.NoError(t, err, cid)
		require.Equal(t, int64(4096), d.Size())
		require.Len(t, d.DDB, 1)
	}
	text := head + "CID=1" + tail
	for _, behind := range []string{"x", "\n\x00x", "RW 8 ZERO\n", text} {
		_, err := ParseDescriptor([]byte(text + "\x00" + behind))
		require.ErrorIs(t, err, ErrCorrupt, "%q", behind)
	}
}
