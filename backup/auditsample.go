package backup

import (
	"hash/fnv"
	"io"
	"iter"
	"math/bits"
	"math/rand/v2"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

// auditRandom is the source of one disk's sample: the same seed draws the same
// leaves whatever the other disks do.
func auditRandom(seed uint64, disk hypervisor.DiskID) *rand.Rand {
	h := fnv.New64a()
	_, _ = io.WriteString(h, string(disk)) // a hash takes everything
	return rand.New(rand.NewPCG(seed, h.Sum64()))
}

// inherited returns the blocks of word w of the set that are not stored anew.
func (s *blockSet) inherited(w int) uint64 {
	m := ^(s.data[w] | s.zero[w])
	if w == len(s.data)-1 {
		if rest := s.blocks() % 64; rest != 0 {
			m &= 1<<rest - 1
		}
	}
	return m
}

func (s *blockSet) blocks() int64 { return repository.Blocks(s.size, int(s.blockSize)) }

func (s *blockSet) leavesPerBlock() int64 { return s.blockSize / repository.LeafSize }

// inheritedLeaves returns how many leaves the blocks have that are not stored
// anew. The last block may be short of some.
func (s *blockSet) inheritedLeaves() int64 {
	var n int64
	for w := range s.data {
		n += int64(bits.OnesCount64(s.inherited(w)))
	}
	n *= s.leavesPerBlock()
	if last := s.blocks() - 1; last >= 0 && s.inherited(int(last/64))&(1<<(last%64)) != 0 {
		all := (s.size-1)/repository.LeafSize + 1
		n -= (last+1)*s.leavesPerBlock() - all
	}
	return n
}

// sample yields k of the leaves that are not stored anew, by number and
// ascending, all of them if there are no more. It draws one leaf from each of k
// equal parts: whichever leaves are wrong, that finds one of them at least as
// probably as k draws from all. It takes no memory that grows with k.
func (s *blockSet) sample(k int64, rnd *rand.Rand) iter.Seq[int64] {
	return func(yield func(int64) bool) {
		n := s.inheritedLeaves()
		if k = min(k, n); k <= 0 {
			return
		}
		c := leafCursor{s: s}
		begin, part, more := int64(0), n/k, n%k
		for i := range k {
			size := part
			if i < more {
				size++
			}
			if !yield(c.leaf(begin + rnd.Int64N(size))) {
				return
			}
			begin += size
		}
	}
}

// leafCursor finds the leaves that are not stored anew by their ordinals, which
// ascend.
type leafCursor struct {
	s     *blockSet
	word  int
	below int64 // ordinals in the words before
}

// leaf returns the number of the leaf with this ordinal, which there must be.
func (c *leafCursor) leaf(ordinal int64) int64 {
	per := c.s.leavesPerBlock()
	m := c.s.inherited(c.word)
	for here := int64(bits.OnesCount64(m)) * per; ordinal >= c.below+here; here = int64(bits.OnesCount64(m)) * per {
		c.below += here
		c.word++
		m = c.s.inherited(c.word)
	}
	ordinal -= c.below
	for range ordinal / per {
		m &= m - 1
	}
	return (int64(c.word)*64+int64(bits.TrailingZeros64(m)))*per + ordinal%per
}
