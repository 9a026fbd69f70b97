package nbd_test

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

// gated is a disk whose reads at offset 0 wait for a signal or for the end of their context.
func gated(t testing.TB) (m *mem, started chan struct{}, release func()) {
	m = newRandomMem(t, mib)
	started = make(chan struct{}, 100)
	gate := make(chan struct{})
	m.reads = func(ctx context.Context, off int64) {
		if off != 0 {
			return
		}
		started <- struct{}{}
		select {
		case <-gate:
		case <-ctx.Done():
		}
	}
	return m, started, sync.OnceFunc(func() { close(gate) })
}

func TestShutdownFinishesRequests(t *testing.T) {
	m, started, release := gated(t)
	defer release()
	s, cfg := serveMem(t, m)
	c := dial(t, cfg)
	idle := dial(t, cfg)
	got := make(chan error, 1)
	p := make([]byte, 4096)
	go func() {
		_, err := c.ReadAt(p, 0)
		got <- err
	}()
	<-started
	stopped := make(chan error, 1)
	go func() { stopped <- s.Shutdown(context.Background()) }()
	err := within(t, func() error {
		for {
			if _, err := idle.ReadAt(make([]byte, 1), 4096); err != nil {
				return err
			}
		}
	})
	require.ErrorIs(t, err, nbd.ErrConnectionLost)
	release()
	require.NoError(t, within(t, func() error { return <-got }), "the request in progress is answered")
	requireSame(t, m.data[:4096], p, "answer")
	require.NoError(t, within(t, func() error { return <-stopped }))
	require.Zero(t, s.Connections())
	_, err = nbd.Dial(context.Background(), cfg)
	require.Error(t, err)
	require.ErrorIs(t, s.Serve(context.Background(), listen(t)), nbd.ErrClosed)
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("unix", socketDir(t)+"/s")
	require.NoError(t, err)
	return l
}

func TestShutdownGivesUp(t *testing.T) {
	m, started, release := gated(t)
	defer release()
	s, cfg := serveMem(t, m)
	c := dial(t, cfg)
	got := make(chan error, 1)
	go func() {
		_, err := c.ReadAt(make([]byte, 4096), 0)
		got <- err
	}()
	<-started
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan error, 1)
	go func() { stopped <- s.Shutdown(ctx) }()
	cancel()
	require.ErrorIs(t, within(t, func() error { return <-stopped }), context.Canceled)
	require.ErrorIs(t, within(t, func() error { return <-got }), nbd.ErrConnectionLost)
}

func TestServeEndsWithContext(t *testing.T) {
	s, err := nbd.NewServer(nbd.ServerConfig{Exports: nbd.ExportMap{"": {Backend: newMem(mib)}}})
	require.NoError(t, err)
	l := listen(t)
	ctx, cancel := context.WithCancelCause(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	c := dial(t, nbd.Config{Network: "unix", Address: l.Addr().String()})
	why := errors.New("enough")
	cancel(why)
	require.ErrorIs(t, within(t, func() error { return <-ended }), why)
	_, err = c.ReadAt(make([]byte, 1), 0)
	require.ErrorIs(t, err, nbd.ErrConnectionLost)
	require.NoError(t, s.Close())
	require.NoError(t, s.Close())
}

// TestDrop cuts the connections of one export, as when its machine is destroyed.
func TestDrop(t *testing.T) {
	m, started, release := gated(t)
	defer release()
	s, cfg := serve(t, nbd.ServerConfig{Exports: nbd.ExportMap{"a": {Backend: m}, "b": {Backend: newMem(mib)}}})
	cfg.Export = "a"
	a := dial(t, cfg)
	cfg.Export = "b"
	b := dial(t, cfg)
	got := make(chan error, 1)
	go func() {
		_, err := a.ReadAt(make([]byte, 4096), 0)
		got <- err
	}()
	<-started
	require.Equal(t, 1, s.Drop(func(name string) bool { return name == "a" }))
	require.ErrorIs(t, within(t, func() error { return <-got }), nbd.ErrConnectionLost)
	_, err := b.ReadAt(make([]byte, 1), 0)
	require.NoError(t, err)
}

func TestServerConfigIsChecked(t *testing.T) {
	exports := nbd.ExportMap{"": {Backend: newMem(1)}}
	for name, cfg := range map[string]nbd.ServerConfig{
		"no exports": {}, "TLS": {Exports: exports, RequireTLS: true},
		"request": {Exports: exports, MaxRequest: 64 * mib}, "memory": {Exports: exports, MaxMemory: -1},
	} {
		_, err := nbd.NewServer(cfg)
		require.Error(t, err, name)
	}
	for name, e := range map[string]*nbd.Export{
		"backend": {}, "block": {Backend: newMem(1), BlockSizes: nbd.BlockSizes{Minimum: 3}},
	} {
		_, cfg := serve(t, nbd.ServerConfig{Exports: nbd.ExportMap{"": e}})
		_, err := nbd.Dial(context.Background(), cfg)
		var opt *nbd.OptionError
		require.ErrorAs(t, err, &opt, name)
	}
}
