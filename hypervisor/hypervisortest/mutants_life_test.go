package hypervisortest

import (
	"context"
	"iter"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

var lifeMutants = []mutant{
	{name: "cancellation swallowed by CreateSnapshot", plant: func(b *bent, _ *fakes.World) {
		b.create = func(ctx context.Context, id hypervisor.VMID, o hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
			return b.Target.CreateSnapshot(context.WithoutCancel(ctx), id, &o)
		}
	}},
	{name: "cancellation swallowed by Extents", plant: onSnapshots(func(s *bentSnapshot) {
		s.extents = func(ctx context.Context, d hypervisor.DiskID, since *hypervisor.Baseline) iter.Seq2[hypervisor.Extent, error] {
			return func(yield func(hypervisor.Extent, error) bool) {
				for e, err := range s.Snapshot.Extents(ctx, d, since) {
					if ctx.Err() != nil || !yield(e, err) {
						return // as if that had been all
					}
				}
			}
		}
	})},
	{name: "cancellation swallowed by VMs", plant: func(b *bent, _ *fakes.World) {
		b.vms = func(ctx context.Context, q hypervisor.Query) iter.Seq2[*hypervisor.VM, error] {
			return b.Target.VMs(context.WithoutCancel(ctx), q)
		}
	}},
	{name: "cancellation swallowed by Snapshots", plant: func(b *bent, _ *fakes.World) {
		b.snapshots = func(ctx context.Context, id hypervisor.VMID) iter.Seq2[hypervisor.SnapshotRef, error] {
			return b.Target.Snapshots(context.WithoutCancel(ctx), id)
		}
	}},
	{name: "cancellation swallowed by ForgetBaseline", plant: func(b *bent, _ *fakes.World) {
		b.forget = func(ctx context.Context, x hypervisor.Baseline) error {
			return b.Target.ForgetBaseline(context.WithoutCancel(ctx), x)
		}
	}},
	{name: "cancelled release says that it released", plant: onSnapshots(func(s *bentSnapshot) {
		s.release = func(ctx context.Context, keep []hypervisor.DiskID) error {
			if ctx.Err() != nil {
				return nil
			}
			return s.Snapshot.Release(ctx, keep)
		}
	})},
	{name: "cancellation hidden in the text", plant: func(b *bent, _ *fakes.World) {
		b.vm = func(vm *hypervisor.VM, err error) (*hypervisor.VM, error) {
			if err != nil {
				return nil, &hypervisor.Error{Op: "VM", Err: hypervisor.ErrNotFound}
			}
			return vm, nil
		}
	}},
	{name: "close twice fails", plant: func(b *bent, _ *fakes.World) {
		n := 0
		b.closing = func() error {
			if n++; n > 1 {
				return &hypervisor.Error{Op: "Close", Err: hypervisor.ErrUnavailable}
			}
			return b.Target.Close()
		}
	}},
	{name: "close releases snapshots", plant: func(b *bent, w *fakes.World) {
		b.closing = func() error {
			ctx, h := context.Background(), w.Connect()
			for vm, err := range h.VMs(ctx, hypervisor.Query{}) {
				if err != nil {
					return err
				}
				for ref, err := range h.Snapshots(ctx, vm.ID) {
					if err != nil {
						return err
					}
					s, err := h.OpenSnapshot(ctx, ref)
					if err != nil {
						return err
					}
					if err := s.Release(ctx, nil); err != nil {
						return err
					}
				}
			}
			return b.Target.Close()
		}
	}},
	{name: "tracking declared, not there", opts: fakes.Options{NoTracking: true}, plant: func(b *bent, _ *fakes.World) {
		b.info = func(i hypervisor.Info) hypervisor.Info { i.Capabilities.ChangeTracking = true; return i }
	}},
	{name: "baselines declared, not kept", opts: fakes.Options{NoBaselines: true}, plant: func(b *bent, _ *fakes.World) {
		b.info = func(i hypervisor.Info) hypervisor.Info { i.Capabilities.Baselines = true; return i }
	}},
	{name: "baselines kept, declared not to", plant: func(b *bent, _ *fakes.World) {
		b.info = func(i hypervisor.Info) hypervisor.Info { i.Capabilities.Baselines = false; return i }
	}},
	{name: "quiescing declared, not there", opts: fakes.Options{NoQuiesce: true}, plant: func(b *bent, _ *fakes.World) {
		b.info = func(i hypervisor.Info) hypervisor.Info {
			i.Capabilities.MaxConsistency = hypervisor.ApplicationConsistent
			return i
		}
	}},
}
