package vmdk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

// cowd is a delta of 8 grains of 4 KiB less 512 bytes; grains 1 and 2 lie in it in reverse order,
// and so does the last, cut where the disk ends.
func cowd() (image, disk []byte) {
	const grain = 4096
	size := 8*grain - 512
	b := make([]byte, 2048+4096*4)
	le := binary.LittleEndian
	copy(b, "COWD")
	le.PutUint32(b[4:], 1)
	le.PutUint32(b[12:], uint32(size/512))
	le.PutUint32(b[16:], grain/512)
	le.PutUint32(b[20:], 2)
	le.PutUint32(b[24:], 1)
	le.PutUint32(b[1024:], 4)
	disk = make([]byte, size)
	for _, g := range []int{2, 1, 7} {
		le.PutUint32(b[2048+g*4:], uint32(len(b)/512))
		p := disk[g*grain : min(size, (g+1)*grain)]
		for i := range p {
			p[i] = byte(g + i)
		}
		b = append(b, p...)
	}
	return b, disk
}

func TestCOWD(t *testing.T) {
	image, disk := cowd()
	d, err := Open(bytes.NewReader(image), int64(len(image)), nil)
	require.NoError(t, err)
	same(t, disk, readAll(t, d), "COWD")
	var got []Extent
	for e, err := range d.Extents() {
		require.NoError(t, err)
		got = append(got, e)
	}
	require.Equal(t, []Extent{{Offset: 4096, Length: 8192}, {Offset: 7 * 4096, Length: 3584}}, got)
	_, err = d.ReadAt(make([]byte, 1), -1)
	require.ErrorIs(t, err, ErrBounds)
	_, err = d.ReadAt(make([]byte, 1), d.Size())
	require.Equal(t, io.EOF, err)
	for n := 0; n < len(image); n += 101 {
		cut, err := Open(bytes.NewReader(image[:n]), int64(n), nil)
		if err == nil {
			_, err = cut.ReadAt(make([]byte, len(disk)), 0)
		}
		require.ErrorIs(t, err, ErrCorrupt, "cut at %d", n)
	}
}

func TestChain(t *testing.T) {
	image, delta := cowd()
	base := bytes.Repeat([]byte("base"), len(delta)/4)
	open := func(name string) (io.ReaderAt, int64, error) {
		b := map[string][]byte{"base-flat.vmdk": append(make([]byte, 512), base...), "delta.vmdk": image}[name]
		return bytes.NewReader(b), int64(len(b)), nil
	}
	text := func(cid, parent uint32, line string) *Descriptor {
		d, err := ParseDescriptor(fmt.Appendf(nil, "# Disk DescriptorFile\nversion=1\nCID=%08x\nparentCID=%08x\n"+
			"createType=\"vmfs\"\nparentFileNameHint=\"base.vmdk\"\n%s\nddb.uuid = \"60 00\"\n", cid, parent, line))
		require.NoError(t, err)
		return d
	}
	parent, err := OpenDisk(text(1, NoParent, `RW 63 VMFS "base-flat.vmdk" 1`), open, nil)
	require.NoError(t, err)
	same(t, base, readAll(t, parent), "base")
	child := text(2, 1, `RW 63 VMFSSPARSE "delta.vmdk"`)
	d, err := OpenDisk(child, open, parent)
	require.NoError(t, err)
	want := bytes.Clone(base)
	copy(want[4096:3*4096], delta[4096:])
	copy(want[7*4096:], delta[7*4096:])
	same(t, want, readAll(t, d), "delta")
	var got []Extent
	for e, err := range d.Extents() {
		require.NoError(t, err)
		got = append(got, e)
	}
	require.Equal(t, []Extent{{Length: 8*4096 - 512}}, got)
	_, err = OpenDisk(child, open, nil)
	require.ErrorIs(t, err, ErrParent)
	_, err = OpenDisk(text(2, 3, `RW 63 VMFSSPARSE "delta.vmdk"`), open, parent)
	require.ErrorIs(t, err, ErrParent)
	_, err = OpenDisk(text(1, NoParent, `RW 64 VMFS "base-flat.vmdk" 1`), open, nil)
	require.ErrorIs(t, err, ErrTruncated)
	_, err = OpenDisk(text(1, NoParent, `RW 64 VMFSSPARSE "delta.vmdk"`), open, nil)
	require.ErrorIs(t, err, ErrCorrupt)
	_, err = OpenDisk(text(1, NoParent, `RW 64 SESPARSE "delta.vmdk"`), open, nil)
	require.ErrorIs(t, err, errors.ErrUnsupported)

	split, err := OpenDisk(text(1, NoParent, "RW 2 VMFS \"base-flat.vmdk\" 1\nRW 0 ZERO\nRW 3 ZERO\nRW 5 VMFS \"base-flat.vmdk\" 2"), open, nil)
	require.NoError(t, err)
	want = append(append(bytes.Clone(base[:1024]), make([]byte, 1536)...), base[512:512+2560]...)
	same(t, want, readAll(t, split), "split")
	checkExtents(t, split, want, "split")
}

func TestRandomReads(t *testing.T) {
	r := rand.New(rand.NewPCG(seed(t), 0))
	disk := sparseDisk(r, 5<<20+512)
	stream := encode(t, r, disk, nil)
	d, err := Open(bytes.NewReader(stream), int64(len(stream)), nil)
	require.NoError(t, err)
	for range 300 {
		off := r.IntN(len(disk))
		p := make([]byte, 1+r.IntN(200<<10))
		n, err := d.ReadAt(p, int64(off))
		if off+len(p) > len(disk) {
			require.Equal(t, io.EOF, err)
			require.Equal(t, len(disk)-off, n)
		} else {
			require.NoError(t, err)
		}
		same(t, disk[off:off+n], p[:n], fmt.Sprintf("%d at %d", n, off))
	}
}

func TestHostileTables(t *testing.T) {
	disk := bytes.Repeat([]byte("data"), 40<<10) // three grains, one table
	stream := encode(t, rand.New(rand.NewPCG(1, 1)), disk, nil)
	le := binary.LittleEndian
	gd := int(le.Uint64(stream[len(stream)-1024+56:])) * 512
	gt := int(le.Uint32(stream[gd:])) * 512
	for name, b := range map[string][]byte{
		"directory outside": edit(stream, func(b []byte) { le.PutUint64(b[len(b)-1024+56:], 1<<40) }),
		"directory wraps":   edit(stream, func(b []byte) { le.PutUint64(b[len(b)-1024+56:], 1<<62) }),
		"table outside":     edit(stream, func(b []byte) { le.PutUint32(b[gd:], 1<<31) }),
		"table is itself":   edit(stream, func(b []byte) { le.PutUint32(b[gd:], uint32(gd/512)) }),
		"grain outside":     edit(stream, func(b []byte) { le.PutUint32(b[gt:], 1<<31) }),
		"grain in header":   edit(stream, func(b []byte) { le.PutUint32(b[gt:], 1) }),
		"grain of another":  edit(stream, func(b []byte) { copy(b[gt:gt+4], b[gt+4:gt+8]) }),
		"grain is table":    edit(stream, func(b []byte) { le.PutUint32(b[gt:], uint32(gt/512)) }),
		"capacity":          edit(stream, func(b []byte) { le.PutUint64(b[12:], 1<<36) }),
	} {
		d, err := Open(bytes.NewReader(b), int64(len(b)), nil)
		if err == nil {
			_, err = d.ReadAt(make([]byte, len(disk)), 0)
		}
		require.ErrorIs(t, err, ErrCorrupt, name)
	}
}

func TestDescriptor(t *testing.T) {
	d := &Descriptor{
		CID: 0x1234, ParentCID: NoParent, CreateType: "twoGbMaxExtentFlat", ParentHint: "",
		Extents: []ExtentLine{
			{Access: "RW", Size: 1024, Type: "FLAT", Name: "a b-f001.vmdk", Offset: 512},
			{Access: "RDONLY", Size: 512, Type: "ZERO"},
			{Access: "RW", Size: 512, Type: "SPARSE", Name: "ü.vmdk"},
		},
		DDB: map[string]string{"ddb.adapterType": "lsilogic"},
	}
	text, err := d.Marshal()
	require.NoError(t, err)
	got, err := ParseDescriptor(append(text, 0, 0))
	require.NoError(t, err)
	require.Equal(t, d, got)
	const head = "# Disk DescriptorFile\nversion=1\nCID=1\ncreateType=\"x\"\n"
	for _, bad := range []string{
		"", "version=1\n", "# Disk DescriptorFile\n", head + "CID=2\n", head + "what\n", head + "\x00x",
		head + "RW -1 FLAT \"a\" 0\n", head + "RW 1 FLAT\n", head + "RW 1 FLAT \"a\n", head + "RW 1 FLAT \"\" 0\n",
		head + "RW 99999999999999999999 FLAT \"a\" 0\n", head + "RW 1 FLAT \"a\" 9223372036854775807\n",
		head + "RW 1 FLAT \"a\" 0 0\n", head + "parentCID=fffffffff\n", head + "a=\"b\"c\"\n",
		head + "RW 137438953472 ZERO\nRW 1 ZERO\n",
	} {
		_, err := ParseDescriptor([]byte(bad))
		require.ErrorIs(t, err, ErrCorrupt, "%q", bad)
	}
	_, err = (&Descriptor{CreateType: "a\nb"}).Marshal()
	require.ErrorIs(t, err, errors.ErrUnsupported)
}
