package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
)

// reconnect replaces the connections, all of which are lost, by one that leads to the same export.
func (c *Client) reconnect(ctx context.Context) (*conn, error) {
	k, err := c.connect(ctx)
	if err != nil {
		if ctx.Err() != nil || !mayPass(err) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %w", ErrConnectionLost, err)
	}
	if err := c.sess.same(&k.sess); err != nil {
		k.close()
		return nil, err
	}
	if c.cfg.VerifyReconnect != nil {
		if err := c.cfg.VerifyReconnect(ctx, connReader{c: c, k: k, ctx: ctx}); err != nil {
			k.close()
			return nil, errors.Join(ErrExportChanged, err)
		}
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		k.close()
		return nil, ErrClosed
	}
	old := c.retired
	c.conns, c.retired = append(c.conns, k), nil
	c.mu.Unlock()
	for _, o := range old {
		o.close()
	}
	return k, nil
}

// mayPass reports whether a failure to connect is worth another try.
func mayPass(err error) bool {
	var opt *OptionError
	var cert *tls.CertificateVerificationError
	var alert *net.OpError
	switch {
	case errors.As(err, &opt):
		return opt.Code == repErrShutdown
	case errors.As(err, &alert) && (alert.Op == "remote error" || alert.Op == "local error"): // TLS alerts
		return false
	case errors.As(err, &cert), errors.Is(err, ErrContextNotGranted),
		errors.Is(err, ErrTLSRefused), errors.Is(err, ErrExportChanged), errors.Is(err, ErrClosed):
		return false
	}
	return true
}

// retriable reports whether a read that failed this way may succeed on a new connection.
func retriable(err error) bool {
	return errors.Is(err, ErrConnectionLost) && !errors.Is(err, ErrClosed) && !errors.Is(err, ErrExportChanged)
}

// isOptionFailure reports whether the handshake ended with the connection in good order.
func isOptionFailure(err error) bool {
	var opt *OptionError
	return errors.As(err, &opt) || errors.Is(err, ErrContextNotGranted)
}

// rawConn returns what lies under TLS.
func rawConn(nc net.Conn) net.Conn {
	if t, ok := nc.(*tls.Conn); ok {
		return t.NetConn()
	}
	return nc
}

// connReader reads through one given connection. It holds the context of the reconnect it belongs to.
type connReader struct {
	c   *Client
	k   *conn
	ctx context.Context
}

// ReadAt implements io.ReaderAt.
func (r connReader) ReadAt(p []byte, off int64) (int, error) {
	n, _, err := r.c.readVia(r.ctx, p, off, func(context.Context, bool) (*conn, error) {
		return r.k, nil // a lost connection refuses the request itself
	}, 0)
	return n, err
}

var _ io.ReaderAt = connReader{}
