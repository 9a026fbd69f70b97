package nbd_test

import (
	"context"
	"crypto/tls"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

// rawFile returns the path of a new file for a program to write.
func rawFile(t testing.TB) string {
	t.Helper()
	return filepath.Join(t.TempDir(), "copy.raw")
}

// sparse returns a disk with holes between data.
func sparse(t testing.TB, size int) *mem {
	t.Helper()
	r := seeded(t)
	m := newMem(size)
	for range 20 {
		p := make([]byte, 1+r.IntN(100_000))
		fill(r, p)
		_, err := m.WriteAt(p, r.Int64N(int64(size-len(p))))
		require.NoError(t, err)
	}
	return m
}

func TestServeQEMU(t *testing.T) {
	needTools(t, "qemu-img", "qemu-io")
	m := sparse(t, 16*mib)
	_, cfg := serveMem(t, m)
	url := cfg.URL()
	out := rawFile(t)
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", url, out)
	got, err := os.ReadFile(out)
	require.NoError(t, err)
	requireSame(t, m.bytes(), got, "qemu-img convert from our server")
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", url, out)

	// The map shows exactly what the backend says is allocated.
	text := run(t, "qemu-img", "map", "--output=json", "-f", "raw", url)
	require.Contains(t, text, `"data": false`)
	require.Contains(t, text, `"zero": true`)

	run(t, "qemu-io", "-f", "raw", "-c", "write -P 7 64k 128k", "-c", "write -z 1M 1M", "-c", "discard 3M 64k",
		"-c", "write -f -P 9 4M 512", "-c", "aio_write -P 3 5M 1M", "-c", "aio_flush", "-c", "flush",
		"-c", "read -P 7 64k 128k", "-c", "read -P 0 1M 1M", "-c", "read -P 9 4M 512", "-c", "read -P 3 5M 1M", url)
	want := make([]byte, 128<<10)
	for i := range want {
		want[i] = 7
	}
	requireSame(t, want, m.bytes()[64<<10:192<<10], "written by qemu-io")
	m.mu.RLock()
	require.NotZero(t, m.flushes)
	m.mu.RUnlock()

	// Writing a whole image to our server.
	src := image(t, sparse(t, 16*mib).bytes())
	run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", src, url)
	data, err := os.ReadFile(src)
	require.NoError(t, err)
	requireSame(t, data, m.bytes(), "qemu-img convert to our server")

	out2, err := runErr("qemu-io", "-f", "raw", "-c", "read 0 512", strings.Replace(url, "///", "///nosuch", 1))
	require.Error(t, err)
	require.Contains(t, out2, "export not available")
}

func TestServeQEMUDirtyBitmap(t *testing.T) {
	needTools(t, "qemu-img")
	m := newMem(4 * mib)
	_, err := m.WriteAt(make([]byte, memBlock), mib)
	require.NoError(t, err)
	_, cfg := serveMem(t, m)
	// QEMU shows a bitmap given as x-dirty-bitmap as data: false where it is dirty.
	opts := "driver=nbd,server.type=unix,server.path=" + cfg.Address + ",x-dirty-bitmap=" + memDirty
	text := run(t, "qemu-img", "map", "--output=json", "--image-opts", opts)
	require.Contains(t, text, `"start": 1048576, "length": 4096, "depth": 0, "present": false, "zero": false, "data": false`)
}

func TestServeLibnbd(t *testing.T) {
	needTools(t, "nbdinfo", "nbdcopy")
	m := sparse(t, 8*mib+512)
	_, cfg := serve(t, nbd.ServerConfig{Exports: nbd.ExportMap{
		"disk": {Backend: m, MultiConn: true, Description: "a disk"},
	}})
	cfg.Export = "disk"
	text := run(t, "nbdinfo", cfg.URL())
	for _, want := range []string{
		"protocol: newstyle-fixed without TLS, using structured packets", "export-size: 8389120",
		"description: a disk", "base:allocation", memDirty, "can_multi_conn: true", "can_fast_zero: true",
		"can_df: true", "is_read_only: false", "block_size_minimum: 1", "block_size_maximum: 33554432",
	} {
		require.Contains(t, text, want)
	}
	list := cfg
	list.Export = ""
	require.Contains(t, run(t, "nbdinfo", "--list", list.URL()), `export="disk"`)
	require.Contains(t, run(t, "nbdinfo", "--map", cfg.URL()), "hole,zero")
	require.Contains(t, run(t, "nbdinfo", "--map="+memDirty, cfg.URL()), "dirty")
	out := rawFile(t)
	run(t, "nbdcopy", cfg.URL(), out)
	got, err := os.ReadFile(out)
	require.NoError(t, err)
	requireSame(t, m.bytes(), got, "nbdcopy from our server")

	src := image(t, sparse(t, 8*mib+512).bytes())
	run(t, "nbdcopy", "--flush", src, cfg.URL())
	data, err := os.ReadFile(src)
	require.NoError(t, err)
	requireSame(t, data, m.bytes(), "nbdcopy to our server")
}

func TestServeNBDKitProxy(t *testing.T) {
	m := sparse(t, 8*mib)
	_, cfg := serveMem(t, m)
	// Their client and server between our server and client.
	c := dial(t, nbdkit(t, "nbd", "socket="+cfg.Address))
	got := make([]byte, 8*mib)
	_, err := c.ReadAt(got, 0)
	require.NoError(t, err)
	requireSame(t, m.bytes(), got, "through nbdkit")
	_, err = c.WriteAt([]byte("hello"), 4097)
	require.NoError(t, err)
	require.Equal(t, "hello", string(m.bytes()[4097:4102]))
}

func TestServeOldClients(t *testing.T) {
	needTools(t, "nbdcopy")
	m := sparse(t, 4*mib)
	_, cfg := serve(t, nbd.ServerConfig{
		Exports:             nbd.ExportMap{"": {Backend: m}},
		NoStructuredReplies: true,
	})
	out := rawFile(t)
	run(t, "nbdcopy", cfg.URL(), out)
	got, err := os.ReadFile(out)
	require.NoError(t, err)
	requireSame(t, m.bytes(), got, "plain replies")
}

func TestTLSWithTools(t *testing.T) {
	needTools(t, "nbdinfo", "nbdcopy", "qemu-img")
	p := newPKI(t)
	m := sparse(t, 4*mib)
	_, cfg := serve(t, nbd.ServerConfig{
		Exports: nbd.ExportMap{"": {Backend: m, MultiConn: true}},
		TLS:     p.serverTLS(), RequireTLS: true,
	})
	plain := cfg.URL()
	cfg.TLS, cfg.RequireTLS = p.clientTLS(), true
	url := cfg.URL() + "&tls-certificates=" + p.dir
	require.Contains(t, run(t, "nbdinfo", url), "with TLS")
	out := rawFile(t)
	run(t, "nbdcopy", url, out)
	got, err := os.ReadFile(out)
	require.NoError(t, err)
	requireSame(t, m.bytes(), got, "nbdcopy over TLS")
	_, err = runErr("nbdinfo", plain)
	require.Error(t, err, "a client without TLS is refused")
	run(t, "qemu-img", "convert", "-O", "raw",
		"--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+p.dir, "--image-opts",
		"driver=nbd,server.type=unix,server.path="+cfg.Address+",tls-creds=tls0,tls-hostname=localhost", out)
	got, err = os.ReadFile(out)
	require.NoError(t, err)
	requireSame(t, m.bytes(), got, "qemu-img over TLS")
}

func TestTLSAgainstTools(t *testing.T) {
	needTools(t, "qemu-nbd", "nbdkit")
	p := newPKI(t)
	want := make([]byte, 2*mib)
	fill(seeded(t), want)
	path := image(t, want)
	servers := map[string]nbd.Config{
		"qemu-nbd": qemuNBD(t, path, "raw", "--read-only", "--tls-creds=tls0",
			"--object=tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir="+p.dir),
		"nbdkit": nbdkit(t, "--tls=require", "--tls-certificates="+p.dir, "--tls-verify-peer", "file", path),
	}
	ctx := context.Background()
	for name, cfg := range servers {
		t.Run(name, func(t *testing.T) {
			plain := cfg
			_, err := nbd.Dial(ctx, plain)
			require.ErrorIs(t, err, nbd.ErrTLSRequired)

			cfg.TLS, cfg.RequireTLS = p.clientTLS(), true
			cfg.RequiredContexts = []string{nbd.ContextBaseAllocation}
			c := dial(t, cfg)
			require.True(t, c.Secure())
			got := make([]byte, len(want))
			_, err = c.ReadAt(got, 0)
			require.NoError(t, err)
			requireSame(t, want, got, "over TLS")

			old := cfg
			old.TLS = p.clientTLS()
			old.TLS.MaxVersion = tls.VersionTLS12
			c = dial(t, old)
			clear(got)
			_, err = c.ReadAt(got, 0)
			require.NoError(t, err)
			requireSame(t, want, got, "over TLS 1.2")

			anonymous := cfg
			anonymous.TLS = p.clientTLS()
			anonymous.TLS.Certificates = nil
			_, err = nbd.Dial(ctx, anonymous)
			require.Error(t, err, "no client certificate")

			stranger := cfg
			stranger.TLS = newPKI(t).clientTLS()
			_, err = nbd.Dial(ctx, stranger)
			require.Error(t, err, "unknown authority")
		})
	}
	cfg := nbdkit(t, "file", path)
	cfg.TLS, cfg.RequireTLS = p.clientTLS(), true
	_, err := nbd.Dial(ctx, cfg)
	require.ErrorIs(t, err, nbd.ErrTLSRefused)
	cfg.RequireTLS = false
	c := dial(t, cfg)
	require.False(t, c.Secure(), "TLS that is only wished for may be refused")
}

// TestURLForTools checks that other programs read our URLs as we mean them.
func TestURLForTools(t *testing.T) {
	needTools(t, "nbdinfo")
	_, cfg := serve(t, nbd.ServerConfig{Exports: nbd.ExportMap{
		"/odd name?&%": {Backend: newMem(mib)},
	}})
	cfg.Export = "/odd name?&%"
	require.Contains(t, run(t, "nbdinfo", cfg.URL()), "export-size: 1048576")
}
