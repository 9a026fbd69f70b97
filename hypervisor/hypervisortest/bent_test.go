package hypervisortest

import (
	"context"
	"iter"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// bent is a hypervisor whose methods can be replaced one by one: a place for
// planted bugs. A replacement gets the real one to call.
type bent struct {
	hypervisor.Target
	hypervisor.Thawer

	info      func(hypervisor.Info) hypervisor.Info
	vms       func(context.Context, hypervisor.Query) iter.Seq2[*hypervisor.VM, error]
	vm        func(*hypervisor.VM, error) (*hypervisor.VM, error)
	create    func(context.Context, hypervisor.VMID, hypervisor.SnapshotOptions) (hypervisor.Snapshot, error)
	openSnap  func(context.Context, hypervisor.SnapshotRef) (hypervisor.Snapshot, error)
	snapshots func(context.Context, hypervisor.VMID) iter.Seq2[hypervisor.SnapshotRef, error]
	baselines func(context.Context, hypervisor.VMID) iter.Seq2[hypervisor.Baseline, error]
	forget    func(context.Context, hypervisor.Baseline) error
	closing   func() error
	createVM  func(context.Context, *hypervisor.VMSpec) (*hypervisor.VM, error)
	power     func(context.Context, hypervisor.VMID, hypervisor.Power) error
	deleteVM  func(context.Context, hypervisor.VMID) error
	openWrite func(context.Context, hypervisor.VMID, hypervisor.DiskID) (hypervisor.DiskWriter, error)

	snap   func(*bentSnapshot) // bends each snapshot that is given out
	writer func(*bentWriter)
}

func (b *bent) Info() hypervisor.Info {
	if b.info != nil {
		return b.info(b.Target.Info())
	}
	return b.Target.Info()
}

func (b *bent) VMs(ctx context.Context, q hypervisor.Query) iter.Seq2[*hypervisor.VM, error] {
	if b.vms != nil {
		return b.vms(ctx, q)
	}
	return b.Target.VMs(ctx, q)
}

func (b *bent) VM(ctx context.Context, id hypervisor.VMID) (*hypervisor.VM, error) {
	vm, err := b.Target.VM(ctx, id)
	if b.vm != nil {
		return b.vm(vm, err)
	}
	return vm, err
}

func (b *bent) wrap(s hypervisor.Snapshot, err error) (hypervisor.Snapshot, error) {
	if err != nil || b.snap == nil {
		return s, err
	}
	x := &bentSnapshot{Snapshot: s}
	b.snap(x)
	if st, ok := s.(hypervisor.Streamer); ok {
		return &bentStreamer{x, st}, nil
	}
	return x, nil
}

func (b *bent) CreateSnapshot(ctx context.Context, id hypervisor.VMID, opts *hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
	if b.create != nil {
		o := hypervisor.SnapshotOptions{}
		if opts != nil {
			o = *opts
		}
		return b.wrap(b.create(ctx, id, o))
	}
	return b.wrap(b.Target.CreateSnapshot(ctx, id, opts))
}

func (b *bent) OpenSnapshot(ctx context.Context, ref hypervisor.SnapshotRef) (hypervisor.Snapshot, error) {
	if b.openSnap != nil {
		return b.wrap(b.openSnap(ctx, ref))
	}
	return b.wrap(b.Target.OpenSnapshot(ctx, ref))
}

func (b *bent) Snapshots(ctx context.Context, id hypervisor.VMID) iter.Seq2[hypervisor.SnapshotRef, error] {
	if b.snapshots != nil {
		return b.snapshots(ctx, id)
	}
	return b.Target.Snapshots(ctx, id)
}

func (b *bent) Baselines(ctx context.Context, id hypervisor.VMID) iter.Seq2[hypervisor.Baseline, error] {
	if b.baselines != nil {
		return b.baselines(ctx, id)
	}
	return b.Target.Baselines(ctx, id)
}

func (b *bent) ForgetBaseline(ctx context.Context, x hypervisor.Baseline) error {
	if b.forget != nil {
		return b.forget(ctx, x)
	}
	return b.Target.ForgetBaseline(ctx, x)
}

func (b *bent) Close() error {
	if b.closing != nil {
		return b.closing()
	}
	return b.Target.Close()
}

func (b *bent) CreateVM(ctx context.Context, spec *hypervisor.VMSpec) (*hypervisor.VM, error) {
	if b.createVM != nil {
		return b.createVM(ctx, spec)
	}
	return b.Target.CreateVM(ctx, spec)
}

func (b *bent) SetPower(ctx context.Context, id hypervisor.VMID, p hypervisor.Power) error {
	if b.power != nil {
		return b.power(ctx, id, p)
	}
	return b.Target.SetPower(ctx, id, p)
}

func (b *bent) DeleteVM(ctx context.Context, id hypervisor.VMID) error {
	if b.deleteVM != nil {
		return b.deleteVM(ctx, id)
	}
	return b.Target.DeleteVM(ctx, id)
}

func (b *bent) OpenDiskWriter(ctx context.Context, id hypervisor.VMID, disk hypervisor.DiskID) (hypervisor.DiskWriter, error) {
	open := b.Target.OpenDiskWriter
	if b.openWrite != nil {
		open = b.openWrite
	}
	w, err := open(ctx, id, disk)
	if err != nil || b.writer == nil {
		return w, err
	}
	x := &bentWriter{DiskWriter: w}
	b.writer(x)
	return x, nil
}

// bentSnapshot is a snapshot whose methods can be replaced.
type bentSnapshot struct {
	hypervisor.Snapshot
	def     func(*hypervisor.VM) *hypervisor.VM
	level   func(hypervisor.Achieved) hypervisor.Achieved
	extents func(context.Context, hypervisor.DiskID, *hypervisor.Baseline) iter.Seq2[hypervisor.Extent, error]
	open    func(context.Context, hypervisor.DiskID) (hypervisor.DiskReader, error)
	read    func(r hypervisor.DiskReader, disk hypervisor.DiskID, p []byte, off int64) (int, error)
	size    func(int64) int64
	release func(context.Context, []hypervisor.DiskID) error
	stream  func(hypervisor.Streamer, context.Context, hypervisor.DiskID, *hypervisor.Baseline, func(hypervisor.Extent, []byte) error) error
}

func (s *bentSnapshot) VM() *hypervisor.VM {
	if s.def != nil {
		return s.def(s.Snapshot.VM())
	}
	return s.Snapshot.VM()
}

func (s *bentSnapshot) Consistency() hypervisor.Achieved {
	if s.level != nil {
		return s.level(s.Snapshot.Consistency())
	}
	return s.Snapshot.Consistency()
}

func (s *bentSnapshot) Extents(ctx context.Context, disk hypervisor.DiskID, since *hypervisor.Baseline) iter.Seq2[hypervisor.Extent, error] {
	if s.extents != nil {
		return s.extents(ctx, disk, since)
	}
	return s.Snapshot.Extents(ctx, disk, since)
}

func (s *bentSnapshot) OpenDisk(ctx context.Context, disk hypervisor.DiskID) (hypervisor.DiskReader, error) {
	open := s.Snapshot.OpenDisk
	if s.open != nil {
		open = s.open
	}
	r, err := open(ctx, disk)
	if err != nil || (s.read == nil && s.size == nil) {
		return r, err
	}
	return &bentReader{r, s, disk}, nil
}

func (s *bentSnapshot) Release(ctx context.Context, keep []hypervisor.DiskID) error {
	if s.release != nil {
		return s.release(ctx, keep)
	}
	return s.Snapshot.Release(ctx, keep)
}

type bentStreamer struct {
	*bentSnapshot
	st hypervisor.Streamer
}

func (s *bentStreamer) Stream(ctx context.Context, disk hypervisor.DiskID, since *hypervisor.Baseline, yield func(hypervisor.Extent, []byte) error) error {
	if s.stream != nil {
		return s.stream(s.st, ctx, disk, since, yield)
	}
	return s.st.Stream(ctx, disk, since, yield)
}

type bentReader struct {
	hypervisor.DiskReader
	s    *bentSnapshot
	disk hypervisor.DiskID
}

func (r *bentReader) ReadAt(p []byte, off int64) (int, error) {
	if r.s.read != nil {
		return r.s.read(r.DiskReader, r.disk, p, off)
	}
	return r.DiskReader.ReadAt(p, off)
}

func (r *bentReader) Size() int64 {
	if r.s.size != nil {
		return r.s.size(r.DiskReader.Size())
	}
	return r.DiskReader.Size()
}

// bentWriter is a writer whose methods can be replaced.
type bentWriter struct {
	hypervisor.DiskWriter
	write  func(p []byte, off int64) (int, error)
	zeroes func(off, n int64) error
	commit func() error
}

func (w *bentWriter) WriteAt(p []byte, off int64) (int, error) {
	if w.write != nil {
		return w.write(p, off)
	}
	return w.DiskWriter.WriteAt(p, off)
}

func (w *bentWriter) WriteZeroes(off, n int64) error {
	if w.zeroes != nil {
		return w.zeroes(off, n)
	}
	return w.DiskWriter.WriteZeroes(off, n)
}

func (w *bentWriter) Commit() error {
	if w.commit != nil {
		return w.commit()
	}
	return w.DiskWriter.Commit()
}

// edit bends extents: f gets the list of a call that went well.
func edit(f func(list []hypervisor.Extent, since *hypervisor.Baseline, size int64) []hypervisor.Extent) func(*bentSnapshot) {
	return func(s *bentSnapshot) {
		s.extents = func(ctx context.Context, disk hypervisor.DiskID, since *hypervisor.Baseline) iter.Seq2[hypervisor.Extent, error] {
			return func(yield func(hypervisor.Extent, error) bool) {
				var list []hypervisor.Extent
				for e, err := range s.Snapshot.Extents(ctx, disk, since) {
					if err != nil {
						yield(e, err)
						return
					}
					list = append(list, e)
				}
				for _, e := range f(list, since, s.Snapshot.VM().Disk(disk).Size) {
					if !yield(e, nil) {
						return
					}
				}
			}
		}
	}
}
