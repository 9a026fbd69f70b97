package nbd

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// Client is an open export: one or more connections to one server. All methods may be called
// concurrently.
type Client struct {
	cfg  Config
	sess session // of the first connection; later ones must match

	dialing chan struct{} // held while a connection is being replaced

	mu      sync.Mutex
	conns   []*conn
	retired []*conn // lost; kept until their receivers are waited for
	closed  bool
	lost    error // why the last connection failed
	wrote   bool  // some change was sent
	broken  error // a connection was lost after a change was sent
}

// Dial connects to the export described by cfg. ctx governs the connecting alone. The caller must Close
// the client.
func Dial(ctx context.Context, cfg Config) (*Client, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	c := &Client{cfg: cfg, dialing: make(chan struct{}, 1)}
	first, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	c.sess = first.sess
	c.conns = append(c.conns, first)
	if !c.sess.info.Flags.Has(FlagCanMultiConn) {
		return c, nil
	}
	for len(c.conns) < cfg.Connections {
		next, err := c.connect(ctx)
		if err == nil {
			if err = c.sess.same(&next.sess); err != nil {
				next.close()
			}
		}
		if err != nil {
			_ = c.Close()
			return nil, fmt.Errorf("nbd: connection %d: %w", len(c.conns)+1, err)
		}
		c.conns = append(c.conns, next)
	}
	return c, nil
}

// connect makes one connection and brings it into the transmission phase.
func (c *Client) connect(ctx context.Context) (*conn, error) {
	n, err := open(ctx, &c.cfg)
	if err != nil {
		return nil, err
	}
	raw := rawConn(n.nc)
	if err := guarded(ctx, n.nc, n.enter); err != nil {
		if ctx.Err() == nil && isOptionFailure(err) {
			_ = guarded(ctx, n.nc, func() error { n.abort(); return nil })
		}
		_ = raw.Close()
		return nil, err
	}
	return newConn(n.nc, raw, n.sess, c.cfg.Inflight), nil
}

// Size returns the size of the export in bytes.
func (c *Client) Size() int64 { return c.sess.info.Size }

// Flags returns the transmission flags of the export.
func (c *Client) Flags() Flags { return c.sess.info.Flags }

// BlockSizes returns the size constraints of the export. Reads need not respect them; changes must be
// aligned to Minimum.
func (c *Client) BlockSizes() BlockSizes { return c.sess.info.BlockSizes }

// Contexts returns the metadata contexts that were granted. The slice belongs to the caller.
func (c *Client) Contexts() []string { return slices.Clone(c.sess.info.Contexts) }

// HasContext reports whether a metadata context was granted.
func (c *Client) HasContext(name string) bool { return slices.Contains(c.sess.info.Contexts, name) }

// StructuredReplies reports whether structured replies are in use; without them there is no block
// status and holes are sent as data.
func (c *Client) StructuredReplies() bool { return c.sess.structured }

// Secure reports whether the connections use TLS.
func (c *Client) Secure() bool { return c.sess.secure }

// Connections returns how many connections are open.
func (c *Client) Connections() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.retire()
	return len(c.conns)
}

// Close disconnects. Requests in flight fail with ErrClosed; no buffer is touched after Close returns.
// Closing again does nothing.
func (c *Client) Close() error {
	c.mu.Lock()
	conns := append(c.retired, c.conns...)
	c.conns, c.retired, c.closed = nil, nil, true
	c.mu.Unlock()
	for _, k := range conns {
		k.close()
	}
	return nil
}

// acquire picks the least busy connection, replacing lost ones if the configuration allows it and the
// caller is not about to change the export.
func (c *Client) acquire(ctx context.Context, change bool) (*conn, error) {
	k, err := c.pick(change)
	if k != nil || err != nil {
		return k, err
	}
	select {
	case c.dialing <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-c.dialing }()
	if k, err := c.pick(change); k != nil || err != nil {
		return k, err
	}
	return c.reconnect(ctx)
}

// pick returns a usable connection, or neither a connection nor an error when one should be dialed.
func (c *Client) pick(change bool) (*conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, ErrClosed
	}
	c.retire()
	if change {
		if c.broken != nil {
			return nil, c.broken
		}
		c.wrote = true
	}
	var best *conn
	for _, k := range c.conns {
		if best == nil || len(k.slots) < len(best.slots) {
			best = k
		}
	}
	if best == nil && (change || c.cfg.Retries == 0) {
		return nil, c.lost
	}
	return best, nil
}

// retire sets lost connections aside. A change that was not flushed may be gone with one, so from then
// on changes and flushes fail: a flush on another connection would promise too much. The caller holds mu.
func (c *Client) retire() {
	c.conns = slices.DeleteFunc(c.conns, func(k *conn) bool {
		err := k.failure()
		if err == nil {
			return false
		}
		c.lost = err
		if c.wrote && c.broken == nil {
			c.broken = err
		}
		c.retired = append(c.retired, k)
		return true
	})
}
