//go:build !(libvirt_dlopen && cgo && linux)

package kvm

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"

	libvirt "github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"
)

// rpcConn speaks libvirt's RPC protocol in pure Go.
type rpcConn struct {
	ep   *endpoint
	dial func(ctx context.Context, network, address string) (net.Conn, error)

	lock   semaphore // guards what is below, and dialling
	l      *libvirt.Libvirt
	closed bool
}

// openConn makes the connection and checks that the daemon answers.
func openConn(ctx context.Context, ep *endpoint, dial func(ctx context.Context, network, address string) (net.Conn, error)) (conn, error) {
	c := &rpcConn{ep: ep, dial: dial, lock: newSemaphore()}
	if _, err := c.session(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *rpcConn) leaf() string { return "go-libvirt (" + c.ep.transport + ")" }

// session returns a live connection, dialling when there is none.
func (c *rpcConn) session(ctx context.Context) (*libvirt.Libvirt, error) {
	if err := c.lock.acquire(ctx); err != nil {
		return nil, err
	}
	defer c.lock.release()
	if c.closed {
		return nil, unavailable(net.ErrClosed)
	}
	if c.l != nil && c.l.IsConnected() {
		return c.l, nil
	}
	c.l = nil
	l, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	c.l = l
	return l, nil
}

func (c *rpcConn) connect(ctx context.Context) (*libvirt.Libvirt, error) {
	switch c.ep.transport {
	case "unix":
		var errs []error
		for _, s := range c.ep.sockets() {
			nc, err := c.dial(ctx, "unix", s)
			if err == nil {
				return c.greet(ctx, nc)
			}
			errs = append(errs, err)
		}
		return nil, unavailable(errors.Join(errs...))
	case "tcp":
		port := c.ep.url.Port()
		if port == "" {
			port = "16509"
		}
		nc, err := c.dial(ctx, "tcp", net.JoinHostPort(c.ep.url.Hostname(), port))
		if err != nil {
			return nil, unavailable(err)
		}
		return c.greet(ctx, nc)
	}
	// TLS and SSH: the library dials and proves identities.
	l, err := await(ctx, func() (*libvirt.Libvirt, error) { return libvirt.ConnectToURI(c.ep.url) })
	if err != nil {
		return nil, c.connectError(err)
	}
	return l, nil
}

// greet opens the libvirt session on an established connection.
func (c *rpcConn) greet(ctx context.Context, nc net.Conn) (*libvirt.Libvirt, error) {
	l := libvirt.NewWithDialer(dialers.NewAlreadyConnected(nc))
	_, err := await(ctx, func() (struct{}, error) {
		return struct{}{}, l.ConnectToURI(libvirt.ConnectURI(c.ep.remoteURI()))
	})
	if err != nil {
		_ = nc.Close() // ends whatever still waits on it
		return nil, c.connectError(err)
	}
	return l, nil
}

func (c *rpcConn) connectError(err error) error {
	err = rpcError(err)
	var ve *virError
	if errors.As(err, &ve) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return unavailable(err)
}

// rpcError turns the library's errors into ours.
func rpcError(err error) error {
	if err == nil {
		return nil
	}
	var le libvirt.Error
	switch {
	case errors.As(err, &le):
		return &virError{code: int(le.Code), msg: le.Message}
	case errors.Is(err, libvirt.ErrUnsupported):
		return &virError{code: virNoSupport, msg: err.Error()}
	case errors.Is(err, libvirt.ErrInterrupted), isConnectionError(err):
		return unavailable(err)
	}
	return err
}

// isConnectionError reports whether sending failed: the library gives the bare
// error of the socket, or EINVAL once it is closed.
func isConnectionError(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EPIPE)
}

// rpc runs f on a live connection until ctx ends.
func rpc[T any](ctx context.Context, c *rpcConn, f func(*libvirt.Libvirt) (T, error)) (T, error) {
	l, err := c.session(ctx)
	if err != nil {
		var zero T
		return zero, err
	}
	return await(ctx, func() (T, error) {
		v, err := f(l)
		return v, rpcError(err)
	})
}

// onDomain is rpc with a domain looked up.
func onDomain[T any](ctx context.Context, c *rpcConn, uuid string, f func(*libvirt.Libvirt, libvirt.Domain) (T, error)) (T, error) {
	return rpc(ctx, c, func(l *libvirt.Libvirt) (T, error) {
		var zero T
		id, err := uuidBytes(uuid)
		if err != nil {
			return zero, err
		}
		d, err := l.DomainLookupByUUID(id)
		if err != nil {
			return zero, err
		}
		return f(l, d)
	})
}

// doDomain is onDomain for calls without a result.
func doDomain(ctx context.Context, c *rpcConn, uuid string, f func(*libvirt.Libvirt, libvirt.Domain) error) error {
	_, err := onDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) (struct{}, error) {
		return struct{}{}, f(l, d)
	})
	return err
}

func uuidBytes(s string) (libvirt.UUID, error) {
	var id libvirt.UUID
	raw, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(raw) != len(id) {
		return id, libvirt.Error{Code: virNoDomain, Message: fmt.Sprintf("%q is not the UUID of a domain", s)}
	}
	copy(id[:], raw)
	return id, nil
}

func uuidString(id libvirt.UUID) string { return formatUUID(id[:]) }

func (c *rpcConn) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if err := c.lock.acquire(ctx); err != nil {
		return unavailable(err)
	}
	defer c.lock.release()
	l := c.l
	c.l, c.closed = nil, true
	if l == nil || !l.IsConnected() {
		return nil
	}
	_, err := await(ctx, func() (struct{}, error) { return struct{}{}, rpcError(l.Disconnect()) })
	return err
}
