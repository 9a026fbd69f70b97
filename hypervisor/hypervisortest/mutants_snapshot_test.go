package hypervisortest

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

// none is a listing without anything.
func none[T any]() iter.Seq2[T, error] { return func(func(T, error) bool) {} }

// onSnapshots plants a bug in every snapshot.
func onSnapshots(f func(s *bentSnapshot)) func(*bent, *fakes.World) {
	return func(b *bent, _ *fakes.World) { b.snap = f }
}

var snapshotMutants = []mutant{
	{name: "release that leaks", plant: onSnapshots(func(s *bentSnapshot) {
		s.release = func(context.Context, []hypervisor.DiskID) error { return nil }
	})},
	{name: "release twice fails", plant: onSnapshots(func(s *bentSnapshot) {
		s.release = func(ctx context.Context, keep []hypervisor.DiskID) error {
			err := s.Snapshot.Release(ctx, keep)
			s.release = func(context.Context, []hypervisor.DiskID) error {
				return &hypervisor.Error{Op: "Release", Err: hypervisor.ErrNotFound}
			}
			return err
		}
	})},
	{name: "consistency level overstated", plant: onSnapshots(func(s *bentSnapshot) {
		s.level = func(a hypervisor.Achieved) hypervisor.Achieved {
			a.Level, a.Reason = hypervisor.FilesystemConsistent, ""
			return a
		}
	})},
	{name: "reason for a lower level missing", plant: onSnapshots(func(s *bentSnapshot) {
		s.level = func(a hypervisor.Achieved) hypervisor.Achieved { a.Reason = ""; return a }
	})},
	{name: "MinConsistency ignored", plant: func(b *bent, _ *fakes.World) {
		b.create = func(ctx context.Context, id hypervisor.VMID, o hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
			o.MinConsistency = hypervisor.CrashConsistent
			return b.Target.CreateSnapshot(ctx, id, &o)
		}
	}},
	{name: "failed CreateSnapshot leaves a snapshot", plant: func(b *bent, _ *fakes.World) {
		b.create = func(ctx context.Context, id hypervisor.VMID, o hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
			s, err := b.Target.CreateSnapshot(ctx, id, &o)
			if errors.Is(err, hypervisor.ErrQuiesce) || errors.Is(err, hypervisor.ErrQuiesceTimeout) {
				_, _ = b.Target.CreateSnapshot(ctx, id, nil)
			}
			return s, err
		}
	}},
	{name: "cancelled CreateSnapshot leaves a snapshot", plant: func(b *bent, _ *fakes.World) {
		b.create = func(ctx context.Context, id hypervisor.VMID, o hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
			s, err := b.Target.CreateSnapshot(context.WithoutCancel(ctx), id, &o)
			if ctx.Err() != nil {
				return nil, &hypervisor.Error{Op: "CreateSnapshot", Err: ctx.Err()}
			}
			return s, err
		}
	}},
	{name: "guest asked although nobody wanted it", plant: func(b *bent, _ *fakes.World) {
		b.create = func(ctx context.Context, id hypervisor.VMID, o hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
			o.Quiesce, o.QuiesceTimeout = hypervisor.ApplicationConsistent, 20*time.Millisecond
			return b.Target.CreateSnapshot(ctx, id, &o)
		}
	}},
	{
		name: "guest left frozen, and said to be thawed",
		harness: func(h *Harness, w *fakes.World) {
			h.SetGuest = func(m GuestMode) error {
				g := guests[m]
				g.ThawFails = 1
				return w.SetGuest(h.VM, g)
			}
		},
		plant: onSnapshots(func(s *bentSnapshot) {
			s.level = func(a hypervisor.Achieved) hypervisor.Achieved { a.ThawPending = false; return a }
		}),
	},
	{name: "owner name ignored", plant: func(b *bent, _ *fakes.World) {
		b.create = func(ctx context.Context, id hypervisor.VMID, o hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
			o.Name = ""
			return b.Target.CreateSnapshot(ctx, id, &o)
		}
	}},
	{name: "ExcludeDisks ignored", plant: func(b *bent, _ *fakes.World) {
		b.create = func(ctx context.Context, id hypervisor.VMID, o hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
			o.ExcludeDisks = nil
			return b.Target.CreateSnapshot(ctx, id, &o)
		}
	}},
	{name: "Snapshots lists nothing", plant: func(b *bent, _ *fakes.World) {
		b.snapshots = func(context.Context, hypervisor.VMID) iter.Seq2[hypervisor.SnapshotRef, error] {
			return none[hypervisor.SnapshotRef]()
		}
	}},
	{name: "Snapshots lists those of this connection only", plant: func(b *bent, _ *fakes.World) {
		mine := map[string]bool{}
		b.create = func(ctx context.Context, id hypervisor.VMID, o hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
			s, err := b.Target.CreateSnapshot(ctx, id, &o)
			if err == nil {
				mine[s.Ref().Name] = true
			}
			return s, err
		}
		b.snapshots = func(ctx context.Context, id hypervisor.VMID) iter.Seq2[hypervisor.SnapshotRef, error] {
			return func(yield func(hypervisor.SnapshotRef, error) bool) {
				for ref, err := range b.Target.Snapshots(ctx, id) {
					if (err != nil || mine[ref.Name]) && !yield(ref, err) {
						return
					}
				}
			}
		}
	}},
	{name: "Snapshots lists foreign ones", plant: func(b *bent, w *fakes.World) {
		b.snapshots = func(ctx context.Context, id hypervisor.VMID) iter.Seq2[hypervisor.SnapshotRef, error] {
			return func(yield func(hypervisor.SnapshotRef, error) bool) {
				for _, name := range w.Foreign(id) {
					if !yield(hypervisor.SnapshotRef{Platform: hypervisor.Fake, VM: id, Name: name, Token: name}, nil) {
						return
					}
				}
				for ref, err := range b.Target.Snapshots(ctx, id) {
					if !yield(ref, err) {
						return
					}
				}
			}
		}
	}},
	{name: "OpenSnapshot of one that is gone makes a new one", plant: func(b *bent, _ *fakes.World) {
		b.openSnap = func(ctx context.Context, ref hypervisor.SnapshotRef) (hypervisor.Snapshot, error) {
			s, err := b.Target.OpenSnapshot(ctx, ref)
			if errors.Is(err, hypervisor.ErrNotFound) {
				return b.Target.CreateSnapshot(ctx, ref.VM, &hypervisor.SnapshotOptions{Name: ref.Name})
			}
			return s, err
		}
	}},
	{name: "disks left out are hidden", plant: onSnapshots(func(s *bentSnapshot) {
		s.def = func(vm *hypervisor.VM) *hypervisor.VM {
			var disks []hypervisor.Disk
			for _, d := range vm.Disks {
				if d.Snapshottable {
					disks = append(disks, d)
				}
			}
			vm.Disks = disks
			return vm
		}
	})},
	{name: "disks left out have no reason", plant: func(b *bent, _ *fakes.World) {
		b.vm = func(vm *hypervisor.VM, err error) (*hypervisor.VM, error) {
			for i := range disksOf(vm) {
				vm.Disks[i].Reason = ""
			}
			return vm, err
		}
	}},
	differentInstants(),
	{name: "ErrNotFound missing", plant: func(b *bent, _ *fakes.World) {
		b.vm = func(vm *hypervisor.VM, err error) (*hypervisor.VM, error) {
			if errors.Is(err, hypervisor.ErrNotFound) {
				err = &hypervisor.Error{Op: "VM", Err: errors.New("it is not there")}
			}
			return vm, err
		}
	}},
	{name: "untyped errors", plant: func(b *bent, _ *fakes.World) {
		b.vm = func(vm *hypervisor.VM, err error) (*hypervisor.VM, error) {
			if err != nil {
				err = fmt.Errorf("VM: %w", hypervisor.ErrNotFound)
			}
			return vm, err
		}
	}},
	{name: "query by name matches a prefix", plant: func(b *bent, _ *fakes.World) {
		b.vms = func(ctx context.Context, q hypervisor.Query) iter.Seq2[*hypervisor.VM, error] {
			return func(yield func(*hypervisor.VM, error) bool) {
				for vm, err := range b.Target.VMs(ctx, hypervisor.Query{UUID: q.UUID, Owner: q.Owner}) {
					if err != nil || len(vm.Name) < len(q.Name) || vm.Name[:len(q.Name)] == q.Name {
						if !yield(vm, err) {
							return
						}
					}
				}
			}
		}
	}},
	{name: "listing cut off without an error", plant: func(b *bent, _ *fakes.World) {
		b.vms = func(ctx context.Context, q hypervisor.Query) iter.Seq2[*hypervisor.VM, error] {
			return func(yield func(*hypervisor.VM, error) bool) {
				for vm, err := range b.Target.VMs(ctx, q) {
					yield(vm, err)
					return
				}
			}
		}
	}},
}

func disksOf(vm *hypervisor.VM) []hypervisor.Disk {
	if vm == nil {
		return nil
	}
	return vm.Disks
}

// differentInstants freezes one disk, lets the guest write on, and freezes the
// next, while it claims that all disks share one instant.
func differentInstants() mutant {
	writes := make(chan struct{}, 64)
	pause := func(c fakes.Call) {
		if c.Op != fakes.StepFreezeDisk || c.Disk != "disk1" {
			return
		}
		for len(writes) > 0 {
			<-writes
		}
		patience := 20 * time.Millisecond // there may be no guest that writes now
		for range 8 {
			select {
			case <-writes:
				patience = time.Second
			case <-time.After(patience):
				return
			}
		}
	}
	return mutant{
		name: "disks at different instants",
		opts: fakes.Options{NonAtomicDisks: true, OnCall: pause},
		harness: func(h *Harness, _ *fakes.World) {
			write := h.GuestWrite
			h.GuestWrite = func(d hypervisor.DiskID, p []byte, off int64) error {
				select {
				case writes <- struct{}{}:
				default:
				}
				return write(d, p, off)
			}
		},
		plant: func(b *bent, _ *fakes.World) {
			b.info = func(i hypervisor.Info) hypervisor.Info { i.Capabilities.AtomicDisks = true; return i }
			b.snap = func(s *bentSnapshot) {
				s.level = func(a hypervisor.Achieved) hypervisor.Achieved { a.AcrossDisks = true; return a }
			}
		},
	}
}
