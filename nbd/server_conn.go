package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// serverConn is one connection of a server: one goroutine reads requests, one goroutine per request
// works on it.
type serverConn struct {
	srv *Server
	raw net.Conn
	nc  net.Conn // TLS or raw
	br  *bufio.Reader

	severed chan struct{} // closed by cut
	sever   sync.Once

	// name and open are written under Server.mu.
	name string
	open bool

	export     *Export
	size       int64
	sizes      BlockSizes
	structured bool
	contexts   []string

	slots chan struct{}
	mem   *budget
	work  sync.WaitGroup

	wmu  sync.Mutex
	wvec [2][]byte
}

// serverRequest is a request as it stands on the wire, with the payload of a write.
type serverRequest struct {
	flags, cmd  uint16
	cookie, off uint64
	length      uint32
	payload     []byte
}

// run serves the connection to its end.
func (sc *serverConn) run(ctx context.Context) (err error) {
	defer func() { sc.srv.remove(sc, err) }()
	defer func() { _ = sc.raw.Close() }()
	stop := context.AfterFunc(ctx, sc.cut)
	defer stop()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(ErrClosed)
	go func() {
		select {
		case <-sc.severed:
			cancel(ErrClosed)
		case <-ctx.Done():
		}
	}()

	timer := time.AfterFunc(sc.srv.cfg.HandshakeTimeout, sc.cut)
	err = sc.handshake(ctx)
	timer.Stop()
	if errors.Is(err, errAborted) {
		sc.hangUp()
		return nil
	}
	if err != nil {
		return err
	}
	sc.br = bufio.NewReaderSize(sc.nc, readBuffer)
	sc.slots = make(chan struct{}, sc.srv.cfg.MaxInflight)
	sc.mem = newBudget(sc.srv.cfg.MaxMemory)
	err = sc.receive(ctx)
	if err == nil || (sc.srv.isStopping() && errors.Is(err, os.ErrDeadlineExceeded)) {
		sc.work.Wait()
		sc.hangUp()
		return nil
	}
	cancel(ErrClosed)
	_ = sc.raw.Close()
	sc.work.Wait()
	return err
}

// cut ends the connection at once and then tells the backend so, whose answers have nowhere to go.
func (sc *serverConn) cut() {
	_ = sc.raw.Close()
	sc.sever.Do(func() { close(sc.severed) })
}

// hangUp closes the connection with TLS's own farewell, which must not take long.
func (sc *serverConn) hangUp() {
	cut := time.AfterFunc(goodbyeTimeout, func() { _ = sc.raw.Close() })
	defer cut.Stop()
	_ = sc.nc.Close()
}

// enter takes over what the handshake settled.
func (sc *serverConn) enter(h *serverHandshake, name string, e *Export) {
	sc.srv.mu.Lock()
	sc.name, sc.open = name, true
	sc.srv.mu.Unlock()
	sc.export, sc.size = e, max(e.Backend.Size(), 0)
	sc.sizes = e.sizes(sc.srv.cfg.MaxRequest)
	sc.structured = h.structured
	if h.structured && h.selectedOf == name {
		sc.contexts = h.selected
	}
}

// receive reads requests until the client disconnects (nil) or the connection fails.
func (sc *serverConn) receive(ctx context.Context) error {
	var h [requestSize]byte
	for {
		if _, err := io.ReadFull(sc.br, h[:]); err != nil {
			return err
		}
		if got := binary.BigEndian.Uint32(h[:]); got != magicRequest {
			return transmissionf("bad request magic %#x", got)
		}
		r := serverRequest{
			flags:  binary.BigEndian.Uint16(h[4:]),
			cmd:    binary.BigEndian.Uint16(h[6:]),
			cookie: binary.BigEndian.Uint64(h[8:]),
			off:    binary.BigEndian.Uint64(h[16:]),
			length: binary.BigEndian.Uint32(h[24:]),
		}
		if r.cmd == cmdDisc {
			return nil
		}
		select {
		case sc.slots <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		memory, err := sc.admit(ctx, &r)
		if err != nil {
			return err
		}
		sc.work.Go(func() {
			if err := sc.handle(ctx, &r); err != nil {
				_ = sc.raw.Close() // the stream is broken; receive notices
			}
			if r.payload != nil {
				sc.srv.buffers.put(r.payload)
			}
			sc.mem.give(memory)
			<-sc.slots
		})
	}
}

// admit reserves the memory that a request needs and reads the payload of a write. A write that is too
// long for the export but not absurd is skipped, so that it can be refused.
func (sc *serverConn) admit(ctx context.Context, r *serverRequest) (memory int64, err error) {
	n := int64(r.length)
	switch r.cmd {
	case cmdRead:
		memory = min(n, sc.readPiece(r))
	case cmdWrite:
		if n > maxPayload {
			return 0, transmissionf("write of %d bytes", n)
		}
		if n > sc.sizes.Maximum {
			_, err := sc.br.Discard(int(n))
			return 0, err
		}
		memory = n
	case cmdWriteZeroes:
		memory = min(n, largeBuffer)
	case cmdBlockStatus:
		memory = largeBuffer
	}
	memory = min(memory, sc.srv.cfg.MaxMemory)
	if err := sc.mem.take(ctx, memory); err != nil {
		return 0, err
	}
	if r.cmd == cmdWrite && n > 0 {
		r.payload = sc.srv.buffers.get(n)
		if _, err := io.ReadFull(sc.br, r.payload); err != nil {
			return 0, err
		}
	}
	return memory, nil
}

// readPiece is how much of a read is held in memory at a time.
func (sc *serverConn) readPiece(r *serverRequest) int64 {
	if !sc.structured || r.flags&cmdFlagDF != 0 {
		return sc.sizes.Maximum
	}
	return largeBuffer
}

// send writes a header and data as one unit.
func (sc *serverConn) send(header, data []byte) error {
	sc.wmu.Lock()
	defer sc.wmu.Unlock()
	if len(data) == 0 {
		_, err := sc.nc.Write(header)
		return err
	}
	sc.wvec = [2][]byte{header, data}
	bufs := net.Buffers(sc.wvec[:])
	_, err := bufs.WriteTo(sc.nc)
	sc.wvec = [2][]byte{}
	return err
}

// simple sends a plain reply.
func (sc *serverConn) simple(r *serverRequest, errno Errno, data []byte) error {
	h := make([]byte, 0, simpleSize)
	h = binary.BigEndian.AppendUint32(h, magicSimple)
	h = binary.BigEndian.AppendUint32(h, uint32(errno))
	h = binary.BigEndian.AppendUint64(h, r.cookie)
	return sc.send(h, data)
}

// chunk starts the header of a structured reply chunk whose payload has the given length.
func (r *serverRequest) chunk(flags, kind uint16, length int) []byte {
	h := make([]byte, 0, structuredSize+16)
	h = binary.BigEndian.AppendUint32(h, magicStructured)
	h = binary.BigEndian.AppendUint16(h, flags)
	h = binary.BigEndian.AppendUint16(h, kind)
	h = binary.BigEndian.AppendUint64(h, r.cookie)
	return binary.BigEndian.AppendUint32(h, uint32(length))
}

// refusal is an error of ours with a text for the client.
type refusal struct {
	errno Errno
	text  string
}

func (e *refusal) Error() string { return "nbd: " + e.text }

func (e *refusal) Unwrap() error { return e.errno }

func refusef(errno Errno, format string, args ...any) error {
	return &refusal{errno, fmt.Sprintf(format, args...)}
}

// refuse tells the client why a request failed. The text of a backend's error stays here: it may name
// things that are not the client's business. at is an offset within the request, or -1.
func (sc *serverConn) refuse(r *serverRequest, err error, at int64) error {
	errno := errnoOf(err)
	if !sc.structured {
		return sc.simple(r, errno, nil)
	}
	text := ""
	var own *refusal
	if errors.As(err, &own) {
		text = own.text
	}
	kind, length := chunkError, 6+len(text)
	if at >= 0 {
		kind, length = chunkErrorOffset, length+8
	}
	h := r.chunk(chunkFlagDone, kind, length)
	h = binary.BigEndian.AppendUint32(h, uint32(errno))
	h = binary.BigEndian.AppendUint16(h, uint16(len(text)))
	h = append(h, text...)
	if at >= 0 {
		h = binary.BigEndian.AppendUint64(h, uint64(at))
	}
	return sc.send(h, nil)
}
