package vmdk

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

const (
	tinyGrain = 4096
	tinyGTEs  = 4
	tinySize  = 6*tinyGrain + sector

	editKinds = 7
)

// tinyDisk has two holes, and ends within a grain of its own.
func tinyDisk() []byte {
	b := make([]byte, tinySize)
	for _, g := range []int{0, 1, 3, 6} {
		p := b[g*tinyGrain : min(len(b), (g+1)*tinyGrain)]
		for i := range p {
			p[i] = byte(g + i/100)
		}
	}
	return b
}

// tinyStream is tinyDisk in two grain tables, in a few KiB, which suits fuzzing: with directory and
// tables in front of the grains, as qemu-img writes them, or behind and with a footer.
func tinyStream(t testing.TB, front bool) []byte {
	le, disk := binary.LittleEndian, tinyDisk()
	h := &header{size: tinySize, grain: tinyGrain, gtes: tinyGTEs, descOff: sector, descSize: sector, overhead: 2 * sector, gd: -1}
	if front {
		h.gd, h.overhead = 2*sector, 5*sector
	}
	d := Descriptor{CID: 1, ParentCID: NoParent, CreateType: "streamOptimized", Extents: []ExtentLine{
		{Access: "RW", Size: tinySize, Type: "SPARSE", Name: "a"},
	}}
	text, err := d.Marshal()
	require.NoError(t, err)
	require.LessOrEqual(t, len(text), sector)
	b := make([]byte, h.overhead)
	copy(b, h.encode())
	copy(b[sector:], text)
	pad := func() { b = append(b, make([]byte, roundUp(int64(len(b)), sector)-int64(len(b)))...) }
	marker := func(kind uint32) {
		b = le.AppendUint64(b, 1)
		b = le.AppendUint32(le.AppendUint32(b, 0), kind)
		pad()
	}
	var dir [2]uint32
	for i := range dir {
		var table []byte
		for k := range tinyGTEs {
			g := i*tinyGTEs + k
			p := make([]byte, tinyGrain)
			if g*tinyGrain >= len(disk) || copy(p, disk[g*tinyGrain:]) == 0 || zero(p) {
				table = le.AppendUint32(table, 0)
				continue
			}
			table = le.AppendUint32(table, uint32(len(b)/sector))
			var z bytes.Buffer
			w := zlib.NewWriter(&z)
			_, err := w.Write(p)
			require.NoError(t, err)
			require.NoError(t, w.Close())
			b = le.AppendUint64(b, uint64(g*tinyGrain/sector))
			b = append(le.AppendUint32(b, uint32(z.Len())), z.Bytes()...)
			pad()
		}
		if front {
			dir[i] = uint32(3 + i)
			copy(b[(3+i)*sector:], table)
			continue
		}
		marker(markerGT)
		dir[i] = uint32(len(b) / sector)
		b = append(b, table...)
		pad()
	}
	if front {
		le.PutUint32(b[2*sector:], dir[0])
		le.PutUint32(b[2*sector+4:], dir[1])
		return b
	}
	marker(markerGD)
	h.gd = int64(len(b))
	b = le.AppendUint32(le.AppendUint32(b, dir[0]), dir[1])
	pad()
	marker(markerFooter)
	b = append(b, h.encode()...)
	return append(b, make([]byte, sector)...)
}

// tinyCOWD is cowd without the grains beyond what fuzzing needs.
func tinyCOWD() []byte {
	b, _ := cowd()
	return b[:len(b)-2*tinyGrain]
}

// editSectors takes ops as operations with three operands each, on sectors or on fields of 4 bytes:
// those that editsField tells.
func editSectors(b, ops []byte) []byte {
	le := binary.LittleEndian
	for ; len(ops) >= 4 && len(b) >= sector && len(b) < 64<<10; ops = ops[4:] {
		n := len(b) / sector
		i, k := int(ops[1])%n, int(ops[2])%n
		field := b[i*sector+int(ops[3])%128*4:]
		switch ops[0] % editKinds {
		case 0: // swap
			var t [sector]byte
			copy(t[:], b[i*sector:])
			copy(b[i*sector:(i+1)*sector], b[k*sector:])
			copy(b[k*sector:], t[:])
		case 1: // insert a copy
			p := bytes.Clone(b[k*sector : (k+1)*sector])
			b = append(bytes.Clone(b[:i*sector]), append(p, b[i*sector:]...)...)
		case 2: // remove
			b = append(bytes.Clone(b[:i*sector]), b[(i+1)*sector:]...)
		case 3: // a field
			le.PutUint32(field, uint32(ops[2]))
		case 4: // a field of another sector
			copy(field[:4], b[k*sector+int(ops[3])%128*4:])
		case 5: // zero
			clear(b[i*sector : (i+1)*sector])
		case 6: // by one
			le.PutUint32(field, le.Uint32(field)+uint32(int8(ops[2])))
		}
	}
	return b
}

func editsField(op byte) bool {
	switch op % editKinds {
	case 3, 4, 6:
		return true
	}
	return false
}

func TestTinyStreams(t *testing.T) {
	for _, front := range []bool{false, true} {
		b := tinyStream(t, front)
		got, err := decode(b, nil)
		require.NoError(t, err)
		same(t, tinyDisk(), got, "decoded")
		d, err := Open(bytes.NewReader(b), int64(len(b)), nil)
		require.NoError(t, err)
		same(t, tinyDisk(), readAll(t, d), "read")
		for i := sector; i < len(b); i += sector { // the last cut of front takes the last grain
			_, err := decode(b[:i], nil)
			require.ErrorIs(t, err, ErrTruncated, "%v, cut at %d of %d", front, i, len(b))
		}
	}
	d, err := Open(bytes.NewReader(tinyCOWD()), int64(len(tinyCOWD())), nil)
	require.NoError(t, err)
	_, err = io.ReadAll(io.NewSectionReader(d, 0, d.Size()))
	require.ErrorIs(t, err, ErrCorrupt)
}

// TestEdits edits streams at random, as FuzzEdits does. Where one sector is moved, lost or emptied,
// what is still accepted is the same disk.
func TestEdits(t *testing.T) {
	r := rand.New(rand.NewPCG(seed(t), 0))
	streams := [][]byte{tinyStream(t, false), tinyStream(t, true)}
	for i := range 800 {
		ops := make([]byte, 4*(1+r.IntN(3)))
		for k := range ops {
			ops[k] = byte(r.Uint32())
		}
		b := editSectors(bytes.Clone(streams[i%2]), ops)
		tryStream(t, b)
		if got, err := decode(b, nil); err == nil && len(ops) == 4 && !editsField(ops[0]) {
			same(t, tinyDisk(), got, fmt.Sprintf("edited by %v", ops))
		}
	}
}
