package kopiarepo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync/atomic"

	"github.com/kopia/kopia/repo/content"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// reader reads one committed point.
type reader struct {
	r      *Repository
	t      *tree
	closed atomic.Bool
}

var _ repository.Reader = (*reader)(nil)

func (rd *reader) Point() *repository.Point        { return rd.t.e.point() }
func (rd *reader) DigestKey() repository.DigestKey { return repository.DigestKey(rd.t.cfg.DigestKey) }

func (rd *reader) Close() error {
	rd.closed.Store(true)
	return nil
}

var errReaderClosed = errors.New("the point was closed")

// Disk opens a disk. The map of segments is checked against the digest that the
// record holds.
func (rd *reader) Disk(ctx context.Context, id string) (repository.DiskReader, error) {
	if rd.closed.Load() {
		return nil, errReaderClosed
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m, err := rd.t.disk(ctx, id)
	if err != nil {
		return nil, err
	}
	sums, err := m.segmentSums(ctx)
	if err != nil {
		return nil, err
	}
	h := digest.New(rd.DigestKey())
	if want := rd.t.e.point().Disk(id).Root; rootOf(h, m.size, sums) != want {
		return nil, fmt.Errorf("%s: %w: its digests do not make the root in the record", m.what, repository.ErrDamaged)
	}
	return &diskReader{rd: rd, ctx: ctx, m: m, h: h, sums: sums}, nil
}

// File opens a stored file.
func (rd *reader) File(ctx context.Context, name string) (io.ReadCloser, error) {
	if rd.closed.Load() {
		return nil, errReaderClosed
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	for _, f := range rd.t.e.body.Files {
		if f.Name != name {
			continue
		}
		what := fmt.Sprintf("point %s, file %s", rd.t.e.ID, name)
		e := rd.t.root[fileEntry(name)]
		if e == nil || e.FileSize != f.Size {
			return nil, fmt.Errorf("%s: %w: the snapshot does not agree with the record", what, repository.ErrDamaged)
		}
		b, err := getObject(ctx, rd.t.dr, e.ObjectID, repository.MaxFile)
		if err == nil && int64(len(b)) != f.Size {
			err = fmt.Errorf("it has %d bytes, not %d", len(b), f.Size)
		}
		if err != nil {
			return nil, damaged(ctx, err, what)
		}
		return io.NopCloser(bytes.NewReader(b)), nil
	}
	return nil, fmt.Errorf("point %s, file %s: %w", rd.t.e.ID, name, repository.ErrNotFound)
}

// diskReader reads a disk of a point.
type diskReader struct {
	rd     *reader
	ctx    context.Context // governs ReadAt, which takes none
	m      *diskMap
	h      *digest.Hasher
	sums   map[int64]repository.Digest
	closed atomic.Bool
}

var _ repository.DiskReader = (*diskReader)(nil)

func (d *diskReader) Size() int64    { return d.m.size }
func (d *diskReader) BlockSize() int { return d.m.blockSize }

func (d *diskReader) Close() error {
	d.closed.Store(true)
	return nil
}

func (d *diskReader) open() error {
	if d.closed.Load() || d.rd.closed.Load() {
		return errReaderClosed
	}
	return nil
}

// block finds a block: its content, or zero, and its leaves.
func (d *diskReader) block(ctx context.Context, index int64) (id content.ID, zero bool, leaves []repository.Digest, err error) {
	m := d.m
	if index < 0 || index >= m.blocks() {
		return id, false, nil, fmt.Errorf("%s: block %d of %d does not exist", m.what, index, m.blocks())
	}
	s := m.segmentOf(index)
	sm, err := m.load(ctx, s)
	if err != nil {
		return id, false, nil, err
	}
	i := index - s*m.perSegment()
	n := leavesOf(int64(m.blockLen(index)))
	if sm.blocks == nil || m.zeros[sm.blocks[i]] {
		if sm.leaves != nil {
			for _, l := range sm.leaves[int(i)*m.leavesPerBlock():][:n] {
				if !l.IsZero() {
					return id, false, nil, d.broken(index, errors.New("it is zeros, but its digests are not"))
				}
			}
		} else if !d.sums[s].IsZero() {
			return id, false, nil, d.broken(index, errors.New("its segment is zeros, but the segment's digest is not"))
		}
		return id, true, make([]repository.Digest, n), nil
	}
	cid, _, ok := sm.blocks[i].ContentID()
	if !ok {
		return id, false, nil, d.broken(index, errors.New("its object is not one content"))
	}
	return cid, false, sm.leaves[int(i)*m.leavesPerBlock():][:n:n], nil
}

func (d *diskReader) broken(index int64, err error) error {
	off := index * int64(d.m.blockSize)
	return fmt.Errorf("%s, bytes %d to %d: %w: %w", d.m.what, off, off+int64(d.m.blockLen(index)), repository.ErrDamaged, err)
}

// fetch reads the content of a block.
func (d *diskReader) fetch(ctx context.Context, index int64, id content.ID) ([]byte, error) {
	b, err := getContent(ctx, d.m.dr, id)
	if err == nil && len(b) != d.m.blockLen(index) {
		err = fmt.Errorf("it has %d bytes, not %d", len(b), d.m.blockLen(index))
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, d.broken(index, err)
	}
	return b, nil
}

// ReadBlock reads one whole block with its digests.
func (d *diskReader) ReadBlock(ctx context.Context, index int64, buf []byte) (repository.Block, error) {
	if err := errors.Join(ctx.Err(), d.open()); err != nil {
		return repository.Block{}, err
	}
	if len(buf) < d.m.blockSize {
		return repository.Block{}, fmt.Errorf("the buffer has %d bytes, a block %d", len(buf), d.m.blockSize)
	}
	id, zero, leaves, err := d.block(ctx, index)
	if err != nil {
		return repository.Block{}, err
	}
	out := repository.Block{Index: index, Leaves: leaves}
	if zero {
		return out, nil
	}
	b, err := d.fetch(ctx, index, id)
	if err != nil {
		return repository.Block{}, err
	}
	out.Data = buf[:copy(buf, b)]
	out.Leaves = append([]repository.Digest(nil), leaves...)
	return out, nil
}

// Leaves returns the digests stored for a block.
func (d *diskReader) Leaves(ctx context.Context, index int64) ([]repository.Digest, error) {
	if err := errors.Join(ctx.Err(), d.open()); err != nil {
		return nil, err
	}
	_, _, leaves, err := d.block(ctx, index)
	return append([]repository.Digest(nil), leaves...), err
}

// ReadAt reads through the cache of decoded blocks.
func (d *diskReader) ReadAt(p []byte, off int64) (int, error) {
	if err := errors.Join(d.ctx.Err(), d.open()); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, fmt.Errorf("%s: read at offset %d", d.m.what, off)
	}
	n := 0
	for n < len(p) {
		if off >= d.m.size {
			return n, io.EOF
		}
		index := off / int64(d.m.blockSize)
		skip := int(off - index*int64(d.m.blockSize))
		want := min(len(p)-n, d.m.blockLen(index)-skip)
		if err := d.readPart(index, skip, p[n:n+want]); err != nil {
			return n, err
		}
		n += want
		off += int64(want)
	}
	return n, nil
}

func (d *diskReader) readPart(index int64, skip int, p []byte) error {
	id, zero, _, err := d.block(d.ctx, index)
	if err != nil {
		return err
	}
	if zero {
		clear(p)
		return nil
	}
	b, err := d.rd.r.cache.get(d.ctx, id, func(ctx context.Context) ([]byte, int64, error) {
		b, err := d.fetch(ctx, index, id)
		return b, int64(len(b)), err
	})
	if err != nil {
		return err
	}
	copy(p, b[skip:])
	return nil
}

// Extents yields the ranges that hold data.
func (d *diskReader) Extents(ctx context.Context) iter.Seq2[repository.Extent, error] {
	return func(yield func(repository.Extent, error) bool) {
		var run repository.Extent
		flush := func() bool {
			out := run
			run = repository.Extent{}
			return out.Length == 0 || yield(out, nil)
		}
		for s := int64(0); s < d.m.segments(); s++ {
			if err := errors.Join(ctx.Err(), d.open()); err != nil {
				yield(repository.Extent{}, err)
				return
			}
			key, zero, err := d.m.segment(ctx, s)
			if err != nil {
				yield(repository.Extent{}, err)
				return
			}
			if zero {
				continue
			}
			sm, err := d.m.load(ctx, s)
			if err != nil {
				yield(repository.Extent{}, err)
				return
			}
			for i, id := range sm.blocks {
				if d.m.zeros[id] {
					continue
				}
				off := s*digest.SegmentSpan + int64(i)*int64(d.m.blockSize)
				n := int64(repository.BlockLen(key.length, d.m.blockSize, int64(i)))
				if run.Length > 0 && run.Offset+run.Length == off {
					run.Length += n
					continue
				}
				if !flush() {
					return
				}
				run = repository.Extent{Offset: off, Length: n}
			}
		}
		flush()
	}
}

func isContext(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
