package fakes

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

const maxSegmentBlocks = 4096

// Prefixes of blobs that are addressed by their content.
const (
	prefixBlock = "blocks/"
	prefixMap   = "maps/"
	prefixDisk  = "disks/"
	prefixFile  = "files/"
)

// addressed reports whether a blob is content, as opposed to bookkeeping.
func addressed(name string) bool {
	for _, p := range []string{prefixBlock, prefixMap, prefixDisk, prefixFile} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

type contentHash [32]byte

func (h contentHash) name(prefix string) string { return prefix + hex.EncodeToString(h[:]) }

// blobRef names a content blob and its size in bytes.
type blobRef struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
}

// hash is the inverse of contentHash.name.
func (ref blobRef) hash() (h contentHash) {
	_, _ = hex.Decode(h[:], []byte(ref.Name[strings.IndexByte(ref.Name, '/')+1:]))
	return h
}

// putContent stores data under its hash unless it is there with the right size.
// It reports whether it was.
func (r *Repository) putContent(ctx context.Context, prefix string, data []byte) (ref blobRef, had bool, err error) {
	ref = blobRef{contentHash(blake3.Sum256(data)).name(prefix), int64(len(data))}
	had, err = r.conn.touch(ctx, ref.Name, ref.Size)
	if err == nil && !had {
		err = r.conn.put(ctx, ref.Name, data, nil)
	}
	return ref, had, err
}

// getContent reads a content blob and proves it. Its errors match ErrDamaged if
// the blob is missing or wrong. The result must not be changed.
func (r *Repository) getContent(ctx context.Context, ref blobRef) ([]byte, error) {
	data, err := r.conn.get(ctx, ref.Name)
	if errors.Is(err, errNoBlob) {
		return nil, &contentError{ref.Name, "missing"}
	}
	if err != nil {
		return nil, err
	}
	if problem := ref.check(data); problem != "" {
		return nil, &contentError{ref.Name, problem}
	}
	return data, nil
}

// check returns what is wrong with data as the content of ref, or "".
func (ref blobRef) check(data []byte) string {
	switch sum := contentHash(blake3.Sum256(data)); {
	case int64(len(data)) < ref.Size:
		return "truncated"
	case int64(len(data)) > ref.Size:
		return "size"
	case sum.name(ref.Name[:strings.IndexByte(ref.Name, '/')+1]) != ref.Name:
		return "digest"
	}
	return ""
}

// contentError says what is wrong with a content blob. It matches ErrDamaged.
type contentError struct{ name, problem string }

func (e *contentError) Error() string { return e.name + ": " + e.problem }

func (e *contentError) Is(target error) bool { return target == repository.ErrDamaged }

// mapEntry is one block that holds data. A block without entry is zeros.
type mapEntry struct {
	hash   contentHash
	size   uint32
	leaves []repository.Digest
}

func (e *mapEntry) ref() blobRef { return blobRef{e.hash.name(prefixBlock), int64(e.size)} }

// segmentMap maps the blocks of one segment; keys count from its first block.
type segmentMap map[int]mapEntry

// encode is canonical: equal maps have equal bytes.
func (m segmentMap) encode(blocks int) []byte {
	var out []byte
	for i := range blocks {
		e, ok := m[i]
		if !ok {
			continue
		}
		out = binary.LittleEndian.AppendUint32(out, uint32(i))
		out = binary.LittleEndian.AppendUint32(out, e.size)
		out = append(out, e.hash[:]...)
		out = binary.LittleEndian.AppendUint32(out, uint32(len(e.leaves)))
		for _, l := range e.leaves {
			out = append(out, l[:]...)
		}
	}
	return out
}

func decodeSegment(b []byte, blocks int) (segmentMap, error) {
	const head = 4 + 4 + 32 + 4
	m := segmentMap{}
	for len(b) > 0 {
		if len(b) < head {
			return nil, fmt.Errorf("segment map: %w: cut off", repository.ErrDamaged)
		}
		i := binary.LittleEndian.Uint32(b)
		e := mapEntry{size: binary.LittleEndian.Uint32(b[4:]), hash: contentHash(b[8:40])}
		n := binary.LittleEndian.Uint32(b[40:])
		b = b[head:]
		if int64(i) >= int64(blocks) || int64(n)*32 > int64(len(b)) {
			return nil, fmt.Errorf("segment map: %w: block %d with %d leaves", repository.ErrDamaged, i, n)
		}
		e.leaves = make([]repository.Digest, n)
		for j := range e.leaves {
			e.leaves[j] = repository.Digest(b[j*32:])
		}
		b = b[n*32:]
		m[int(i)] = e
	}
	return m, nil
}

// segmentRef is a stored segment map; Data counts its blocks that hold data.
type segmentRef struct {
	Index int64   `json:"index"`
	Map   blobRef `json:"map"`
	Data  int     `json:"data"`
}

// diskManifest lists the segments of a disk that hold data, ascending.
type diskManifest struct {
	Size          int64        `json:"size"`
	BlockSize     int          `json:"block_size"`
	SegmentBlocks int          `json:"segment_blocks"`
	Segments      []segmentRef `json:"segments"`
}

func (r *Repository) loadManifest(ctx context.Context, ref blobRef) (*diskManifest, error) {
	raw, err := r.getContent(ctx, ref)
	if err != nil {
		return nil, err
	}
	m := &diskManifest{}
	if err := json.Unmarshal(raw, m); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", ref.Name, repository.ErrDamaged, err)
	}
	if m.Size < 0 || !repository.ValidBlockSize(m.BlockSize) || m.SegmentBlocks < 1 || m.SegmentBlocks > maxSegmentBlocks {
		return nil, fmt.Errorf("%s: %w: impossible geometry", ref.Name, repository.ErrDamaged)
	}
	return m, nil
}

func (r *Repository) loadSegment(ctx context.Context, ref segmentRef, blocks int) (segmentMap, error) {
	raw, err := r.getContent(ctx, ref.Map)
	if err != nil {
		return nil, err
	}
	return decodeSegment(raw, blocks)
}

// rootBuilder computes the root of a disk from its segment maps, given in
// ascending order. The leaves of a digest segment are those that begin inside
// the disk.
type rootBuilder struct {
	h      *digest.Hasher
	root   *digest.Root
	size   int64
	bs     int64
	group  int64
	leaves []repository.Digest
}

func newRootBuilder(key repository.DigestKey, size int64, blockSize int) *rootBuilder {
	h := digest.New(key)
	return &rootBuilder{h: h, root: h.Root(size), size: size, bs: int64(blockSize), group: -1}
}

// add takes the leaves of block index; indexes ascend.
func (b *rootBuilder) add(index int64, leaves []repository.Digest) {
	off := index * b.bs
	if g := off / digest.SegmentSpan; g != b.group {
		b.flush()
		b.group = g
		n := (min(b.size-g*digest.SegmentSpan, digest.SegmentSpan) + repository.LeafSize - 1) / repository.LeafSize
		b.leaves = make([]repository.Digest, n)
	}
	copy(b.leaves[off%digest.SegmentSpan/repository.LeafSize:], leaves)
}

func (b *rootBuilder) flush() {
	if b.group >= 0 {
		b.root.Add(b.group, b.h.Segment(b.leaves))
	}
}

func (b *rootBuilder) sum() repository.Digest {
	b.flush()
	return b.root.Sum()
}
