package fakes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"slices"
	"sync/atomic"

	"github.com/holdfast-backup/holdfast/repository"
)

// Points implements repository.Repository.
func (r *Repository) Points(ctx context.Context, q repository.Query) iter.Seq2[*repository.Point, error] {
	return func(yield func(*repository.Point, error) bool) {
		if err := r.begin(ctx); err != nil {
			yield(nil, err)
			return
		}
		if q.Chain != "" && !validName(q.Chain, 128, false, "._-") {
			return // no point can match
		}
		sc, err := r.scan(ctx, q.Chain)
		for i := range sc.points {
			if p := sc.points[i].point; q.Match(p) && !yield(p, nil) {
				return
			}
		}
		if err != nil {
			yield(nil, fmt.Errorf("list points: %w", err))
		}
	}
}

// Open implements repository.Repository. It reads all maps of the point.
func (r *Repository) Open(ctx context.Context, id repository.PointID) (repository.Reader, error) {
	if err := r.begin(ctx); err != nil {
		return nil, err
	}
	rec, err := r.lookup(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	rd := &memoryReader{r: r, rec: rec, disks: map[string]*loadedDisk{}}
	for _, d := range rec.Disks {
		ld, err := r.loadDisk(ctx, d)
		if err != nil {
			return nil, fmt.Errorf("open point %s: disk %s: %w", id, d.Disk.ID, err)
		}
		rd.disks[d.Disk.ID] = ld
	}
	return rd, nil
}

// loadedDisk is a disk with all its maps.
type loadedDisk struct {
	disk     repository.Disk
	manifest *diskManifest
	segments map[int64]segmentMap
}

func (r *Repository) loadDisk(ctx context.Context, d diskRecord) (*loadedDisk, error) {
	m, err := r.loadManifest(ctx, d.Manifest)
	if err != nil {
		return nil, err
	}
	if m.Size != d.Disk.Size || m.BlockSize != d.Disk.BlockSize {
		return nil, fmt.Errorf("%s: %w: not the geometry of the record", d.Manifest.Name, repository.ErrDamaged)
	}
	ld := &loadedDisk{d.Disk, m, map[int64]segmentMap{}}
	for _, ref := range m.Segments {
		if ld.segments[ref.Index], err = r.loadSegment(ctx, ref, m.SegmentBlocks); err != nil {
			return nil, err
		}
	}
	return ld, nil
}

// entry returns the map entry of a block; false: zeros.
func (ld *loadedDisk) entry(index int64) (mapEntry, bool) {
	n := int64(ld.manifest.SegmentBlocks)
	e, ok := ld.segments[index/n][int(index%n)]
	return e, ok
}

// indexes yields the blocks that hold data, ascending.
func (ld *loadedDisk) indexes() iter.Seq[int64] {
	return func(yield func(int64) bool) {
		for _, ref := range ld.manifest.Segments {
			for _, i := range slices.Sorted(maps.Keys(ld.segments[ref.Index])) {
				if !yield(ref.Index*int64(ld.manifest.SegmentBlocks) + int64(i)) {
					return
				}
			}
		}
	}
}

// memoryReader implements repository.Reader.
type memoryReader struct {
	r      *Repository
	rec    *pointRecord
	disks  map[string]*loadedDisk
	closed atomic.Bool
}

// Point implements repository.Reader.
func (rd *memoryReader) Point() *repository.Point { return rd.rec.point() }

// DigestKey implements repository.Reader.
func (rd *memoryReader) DigestKey() repository.DigestKey { return rd.r.digestKey(rd.rec.Chain) }

func (rd *memoryReader) begin(ctx context.Context) error {
	if rd.closed.Load() {
		return fmt.Errorf("reader of point %s: %w", rd.rec.ID, fs.ErrClosed)
	}
	return rd.r.begin(ctx)
}

// Disk implements repository.Reader. ctx governs the life of the DiskReader.
func (rd *memoryReader) Disk(ctx context.Context, id string) (repository.DiskReader, error) {
	if err := rd.begin(ctx); err != nil {
		return nil, err
	}
	ld := rd.disks[id]
	if ld == nil {
		return nil, fmt.Errorf("disk %s of point %s: %w", id, rd.rec.ID, repository.ErrNotFound)
	}
	return &memoryDiskReader{rd: rd, ctx: ctx, ld: ld}, nil
}

// File implements repository.Reader.
func (rd *memoryReader) File(ctx context.Context, name string) (io.ReadCloser, error) {
	if err := rd.begin(ctx); err != nil {
		return nil, err
	}
	for _, f := range rd.rec.Files {
		if f.Name == name {
			data, err := rd.r.getContent(ctx, f.Blob)
			if err != nil {
				return nil, fmt.Errorf("file %s of point %s: %w", name, rd.rec.ID, err)
			}
			return io.NopCloser(bytes.NewReader(data)), nil
		}
	}
	return nil, fmt.Errorf("file %s of point %s: %w", name, rd.rec.ID, repository.ErrNotFound)
}

// Close implements repository.Reader.
func (rd *memoryReader) Close() error {
	rd.closed.Store(true)
	return nil
}

// memoryDiskReader implements repository.DiskReader.
type memoryDiskReader struct {
	rd     *memoryReader
	ctx    context.Context // governs the life of the reader
	ld     *loadedDisk
	last   atomic.Pointer[cachedBlock]
	closed atomic.Bool
}

// cachedBlock is the block that was read last; small reads in a row need it.
type cachedBlock struct {
	index int64
	data  []byte
}

// Size implements repository.DiskReader.
func (d *memoryDiskReader) Size() int64 { return d.ld.disk.Size }

// BlockSize implements repository.DiskReader.
func (d *memoryDiskReader) BlockSize() int { return d.ld.disk.BlockSize }

// Close implements repository.DiskReader.
func (d *memoryDiskReader) Close() error {
	d.closed.Store(true)
	return nil
}

func (d *memoryDiskReader) begin(ctx context.Context) error {
	if d.closed.Load() {
		return fmt.Errorf("disk %s: %w", d.ld.disk.ID, fs.ErrClosed)
	}
	if err := d.ctx.Err(); err != nil {
		return err
	}
	return d.rd.begin(ctx)
}

// block returns the stored bytes of a block, not to be changed; nil: zeros.
func (d *memoryDiskReader) block(ctx context.Context, index int64) ([]byte, []repository.Digest, error) {
	n := repository.BlockLen(d.ld.disk.Size, d.ld.disk.BlockSize, index)
	e, ok := d.ld.entry(index)
	if !ok {
		return nil, make([]repository.Digest, (n+repository.LeafSize-1)/repository.LeafSize), nil
	}
	if c := d.last.Load(); c != nil && c.index == index {
		return c.data, e.leaves, nil
	}
	data, err := d.rd.r.getContent(ctx, e.ref())
	if err == nil && len(data) != n {
		err = &contentError{e.ref().Name, "size"}
	}
	if err != nil {
		off := index * int64(d.ld.disk.BlockSize)
		return nil, nil, fmt.Errorf("disk %s: bytes %d to %d: %w", d.ld.disk.ID, off, off+int64(n), err)
	}
	d.last.Store(&cachedBlock{index, data})
	return data, e.leaves, nil
}

// ReadAt implements io.ReaderAt.
func (d *memoryDiskReader) ReadAt(p []byte, off int64) (n int, err error) {
	if err := d.begin(d.ctx); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, fmt.Errorf("disk %s: negative offset %d", d.ld.disk.ID, off)
	}
	bs := int64(d.ld.disk.BlockSize)
	for n < len(p) {
		at := off + int64(n)
		if at >= d.ld.disk.Size {
			return n, io.EOF
		}
		index := at / bs
		data, _, err := d.block(d.ctx, index)
		if err != nil {
			return n, err
		}
		inside := at % bs
		want := min(int64(len(p)-n), int64(repository.BlockLen(d.ld.disk.Size, d.ld.disk.BlockSize, index))-inside)
		if data == nil {
			clear(p[n : n+int(want)])
		} else {
			copy(p[n:n+int(want)], data[inside:])
		}
		n += int(want)
	}
	return n, nil
}

// ReadBlock implements repository.DiskReader.
func (d *memoryDiskReader) ReadBlock(ctx context.Context, index int64, buf []byte) (repository.Block, error) {
	if err := d.begin(ctx); err != nil {
		return repository.Block{}, err
	}
	if err := d.checkIndex(index); err != nil {
		return repository.Block{}, err
	}
	data, leaves, err := d.block(ctx, index)
	if err != nil {
		return repository.Block{}, err
	}
	b := repository.Block{Index: index, Leaves: slices.Clone(leaves)}
	if data != nil {
		if len(buf) < len(data) {
			return repository.Block{}, errors.New("read block: the buffer is too small")
		}
		b.Data = buf[:copy(buf, data)]
	}
	return b, nil
}

func (d *memoryDiskReader) checkIndex(index int64) error {
	if n := repository.Blocks(d.ld.disk.Size, d.ld.disk.BlockSize); index < 0 || index >= n {
		return fmt.Errorf("disk %s: block %d of %d", d.ld.disk.ID, index, n)
	}
	return nil
}

// Extents implements repository.DiskReader.
func (d *memoryDiskReader) Extents(ctx context.Context) iter.Seq2[repository.Extent, error] {
	return func(yield func(repository.Extent, error) bool) {
		if err := d.begin(ctx); err != nil {
			yield(repository.Extent{}, err)
			return
		}
		bs := int64(d.ld.disk.BlockSize)
		var run repository.Extent
		for i := range d.ld.indexes() {
			off, n := i*bs, int64(repository.BlockLen(d.ld.disk.Size, d.ld.disk.BlockSize, i))
			if run.Length > 0 && run.Offset+run.Length == off {
				run.Length += n
				continue
			}
			if run.Length > 0 && !yield(run, nil) {
				return
			}
			if err := d.begin(ctx); err != nil {
				yield(repository.Extent{}, err)
				return
			}
			run = repository.Extent{Offset: off, Length: n}
		}
		if run.Length > 0 {
			yield(run, nil)
		}
	}
}

// Leaves implements repository.DiskReader.
func (d *memoryDiskReader) Leaves(ctx context.Context, index int64) ([]repository.Digest, error) {
	if err := d.begin(ctx); err != nil {
		return nil, err
	}
	if err := d.checkIndex(index); err != nil {
		return nil, err
	}
	if e, ok := d.ld.entry(index); ok {
		return slices.Clone(e.leaves), nil
	}
	n := repository.BlockLen(d.ld.disk.Size, d.ld.disk.BlockSize, index)
	return make([]repository.Digest, (n+repository.LeafSize-1)/repository.LeafSize), nil
}
