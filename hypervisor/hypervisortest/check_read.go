package hypervisortest

import (
	"bytes"
	"context"
	"errors"
	"io"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

var readChecks = []check{
	{"read/full-equals-the-truth", func(e *env) {
		e.need(e.h.Truth != nil, "Harness.Truth")
		for _, d := range e.disks {
			e.write(d, 0, e.random(2*e.sector))
			e.write(d, e.size(d)-e.sector, e.random(e.sector))
			want := e.frozen(d)
			s := e.snapshot(nil)
			e.same(want, e.readAll(s, d), "disk "+string(d))
			e.release(s)
		}
	}},
	{"read/size", func(e *env) {
		s := e.snapshot(nil)
		for _, d := range e.disks {
			require.Equal(e, e.size(d), e.open(s, d).Size())
			require.Equal(e, e.size(d), s.VM().Disk(d).Size)
		}
	}},
	{"read/past-the-end", func(e *env) {
		s := e.snapshot(nil)
		r := e.open(s, e.disks[0])
		for _, off := range []int64{r.Size(), r.Size() + 1, r.Size() + 1<<20} {
			n, err := r.ReadAt(make([]byte, 512), off)
			require.Zero(e, n, "at %d of %d", off, r.Size())
			require.ErrorIs(e, err, io.EOF, "at %d of %d", off, r.Size())
		}
	}},
	{"read/across-the-end", func(e *env) {
		d := e.disks[0]
		e.write(d, e.size(d)-e.sector, e.random(e.sector))
		want := e.frozen(d)
		r := e.open(e.snapshot(nil), d)
		p := make([]byte, 4096)
		n, err := r.ReadAt(p, r.Size()-100)
		require.ErrorIs(e, err, io.EOF)
		require.Equal(e, 100, n)
		e.same(want[len(want)-100:], p[:n], "the last 100 bytes")
	}},
	{"read/up-to-the-end", func(e *env) {
		d := e.disks[1]
		e.write(d, e.size(d)-e.sector, e.random(e.sector))
		want := e.frozen(d)
		r := e.open(e.snapshot(nil), d)
		for _, n := range []int64{1, 511, 512, 513, 4096, e.size(d) % (1 << 20)} {
			p := make([]byte, n)
			e.exact(r, p, r.Size()-n)
			e.same(want[len(want)-int(n):], p, "the end of the disk")
		}
	}},
	{"read/negative-offset", func(e *env) {
		r := e.open(e.snapshot(nil), e.disks[0])
		n, err := r.ReadAt(make([]byte, 512), -1)
		require.Error(e, err)
		require.Zero(e, n)
		require.NotErrorIs(e, err, io.EOF)
	}},
	{"read/any-offset-and-length", func(e *env) {
		d := e.disks[0]
		e.write(d, 0, e.random(min(e.size(d)/e.sector*e.sector, 256<<10)))
		want := e.frozen(d)
		r := e.open(e.snapshot(nil), d)
		for range 50 {
			off := e.rnd.Int64N(e.size(d))
			p := make([]byte, 1+e.rnd.Int64N(min(100<<10, e.size(d)-off)))
			e.exact(r, p, off)
			e.same(want[off:off+int64(len(p))], p, "a piece of the disk")
		}
	}},
	{"read/buffer-stays-inside", func(e *env) {
		r := e.open(e.snapshot(nil), e.disks[0])
		p := bytes.Repeat([]byte{0xa5}, 3*512)
		e.exact(r, p[512:1024:1024], 0)
		e.same(bytes.Repeat([]byte{0xa5}, 512), p[:512], "before the buffer")
		e.same(bytes.Repeat([]byte{0xa5}, 512), p[1024:], "after the buffer")
	}},
	{"read/concurrently", func(e *env) {
		d := e.disks[0]
		e.write(d, 0, e.random(min(e.size(d)/e.sector*e.sector, 1<<20)))
		want := e.frozen(d)
		r := e.open(e.snapshot(nil), d)
		const workers, piece = 8, 61 << 10
		errs := make(chan error, workers)
		for w := range workers {
			go func() {
				for off := int64(w * piece); off < int64(len(want)); off += workers * piece {
					p := make([]byte, min(piece, int64(len(want))-off))
					err := readExact(r, p, off)
					if err == nil && !bytes.Equal(p, want[off:off+int64(len(p))]) {
						err = errors.New("wrong bytes")
					}
					if err != nil {
						errs <- err
						return
					}
				}
				errs <- nil
			}()
		}
		for range workers {
			require.NoError(e, <-errs)
		}
	}},
	{"read/two-readers", func(e *env) {
		d := e.disks[0]
		want := e.frozen(d)
		s := e.snapshot(nil)
		a, b := e.open(s, d), e.open(s, d)
		require.NoError(e, a.Close())
		p := make([]byte, len(want))
		e.fill(b, p, 0)
		e.same(want, p, "by the reader that is open")
	}},
	{"read/after-close", func(e *env) {
		r := e.open(e.snapshot(nil), e.disks[0])
		require.NoError(e, r.Close())
		_, err := r.ReadAt(make([]byte, 512), 0)
		require.Error(e, err)
	}},
	{"read/after-release", func(e *env) {
		s := e.snapshot(nil)
		r := e.open(s, e.disks[0])
		e.release(s)
		_, err := r.ReadAt(make([]byte, 512), 0)
		require.Error(e, err)
		_, err = s.OpenDisk(e.ctx, e.disks[0])
		e.fails(err)
		e.fails(e.extentsErr(s, e.disks[0], nil))
	}},
	{"read/context-governs-the-reader", func(e *env) {
		e.need(e.caps.RandomRead, "Capabilities.RandomRead")
		s := e.snapshot(nil)
		ctx, cancel := context.WithCancel(e.ctx)
		defer cancel()
		r, err := s.OpenDisk(ctx, e.disks[0])
		require.NoError(e, err)
		e.exact(r, make([]byte, 512), 0)
		cancel()
		_, err = r.ReadAt(make([]byte, 512), 0)
		e.fails(err, context.Canceled)
		_ = r.Close() // the context has ended it
	}},
	{"read/unknown-disk", func(e *env) {
		s := e.snapshot(nil)
		_, err := s.OpenDisk(e.ctx, "no-such-disk")
		e.fails(err, hypervisor.ErrNotFound, errors.ErrUnsupported)
		e.fails(e.extentsErr(s, "no-such-disk", nil), hypervisor.ErrNotFound)
	}},
	{"read/random-as-declared", func(e *env) {
		s := e.snapshot(nil)
		r, err := s.OpenDisk(e.ctx, e.disks[0])
		if e.caps.RandomRead {
			require.NoError(e, err)
			require.NoError(e, r.Close())
			return
		}
		e.fails(err, errors.ErrUnsupported)
		_, ok := s.(hypervisor.Streamer)
		require.True(e, ok, "without RandomRead a snapshot must be a Streamer")
	}},
	{"read/holes-are-zeros", func(e *env) {
		d := e.disks[0]
		e.write(d, 0, e.random(e.sector))
		want := e.frozen(d)
		r, ok := e.open(e.snapshot(nil), d).(hypervisor.HoleReader)
		e.need(ok, "a HoleReader")
		for off := int64(0); off < int64(len(want)); off += 64 << 10 {
			p := make([]byte, min(64<<10, int64(len(want))-off))
			n, hole, err := r.ReadHole(p, off)
			if err != nil {
				require.ErrorIs(e, err, io.EOF)
			}
			require.Equal(e, len(p), n)
			if hole {
				clear(p)
			}
			e.same(want[off:off+int64(n)], p, "with holes")
		}
		n, _, err := r.ReadHole(make([]byte, 512), int64(len(want)))
		require.Zero(e, n)
		require.ErrorIs(e, err, io.EOF)
	}},
	{"read/by-the-common-way", func(e *env) {
		d := e.disks[1]
		e.write(d, e.size(d)-e.sector, e.random(e.sector))
		want := e.frozen(d)
		got := make([]byte, len(want))
		err := hypervisor.Read(e.ctx, e.snapshot(nil), d, nil, func(x hypervisor.Extent, p []byte) error {
			if p == nil {
				clear(got[x.Offset:x.End()])
			} else {
				copy(got[x.Offset:x.End()], p)
			}
			return nil
		})
		require.NoError(e, err)
		e.same(want, got, "by hypervisor.Read")
	}},
	{"stream/equals-the-truth", func(e *env) {
		s, d := e.streamer()
		want := e.frozen(d)
		got, end := make([]byte, len(want)), int64(0)
		err := s.Stream(e.ctx, d, nil, func(x hypervisor.Extent, p []byte) error {
			if p != nil {
				copy(got[x.Offset:], p)
			}
			err := wellFormed(x, end, int64(len(want)))
			end = x.End()
			return err
		})
		require.NoError(e, err)
		e.same(want, got, "streamed")
	}},
	{"stream/ends-with-the-caller's-error", func(e *env) {
		s, d := e.streamer()
		enough, calls := errors.New("enough"), 0
		err := s.Stream(e.ctx, d, nil, func(hypervisor.Extent, []byte) error { calls++; return enough })
		require.ErrorIs(e, err, enough)
		require.Equal(e, 1, calls)
	}},
	{"stream/cancelled", func(e *env) {
		s, d := e.streamer()
		pieces := 0
		require.NoError(e, s.Stream(e.ctx, d, nil, func(hypervisor.Extent, []byte) error { pieces++; return nil }))
		ctx, cancel := context.WithCancel(e.ctx)
		defer cancel()
		err := s.Stream(ctx, d, nil, func(hypervisor.Extent, []byte) error { cancel(); return nil })
		if pieces > 1 { // else all was delivered before
			e.fails(err, context.Canceled)
		}
		e.fails(s.Stream(e.cancelled(), d, nil, func(hypervisor.Extent, []byte) error { return nil }), context.Canceled)
	}},
}

// streamer returns a snapshot that streams, of a disk with several extents.
func (e *env) streamer() (hypervisor.Streamer, hypervisor.DiskID) {
	e.Helper()
	d := e.disks[1]
	e.write(d, 0, e.random(min(2<<20, e.size(d)/e.sector*e.sector)))
	s, ok := e.snapshot(nil).(hypervisor.Streamer)
	e.need(ok, "a Streamer")
	return s, d
}

var extentChecks = []check{
	{"extents/cover-all-data", func(e *env) {
		for _, d := range e.disks {
			e.write(d, e.size(d)-e.sector, e.random(e.sector))
			want := e.frozen(d)
			s := e.snapshot(nil)
			e.same(want, e.overlay(s, d, nil, nil), "disk "+string(d)+": extents over zeros")
			e.release(s)
		}
	}},
	{"extents/well-formed", func(e *env) {
		for _, d := range e.disks {
			e.write(d, e.sector, e.random(e.sector))
			e.write(d, e.size(d)/2/e.sector*e.sector, e.random(e.sector))
			e.write(d, e.size(d)-e.sector, e.random(e.sector))
		}
		s := e.snapshot(nil)
		for _, d := range e.disks {
			require.NotEmpty(e, e.extents(s, d, nil))
		}
	}},
	{"extents/zero-means-zero", func(e *env) {
		d := e.disks[0]
		want := e.frozen(d)
		s := e.snapshot(nil)
		for _, x := range e.extents(s, d, nil) {
			if x.Zero {
				require.True(e, zeros(want[x.Offset:x.End()]), "[%d,+%d) is not zero", x.Offset, x.Length)
			}
		}
	}},
	{"extents/repeatable", func(e *env) {
		s := e.snapshot(nil)
		first := e.extents(s, e.disks[0], nil)
		e.write(e.disks[0], 0, e.random(e.sector))
		require.Equal(e, first, e.extents(s, e.disks[0], nil))
	}},
	{"extents/can-be-left-early", func(e *env) {
		e.write(e.disks[0], 0, e.random(e.sector))
		s := e.snapshot(nil)
		for range s.Extents(e.ctx, e.disks[0], nil) {
			break
		}
		require.NotEmpty(e, e.extents(s, e.disks[0], nil))
	}},
	{"extents/cancelled-in-the-middle", func(e *env) {
		d := e.disks[0]
		for i := range int64(4) { // several extents, if the driver tells them apart
			e.write(d, i*(e.size(d)/4/e.sector*e.sector), e.random(e.sector))
		}
		s := e.snapshot(nil)
		ctx, cancel := context.WithCancel(e.ctx)
		defer cancel()
		var last error
		for _, err := range hypervisor.CheckedExtents(ctx, s, d, nil) {
			cancel()
			last = err
		}
		e.fails(last, context.Canceled)
	}},
}
