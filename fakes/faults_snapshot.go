package fakes

import (
	"context"
	"iter"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// snapshot wraps a snapshot; the result is a Streamer when s is.
func (in *injection) snapshot(s hypervisor.Snapshot) hypervisor.Snapshot {
	base := &faultSnapshot{in: in, s: s, ref: s.Ref()}
	if st, ok := s.(hypervisor.Streamer); ok {
		return &faultStreamer{base, st}
	}
	return base
}

type faultSnapshot struct {
	in  *injection
	s   hypervisor.Snapshot
	ref hypervisor.SnapshotRef
}

func (f *faultSnapshot) call(op Op, disk hypervisor.DiskID) Call {
	return Call{Op: op, VM: f.ref.VM, Disk: disk, Name: f.ref.Name}
}

func (f *faultSnapshot) Ref() hypervisor.SnapshotRef      { return f.ref }
func (f *faultSnapshot) VM() *hypervisor.VM               { return f.in.attachments(f.s.VM()) }
func (f *faultSnapshot) Consistency() hypervisor.Achieved { return f.s.Consistency() }

func (f *faultSnapshot) Extents(ctx context.Context, disk hypervisor.DiskID, since *hypervisor.Baseline) iter.Seq2[hypervisor.Extent, error] {
	return faultSeq(ctx, f.in, f.call(OpExtents, disk), OpNextExtent, f.s.Extents(ctx, disk, since), nil, placeExtent)
}

func placeExtent(c *Call, e hypervisor.Extent) { c.Offset, c.Length = e.Offset, e.Length }

func (f *faultSnapshot) OpenDisk(ctx context.Context, disk hypervisor.DiskID) (hypervisor.DiskReader, error) {
	return f.in.openReader(ctx, f.call(OpOpenDisk, disk), func() (hypervisor.DiskReader, error) {
		return f.s.OpenDisk(ctx, disk)
	})
}

func (f *faultSnapshot) Baseline(disk hypervisor.DiskID) (b hypervisor.Baseline, err error) {
	err = f.in.call(context.Background(), f.call(OpBaseline, disk), func() (err error) {
		b, err = f.s.Baseline(disk)
		return err
	})
	if err != nil {
		return hypervisor.Baseline{}, err
	}
	return b, nil
}

func (f *faultSnapshot) Release(ctx context.Context, keep []hypervisor.DiskID) error {
	return f.in.call(ctx, f.call(OpRelease, ""), func() error { return f.s.Release(ctx, keep) })
}

type faultStreamer struct {
	*faultSnapshot
	st hypervisor.Streamer
}

var _ hypervisor.Streamer = (*faultStreamer)(nil)

func (f *faultStreamer) Stream(ctx context.Context, disk hypervisor.DiskID, since *hypervisor.Baseline, yield func(hypervisor.Extent, []byte) error) error {
	return f.in.call(ctx, f.call(OpStream, disk), func() error {
		return f.st.Stream(ctx, disk, since, func(e hypervisor.Extent, p []byte) error {
			c := f.call(OpNextStream, disk)
			placeExtent(&c, e)
			return f.in.call(ctx, c, func() error { return yield(e, p) })
		})
	})
}

// openReader wraps the reader that open gives; the result is a HoleReader when
// that one is.
func (in *injection) openReader(ctx context.Context, c Call, open func() (hypervisor.DiskReader, error)) (hypervisor.DiskReader, error) {
	var r hypervisor.DiskReader
	err := in.call(ctx, c, func() (err error) {
		r, err = open()
		return err
	})
	if err != nil {
		if r != nil {
			_ = r.Close() // the answer was lost: nobody can use it
		}
		return nil, err
	}
	base := &faultReader{faultDisk{in: in, ctx: ctx, vm: c.VM, disk: c.Disk}, r}
	if hr, ok := r.(hypervisor.HoleReader); ok {
		return &faultHoleReader{base, hr}, nil
	}
	return base, nil
}

// faultDisk is what readers and writers share. ctx is that of the call which
// opened them: it governs their life and ends what hangs.
type faultDisk struct {
	in   *injection
	ctx  context.Context
	vm   hypervisor.VMID
	disk hypervisor.DiskID
}

func (f *faultDisk) call(op Op, off, n int64) Call {
	return Call{Op: op, VM: f.vm, Disk: f.disk, Offset: off, Length: n}
}

type faultReader struct {
	faultDisk
	r hypervisor.DiskReader
}

func (f *faultReader) ReadAt(p []byte, off int64) (int, error) {
	return f.in.transfer(f.ctx, f.call(OpReadAt, off, int64(len(p))), len(p), func(k int) (int, error) {
		return f.r.ReadAt(p[:k], off)
	})
}

func (f *faultReader) Size() int64 { return f.r.Size() }

func (f *faultReader) Close() error {
	return f.in.closing(f.ctx, f.call(OpCloseReader, 0, 0), f.r.Close)
}

type faultHoleReader struct {
	*faultReader
	hr hypervisor.HoleReader
}

var _ hypervisor.HoleReader = (*faultHoleReader)(nil)

func (f *faultHoleReader) ReadHole(p []byte, off int64) (n int, hole bool, err error) {
	n, err = f.in.transfer(f.ctx, f.call(OpReadHole, off, int64(len(p))), len(p), func(k int) (n int, err error) {
		n, hole, err = f.hr.ReadHole(p[:k], off)
		return n, err
	})
	return n, hole && err == nil, err
}

type faultWriter struct {
	faultDisk
	w hypervisor.DiskWriter
}

var _ hypervisor.DiskWriter = (*faultWriter)(nil)

func (f *faultWriter) WriteAt(p []byte, off int64) (int, error) {
	return f.in.transfer(f.ctx, f.call(OpWriteAt, off, int64(len(p))), len(p), func(k int) (int, error) {
		return f.w.WriteAt(p[:k], off)
	})
}

func (f *faultWriter) WriteZeroes(off, n int64) error {
	return f.in.call(f.ctx, f.call(OpWriteZeroes, off, n), func() error { return f.w.WriteZeroes(off, n) })
}

func (f *faultWriter) Commit() error {
	return f.in.call(f.ctx, f.call(OpCommit, 0, 0), f.w.Commit)
}

func (f *faultWriter) Close() error {
	return f.in.closing(f.ctx, f.call(OpCloseWriter, 0, 0), f.w.Close)
}
