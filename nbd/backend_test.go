package nbd_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"iter"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

const (
	memBlock = 4096
	memDirty = "qemu:dirty-bitmap:b"
)

// mem is a disk in memory with allocation and dirty state per block of 4096 bytes.
type mem struct {
	mu      sync.RWMutex
	data    []byte
	written []bool // per block: allocated
	dirty   []bool
	flushes int

	fail  func(op string, off, n int64) error // consulted before every operation
	reads func(ctx context.Context, off int64)
}

func newMem(size int) *mem {
	blocks := (size + memBlock - 1) / memBlock
	return &mem{data: make([]byte, size), written: make([]bool, blocks), dirty: make([]bool, blocks)}
}

// newRandomMem returns a fully allocated disk with random content.
func newRandomMem(t testing.TB, size int) *mem {
	t.Helper()
	m := newMem(size)
	fill(seeded(t), m.data)
	for b := range m.written {
		m.written[b] = true
	}
	return m
}

// bytes returns a copy of the content.
func (m *mem) bytes() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return slices.Clone(m.data)
}

func (m *mem) Size() int64 { return int64(len(m.data)) }

func (m *mem) check(op string, off, n int64) error {
	if m.fail != nil {
		return m.fail(op, off, n)
	}
	return nil
}

func (m *mem) ReadAt(p []byte, off int64) (int, error) {
	return m.ReadAtContext(context.Background(), p, off)
}

func (m *mem) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if m.reads != nil {
		m.reads(ctx, off)
	}
	if err := m.check("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if off > int64(len(m.data)) {
		return 0, io.EOF
	}
	n := copy(p, m.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *mem) WriteAt(p []byte, off int64) (int, error) {
	if err := m.check("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.touch(off, int64(len(p)), true)
	return copy(m.data[off:], p), nil
}

// touch marks the blocks of a range.
func (m *mem) touch(off, n int64, allocated bool) {
	for b := off / memBlock; b*memBlock < off+n; b++ {
		whole := off <= b*memBlock && min((b+1)*memBlock, int64(len(m.data))) <= off+n
		if allocated || whole {
			m.written[b] = allocated
		}
		m.dirty[b] = true
	}
}

func (m *mem) WriteZeroes(off, n int64, flags nbd.CommandFlags) error {
	if err := m.check("zero", off, n); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.touch(off, n, flags&nbd.CommandNoHole != 0)
	clear(m.data[off : off+n])
	return nil
}

func (m *mem) Trim(off, n int64) error { return m.WriteZeroes(off, n, 0) }

func (m *mem) Flush() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushes++
	return m.check("flush", 0, 0)
}

func (m *mem) MetaContexts() []string { return []string{nbd.ContextBaseAllocation, memDirty} }

func (m *mem) Extents(_ context.Context, name string, off, n int64) iter.Seq2[nbd.Extent, error] {
	return func(yield func(nbd.Extent, error) bool) {
		if err := m.check("extents", off, n); err != nil {
			yield(nbd.Extent{}, err)
			return
		}
		m.mu.RLock()
		written, dirty := slices.Clone(m.written), slices.Clone(m.dirty)
		m.mu.RUnlock()
		for b := off / memBlock; b*memBlock < off+n; b++ {
			e := nbd.Extent{Offset: b * memBlock, Length: memBlock}
			switch {
			case name == memDirty && dirty[b]:
				e.Flags = nbd.StateDirty
			case name == memDirty:
				continue // a gap is clean
			case !written[b]:
				e.Flags = nbd.StateHole | nbd.StateZero
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// flags returns the expected state of the block that holds off.
func (m *mem) flags(name string, off int64) uint32 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	switch {
	case name == memDirty && m.dirty[off/memBlock]:
		return nbd.StateDirty
	case name == nbd.ContextBaseAllocation && !m.written[off/memBlock]:
		return nbd.StateHole | nbd.StateZero
	}
	return 0
}

// readOnlyBackend hides everything but reading.
type readOnlyBackend struct{ nbd.Backend }

// writeOnlyBackend has writes but no optional commands.
type writeOnlyBackend struct {
	nbd.Backend
	nbd.Writer
}

// serve runs a server on a unix socket until the test ends.
func serve(t testing.TB, cfg nbd.ServerConfig) (*nbd.Server, nbd.Config) {
	t.Helper()
	s, err := nbd.NewServer(cfg)
	require.NoError(t, err)
	socket := filepath.Join(socketDir(t), "s")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() { done <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		require.NoError(t, s.Close())
		require.ErrorIs(t, <-done, nbd.ErrClosed)
	})
	return s, nbd.Config{Network: "unix", Address: socket}
}

// serveMem serves one backend as the default export.
func serveMem(t testing.TB, b nbd.Backend) (*nbd.Server, nbd.Config) {
	t.Helper()
	return serve(t, nbd.ServerConfig{Exports: nbd.ExportMap{"": {Backend: b, MultiConn: true}}})
}

// pki is a certificate authority with a server and a client certificate.
type pki struct {
	dir            string // in the layout that QEMU, libnbd and nbdkit read
	roots          *x509.CertPool
	server, client tls.Certificate
}

func newPKI(t testing.TB) *pki {
	t.Helper()
	p := &pki{dir: t.TempDir(), roots: x509.NewCertPool()}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	require.NoError(t, err)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test ca"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(crand.Reader, ca, ca, &caKey.PublicKey, caKey)
	require.NoError(t, err)
	ca, err = x509.ParseCertificate(der)
	require.NoError(t, err)
	p.roots.AddCert(ca)
	p.save(t, "ca-cert.pem", "CERTIFICATE", der)
	issue := func(name string, serial int64, use x509.ExtKeyUsage) tls.Certificate {
		key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
		require.NoError(t, err)
		leaf := &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
			NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
			DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{use},
		}
		der, err := x509.CreateCertificate(crand.Reader, leaf, ca, &key.PublicKey, caKey)
		require.NoError(t, err)
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		require.NoError(t, err)
		p.save(t, name+"-cert.pem", "CERTIFICATE", der)
		p.save(t, name+"-key.pem", "PRIVATE KEY", keyDER)
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	p.server = issue("server", 2, x509.ExtKeyUsageServerAuth)
	p.client = issue("client", 3, x509.ExtKeyUsageClientAuth)
	return p
}

func (p *pki) save(t testing.TB, name, kind string, der []byte) {
	t.Helper()
	text := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, name), text, 0o600))
}

// serverTLS demands a client certificate.
func (p *pki) serverTLS() *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{p.server},
		ClientCAs:    p.roots, ClientAuth: tls.RequireAndVerifyClientCert,
	}
}

func (p *pki) clientTLS() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{p.client}, RootCAs: p.roots, ServerName: "localhost"}
}
