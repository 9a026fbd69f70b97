package kopiarepo

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// diskMap finds the blocks of one disk of a committed point. It loads what it
// needs when it needs it, and is safe for concurrent use.
type diskMap struct {
	geometry
	r     *Repository
	dr    repo.DirectRepository
	what  string // for errors
	zeros map[object.ID]bool
	zsegs map[object.ID]bool

	root, digests map[string]*snapshot.DirEntry // shards

	mu     sync.Mutex
	shards map[string]map[string]*snapshot.DirEntry
	sums   map[int64]repository.Digest // of segments; nil: not loaded
}

// newDiskMap opens the directories of a disk.
func (r *Repository) newDiskMap(ctx context.Context, dr repo.DirectRepository, root map[string]*snapshot.DirEntry,
	cfg *diskConfig, what string,
) (*diskMap, error) {
	m := &diskMap{
		geometry: geometry{cfg.Size, cfg.BlockSize}, r: r, dr: dr, what: what,
		zeros: map[object.ID]bool{}, zsegs: map[object.ID]bool{}, shards: map[string]map[string]*snapshot.DirEntry{},
	}
	if err := m.valid(); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", what, repository.ErrDamaged, err)
	}
	if cfg.SegmentBytes != digest.SegmentSpan {
		return nil, fmt.Errorf("%s: segments of %d bytes: %w", what, cfg.SegmentBytes, errors.ErrUnsupported)
	}
	for _, id := range cfg.Zeros {
		m.zeros[id] = true
	}
	for _, id := range cfg.ZeroSegments {
		m.zsegs[id] = true
	}
	var err error
	if m.root, err = subdir(ctx, dr, root, diskDir(cfg.ID)); err == nil {
		var all map[string]*snapshot.DirEntry
		if all, err = subdir(ctx, dr, root, digestsName); err == nil {
			m.digests, err = subdir(ctx, dr, all, diskDir(cfg.ID))
		}
	}
	return m, damaged(ctx, err, what)
}

func subdir(ctx context.Context, dr repo.DirectRepository, dir map[string]*snapshot.DirEntry, name string) (map[string]*snapshot.DirEntry, error) {
	e := dir[name]
	if e == nil || e.Type != snapshot.EntryTypeDirectory {
		return nil, fmt.Errorf("%w: directory %s is missing", repository.ErrDamaged, name)
	}
	byName, _, err := getDir(ctx, dr, e.ObjectID)
	return byName, err
}

// entry finds segment s in the shards of dir; nil if it is not there.
func (m *diskMap) entry(ctx context.Context, dir map[string]*snapshot.DirEntry, kind string, s int64) (*snapshot.DirEntry, error) {
	shard := eight(s - s%shardSegments)
	key := kind + shard
	m.mu.Lock()
	entries, ok := m.shards[key]
	m.mu.Unlock()
	if !ok {
		if dir[shard] != nil {
			var err error
			if entries, err = subdir(ctx, m.dr, dir, shard); err != nil {
				return nil, err
			}
		}
		m.mu.Lock()
		m.shards[key] = entries
		m.mu.Unlock()
	}
	return entries[eight(s)], nil
}

// segment returns the objects of segment s. zero: it is zeros and has no digests.
func (m *diskMap) segment(ctx context.Context, s int64) (key segmentKey, zero bool, err error) {
	e, err := m.entry(ctx, m.root, "d", s)
	if err == nil && (e == nil || e.FileSize != m.segmentLen(s)) {
		err = fmt.Errorf("%w: segment %d is missing or has a wrong length", repository.ErrDamaged, s)
	}
	if err != nil {
		return key, false, damaged(ctx, err, m.what)
	}
	key = segmentKey{object: e.ObjectID, length: m.segmentLen(s), blockSize: m.blockSize}
	if m.zsegs[e.ObjectID] {
		return key, true, nil
	}
	d, err := m.entry(ctx, m.digests, "h", s)
	if err == nil && d == nil {
		err = fmt.Errorf("%w: digests of segment %d are missing", repository.ErrDamaged, s)
	}
	if err != nil {
		return key, false, damaged(ctx, err, m.what)
	}
	key.digests = d.ObjectID
	return key, false, nil
}

// load returns the map of segment s.
func (m *diskMap) load(ctx context.Context, s int64) (*segmentMap, error) {
	key, zero, err := m.segment(ctx, s)
	if err != nil {
		return nil, err
	}
	if zero {
		return &segmentMap{}, nil
	}
	sm, err := m.r.maps.get(ctx, key, func(ctx context.Context) (*segmentMap, int64, error) {
		blocks, err := getIndex(ctx, m.dr, key.object, key.length, key.blockSize)
		if err != nil {
			return nil, 0, err
		}
		leaves, err := getLeaves(ctx, m.dr, key.digests, key.length)
		if err != nil {
			return nil, 0, err
		}
		return &segmentMap{blocks, leaves}, int64(len(blocks))*72 + int64(len(leaves))*32, nil
	})
	return sm, damaged(ctx, err, fmt.Sprintf("%s, segment %d", m.what, s))
}

func getLeaves(ctx context.Context, dr repo.DirectRepository, id object.ID, length int64) ([]repository.Digest, error) {
	b, err := getObject(ctx, dr, id, digest.SegmentLeaves*32)
	if err != nil {
		return nil, err
	}
	n := leavesOf(length)
	if len(b) != n*32 {
		return nil, fmt.Errorf("%w: digests %s have %d bytes, not %d", repository.ErrDamaged, id, len(b), n*32)
	}
	out := make([]repository.Digest, n)
	for i := range out {
		copy(out[i][:], b[i*32:])
	}
	return out, nil
}

// segmentSums returns the digests of the segments that are not zeros.
func (m *diskMap) segmentSums(ctx context.Context) (map[int64]repository.Digest, error) {
	m.mu.Lock()
	sums := m.sums
	m.mu.Unlock()
	if sums != nil {
		return sums, nil
	}
	e := m.digests[segmentsName]
	if e == nil {
		return nil, damaged(ctx, fmt.Errorf("%w: segment digests are missing", repository.ErrDamaged), m.what)
	}
	var b []byte
	if e.FileSize > 0 {
		var err error
		if b, err = getObject(ctx, m.dr, e.ObjectID, 1<<30); err != nil {
			return nil, damaged(ctx, err, m.what+", segment digests")
		}
	}
	sums, err := parseSums(b)
	if err != nil {
		return nil, damaged(ctx, err, m.what)
	}
	m.mu.Lock()
	m.sums = sums
	m.mu.Unlock()
	return sums, nil
}

// encodeSums writes segment digests as 40 bytes each: the number, little endian,
// and the digest; by number.
func encodeSums(sums map[int64]repository.Digest) []byte {
	var out []byte
	for _, s := range sortedKeys(sums) {
		d := sums[s]
		out = binary.LittleEndian.AppendUint64(out, uint64(s))
		out = append(out, d[:]...)
	}
	return out
}

func parseSums(b []byte) (map[int64]repository.Digest, error) {
	if len(b)%40 != 0 {
		return nil, fmt.Errorf("%w: segment digests have %d bytes", repository.ErrDamaged, len(b))
	}
	out := make(map[int64]repository.Digest, len(b)/40)
	for ; len(b) > 0; b = b[40:] {
		var d repository.Digest
		copy(d[:], b[8:40])
		out[int64(binary.LittleEndian.Uint64(b))] = d
	}
	return out, nil
}

// rootOf computes the root of a disk from its segments' digests.
func rootOf(h *digest.Hasher, size int64, sums map[int64]repository.Digest) repository.Digest {
	r := h.Root(size)
	for _, s := range sortedKeys(sums) {
		r.Add(s, sums[s])
	}
	return r.Sum()
}

func sortedKeys[V any](m map[int64]V) []int64 {
	out := make([]int64, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
