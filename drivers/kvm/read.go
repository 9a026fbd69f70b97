package kvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/nbd"
)

// statusWindow is how many bytes of a disk are asked for at once by Extents.
const statusWindow = 64 << 30

// Extents asks QEMU which ranges hold data and, against a baseline, which have
// changed. Ranges that changed and read as zeros are yielded, flagged.
func (s *snapshot) Extents(ctx context.Context, disk hypervisor.DiskID, since *hypervisor.Baseline) iter.Seq2[hypervisor.Extent, error] {
	return func(yield func(hypervisor.Extent, error) bool) {
		stop := func(err error) { yield(hypervisor.Extent{}, s.fail("Extents", disk, err)) }
		if err := s.included(disk); err != nil {
			stop(err)
			return
		}
		contexts := []string{nbd.ContextBaseAllocation}
		if since != nil {
			if err := s.verdict(disk, *since); err != nil {
				stop(err)
				return
			}
			contexts = append(contexts, dirtyContext)
		}
		c, err := s.dial(ctx, disk, contexts)
		if err != nil {
			stop(err)
			return
		}
		defer c.Close() //nolint:errcheck // nothing to lose
		size := s.vm.Disk(disk).Size
		for off := int64(0); off < size; off += statusWindow {
			n := min(statusWindow, size-off)
			for e, err := range c.BlockStatusMulti(ctx, contexts, off, n) {
				if err == nil {
					err = ctx.Err()
				}
				if err != nil {
					stop(s.explain(ctx, err))
					return
				}
				zero := e.Flags[0]&nbd.StateZero != 0
				if since == nil && zero || since != nil && e.Flags[1]&nbd.StateDirty == 0 {
					continue
				}
				if !yield(hypervisor.Extent{Offset: e.Offset, Length: e.Length, Zero: zero}, nil) {
					return
				}
			}
		}
		// The job may have ended after the last answer; what it said was true, but
		// a caller must not take an abandoned snapshot for a good one.
		if err := errors.Join(ctx.Err(), s.usable()); err != nil {
			stop(err)
		}
	}
}

// verdict tells whether changes since a baseline can be known.
func (s *snapshot) verdict(disk hypervisor.DiskID, b hypervisor.Baseline) error {
	err, named := s.since[b]
	switch {
	case !named || b.Disk != disk:
		return &hypervisor.BaselineError{
			Reason: hypervisor.ReasonBaselineMissing, Err: errors.New("it was not named when the snapshot was made, or is of another disk"),
		}
	case err != nil:
		return err
	case s.disks[disk] == "":
		return &hypervisor.BaselineError{Reason: hypervisor.ReasonTrackingLost}
	}
	return nil
}

// dial connects to the export of a disk; contexts must all be granted.
func (s *snapshot) dial(ctx context.Context, disk hypervisor.DiskID, contexts []string) (*nbd.Client, error) {
	c, err := nbd.Dial(ctx, nbd.Config{
		Network: "unix", Address: s.socket, Export: string(disk), RequiredContexts: contexts,
		Inflight: s.d.cfg.ReadInflight,
	})
	if err != nil {
		return nil, s.explain(ctx, err)
	}
	if want := s.vm.Disk(disk).Size; c.Size() != want {
		_ = c.Close()
		return nil, fmt.Errorf("the export has %d bytes, the disk had %d: it was resized while the snapshot was made: %w",
			c.Size(), want, hypervisor.ErrBusy)
	}
	return c, nil
}

// explain tells the cause of a failed read, where it is known. A connection that
// broke may be the first sign that the job has ended, so that is looked at.
func (s *snapshot) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return errors.Join(context.Cause(ctx), err)
	}
	if cause := s.usable(); cause != nil {
		return fmt.Errorf("%w: %w", cause, err)
	}
	lctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	s.lost(lctx)
	if cause := s.usable(); cause != nil {
		return fmt.Errorf("%w: %w", cause, err)
	}
	return err
}

// OpenDisk opens a disk for reading at random, with several requests in flight.
func (s *snapshot) OpenDisk(ctx context.Context, disk hypervisor.DiskID) (hypervisor.DiskReader, error) {
	if err := s.included(disk); err != nil {
		return nil, s.fail("OpenDisk", disk, err)
	}
	c, err := s.dial(ctx, disk, nil)
	if err != nil {
		return nil, s.fail("OpenDisk", disk, err)
	}
	r := &reader{s: s, disk: disk, client: c, ctx: ctx}
	s.mu.Lock()
	if s.cause != nil || s.released {
		s.mu.Unlock()
		_ = c.Close()
		return nil, s.fail("OpenDisk", disk, s.usable())
	}
	if s.readers == nil {
		s.readers = map[*reader]struct{}{}
	}
	s.readers[r] = struct{}{}
	s.mu.Unlock()
	return r, nil
}

// reader reads one disk of a snapshot over NBD. It lives as long as the context
// of OpenDisk.
type reader struct {
	s      *snapshot
	disk   hypervisor.DiskID
	client *nbd.Client
	ctx    context.Context //nolint:containedctx // governs the reader's life
}

var _ hypervisor.HoleReader = (*reader)(nil)

func (r *reader) Size() int64 { return r.client.Size() }

func (r *reader) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.client.ReadAtContext(r.ctx, p, off)
	return n, r.wrap(err)
}

// ReadHole is ReadAt that tells when QEMU answered with a hole.
func (r *reader) ReadHole(p []byte, off int64) (n int, hole bool, err error) {
	n, info, err := r.client.ReadAtInfo(r.ctx, p, off)
	return n, info.Hole && n > 0, r.wrap(err)
}

func (r *reader) wrap(err error) error {
	if err == nil || err == io.EOF { //nolint:errorlint // the end of the disk is returned bare
		return err
	}
	return r.s.fail("ReadAt", r.disk, r.s.explain(r.ctx, err))
}

func (r *reader) Close() error {
	r.s.mu.Lock()
	delete(r.s.readers, r)
	r.s.mu.Unlock()
	return r.client.Close()
}
