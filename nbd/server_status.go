package nbd

import (
	"context"
	"encoding/binary"
	"iter"
	"slices"
)

// statusOf returns the backend as a provider of the named context, or nil.
func (sc *serverConn) statusOf(name string) StatusProvider {
	p, ok := sc.export.Backend.(StatusProvider)
	if !ok || !slices.Contains(p.MetaContexts(), name) {
		return nil
	}
	return p
}

// blockStatus answers a block status request, one chunk per selected context.
func (sc *serverConn) blockStatus(ctx context.Context, r *serverRequest) error {
	limit := maxExtents
	if r.flags&cmdFlagReqOne != 0 {
		limit = 1
	}
	provider := sc.export.Backend.(StatusProvider)
	for i, name := range sc.contexts {
		data := binary.BigEndian.AppendUint32(nil, contextID(i))
		extents := provider.Extents(ctx, name, int64(r.off), int64(r.length))
		count := 0
		for e, err := range normalise(extents, int64(r.off), int64(r.length)) {
			if err != nil {
				return sc.refuse(r, err, -1)
			}
			data = binary.BigEndian.AppendUint32(data, uint32(e.Length))
			data = binary.BigEndian.AppendUint32(data, e.Flags)
			if count++; count == limit {
				break
			}
		}
		flags := uint16(0)
		if i == len(sc.contexts)-1 {
			flags = chunkFlagDone
		}
		if err := sc.send(r.chunk(flags, chunkBlockStatus, len(data)), data); err != nil {
			return err
		}
	}
	return nil
}

// normalise turns what a provider yields into consecutive extents that cover n bytes at off exactly,
// with gaps as flags 0 and equal neighbours merged. An error ends the walk.
func normalise(in iter.Seq2[Extent, error], off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		out := Extent{Offset: off}
		end := off + n
		add := func(to int64, flags uint32) bool { // extends what is known to offset to
			pos := out.Offset + out.Length
			if to <= pos {
				return true
			}
			if out.Length > 0 && out.Flags != flags {
				if !yield(out, nil) {
					return false
				}
				out = Extent{Offset: pos}
			}
			out.Length, out.Flags = to-out.Offset, flags
			return true
		}
		for e, err := range in {
			if err != nil {
				yield(Extent{}, err)
				return
			}
			if e.Length <= 0 || e.Offset >= end {
				continue
			}
			if !add(min(e.Offset, end), 0) {
				return
			}
			to := end
			if e.Offset < 0 || e.Length < end-e.Offset {
				to = min(e.Offset+e.Length, end)
			}
			if !add(to, e.Flags) {
				return
			}
			if to == end {
				break
			}
		}
		if add(end, 0) && out.Length > 0 {
			yield(out, nil)
		}
	}
}
