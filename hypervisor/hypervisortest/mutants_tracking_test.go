package hypervisortest

import (
	"context"
	"errors"
	"iter"
	"slices"
	"sync"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

// tolerant answers ErrBaselineInvalid with no changes where when says so.
func tolerant(when func(disk hypervisor.DiskID, since *hypervisor.Baseline) bool) func(*bent, *fakes.World) {
	return onSnapshots(func(s *bentSnapshot) {
		s.extents = func(ctx context.Context, disk hypervisor.DiskID, since *hypervisor.Baseline) iter.Seq2[hypervisor.Extent, error] {
			return func(yield func(hypervisor.Extent, error) bool) {
				for e, err := range s.Snapshot.Extents(ctx, disk, since) {
					if errors.Is(err, hypervisor.ErrBaselineInvalid) && when(disk, since) {
						return
					}
					if !yield(e, err) {
						return
					}
				}
			}
		}
	})
}

var trackingMutants = []mutant{
	{name: "last block dropped", plant: onSnapshots(edit(func(l []hypervisor.Extent, _ *hypervisor.Baseline, size int64) []hypervisor.Extent {
		return clip(l, size/(64<<10)*(64<<10))
	}))},
	{name: "last sector dropped from changes", plant: onSnapshots(edit(func(l []hypervisor.Extent, since *hypervisor.Baseline, size int64) []hypervisor.Extent {
		if since == nil {
			return l
		}
		return clip(l, size-512)
	}))},
	{
		name: "under-reported changes: every third lost", opts: fakes.Options{Granularity: 4096},
		plant: onSnapshots(edit(func(l []hypervisor.Extent, since *hypervisor.Baseline, _ int64) []hypervisor.Extent {
			var out []hypervisor.Extent
			for i, e := range l {
				if since == nil || i%3 != 2 {
					out = append(out, e)
				}
			}
			return out
		})),
	},
	{
		name: "under-reported changes: only the first page of a list", opts: fakes.Options{Granularity: 4096},
		plant: onSnapshots(edit(func(l []hypervisor.Extent, _ *hypervisor.Baseline, _ int64) []hypervisor.Extent {
			return l[:min(len(l), 4)]
		})),
	},
	{name: "tracker that lies", harness: func(h *Harness, w *fakes.World) {
		_ = w.SetLying(h.VM, "disk0", 0.2)
	}},
	{
		name: "extents unsorted", opts: fakes.Options{Granularity: 4096},
		plant: onSnapshots(edit(func(l []hypervisor.Extent, _ *hypervisor.Baseline, _ int64) []hypervisor.Extent {
			slices.Reverse(l)
			return l
		})),
	},
	{name: "extents overlap", plant: onSnapshots(edit(func(l []hypervisor.Extent, _ *hypervisor.Baseline, _ int64) []hypervisor.Extent {
		return append(l, l...)
	}))},
	{name: "extent past the end of the disk", plant: onSnapshots(edit(func(l []hypervisor.Extent, _ *hypervisor.Baseline, _ int64) []hypervisor.Extent {
		if len(l) > 0 {
			l[len(l)-1].Length += 64 << 10
		}
		return l
	}))},
	{name: "empty extents", plant: onSnapshots(edit(func(l []hypervisor.Extent, _ *hypervisor.Baseline, _ int64) []hypervisor.Extent {
		return append([]hypervisor.Extent{{}}, l...)
	}))},
	{name: "data said to be zeros", plant: onSnapshots(edit(func(l []hypervisor.Extent, _ *hypervisor.Baseline, _ int64) []hypervisor.Extent {
		for i := range l {
			l[i].Zero = l[i].Zero || i == len(l)-1
		}
		return l
	}))},
	{name: "discard not reported", plant: onSnapshots(edit(func(l []hypervisor.Extent, _ *hypervisor.Baseline, _ int64) []hypervisor.Extent {
		return slices.DeleteFunc(l, func(e hypervisor.Extent) bool { return e.Zero })
	}))},
	{name: "bogus baseline accepted", plant: tolerant(func(_ hypervisor.DiskID, b *hypervisor.Baseline) bool {
		return b.Token == "bogus"
	})},
	{name: "baseline of another disk accepted", plant: tolerant(func(d hypervisor.DiskID, b *hypervisor.Baseline) bool {
		return b.Disk != d
	})},
	{name: "baseline of another VM accepted", plant: onSnapshots(func(s *bentSnapshot) {
		inner := s.Snapshot
		s.extents = func(ctx context.Context, d hypervisor.DiskID, since *hypervisor.Baseline) iter.Seq2[hypervisor.Extent, error] {
			if since != nil && since.VM != "" && since.VM != inner.Ref().VM {
				return none[hypervisor.Extent]()
			}
			return inner.Extents(ctx, d, since)
		}
	})},
	{name: "baseline that Since does not name answered", plant: func(b *bent, _ *fakes.World) {
		b.create = func(ctx context.Context, id hypervisor.VMID, o hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
			for base, err := range b.Target.Baselines(ctx, id) {
				if err == nil && !slices.Contains(o.Since, base) {
					o.Since = append(o.Since, base)
				}
			}
			return b.Target.CreateSnapshot(ctx, id, &o)
		}
	}},
	{name: "invalid baseline fails the snapshot", plant: func(b *bent, _ *fakes.World) {
		b.create = func(ctx context.Context, id hypervisor.VMID, o hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
			for _, base := range o.Since {
				if base.Token == "bogus" {
					return nil, &hypervisor.Error{Op: "CreateSnapshot", Err: hypervisor.ErrBaselineInvalid}
				}
			}
			return b.Target.CreateSnapshot(ctx, id, &o)
		}
	}},
	{name: "changes since the newest baseline, whatever was asked", plant: sinceNewest},
	{name: "Since forgotten when a snapshot is opened again", plant: func(b *bent, _ *fakes.World) {
		b.openSnap = func(ctx context.Context, ref hypervisor.SnapshotRef) (hypervisor.Snapshot, error) {
			s, err := b.Target.OpenSnapshot(ctx, ref)
			if err != nil {
				return nil, err
			}
			x := &bentSnapshot{Snapshot: s}
			x.extents = func(ctx context.Context, d hypervisor.DiskID, since *hypervisor.Baseline) iter.Seq2[hypervisor.Extent, error] {
				if since != nil {
					return none[hypervisor.Extent]()
				}
				return s.Extents(ctx, d, nil)
			}
			return x, nil
		}
	}},
	{name: "Baselines lists nothing", plant: func(b *bent, _ *fakes.World) {
		b.baselines = func(context.Context, hypervisor.VMID) iter.Seq2[hypervisor.Baseline, error] {
			return none[hypervisor.Baseline]()
		}
	}},
	{name: "ForgetBaseline forgets all", plant: func(b *bent, _ *fakes.World) {
		b.forget = func(ctx context.Context, x hypervisor.Baseline) error {
			for other, err := range b.Target.Baselines(ctx, x.VM) {
				if err == nil {
					err = b.Target.ForgetBaseline(ctx, other)
				}
				if err != nil {
					return err
				}
			}
			return nil
		}
	}},
	{name: "ForgetBaseline forgets all disks of the snapshot", plant: func(b *bent, _ *fakes.World) {
		b.forget = func(ctx context.Context, x hypervisor.Baseline) error {
			for other, err := range b.Target.Baselines(ctx, x.VM) {
				if err == nil && other.Name == x.Name {
					err = b.Target.ForgetBaseline(ctx, other)
				}
				if err != nil {
					return err
				}
			}
			return nil
		}
	}},
	{name: "ForgetBaseline does nothing", plant: func(b *bent, _ *fakes.World) {
		b.forget = func(ctx context.Context, _ hypervisor.Baseline) error { return ctx.Err() }
	}},
	{name: "release keeps all baselines", plant: onSnapshots(func(s *bentSnapshot) {
		s.release = func(ctx context.Context, _ []hypervisor.DiskID) error {
			return s.Snapshot.Release(ctx, []hypervisor.DiskID{"disk0", "disk1"})
		}
	})},
	{name: "release keeps no baseline", plant: onSnapshots(func(s *bentSnapshot) {
		s.release = func(ctx context.Context, _ []hypervisor.DiskID) error { return s.Snapshot.Release(ctx, nil) }
	})},
	{name: "failed run drops the old baseline", plant: func(b *bent, _ *fakes.World) {
		var since []hypervisor.Baseline
		b.create = func(ctx context.Context, id hypervisor.VMID, o hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
			since = o.Since
			return b.Target.CreateSnapshot(ctx, id, &o)
		}
		b.snap = func(s *bentSnapshot) {
			s.release = func(ctx context.Context, keep []hypervisor.DiskID) error {
				for _, x := range since {
					_ = b.Target.ForgetBaseline(ctx, x)
				}
				return s.Snapshot.Release(ctx, keep)
			}
		}
	}},
}

func clip(l []hypervisor.Extent, end int64) []hypervisor.Extent {
	var out []hypervisor.Extent
	for _, e := range l {
		e.Length = min(e.End(), end) - e.Offset
		if e.Length > 0 {
			out = append(out, e)
		}
	}
	return out
}

// sinceNewest always answers for the newest baseline of the disk.
func sinceNewest(b *bent, _ *fakes.World) {
	var mu sync.Mutex
	newest := map[hypervisor.DiskID]hypervisor.Baseline{}
	b.create = func(ctx context.Context, id hypervisor.VMID, o hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
		mu.Lock()
		defer mu.Unlock()
		since, asked := slices.Clone(o.Since), map[hypervisor.Baseline]hypervisor.Baseline{}
		for i, x := range since {
			if n, ok := newest[x.Disk]; ok && x.Token != "bogus" && x.VM == id {
				since[i], asked[x] = n, n
			}
		}
		o.Since = since
		s, err := b.Target.CreateSnapshot(ctx, id, &o)
		if err != nil {
			return nil, err
		}
		x := &bentSnapshot{Snapshot: s}
		x.extents = func(ctx context.Context, d hypervisor.DiskID, since *hypervisor.Baseline) iter.Seq2[hypervisor.Extent, error] {
			if since != nil {
				if n, ok := asked[*since]; ok {
					since = &n
				}
			}
			return s.Extents(ctx, d, since)
		}
		x.release = func(ctx context.Context, keep []hypervisor.DiskID) error {
			mu.Lock()
			defer mu.Unlock()
			for _, d := range keep {
				if n, err := s.Baseline(d); err == nil {
					newest[d] = n
				}
			}
			return s.Release(ctx, keep)
		}
		return x, nil
	}
}
