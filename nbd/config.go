package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

const (
	defaultInflight = 16
	// Of the sizes tried in this package's benchmarks, half a MiB is the fastest against qemu-nbd.
	defaultRequestSize = 512 << 10
	maxInflight        = 4096
	maxConnections     = 64
)

// Config says which export to open and how. Network and Address are required; [ParseURL] fills them.
type Config struct {
	// Network is "unix", "tcp", "tcp4" or "tcp6" (anything, with a Dialer that knows it).
	Network string
	// Address is a socket path, or host:port.
	Address string
	// Export is the name of the export; empty asks for the server's default export.
	Export string

	// TLS, when set, asks for TLS with this configuration. TLS 1.2 is the least version used. ServerName
	// is derived from a TCP address when it is empty; on a unix socket it must be set.
	TLS *tls.Config
	// RequireTLS makes a server that does not offer TLS an error (ErrTLSRefused) instead of a silent
	// plaintext connection.
	RequireTLS bool

	// MetaContexts are metadata contexts to ask for; those the server does not know are left out of
	// Client.Contexts. RequiredContexts are asked for too, and it is an error (ErrContextNotGranted)
	// when one of them is not granted.
	MetaContexts, RequiredContexts []string

	// Connections is how many connections to open; 0 means 1. More than one is used only if the server
	// says that several connections see one coherent disk.
	Connections int
	// Inflight is the number of requests outstanding per connection; 0 means 16.
	Inflight int
	// RequestSize is the largest payload of one request in bytes; 0 means 512 KiB. Larger reads and writes
	// are split and their parts kept in flight together. It never exceeds what the server permits.
	RequestSize int64

	// Retries is how many times a read or block status request is tried again, on a new connection if
	// need be, after its connection was lost or broke the protocol. 0 means never. A new connection must
	// show the same size, flags, block sizes and contexts, else the error matches ErrExportChanged. With
	// several connections a new one is made when all are lost.
	// Writes and flushes are never retried.
	Retries int
	// Backoff waits before retry number attempt (from 1) and returns early with an error when ctx ends.
	// Nil means no wait before the first retry, then 100 ms, doubling up to 5 s.
	Backoff func(ctx context.Context, attempt int) error
	// VerifyReconnect, when set, looks at the export through each connection made by a retry, before it
	// is used, for example to compare the digest of the first block. An error ends the retries.
	VerifyReconnect func(ctx context.Context, export io.ReaderAt) error

	// Dialer opens network connections; nil means net.Dialer. The connections must support deadlines.
	Dialer func(ctx context.Context, network, address string) (net.Conn, error)
}

// withDefaults checks the configuration and fills in what zero values stand for.
func (c Config) withDefaults() (Config, error) {
	switch {
	case c.Network == "" || c.Address == "":
		return c, errors.New("nbd: network and address are required")
	case len(c.Export) > maxString || strings.ContainsRune(c.Export, 0):
		return c, errors.New("nbd: export name is longer than 4096 bytes or contains NUL")
	case c.RequireTLS && c.TLS == nil:
		return c, errors.New("nbd: TLS is required but no TLS configuration was given")
	case c.Inflight < 0 || c.Inflight > maxInflight:
		return c, fmt.Errorf("nbd: Inflight %d is not within 0..%d", c.Inflight, maxInflight)
	case c.Connections < 0 || c.Connections > maxConnections:
		return c, fmt.Errorf("nbd: Connections %d is not within 0..%d", c.Connections, maxConnections)
	case c.RequestSize < 0 || c.Retries < 0:
		return c, errors.New("nbd: RequestSize and Retries must not be negative")
	}
	for _, name := range c.wantedContexts() {
		if len(name) > maxString || strings.ContainsRune(name, 0) || !strings.Contains(name, ":") {
			return c, fmt.Errorf("nbd: %q is not the name of a metadata context", name)
		}
	}
	if c.Connections == 0 {
		c.Connections = 1
	}
	if c.Inflight == 0 {
		c.Inflight = defaultInflight
	}
	if c.RequestSize == 0 {
		c.RequestSize = defaultRequestSize
	}
	if c.Dialer == nil {
		c.Dialer = new(net.Dialer).DialContext
	}
	if c.Backoff == nil {
		c.Backoff = backoff
	}
	if c.TLS != nil {
		t, err := c.tlsConfig()
		if err != nil {
			return c, err
		}
		c.TLS = t
	}
	return c, nil
}

// tlsConfig returns a private copy of the TLS configuration with its minimum version and server name set.
func (c Config) tlsConfig() (*tls.Config, error) {
	t := c.TLS.Clone()
	t.MinVersion = max(t.MinVersion, tls.VersionTLS12)
	if t.ServerName == "" && !t.InsecureSkipVerify {
		if !strings.HasPrefix(c.Network, "tcp") {
			return nil, fmt.Errorf("nbd: TLS over %s needs ServerName", c.Network)
		}
		host, _, err := net.SplitHostPort(c.Address)
		if err != nil {
			return nil, fmt.Errorf("nbd: address: %w", err)
		}
		t.ServerName = host
	}
	return t, nil
}

// wantedContexts lists required and optional contexts, each once, in the order given.
func (c Config) wantedContexts() []string {
	var names []string
	seen := make(map[string]bool)
	for _, list := range [][]string{c.RequiredContexts, c.MetaContexts} {
		for _, name := range list {
			if !seen[name] {
				seen[name] = true
				names = append(names, name)
			}
		}
	}
	return names
}

// backoff is the default of Config.Backoff.
func backoff(ctx context.Context, attempt int) error {
	if attempt <= 1 {
		return ctx.Err()
	}
	wait := min(100*time.Millisecond<<min(attempt-2, 10), 5*time.Second)
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
