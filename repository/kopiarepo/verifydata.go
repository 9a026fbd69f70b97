package kopiarepo

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/kopia/kopia/repo"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// segmentWork is one distinct segment, and who needs it.
type segmentWork struct {
	d      *diskReader
	s      int64
	points []repository.PointID
	// more are places of the same segment in other points; only their length counts.
	more int64
}

// data reads every block of every disk and compares it with its digests. What
// points share is read once.
func (v *verifier) data(ctx context.Context, _ repo.DirectRepository) error {
	type key struct {
		segmentKey
		want repository.Digest
	}
	work := map[key]*segmentWork{}
	var order []*segmentWork
	for _, e := range v.points {
		rd, err := v.r.Open(ctx, e.ID)
		if err != nil {
			if ctx.Err() != nil {
				return err
			}
			v.broken(e, fmt.Sprintf("point %s", e.ID), err, totalSize(e))
			continue
		}
		v.files(ctx, e, rd)
		for _, disk := range e.body.Disks {
			dr, err := rd.Disk(ctx, disk.ID)
			if err != nil {
				if ctx.Err() != nil {
					return err
				}
				v.broken(e, fmt.Sprintf("point %s, disk %s", e.ID, disk.ID), err, disk.Size)
				continue
			}
			d := dr.(*diskReader)
			for s := int64(0); s < d.m.segments(); s++ {
				sk, zero, err := d.m.segment(ctx, s)
				if err != nil {
					if ctx.Err() != nil {
						return err
					}
					v.broken(e, fmt.Sprintf("point %s, disk %s, segment %d", e.ID, disk.ID, s), err, d.m.segmentLen(s))
					continue
				}
				if zero && d.sums[s].IsZero() {
					v.progress(d.m.segmentLen(s))
					continue
				}
				k := key{sk, d.sums[s]}
				w := work[k]
				if w == nil {
					w = &segmentWork{d: d, s: s}
					work[k] = w
					order = append(order, w)
				} else {
					w.more += d.m.segmentLen(s)
				}
				w.points = append(w.points, e.ID)
			}
		}
	}
	for _, w := range order {
		if err := v.segment(ctx, w); err != nil {
			return err
		}
	}
	return nil
}

func totalSize(e *entry) (n int64) {
	for _, d := range e.body.Disks {
		n += d.Size
	}
	return n
}

func (v *verifier) broken(e *entry, object string, err error, skipped int64) {
	v.found(repository.Damage{Object: object, Problem: "unreadable", Detail: err.Error(), Points: []repository.PointID{e.ID}})
	v.progress(skipped)
}

func (v *verifier) files(ctx context.Context, e *entry, rd repository.Reader) {
	for _, f := range e.body.Files {
		r, err := rd.File(ctx, f.Name)
		if err == nil {
			err = r.Close()
		}
		if err != nil && ctx.Err() == nil {
			v.broken(e, fmt.Sprintf("point %s, file %s", e.ID, f.Name), err, 0)
		}
	}
}

// segment checks one segment: its map against the segment digest, and its blocks
// against their leaves.
func (v *verifier) segment(ctx context.Context, w *segmentWork) error {
	d, m := w.d, w.d.m
	what := fmt.Sprintf("%s, segment %d", m.what, w.s)
	report := func(problem string, err error) {
		v.found(repository.Damage{Object: what, Problem: problem, Detail: err.Error(), Points: w.points})
	}
	sm, err := m.load(ctx, w.s)
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil && sm.blocks != nil && d.h.Segment(sm.leaves) != d.sums[w.s] {
		err = fmt.Errorf("%w: its leaves do not make the segment's digest", repository.ErrDamaged)
	}
	if err != nil {
		report("unreadable", err)
		v.progress(m.segmentLen(w.s) + w.more)
		return nil
	}
	first := w.s * m.perSegment()
	var mu sync.Mutex
	bad := int64(0)
	var firstErr error
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(cap(v.r.workers))
	for i := range m.segmentBlocks(w.s) {
		g.Go(func() error {
			err := v.block(gctx, d, first+i)
			if gctx.Err() != nil {
				return gctx.Err()
			}
			if err != nil {
				mu.Lock()
				bad++
				if firstErr == nil {
					firstErr = err
				}
				mu.Unlock()
			}
			v.progress(int64(m.blockLen(first + i)))
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if bad > 0 {
		report("digest", fmt.Errorf("%d blocks, the first: %w", bad, firstErr))
	}
	v.progress(w.more)
	return nil
}

var buffers = sync.Pool{New: func() any { b := make([]byte, repository.MaxBlockSize); return &b }}

func (v *verifier) block(ctx context.Context, d *diskReader, index int64) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	b, err := d.ReadBlock(ctx, index, *buf)
	if err != nil || b.Data == nil {
		return err
	}
	v.mu.Lock()
	v.report.Bytes += int64(len(b.Data))
	v.mu.Unlock()
	for i, leaf := range d.h.Leaves(nil, b.Data) {
		if leaf != b.Leaves[i] {
			return d.broken(index, errors.New("its bytes do not make its digests"))
		}
	}
	if digest.IsZero(b.Data) {
		return d.broken(index, errors.New("it is stored as data, but is zeros"))
	}
	return nil
}
