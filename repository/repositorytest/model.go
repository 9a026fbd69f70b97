package repositorytest

import (
	"maps"
	"math/rand/v2"
	"slices"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// disk is the truth of a disk: blocks that hold data; all others are zeros.
type disk struct {
	size   int64
	bs     int
	blocks map[int64][]byte
}

func newDisk(size int64, bs int) *disk { return &disk{size, bs, map[int64][]byte{}} }

func (d *disk) count() int64 { return repository.Blocks(d.size, d.bs) }

func (d *disk) clone() *disk { return &disk{d.size, d.bs, maps.Clone(d.blocks)} }

// at returns n bytes at off.
func (d *disk) at(off int64, n int) []byte {
	out := make([]byte, n)
	for i := off / int64(d.bs); i*int64(d.bs) < off+int64(n); i++ {
		b, start := d.blocks[i], i*int64(d.bs)
		if start >= off {
			copy(out[start-off:], b)
		} else if off-start < int64(len(b)) {
			copy(out, b[off-start:])
		}
	}
	return out
}

// fill gives block i new random content: noise, noise in one leaf only, or a byte
// at one end.
func (d *disk) fill(rng *rand.Rand, i int64) {
	b := make([]byte, repository.BlockLen(d.size, d.bs, i))
	switch rng.IntN(5) {
	case 0:
		b[0] = byte(1 + rng.IntN(255))
	case 1:
		b[len(b)-1] = byte(1 + rng.IntN(255))
	case 2:
		noise(rng, b[len(b)/repository.LeafSize/2*repository.LeafSize:])
	default:
		noise(rng, b)
	}
	d.blocks[i] = b
}

// noise fills b, not with zeros only.
func noise(rng *rand.Rand, b []byte) {
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(rng.IntN(256))
	}
	_, _ = rand.NewChaCha8(seed).Read(b)
	b[0] |= 1
}

// random returns a disk of which a share of the blocks, and always the last one,
// holds data. If the share is below 1, at least one of three or more blocks does
// not.
func (e *env) random(size int64, bs int, share float64) *disk {
	d := newDisk(size, bs)
	for i := range d.count() {
		if i == d.count()-1 || e.rng.Float64() < share {
			d.fill(e.rng, i)
		}
	}
	if n := d.count(); share < 1 && n >= 3 && int64(len(d.blocks)) == n {
		delete(d.blocks, e.rng.Int64N(n-1))
	}
	return d
}

// reblock returns the same content in blocks of another size.
func (d *disk) reblock(bs int) *disk {
	out := newDisk(d.size, bs)
	for i := range out.count() {
		b := d.at(i*int64(bs), repository.BlockLen(d.size, bs, i))
		if !digest.IsZero(b) {
			out.blocks[i] = b
		}
	}
	return out
}

// root computes the root independently of any engine.
func (d *disk) root(key repository.DigestKey) repository.Digest {
	h := digest.New(key)
	r := h.Root(d.size)
	segments := map[int64][]repository.Digest{}
	for i, b := range d.blocks {
		off := i * int64(d.bs)
		s := off / digest.SegmentSpan
		if segments[s] == nil {
			n := min(d.size-s*digest.SegmentSpan, digest.SegmentSpan)
			segments[s] = make([]repository.Digest, (n+repository.LeafSize-1)/repository.LeafSize)
		}
		copy(segments[s][off%digest.SegmentSpan/repository.LeafSize:], h.Leaves(nil, b))
	}
	for _, s := range slices.Sorted(maps.Keys(segments)) {
		r.Add(s, h.Segment(segments[s]))
	}
	return r.Sum()
}
