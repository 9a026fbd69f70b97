package hypervisortest

import (
	"context"
	"errors"
	"io"
	"runtime"
	"sync/atomic"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

// onReads plants a bug in every read of a snapshot.
func onReads(f func(r hypervisor.DiskReader, p []byte, off int64) (int, error)) func(*bent, *fakes.World) {
	return onSnapshots(func(s *bentSnapshot) {
		s.read = func(r hypervisor.DiskReader, _ hypervisor.DiskID, p []byte, off int64) (int, error) {
			return f(r, p, off)
		}
	})
}

var readMutants = []mutant{
	{name: "wrong size", plant: onSnapshots(func(s *bentSnapshot) {
		s.size = func(n int64) int64 { return (n + 1<<20 - 1) >> 20 << 20 }
	})},
	{name: "wrong size in the definition", plant: onSnapshots(func(s *bentSnapshot) {
		s.def = func(vm *hypervisor.VM) *hypervisor.VM {
			for i := range vm.Disks {
				vm.Disks[i].Size = vm.Disks[i].Size >> 16 << 16
			}
			return vm
		}
	})},
	{name: "reads what the guest has now", plant: func(b *bent, w *fakes.World) {
		b.snap = func(s *bentSnapshot) {
			s.read = func(r hypervisor.DiskReader, d hypervisor.DiskID, p []byte, off int64) (int, error) {
				if _, err := r.ReadAt(nil, 0); err != nil {
					return 0, err
				}
				now, err := w.Bytes(s.Ref().VM, d)
				if err != nil {
					return 0, err
				}
				return now.ReadAt(p, off)
			}
		}
	}},
	{name: "last block read from what the guest has now", plant: func(b *bent, w *fakes.World) {
		b.snap = func(s *bentSnapshot) {
			s.read = func(r hypervisor.DiskReader, d hypervisor.DiskID, p []byte, off int64) (int, error) {
				n, err := r.ReadAt(p, off)
				if tail := r.Size() >> 16 << 16; n > 0 && off+int64(n) > tail {
					now, nerr := w.Bytes(s.Ref().VM, d)
					if nerr != nil {
						return 0, nerr
					}
					from := max(0, tail-off)
					_, _ = now.ReadAt(p[from:n], off+from)
				}
				return n, err
			}
		}
	}},
	{name: "short read without an error", plant: onReads(func(r hypervisor.DiskReader, p []byte, off int64) (int, error) {
		return r.ReadAt(p[:min(len(p), 64<<10)], off)
	})},
	{name: "EOF missing past the end", plant: onReads(func(r hypervisor.DiskReader, p []byte, off int64) (int, error) {
		n, err := r.ReadAt(p, off)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return n, err
	})},
	{name: "zeros past the end", plant: onReads(func(r hypervisor.DiskReader, p []byte, off int64) (int, error) {
		n, err := r.ReadAt(p, off)
		if errors.Is(err, io.EOF) {
			clear(p[n:])
			return len(p), nil
		}
		return n, err
	})},
	{name: "end of the disk read as zeros", plant: onReads(func(r hypervisor.DiskReader, p []byte, off int64) (int, error) {
		n, err := r.ReadAt(p, off)
		if tail := r.Size() >> 10 << 10; n > 0 && off+int64(n) > tail {
			clear(p[max(0, tail-off):n])
		}
		return n, err
	})},
	{name: "offsets rounded down to sectors", plant: onReads(func(r hypervisor.DiskReader, p []byte, off int64) (int, error) {
		if off < 0 {
			return r.ReadAt(p, off)
		}
		return r.ReadAt(p, off>>9<<9)
	})},
	{name: "one file position for all reads", plant: onSnapshots(func(s *bentSnapshot) {
		var pos atomic.Int64
		s.read = func(r hypervisor.DiskReader, _ hypervisor.DiskID, p []byte, off int64) (int, error) {
			pos.Store(off)
			for range 50 {
				runtime.Gosched()
			}
			return r.ReadAt(p, pos.Load())
		}
	})},
	{name: "reader outlives its context", plant: onSnapshots(func(s *bentSnapshot) {
		s.open = func(ctx context.Context, d hypervisor.DiskID) (hypervisor.DiskReader, error) {
			if err := ctx.Err(); err != nil {
				return nil, &hypervisor.Error{Op: "OpenDisk", Err: err}
			}
			return s.Snapshot.OpenDisk(context.WithoutCancel(ctx), d)
		}
	})},
	{name: "zeros after release", plant: onReads(func(r hypervisor.DiskReader, p []byte, off int64) (int, error) {
		n, err := r.ReadAt(p, off)
		if errors.Is(err, hypervisor.ErrUnavailable) {
			clear(p)
			return len(p), nil
		}
		return n, err
	})},
	{name: "random access works, declared not to", plant: func(b *bent, _ *fakes.World) {
		b.info = func(i hypervisor.Info) hypervisor.Info { i.Capabilities.RandomRead = false; return i }
	}},
	{name: "random access declared, does not work", opts: fakes.Options{Sequential: true}, plant: func(b *bent, _ *fakes.World) {
		b.info = func(i hypervisor.Info) hypervisor.Info { i.Capabilities.RandomRead = true; return i }
	}},
	{name: "stream ignores the caller's error", opts: fakes.Options{Sequential: true}, plant: onSnapshots(func(s *bentSnapshot) {
		s.stream = func(st hypervisor.Streamer, ctx context.Context, d hypervisor.DiskID, since *hypervisor.Baseline, yield func(hypervisor.Extent, []byte) error) error {
			return st.Stream(ctx, d, since, func(e hypervisor.Extent, p []byte) error { _ = yield(e, p); return nil })
		}
	})},
	{name: "stream leaves zeros out", opts: fakes.Options{Sequential: true}, plant: onSnapshots(func(s *bentSnapshot) {
		s.stream = func(st hypervisor.Streamer, ctx context.Context, d hypervisor.DiskID, since *hypervisor.Baseline, yield func(hypervisor.Extent, []byte) error) error {
			return st.Stream(ctx, d, since, func(e hypervisor.Extent, p []byte) error {
				if p == nil {
					return nil
				}
				return yield(e, p)
			})
		}
	})},
	{name: "attachments empty", plant: func(b *bent, _ *fakes.World) {
		b.vm = func(vm *hypervisor.VM, err error) (*hypervisor.VM, error) {
			if vm != nil {
				for i := range vm.Attachments {
					open := vm.Attachments[i].Open
					vm.Attachments[i].Open = func(ctx context.Context) (io.ReadCloser, error) {
						r, err := open(ctx)
						if err == nil {
							_, err = io.Copy(io.Discard, r)
						}
						return r, err
					}
				}
			}
			return vm, err
		}
	}},
}
