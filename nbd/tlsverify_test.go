package nbd_test

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

var errPin = errors.New("the certificate is not the pinned one")

// pinned accepts one leaf certificate alone, whoever signed it, besides what the
// configuration checks anyway.
func pinned(sum [32]byte) func(tls.ConnectionState) error {
	return func(s tls.ConnectionState) error {
		if sha256.Sum256(s.PeerCertificates[0].Raw) != sum {
			return errPin
		}
		return nil
	}
}

// TestCertificatesAreVerified: with nothing but a configuration that says TLS, the
// server's certificate must be signed by a trusted authority, for the right name,
// valid now, and the pinned one if one is pinned.
func TestCertificatesAreVerified(t *testing.T) {
	p, stranger := newPKI(t), newPKI(t)
	_, cfg := serve(t, nbd.ServerConfig{
		Exports: nbd.ExportMap{"": {Backend: newMem(mib)}},
		TLS:     &tls.Config{Certificates: []tls.Certificate{p.server}}, RequireTLS: true,
	})
	dial := func(change func(*tls.Config)) error {
		c := cfg
		c.TLS, c.RequireTLS = &tls.Config{RootCAs: p.roots, ServerName: "localhost"}, true
		change(c.TLS)
		return within(t, func() error {
			client, err := nbd.Dial(context.Background(), c)
			if err == nil {
				err = client.Close()
			}
			return err
		})
	}
	right := sha256.Sum256(p.server.Certificate[0])
	require.NoError(t, dial(func(*tls.Config) {}))
	require.NoError(t, dial(func(c *tls.Config) { c.VerifyConnection = pinned(right) }))

	var unknown x509.UnknownAuthorityError
	require.ErrorAs(t, dial(func(c *tls.Config) { c.RootCAs = stranger.roots }), &unknown)
	require.ErrorAs(t, dial(func(c *tls.Config) { c.RootCAs = nil }), &unknown, "the system's authorities")
	var name x509.HostnameError
	require.ErrorAs(t, dial(func(c *tls.Config) { c.ServerName = "other.example" }), &name)
	for _, when := range []time.Duration{48 * time.Hour, -48 * time.Hour} {
		var invalid x509.CertificateInvalidError
		require.ErrorAs(t, dial(func(c *tls.Config) { c.Time = func() time.Time { return time.Now().Add(when) } }), &invalid)
		require.Equal(t, x509.Expired, invalid.Reason)
	}
	require.ErrorIs(t, dial(func(c *tls.Config) { c.VerifyConnection = pinned(sha256.Sum256(stranger.server.Certificate[0])) }), errPin)
}

// oldTLS is a server that offers versions of TLS up to most.
func oldTLS(p *pki, most uint16) func(context.Context, string, string) (net.Conn, error) {
	return func(context.Context, string, string) (net.Conn, error) {
		a, b := net.Pipe()
		go func() {
			defer b.Close()
			if _, err := b.Write(greeting(3)); err != nil {
				return
			}
			if _, err := io.ReadFull(b, make([]byte, 4+16)); err != nil { // flags, and STARTTLS
				return
			}
			if _, err := b.Write(optReply(5, 1)); err != nil {
				return
			}
			c := tls.Server(b, &tls.Config{
				Certificates: []tls.Certificate{p.server},
				MinVersion:   tls.VersionTLS10, MaxVersion: most,
			})
			if c.Handshake() == nil {
				_, _ = io.Copy(io.Discard, c)
			}
		}()
		return a, nil
	}
}

// TestOldVersionsOfTLSAreRefused, whatever the caller's configuration permits, and
// without falling back to clear text.
func TestOldVersionsOfTLSAreRefused(t *testing.T) {
	p := newPKI(t)
	for _, most := range []uint16{tls.VersionTLS10, tls.VersionTLS11} {
		for _, required := range []bool{true, false} {
			err := within(t, func() error {
				_, err := nbd.Dial(context.Background(), nbd.Config{
					Network: "tcp", Address: "localhost:1", Dialer: oldTLS(p, most), RequireTLS: required,
					TLS: &tls.Config{RootCAs: p.roots, MinVersion: tls.VersionTLS10}, //nolint:gosec // the package must raise it
				})
				return err
			})
			require.Error(t, err)
			var alert *net.OpError
			require.ErrorAs(t, err, &alert, "the refusal itself")
		}
	}
	// And the server refuses clients that offer no better.
	_, cfg := serve(t, nbd.ServerConfig{
		Exports: nbd.ExportMap{"": {Backend: newMem(mib)}},
		TLS:     &tls.Config{Certificates: []tls.Certificate{p.server}, MinVersion: tls.VersionTLS10}, //nolint:gosec // likewise
	})
	for _, most := range []uint16{tls.VersionTLS10, tls.VersionTLS11} {
		c := rawClient(t, cfg)
		c.mustReply(5, nil, 1)
		require.Error(t, tls.Client(c.conn, &tls.Config{
			RootCAs: p.roots, ServerName: "localhost", MinVersion: tls.VersionTLS10, MaxVersion: most, //nolint:gosec // likewise
		}).Handshake())
	}
}
