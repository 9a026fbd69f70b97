package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
)

const (
	minHole    = 4096       // shorter holes are sent as data
	maxExtents = 128 * 1024 // of one context in one reply, as QEMU does
)

// handle works on one request and answers it. An error means that the connection is broken.
func (sc *serverConn) handle(ctx context.Context, r *serverRequest) error {
	if err := sc.check(r); err != nil {
		return sc.refuse(r, err, -1)
	}
	var err error
	switch r.cmd {
	case cmdRead:
		return sc.read(ctx, r)
	case cmdBlockStatus:
		return sc.blockStatus(ctx, r)
	case cmdWrite:
		if len(r.payload) > 0 {
			err = writeFull(sc.export.writer(), r.payload, int64(r.off))
		}
	case cmdWriteZeroes:
		err = sc.writeZeroes(ctx, r)
	case cmdTrim:
		err = sc.export.Backend.(Trimmer).Trim(int64(r.off), int64(r.length))
	}
	if f, ok := sc.export.Backend.(Flusher); ok && err == nil {
		if r.cmd == cmdFlush || r.flags&uint16(CommandFUA) != 0 {
			err = f.Flush()
		}
	}
	if err != nil {
		return sc.refuse(r, err, -1)
	}
	return sc.simple(r, 0, nil)
}

// check refuses requests that the export does not take.
func (sc *serverConn) check(r *serverRequest) error {
	flags := sc.export.flags(sc.structured)
	allowed, need, payload, change := uint16(0), FlagHasFlags, false, false
	switch r.cmd {
	case cmdRead:
		allowed, payload = cmdFlagDF, true
		if !flags.Has(FlagSendDF) {
			allowed = 0
		}
	case cmdWrite:
		payload, change = true, true
	case cmdFlush:
		need = FlagSendFlush
	case cmdTrim:
		need, change = FlagSendTrim, true
	case cmdWriteZeroes:
		allowed, need, change = uint16(CommandNoHole), FlagSendWriteZeroes, true
		if flags.Has(FlagSendFastZero) {
			allowed |= uint16(CommandFastZero)
		}
	case cmdBlockStatus:
		allowed = cmdFlagReqOne
	default:
		return refusef(EINVAL, "unknown command %d", r.cmd)
	}
	if flags.Has(FlagSendFUA) {
		allowed |= uint16(CommandFUA)
	}
	off, n, size := r.off, uint64(r.length), uint64(sc.size)
	switch {
	case change && flags.Has(FlagReadOnly):
		return refusef(EPERM, "the export is read-only")
	case !flags.Has(need):
		return refusef(EINVAL, "the export does not support %s", commandName(r.cmd))
	case r.flags&^allowed != 0:
		return refusef(EINVAL, "flags %#x are not permitted with %s", r.flags, commandName(r.cmd))
	case payload && int64(n) > sc.sizes.Maximum:
		return refusef(EINVAL, "%s of more than %d bytes", commandName(r.cmd), sc.sizes.Maximum)
	case off > size || n > size-off:
		if change {
			return refusef(ENOSPC, "%s beyond the end of the export", commandName(r.cmd))
		}
		return refusef(EINVAL, "%s beyond the end of the export", commandName(r.cmd))
	case off%uint64(sc.sizes.Minimum) != 0 || n%uint64(sc.sizes.Minimum) != 0:
		return refusef(EINVAL, "%s is not aligned to %d", commandName(r.cmd), sc.sizes.Minimum)
	case r.cmd == cmdBlockStatus && len(sc.contexts) == 0:
		return refusef(EINVAL, "no metadata context was selected")
	case r.cmd == cmdBlockStatus && n == 0:
		return refusef(EINVAL, "block status of no bytes")
	}
	return nil
}

// writeFull writes all of p.
func writeFull(w Writer, p []byte, off int64) error {
	n, err := w.WriteAt(p, off)
	if err == nil && n < len(p) {
		return io.ErrShortWrite
	}
	return err
}

// writeZeroes zeroes a range, by writing where the backend has nothing better.
func (sc *serverConn) writeZeroes(ctx context.Context, r *serverRequest) error {
	off, n := int64(r.off), int64(r.length)
	flags := CommandFlags(r.flags) & (CommandNoHole | CommandFastZero)
	if n == 0 {
		return nil
	}
	if z, ok := sc.export.Backend.(Zeroer); ok {
		err := z.WriteZeroes(off, n, flags)
		if !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
		if flags&CommandFastZero != 0 {
			return ENOTSUP
		}
	}
	zeroes := sc.srv.buffers.get(min(n, largeBuffer))
	defer sc.srv.buffers.put(zeroes)
	clear(zeroes)
	for n > 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		p := zeroes[:min(n, int64(len(zeroes)))]
		if err := writeFull(sc.export.writer(), p, off); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

// read answers a read request: piece by piece with holes when structured replies are in use.
func (sc *serverConn) read(ctx context.Context, r *serverRequest) error {
	off, n := int64(r.off), int64(r.length)
	if n == 0 {
		if sc.structured {
			return sc.send(r.chunk(chunkFlagDone, chunkNone, 0), nil)
		}
		return sc.simple(r, 0, nil)
	}
	buf := sc.srv.buffers.get(min(n, sc.readPiece(r)))
	defer sc.srv.buffers.put(buf)
	if !sc.structured {
		if err := sc.readFull(ctx, buf, off); err != nil {
			return sc.refuse(r, err, -1)
		}
		return sc.simple(r, 0, buf)
	}
	status := sc.statusOf(ContextBaseAllocation)
	if status == nil || r.flags&cmdFlagDF != 0 {
		return answered(sc.readData(ctx, r, buf, off, n, true))
	}
	zero := func(e Extent) bool {
		return e.Flags&StateZero != 0 && (e.Length >= minHole || e.Length == n)
	}
	pos, end, sendErr := off, off+n, error(nil)
	emit := func(from, to int64, hole bool) bool {
		if hole {
			sendErr = sc.sendHole(r, from, to-from, to == end)
		} else {
			sendErr = sc.readData(ctx, r, buf, from, to-from, to == end)
		}
		return sendErr == nil
	}
	for e, err := range normalise(status.Extents(ctx, ContextBaseAllocation, off, n), off, n) {
		if err != nil {
			return sc.refuse(r, err, pos)
		}
		if !zero(e) {
			continue // data is gathered up to the next hole
		}
		if e.Offset > pos && !emit(pos, e.Offset, false) {
			break
		}
		if !emit(e.Offset, e.Offset+e.Length, true) {
			break
		}
		pos = e.Offset + e.Length
	}
	if sendErr == nil && pos < end {
		emit(pos, end, false)
	}
	return answered(sendErr)
}

// errAnswered says that the request was already answered with an error.
var errAnswered = errors.New("nbd: request was refused")

// answered turns errAnswered into success: the connection is in good order.
func answered(err error) error {
	if errors.Is(err, errAnswered) {
		return nil
	}
	return err
}

// readData sends a range as data chunks; last marks the end of the reply. When the backend fails it
// refuses the request and returns errAnswered.
func (sc *serverConn) readData(ctx context.Context, r *serverRequest, buf []byte, off, n int64, last bool) error {
	for n > 0 {
		p := buf[:min(n, int64(len(buf)))]
		if err := sc.readFull(ctx, p, off); err != nil {
			if err := sc.refuse(r, err, off); err != nil {
				return err
			}
			return errAnswered
		}
		flags := uint16(0)
		if last && n == int64(len(p)) {
			flags = chunkFlagDone
		}
		h := r.chunk(flags, chunkOffsetData, 8+len(p))
		if err := sc.send(binary.BigEndian.AppendUint64(h, uint64(off)), p); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

// sendHole sends a hole chunk.
func (sc *serverConn) sendHole(r *serverRequest, off, n int64, last bool) error {
	flags := uint16(0)
	if last {
		flags = chunkFlagDone
	}
	h := binary.BigEndian.AppendUint64(r.chunk(flags, chunkOffsetHole, 12), uint64(off))
	return sc.send(binary.BigEndian.AppendUint32(h, uint32(n)), nil)
}

// readFull fills p from the backend.
func (sc *serverConn) readFull(ctx context.Context, p []byte, off int64) error {
	var n int
	var err error
	if cr, ok := sc.export.Backend.(ContextReader); ok {
		n, err = cr.ReadAtContext(ctx, p, off)
	} else {
		n, err = sc.export.Backend.ReadAt(p, off)
	}
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF { //nolint:errorlint // a wrapped one is no end of the export
		return io.ErrUnexpectedEOF
	}
	return err
}
