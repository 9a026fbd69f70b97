package fakes

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// memoryDisk implements repository.DiskWriter.
type memoryDisk struct {
	w         *memoryWriter
	spec      repository.DiskSpec
	blocks    int64
	segBlocks int
	inherited map[int64]segmentRef // by segment; nil: nothing is inherited
	flushing  chan struct{}        // holds one token while segments are stored

	mu      sync.Mutex
	pending map[int64]*pendingSegment
	stored  map[int64]segmentRef // by segment; a segment of zeros has Data 0
	busy    map[int64]bool       // blocks that a WriteBlock is storing
	failed  map[int64]error      // blocks that a WriteBlock could not store
	next    int64                // all blocks below it are written or never will be
	stats   repository.DiskStats
	closing bool
	done    *diskRecord
	needs   map[string]int64
}

// pendingSegment holds blocks that are stored but in no stored map yet.
type pendingSegment struct {
	data segmentMap
	zero map[int]bool
}

func (p *pendingSegment) has(i int) bool {
	_, ok := p.data[i]
	return ok || p.zero[i]
}

var errDiskClosed = errors.New("the disk was closed before")

// WriteBlock implements repository.DiskWriter.
func (d *memoryDisk) WriteBlock(ctx context.Context, b repository.Block) error {
	if err := d.w.begin(ctx); err != nil {
		return fmt.Errorf("disk %s: %w", d.spec.ID, err)
	}
	if err := d.check(&b); err != nil {
		return fmt.Errorf("disk %s: block %d: %w", d.spec.ID, b.Index, err)
	}
	if err := d.reserve(b.Index); err != nil {
		return fmt.Errorf("disk %s: block %d: %w", d.spec.ID, b.Index, err)
	}
	var (
		ref blobRef
		had bool
		err error
	)
	zero := len(b.Data) == 0 || allZero(b.Leaves) && digest.IsZero(b.Data)
	if !zero {
		ref, had, err = d.w.r.putContent(ctx, prefixBlock, b.Data)
	}

	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.busy, b.Index)
	if err != nil {
		setIn(&d.failed, b.Index, err)
		return fmt.Errorf("disk %s: block %d: %w", d.spec.ID, b.Index, err)
	}
	delete(d.failed, b.Index)
	seg := d.segment(b.Index / int64(d.segBlocks))
	at := int(b.Index % int64(d.segBlocks))
	switch {
	case zero && b.Data == nil:
		d.stats.Zero++
	default:
		d.stats.Written++
		d.stats.BytesIn += int64(len(b.Data))
	}
	switch {
	case zero:
		seg.zero[at] = true
		return nil
	case had:
		d.stats.Dedup++
	default:
		d.stats.Stored += int64(len(b.Data))
	}
	seg.data[at] = mapEntry{ref.hash(), uint32(len(b.Data)), slices.Clone(b.Leaves)}
	return nil
}

func (d *memoryDisk) check(b *repository.Block) error {
	if b.Index < 0 || b.Index >= d.blocks {
		return fmt.Errorf("the disk has %d blocks", d.blocks)
	}
	want := repository.BlockLen(d.spec.Size, d.spec.BlockSize, b.Index)
	leaves := (want + repository.LeafSize - 1) / repository.LeafSize
	switch {
	case b.Data != nil && len(b.Data) != want:
		return fmt.Errorf("%d bytes of data, not %d", len(b.Data), want)
	case len(b.Leaves) != leaves && (b.Data != nil || len(b.Leaves) != 0):
		return fmt.Errorf("%d leaves, not %d", len(b.Leaves), leaves)
	case b.Data == nil && !allZero(b.Leaves):
		return errors.New("a block of zeros with digests of something else")
	}
	return nil
}

func (d *memoryDisk) reserve(index int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	seg := d.pending[index/int64(d.segBlocks)]
	switch {
	case d.closing:
		return errDiskClosed
	case index < d.next:
		return fmt.Errorf("Advance promised that nothing below %d comes", d.next)
	case d.busy[index] || seg != nil && seg.has(int(index%int64(d.segBlocks))):
		return fmt.Errorf("written before: %w", repository.ErrExists)
	}
	setIn(&d.busy, index, true)
	return nil
}

// segment returns the pending blocks of a segment. d.mu is held.
func (d *memoryDisk) segment(s int64) *pendingSegment {
	p := d.pending[s]
	if p == nil {
		p = &pendingSegment{segmentMap{}, map[int]bool{}}
		setIn(&d.pending, s, p)
	}
	return p
}

// Advance implements repository.DiskWriter.
func (d *memoryDisk) Advance(ctx context.Context, next int64) error {
	if err := d.w.begin(ctx); err != nil {
		return fmt.Errorf("disk %s: %w", d.spec.ID, err)
	}
	if next < 0 || next > d.blocks {
		return fmt.Errorf("disk %s: advance to block %d of %d", d.spec.ID, next, d.blocks)
	}
	release, err := d.enter(ctx)
	if err != nil {
		return err
	}
	defer release()
	if err := d.promise(next, false); err != nil {
		return fmt.Errorf("disk %s: %w", d.spec.ID, err)
	}
	if err := d.flush(ctx, next/int64(d.segBlocks)); err != nil {
		return fmt.Errorf("disk %s: advance to block %d: %w", d.spec.ID, next, err)
	}
	return nil
}

// enter takes the token for storing segments.
func (d *memoryDisk) enter(ctx context.Context) (release func(), err error) {
	select {
	case d.flushing <- struct{}{}:
		return func() { <-d.flushing }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// promise notes that nothing below next comes any more. Closing promises it of
// the whole disk.
func (d *memoryDisk) promise(next int64, closing bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.done != nil || d.closing && !closing {
		return errDiskClosed
	}
	for i := range d.busy {
		if i < next {
			return fmt.Errorf("block %d is being written", i)
		}
	}
	for i, err := range d.failed {
		if i < next {
			return fmt.Errorf("block %d was not stored: %w", i, err)
		}
	}
	d.next = max(d.next, next)
	d.closing = d.closing || closing
	return nil
}

// flush stores the maps of pending segments below end. It needs the token.
func (d *memoryDisk) flush(ctx context.Context, end int64) error {
	d.mu.Lock()
	var due []int64
	for s := range d.pending {
		if s < end {
			due = append(due, s)
		}
	}
	slices.Sort(due)
	d.mu.Unlock()
	for _, s := range due {
		d.mu.Lock()
		p := d.pending[s] // nothing writes to it any more
		d.mu.Unlock()
		ref, inherited, err := d.storeSegment(ctx, s, p)
		if err != nil {
			return err
		}
		d.mu.Lock()
		delete(d.pending, s)
		setIn(&d.stored, s, ref)
		d.stats.Inherited += inherited
		d.mu.Unlock()
	}
	return nil
}

// storeSegment stores the map of a segment: what was written over what is
// inherited. It tells how many blocks with data were inherited.
func (d *memoryDisk) storeSegment(ctx context.Context, s int64, p *pendingSegment) (segmentRef, int64, error) {
	out := segmentMap{}
	if parent, ok := d.inherited[s]; ok {
		old, err := d.w.r.loadSegment(ctx, parent, d.segBlocks)
		if err != nil {
			return segmentRef{}, 0, fmt.Errorf("inherited map: %w", err)
		}
		for i, e := range old {
			if !p.has(i) {
				out[i] = e
			}
		}
	}
	inherited := int64(len(out))
	maps.Copy(out, p.data)
	ref := segmentRef{Index: s, Data: len(out)}
	if len(out) == 0 {
		return ref, inherited, nil
	}
	var err error
	ref.Map, _, err = d.w.r.putContent(ctx, prefixMap, out.encode(d.segBlocks))
	return ref, inherited, err
}

// Close implements repository.DiskWriter. After a failure it can be tried again.
func (d *memoryDisk) Close(ctx context.Context) error {
	if _, ok := d.result(); ok {
		return nil
	}
	if err := d.w.begin(ctx); err != nil {
		return fmt.Errorf("disk %s: %w", d.spec.ID, err)
	}
	release, err := d.enter(ctx)
	if err != nil {
		return err
	}
	defer release()
	if err := d.promise(d.blocks, true); err != nil {
		if errors.Is(err, errDiskClosed) {
			return nil
		}
		return fmt.Errorf("disk %s: %w", d.spec.ID, err)
	}
	if err := d.flush(ctx, d.blocks/int64(d.segBlocks)+1); err != nil {
		return fmt.Errorf("close disk %s: %w", d.spec.ID, err)
	}
	if err := d.finish(ctx); err != nil {
		return fmt.Errorf("close disk %s: %w", d.spec.ID, err)
	}
	return nil
}

// finish stores the manifest, computes the root from the stored maps, and notes
// everything that the disk needs.
func (d *memoryDisk) finish(ctx context.Context) error {
	m := diskManifest{Size: d.spec.Size, BlockSize: d.spec.BlockSize, SegmentBlocks: d.segBlocks}
	d.mu.Lock()
	var inherited int64
	for s, ref := range d.inherited {
		if _, over := d.stored[s]; !over {
			m.Segments = append(m.Segments, ref)
			inherited += int64(ref.Data)
		}
	}
	for _, ref := range d.stored {
		if ref.Data > 0 {
			m.Segments = append(m.Segments, ref)
		}
	}
	d.mu.Unlock()
	slices.SortFunc(m.Segments, func(a, b segmentRef) int { return cmp.Compare(a.Index, b.Index) })

	needs := map[string]int64{}
	root := newRootBuilder(d.w.key, d.spec.Size, d.spec.BlockSize)
	for _, ref := range m.Segments {
		seg, err := d.w.r.loadSegment(ctx, ref, d.segBlocks)
		if err != nil {
			return err
		}
		needs[ref.Map.Name] = ref.Map.Size
		for _, i := range slices.Sorted(maps.Keys(seg)) {
			e := seg[i]
			needs[e.ref().Name] = e.ref().Size
			root.add(ref.Index*int64(d.segBlocks)+int64(i), e.leaves)
		}
	}
	raw, err := json.Marshal(&m)
	if err != nil {
		return err
	}
	ref, _, err := d.w.r.putContent(ctx, prefixDisk, raw)
	if err != nil {
		return err
	}
	needs[ref.Name] = ref.Size

	d.mu.Lock()
	defer d.mu.Unlock()
	d.stats.Inherited += inherited
	d.needs = needs
	d.done = &diskRecord{
		Disk: repository.Disk{
			ID: d.spec.ID, Size: d.spec.Size, BlockSize: d.spec.BlockSize, Root: root.sum(), Stats: d.stats,
		},
		Manifest: ref,
	}
	return nil
}

// result returns the record of the disk once it is closed.
func (d *memoryDisk) result() (*diskRecord, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.done, d.done != nil
}

// Stats implements repository.DiskWriter.
func (d *memoryDisk) Stats() repository.DiskStats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stats
}

func allZero(leaves []repository.Digest) bool {
	return !slices.ContainsFunc(leaves, func(l repository.Digest) bool { return !l.IsZero() })
}

// setIn sets a key of a map that is made when it is needed.
func setIn[K comparable, V any](m *map[K]V, k K, v V) {
	if *m == nil {
		*m = map[K]V{}
	}
	(*m)[k] = v
}
