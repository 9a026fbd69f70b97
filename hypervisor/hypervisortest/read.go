package hypervisortest

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// open opens a disk of a snapshot and closes it at the end of the check.
func (e *env) open(s hypervisor.Snapshot, disk hypervisor.DiskID) hypervisor.DiskReader {
	e.Helper()
	e.need(e.caps.RandomRead, "Capabilities.RandomRead")
	r, err := s.OpenDisk(e.ctx, disk)
	require.NoError(e, err)
	e.later(func() { _ = r.Close() }) // may have been closed by the check
	return r
}

// readAll reads a whole disk, not looking at extents where that is possible.
func (e *env) readAll(s hypervisor.Snapshot, disk hypervisor.DiskID) []byte {
	e.Helper()
	p := make([]byte, s.VM().Disk(disk).Size)
	if !e.caps.RandomRead {
		return e.overlay(s, disk, nil, p)
	}
	r, err := s.OpenDisk(e.ctx, disk)
	require.NoError(e, err)
	defer func() { require.NoError(e, r.Close()) }()
	e.fill(r, p, 0)
	return p
}

// fill reads exactly len(p) bytes in pieces.
func (e *env) fill(r io.ReaderAt, p []byte, off int64) {
	e.Helper()
	const piece = 256 << 10
	for len(p) > 0 {
		k := min(piece, len(p))
		e.exact(r, p[:k], off)
		p, off = p[k:], off+int64(k)
	}
}

// exact reads exactly len(p) bytes at once.
func (e *env) exact(r io.ReaderAt, p []byte, off int64) {
	e.Helper()
	require.NoError(e, readExact(r, p, off))
}

func readExact(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n != len(p) {
		return fmt.Errorf("read %d of %d bytes at %d: %w", n, len(p), off, errors.Join(err, io.ErrUnexpectedEOF))
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read at %d: %w", off, err)
	}
	return nil
}

// overlay lays what Extents, or a stream, says about a disk over a copy of
// base.
func (e *env) overlay(s hypervisor.Snapshot, disk hypervisor.DiskID, since *hypervisor.Baseline, base []byte) []byte {
	e.Helper()
	size := s.VM().Disk(disk).Size
	out := make([]byte, size)
	copy(out, base)
	if !e.caps.RandomRead {
		st, ok := s.(hypervisor.Streamer)
		require.True(e, ok, "without RandomRead a snapshot must be a Streamer")
		var end int64
		err := st.Stream(e.ctx, disk, since, func(x hypervisor.Extent, p []byte) error {
			if err := wellFormed(x, end, size); err != nil {
				return err
			}
			end = x.End()
			if p == nil {
				clear(out[x.Offset:x.End()])
				return nil
			}
			if int64(len(p)) != x.Length {
				return fmt.Errorf("%d bytes for extent [%d,+%d)", len(p), x.Offset, x.Length)
			}
			copy(out[x.Offset:], p)
			return nil
		})
		require.NoError(e, err)
		return out
	}
	r, err := s.OpenDisk(e.ctx, disk)
	require.NoError(e, err)
	defer func() { require.NoError(e, r.Close()) }()
	for _, x := range e.extents(s, disk, since) {
		if x.Zero {
			clear(out[x.Offset:x.End()])
			continue
		}
		e.fill(r, out[x.Offset:x.End()], x.Offset)
	}
	return out
}

// extents collects extents and checks that they are well formed.
func (e *env) extents(s hypervisor.Snapshot, disk hypervisor.DiskID, since *hypervisor.Baseline) []hypervisor.Extent {
	e.Helper()
	size := s.VM().Disk(disk).Size
	var out []hypervisor.Extent
	var end int64
	for x, err := range s.Extents(e.ctx, disk, since) {
		require.NoError(e, err)
		require.NoError(e, wellFormed(x, end, size))
		end = x.End()
		out = append(out, x)
	}
	return out
}

func wellFormed(x hypervisor.Extent, end, size int64) error {
	if x.Length <= 0 || x.Offset < end || x.Offset > size-x.Length {
		return fmt.Errorf("extent [%d,+%d) after %d in a disk of %d bytes", x.Offset, x.Length, end, size)
	}
	return nil
}

// extentsErr runs through extents and returns the error, which must come last.
func (e *env) extentsErr(s hypervisor.Snapshot, disk hypervisor.DiskID, since *hypervisor.Baseline) error {
	e.Helper()
	var last error
	for _, err := range s.Extents(e.ctx, disk, since) {
		require.NoError(e, last, "something came after an error")
		last = err
	}
	return last
}

// zeros reports whether p is all zeros.
func zeros(p []byte) bool { return len(bytes.TrimLeft(p, "\x00")) == 0 }

// incremental makes a snapshot since baselines and checks for each disk that
// base content and changes make up want, and that a full read does too.
func (e *env) incremental(base map[hypervisor.DiskID][]byte, since map[hypervisor.DiskID]hypervisor.Baseline) hypervisor.Snapshot {
	e.Helper()
	opts := &hypervisor.SnapshotOptions{}
	for _, d := range e.disks {
		if b, ok := since[d]; ok {
			opts.Since = append(opts.Since, b)
		}
	}
	want := map[hypervisor.DiskID][]byte{}
	for d := range since {
		want[d] = e.frozen(d)
	}
	s := e.snapshot(opts)
	for _, d := range e.disks {
		if b, ok := since[d]; ok {
			e.same(want[d], e.overlay(s, d, &b, base[d]), fmt.Sprintf("disk %s: base content overlaid with the changes", d))
			e.same(want[d], e.readAll(s, d), fmt.Sprintf("disk %s: full read", d))
		}
	}
	return s
}
