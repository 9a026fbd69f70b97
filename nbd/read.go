package nbd

import (
	"context"
	"fmt"
	"io"
)

// ReadInfo tells about a read that succeeded.
type ReadInfo struct {
	// Hole is true when the server reported every byte of the range as part of a hole, so that the data
	// is known to be zero without looking at it. It is never true without structured replies.
	Hole bool
	// HoleBytes is how many bytes were reported as holes.
	HoleBytes int64
}

// op is a piece of a larger operation, small enough for one request.
type op struct {
	cmd, flags uint16
	off        int64
	length     uint32
	buf        []byte // destination of a read
	payload    []byte // of a write

	done      bool
	holeBytes int64
	status    map[string][]rawExtent
}

// acquirer chooses the connection for a request.
type acquirer func(ctx context.Context, change bool) (*conn, error)

// ReadAt reads len(p) bytes at byte offset off, without a limit in time. It implements io.ReaderAt: at
// the end of the export it returns the bytes there are and io.EOF. p is not retained.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	return c.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext is ReadAt ending when ctx does; p is not touched after it returns. On an error the first
// n bytes are valid.
func (c *Client) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	n, _, err := c.readVia(ctx, p, off, c.acquire, c.cfg.Retries)
	return n, err
}

// ReadAtInfo is ReadAtContext that also tells whether the range was a hole. p is zeroed where it was.
func (c *Client) ReadAtInfo(ctx context.Context, p []byte, off int64) (int, ReadInfo, error) {
	return c.readVia(ctx, p, off, c.acquire, c.cfg.Retries)
}

// readVia reads with the given source of connections and number of retries.
func (c *Client) readVia(ctx context.Context, p []byte, off int64, get acquirer, retries int) (int, ReadInfo, error) {
	size := c.sess.info.Size
	if off < 0 {
		return 0, ReadInfo{}, fmt.Errorf("%w: read at %d", ErrOutOfRange, off)
	}
	var end error
	if off >= size {
		if len(p) == 0 {
			return 0, ReadInfo{}, nil
		}
		return 0, ReadInfo{}, io.EOF
	}
	if int64(len(p)) > size-off {
		p, end = p[:size-off], io.EOF
	}
	if len(p) == 0 {
		return 0, ReadInfo{}, nil
	}
	ops, copies, err := c.planRead(p, off)
	if err != nil {
		return 0, ReadInfo{}, err
	}
	err = c.do(ctx, ops, false, get, retries)
	for _, cp := range copies {
		if cp.op.done {
			copy(cp.dst, cp.src)
		}
	}
	if err != nil {
		return progress(ops, off, len(p)), ReadInfo{}, err
	}
	var info ReadInfo
	info.Hole = true
	for i := range ops {
		info.HoleBytes += ops[i].holeBytes
		info.Hole = info.Hole && ops[i].holeBytes == int64(ops[i].length)
	}
	info.HoleBytes = min(info.HoleBytes, int64(len(p)))
	return len(p), info, end
}

// progress returns how many of want bytes at off were done without a gap. ops are in ascending order.
func progress(ops []op, off int64, want int) int {
	reached := off
	for i := range ops {
		if !ops[i].done {
			break
		}
		reached = ops[i].off + int64(ops[i].length)
	}
	return int(min(max(reached-off, 0), int64(want)))
}

// bounce is data read into a spare buffer because the caller's range was not aligned.
type bounce struct {
	op       *op
	dst, src []byte
}

// planRead cuts a read into requests. Ragged ends of a range that is not aligned to the minimum block
// size are read through small buffers of their own.
func (c *Client) planRead(p []byte, off int64) ([]op, []bounce, error) {
	block, size := c.sess.info.BlockSizes.Minimum, c.sess.info.Size
	end := off + int64(len(p))
	if block == 1 || (off%block == 0 && end%block == 0) {
		return c.split(cmdRead, 0, off, p, false), nil, nil
	}
	if end > size-size%block {
		return nil, nil, fmt.Errorf("%w: the last %d bytes of the export cannot be read in blocks of %d",
			ErrUnaligned, size%block, block)
	}
	var ops []op
	type piece struct {
		at       int
		dst, src []byte
	}
	var pieces []piece
	ragged := func(dst []byte, at int64) {
		first := at - at%block
		buf := make([]byte, block)
		pieces = append(pieces, piece{len(ops), dst, buf[at-first:]})
		ops = append(ops, op{cmd: cmdRead, off: first, length: uint32(block), buf: buf})
	}
	if head := off % block; head != 0 {
		n := min(block-head, int64(len(p)))
		ragged(p[:n], off)
		p, off = p[n:], off+n
	}
	if n := int64(len(p)) - int64(len(p))%block; n > 0 {
		ops = append(ops, c.split(cmdRead, 0, off, p[:n], false)...)
		p, off = p[n:], off+n
	}
	if len(p) > 0 {
		ragged(p, off)
	}
	copies := make([]bounce, len(pieces))
	for i, x := range pieces {
		copies[i] = bounce{&ops[x.at], x.dst, x.src}
	}
	return ops, copies, nil
}

// split cuts an operation with data at the request size.
func (c *Client) split(cmd, flags uint16, off int64, p []byte, write bool) []op {
	step := c.requestSize()
	ops := make([]op, 0, (int64(len(p))+step-1)/step)
	for len(p) > 0 {
		n := min(int64(len(p)), step)
		o := op{cmd: cmd, flags: flags, off: off, length: uint32(n)}
		if write {
			o.payload = p[:n]
		} else {
			o.buf = p[:n]
		}
		ops = append(ops, o)
		p, off = p[n:], off+n
	}
	return ops
}

// requestSize is the payload of one request: what was configured, within what the server permits, a
// multiple of the minimum block size.
func (c *Client) requestSize() int64 {
	s := c.sess.info.BlockSizes
	n := min(c.cfg.RequestSize, s.Maximum, maxPayload)
	return max(n-n%s.Minimum, s.Minimum)
}

// do carries out all ops, many at a time. With retries, those that failed because a connection was lost
// are sent again.
func (c *Client) do(ctx context.Context, ops []op, change bool, get acquirer, retries int) error {
	for attempt := 1; ; attempt++ {
		err := c.round(ctx, ops, change, get)
		if err == nil || attempt > retries || !retriable(err) || ctx.Err() != nil {
			return err
		}
		if werr := c.cfg.Backoff(ctx, attempt); werr != nil {
			return fmt.Errorf("%w (while waiting to retry after: %w)", werr, err)
		}
	}
}

// round sends every op that is not done and waits for all that were sent. It returns the first error.
func (c *Client) round(ctx context.Context, ops []op, change bool, get acquirer) error {
	type sent struct {
		k *conn
		r *request
		o *op
	}
	var few [4]sent
	flight := few[:0]
	var first error
	for i := range ops {
		o := &ops[i]
		if o.done {
			continue
		}
		k, err := get(ctx, change)
		if err == nil {
			r := &request{cmd: o.cmd, flags: o.flags, off: o.off, length: o.length, payload: o.payload, buf: o.buf}
			if err = k.submit(ctx, r); err == nil {
				flight = append(flight, sent{k, r, o})
			}
		}
		if err != nil {
			first = err
			break
		}
	}
	for _, s := range flight {
		err := s.k.wait(ctx, s.r)
		if err != nil {
			if first == nil {
				first = err
			}
			continue
		}
		s.o.done, s.o.holeBytes, s.o.status = true, s.r.holeBytes, s.r.status
	}
	return first
}
