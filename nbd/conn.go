package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// readBuffer holds headers and small payloads. Payload beyond it goes straight to the caller's memory.
const readBuffer = 32 << 10

// cancelGrace is how long a request that is just being sent may go on after its context ended. Sending
// takes microseconds unless the peer does not read, and cutting it short costs the connection.
const cancelGrace = 20 * time.Millisecond

// goodbyeTimeout bounds the orderly part of closing a connection.
const goodbyeTimeout = 2 * time.Second

// request is one command in flight. The first fields are set before it is registered; the receiver owns the
// results until done is closed.
type request struct {
	cmd, flags uint16
	off        int64
	length     uint32
	payload    []byte // of a write
	buf        []byte // destination of a read, length bytes

	cov       coverage
	holeBytes int64
	status    map[string][]rawExtent
	refusal   *RequestError
	err       error
	done      chan struct{}

	// Guarded by conn.mu.
	finished, filling, abandoned bool
	released                     chan struct{}
}

// rawExtent is a block status descriptor as it stands on the wire.
type rawExtent struct{ length, flags uint32 }

// conn is one connection in the transmission phase. Any number of goroutines submit requests; one
// goroutine receives.
type conn struct {
	nc   net.Conn // TLS or raw
	raw  net.Conn
	br   *bufio.Reader
	sess session

	slots chan struct{} // one token per request in flight
	wlock chan struct{} // held while sending
	whdr  [requestSize]byte
	wvec  [2][]byte

	failed chan struct{} // closed with the first failure
	done   chan struct{} // closed when the receiver is gone and all requests are finished

	mu          sync.Mutex
	pending     map[uint64]*request
	cookie      uint64
	err         error
	interrupted bool
	draining    bool // the server is going away: no new requests
}

// newConn starts the receiver.
func newConn(nc, raw net.Conn, sess session, inflight int) *conn {
	c := &conn{
		nc: nc, raw: raw, sess: sess,
		br:      bufio.NewReaderSize(nc, readBuffer),
		slots:   make(chan struct{}, inflight),
		wlock:   make(chan struct{}, 1),
		failed:  make(chan struct{}),
		done:    make(chan struct{}),
		pending: make(map[uint64]*request),
	}
	go c.receive()
	return c
}

// errGoingAway ends the use of a connection whose server said ESHUTDOWN.
var errGoingAway = fmt.Errorf("%w: %w", ErrConnectionLost, ESHUTDOWN)

// failure returns why no new requests may be submitted, or nil.
func (c *conn) failure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil && c.draining {
		return errGoingAway
	}
	return c.err
}

// fail records the first failure and cuts the connection; the receiver then finishes all requests.
func (c *conn) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		if err == io.EOF { //nolint:errorlint // readers know it as the end of the export, which this is not
			err = io.ErrUnexpectedEOF
		}
		if !errors.Is(err, ErrConnectionLost) && !errors.Is(err, ErrClosed) {
			err = fmt.Errorf("%w: %w", ErrConnectionLost, err)
		}
		c.err = err
		close(c.failed)
	}
	c.mu.Unlock()
	_ = c.raw.Close()
}

// submit sends r. A nil result means that r.done will be closed; otherwise r was not sent.
func (c *conn) submit(ctx context.Context, r *request) error {
	r.done = make(chan struct{})
	select {
	case c.slots <- struct{}{}:
	default:
		select {
		case c.slots <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-c.failed:
			return c.failure()
		}
	}
	select {
	case c.wlock <- struct{}{}:
	case <-ctx.Done():
		<-c.slots
		return context.Cause(ctx)
	case <-c.failed:
		<-c.slots
		return c.failure()
	}
	defer func() { <-c.wlock }()
	if ctx.Err() != nil {
		<-c.slots
		return context.Cause(ctx)
	}

	c.mu.Lock()
	if c.err != nil || c.draining {
		c.mu.Unlock()
		<-c.slots
		return c.failure()
	}
	c.cookie++
	cookie := c.cookie
	c.pending[cookie] = r
	c.mu.Unlock()

	if err := c.send(ctx, r, cookie); err != nil {
		c.fail(fmt.Errorf("sending %s: %w", commandName(r.cmd), err))
	}
	return nil
}

// send writes header and payload. The caller holds wlock. When ctx ends and the peer does not take the
// rest, the write is cut short with an error; the stream cannot be mended then.
func (c *conn) send(ctx context.Context, r *request, cookie uint64) error {
	if ctx.Done() != nil {
		sent, ran := make(chan struct{}), make(chan struct{})
		stop := context.AfterFunc(ctx, func() {
			defer close(ran)
			grace := time.NewTimer(cancelGrace)
			defer grace.Stop()
			select {
			case <-sent:
			case <-grace.C:
				_ = c.nc.SetWriteDeadline(longAgo)
			}
		})
		defer func() {
			close(sent)
			if !stop() {
				<-ran
				_ = c.nc.SetWriteDeadline(time.Time{})
			}
		}()
	}
	h := c.whdr[:]
	putRequest(h, r.flags, r.cmd, cookie, uint64(r.off), r.length)
	if len(r.payload) == 0 {
		_, err := c.nc.Write(h)
		return err
	}
	c.wvec = [2][]byte{h, r.payload}
	bufs := net.Buffers(c.wvec[:])
	_, err := bufs.WriteTo(c.nc)
	c.wvec = [2][]byte{}
	return err
}

// putRequest encodes a request header.
func putRequest(h []byte, flags, cmd uint16, cookie, off uint64, length uint32) {
	binary.BigEndian.PutUint32(h, magicRequest)
	binary.BigEndian.PutUint16(h[4:], flags)
	binary.BigEndian.PutUint16(h[6:], cmd)
	binary.BigEndian.PutUint64(h[8:], cookie)
	binary.BigEndian.PutUint64(h[16:], off)
	binary.BigEndian.PutUint32(h[24:], length)
}

// wait waits for a submitted request. When ctx ends first the request is abandoned: its reply will be
// discarded, and the caller's buffer is not touched after wait returns.
func (c *conn) wait(ctx context.Context, r *request) error {
	select {
	case <-r.done:
	default:
		select {
		case <-r.done:
		case <-ctx.Done():
			c.abandon(r)
			return context.Cause(ctx)
		}
	}
	if r.err != nil && ctx.Err() != nil {
		return fmt.Errorf("%w: %w", context.Cause(ctx), r.err)
	}
	return r.err
}

// abandon takes the caller's buffer away from the receiver, interrupting it if it is just reading into it.
func (c *conn) abandon(r *request) {
	c.mu.Lock()
	if r.finished || r.abandoned {
		c.mu.Unlock()
		return
	}
	r.abandoned = true
	var released chan struct{}
	if r.filling {
		released = make(chan struct{})
		r.released = released
		c.interrupted = true
		_ = c.nc.SetReadDeadline(longAgo)
	}
	c.mu.Unlock()
	if released != nil {
		<-released
	}
}

// beginFill claims r's buffer for the receiver; false means that the caller has taken it back.
func (c *conn) beginFill(r *request) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	r.filling = !r.abandoned
	return r.filling
}

// endFill gives the buffer back and reports whether the request was abandoned meanwhile.
func (c *conn) endFill(r *request) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	r.filling = false
	if c.interrupted {
		c.interrupted = false
		_ = c.nc.SetReadDeadline(time.Time{})
	}
	if r.released != nil {
		close(r.released)
		r.released = nil
	}
	return r.abandoned
}

// lookup returns the request in flight with this cookie, or nil.
func (c *conn) lookup(cookie uint64) *request {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pending[cookie]
}

// finish completes a request. Only the receiver calls it.
func (c *conn) finish(cookie uint64, r *request) {
	if r.refusal != nil && r.err == nil {
		r.err = r.refusal
	}
	c.mu.Lock()
	delete(c.pending, cookie)
	r.finished = true
	if r.refusal != nil && r.refusal.Errno == ESHUTDOWN {
		c.draining = true
	}
	leave := c.draining && len(c.pending) == 0
	c.mu.Unlock()
	<-c.slots
	close(r.done)
	if leave {
		// The server is going away and asks its clients to do so.
		c.goodbye()
		c.fail(errGoingAway)
	}
}

// close ends the connection, in the orderly way when nothing is in flight, and waits until the receiver
// has let go of all buffers.
func (c *conn) close() {
	c.mu.Lock()
	idle := len(c.pending) == 0 && c.err == nil
	if c.err == nil {
		c.err = ErrClosed
		close(c.failed)
	}
	c.mu.Unlock()
	if idle {
		c.goodbye()
	}
	_ = c.raw.Close()
	<-c.done
}

// goodbye sends the disconnect command and shuts TLS down, unless someone else's sending is stuck.
func (c *conn) goodbye() {
	patience := time.NewTimer(goodbyeTimeout)
	defer patience.Stop()
	select {
	case c.wlock <- struct{}{}:
	case <-patience.C:
		return
	}
	cut := time.AfterFunc(goodbyeTimeout, func() { _ = c.raw.Close() })
	putRequest(c.whdr[:], 0, cmdDisc, 0, 0, 0)
	if _, err := c.nc.Write(c.whdr[:]); err == nil {
		_ = c.nc.Close()
	}
	cut.Stop()
	<-c.wlock
}
