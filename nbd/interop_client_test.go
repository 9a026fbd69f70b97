package nbd_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

const mib = 1 << 20

// image writes content to a raw file.
func image(t testing.TB, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	require.NoError(t, os.WriteFile(path, content, 0o600))
	return path
}

func TestQEMUReadWrite(t *testing.T) {
	r := seeded(t)
	want := make([]byte, 8*mib)
	fill(r, want)
	path := image(t, want)
	cfg := qemuNBD(t, path, "raw")
	cfg.Connections = 3
	cfg.RequestSize = 256 << 10
	c := dial(t, cfg)
	require.EqualValues(t, len(want), c.Size())
	require.True(t, c.StructuredReplies())
	require.True(t, c.BlockSizes().Advertised)
	require.Equal(t, 3, c.Connections())
	require.EqualValues(t, maxQEMU, c.BlockSizes().Maximum)

	got := make([]byte, len(want))
	n, err := c.ReadAt(got, 0)
	require.NoError(t, err)
	require.Equal(t, len(want), n)
	requireSame(t, want, got, "whole disk")

	for range 200 {
		off, n := r.Int64N(c.Size()), r.IntN(mib)
		p := make([]byte, min(int64(n), c.Size()-off))
		if r.IntN(3) == 0 {
			fill(r, p)
			copy(want[off:], p)
			_, err := c.WriteAt(p, off)
			require.NoError(t, err)
			continue
		}
		_, err := c.ReadAt(p, off)
		require.NoError(t, err)
		requireSame(t, want[off:off+int64(len(p))], p, "piece")
	}
	clear(want[3*mib+5 : 5*mib])
	require.NoError(t, c.WriteZeroes(context.Background(), 3*mib+5, 2*mib-5, nbd.CommandNoHole))
	require.NoError(t, c.Trim(context.Background(), 7*mib, 4096, 0))
	require.NoError(t, c.WriteZeroes(context.Background(), 7*mib, 4096, nbd.CommandFUA))
	clear(want[7*mib : 7*mib+4096])
	require.NoError(t, c.Flush(context.Background()))
	require.NoError(t, c.Close())
	disk, err := os.ReadFile(path)
	require.NoError(t, err)
	requireSame(t, want, disk, "file behind qemu-nbd")
}

const maxQEMU = 32 * mib

func TestQEMUParallelReaders(t *testing.T) {
	r := seeded(t)
	want := make([]byte, 4*mib)
	fill(r, want)
	c := dial(t, qemuNBD(t, image(t, want), "raw", "--read-only"))
	_, err := c.WriteAt([]byte{1}, 0)
	require.ErrorIs(t, err, nbd.ErrReadOnly)
	var wg sync.WaitGroup
	errs := make([]error, 8)
	got := make([]byte, len(want))
	for i := range errs {
		wg.Go(func() {
			part := len(want) / len(errs)
			for off := i * part; off < (i+1)*part; off += 4096 {
				if _, err := c.ReadAt(got[off:off+4096], int64(off)); err != nil {
					errs[i] = err
				}
			}
		})
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	requireSame(t, want, got, "parallel")
}

func TestQEMUBlockStatus(t *testing.T) {
	needTools(t, "qemu-img", "qemu-io", "qemu-nbd")
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	const size = int64(9) << 30 // two steps of the walk and more
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "9G")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 5G 1M", path)
	run(t, "qemu-img", "bitmap", "--add", path, "b0")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 64k", "-c", "write -P 3 5242944k 64k",
		"-c", "write -z 8G 128k", path)
	cfg := qemuNBD(t, path, "qcow2", "--bitmap=b0", "--allocation-depth")
	const dirty = "qemu:dirty-bitmap:b0"
	cfg.RequiredContexts = []string{dirty}
	cfg.MetaContexts = []string{nbd.ContextBaseAllocation, "qemu:dirty-bitmap:nosuch"}
	c := dial(t, cfg)
	require.ElementsMatch(t, []string{dirty, nbd.ContextBaseAllocation}, c.Contexts())

	var got []nbd.Extent
	for e, err := range c.BlockStatus(context.Background(), dirty, 0, size) {
		require.NoError(t, err)
		got = append(got, e)
	}
	// The bitmap is persistent, so it is taken at the size of a cluster.
	require.Equal(t, []nbd.Extent{
		{Offset: 0, Length: 1 * mib, Flags: 0},
		{Offset: 1 * mib, Length: 64 << 10, Flags: nbd.StateDirty},
		{Offset: 1*mib + 64<<10, Length: 5<<30 - mib, Flags: 0},
		{Offset: 5<<30 + 64<<10, Length: 64 << 10, Flags: nbd.StateDirty},
		{Offset: 5<<30 + 128<<10, Length: 3<<30 - 128<<10, Flags: 0},
		{Offset: 8 << 30, Length: 128 << 10, Flags: nbd.StateDirty},
		{Offset: 8<<30 + 128<<10, Length: 1<<30 - 128<<10, Flags: 0},
	}, got)

	var multi []nbd.MultiExtent
	pos := int64(0)
	names := []string{dirty, nbd.ContextBaseAllocation}
	for e, err := range c.BlockStatusMulti(context.Background(), names, 0, size) {
		require.NoError(t, err)
		require.Equal(t, pos, e.Offset)
		pos += e.Length
		multi = append(multi, e)
	}
	require.Equal(t, size, pos)
	hole := nbd.StateHole | nbd.StateZero
	require.Contains(t, multi, nbd.MultiExtent{Offset: mib, Length: 64 << 10, Flags: []uint32{nbd.StateDirty, 0}})
	require.Equal(t, hole, multi[0].Flags[1])
	require.Equal(t, nbd.StateDirty, multi[len(multi)-2].Flags[0])
	require.NotZero(t, multi[len(multi)-2].Flags[1]&nbd.StateZero)

	// A part that begins and ends inside extents is clamped to exactly what was asked.
	got = got[:0]
	for e, err := range c.BlockStatus(context.Background(), dirty, mib+100, 200) {
		require.NoError(t, err)
		got = append(got, e)
	}
	require.Equal(t, []nbd.Extent{{Offset: mib + 100, Length: 200, Flags: nbd.StateDirty}}, got)

	p := make([]byte, mib)
	n, info, err := c.ReadAtInfo(context.Background(), p, 2<<30)
	require.NoError(t, err)
	require.Equal(t, mib, n)
	require.True(t, info.Hole)
	_, info, err = c.ReadAtInfo(context.Background(), p, 5<<30)
	require.NoError(t, err)
	require.False(t, info.Hole)

	for _, err := range c.BlockStatus(context.Background(), "qemu:dirty-bitmap:nosuch", 0, size) {
		require.ErrorIs(t, err, nbd.ErrContextNotGranted)
	}
}

func TestQEMUUnknownExportAndContext(t *testing.T) {
	cfg := qemuNBD(t, image(t, make([]byte, mib)), "raw", "--export-name=vda", "--description=first disk")
	_, err := nbd.Dial(context.Background(), cfg)
	require.ErrorIs(t, err, nbd.ErrUnknownExport)
	list, err := nbd.List(context.Background(), cfg)
	require.NoError(t, err)
	require.Equal(t, []nbd.ExportInfo{{Name: "vda", Description: "first disk"}}, list)

	cfg.Export = "vda"
	info, err := nbd.Describe(context.Background(), cfg)
	require.NoError(t, err)
	require.Equal(t, "first disk", info.Description)
	require.EqualValues(t, mib, info.Size)
	require.Contains(t, info.Contexts, nbd.ContextBaseAllocation)

	cfg.RequiredContexts = []string{"qemu:dirty-bitmap:gone"}
	_, err = nbd.Dial(context.Background(), cfg)
	var missing *nbd.ContextError
	require.ErrorAs(t, err, &missing)
	require.Equal(t, cfg.RequiredContexts, missing.Missing)
	cfg.Export = "nope"
	_, err = nbd.Dial(context.Background(), cfg)
	require.ErrorIs(t, err, nbd.ErrUnknownExport)
}

func TestNBDKitVariants(t *testing.T) {
	r := seeded(t)
	want := make([]byte, 3*mib+512)
	fill(r, want)
	clear(want[mib : 2*mib])
	path := image(t, want)
	variants := map[string]struct {
		args       []string
		structured bool
		minimum    int64
	}{
		"default":           {nil, true, 1},
		"noextents":         {[]string{"--filter=noextents"}, true, 1},
		"plain replies":     {[]string{"--no-sr"}, false, 1},
		"not fixed":         {[]string{"--mask-handshake=0"}, false, 1},
		"no zeroes":         {[]string{"--mask-handshake=2"}, false, 1},
		"minimum block":     {[]string{"--filter=blocksize-policy", "blocksize-minimum=512", "blocksize-maximum=65536", "blocksize-error-policy=error"}, true, 512},
		"reordered, slowed": {[]string{"--filter=delay", "rdelay=3ms"}, true, 1},
	}
	for name, v := range variants {
		t.Run(name, func(t *testing.T) {
			args := append([]string{}, v.args...)
			var params []string
			for len(args) > 0 && args[len(args)-1][0] != '-' {
				params = append(params, args[len(args)-1])
				args = args[:len(args)-1]
			}
			c := dial(t, nbdkit(t, append(append(args, "file", path), params...)...))
			require.Equal(t, v.structured, c.StructuredReplies())
			require.Equal(t, v.minimum, c.BlockSizes().Minimum)
			require.EqualValues(t, len(want), c.Size())
			got := make([]byte, len(want))
			_, err := c.ReadAt(got, 0)
			require.NoError(t, err)
			requireSame(t, want, got, "whole")
			for range 50 {
				off := r.Int64N(c.Size())
				p := make([]byte, min(1+r.Int64N(100000), c.Size()-off))
				_, err := c.ReadAt(p, off)
				require.NoError(t, err)
				requireSame(t, want[off:off+int64(len(p))], p, "piece")
			}
			if v.minimum > 1 {
				_, err := c.WriteAt(make([]byte, 100), 0)
				require.ErrorIs(t, err, nbd.ErrUnaligned)
			}
			p := want[:v.minimum*8]
			_, err = c.WriteAt(p, 0)
			require.NoError(t, err)
			require.NoError(t, c.Flush(context.Background()))
		})
	}
}

func TestNBDKitErrors(t *testing.T) {
	c := dial(t, nbdkit(t, "--filter=error", "pattern", "size=1G", "error-pread=ENOSPC", "error-pread-rate=1"))
	_, err := c.ReadAt(make([]byte, 512), 1024)
	require.ErrorIs(t, err, nbd.ENOSPC)
	var req *nbd.RequestError
	require.ErrorAs(t, err, &req)
	require.Equal(t, "read", req.Op)
	require.EqualValues(t, 1024, req.Offset)
	require.Equal(t, 1, c.Connections()) // a refused request does not end the connection

	c = dial(t, nbdkit(t, "--no-sr", "--filter=error", "pattern", "size=1G", "error=EIO", "error-rate=100%"))
	_, err = c.ReadAt(make([]byte, 512), 1024)
	require.ErrorIs(t, err, nbd.EIO)
}

func TestNBDKitCancel(t *testing.T) {
	c := dial(t, nbdkit(t, "--filter=delay", "pattern", "size=1G", "rdelay=2"))
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := c.ReadAtContext(ctx, make([]byte, 4096), 0)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Less(t, time.Since(start), time.Second)
	// The connection survives, and the late reply is not taken for that of another request.
	p := make([]byte, 16)
	_, err = c.ReadAt(p, 4096)
	require.NoError(t, err)
	require.Equal(t, []byte{0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x10, 8}, p)
}
