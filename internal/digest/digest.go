// Package digest computes the keyed digest tree of a disk: leaves of
// repository.LeafSize bytes of plaintext, segments of SegmentLeaves leaves, and
// a root. Zero leaves and zero segments are elided. The tree does not depend on
// the block size of a repository, so that two stores of one disk, or a store and
// a replica, can be compared.
package digest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/repository"
)

// SegmentLeaves is how many leaves one segment digest covers.
const SegmentLeaves = SegmentSpan / repository.LeafSize

// SegmentSpan is the span of a segment in bytes: 1 GiB.
const SegmentSpan = 1 << 30

// Hasher computes digests under one key. It is safe for concurrent use.
type Hasher struct {
	leaf, segment, root sync.Pool
}

// New returns a hasher. Leaves, segments and roots are hashed under keys of
// their own, derived from key, so that no digest can stand in for another kind.
func New(key repository.DigestKey) *Hasher {
	h := &Hasher{}
	for _, p := range []struct {
		pool    *sync.Pool
		context string
	}{
		{&h.leaf, "holdfast v1 digest tree: leaf"},
		{&h.segment, "holdfast v1 digest tree: segment"},
		{&h.root, "holdfast v1 digest tree: root"},
	} {
		var sub [32]byte
		blake3.DeriveKey(p.context, key[:], sub[:])
		p.pool.New = func() any {
			k, err := blake3.NewKeyed(sub[:])
			if err != nil {
				panic(fmt.Sprintf("a 32-byte key was refused: %v", err)) // cannot happen
			}
			return k
		}
	}
	return h
}

func sum(pool *sync.Pool, write func(*blake3.Hasher)) (d repository.Digest) {
	h := pool.Get().(*blake3.Hasher)
	h.Reset()
	write(h)
	h.Sum(d[:0])
	pool.Put(h)
	if d.IsZero() {
		d[0] = 1 // the zero value is taken: it stands for zeros
	}
	return d
}

// Leaf returns the digest of one leaf, at most repository.LeafSize bytes; the
// zero digest if it holds zeros only.
func (h *Hasher) Leaf(p []byte) repository.Digest {
	if IsZero(p) {
		return repository.Digest{}
	}
	return sum(&h.leaf, func(b *blake3.Hasher) { _, _ = b.Write(p) })
}

// Leaves appends the digests of the leaves of a block to dst. The block begins
// at a leaf boundary.
func (h *Hasher) Leaves(dst []repository.Digest, block []byte) []repository.Digest {
	for len(block) > 0 {
		n := min(len(block), repository.LeafSize)
		dst = append(dst, h.Leaf(block[:n]))
		block = block[n:]
	}
	return dst
}

// Segment returns the digest of a segment from the digests of its leaves, at
// most SegmentLeaves; the zero digest if all of them are zero.
func (h *Hasher) Segment(leaves []repository.Digest) repository.Digest {
	if len(leaves) > SegmentLeaves {
		panic("digest: too many leaves for a segment")
	}
	zero := true
	for i := range leaves {
		if !leaves[i].IsZero() {
			zero = false
			break
		}
	}
	if zero {
		return repository.Digest{}
	}
	return sum(&h.segment, func(b *blake3.Hasher) {
		for i := range leaves {
			_, _ = b.Write(leaves[i][:])
		}
	})
}

// Root collects segment digests, in ascending order, into the root of a disk.
type Root struct {
	h    *Hasher
	b    *blake3.Hasher
	next int64
}

// Root begins the root of a disk of size bytes.
func (h *Hasher) Root(size int64) *Root {
	r := &Root{h: h, b: h.root.Get().(*blake3.Hasher)}
	r.b.Reset()
	r.write(uint64(size))
	return r
}

func (r *Root) write(v uint64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	_, _ = r.b.Write(b[:])
}

// Add adds the digest of segment index. Indexes ascend; zero segments may be
// left out.
func (r *Root) Add(index int64, d repository.Digest) {
	if index < r.next {
		panic("digest: segments out of order")
	}
	r.next = index + 1
	if d.IsZero() {
		return
	}
	r.write(uint64(index))
	_, _ = r.b.Write(d[:])
}

// Sum returns the root, never the zero digest. The Root is used up.
func (r *Root) Sum() (d repository.Digest) {
	r.b.Sum(d[:0])
	r.h.root.Put(r.b)
	r.b = nil
	if d.IsZero() {
		d[0] = 1
	}
	return d
}

var zeros [64 << 10]byte

// IsZero reports whether p holds zeros only.
func IsZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}
