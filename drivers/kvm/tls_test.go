//go:build !(libvirt_dlopen && cgo && linux)

package kvm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// authority signs certificates for tests.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"},
		NotBefore: time.Now().Add(-72 * time.Hour), NotAfter: time.Now().Add(72 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	require.NoError(t, err)
	c, err = x509.ParseCertificate(der)
	require.NoError(t, err)
	return &authority{c, key}
}

func (a *authority) issue(t *testing.T, name string, until time.Time) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: until, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, &key.PublicKey, a.key)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// pkipath writes what a libvirt client looks for: trusted is who it trusts.
func pkipath(t *testing.T, trusted *authority, client tls.Certificate) string {
	t.Helper()
	dir := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(client.PrivateKey)
	require.NoError(t, err)
	for name, b := range map[string]*pem.Block{
		"cacert.pem":     {Type: "CERTIFICATE", Bytes: trusted.cert.Raw},
		"clientcert.pem": {Type: "CERTIFICATE", Bytes: client.Certificate[0]},
		"clientkey.pem":  {Type: "PRIVATE KEY", Bytes: key},
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(b), 0o600))
	}
	return dir
}

// TestTLSOfLibvirtIsVerified connects to listeners that are not who they should be.
// The only one that is accepted without proof is the one whose URI says so, and
// that is logged.
func TestTLSOfLibvirtIsVerified(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	later := time.Now().Add(24 * time.Hour)
	client := ours.issue(t, "client", later)
	for _, c := range []struct {
		name   string
		server *tls.Config
		query  string
		want   any // the type of the reason; nil: the handshake is done
	}{
		{"right", &tls.Config{Certificates: []tls.Certificate{ours.issue(t, "localhost", later)}}, "", nil},
		{"wrong authority", &tls.Config{Certificates: []tls.Certificate{theirs.issue(t, "localhost", later)}}, "", new(x509.UnknownAuthorityError)},
		{"wrong name", &tls.Config{Certificates: []tls.Certificate{ours.issue(t, "other.example", later)}}, "", new(x509.HostnameError)},
		{"expired", &tls.Config{Certificates: []tls.Certificate{ours.issue(t, "localhost", time.Now().Add(-time.Hour))}}, "", new(x509.CertificateInvalidError)},
		{"TLS 1.1", &tls.Config{Certificates: []tls.Certificate{ours.issue(t, "localhost", later)}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, "", new(*net.OpError)},
		{"named off", &tls.Config{Certificates: []tls.Certificate{theirs.issue(t, "localhost", later)}}, "&no_verify=1", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := tls.Listen("tcp", "localhost:0", c.server)
			require.NoError(t, err)
			defer l.Close()
			shaken := make(chan error, 1)
			go func() {
				nc, err := l.Accept()
				if err != nil {
					shaken <- err
					return
				}
				defer nc.Close()
				shaken <- nc.(*tls.Conn).Handshake() // and then it hangs up
			}()
			port := l.Addr().(*net.TCPAddr).Port
			var log bytes.Buffer
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			_, err = Open(ctx, Config{
				URI:    fmt.Sprintf("qemu+tls://localhost:%d/system?pkipath=%s%s", port, pkipath(t, ours, client), c.query),
				Logger: slog.New(slog.NewTextHandler(&log, nil)),
			})
			require.ErrorIs(t, err, hypervisor.ErrUnavailable)
			if c.want != nil {
				require.ErrorAs(t, err, c.want)
				require.Error(t, <-shaken)
			} else {
				require.NoError(t, <-shaken, "%v", err)
			}
			require.Equal(t, c.query != "", log.Len() > 0, log.String())
		})
	}
}

// TestURIsKeepTheirSecrets: a URI with credentials, right or broken, shows none of
// them in errors.
func TestURIsKeepTheirSecrets(t *testing.T) {
	for _, uri := range []string{
		"qemu+ssh://root:tig-er@host/wrong", "qemu+xyz://root:tig-er@host/system", "vbox://root:tig-er@host/system",
		"qemu+unix://root:tig-er@host/system", "qemu+ssh://root:tig/er@host/system", "qemu+ssh://root:tig%er@host/system",
		"qemu+ssh://root:tig-er@host:x/system", "qemu+ssh://root:tig\x7fer@host/system", "://root:tig-er@host",
		"qemu+tcp://root:tig-er@localhost:1/system",
	} {
		_, err := Open(context.Background(), Config{URI: uri, Dialer: refuse})
		require.Error(t, err, uri)
		require.NotContains(t, fmt.Sprintf("%v %+v %#v", err, err, err), "tig")
	}
}

func refuse(context.Context, string, string) (net.Conn, error) { return nil, net.ErrClosed }
