package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
)

// readChunk is how much Read asks a random-access reader for at once, in bytes.
const readChunk = 1 << 20

// CheckedExtents yields the extents of a disk as Snapshot.Extents does, and ends
// with an error as soon as the driver breaks its promise: extents unsorted,
// overlapping, empty, or outside the disk. Pipelines use it, so that a broken
// driver fails a run instead of losing data.
func CheckedExtents(ctx context.Context, s Snapshot, disk DiskID, since *Baseline) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		d := s.VM().Disk(disk)
		if d == nil {
			yield(Extent{}, &Error{Op: "Extents", Disk: disk, Err: ErrNotFound})
			return
		}
		var end int64
		for e, err := range s.Extents(ctx, disk, since) {
			if err != nil {
				yield(Extent{}, err)
				return
			}
			if e.Offset < end || e.Length <= 0 || e.Offset > d.Size-e.Length {
				yield(Extent{}, &Error{
					Op: "Extents", VM: s.VM().ID, Disk: disk,
					Err: fmt.Errorf("driver broke its contract: extent [%d,+%d) after %d in a disk of %d bytes", e.Offset, e.Length, end, d.Size),
				})
				return
			}
			end = e.End()
			if !yield(e, nil) {
				return
			}
		}
		if err := ctx.Err(); err != nil {
			yield(Extent{}, err)
		}
	}
}

// Read delivers the content of a disk in ascending order by whatever transport
// the snapshot has: random access first, else a stream. yield gets a slice that
// is valid during the call alone, or nil for an extent of zeros.
func Read(ctx context.Context, s Snapshot, disk DiskID, since *Baseline, yield func(Extent, []byte) error) error {
	r, err := s.OpenDisk(ctx, disk)
	if errors.Is(err, errors.ErrUnsupported) {
		if st, ok := s.(Streamer); ok {
			return st.Stream(ctx, disk, since, yield)
		}
	}
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // a reader has nothing to lose
	buf := make([]byte, readChunk)
	for e, err := range CheckedExtents(ctx, s, disk, since) {
		if err != nil {
			return err
		}
		if e.Zero {
			if err := yield(e, nil); err != nil {
				return err
			}
			continue
		}
		for off := e.Offset; off < e.End(); {
			p := buf[:min(int64(len(buf)), e.End()-off)]
			if n, err := r.ReadAt(p, off); n < len(p) {
				if err == nil || err == io.EOF { //nolint:errorlint // a wrapped one is no end of the disk
					err = io.ErrUnexpectedEOF
				}
				return &Error{Op: "Read", VM: s.VM().ID, Disk: disk, Err: fmt.Errorf("%d of %d bytes at %d: %w", n, len(p), off, err)}
			}
			if err := yield(Extent{Offset: off, Length: int64(len(p))}, p); err != nil {
				return err
			}
			off += int64(len(p))
		}
	}
	return nil
}

// Find returns the VM whose name, UUID or ID is s. Two VMs of one name are
// ErrAmbiguous; the error lists their UUIDs.
func Find(ctx context.Context, h Hypervisor, s string) (*VM, error) {
	var found []*VM
	for vm, err := range h.VMs(ctx, Query{Name: s}) {
		if err != nil {
			return nil, err
		}
		found = append(found, vm)
	}
	if len(found) == 0 {
		for vm, err := range h.VMs(ctx, Query{UUID: s}) {
			if err != nil {
				return nil, err
			}
			found = append(found, vm)
		}
	}
	switch len(found) {
	case 0:
		if vm, err := h.VM(ctx, VMID(s)); err == nil || !errors.Is(err, ErrNotFound) {
			return vm, err
		}
		return nil, &Error{
			Op: "find VM", Platform: h.Info().Platform, Hint: "list what is there with: holdfast vms --from URL",
			Err: fmt.Errorf("no VM has the name or UUID %q: %w", s, ErrNotFound),
		}
	case 1:
		return found[0], nil
	}
	ids := ""
	for _, vm := range found {
		ids += " " + vm.UUID
	}
	return nil, &Error{
		Op: "find VM", Platform: h.Info().Platform, Hint: "name one by its UUID:" + ids,
		Err: fmt.Errorf("%d VMs have the name %q: %w", len(found), s, ErrAmbiguous),
	}
}

// Thaw thaws the guest of a VM if the endpoint can; errors.ErrUnsupported if it
// cannot.
func Thaw(ctx context.Context, h Hypervisor, id VMID) error {
	if t, ok := h.(Thawer); ok {
		return t.Thaw(ctx, id)
	}
	return &Error{Op: "Thaw", Platform: h.Info().Platform, VM: id, Err: errors.ErrUnsupported}
}
