package nbd_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

// TestPairRandom lets our client and server talk in every way they can, against a model.
func TestPairRandom(t *testing.T) {
	p := newPKI(t)
	base := func(m *mem) nbd.ServerConfig {
		return nbd.ServerConfig{Exports: nbd.ExportMap{"": {Backend: m, MultiConn: true}}}
	}
	variants := map[string]struct {
		server func(m *mem) nbd.ServerConfig
		client func(c *nbd.Config)
	}{
		"structured": {base, func(*nbd.Config) {}},
		"plain": {func(m *mem) nbd.ServerConfig {
			s := base(m)
			s.NoStructuredReplies = true
			return s
		}, func(*nbd.Config) {}},
		"several connections, small requests": {base, func(c *nbd.Config) {
			c.Connections, c.Inflight, c.RequestSize = 4, 3, 5000
		}},
		"block 512": {func(m *mem) nbd.ServerConfig {
			sizes := nbd.BlockSizes{Minimum: 512, Preferred: 4096, Maximum: 64 << 10}
			return nbd.ServerConfig{Exports: nbd.ExportMap{"": {Backend: m, MultiConn: true, BlockSizes: sizes}}}
		}, func(*nbd.Config) {}},
		"TLS 1.2": {func(m *mem) nbd.ServerConfig {
			s := base(m)
			s.TLS, s.RequireTLS = p.serverTLS(), true
			return s
		}, func(c *nbd.Config) {
			c.TLS, c.RequireTLS = p.clientTLS(), true
			c.TLS.MaxVersion = tls.VersionTLS12
		}},
		"TLS 1.3": {func(m *mem) nbd.ServerConfig {
			s := base(m)
			s.TLS, s.RequireTLS = p.serverTLS(), true
			return s
		}, func(c *nbd.Config) { c.TLS, c.RequireTLS = p.clientTLS(), true }},
		"few resources": {func(m *mem) nbd.ServerConfig {
			s := base(m)
			s.MaxInflight, s.MaxRequest, s.MaxMemory = 2, 8192, 1
			return s
		}, func(*nbd.Config) {}},
	}
	for name, v := range variants {
		t.Run(name, func(t *testing.T) {
			r := seeded(t)
			m := newMem(2*mib + 1536)
			_, cfg := serve(t, v.server(m))
			cfg.MetaContexts = []string{nbd.ContextBaseAllocation, memDirty}
			v.client(&cfg)
			c := dial(t, cfg)
			exercise(t, r, c, m)
			if c.StructuredReplies() {
				checkStatus(t, r, c, m)
			}
			require.NoError(t, c.Close())
			require.NoError(t, c.Close())
			_, err := c.ReadAt(make([]byte, 1), 0)
			require.ErrorIs(t, err, nbd.ErrClosed)
		})
	}
}

// exercise does random operations in parallel, each worker in its own region, and compares.
func exercise(t *testing.T, r *rand.Rand, c *nbd.Client, m *mem) {
	t.Helper()
	const workers = 4
	block := c.BlockSizes().Minimum
	region := (c.Size() / workers) / memBlock * memBlock
	model := make([]byte, c.Size())
	var wg sync.WaitGroup
	errs := make([]error, workers)
	for w := range workers {
		own := rand.New(rand.NewPCG(r.Uint64(), uint64(w)))
		wg.Go(func() {
			from := int64(w) * region
			errs[w] = work(own, c, model[from:from+region], from, block)
		})
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	requireSame(t, model, m.bytes(), "server's data")
	got := make([]byte, len(model))
	n, err := c.ReadAt(got, 0)
	require.NoError(t, err)
	require.Equal(t, len(model), n)
	requireSame(t, model, got, "whole disk")
}

// work changes and reads the region that begins at from; model is what it should hold.
func work(r *rand.Rand, c *nbd.Client, model []byte, from, block int64) error {
	ctx := context.Background()
	for range 60 {
		off := r.Int64N(int64(len(model)))
		n := min(r.Int64N(200_000), int64(len(model))-off)
		op := r.IntN(6)
		if op != 0 {
			off -= off % block
			n -= n % block
		}
		part := model[off : off+n]
		var err error
		switch op {
		case 0, 1:
			p := make([]byte, n)
			var got int
			if got, err = c.ReadAt(p, from+off); err == nil && (got != len(p) || string(p) != string(part)) {
				err = errors.New("read differs from the model")
			}
		case 2:
			fill(r, part)
			_, err = c.WriteAtContext(ctx, part, from+off, nbd.CommandFUA)
		case 3:
			fill(r, part)
			_, err = c.WriteAt(part, from+off)
		case 4:
			clear(part)
			err = c.WriteZeroes(ctx, from+off, n, nbd.CommandFlags(r.IntN(2))*nbd.CommandNoHole)
		case 5:
			clear(part)
			if err = c.Trim(ctx, from+off, n, 0); err == nil {
				err = c.Flush(ctx)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// checkStatus walks random ranges and compares every block with the backend.
func checkStatus(t *testing.T, r *rand.Rand, c *nbd.Client, m *mem) {
	t.Helper()
	names := []string{memDirty, nbd.ContextBaseAllocation}
	for i := range 20 {
		off := r.Int64N(c.Size())
		n := r.Int64N(c.Size() - off)
		if i == 0 {
			off, n = 0, c.Size()
		}
		pos := off
		for e, err := range c.BlockStatusMulti(context.Background(), names, off, n) {
			require.NoError(t, err)
			require.Equal(t, pos, e.Offset)
			for at := e.Offset; at < e.Offset+e.Length; at = at/memBlock*memBlock + memBlock {
				require.Equal(t, m.flags(memDirty, at), e.Flags[0], "dirty at %d", at)
				require.Equal(t, m.flags(nbd.ContextBaseAllocation, at), e.Flags[1], "allocation at %d", at)
			}
			pos += e.Length
		}
		require.Equal(t, off+n, pos)
		pos = off
		last := ^uint32(0)
		for e, err := range c.BlockStatus(context.Background(), memDirty, off, n) {
			require.NoError(t, err)
			require.Equal(t, pos, e.Offset)
			require.NotEqual(t, last, e.Flags, "neighbours are merged")
			pos, last = pos+e.Length, e.Flags
		}
		require.Equal(t, off+n, pos)
		seen := 0
		for range c.BlockStatus(context.Background(), memDirty, off, n) {
			seen++
			break
		}
		require.LessOrEqual(t, seen, 1)
	}
}

func TestReaderAtContract(t *testing.T) {
	m := newRandomMem(t, 10_000)
	_, cfg := serveMem(t, m)
	c := dial(t, cfg)
	p := make([]byte, 100)
	n, err := c.ReadAt(p, 9_950)
	require.ErrorIs(t, err, io.EOF)
	require.Equal(t, 50, n)
	requireSame(t, m.bytes()[9_950:], p[:n], "end of the export")
	n, err = c.ReadAt(p, 10_000)
	require.ErrorIs(t, err, io.EOF)
	require.Zero(t, n)
	_, err = c.ReadAt(p, -1)
	require.ErrorIs(t, err, nbd.ErrOutOfRange)
	n, err = c.ReadAt(nil, 10)
	require.NoError(t, err)
	require.Zero(t, n)
	_, err = c.WriteAt(p, 9_950)
	require.ErrorIs(t, err, nbd.ErrOutOfRange)
	require.ErrorIs(t, c.Trim(context.Background(), 1<<62, 1<<62, 0), nbd.ErrOutOfRange)
	all, err := io.ReadAll(io.NewSectionReader(c, 0, c.Size()))
	require.NoError(t, err)
	requireSame(t, m.bytes(), all, "through a section reader")
}

func TestHolesAreReported(t *testing.T) {
	m := newMem(4 * mib)
	_, err := m.WriteAt(make([]byte, memBlock), 2*mib)
	require.NoError(t, err)
	_, cfg := serveMem(t, m)
	c := dial(t, cfg)
	p := make([]byte, mib)
	fill(seeded(t), p)
	_, info, err := c.ReadAtInfo(context.Background(), p, mib)
	require.NoError(t, err)
	require.Equal(t, nbd.ReadInfo{Hole: true, HoleBytes: mib}, info)
	requireSame(t, make([]byte, mib), p, "hole")
	_, info, err = c.ReadAtInfo(context.Background(), p, 2*mib)
	require.NoError(t, err)
	require.Equal(t, nbd.ReadInfo{HoleBytes: mib - memBlock}, info) // zeroes that are data are not a hole
}

func TestReadOnlyAndBareBackends(t *testing.T) {
	m := newRandomMem(t, 64<<10)
	_, cfg := serve(t, nbd.ServerConfig{Exports: nbd.ExportMap{
		"ro":    {Backend: readOnlyBackend{m}, Description: "read me"},
		"asked": {Backend: m, ReadOnly: true},
		"bare":  {Backend: writeOnlyBackend{readOnlyBackend{m}, m}},
	}})
	ctx := context.Background()
	for _, name := range []string{"ro", "asked"} {
		cfg.Export = name
		c := dial(t, cfg)
		require.True(t, c.Flags().Has(nbd.FlagReadOnly|nbd.FlagCanMultiConn))
		_, err := c.WriteAt([]byte{1}, 0)
		require.ErrorIs(t, err, nbd.ErrReadOnly)
	}
	cfg.Export = "bare"
	cfg.Connections = 4
	c := dial(t, cfg)
	require.Equal(t, 1, c.Connections(), "no MULTI_CONN, no second connection")
	require.ErrorIs(t, c.Flush(ctx), errors.ErrUnsupported)
	require.ErrorIs(t, c.Trim(ctx, 0, 512, 0), errors.ErrUnsupported)
	_, err := c.WriteAtContext(ctx, []byte{1}, 0, nbd.CommandFUA)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorIs(t, c.WriteZeroes(ctx, 0, 512, nbd.CommandFastZero), errors.ErrUnsupported)
	require.NoError(t, c.WriteZeroes(ctx, 512, 20_000, 0)) // the server writes them
	requireSame(t, make([]byte, 20_000), m.bytes()[512:20_512], "zeroes")
	_, err = c.WriteAt([]byte{7, 8}, 100)
	require.NoError(t, err)
	require.Equal(t, []byte{7, 8}, m.bytes()[100:102])

	list, err := nbd.List(ctx, cfg)
	require.NoError(t, err)
	require.Equal(t, []nbd.ExportInfo{{Name: "asked"}, {Name: "bare"}, {Name: "ro"}}, list)
	cfg.Export = "ro"
	info, err := nbd.Describe(ctx, cfg)
	require.NoError(t, err)
	require.Equal(t, "read me", info.Description)
	require.Empty(t, info.Contexts)
	cfg.Export = "asked"
	info, err = nbd.Describe(ctx, cfg)
	require.NoError(t, err)
	require.Equal(t, m.MetaContexts(), info.Contexts)
	cfg.Export = "none"
	_, err = nbd.Describe(ctx, cfg)
	require.ErrorIs(t, err, nbd.ErrUnknownExport)
}

func TestErrorsReachTheCaller(t *testing.T) {
	for _, plain := range []bool{false, true} {
		m := newRandomMem(t, 8*mib)
		var fails error
		m.fail = func(op string, off, n int64) error {
			if op != "extents" && off <= 3*mib && 3*mib < off+n {
				return fails
			}
			return nil
		}
		_, cfg := serve(t, nbd.ServerConfig{
			Exports:             nbd.ExportMap{"": {Backend: m}},
			NoStructuredReplies: plain,
		})
		cfg.RequestSize = 4 * mib // served in pieces: the second part of a reply fails
		c := dial(t, cfg)
		for _, row := range []struct{ give, want error }{
			{nbd.ENOSPC, nbd.ENOSPC},
			{errors.New("secret path"), nbd.EIO},
			{errors.Join(errors.New("x"), nbd.EPERM), nbd.EPERM},
			{net.ErrClosed, nbd.EIO},
			{fmt.Errorf("write: %w", syscall.ENOSPC), nbd.ENOSPC},
			{&fs.PathError{Op: "open", Path: "secret", Err: fs.ErrPermission}, nbd.EPERM},
			{fs.ErrInvalid, nbd.EINVAL},
			{context.Canceled, nbd.ESHUTDOWN},
		} {
			fails = row.give
			p := make([]byte, 4*mib)
			_, err := c.ReadAt(p, mib)
			require.ErrorIs(t, err, row.want)
			require.NotContains(t, err.Error(), "secret")
			if errors.Is(row.want, nbd.ESHUTDOWN) { // which ends the connection
				break
			}
			_, err = c.WriteAt(p, mib)
			require.ErrorIs(t, err, row.want)
			_, err = c.ReadAt(p, 4*mib)
			require.NoError(t, err, "the connection stays in order")
		}
		if !plain {
			c = dial(t, cfg)
			fails = nbd.EIO
			_, err := c.ReadAt(make([]byte, 4*mib), mib)
			var req *nbd.RequestError
			require.ErrorAs(t, err, &req)
			require.Equal(t, int64(3*mib), req.At)
		}
	}
}

// TestTCP also lets the server's name for TLS be derived from the address, and goes through a URL.
func TestTCP(t *testing.T) {
	p := newPKI(t)
	m := newRandomMem(t, mib)
	s, err := nbd.NewServer(nbd.ServerConfig{
		Exports: nbd.ExportMap{"vda": {Backend: m}},
		TLS:     p.serverTLS(),
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	go func() { _ = s.Serve(context.Background(), l) }()
	for _, secure := range []bool{false, true} {
		cfg, err := nbd.ParseURL("nbd://" + l.Addr().String() + "/vda")
		require.NoError(t, err)
		if secure {
			cfg.TLS, cfg.RequireTLS = p.clientTLS(), true
			cfg.TLS.ServerName = ""
		}
		c := dial(t, cfg)
		require.Equal(t, secure, c.Secure())
		got := make([]byte, mib)
		_, err = c.ReadAt(got, 0)
		require.NoError(t, err)
		requireSame(t, m.bytes(), got, "over TCP")
		_, err = c.WriteAt([]byte("tcp"), 77)
		require.NoError(t, err)
		require.Equal(t, "tcp", string(m.bytes()[77:80]))
	}
}

func TestNetPipe(t *testing.T) {
	m := newRandomMem(t, mib)
	s, err := nbd.NewServer(nbd.ServerConfig{Exports: nbd.ExportMap{"": {Backend: m, MultiConn: true}}})
	require.NoError(t, err)
	ended := make(chan error, 3)
	c := dial(t, nbd.Config{
		Network: "pipe", Address: "x", Connections: 3,
		Dialer: func(context.Context, string, string) (net.Conn, error) {
			a, b := net.Pipe()
			go func() { ended <- s.ServeConn(context.Background(), b) }()
			return a, nil
		},
	})
	require.Equal(t, 3, c.Connections())
	p := make([]byte, mib)
	_, err = c.ReadAt(p, 0)
	require.NoError(t, err)
	requireSame(t, m.bytes(), p, "through pipes")
	require.NoError(t, c.Close())
	for range 3 {
		require.NoError(t, <-ended, "an orderly end")
	}
	require.NoError(t, s.Close())
}
