package kopiarepo

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"github.com/kopia/kopia/repo/object"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

const (
	indexPrefix  = "x" // as kopia's own indexes
	digestPrefix = "g"
)

// diskWriter takes the blocks of one disk.
type diskWriter struct {
	geometry
	w      *writer
	id     string
	parent *diskMap                    // nil: nothing is inherited
	sums   map[int64]repository.Digest // of the parent's segments

	mu       sync.Mutex
	closed   bool
	advanced int64 // blocks below this are sealed
	open     map[int64]*openSegment
	sealed   map[int64]sealedSegment
	failed   map[int64]error // blocks whose last write failed
	stats    repository.DiskStats
}

// openSegment holds what was written of a segment.
type openSegment struct {
	blocks map[int64]*openBlock // by index in the disk
}

type openBlock struct {
	id     object.ID
	leaves []repository.Digest // nil: zeros
	ready  bool
}

// sealedSegment is a segment whose map is stored.
type sealedSegment struct {
	object  object.ID
	digests object.ID // empty: the segment is zeros
	sum     repository.Digest
}

var _ repository.DiskWriter = (*diskWriter)(nil)

// WriteBlock stores a block.
func (d *diskWriter) WriteBlock(ctx context.Context, b repository.Block) error {
	zero, err := d.checkBlock(&b)
	if err != nil {
		return fmt.Errorf("disk %s, block %d: %w", d.id, b.Index, err)
	}
	blk, err := d.reserve(b.Index)
	if err != nil {
		return fmt.Errorf("disk %s, block %d: %w", d.id, b.Index, err)
	}
	var out written
	if err = ctx.Err(); err == nil && !zero {
		out, err = d.store(ctx, b.Data)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		delete(d.open[d.segmentOf(b.Index)].blocks, b.Index)
		if d.failed == nil {
			d.failed = map[int64]error{}
		}
		d.failed[b.Index] = err
		return fmt.Errorf("disk %s, block %d: %w", d.id, b.Index, err)
	}
	delete(d.failed, b.Index)
	blk.ready = true
	if zero {
		d.stats.Zero++
		return nil
	}
	blk.id = out.id
	blk.leaves = append([]repository.Digest(nil), b.Leaves...)
	d.stats.Written++
	d.stats.BytesIn += int64(len(b.Data))
	d.stats.Stored += out.stored
	if out.dup {
		d.stats.Dedup++
	}
	return nil
}

func (d *diskWriter) checkBlock(b *repository.Block) (zero bool, err error) {
	if b.Index < 0 || b.Index >= d.blocks() {
		return false, fmt.Errorf("the disk has %d blocks", d.blocks())
	}
	n := d.blockLen(b.Index)
	if b.Data != nil && len(b.Data) != n {
		return false, fmt.Errorf("it has %d bytes, not %d", len(b.Data), n)
	}
	zero = b.Data == nil || digest.IsZero(b.Data)
	if len(b.Leaves) != leavesOf(int64(n)) && !(zero && len(b.Leaves) == 0) {
		return false, fmt.Errorf("it has %d digests, not %d", len(b.Leaves), leavesOf(int64(n)))
	}
	blank := true
	for i := range b.Leaves {
		blank = blank && b.Leaves[i].IsZero()
	}
	if blank != zero && !(zero && len(b.Leaves) == 0) {
		return false, errors.New("its digests do not belong to its data")
	}
	return zero, nil
}

func (d *diskWriter) reserve(index int64) (*openBlock, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errors.New("the disk is closed")
	}
	if index < d.advanced {
		return nil, fmt.Errorf("it is below %d, which was promised never to be written again", d.advanced)
	}
	s := d.segmentOf(index)
	seg := d.open[s]
	if seg == nil {
		seg = &openSegment{blocks: map[int64]*openBlock{}}
		d.open[s] = seg
	}
	if seg.blocks[index] != nil {
		return nil, fmt.Errorf("it was written before: %w", repository.ErrExists)
	}
	blk := &openBlock{}
	seg.blocks[index] = blk
	return blk, nil
}

func (d *diskWriter) store(ctx context.Context, data []byte) (written, error) {
	select {
	case d.w.r.workers <- struct{}{}:
	case <-ctx.Done():
		return written{}, ctx.Err()
	}
	out, err := d.w.sess.put(ctx, data, "", d.w.r.cfg.Compressor)
	<-d.w.r.workers
	if err != nil {
		return out, err
	}
	d.w.unsaved.Add(int64(len(data)))
	return out, d.w.maybeCheckpoint(ctx)
}

// Advance seals the segments that end at or below block next.
func (d *diskWriter) Advance(ctx context.Context, next int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if next < 0 || next > d.blocks() {
		return fmt.Errorf("disk %s: advance to block %d of %d", d.id, next, d.blocks())
	}
	d.mu.Lock()
	d.advanced = max(d.advanced, next)
	var ready []int64
	for s := range d.open {
		if s*d.perSegment()+d.segmentBlocks(s) <= d.advanced {
			ready = append(ready, s)
		}
	}
	d.mu.Unlock()
	if len(ready) == 0 {
		return nil
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for _, s := range ready {
		g.Go(func() error { return d.seal(gctx, s) })
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("disk %s: %w", d.id, err)
	}
	return nil
}

// seal stores the map of segment s. It may be called again after an error.
func (d *diskWriter) seal(ctx context.Context, s int64) error {
	d.mu.Lock()
	seg := d.open[s]
	for index, blk := range seg.blocks {
		if !blk.ready {
			d.mu.Unlock()
			return fmt.Errorf("block %d is still being written", index)
		}
	}
	d.mu.Unlock()
	if len(seg.blocks) == 0 { // every write failed, or there was none
		d.mu.Lock()
		delete(d.open, s)
		d.mu.Unlock()
		return nil
	}
	base := &segmentMap{}
	if d.parent != nil && int64(len(seg.blocks)) < d.segmentBlocks(s) {
		var err error
		if base, err = d.parent.load(ctx, s); err != nil {
			return err
		}
	}
	out, err := d.w.sealSegment(ctx, d, s, seg, base)
	if err != nil {
		return fmt.Errorf("segment %d: %w", s, err)
	}
	d.mu.Lock()
	d.sealed[s] = out
	delete(d.open, s)
	d.mu.Unlock()
	return nil
}

// sealSegment lays what was written over what is inherited, and stores the map.
func (w *writer) sealSegment(ctx context.Context, d *diskWriter, s int64, seg *openSegment, base *segmentMap) (sealedSegment, error) {
	var out sealedSegment
	first := s * d.perSegment()
	blocks := make([]object.ID, d.segmentBlocks(s))
	leaves := make([]repository.Digest, leavesOf(d.segmentLen(s)))
	copy(leaves, base.leaves)
	for i := range blocks {
		n := d.blockLen(first + int64(i))
		own := leaves[i*d.leavesPerBlock():][:leavesOf(int64(n))]
		blk := seg.blocks[first+int64(i)]
		switch {
		case blk != nil && blk.leaves != nil:
			blocks[i] = blk.id
			copy(own, blk.leaves)
			continue
		case blk != nil:
			clear(own)
		case base.blocks != nil && !d.parent.zeros[base.blocks[i]]:
			blocks[i] = base.blocks[i]
			continue
		}
		z, err := w.zeroBlock(ctx, n)
		if err != nil {
			return out, err
		}
		blocks[i] = z
	}
	out.sum = w.hasher.Segment(leaves)
	var err error
	if out.sum.IsZero() {
		out.object, err = w.zeroSegment(ctx, d.geometry, s)
		return out, err
	}
	if out.object, err = w.putIndex(ctx, blocks, d.segmentLen(s), d.blockSize); err != nil {
		return out, err
	}
	raw := make([]byte, 0, len(leaves)*32)
	for i := range leaves {
		raw = append(raw, leaves[i][:]...)
	}
	stored, err := w.sess.put(ctx, raw, digestPrefix, DefaultCompressor)
	out.digests = stored.id
	return out, err
}

// putIndex stores the list of blocks of a segment as an object that reads as
// their bytes. One block needs no list.
func (w *writer) putIndex(ctx context.Context, blocks []object.ID, length int64, blockSize int) (object.ID, error) {
	if len(blocks) == 1 {
		return blocks[0], nil
	}
	out := make([]byte, 0, len(blocks)*120+64)
	out = append(out, `{"stream":"kopia:indirect","entries":[`...)
	for i, id := range blocks {
		if i > 0 {
			out = append(out, `,{"s":`...)
			out = strconv.AppendInt(out, int64(i)*int64(blockSize), 10)
			out = append(out, `,"l":`...)
		} else {
			out = append(out, `{"l":`...)
		}
		out = strconv.AppendInt(out, int64(repository.BlockLen(length, blockSize, int64(i))), 10)
		out = append(out, `,"o":"`...)
		out = id.Append(out)
		out = append(out, `"}`...)
	}
	out = append(out, "]}\n"...)
	stored, err := w.sess.put(ctx, out, indexPrefix, DefaultCompressor)
	if err != nil {
		return object.EmptyID, err
	}
	return object.ParseID("I" + stored.id.String())
}

// Close ends the disk.
func (d *diskWriter) Close(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	d.mu.Lock()
	closed := d.closed
	d.closed = true
	d.mu.Unlock()
	if closed {
		return nil
	}
	err := d.Advance(ctx, d.blocks())
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.closed = false
		return err
	}
	if d.parent != nil {
		d.stats.Inherited = d.blocks() - d.stats.Written - d.stats.Zero
	}
	return nil
}

// Stats tells what was done so far.
func (d *diskWriter) Stats() repository.DiskStats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stats
}

// unfinished says why the disk cannot be committed, or nil.
func (d *diskWriter) unfinished() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.closed {
		return fmt.Errorf("disk %s is still open", d.id)
	}
	for index, err := range d.failed {
		return fmt.Errorf("disk %s: block %d was not stored: %w", d.id, index, err)
	}
	return nil
}
