package vmdk

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReaderAgainstQemu(t *testing.T) {
	needTool(t, "qemu-img")
	s := seed(t)
	for i, format := range []string{
		"monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized",
	} {
		sizes := []int{512, 65536*3 + 512}
		if !strings.HasSuffix(format, "Flat") { // two grain tables
			sizes = append(sizes, 33<<20+65024)
		}
		for k, size := range sizes {
			dir := t.TempDir()
			what := fmt.Sprintf("%s of %d", format, size)
			disk := spotted(rand.New(rand.NewPCG(s, uint64(i*100+k))), size)
			raw, path := filepath.Join(dir, "a.raw"), filepath.Join(dir, "a.vmdk")
			require.NoError(t, os.WriteFile(raw, disk, 0o600))
			run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat="+format, raw, path)
			d, err := openPath(t, path, nil)
			require.NoError(t, err, what)
			require.Equal(t, format, d.Descriptor().CreateType)
			same(t, disk, readAll(t, d), what)
			checkExtents(t, d, disk, what)
			if format != "streamOptimized" {
				continue
			}
			b, err := os.ReadFile(path)
			require.NoError(t, err)
			got, err := decode(b, nil)
			require.NoError(t, err, what)
			same(t, disk, got, what+", as a stream")
		}
	}
}

// TestNoShorterQemuStreamIsAccepted takes sectors away from a stream that marks no end, and
// replaces them by zeros: where that takes data away, it must be an error.
func TestNoShorterQemuStreamIsAccepted(t *testing.T) {
	needTool(t, "qemu-img")
	r := rand.New(rand.NewPCG(seed(t), 0))
	dir := t.TempDir()
	raw, path := filepath.Join(dir, "a.raw"), filepath.Join(dir, "a.vmdk")
	disk := smallDisk(r)
	require.NoError(t, os.WriteFile(raw, disk, 0o600))
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, path)
	stream, err := os.ReadFile(path)
	require.NoError(t, err)
	last := len(bytes.TrimRight(stream, "\x00"))
	refused := 0
	for at := writeOverhead; at < len(stream); at += 512 {
		for name, b := range map[string][]byte{
			"cut":     stream[:at],
			"cut off": stream[:at+1],
			"removed": append(bytes.Clone(stream[:at]), stream[at+512:]...),
			"zeroed":  append(append(bytes.Clone(stream[:at]), make([]byte, 512)...), stream[at+512:]...),
			"ended":   append(bytes.Clone(stream[:at]), make([]byte, 1024)...),
		} {
			got, err := decode(b, nil)
			switch {
			case err == nil:
				same(t, disk, got, fmt.Sprintf("%s at %d of %d", name, at, len(stream)))
			default:
				require.ErrorIs(t, err, ErrCorrupt, "%s at %d of %d", name, at, len(stream))
				refused++
			}
			if at < last-512 {
				require.Error(t, err, "%s at %d of %d", name, at, len(stream))
			}
		}
	}
	require.Positive(t, refused)
}

func TestSplitDiskAgainstQemu(t *testing.T) {
	needTool(t, "qemu-img", "qemu-io")
	for _, format := range []string{"twoGbMaxExtentSparse", "twoGbMaxExtentFlat"} {
		dir := t.TempDir()
		path := filepath.Join(dir, "a.vmdk")
		run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat="+format, path, "5G")
		run(t, "qemu-io", "-f", "vmdk", "-c", "write -P 7 2147352576 256k", "-c", "write -P 9 5368708608 512", path)
		d, err := openPath(t, path, nil)
		require.NoError(t, err)
		require.Len(t, d.parts, 3)
		p := make([]byte, 512<<10)
		_, err = d.ReadAt(p, 2147352576-128<<10)
		require.NoError(t, err)
		want := make([]byte, len(p))
		copy(want[128<<10:], bytes.Repeat([]byte{7}, 256<<10))
		same(t, want, p, format)
		_, err = d.ReadAt(p[:512], 5<<30-512)
		require.NoError(t, err)
		require.Equal(t, byte(9), p[511])
	}
}

func TestDeltaAgainstQemu(t *testing.T) {
	needTool(t, "qemu-img", "qemu-io")
	s := seed(t)
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(s, 0))
	at := func(name string) string { return filepath.Join(dir, name) }
	disk := sparseDisk(r, 6<<20)
	require.NoError(t, os.WriteFile(at("raw"), disk, 0o600))
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", at("raw"), at("0.vmdk"))
	parent, err := openPath(t, at("0.vmdk"), nil)
	require.NoError(t, err)
	for i := 1; i <= 3; i++ {
		path := at(fmt.Sprintf("%d.vmdk", i))
		run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", at(fmt.Sprintf("%d.vmdk", i-1)), path)
		args := []string{"-f", "vmdk"}
		for range 5 {
			off, n := r.IntN(6<<11-200)*512, (1+r.IntN(200))*512
			args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", i, off, n))
		}
		run(t, "qemu-io", append(args, path)...)
		_, err := openPath(t, path, nil)
		require.ErrorIs(t, err, ErrParent)
		d, err := openPath(t, path, parent)
		require.NoError(t, err)
		run(t, "qemu-img", "convert", "-f", "vmdk", "-O", "raw", path, at("raw"))
		want, err := os.ReadFile(at("raw"))
		require.NoError(t, err)
		same(t, want, readAll(t, d), fmt.Sprintf("delta %d", i))
		checkExtents(t, d, want, fmt.Sprintf("delta %d", i))
		parent = d
	}
}

// TestZeroedGrainsAgainstQemu hides data of a parent, and of the disk itself, behind zeros.
func TestZeroedGrainsAgainstQemu(t *testing.T) {
	needTool(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	base, path, raw := filepath.Join(dir, "0.vmdk"), filepath.Join(dir, "1.vmdk"), filepath.Join(dir, "raw")
	run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-o", "zeroed_grain=on", base, "1M")
	run(t, "qemu-io", "-f", "vmdk", "-c", "write -P 5 0 512k", "-c", "write -z 64k 64k", base)
	run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-o", "zeroed_grain=on", "-F", "vmdk", "-b", base, path)
	run(t, "qemu-io", "-f", "vmdk", "-c", "write -P 6 128k 1k", "-c", "write -z 192k 128k", path)
	parent, err := openPath(t, base, nil)
	require.NoError(t, err)
	d, err := openPath(t, path, parent)
	require.NoError(t, err)
	run(t, "qemu-img", "convert", "-f", "vmdk", "-O", "raw", path, raw)
	want, err := os.ReadFile(raw)
	require.NoError(t, err)
	same(t, want, readAll(t, d), "zeroed grains")
	var got []Extent
	for e, err := range d.Extents() {
		require.NoError(t, err)
		got = append(got, e)
	}
	const k = 1 << 10
	require.Equal(t, []Extent{
		{Length: 64 * k},
		{Offset: 64 * k, Length: 64 * k, Zero: true},
		{Offset: 128 * k, Length: 64 * k},
		{Offset: 192 * k, Length: 128 * k, Zero: true},
		{Offset: 320 * k, Length: 192 * k},
	}, got)
}

// TestHostDeltaAgainstQemu has qemu-img read the COWD delta that the tests of this package stand on,
// over a flat file, both by the descriptors of a host.
func TestHostDeltaAgainstQemu(t *testing.T) {
	needTool(t, "qemu-img")
	r := rand.New(rand.NewPCG(seed(t), 0))
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	image, delta := cowd()
	base := make([]byte, len(delta))
	for i := range base {
		base[i] = byte(r.Uint32())
	}
	// Without a blank line before the extent, which qemu-img would count twice.
	text := "# Disk DescriptorFile\nversion=1\nCID=%08x\nparentCID=%08x\ncreateType=\"%s\"\n%s# Extent description\n" +
		"RW 63 %s \"%s\"\n# The Disk Data Base\nddb.adapterType = \"lsilogic\"\n"
	for name, b := range map[string][]byte{
		"base-flat.vmdk": base, "1-delta.vmdk": image,
		"base.vmdk": fmt.Appendf(nil, text, 1, uint32(NoParent), "vmfs", "", "VMFS", "base-flat.vmdk"),
		"1.vmdk":    fmt.Appendf(nil, text, 2, 1, "vmfsSparse", "parentFileNameHint=\"base.vmdk\"\n", "VMFSSPARSE", "1-delta.vmdk"),
	} {
		require.NoError(t, os.WriteFile(at(name), b, 0o600))
	}
	run(t, "qemu-img", "convert", "-f", "vmdk", "-O", "raw", at("1.vmdk"), at("raw"))
	want, err := os.ReadFile(at("raw"))
	require.NoError(t, err)
	parent, err := openPath(t, at("base.vmdk"), nil)
	require.NoError(t, err)
	same(t, base, readAll(t, parent), "base")
	d, err := openPath(t, at("1.vmdk"), parent)
	require.NoError(t, err)
	same(t, want, readAll(t, d), "delta")
}

func TestWriterAgainstQemu(t *testing.T) {
	needTool(t, "qemu-img")
	s := seed(t)
	for i, size := range []int{512, 65024, 65536*2 + 512, 4<<20 + 1024, 32 << 20, 65<<20 + 65024} {
		dir := t.TempDir()
		what := fmt.Sprintf("size %d", size)
		r := rand.New(rand.NewPCG(s, uint64(i)))
		disk := spotted(r, size)
		path := filepath.Join(dir, "a.vmdk")
		require.NoError(t, os.WriteFile(path, encode(t, r, disk, nil), 0o600))
		run(t, "qemu-img", "check", "-f", "vmdk", path)
		back := filepath.Join(dir, "b.raw")
		run(t, "qemu-img", "convert", "-f", "vmdk", "-O", "raw", path, back)
		got, err := os.ReadFile(back)
		require.NoError(t, err)
		same(t, disk, got, what)
	}
}

func TestSparseStreamAgainstQemu(t *testing.T) {
	needTool(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "a.vmdk")
	w, err := CreateStream(path, 3<<40+512, nil)
	require.NoError(t, err)
	for _, off := range []int64{0, 1 << 40, 3 << 40} {
		_, err := w.WriteAt([]byte("data"), off)
		require.NoError(t, err)
	}
	require.NoError(t, w.Commit())
	run(t, "qemu-img", "check", "-f", "vmdk", path)
	d, err := openPath(t, path, nil)
	require.NoError(t, err)
	var got []Extent
	for e, err := range d.Extents() {
		require.NoError(t, err)
		got = append(got, e)
	}
	require.Equal(t, []Extent{{Length: 65536}, {Offset: 1 << 40, Length: 65536}, {Offset: 3 << 40, Length: 512}}, got)
}
