package backup

import (
	"math/bits"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

// blockSet says which blocks of a disk have to be stored: two bits a block, so
// that a disk of 64 TiB in blocks of 1 MiB takes 16 MiB, whatever its extents.
type blockSet struct {
	size      int64 // of the disk, bytes
	blockSize int64
	data      []uint64 // to be read
	zero      []uint64 // known to be zeros from end to end
	run       hypervisor.Extent
}

func newBlockSet(size int64, blockSize int) *blockSet {
	words := (repository.Blocks(size, blockSize) + 63) / 64
	return &blockSet{size: size, blockSize: int64(blockSize), data: make([]uint64, words), zero: make([]uint64, words)}
}

// add marks what an extent touches. Extents come in ascending order. Neighbouring
// zero extents count as one: a block is zero only if they cover it whole, else
// the rest of it has to be read.
func (s *blockSet) add(e hypervisor.Extent) {
	if e.Zero {
		if s.run.Length > 0 && s.run.End() == e.Offset {
			s.run.Length += e.Length
			return
		}
		s.flush()
		s.run = e
		return
	}
	s.flush()
	s.mark(s.data, e.Offset/s.blockSize, (e.End()-1)/s.blockSize)
}

// flush ends the run of zero extents. It is called once after the last add.
func (s *blockSet) flush() {
	e := s.run
	s.run = hypervisor.Extent{}
	if e.Length == 0 {
		return
	}
	first, last := e.Offset/s.blockSize, (e.End()-1)/s.blockSize
	if e.Offset%s.blockSize != 0 {
		s.mark(s.data, first, first)
		first++
	}
	if e.End()%s.blockSize != 0 && e.End() != s.size && last >= first {
		s.mark(s.data, last, last)
		last--
	}
	if last >= first {
		s.mark(s.zero, first, last)
	}
}

func (s *blockSet) mark(set []uint64, first, last int64) {
	for i := first; i <= last; {
		if i%64 == 0 && last-i >= 63 {
			set[i/64] = ^uint64(0)
			i += 64
			continue
		}
		set[i/64] |= 1 << (i % 64)
		i++
	}
}

// next returns the first marked block at or after index, and whether it is known
// to be zeros; -1 if there is none.
func (s *blockSet) next(index int64) (block int64, zero bool) {
	for w := index / 64; w < int64(len(s.data)); w++ {
		m := s.data[w] | s.zero[w]
		if w == index/64 {
			m &= ^uint64(0) << (index % 64)
		}
		if m != 0 {
			i := int64(bits.TrailingZeros64(m))
			return w*64 + i, s.data[w]&(1<<i) == 0
		}
	}
	return -1, false
}
