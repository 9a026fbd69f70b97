package nbd_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

// holes answers n reads and block status requests with holes and hangs up at the next request.
func holes(n int) func(net.Conn) error {
	return func(c net.Conn) error {
		for range n {
			r, err := next(c)
			if err != nil {
				return err
			}
			reply := chunk(done, kindHole, r.cookie, r.off, r.length)
			if r.cmd == 7 {
				reply = chunk(done, kindStat, r.cookie, uint32(10), r.length, uint32(3))
			}
			if _, err := c.Write(reply); err != nil {
				return err
			}
		}
		_, err := next(c)
		return err
	}
}

func TestReconnect(t *testing.T) {
	base := []string{nbd.ContextBaseAllocation}
	ok := &fakeServer{serve: holes(1), contexts: base}
	open := func(t *testing.T, dials *atomic.Int32, servers ...*fakeServer) *nbd.Client {
		cfg := fakeConfig(t, dials, servers...)
		cfg.RequiredContexts = base
		cfg.Retries = 2
		cfg.Backoff = func(ctx context.Context, _ int) error { return ctx.Err() }
		return dial(t, cfg)
	}
	p := make([]byte, 512)
	t.Run("reads go on", func(t *testing.T) {
		var dials atomic.Int32
		c := open(t, &dials, ok)
		for range 5 {
			_, err := c.ReadAt(p, 0)
			require.NoError(t, err)
			for e, err := range statusOf(c) {
				require.NoError(t, err)
				require.EqualValues(t, 3, e.Flags)
			}
		}
		require.EqualValues(t, 10, dials.Load())
	})
	t.Run("bad replies are retried too", func(t *testing.T) {
		var dials atomic.Int32
		bad := &fakeServer{contexts: base, serve: func(c net.Conn) error {
			r, err := next(c)
			if err == nil {
				_, err = c.Write(chunk(done, kindNone, r.cookie))
			}
			return err
		}}
		c := open(t, &dials, bad, bad, ok)
		_, err := c.ReadAt(p, 0)
		require.NoError(t, err)
		c = open(t, new(atomic.Int32), bad)
		_, err = c.ReadAt(p, 0)
		require.ErrorIs(t, err, nbd.ErrProtocol, "after the last retry")
	})
	t.Run("the server answered: no retry", func(t *testing.T) {
		var dials atomic.Int32
		c := open(t, &dials, &fakeServer{contexts: base, serve: func(c net.Conn) error {
			r, err := next(c)
			if err == nil {
				_, err = c.Write(chunk(done, kindError, r.cookie, uint32(5), uint16(0)))
			}
			_, _ = next(c)
			return err
		}})
		_, err := c.ReadAt(p, 0)
		require.ErrorIs(t, err, nbd.EIO)
		require.EqualValues(t, 1, dials.Load())
	})
	changed := map[string]*fakeServer{
		"size":               {serve: holes(1), contexts: base, size: fakeSize + 512},
		"flags":              {serve: holes(1), contexts: base, flags: flagsRO | 4},
		"contexts":           {serve: holes(1), contexts: append([]string{"x:y"}, base...)},
		"structured replies": {plain: true, serve: holes(1)},
	}
	for field, other := range changed {
		t.Run("changed "+field, func(t *testing.T) {
			var dials atomic.Int32
			c := open(t, &dials, ok, other)
			_, err := c.ReadAt(p, 0)
			require.NoError(t, err)
			_, err = c.ReadAt(p, 0)
			if field == "structured replies" { // then the required context is missing first
				require.ErrorIs(t, err, nbd.ErrContextNotGranted)
				return
			}
			require.ErrorIs(t, err, nbd.ErrExportChanged)
			var differ *nbd.ExportChangedError
			require.ErrorAs(t, err, &differ)
			require.Equal(t, field, differ.Field)
			require.EqualValues(t, 2, dials.Load(), "another try would not help")
		})
	}
	t.Run("context lost", func(t *testing.T) {
		var dials atomic.Int32
		c := open(t, &dials, ok, &fakeServer{serve: holes(1)})
		_, err := c.ReadAt(p, 0)
		require.NoError(t, err)
		_, err = c.ReadAt(p, 0)
		require.ErrorIs(t, err, nbd.ErrContextNotGranted)
	})
	t.Run("verified", func(t *testing.T) {
		var dials atomic.Int32
		strange := errors.New("another disk")
		cfg := fakeConfig(t, &dials, &fakeServer{serve: holes(2)})
		cfg.Retries = 1
		var verdict error
		cfg.VerifyReconnect = func(_ context.Context, r io.ReaderAt) error {
			_, err := r.ReadAt(make([]byte, 16), 0)
			return errors.Join(err, verdict)
		}
		c := dial(t, cfg)
		for range 3 {
			_, err := c.ReadAt(p, 0)
			require.NoError(t, err)
		}
		require.EqualValues(t, 2, dials.Load())
		verdict = strange
		_, err := c.ReadAt(p, 0)
		require.ErrorIs(t, err, strange)
		require.ErrorIs(t, err, nbd.ErrExportChanged)
	})
	t.Run("canceled while waiting", func(t *testing.T) {
		var dials atomic.Int32
		cfg := fakeConfig(t, &dials, &fakeServer{serve: holes(0)})
		cfg.Retries = 1000
		ctx, cancel := context.WithCancel(context.Background())
		cfg.Backoff = func(ctx context.Context, attempt int) error {
			if attempt == 3 {
				cancel()
			}
			return ctx.Err()
		}
		c := dial(t, cfg)
		_, err := c.ReadAtContext(ctx, p, 0)
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorIs(t, err, nbd.ErrConnectionLost)
	})
}

// TestChangesDoNotSurviveALostConnection: what was written and not flushed may be gone with the server,
// so a flush on a new connection must not report success.
func TestChangesDoNotSurviveALostConnection(t *testing.T) {
	m := newRandomMem(t, mib)
	s, cfg := serveMem(t, m)
	cfg.Retries = 3
	c := dial(t, cfg)
	_, err := c.WriteAt([]byte("data"), 0)
	require.NoError(t, err)
	s.Drop(nil)
	p := make([]byte, 4)
	_, err = c.ReadAt(p, 0)
	require.NoError(t, err, "reads reconnect")
	require.ErrorIs(t, c.Flush(context.Background()), nbd.ErrConnectionLost)
	_, err = c.WriteAt([]byte("more"), 0)
	require.ErrorIs(t, err, nbd.ErrConnectionLost)
	require.Equal(t, "data", string(m.bytes()[:4]))
}

// TestLostConnectionIsNoEnd: a server that closes the connection must not look like
// the end of the export, which readers are told of by io.EOF.
func TestLostConnectionIsNoEnd(t *testing.T) {
	var dials atomic.Int32
	c := dial(t, fakeConfig(t, &dials, &fakeServer{serve: func(c net.Conn) error {
		_, err := next(c)
		return errors.Join(err, c.Close())
	}}))
	n, err := c.ReadAt(make([]byte, 512), 0)
	require.Zero(t, n)
	require.ErrorIs(t, err, nbd.ErrConnectionLost)
	require.NotErrorIs(t, err, io.EOF)
}

// TestServerShutdownReply: ESHUTDOWN makes the client leave.
func TestServerShutdownReply(t *testing.T) {
	var dials atomic.Int32
	left := make(chan uint16, 1)
	c := dial(t, fakeConfig(t, &dials, &fakeServer{serve: func(c net.Conn) error {
		r, err := next(c)
		if err != nil {
			return err
		}
		if _, err := c.Write(chunk(done, kindError, r.cookie, uint32(108), uint16(0))); err != nil {
			return err
		}
		r, err = next(c)
		left <- r.cmd
		return err
	}}))
	_, err := c.ReadAt(make([]byte, 512), 0)
	require.ErrorIs(t, err, nbd.ESHUTDOWN)
	require.EqualValues(t, 2, <-left, "an orderly disconnect")
	_, err = c.ReadAt(make([]byte, 512), 0)
	require.ErrorIs(t, err, nbd.ErrConnectionLost)
}
