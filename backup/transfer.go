package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// mover moves blocks from a snapshot into a point. Its memory is its buffers.
type mover struct {
	snap   hypervisor.Snapshot
	writer repository.Writer
	parent repository.Reader // nil without a parent
	hash   *digest.Hasher
	slots  chan []byte // one per block in flight; nil until first used
	events *Events
	vm     string
	// auditor is the zero value where nothing is audited; see Options.Audit.
	auditor auditor
}

func newMover(snap hypervisor.Snapshot, w repository.Writer, inFlight int, events *Events) *mover {
	m := &mover{
		snap: snap, writer: w, events: events, vm: snap.VM().Name,
		hash:  digest.New(w.DigestKey()),
		slots: make(chan []byte, inFlight), auditor: auditor{rate: AuditRate{Off: true}},
	}
	for range inFlight {
		m.slots <- nil
	}
	return m
}

// buffer waits for a free slot and returns a buffer of n bytes.
func (m *mover) buffer(ctx context.Context, n int) ([]byte, error) {
	select {
	case b := <-m.slots:
		if cap(b) < n {
			b = make([]byte, n)
		}
		return b[:n], nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (m *mover) free(b []byte) { m.slots <- b }

// disk moves one disk. plan.since decides between incremental and full; a
// baseline that the hypervisor no longer knows turns it into a full, and plan
// says why afterwards.
func (m *mover) disk(ctx context.Context, plan *DiskPlan, res *DiskResult) error {
	r, err := m.snap.OpenDisk(ctx, plan.ID)
	if errors.Is(err, errors.ErrUnsupported) {
		return m.streamDisk(ctx, plan, res)
	}
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // a reader has nothing to lose
	if r.Size() != plan.Size {
		return fmt.Errorf("disk %s has %d bytes in the snapshot and %d in its description", plan.ID, r.Size(), plan.Size)
	}
	set, err := m.blocks(ctx, plan)
	if err == nil && plan.Mode == Incremental {
		var sound bool
		if sound, err = m.audit(ctx, r, set, plan, res); err == nil && !sound {
			set, err = m.collect(ctx, plan, nil)
		}
	}
	if err != nil {
		return err
	}
	m.decided(plan, res)
	w, err := m.writer.Disk(ctx, repository.DiskSpec{
		ID: string(plan.ID), Size: plan.Size, BlockSize: plan.blockSize, Inherit: plan.Mode == Incremental,
	})
	if err != nil {
		return err
	}
	if err := m.move(ctx, r, w, set, plan, res); err != nil {
		return err
	}
	err = w.Close(ctx)
	res.Stats = w.Stats()
	return err
}

func (m *mover) decided(plan *DiskPlan, res *DiskResult) {
	res.Mode, res.Reason, res.Detail = plan.Mode, plan.Reason, plan.Detail
	m.events.disk(DiskEvent{VM: m.vm, Disk: plan.ID, Mode: plan.Mode, Reason: plan.Reason, Detail: plan.Detail, Size: plan.Size})
}

// blocks collects what has to be read, and falls back to a full read when the
// baseline is not valid.
func (m *mover) blocks(ctx context.Context, plan *DiskPlan) (*blockSet, error) {
	if plan.since != nil {
		set, err := m.collect(ctx, plan, plan.since)
		if err == nil || !fallBack(plan, err) {
			return set, err
		}
	}
	return m.collect(ctx, plan, nil)
}

// fallBack turns an incremental into a full if err says that its baseline is not
// valid.
func fallBack(plan *DiskPlan, err error) bool {
	reason := hypervisor.BaselineReason(err)
	if reason == "" {
		return false
	}
	plan.Mode, plan.Reason, plan.Detail, plan.since = Full, reason, err.Error(), nil
	return true
}

func (m *mover) collect(ctx context.Context, plan *DiskPlan, since *hypervisor.Baseline) (*blockSet, error) {
	set := newBlockSet(plan.Size, plan.blockSize)
	for e, err := range hypervisor.CheckedExtents(ctx, m.snap, plan.ID, since) {
		if err != nil {
			return nil, err
		}
		if since == nil && e.Zero {
			continue // what is not read is zeros in a full
		}
		set.add(e)
	}
	set.flush()
	return set, nil
}

// move reads, hashes and stores the blocks of a set, many at a time.
func (m *mover) move(ctx context.Context, r hypervisor.DiskReader, w repository.DiskWriter, set *blockSet, plan *DiskPlan, res *DiskResult) error {
	g, gctx := errgroup.WithContext(ctx)
	var read atomic.Int64
	low := &watermark{}
	segment, advanced := m.segment(plan), int64(0)
	produce := func() error {
		for i, zero := set.next(0); i >= 0; i, zero = set.next(i + 1) {
			if mark := low.below(i); mark/segment > advanced/segment {
				if err := w.Advance(gctx, mark); err != nil {
					return err
				}
				advanced = mark
			}
			if zero {
				if err := w.WriteBlock(gctx, repository.Block{Index: i}); err != nil {
					return err
				}
				continue
			}
			buf, err := m.buffer(gctx, repository.BlockLen(plan.Size, plan.blockSize, i))
			if err != nil {
				return err
			}
			low.start(i)
			g.Go(func() error {
				defer m.free(buf)
				hole, err := readBlock(r, buf, i*set.blockSize)
				if err != nil {
					return &hypervisor.Error{Op: "read", VM: m.snap.VM().ID, Disk: plan.ID, Err: err}
				}
				read.Add(int64(len(buf)))
				if err := m.store(gctx, w, i, buf, hole); err != nil {
					return err
				}
				done := low.done(i)
				m.events.progress(ProgressEvent{VM: m.vm, Disk: plan.ID, Done: min(done*set.blockSize, plan.Size), Size: plan.Size, Read: read.Load(), Audited: res.AuditedBytes})
				return nil
			})
		}
		return nil
	}
	err := produce()
	if werr := g.Wait(); werr != nil {
		err = werr // the worker's error is the cause of the producer's
	}
	res.ReadBytes = read.Load()
	if err != nil {
		return err
	}
	m.events.progress(ProgressEvent{VM: m.vm, Disk: plan.ID, Done: plan.Size, Size: plan.Size, Read: read.Load(), Audited: res.AuditedBytes})
	return context.Cause(ctx)
}

// segment returns how many blocks of the disk one segment has.
func (m *mover) segment(plan *DiskPlan) int64 { return digest.SegmentSpan / int64(plan.blockSize) }

// store hashes a block and gives it to the repository.
func (m *mover) store(ctx context.Context, w repository.DiskWriter, index int64, data []byte, hole bool) error {
	if hole {
		return w.WriteBlock(ctx, repository.Block{Index: index})
	}
	var few [repository.MaxBlockSize / repository.LeafSize]repository.Digest
	leaves := m.hash.Leaves(few[:0], data)
	for i := range leaves {
		if !leaves[i].IsZero() {
			return w.WriteBlock(ctx, repository.Block{Index: index, Data: data, Leaves: leaves})
		}
	}
	return w.WriteBlock(ctx, repository.Block{Index: index})
}

// readBlock fills p from off. hole: all of it is zeros, and p was not filled.
func readBlock(r hypervisor.DiskReader, p []byte, off int64) (hole bool, err error) {
	var n int
	if h, ok := r.(hypervisor.HoleReader); ok {
		n, hole, err = h.ReadHole(p, off)
	} else {
		n, err = r.ReadAt(p, off)
	}
	//nolint:errorlint // the end of a disk is io.EOF bare; a wrapped one tells of something else that ended
	if end := err == io.EOF; err == nil || end {
		if n == len(p) {
			return hole, nil
		}
		err = io.ErrUnexpectedEOF
	}
	return false, fmt.Errorf("%d of %d bytes at %d: %w", n, len(p), off, err)
}

// watermark follows which blocks are still in flight. Blocks start in ascending
// order and end in any.
type watermark struct {
	mu     sync.Mutex
	flight []int64 // ascending
	ended  map[int64]bool
	last   int64 // behind the last block that was started
}

func (w *watermark) start(i int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.flight = append(w.flight, i)
	w.last = i + 1
}

// done ends a block and returns the index below which all started blocks ended.
func (w *watermark) done(i int64) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended == nil {
		w.ended = map[int64]bool{}
	}
	w.ended[i] = true
	for len(w.flight) > 0 && w.ended[w.flight[0]] {
		delete(w.ended, w.flight[0])
		w.flight = w.flight[1:]
	}
	if len(w.flight) == 0 {
		return w.last
	}
	return w.flight[0]
}

// below returns the index below which nothing is in flight, given that every
// block below next was started or never will be.
func (w *watermark) below(next int64) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.flight) == 0 {
		return next
	}
	return w.flight[0]
}
