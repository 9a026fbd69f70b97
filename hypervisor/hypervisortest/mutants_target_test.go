package hypervisortest

import (
	"context"
	"errors"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

// onWriters plants a bug in every writer, on a platform with random writes.
func onWriters(f func(w *bentWriter)) func(*bent, *fakes.World) {
	return func(b *bent, _ *fakes.World) { b.writer = f }
}

var randomWrite = fakes.Options{RandomWrite: true}

var targetMutants = []mutant{
	{name: "incomplete VM starts", plant: func(b *bent, _ *fakes.World) {
		b.power = func(ctx context.Context, id hypervisor.VMID, p hypervisor.Power) error {
			if p == hypervisor.PowerOn {
				if err := b.Target.FinishVM(ctx, id); err != nil {
					return err
				}
			}
			return b.Target.SetPower(ctx, id, p)
		}
	}},
	{name: "created VM is not incomplete", plant: func(b *bent, _ *fakes.World) {
		b.createVM = func(ctx context.Context, spec *hypervisor.VMSpec) (*hypervisor.VM, error) {
			vm, err := b.Target.CreateVM(ctx, spec)
			if err == nil {
				err = b.Target.FinishVM(ctx, vm.ID)
			}
			return vm, err
		}
	}},
	{name: "foreign VM deleted", plant: func(b *bent, w *fakes.World) {
		b.deleteVM = func(ctx context.Context, id hypervisor.VMID) error {
			err := b.Target.DeleteVM(ctx, id)
			if errors.Is(err, hypervisor.ErrNotOurs) {
				return w.RemoveVM(id)
			}
			return err
		}
	}},
	{name: "delete is not idempotent", plant: func(b *bent, _ *fakes.World) {
		b.deleteVM = func(ctx context.Context, id hypervisor.VMID) error {
			if _, err := b.Target.VM(ctx, id); err != nil {
				return err
			}
			return b.Target.DeleteVM(ctx, id)
		}
	}},
	{name: "delete leaves the VM", plant: func(b *bent, _ *fakes.World) {
		b.deleteVM = func(ctx context.Context, id hypervisor.VMID) error {
			vm, err := b.Target.VM(ctx, id)
			if err == nil && vm.Owner != "" && !vm.Incomplete {
				return nil
			}
			return b.Target.DeleteVM(ctx, id)
		}
	}},
	{name: "taken name used for another name", plant: func(b *bent, _ *fakes.World) {
		b.createVM = func(ctx context.Context, spec *hypervisor.VMSpec) (*hypervisor.VM, error) {
			vm, err := b.Target.CreateVM(ctx, spec)
			if errors.Is(err, hypervisor.ErrExists) {
				s := *spec
				s.Name += "-1"
				return b.Target.CreateVM(ctx, &s)
			}
			return vm, err
		}
	}},
	{name: "refused VM is left half made", plant: func(b *bent, _ *fakes.World) {
		b.createVM = func(ctx context.Context, spec *hypervisor.VMSpec) (*hypervisor.VM, error) {
			vm, err := b.Target.CreateVM(ctx, spec)
			if errors.Is(err, hypervisor.ErrNoSpace) {
				s := *spec
				s.Disks = nil
				_, _ = b.Target.CreateVM(ctx, &s)
			}
			return vm, err
		}
	}},
	{name: "too small storage accepted", plant: func(b *bent, _ *fakes.World) {
		b.createVM = func(ctx context.Context, spec *hypervisor.VMSpec) (*hypervisor.VM, error) {
			s := *spec
			if s.Placement.Storage == "small" {
				s.Placement.Storage = ""
			}
			return b.Target.CreateVM(ctx, &s)
		}
	}},
	{name: "MACs of the original kept", plant: func(b *bent, _ *fakes.World) {
		b.createVM = func(ctx context.Context, spec *hypervisor.VMSpec) (*hypervisor.VM, error) {
			s := *spec
			if s.Identity == hypervisor.IdentityNew {
				s.Identity = hypervisor.IdentityKeep
			}
			return b.Target.CreateVM(ctx, &s)
		}
	}},
	{name: "NVRAM dropped", plant: func(b *bent, _ *fakes.World) {
		b.createVM = func(ctx context.Context, spec *hypervisor.VMSpec) (*hypervisor.VM, error) {
			s := *spec
			s.Attachments = nil
			return b.Target.CreateVM(ctx, &s)
		}
	}},
	{name: "disk sizes rounded up", plant: func(b *bent, _ *fakes.World) {
		b.createVM = func(ctx context.Context, spec *hypervisor.VMSpec) (*hypervisor.VM, error) {
			s := *spec
			s.Disks = append([]hypervisor.DiskSpec(nil), s.Disks...)
			for i := range s.Disks {
				s.Disks[i].Size = (s.Disks[i].Size + 1<<20 - 1) >> 20 << 20
			}
			return b.Target.CreateVM(ctx, &s)
		}
	}},
	{name: "WriteZeroes ignored", opts: randomWrite, plant: onWriters(func(w *bentWriter) {
		w.zeroes = func(int64, int64) error { return nil }
	})},
	{name: "unaligned end never written", plant: onWriters(func(w *bentWriter) {
		w.write = func(p []byte, off int64) (int, error) {
			n := len(p)
			if k := len(p) >> 10 << 10; k < len(p) {
				p = p[:k]
			}
			if _, err := w.DiskWriter.WriteAt(p, off); err != nil {
				return 0, err
			}
			return n, nil
		}
	})},
	{name: "Commit commits nothing", plant: onWriters(func(w *bentWriter) {
		w.commit = func() error { return w.DiskWriter.Close() }
	})},
	{name: "writes past the end taken and dropped", plant: onWriters(func(w *bentWriter) {
		w.write = func(p []byte, off int64) (int, error) {
			n, err := w.DiskWriter.WriteAt(p, off)
			if err != nil && !errors.Is(err, hypervisor.ErrUnavailable) {
				return len(p), nil
			}
			return n, err
		}
	})},
	{name: "writes after Commit taken and dropped", plant: onWriters(func(w *bentWriter) {
		w.write = func(p []byte, off int64) (int, error) {
			n, err := w.DiskWriter.WriteAt(p, off)
			if errors.Is(err, hypervisor.ErrUnavailable) {
				return len(p), nil
			}
			return n, err
		}
	})},
	{name: "any order declared, refused", plant: func(b *bent, _ *fakes.World) {
		b.info = func(i hypervisor.Info) hypervisor.Info { i.Capabilities.RandomWrite = true; return i }
	}},
	{name: "complete VM can be written", plant: func(b *bent, _ *fakes.World) {
		b.openWrite = func(ctx context.Context, id hypervisor.VMID, d hypervisor.DiskID) (hypervisor.DiskWriter, error) {
			w, err := b.Target.OpenDiskWriter(ctx, id, d)
			if errors.Is(err, hypervisor.ErrBusy) {
				return devNull{}, nil
			}
			return w, err
		}
	}},
}

// devNull takes everything and keeps nothing.
type devNull struct{}

func (devNull) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (devNull) WriteZeroes(int64, int64) error         { return nil }
func (devNull) Commit() error                          { return nil }
func (devNull) Close() error                           { return nil }
