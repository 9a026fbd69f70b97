package nbd

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"slices"
)

// receive runs until the connection fails and then finishes what is left.
func (c *conn) receive() {
	err := c.receiveLoop()
	c.fail(err)
	c.mu.Lock()
	left := make(map[uint64]*request, len(c.pending))
	for cookie, r := range c.pending {
		left[cookie] = r
	}
	err = c.err
	c.mu.Unlock()
	for cookie, r := range left {
		r.err = err
		c.finish(cookie, r)
	}
	close(c.done)
}

func (c *conn) receiveLoop() error {
	var h [structuredSize]byte
	for {
		if _, err := io.ReadFull(c.br, h[:simpleSize]); err != nil {
			return err
		}
		var err error
		switch magic := binary.BigEndian.Uint32(h[:]); magic {
		case magicSimple:
			err = c.simpleReply(h[:])
		case magicStructured:
			if !c.sess.structured {
				return transmissionf("structured reply, which was not negotiated")
			}
			if _, err = io.ReadFull(c.br, h[simpleSize:]); err == nil {
				err = c.structuredReply(h[:])
			}
		default:
			return transmissionf("bad reply magic %#x", magic)
		}
		if err != nil {
			return err
		}
	}
}

// simpleReply handles one plain reply.
func (c *conn) simpleReply(h []byte) error {
	errno, cookie := binary.BigEndian.Uint32(h[4:]), binary.BigEndian.Uint64(h[8:])
	r := c.lookup(cookie)
	if r == nil {
		return transmissionf("reply with unknown cookie %d", cookie)
	}
	switch {
	case errno != 0:
		r.refuse(Errno(errno), -1, "")
	case r.cmd == cmdBlockStatus:
		return transmissionf("plain reply to block-status")
	case r.cmd == cmdRead && c.sess.structured:
		return transmissionf("plain reply to a read although structured replies were negotiated")
	case r.cmd == cmdRead:
		if err := c.fill(r, 0, int64(r.length)); err != nil {
			return err
		}
	}
	c.finish(cookie, r)
	return nil
}

// structuredReply handles one chunk of a structured reply.
func (c *conn) structuredReply(h []byte) error {
	flags, kind := binary.BigEndian.Uint16(h[4:]), binary.BigEndian.Uint16(h[6:])
	cookie, length := binary.BigEndian.Uint64(h[8:]), binary.BigEndian.Uint32(h[16:])
	r := c.lookup(cookie)
	if r == nil {
		return transmissionf("chunk with unknown cookie %d", cookie)
	}
	var err error
	switch {
	case kind == chunkNone:
		if length != 0 || flags&chunkFlagDone == 0 {
			err = transmissionf("empty chunk with length %d, flags %#x", length, flags)
		}
	case kind == chunkOffsetData && r.cmd == cmdRead:
		err = c.dataChunk(r, length)
	case kind == chunkOffsetHole && r.cmd == cmdRead:
		err = c.holeChunk(r, length)
	case kind == chunkBlockStatus && r.cmd == cmdBlockStatus:
		err = c.statusChunk(r, length)
	case kind&chunkErrorBit != 0:
		err = c.errorChunk(r, kind, length)
	default:
		err = transmissionf("chunk type %d in reply to %s", kind, commandName(r.cmd))
	}
	if err != nil || flags&chunkFlagDone == 0 {
		return err
	}
	if r.refusal == nil {
		if r.cmd == cmdRead && !r.cov.complete(int64(r.length)) {
			return transmissionf("read of %d bytes at %d ended with bytes missing", r.length, r.off)
		}
		if r.cmd == cmdBlockStatus && len(r.status) != len(c.sess.contexts) {
			return transmissionf("block status of %d contexts, want %d", len(r.status), len(c.sess.contexts))
		}
	}
	c.finish(cookie, r)
	return nil
}

// place checks a range sent by the server against the request and returns it relative to the request.
func (r *request) place(off uint64, length int64) (int64, error) {
	first, last := uint64(r.off), uint64(r.off)+uint64(r.length)
	if off < first || off > last || uint64(length) > last-off {
		return 0, transmissionf("chunk of %d bytes at %d in reply to %s of %d bytes at %d",
			length, off, commandName(r.cmd), r.length, r.off)
	}
	at := int64(off - first)
	if !r.cov.add(at, at+length) {
		return 0, transmissionf("overlapping chunk of %d bytes at %d", length, off)
	}
	return at, nil
}

// dataChunk reads data straight into the caller's buffer.
func (c *conn) dataChunk(r *request, length uint32) error {
	if length < 9 || int64(length)-8 > int64(r.length) {
		return transmissionf("data chunk of %d bytes in reply to a read of %d", length, r.length)
	}
	var b [8]byte
	if _, err := io.ReadFull(c.br, b[:]); err != nil {
		return err
	}
	n := int64(length) - 8
	at, err := r.place(binary.BigEndian.Uint64(b[:]), n)
	if err != nil {
		return err
	}
	return c.fill(r, at, n)
}

// holeChunk zeroes a part of the caller's buffer.
func (c *conn) holeChunk(r *request, length uint32) error {
	if length != 12 {
		return transmissionf("hole chunk of %d bytes, want 12", length)
	}
	var b [12]byte
	if _, err := io.ReadFull(c.br, b[:]); err != nil {
		return err
	}
	n := int64(binary.BigEndian.Uint32(b[8:]))
	if n == 0 {
		return transmissionf("hole of 0 bytes")
	}
	at, err := r.place(binary.BigEndian.Uint64(b[:]), n)
	if err != nil {
		return err
	}
	r.holeBytes += n
	if c.beginFill(r) {
		clear(r.buf[at : at+n])
		c.endFill(r)
	}
	return nil
}

// fill reads n bytes into the request's buffer at position at, or discards them when the caller has
// gone or goes meanwhile.
func (c *conn) fill(r *request, at, n int64) error {
	if !c.beginFill(r) {
		return c.discard(n)
	}
	got, err := io.ReadFull(c.br, r.buf[at:at+n])
	abandoned := c.endFill(r)
	if abandoned && errors.Is(err, os.ErrDeadlineExceeded) {
		return c.discard(n - int64(got))
	}
	return err
}

func (c *conn) discard(n int64) error {
	_, err := c.br.Discard(int(n))
	return err
}

// statusChunk reads the extents of one context. Memory grows with what has arrived, not with the
// length that the server claims, and ends once the request is covered.
func (c *conn) statusChunk(r *request, length uint32) error {
	if length < 12 || (length-4)%8 != 0 || length > maxControlChunk {
		return transmissionf("block status chunk of %d bytes", length)
	}
	var b [8]byte
	if _, err := io.ReadFull(c.br, b[:4]); err != nil {
		return err
	}
	id := binary.BigEndian.Uint32(b[:])
	name, ok := c.sess.contexts[id]
	if !ok {
		return transmissionf("block status of context %d, which was not negotiated", id)
	}
	if _, dup := r.status[name]; dup {
		return transmissionf("block status of context %q twice in one reply", name)
	}
	count := int(length-4) / 8
	extents := make([]rawExtent, 0, min(count, 1024))
	var sum int64
	for range count {
		if _, err := io.ReadFull(c.br, b[:]); err != nil {
			return err
		}
		e := rawExtent{binary.BigEndian.Uint32(b[:]), binary.BigEndian.Uint32(b[4:])}
		if e.length == 0 {
			return transmissionf("block status extent of 0 bytes")
		}
		if sum >= int64(r.length) {
			continue // beyond what was asked
		}
		sum += int64(e.length)
		if n := len(extents); n > 0 && extents[n-1].flags == e.flags && extents[n-1].length <= ^e.length {
			extents[n-1].length += e.length
			continue
		}
		extents = append(extents, e)
	}
	if r.status == nil {
		r.status = make(map[string][]rawExtent)
	}
	r.status[name] = slices.Clip(extents)
	return nil
}

// errorChunk records the server's refusal; the first one of a reply counts.
func (c *conn) errorChunk(r *request, kind uint16, length uint32) error {
	fixed := uint32(6)
	if kind == chunkErrorOffset {
		fixed = 14
	}
	if length < fixed || length > maxControlChunk {
		return transmissionf("error chunk of %d bytes", length)
	}
	var b [8]byte
	if _, err := io.ReadFull(c.br, b[:6]); err != nil {
		return err
	}
	errno := binary.BigEndian.Uint32(b[:])
	text := uint32(binary.BigEndian.Uint16(b[4:]))
	if errno == 0 {
		return transmissionf("error chunk without an error")
	}
	if text > length-fixed || text > maxString {
		return transmissionf("error message of %d bytes in a chunk of %d", text, length)
	}
	msg := make([]byte, text)
	if _, err := io.ReadFull(c.br, msg); err != nil {
		return err
	}
	at := int64(-1)
	rest := int64(length - 6 - text)
	if kind == chunkErrorOffset {
		if _, err := io.ReadFull(c.br, b[:8]); err != nil {
			return err
		}
		off := binary.BigEndian.Uint64(b[:])
		if off < uint64(r.off) || off-uint64(r.off) > uint64(r.length) {
			return transmissionf("error at offset %d in reply to %s of %d bytes at %d",
				off, commandName(r.cmd), r.length, r.off)
		}
		at = int64(off)
		rest -= 8
	}
	if err := c.discard(rest); err != nil {
		return err
	}
	r.refuse(Errno(errno), at, string(msg))
	return nil
}

// refuse records the first error the server reported for the request.
func (r *request) refuse(errno Errno, at int64, msg string) {
	if r.refusal != nil {
		return
	}
	r.refusal = &RequestError{
		Op: commandName(r.cmd), Offset: r.off, Length: int64(r.length),
		At: at, Errno: errno, Message: msg,
	}
}
