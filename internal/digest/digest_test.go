package digest_test

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

func TestLeavesAgreeWithADirectHash(t *testing.T) {
	key := repository.DigestKey{1, 2, 3}
	h := digest.New(key)
	block := make([]byte, 2*repository.LeafSize+17)
	rand.NewChaCha8([32]byte{9}).Read(block[repository.LeafSize:])
	got := h.Leaves(nil, block)
	require.Len(t, got, 3)
	require.True(t, got[0].IsZero(), "a leaf of zeros is elided")

	var sub [32]byte
	blake3.DeriveKey("holdfast v1 digest tree: leaf", key[:], sub[:])
	k, err := blake3.NewKeyed(sub[:])
	require.NoError(t, err)
	_, _ = k.Write(block[2*repository.LeafSize:])
	require.Equal(t, k.Sum(nil), got[2][:])
}

func TestEveryKindOfChangeChangesTheRoot(t *testing.T) {
	type disk struct {
		size   int64
		leaves map[int64]repository.Digest
	}
	h := digest.New(repository.DigestKey{7})
	root := func(h *digest.Hasher, d disk) repository.Digest {
		r := h.Root(d.size)
		for s := int64(0); s*digest.SegmentSpan < d.size; s++ {
			leaves := make([]repository.Digest, digest.SegmentLeaves)
			for i := range leaves {
				leaves[i] = d.leaves[s*digest.SegmentLeaves+int64(i)]
			}
			r.Add(s, h.Segment(leaves))
		}
		return r.Sum()
	}
	a, b := h.Leaf([]byte{1}), h.Leaf([]byte{2})
	base := disk{3 << 30, map[int64]repository.Digest{0: a, 5000: b}}
	want := root(h, base)
	require.Equal(t, want, root(h, base))
	for name, d := range map[string]disk{
		"size":    {3<<30 + 512, base.leaves},
		"leaf":    {3 << 30, map[int64]repository.Digest{0: b, 5000: b}},
		"place":   {3 << 30, map[int64]repository.Digest{1: a, 5000: b}},
		"segment": {3 << 30, map[int64]repository.Digest{0: a, 9096: b}},
		"missing": {3 << 30, map[int64]repository.Digest{0: a}},
		"swapped": {3 << 30, map[int64]repository.Digest{0: b, 5000: a}},
	} {
		require.NotEqual(t, want, root(h, d), name)
	}
	require.NotEqual(t, want, root(digest.New(repository.DigestKey{8}), base), "key")
	require.False(t, root(h, disk{0, nil}).IsZero())
}

func TestIsZeroFindsEveryByte(t *testing.T) {
	p := make([]byte, 200_001)
	require.True(t, digest.IsZero(p))
	for _, i := range []int{0, 1, 65535, 65536, 131071, 200_000} {
		p[i] = 1
		require.False(t, digest.IsZero(p), "byte %d", i)
		p[i] = 0
	}
	require.True(t, digest.IsZero(nil))
}

func BenchmarkLeaves(b *testing.B) {
	h := digest.New(repository.DigestKey{1})
	block := bytes.Repeat([]byte("holdfast"), repository.DefaultBlockSize/8)
	leaves := make([]repository.Digest, 0, 4)
	b.SetBytes(int64(len(block)))
	for b.Loop() {
		leaves = h.Leaves(leaves[:0], block)
	}
}

func TestTreeIsTheRootOfItsSegments(t *testing.T) {
	h := digest.New(repository.DigestKey{3})
	const size = 2*digest.SegmentSpan + 3*repository.LeafSize + 100
	require.Equal(t, digest.SegmentLeaves, digest.SegmentLen(size, 1))
	require.Equal(t, 4, digest.SegmentLen(size, 2))
	a, b, c := h.Leaf([]byte{1}), h.Leaf([]byte{2}), h.Leaf([]byte{3})

	tree := h.Tree(size)
	tree.Put((digest.SegmentLeaves-1)*repository.LeafSize, []repository.Digest{a, b}) // across segments
	tree.Put(2*digest.SegmentSpan+3*repository.LeafSize, []repository.Digest{c})

	first, second := make([]repository.Digest, digest.SegmentLeaves), make([]repository.Digest, digest.SegmentLeaves)
	first[digest.SegmentLeaves-1], second[0] = a, b
	root := h.Root(size)
	root.Add(0, h.Segment(first))
	root.Add(1, h.Segment(second))
	root.Add(2, h.Segment([]repository.Digest{{}, {}, {}, c}))
	require.Equal(t, root.Sum(), tree.Sum())
}
