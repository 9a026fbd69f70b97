package qcow2

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// sameAsQemu compares what we read with what qemu-img converts, byte by byte and by allocation.
func sameAsQemu(t *testing.T, path, what string) {
	t.Helper()
	m, err := open(t, path)
	require.NoError(t, err, what)
	rawPath := path + ".raw"
	run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, rawPath)
	want, err := os.ReadFile(rawPath)
	require.NoError(t, err)
	got, err := io.ReadAll(io.NewSectionReader(m, 0, m.Size()))
	require.NoError(t, err, what)
	require.Equal(t, -1, firstDifference(want[:m.Size()], got), what)

	type mapped struct {
		Start, Length       int64
		Present, Zero, Data bool
	}
	var all []mapped
	require.NoError(t, json.Unmarshal([]byte(run(t, "qemu-img", "map", "-f", "qcow2", "--output", "json", path)), &all))
	var wantExt, gotExt []Extent
	for _, e := range all {
		if !e.Present {
			continue
		}
		next := Extent{Offset: e.Start, Length: e.Length, Zero: !e.Data}
		if n := len(wantExt); n > 0 && wantExt[n-1].Zero == next.Zero && wantExt[n-1].Offset+wantExt[n-1].Length == next.Offset {
			wantExt[n-1].Length += next.Length
			continue
		}
		wantExt = append(wantExt, next)
	}
	for e, err := range m.Extents() {
		require.NoError(t, err, what)
		gotExt = append(gotExt, e)
	}
	require.Equal(t, wantExt, gotExt, what)
}

func TestReaderAgainstQemu(t *testing.T) {
	needTool(t, "qemu-img", "qemu-io")
	s := seed(t)
	round := uint64(0)
	for _, compat := range []string{"0.10", "1.1"} {
		for _, cluster := range []int{512, 4096, 65536, 2 << 20} {
			for _, prealloc := range []string{"off", "metadata"} {
				round++
				r := rand.New(rand.NewPCG(s, round))
				dir := t.TempDir()
				path := filepath.Join(dir, "a.qcow2")
				size := (1 + r.Int64N(16<<11)) * 512
				what := fmt.Sprintf("round %d: compat %s, cluster %d, preallocation %s, size %d", round, compat, cluster, prealloc, size)
				run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o",
					fmt.Sprintf("compat=%s,cluster_size=%d,preallocation=%s", compat, cluster, prealloc), path, fmt.Sprint(size))
				args := []string{"-f", "qcow2", "-d", "unmap"}
				for range 40 {
					off := r.Int64N(size/512) * 512
					n := min(size-off, (1+r.Int64N(400))*512)
					cmd := [...]string{"write -P %d %d %d", "write -P %d %d %d", "write -z %[2]d %[3]d", "discard %[2]d %[3]d"}[r.IntN(4)]
					if cmd[0] == 'd' || cmd[6] == '-' && cmd[7] == 'z' {
						args = append(args, "-c", fmt.Sprintf(cmd, 0, off, n))
						continue
					}
					args = append(args, "-c", fmt.Sprintf(cmd, 1+r.IntN(255), off, n))
				}
				run(t, "qemu-io", append(args, path)...)
				sameAsQemu(t, path, what)

				packed := filepath.Join(dir, "c.qcow2")
				run(t, "qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o",
					fmt.Sprintf("compat=%s,cluster_size=%d", compat, cluster), path, packed)
				sameAsQemu(t, packed, "compressed "+what)
			}
		}
	}
}

func TestQemuImagesRefused(t *testing.T) {
	needTool(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", at("base"), "1M")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", at("base"), "-F", "qcow2", at("overlay"), "1M")
	_, err := open(t, at("overlay"))
	require.ErrorIs(t, err, ErrBackingFile)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+at("outside"), at("external"), "1M")
	_, err = open(t, at("external"))
	require.ErrorIs(t, err, ErrDataFile)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=64k", at("sub"), "1M")
	_, err = open(t, at("sub"))
	require.ErrorIs(t, err, errors.ErrUnsupported)
	run(t, "qemu-img", "create", "-q", "--object", "secret,id=s,data=x", "-f", "qcow2", "-o",
		"encrypt.format=aes,encrypt.key-secret=s", at("aes"), "1M")
	_, err = open(t, at("aes"))
	require.ErrorIs(t, err, ErrEncrypted)

	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 7 0 256k", at("base"))
	run(t, "qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", "compression_type=zstd", at("base"), at("zstd"))
	m, err := open(t, at("zstd"))
	require.NoError(t, err)
	n, err := m.ReadAt(make([]byte, 512), 512<<10)
	require.NoError(t, err, "what is not compressed can be read")
	require.Equal(t, 512, n)
	_, err = m.ReadAt(make([]byte, 512), 0)
	require.ErrorIs(t, err, errors.ErrUnsupported)
}

func TestBitmapsAgainstQemu(t *testing.T) {
	needTool(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "a.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "10M")
	m, err := open(t, path)
	require.NoError(t, err)
	got, err := m.Bitmaps()
	require.NoError(t, err)
	require.Empty(t, got)
	run(t, "qemu-img", "bitmap", "--add", "-g", "64k", "-f", "qcow2", path, "holdfast-1")
	run(t, "qemu-img", "bitmap", "--add", "--disable", "-g", "1M", "-f", "qcow2", path, "täglich 2")
	m, err = open(t, path)
	require.NoError(t, err)
	got, err = m.Bitmaps()
	require.NoError(t, err)
	require.ElementsMatch(t, []Bitmap{
		{Name: "holdfast-1", Granularity: 64 << 10, Enabled: true},
		{Name: "täglich 2", Granularity: 1 << 20},
	}, got)
}
