package repositorytest

import (
	"errors"
	"fmt"
	"io"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

func readChecks() []Check {
	return []Check{
		{"ReadAtAnywhere", checkReadAt},
		{"ReadAtEndOfDisk", checkReadEnd},
		{"ReadBlockOutside", checkReadOutside},
		{"ReadBlockUsesTheBuffer", checkReadBuffer},
		{"ConcurrentReaders", checkConcurrentReaders},
		{"ReadWhileWriting", checkReadWhileWriting},
		{"ClosedReaderRefuses", checkClosedReader},
		{"ExtentsStopEarly", checkExtentsStop},
	}
}

// openDisk1 opens disk d1 of a point for the rest of the check.
func (e *env) openDisk1(id repository.PointID) repository.DiskReader {
	e.Helper()
	rd, err := e.repo.Open(e.ctx, id)
	require.NoError(e, err)
	e.Cleanup(func() {
		if err := rd.Close(); err != nil {
			e.Errorf("close reader: %v", err)
		}
	})
	d, err := rd.Disk(e.ctx, "d1")
	require.NoError(e, err)
	return d
}

func checkReadAt(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(9*small+oddTail, small, 0.6)
	r := e.openDisk1(e.commit(one(d)).ID)
	for range 300 {
		off := e.rng.Int64N(d.size)
		n := 1 + e.rng.IntN(int(min(d.size-off, 3*small)))
		if e.rng.IntN(3) == 0 { // around the bounds of blocks
			off = min(d.size-1, max(0, e.rng.Int64N(d.count())*small-1))
			n = int(min(d.size-off, int64(1+e.rng.IntN(3))))
		}
		require.NoError(t, readCompare(r, d, off, n))
	}
	got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
	require.NoError(t, err)
	require.NoError(t, sameBytes(0, d.at(0, int(d.size)), got))
	n, err := r.ReadAt(nil, 5)
	require.NoError(t, err)
	require.Zero(t, n)
}

// readCompare reads into a dirty buffer and compares.
func readCompare(r io.ReaderAt, d *disk, off int64, n int) error {
	buf := make([]byte, n+1)
	for i := range buf {
		buf[i] = 0xa5
	}
	m, err := r.ReadAt(buf[:n], off)
	if err != nil && !(errors.Is(err, io.EOF) && off+int64(n) == d.size) {
		return fmt.Errorf("read %d at %d: %w", n, off, err)
	}
	if m != n || buf[n] != 0xa5 {
		return fmt.Errorf("%w: read %d at %d: %d bytes, guard %#x", errWrong, n, off, m, buf[n])
	}
	return sameBytes(off, d.at(off, n), buf[:n])
}

func checkReadEnd(t T, h *Harness) {
	e := newEnv(t, h)
	for _, size := range []int64{1, small, 3*small + 7} {
		d := e.random(size, small, 1)
		r := e.openDisk1(e.commit(one(d)).ID)
		buf := make([]byte, 100)
		n, err := r.ReadAt(buf, size)
		require.Zero(t, n)
		require.ErrorIs(t, err, io.EOF)
		n, err = r.ReadAt(buf, size+1<<40)
		require.Zero(t, n)
		require.ErrorIs(t, err, io.EOF)
		n, err = r.ReadAt(buf, size-1)
		require.Equal(t, 1, n)
		require.ErrorIs(t, err, io.EOF)
		require.NoError(t, sameBytes(size-1, d.at(size-1, 1), buf[:1]))
		_, err = r.ReadAt(buf, -1)
		require.Error(t, err)
		require.NotErrorIs(t, err, io.EOF)
	}
}

func checkReadOutside(t T, h *Harness) {
	e := newEnv(t, h)
	r := e.openDisk1(e.commit(one(e.random(3*small, small, 1))).ID)
	for _, i := range []int64{-1, 3, 1 << 50} {
		_, err := r.ReadBlock(e.ctx, i, make([]byte, small))
		require.Error(t, err, "block %d", i)
		_, err = r.Leaves(e.ctx, i)
		require.Error(t, err, "leaves of block %d", i)
	}
}

func checkReadBuffer(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(2*small, small, 1)
	r := e.openDisk1(e.commit(one(d)).ID)
	buf := make([]byte, small)
	b, err := r.ReadBlock(e.ctx, 0, buf)
	require.NoError(t, err)
	require.Len(t, b.Data, small)
	require.True(t, &b.Data[0] == &buf[0], "the data is a prefix of the buffer")
	clear(buf) // the caller may do with its buffer what it wants
	clear(b.Leaves)
	require.NoError(t, readCompare(r, d, 0, small))
	e.expectOne(e.list(e.repo, repository.Query{})[0].ID, d)
}

func checkConcurrentReaders(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(21*small+oddTail, small, 0.6)
	p := e.commit(one(d))
	r := e.openDisk1(p.ID)
	err := together(8, func(k int) error {
		buf := make([]byte, small)
		for i := range d.count() {
			i = (i + int64(k)*3) % d.count()
			if err := readCompare(r, d, i*small, repository.BlockLen(d.size, d.bs, i)); err != nil {
				return err
			}
			b, err := r.ReadBlock(e.ctx, i, buf)
			if err != nil {
				return err
			}
			if b.Data != nil || d.blocks[i] != nil {
				if err := sameBytes(i*small, d.blocks[i], b.Data); err != nil {
					return err
				}
			}
		}
		return nil
	})
	require.NoError(t, err)
	// Several readers of one point at once.
	require.NoError(t, together(4, func(int) error {
		rd, err := e.repo.Open(e.ctx, p.ID)
		if err != nil {
			return err
		}
		d1, err := rd.Disk(e.ctx, "d1")
		if err != nil {
			return err
		}
		return errors.Join(readCompare(d1, d, 0, int(d.size)), d1.Close(), rd.Close())
	}))
}

func checkReadWhileWriting(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(12*small, small, 1)
	p := e.commit(one(d))
	r := e.openDisk1(p.ID)
	other := e.random(12*small, small, 1)
	plan := one(other)
	plan.Run, plan.Chain, plan.Created = "writer", "vm-2", e.list(e.repo, repository.Query{})[0].Created
	var w repository.Writer
	require.NoError(t, together(2, func(k int) (err error) {
		if k == 0 {
			if w, err = e.write(e.repo, plan); err == nil {
				_, err = w.Commit(e.ctx, &plan.CommitInfo)
			}
			return err
		}
		for range 5 {
			if err := readCompare(r, d, 0, int(d.size)); err != nil {
				return err
			}
		}
		return nil
	}))
	e.expectOne(w.ID(), other)
}

func checkClosedReader(t T, h *Harness) {
	e := newEnv(t, h)
	p := e.commit(one(e.random(2*small, small, 1)))
	rd, err := e.repo.Open(e.ctx, p.ID)
	require.NoError(t, err)
	d, err := rd.Disk(e.ctx, "d1")
	require.NoError(t, err)
	require.NoError(t, d.Close())
	_, err = d.ReadAt(make([]byte, 1), 0)
	require.Error(t, err)
	require.NotErrorIs(t, err, io.EOF)
	require.NoError(t, rd.Close())
	_, err = rd.Disk(e.ctx, "d1")
	require.Error(t, err)
}

func checkExtentsStop(t T, h *Harness) {
	e := newEnv(t, h)
	d := newDisk(20*small, small)
	for i := int64(0); i < 20; i += 2 {
		d.fill(e.rng, i)
	}
	r := e.openDisk1(e.commit(one(d)).ID)
	n := 0
	for x, err := range r.Extents(e.ctx) {
		require.NoError(t, err)
		require.Equal(t, repository.Extent{Offset: int64(n) * 2 * small, Length: small}, x)
		if n++; n == 3 {
			break
		}
	}
	require.Equal(t, 3, n)
	data, err := extents(e.ctx, r)
	require.NoError(t, err)
	require.Len(t, data, 10, "an iterator can be made anew")
}
