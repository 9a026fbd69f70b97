package vmdk

import (
	"encoding/binary"
	"hash/maphash"
	"math"
)

// backTables compare the grain tables and the directory that follow the grains of a stream with
// the grains that came: a marker whose address was damaged moves a grain, and no checksum covers
// it. They keep a hash of each table with grains and of each table that came, in whatever order.
type backTables struct {
	h    *header
	seed maphash.Seed
	cur  []byte // the table of the last grain, as it must be
	at   int64  // its index, -1 for none
	none uint64 // hash of a table without grains
	want map[int64]uint64
	came map[int64]uint64 // by sector
	far  bool             // grains or tables lie where no entry can name them: nothing is compared
}

func newBackTables(h *header) backTables {
	b := backTables{
		h: h, seed: maphash.MakeSeed(), cur: make([]byte, h.gtes*4), at: -1,
		want: map[int64]uint64{}, came: map[int64]uint64{},
	}
	b.none = maphash.Bytes(b.seed, b.cur)
	return b
}

// grain takes note of grain i, at offset off of the stream. Grains ascend.
func (b *backTables) grain(i, off int64) {
	if i/b.h.gtes != b.at {
		b.turn()
		b.at = i / b.h.gtes
	}
	b.far = b.far || off > math.MaxUint32*sector
	binary.LittleEndian.PutUint32(b.cur[i%b.h.gtes*4:], uint32(off/sector))
}

// turn ends the table being built.
func (b *backTables) turn() {
	if b.at >= 0 {
		b.want[b.at] = maphash.Bytes(b.seed, b.cur)
		clear(b.cur)
		b.at = -1
	}
}

// table takes note of a table at offset off of the stream. It changes t.
func (b *backTables) table(off int64, t []byte) {
	for i := 0; i < len(t); i += 4 {
		if gte(b.h, t[i:]) == 0 {
			clear(t[i : i+4])
		}
	}
	b.far = b.far || off > math.MaxUint32*sector
	b.came[off/sector] = maphash.Bytes(b.seed, t)
}

// entry checks entry i of the directory, when all grains and tables have come.
func (b *backTables) entry(i int64, e uint32) error {
	b.turn()
	if b.far {
		return nil
	}
	want, grains := b.want[i]
	if !grains {
		want = b.none
	}
	got, came := b.came[int64(e)]
	switch {
	case e == 0 && !grains:
		return nil
	case e == 0 || !came:
		return corrupt("the grain directory has table %d at sector %d, where none came", i, e)
	case got != want:
		return corrupt("grain table %d does not name the grains that came", i)
	}
	return nil
}
