package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// ServerConfig configures a Server. Exports is required; zero values elsewhere mean the stated defaults.
type ServerConfig struct {
	// Exports are what is served.
	Exports ExportSource

	// TLS, when set, lets clients upgrade; ClientAuth decides about client certificates. TLS 1.2 is the
	// least version used. RequireTLS refuses everything else until a client has upgraded.
	TLS        *tls.Config
	RequireTLS bool

	// MaxConnections bounds the connections at one time, 0 means 64; further ones are closed at once.
	MaxConnections int
	// MaxInflight bounds the requests worked on per connection, 0 means 16.
	MaxInflight int
	// MaxRequest is the largest read or write in bytes, 0 means 32 MiB, which is also the most.
	MaxRequest int64
	// MaxMemory bounds the bytes of data buffers per connection, 0 means 64 MiB. It is at least
	// MaxRequest.
	MaxMemory int64
	// HandshakeTimeout ends connections that have not opened an export in time; 0 means 30 s.
	HandshakeTimeout time.Duration

	// NoStructuredReplies makes the server act like an old one: no structured replies, so no holes and
	// no block status.
	NoStructuredReplies bool

	// OnDisconnect, when set, is told of every connection that ended, with nil after an orderly end. It
	// is called concurrently and must not block.
	OnDisconnect func(remote net.Addr, export string, err error)
}

// Server serves exports over the NBD protocol. All methods may be called concurrently.
type Server struct {
	cfg     ServerConfig
	buffers buffers

	mu        sync.Mutex
	conns     map[*serverConn]struct{}
	listeners map[net.Listener]struct{}
	stopping  bool
	active    sync.WaitGroup
}

// NewServer checks the configuration and makes a Server, which must be closed with Shutdown or Close.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.Exports == nil {
		return nil, errors.New("nbd: server without exports")
	}
	if cfg.RequireTLS && cfg.TLS == nil {
		return nil, errors.New("nbd: TLS is required but no TLS configuration was given")
	}
	if cfg.MaxConnections < 0 || cfg.MaxInflight < 0 || cfg.MaxRequest < 0 || cfg.MaxRequest > maxPayload ||
		cfg.MaxMemory < 0 || cfg.HandshakeTimeout < 0 {
		return nil, errors.New("nbd: server limits must not be negative, nor MaxRequest above 32 MiB")
	}
	if cfg.TLS != nil {
		cfg.TLS = cfg.TLS.Clone()
		cfg.TLS.MinVersion = max(cfg.TLS.MinVersion, tls.VersionTLS12)
	}
	orDefault(&cfg.MaxConnections, 64)
	orDefault(&cfg.MaxInflight, defaultInflight)
	orDefault(&cfg.MaxRequest, maxPayload)
	orDefault(&cfg.MaxMemory, 64<<20)
	orDefault(&cfg.HandshakeTimeout, 30*time.Second)
	cfg.MaxMemory = max(cfg.MaxMemory, cfg.MaxRequest)
	return &Server{
		cfg:       cfg,
		conns:     make(map[*serverConn]struct{}),
		listeners: make(map[net.Listener]struct{}),
	}, nil
}

// orDefault replaces a zero value.
func orDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// Serve accepts connections until ctx ends, l fails, or the server is closed, and closes l. When ctx
// ends, connections of this listener are cut. It returns the cause of ctx, ErrClosed, or l's error.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.mu.Lock()
	if s.stopping {
		s.mu.Unlock()
		_ = l.Close()
		return ErrClosed
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	for {
		nc, err := l.Accept()
		if err != nil {
			_ = l.Close()
			s.mu.Lock()
			delete(s.listeners, l)
			stopping := s.stopping
			s.mu.Unlock()
			switch {
			case ctx.Err() != nil:
				return context.Cause(ctx)
			case stopping:
				return ErrClosed
			}
			return fmt.Errorf("nbd: accept: %w", err)
		}
		sc, err := s.add(nc)
		if err != nil {
			_ = nc.Close()
			continue
		}
		go func() {
			defer s.active.Done()
			_ = sc.run(ctx)
		}()
	}
}

// ServeConn serves one connection until it ends. ctx cuts it. It returns nil after an orderly end.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) error {
	sc, err := s.add(nc)
	if err != nil {
		_ = nc.Close()
		return err
	}
	defer s.active.Done()
	return sc.run(ctx)
}

// add registers a connection.
func (s *Server) add(nc net.Conn) (*serverConn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return nil, ErrClosed
	}
	if len(s.conns) >= s.cfg.MaxConnections {
		return nil, fmt.Errorf("nbd: more than %d connections", s.cfg.MaxConnections)
	}
	sc := &serverConn{srv: s, raw: nc, nc: nc, severed: make(chan struct{})}
	s.conns[sc] = struct{}{}
	s.active.Add(1)
	return sc, nil
}

// remove forgets a connection.
func (s *Server) remove(sc *serverConn, err error) {
	s.mu.Lock()
	delete(s.conns, sc)
	name := sc.name
	s.mu.Unlock()
	if s.cfg.OnDisconnect != nil {
		s.cfg.OnDisconnect(sc.raw.RemoteAddr(), name, err)
	}
}

// Connections returns how many connections are open, in any state.
func (s *Server) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Drop cuts the connections that use an export chosen by match, without finishing their requests, as
// when a machine is destroyed: clients see the end of the stream. A nil match chooses all connections,
// also those that have not chosen an export yet. It returns how many were cut.
func (s *Server) Drop(match func(export string) bool) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for sc := range s.conns {
		if match == nil || (sc.open && match(sc.name)) {
			sc.cut()
			n++
		}
	}
	return n
}

// Shutdown stops accepting connections and requests, waits for the requests being worked on, and closes
// the connections. When ctx ends first it cuts them and returns the cause of ctx.
func (s *Server) Shutdown(ctx context.Context) error {
	s.stop(func(sc *serverConn) { _ = sc.raw.SetReadDeadline(longAgo) })
	idle := make(chan struct{})
	go func() {
		s.active.Wait()
		close(idle)
	}()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		_ = s.Close()
		return context.Cause(ctx)
	}
}

// Close cuts all connections and waits until no backend is in use. Closing again does nothing.
func (s *Server) Close() error {
	s.stop((*serverConn).cut)
	s.active.Wait()
	return nil
}

// stop closes the listeners and applies end to every connection.
func (s *Server) stop(end func(*serverConn)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopping = true
	for l := range s.listeners {
		_ = l.Close()
	}
	for sc := range s.conns {
		end(sc)
	}
}

// isStopping reports whether Shutdown or Close was called.
func (s *Server) isStopping() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopping
}
