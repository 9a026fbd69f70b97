package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
)

// The help texts are part of the interface. HOLDFAST_UPDATE=1 writes them anew.
func TestHelp(t *testing.T) {
	r := newRig(t, fakes.Options{})
	p := &program{stdout: os.Stdout, stderr: os.Stderr}
	names := []string{""}
	for _, c := range p.root().Commands() {
		if c.IsAvailableCommand() || c.Name() == "guard" {
			names = append(names, c.Name())
		}
	}
	require.Greater(t, len(names), 12)
	for _, name := range names {
		args, file := []string{"--help"}, "holdfast"
		if name != "" {
			args, file = []string{name, "--help"}, name
		}
		got := r.ok(args...).stdout
		path := filepath.Join("testdata", "help", file+".txt")
		if os.Getenv("HOLDFAST_UPDATE") != "" {
			require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
			require.NoError(t, os.WriteFile(path, []byte(got), 0o644))
		}
		want, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, string(want), got, "%s: if that is meant, run the test with HOLDFAST_UPDATE=1", path)
	}
	require.NotContains(t, r.ok("--help").stdout, "guard")
	require.Equal(t, r.ok().stdout, r.ok("--help").stdout)
}

func TestFormat(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1<<20 - 1: "1.0 MiB", 5 << 30: "5.0 GiB", 1 << 62: "4.0 EiB"} {
		require.Equal(t, want, bytesText(n))
	}
	require.Equal(t, "0 %", share(1, 0))
	require.Equal(t, "2.5 %", share(1, 40))
	require.Equal(t, "100 %", share(5, 5))
	var b byteSize
	for _, s := range []string{"256K", "1M", "8M", "1048576"} {
		require.NoError(t, b.Set(s), s)
	}
	for _, s := range []string{"", "0", "128K", "16M", "3M", "-1M", "1G", "99999999999999999999M", "2097152M"} {
		require.Error(t, b.Set(s), s)
	}
}
