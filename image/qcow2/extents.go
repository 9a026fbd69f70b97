package qcow2

import (
	"encoding/binary"
	"iter"
)

// Extent is a byte range of the disk.
type Extent struct {
	Offset, Length int64
	Zero           bool // said to be zeros; false: may hold data
}

// Extents yields the allocated ranges of the disk, ascending and disjoint: those that may hold
// data and, marked, those that are explicitly zero. Everything else reads as zeros too. Ranges of
// one sort that touch are joined. An error comes last and voids what was yielded before. It
// may be called concurrently, and the result consumed more than once.
func (m *Image) Extents() iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		cs, n := m.h.clusterSize(), m.h.l2Entries()
		var cur Extent
		for i, e := range m.l1 {
			t, err := m.table(e)
			if err != nil {
				yield(Extent{}, &Error{Op: "extents", Off: int64(i) * n * cs, Err: err})
				return
			}
			if t == nil {
				continue
			}
			for k := range n {
				off := (int64(i)*n + k) * cs
				if off >= m.h.size {
					break
				}
				pl, err := m.decode(binary.BigEndian.Uint64(t[k*8:]))
				if err != nil {
					yield(Extent{}, &Error{Op: "extents", Off: off, Err: err})
					return
				}
				if pl.kind == hole {
					continue
				}
				next := Extent{Offset: off, Length: min(cs, m.h.size-off), Zero: pl.kind == zero}
				if cur.Length > 0 && cur.Offset+cur.Length == off && cur.Zero == next.Zero {
					cur.Length += next.Length
					continue
				}
				if cur.Length > 0 && !yield(cur, nil) {
					return
				}
				cur = next
			}
		}
		if cur.Length > 0 {
			yield(cur, nil)
		}
	}
}
