package nbd_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

// patience is far beyond what anything here takes; a test that gets there has hung.
const patience = 20 * time.Second

// within fails the test when f takes too long.
func within(t testing.TB, f func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-time.After(patience):
		t.Fatal("hung")
		return nil
	}
}

// TestCancelInTheMiddleOfData cancels a read while its data is arriving. The caller gets its buffer back
// at once, nothing is written to it afterwards, and the connection goes on with other requests.
func TestCancelInTheMiddleOfData(t *testing.T) {
	p := newPKI(t)
	variants := map[string]struct {
		plain bool
		tls   uint16
		unix  bool
	}{
		"pipe": {}, "pipe, plain replies": {plain: true}, "unix": {unix: true},
		"TLS 1.2": {tls: tls.VersionTLS12}, "TLS 1.3 on unix": {tls: tls.VersionTLS13, unix: true},
	}
	for name, v := range variants {
		t.Run(name, func(t *testing.T) {
			const n = 200_000
			halfway, resume := make(chan struct{}), make(chan struct{})
			f := &fakeServer{plain: v.plain, serve: func(c net.Conn) error {
				r, err := next(c)
				if err != nil {
					return err
				}
				data := bytes.Repeat([]byte{0xee}, n)
				reply := chunk(done, kindData, r.cookie, r.off, data)
				if v.plain {
					reply = simpleReply(0, r.cookie, data)
				}
				if _, err := c.Write(reply[:n/2]); err != nil {
					return err
				}
				close(halfway)
				<-resume
				if _, err := c.Write(reply[n/2:]); err != nil {
					return err
				}
				if r, err = next(c); err != nil {
					return err
				}
				reply = chunk(done, kindData, r.cookie, r.off, []byte("next"))
				if v.plain {
					reply = simpleReply(0, r.cookie, []byte("next"))
				}
				_, err = c.Write(reply)
				_, _ = next(c)
				return err
			}}
			var dials atomic.Int32
			cfg := fakeConfig(t, &dials, f)
			if v.unix {
				cfg.Dialer = unixDialer(t, f)
			}
			if v.tls != 0 {
				f.tls = p.serverTLS()
				cfg.TLS, cfg.RequireTLS = p.clientTLS(), true
				cfg.TLS.MinVersion, cfg.TLS.MaxVersion = v.tls, v.tls
			}
			c := dial(t, cfg)
			ctx, cancel := context.WithCancelCause(context.Background())
			why := errors.New("enough")
			go func() {
				<-halfway
				cancel(why)
			}()
			buf := make([]byte, n)
			err := within(t, func() error {
				_, err := c.ReadAtContext(ctx, buf, 0)
				return err
			})
			require.ErrorIs(t, err, why)
			clear(buf)
			close(resume)
			small := make([]byte, 4)
			require.NoError(t, within(t, func() error {
				_, err := c.ReadAt(small, 0)
				return err
			}))
			require.Equal(t, "next", string(small))
			requireSame(t, make([]byte, n), buf, "buffer after cancellation")
		})
	}
}

// unixDialer serves f on real sockets.
func unixDialer(t testing.TB, f *fakeServer) func(context.Context, string, string) (net.Conn, error) {
	t.Helper()
	socket := socketDir(t) + "/s"
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if c, err := l.Accept(); err == nil {
			_ = f.handle(c)
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-ended
	})
	return func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", socket) }
}

// TestCancelEverywhere cancels at each stage against a server that stops answering there.
func TestCancelEverywhere(t *testing.T) {
	silent := func(c net.Conn) error {
		_, err := io.Copy(io.Discard, c)
		return err
	}
	soon := func() (context.Context, context.CancelFunc) {
		return context.WithTimeout(context.Background(), 30*time.Millisecond)
	}
	t.Run("handshake", func(t *testing.T) {
		for _, sent := range []int{0, 5, 16, 18} {
			cfg := nbd.Config{Network: "fake", Address: "x"}
			cfg.Dialer = func(context.Context, string, string) (net.Conn, error) {
				a, b := net.Pipe()
				t.Cleanup(func() { _ = b.Close() })
				go func() { _, _ = b.Write(greeting(3)[:sent]) }()
				return a, nil
			}
			ctx, cancel := soon()
			defer cancel()
			err := within(t, func() error {
				_, err := nbd.Dial(ctx, cfg)
				return err
			})
			require.ErrorIs(t, err, context.DeadlineExceeded)
		}
	})
	t.Run("reply", func(t *testing.T) {
		var dials atomic.Int32
		cfg := fakeConfig(t, &dials, &fakeServer{serve: silent, contexts: []string{nbd.ContextBaseAllocation}})
		cfg.MetaContexts = []string{nbd.ContextBaseAllocation}
		cfg.Inflight = 2
		c := dial(t, cfg)
		for range 5 { // abandoned requests keep their slots: later ones wait for a slot, cancelably
			ctx, cancel := soon()
			err := within(t, func() error {
				_, err := c.ReadAtContext(ctx, make([]byte, 512), 0)
				return err
			})
			cancel()
			require.ErrorIs(t, err, context.DeadlineExceeded)
		}
		ctx, cancel := soon()
		defer cancel()
		for _, err := range c.BlockStatus(ctx, nbd.ContextBaseAllocation, 0, c.Size()) {
			require.ErrorIs(t, err, context.DeadlineExceeded)
		}
		require.Equal(t, 1, c.Connections())
		require.NoError(t, within(t, c.Close))
	})
	t.Run("sending", func(t *testing.T) {
		var dials atomic.Int32
		hold, stop := context.WithCancel(context.Background())
		defer stop()
		began := make(chan struct{})
		c := dial(t, fakeConfig(t, &dials, &fakeServer{flags: 1, serve: func(c net.Conn) error {
			_, err := c.Read(make([]byte, 1))
			close(began)
			<-hold.Done()
			return err
		}}))
		first := make(chan error, 1)
		go func() {
			_, err := c.WriteAt(make([]byte, 4096), 0) // holds the sending side
			first <- err
		}()
		<-began
		ctx, cancel := soon()
		defer cancel()
		err := within(t, func() error {
			_, err := c.WriteAtContext(ctx, make([]byte, 4096), 8192, 0)
			return err
		})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.NoError(t, within(t, c.Close))
		require.ErrorIs(t, within(t, func() error { return <-first }), nbd.ErrClosed)
		require.ErrorIs(t, c.Flush(ctx), errors.ErrUnsupported)
	})
}

// TestCloseEndsRequests closes the client while requests wait.
func TestCloseEndsRequests(t *testing.T) {
	var dials atomic.Int32
	seen := make(chan struct{}, 4)
	c := dial(t, fakeConfig(t, &dials, &fakeServer{serve: func(c net.Conn) error {
		for {
			if _, err := next(c); err != nil {
				return err
			}
			seen <- struct{}{}
		}
	}}))
	results := make(chan error, 4)
	for range 4 {
		go func() {
			_, err := c.ReadAt(make([]byte, 512), 0)
			results <- err
		}()
	}
	for range 4 {
		<-seen
	}
	require.NoError(t, within(t, c.Close))
	for range 4 {
		require.ErrorIs(t, within(t, func() error { return <-results }), nbd.ErrClosed)
	}
}

// TestCancelDuringLargeRead cancels at random moments of reads in many pieces, under the
// race detector, against a real server.
func TestCancelDuringLargeRead(t *testing.T) {
	r := seeded(t)
	m := newRandomMem(t, 4*mib)
	_, cfg := serveMem(t, m)
	cfg.RequestSize, cfg.Inflight = 64<<10, 4
	c := dial(t, cfg)
	buf := make([]byte, 4*mib)
	for range 100 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(r.IntN(3_000_000)))
		n, err := c.ReadAtContext(ctx, buf, 0)
		cancel()
		if err != nil {
			require.ErrorIs(t, err, context.DeadlineExceeded)
		}
		requireSame(t, m.data[:n], buf[:n], "what was reported as read")
		clear(buf) // a late write into buf would be a race
	}
	require.Equal(t, 1, c.Connections())
	_, err := c.ReadAt(buf, 0)
	require.NoError(t, err)
	requireSame(t, m.data, buf, "afterwards")
}
