package vmdk

import "encoding/binary"

// frontTables are the grain directory and the tables of a stream that has them ahead of its
// grains, as qemu-img writes it. Such a stream need not mark its end: the tables say where each
// grain lies, so they say when all have come.
type frontTables struct {
	h    *header
	at   int64  // where b begins in the stream
	b    []byte // directory and tables, up to the first grain
	want int64  // grains that the tables name
	seen int64  // grains that came
}

// newFrontTables checks b, which begins at offset at of the stream and holds the whole directory.
// The tables must follow each other, so that there is no more to walk through than came.
func newFrontTables(h *header, at int64, b []byte) (*frontTables, error) {
	f := &frontTables{h: h, at: at, b: b}
	free := h.gdEntries() * 4
	for i := range h.gdEntries() {
		off := f.table(i)
		if off < 0 {
			continue
		}
		if off < free || off > int64(len(b))-h.gtes*4 {
			return nil, corrupt("grain table %d at %d, which is not between the one before and the grains", i, at+off)
		}
		free = off + h.gtes*4
		for k := i * h.gtes; k < min((i+1)*h.gtes, h.grains()); k++ {
			if f.entry(k) != 0 {
				f.want++
			}
		}
	}
	return f, nil
}

// table returns where table i begins in b, a negative number if nowhere.
func (f *frontTables) table(i int64) int64 {
	dir := int64(binary.LittleEndian.Uint32(f.b[i*4:]))
	if dir == 0 {
		return -1
	}
	return max(0, dir*sector-f.at) // 0 is the directory, and refused
}

// entry returns where grain i begins in the stream, 0 for nowhere.
func (f *frontTables) entry(i int64) int64 {
	off := f.table(i / f.h.gtes)
	if off < 0 {
		return 0
	}
	return gte(f.h, f.b[off+i%f.h.gtes*4:]) * sector
}

// gte returns the sector of the grain whose entry b begins with, 0 for a hole or a grain that is
// said to be zeros.
func gte(h *header, b []byte) int64 {
	e := binary.LittleEndian.Uint32(b)
	if e == 1 && h.zeroGrain {
		return 0
	}
	return int64(e)
}

// admit checks a grain against its entry.
func (f *frontTables) admit(i, at int64) error {
	if e := f.entry(i); e != at {
		return corrupt("grain %d at %d, its table says %d", i, at, e)
	}
	f.seen++
	return nil
}

// complete says whether each grain that the tables name has come.
func (f *frontTables) complete() error {
	if f.seen != f.want {
		return missingGrains(f.seen, f.want)
	}
	return nil
}
