package nbd_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

// TestTLSRequiredMeansRequired tries the ways in which someone between client and server could keep the
// connection in clear.
func TestTLSRequiredMeansRequired(t *testing.T) {
	p := newPKI(t)
	require := require.New(t)
	attempt := func(f *fakeServer, dialer func(context.Context, string, string) (net.Conn, error)) error {
		var dials atomic.Int32
		cfg := fakeConfig(t, &dials, f)
		if dialer != nil {
			cfg.Dialer = dialer
		}
		cfg.TLS, cfg.RequireTLS = p.clientTLS(), true
		return within(t, func() error {
			_, err := nbd.Dial(context.Background(), cfg)
			return err
		})
	}
	for _, code := range []uint32{1, 2, 3, 4, 7} {
		err := attempt(&fakeServer{options: map[uint32][]byte{5: optReply(5, 1<<31|code)}}, nil)
		require.ErrorIs(err, nbd.ErrTLSRefused)
	}
	// Without fixed newstyle there are no options, hence no TLS.
	err := attempt(nil, func(context.Context, string, string) (net.Conn, error) {
		a, b := net.Pipe()
		go func() {
			_, _ = b.Write(greeting(0))
			_, _ = io.Copy(io.Discard, b)
		}()
		return a, nil
	})
	require.ErrorIs(err, nbd.ErrTLSRefused)
	// Something sent in clear behind the acknowledgement must not be taken for an option reply.
	injected := be(optReply(5, 1), optReply(8, 1), optReply(7, 3, uint16(0), uint64(fakeSize), flagsRO), optReply(7, 1))
	f := &fakeServer{options: map[uint32][]byte{5: injected}}
	err = attempt(f, unixDialer(t, f))
	require.Error(err)
	var record tls.RecordHeaderError
	require.ErrorAs(err, &record)

	_, err = nbd.Dial(context.Background(), nbd.Config{Network: "unix", Address: "x", RequireTLS: true})
	require.Error(err, "required without a configuration")
	_, err = nbd.Dial(context.Background(), nbd.Config{Network: "unix", Address: "x", TLS: &tls.Config{}})
	require.Error(err, "nothing to verify the server's name against")
}

// TestServerForgetsStateAtTLS negotiates in clear, upgrades, and checks that nothing was kept.
func TestServerForgetsStateAtTLS(t *testing.T) {
	p := newPKI(t)
	m := newMem(mib)
	_, cfg := serve(t, nbd.ServerConfig{
		Exports: nbd.ExportMap{"": {Backend: m}},
		TLS:     &tls.Config{Certificates: []tls.Certificate{p.server}},
	})
	c := rawClient(t, cfg)
	c.mustReply(8, nil, 1)
	c.mustReply(10, be(uint32(0), uint32(1), uint32(15), nbd.ContextBaseAllocation), 4, 1)
	c.mustReply(5, []byte{0}, 1<<31|3)
	c.mustReply(5, nil, 1)
	c.conn = tls.Client(c.conn, &tls.Config{RootCAs: p.roots, ServerName: "localhost"})
	c.mustReply(5, nil, 1<<31|3) // twice
	c.mustReply(10, be(uint32(0), uint32(1), uint32(15), nbd.ContextBaseAllocation), 1<<31|3)
	c.mustReply(7, be(uint32(0), uint16(0)), 3, 1)
	c.send(be(uint32(0x25609513), uint16(0), uint16(7), uint64(1), uint64(0), uint32(4096)))
	require.Equal(t, simpleReply(22, 1), c.read(16), "no contexts, no structured replies")
}

// TestServerRequiresTLS checks what a server that insists answers in clear.
func TestServerRequiresTLS(t *testing.T) {
	p := newPKI(t)
	ended := make(chan error, 4)
	_, cfg := serve(t, nbd.ServerConfig{
		Exports: nbd.ExportMap{"": {Backend: newMem(mib)}},
		TLS:     p.serverTLS(), RequireTLS: true,
		OnDisconnect: func(_ net.Addr, _ string, err error) { ended <- err },
	})
	c := rawClient(t, cfg)
	for _, opt := range []uint32{3, 6, 7, 8, 9, 10, 77} {
		c.mustReply(opt, nil, 1<<31|5)
	}
	c.option(1, nil)
	c.mustEnd()
	require.ErrorIs(t, <-ended, nbd.ErrProtocol)
	// A client that does not do fixed newstyle cannot upgrade.
	c = rawClientFlags(t, cfg, 0)
	c.option(5, nil)
	c.mustEnd()
	// A client without a certificate.
	cfg.TLS, cfg.RequireTLS = p.clientTLS(), true
	cfg.TLS.Certificates = nil
	_, err := nbd.Dial(context.Background(), cfg)
	var alert *net.OpError
	require.ErrorAs(t, err, &alert)
	require.Equal(t, "remote error", alert.Op, "the refusal itself, not a bare end of the stream")
}
