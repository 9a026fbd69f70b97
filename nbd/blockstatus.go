package nbd

import (
	"context"
	"fmt"
	"iter"
	"slices"
)

// BlockStatus walks the extents of one granted metadata context over n bytes at off. The extents are
// consecutive, cover the range exactly, and neighbours differ in their flags. After an error the walk
// ends. A context that was not granted gives an error matching ErrContextNotGranted: it must not be
// taken for "nothing there".
func (c *Client) BlockStatus(ctx context.Context, name string, off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		c.walk(ctx, []string{name}, off, n, func(e MultiExtent, err error) bool {
			if err != nil {
				return yield(Extent{}, err)
			}
			return yield(Extent{Offset: e.Offset, Length: e.Length, Flags: e.Flags[0]}, nil)
		})
	}
}

// BlockStatusMulti walks several granted metadata contexts at once: each extent is a range over which
// none of them changes. One reply of the server serves all contexts, so this costs no more than a walk
// of one.
func (c *Client) BlockStatusMulti(
	ctx context.Context, names []string, off, n int64,
) iter.Seq2[MultiExtent, error] {
	return func(yield func(MultiExtent, error) bool) {
		c.walk(ctx, names, off, n, func(e MultiExtent, err error) bool {
			e.Flags = slices.Clone(e.Flags)
			return yield(e, err)
		})
	}
}

// cursor is what is known of one context: consecutive extents from the common position of the walk.
type cursor struct {
	queue []rawExtent
	used  int64 // bytes of queue[0] that were passed
}

// walk drives a block status walk. The flags given to yield are reused.
func (c *Client) walk(
	ctx context.Context, names []string, off, n int64, yield func(MultiExtent, error) bool,
) {
	if err := c.checkWalk(names, off, n); err != nil {
		yield(MultiExtent{}, err)
		return
	}
	cursors := make([]cursor, len(names))
	flags := make([]uint32, len(names))
	out := MultiExtent{Offset: off, Flags: make([]uint32, len(names))} // not yet yielded; merges neighbours
	for pos, end := off, off+n; pos < end; {
		if err := c.refill(ctx, names, cursors, pos, end); err != nil {
			if out.Length > 0 && !yield(out, nil) {
				return
			}
			yield(MultiExtent{}, err)
			return
		}
		step := end - pos
		for i := range cursors {
			step = min(step, int64(cursors[i].queue[0].length)-cursors[i].used)
			flags[i] = cursors[i].queue[0].flags
		}
		for i := range cursors {
			cursors[i].advance(step)
		}
		if out.Length > 0 && !slices.Equal(out.Flags, flags) {
			if !yield(out, nil) {
				return
			}
			out.Offset, out.Length = pos, 0
		}
		copy(out.Flags, flags)
		out.Length += step
		pos += step
	}
	if out.Length > 0 {
		yield(out, nil)
	}
}

// advance passes n bytes, which lie within the first extent.
func (c *cursor) advance(n int64) {
	c.used += n
	if c.used == int64(c.queue[0].length) {
		c.queue, c.used = c.queue[1:], 0
	}
}

// refill asks the server when some context has nothing known at pos. Contexts that know more than the
// reply needs keep what they have.
func (c *Client) refill(ctx context.Context, names []string, cursors []cursor, pos, end int64) error {
	missing := false
	for i := range cursors {
		missing = missing || len(cursors[i].queue) == 0
	}
	if !missing {
		return nil
	}
	block, size := c.sess.info.BlockSizes.Minimum, c.sess.info.Size
	first := pos - pos%block
	last := end
	if r := end % block; r != 0 {
		last += min(block-r, size-end)
	}
	ops := []op{{cmd: cmdBlockStatus, off: first, length: uint32(min(last-first, maxStatusStep))}}
	if err := c.do(ctx, ops, false, c.acquire, c.cfg.Retries); err != nil {
		return err
	}
	for i, name := range names {
		cur := &cursors[i]
		if len(cur.queue) > 0 {
			continue
		}
		cur.queue, cur.used = ops[0].status[name], 0
		for skip := pos - first; skip > 0 && len(cur.queue) > 0; {
			n := min(skip, int64(cur.queue[0].length))
			cur.advance(n)
			skip -= n
		}
		if len(cur.queue) == 0 {
			return transmissionf("block status of context %q at %d ends before %d", name, first, pos)
		}
	}
	return nil
}

// checkWalk checks a walk before anything is sent.
func (c *Client) checkWalk(names []string, off, n int64) error {
	size := c.sess.info.Size
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("%w: block status of %d bytes at %d of %d", ErrOutOfRange, n, off, size)
	}
	if len(names) == 0 {
		return fmt.Errorf("nbd: block status of no context: %w", EINVAL)
	}
	var missing []string
	for _, name := range names {
		if !c.HasContext(name) {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return &ContextError{Export: c.sess.info.Name, Missing: missing}
	}
	return nil
}
