package backup

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

// streamDisk moves a disk over a transport that delivers ascending extents once.
func (m *mover) streamDisk(ctx context.Context, plan *DiskPlan, res *DiskResult) error {
	s, ok := m.snap.(hypervisor.Streamer)
	if !ok {
		return &hypervisor.Error{Op: "read", VM: m.snap.VM().ID, Disk: plan.ID, Err: fmt.Errorf("driver offers neither random nor sequential reading")}
	}
	for {
		st := &stream{m: m, plan: plan, res: res, block: -1}
		err := st.run(ctx, s)
		// Nothing was written yet when the baseline turns out to be invalid at
		// once; later it is too late, and the run fails.
		if err != nil && st.w == nil && plan.since != nil && fallBack(plan, err) {
			continue
		}
		return err
	}
}

// stream assembles blocks from extents.
type stream struct {
	m    *mover
	plan *DiskPlan
	res  *DiskResult
	w    repository.DiskWriter
	base repository.DiskReader // the parent's disk, for blocks that changed in part
	g    *errgroup.Group
	ctx  context.Context // of the workers of this stream's run

	block int64  // being assembled, -1: none
	buf   []byte // of the block
	end   int64  // of the last extent
	low   watermark
	seg   int64 // segments behind which the repository may forget
}

func (st *stream) run(ctx context.Context, s hypervisor.Streamer) error {
	g, gctx := errgroup.WithContext(ctx)
	st.g, st.ctx = g, gctx
	err := s.Stream(gctx, st.plan.ID, st.plan.since, st.take)
	if err == nil {
		err = st.open()
	}
	if err == nil {
		err = st.finish()
	} else if st.buf != nil {
		st.m.free(st.buf)
	}
	if werr := g.Wait(); werr != nil {
		err = werr
	}
	if st.base != nil {
		_ = st.base.Close() // a reader has nothing to lose
	}
	if err != nil {
		return err
	}
	err = st.w.Close(ctx)
	st.res.Stats = st.w.Stats()
	return err
}

// open starts the disk in the repository, once it is known that the baseline
// holds.
func (st *stream) open() (err error) {
	if st.w != nil {
		return nil
	}
	st.m.decided(st.plan, st.res)
	inherit := st.plan.Mode == Incremental
	st.w, err = st.m.writer.Disk(st.ctx, repository.DiskSpec{ID: string(st.plan.ID), Size: st.plan.Size, BlockSize: st.plan.blockSize, Inherit: inherit})
	if err == nil && inherit {
		st.base, err = st.m.parent.Disk(st.ctx, string(st.plan.ID))
	}
	return err
}

func (st *stream) take(e hypervisor.Extent, data []byte) error {
	if err := st.open(); err != nil {
		return err
	}
	if e.Offset < st.end || e.Length <= 0 || e.Offset > st.plan.Size-e.Length || (data != nil && int64(len(data)) != e.Length) {
		return &hypervisor.Error{Op: "stream", VM: st.m.snap.VM().ID, Disk: st.plan.ID, Err: fmt.Errorf("driver broke its contract: extent [%d,+%d) after %d in a disk of %d bytes", e.Offset, e.Length, st.end, st.plan.Size)}
	}
	st.end = e.End()
	bs := int64(st.plan.blockSize)
	for off := e.Offset; off < e.End(); {
		b := off / bs
		if b != st.block {
			if err := st.finish(); err != nil {
				return err
			}
			if err := st.begin(b); err != nil {
				return err
			}
		}
		n := min(e.End(), b*bs+int64(len(st.buf))) - off
		dst := st.buf[off-b*bs:][:n]
		if data == nil {
			clear(dst)
		} else {
			copy(dst, data[off-e.Offset:])
			st.res.ReadBytes += n
		}
		off += n
	}
	return nil
}

// begin starts a block with what it held before: the parent's bytes in an
// incremental, zeros in a full.
func (st *stream) begin(b int64) (err error) {
	n := repository.BlockLen(st.plan.Size, st.plan.blockSize, b)
	if st.buf, err = st.m.buffer(st.ctx, n); err != nil {
		return err
	}
	st.block = b
	if mark := st.low.below(b); mark/st.m.segment(st.plan) > st.seg {
		if err := st.w.Advance(st.ctx, mark); err != nil {
			return err
		}
		st.seg = mark / st.m.segment(st.plan)
	}
	st.low.start(b)
	clear(st.buf)
	if st.base == nil {
		return nil
	}
	old, err := st.base.ReadBlock(st.ctx, b, make([]byte, st.plan.blockSize))
	if err != nil {
		return fmt.Errorf("disk %s: block %d of the earlier point, needed beside a change: %w", st.plan.ID, b, err)
	}
	copy(st.buf, old.Data)
	return nil
}

// finish gives the assembled block away.
func (st *stream) finish() error {
	if st.block < 0 {
		return nil
	}
	b, buf := st.block, st.buf
	st.block, st.buf = -1, nil
	st.g.Go(func() error {
		defer st.m.free(buf)
		if err := st.m.store(st.ctx, st.w, b, buf, false); err != nil {
			return err
		}
		done := st.low.done(b)
		st.m.events.progress(ProgressEvent{VM: st.m.vm, Disk: st.plan.ID, Done: min(done*int64(st.plan.blockSize), st.plan.Size), Size: st.plan.Size})
		return nil
	})
	return nil
}
