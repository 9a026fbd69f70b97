package fakes

import (
	"context"
	"io"
	"iter"
	"slices"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// WithFaults wraps a hypervisor, any driver's: every call of it, and of the
// snapshots, readers, writers and attachments that it gives out, is numbered
// and shown to inject. The result is a Target, a Thawer, and its snapshots and
// readers are Streamers and HoleReaders, exactly when the wrapped ones are.
//
// Info, Ref, VM of a snapshot, Consistency and Size do no I/O and cannot fail:
// they are not calls. Each element of an iteration is a call of its own, and so
// is its end.
func WithFaults(h hypervisor.Hypervisor, inject Injector) hypervisor.Hypervisor {
	in := &injection{inject: inject, platform: h.Info().Platform}
	base := &faultHypervisor{in: in, h: h}
	target, isTarget := h.(hypervisor.Target)
	thawer, isThawer := h.(hypervisor.Thawer)
	switch {
	case isTarget && isThawer:
		return struct {
			*faultHypervisor
			*faultTarget
			*faultThawer
		}{base, &faultTarget{in, target}, &faultThawer{in, thawer}}
	case isTarget:
		return struct {
			*faultHypervisor
			*faultTarget
		}{base, &faultTarget{in, target}}
	case isThawer:
		return struct {
			*faultHypervisor
			*faultThawer
		}{base, &faultThawer{in, thawer}}
	}
	return base
}

type faultHypervisor struct {
	in *injection
	h  hypervisor.Hypervisor
}

var _ hypervisor.Hypervisor = (*faultHypervisor)(nil)

func (f *faultHypervisor) Info() hypervisor.Info { return f.h.Info() }

// faultSeq wraps an iteration: its start, each element and its end are calls.
func faultSeq[T any](ctx context.Context, in *injection, start Call, step Op, seq iter.Seq2[T, error], each func(T) T, place func(*Call, T)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		if err := in.call(ctx, start, func() error { return nil }); err != nil {
			yield(none, err)
			return
		}
		next := start
		next.Op = step
		for v, err := range seq {
			if err != nil {
				yield(none, err)
				return
			}
			c := next
			if place != nil {
				place(&c, v)
			}
			if each != nil {
				v = each(v)
			}
			stopped := false
			err = in.call(ctx, c, func() error {
				stopped = !yield(v, nil)
				return nil
			})
			if stopped {
				return
			}
			if err != nil {
				yield(none, err)
				return
			}
		}
		if err := in.call(ctx, next, func() error { return nil }); err != nil {
			yield(none, err)
		}
	}
}

func (f *faultHypervisor) VMs(ctx context.Context, q hypervisor.Query) iter.Seq2[*hypervisor.VM, error] {
	c := Call{Op: OpVMs, Name: q.Name}
	return faultSeq(ctx, f.in, c, OpNextVM, f.h.VMs(ctx, q), f.in.attachments, func(c *Call, vm *hypervisor.VM) { c.VM = vm.ID })
}

func (f *faultHypervisor) VM(ctx context.Context, id hypervisor.VMID) (vm *hypervisor.VM, err error) {
	err = f.in.call(ctx, Call{Op: OpVM, VM: id}, func() (err error) {
		vm, err = f.h.VM(ctx, id)
		return err
	})
	if err != nil {
		return nil, err
	}
	return f.in.attachments(vm), nil
}

func (f *faultHypervisor) CreateSnapshot(ctx context.Context, id hypervisor.VMID, opts *hypervisor.SnapshotOptions) (s hypervisor.Snapshot, err error) {
	c := Call{Op: OpCreateSnapshot, VM: id}
	if opts != nil {
		c.Name = opts.Name
	}
	err = f.in.call(ctx, c, func() (err error) {
		s, err = f.h.CreateSnapshot(ctx, id, opts)
		return err
	})
	if err != nil {
		return nil, err
	}
	return f.in.snapshot(s), nil
}

func (f *faultHypervisor) OpenSnapshot(ctx context.Context, ref hypervisor.SnapshotRef) (s hypervisor.Snapshot, err error) {
	err = f.in.call(ctx, Call{Op: OpOpenSnapshot, VM: ref.VM, Name: ref.Name}, func() (err error) {
		s, err = f.h.OpenSnapshot(ctx, ref)
		return err
	})
	if err != nil {
		return nil, err
	}
	return f.in.snapshot(s), nil
}

func (f *faultHypervisor) Snapshots(ctx context.Context, id hypervisor.VMID) iter.Seq2[hypervisor.SnapshotRef, error] {
	c := Call{Op: OpSnapshots, VM: id}
	return faultSeq(ctx, f.in, c, OpNextSnapshot, f.h.Snapshots(ctx, id), nil, func(c *Call, r hypervisor.SnapshotRef) { c.Name = r.Name })
}

func (f *faultHypervisor) Baselines(ctx context.Context, id hypervisor.VMID) iter.Seq2[hypervisor.Baseline, error] {
	c := Call{Op: OpBaselines, VM: id}
	return faultSeq(ctx, f.in, c, OpNextBaseline, f.h.Baselines(ctx, id), nil, func(c *Call, b hypervisor.Baseline) { c.Disk, c.Name = b.Disk, b.Name })
}

func (f *faultHypervisor) ForgetBaseline(ctx context.Context, b hypervisor.Baseline) error {
	return f.in.call(ctx, Call{Op: OpForgetBaseline, VM: b.VM, Disk: b.Disk, Name: b.Name}, func() error {
		return f.h.ForgetBaseline(ctx, b)
	})
}

func (f *faultHypervisor) Close() error {
	return f.in.closing(context.Background(), Call{Op: OpClose}, f.h.Close)
}

type faultThawer struct {
	in *injection
	t  hypervisor.Thawer
}

func (f *faultThawer) Thaw(ctx context.Context, id hypervisor.VMID) error {
	return f.in.call(ctx, Call{Op: OpThaw, VM: id}, func() error { return f.t.Thaw(ctx, id) })
}

type faultTarget struct {
	in *injection
	t  hypervisor.Target
}

func (f *faultTarget) CreateVM(ctx context.Context, spec *hypervisor.VMSpec) (vm *hypervisor.VM, err error) {
	err = f.in.call(ctx, Call{Op: OpCreateVM, Name: spec.Owner}, func() (err error) {
		vm, err = f.t.CreateVM(ctx, spec)
		return err
	})
	if err != nil {
		return nil, err
	}
	return f.in.attachments(vm), nil
}

func (f *faultTarget) OpenDiskWriter(ctx context.Context, id hypervisor.VMID, disk hypervisor.DiskID) (hypervisor.DiskWriter, error) {
	var w hypervisor.DiskWriter
	err := f.in.call(ctx, Call{Op: OpOpenDiskWriter, VM: id, Disk: disk}, func() (err error) {
		w, err = f.t.OpenDiskWriter(ctx, id, disk)
		return err
	})
	if err != nil {
		if w != nil {
			_ = w.Close() // the answer was lost: nobody can use it
		}
		return nil, err
	}
	return &faultWriter{faultDisk{in: f.in, ctx: ctx, vm: id, disk: disk}, w}, nil
}

func (f *faultTarget) OpenDisk(ctx context.Context, id hypervisor.VMID, disk hypervisor.DiskID) (hypervisor.DiskReader, error) {
	return f.in.openReader(ctx, Call{Op: OpOpenTargetDisk, VM: id, Disk: disk}, func() (hypervisor.DiskReader, error) {
		return f.t.OpenDisk(ctx, id, disk)
	})
}

func (f *faultTarget) FinishVM(ctx context.Context, id hypervisor.VMID) error {
	return f.in.call(ctx, Call{Op: OpFinishVM, VM: id}, func() error { return f.t.FinishVM(ctx, id) })
}

func (f *faultTarget) SetPower(ctx context.Context, id hypervisor.VMID, p hypervisor.Power) error {
	return f.in.call(ctx, Call{Op: OpSetPower, VM: id, Name: string(p)}, func() error { return f.t.SetPower(ctx, id, p) })
}

func (f *faultTarget) DeleteVM(ctx context.Context, id hypervisor.VMID) error {
	return f.in.call(ctx, Call{Op: OpDeleteVM, VM: id}, func() error { return f.t.DeleteVM(ctx, id) })
}

// attachments returns vm with attachments whose calls are numbered. vm itself
// stays as it is.
func (in *injection) attachments(vm *hypervisor.VM) *hypervisor.VM {
	if vm == nil || len(vm.Attachments) == 0 {
		return vm
	}
	c := *vm
	c.Attachments = slices.Clone(vm.Attachments)
	for i := range c.Attachments {
		a := &c.Attachments[i]
		open, call := a.Open, Call{Op: OpOpenAttachment, VM: vm.ID, Name: a.Name}
		a.Open = func(ctx context.Context) (io.ReadCloser, error) {
			var r io.ReadCloser
			err := in.call(ctx, call, func() (err error) {
				r, err = open(ctx)
				return err
			})
			if err != nil {
				if r != nil {
					_ = r.Close() // the answer was lost: nobody can use it
				}
				return nil, err
			}
			return &faultAttachment{in: in, ctx: ctx, call: call, r: r}, nil
		}
	}
	return &c
}

type faultAttachment struct {
	in   *injection
	ctx  context.Context // of Open; ends what hangs
	call Call
	r    io.ReadCloser
}

func (f *faultAttachment) Read(p []byte) (int, error) {
	c := f.call
	c.Op, c.Length = OpReadAttachment, int64(len(p))
	return f.in.transfer(f.ctx, c, len(p), func(k int) (int, error) { return f.r.Read(p[:k]) })
}

func (f *faultAttachment) Close() error {
	c := f.call
	c.Op = OpCloseAttached
	return f.in.closing(f.ctx, c, f.r.Close)
}
