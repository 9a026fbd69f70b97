package digest

import "github.com/holdfast-backup/holdfast/repository"

// Tree builds the digest tree of a disk from its leaves, in memory for one
// segment. What is never put is zeros. It is not safe for concurrent use.
type Tree struct {
	h       *Hasher
	root    *Root
	size    int64
	segment int64
	leaves  []repository.Digest // of segment; nil: none was put
}

// Tree begins the tree of a disk of size bytes.
func (h *Hasher) Tree(size int64) *Tree {
	return &Tree{h: h, root: h.Root(size), size: size}
}

// SegmentLen returns how many leaves a segment of a disk has.
func SegmentLen(size, segment int64) int {
	span := min(size-segment*SegmentSpan, SegmentSpan)
	return int((span + repository.LeafSize - 1) / repository.LeafSize)
}

// Put adds the leaves of the bytes from off, which is a multiple of
// repository.LeafSize. Offsets ascend.
func (t *Tree) Put(off int64, leaves []repository.Digest) {
	for len(leaves) > 0 {
		if s := off / SegmentSpan; s != t.segment || t.leaves == nil {
			t.flush()
			t.segment = s
			t.leaves = make([]repository.Digest, SegmentLen(t.size, s))
		}
		n := copy(t.leaves[off%SegmentSpan/repository.LeafSize:], leaves)
		leaves = leaves[n:]
		off += int64(n) * repository.LeafSize
	}
}

func (t *Tree) flush() {
	if t.leaves != nil {
		t.root.Add(t.segment, t.h.Segment(t.leaves))
		t.leaves = nil
	}
}

// Sum returns the root. The Tree is used up.
func (t *Tree) Sum() repository.Digest {
	t.flush()
	return t.root.Sum()
}
