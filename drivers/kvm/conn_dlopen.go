//go:build libvirt_dlopen && cgo && linux

package kvm

import (
	"context"
	"errors"
	"fmt"
	"net"

	"libvirt.org/go/libvirt"
)

// dlopenConn uses the official binding, which loads libvirt.so.0 at run time.
type dlopenConn struct {
	ep *endpoint

	lock   semaphore // guards what is below, and connecting
	c      *libvirt.Connect
	closed bool
}

// openConn makes the connection and checks that the daemon answers. The library
// connects by itself, so a dialer cannot be honoured.
func openConn(ctx context.Context, ep *endpoint, _ func(ctx context.Context, network, address string) (net.Conn, error)) (conn, error) {
	c := &dlopenConn{ep: ep, lock: newSemaphore()}
	l, err := c.session(ctx)
	if err != nil {
		return nil, err
	}
	_, err = l.Close()
	return c, dlopenError(err)
}

func (c *dlopenConn) leaf() string { return "libvirt.so (" + c.ep.transport + ")" }

// session returns a live connection with a reference for the caller, connecting
// when there is none.
func (c *dlopenConn) session(ctx context.Context) (*libvirt.Connect, error) {
	if err := c.lock.acquire(ctx); err != nil {
		return nil, err
	}
	defer c.lock.release()
	if c.closed {
		return nil, unavailable(net.ErrClosed)
	}
	if c.c != nil {
		if alive, err := c.c.IsAlive(); err == nil && alive {
			return c.c, dlopenError(c.c.Ref())
		}
		old := c.c
		c.c = nil
		_, _ = old.Close()
	}
	fresh, err := await(ctx, func() (*libvirt.Connect, error) { return libvirt.NewConnect(c.ep.raw) })
	if err != nil {
		err = dlopenError(err)
		var ve *virError
		if errors.As(err, &ve) && (ve.code == virSystemError || ve.code == virInternal) {
			return nil, unavailable(err)
		}
		return nil, err
	}
	c.c = fresh
	return fresh, dlopenError(fresh.Ref())
}

// dlopenError turns the binding's errors into ours.
func dlopenError(err error) error {
	if err == nil {
		return nil
	}
	var le libvirt.Error
	if !errors.As(err, &le) {
		return err
	}
	ve := &virError{code: int(le.Code), msg: le.Message}
	if ve.code == virSystemError && le.Domain == libvirt.FROM_RPC {
		return unavailable(ve)
	}
	return ve
}

// lib runs f on a live connection until ctx ends.
func lib[T any](ctx context.Context, c *dlopenConn, f func(*libvirt.Connect) (T, error)) (T, error) {
	l, err := c.session(ctx)
	if err != nil {
		var zero T
		return zero, err
	}
	return await(ctx, func() (T, error) {
		defer l.Close() //nolint:errcheck // gives back the reference that session took
		v, err := f(l)
		return v, dlopenError(err)
	})
}

// onDomain is lib with a domain looked up.
func onDomain[T any](ctx context.Context, c *dlopenConn, uuid string, f func(*libvirt.Domain) (T, error)) (T, error) {
	return lib(ctx, c, func(l *libvirt.Connect) (T, error) {
		var zero T
		if !validUUID(uuid) {
			return zero, libvirt.Error{Code: virNoDomain, Message: fmt.Sprintf("%q is not the UUID of a domain", uuid)}
		}
		d, err := l.LookupDomainByUUIDString(uuid)
		if err != nil {
			return zero, err
		}
		defer d.Free() //nolint:errcheck // gives back memory alone
		return f(d)
	})
}

// doDomain is onDomain for calls without a result.
func doDomain(ctx context.Context, c *dlopenConn, uuid string, f func(*libvirt.Domain) error) error {
	_, err := onDomain(ctx, c, uuid, func(d *libvirt.Domain) (struct{}, error) { return struct{}{}, f(d) })
	return err
}

func (c *dlopenConn) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if err := c.lock.acquire(ctx); err != nil {
		return unavailable(err)
	}
	defer c.lock.release()
	l := c.c
	c.c, c.closed = nil, true
	if l == nil {
		return nil
	}
	_, err := await(ctx, func() (int, error) {
		n, err := l.Close()
		return n, dlopenError(err)
	})
	return err
}
