package nbd_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

// needTools skips the test when a program is missing, unless HOLDFAST_REQUIRE demands the class "tools".
func needTools(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			for class := range strings.SplitSeq(os.Getenv("HOLDFAST_REQUIRE"), ",") {
				if class == "tools" {
					t.Fatalf("%s is missing and HOLDFAST_REQUIRE names tools", name)
				}
			}
			t.Skipf("%s is not installed", name)
		}
	}
}

// seeded returns a random source and prints its seed; HOLDFAST_SEED replays one.
func seeded(t testing.TB) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		var err error
		seed, err = strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// fill writes random bytes.
func fill(r *rand.Rand, p []byte) {
	for i := range p {
		p[i] = byte(r.Uint32())
	}
}

// requireSame compares without printing whole buffers.
func requireSame(t testing.TB, want, got []byte, what string) {
	t.Helper()
	if bytes.Equal(want, got) {
		return
	}
	if len(want) != len(got) {
		t.Fatalf("%s: want %d bytes, got %d", what, len(want), len(got))
	}
	for i := range want {
		if want[i] != got[i] {
			t.Fatalf("%s: first difference at %d: want %#x, got %#x", what, i, want[i], got[i])
		}
	}
}

// socketDir returns a directory whose name is short enough for a unix socket.
func socketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// run runs a program to its end and returns what it printed.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := runErr(name, args...)
	require.NoError(t, err, "%s %s: %s", name, strings.Join(args, " "), out)
	return out
}

func runErr(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	return string(out), err
}

// startServer runs a server program in the foreground until the test ends and waits for its socket.
func startServer(t testing.TB, socket, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(t, cmd.Start())
	gone := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(gone)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-gone
	})
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 2000 {
		if c, err := net.Dial("unix", socket); err == nil {
			_ = c.Close()
			return
		}
		select {
		case <-gone:
			t.Fatalf("%s %s ended: %s", name, strings.Join(args, " "), out.String())
		case <-tick.C:
		}
	}
	t.Fatalf("%s did not open %s", name, socket)
}

// qemuNBD serves an image.
func qemuNBD(t testing.TB, image, format string, args ...string) nbd.Config {
	t.Helper()
	needTools(t, "qemu-nbd")
	socket := filepath.Join(socketDir(t), "s")
	all := append([]string{"--persistent", "--shared=0", "--socket=" + socket, "--format=" + format}, args...)
	startServer(t, socket, "qemu-nbd", append(all, image)...)
	return nbd.Config{Network: "unix", Address: socket}
}

// nbdkit serves a plugin.
func nbdkit(t testing.TB, args ...string) nbd.Config {
	t.Helper()
	needTools(t, "nbdkit")
	socket := filepath.Join(socketDir(t), "s")
	startServer(t, socket, "nbdkit", append([]string{"--foreground", "--unix", socket}, args...)...)
	return nbd.Config{Network: "unix", Address: socket}
}

// dial opens a client that is closed with the test.
func dial(t testing.TB, cfg nbd.Config) *nbd.Client {
	t.Helper()
	c, err := nbd.Dial(context.Background(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return c
}
