package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReadSmall(t *testing.T) {
	b, disk := small()
	m, err := Open(bytes.NewReader(b), int64(len(b)))
	require.NoError(t, err)
	require.Equal(t, int64(len(disk)), m.Size())
	for off := range len(disk) { // every start, some lengths
		for _, n := range []int{1, 511, 513, 1600, len(disk)} {
			p := bytes.Repeat([]byte{0xee}, n)
			got, err := m.ReadAt(p, int64(off))
			want := disk[off:min(off+n, len(disk))]
			require.Equal(t, len(want), got)
			if len(want) < n {
				require.ErrorIs(t, err, io.EOF)
			} else {
				require.NoError(t, err)
			}
			require.Equal(t, -1, firstDifference(want, p[:got]), "%d bytes at %d", n, off)
		}
	}
	_, err = m.ReadAt(make([]byte, 1), m.Size())
	require.ErrorIs(t, err, io.EOF)
	_, err = m.ReadAt(make([]byte, 1), -1)
	require.ErrorIs(t, err, ErrBounds)

	var got []Extent
	for e, err := range m.Extents() {
		require.NoError(t, err)
		got = append(got, e)
	}
	require.Equal(t, []Extent{
		{Offset: 0, Length: 512}, {Offset: 512, Length: 512, Zero: true}, {Offset: 1536, Length: 1536},
	}, got)
	bms, err := m.Bitmaps()
	require.NoError(t, err)
	require.Equal(t, []Bitmap{{Name: "nightly", Granularity: 65536, Enabled: true, Inconsistent: true}}, bms)
}

func TestConcurrentReaders(t *testing.T) {
	b, disk := small()
	m, err := Open(bytes.NewReader(b), int64(len(b)))
	require.NoError(t, err)
	m.tables.limit, m.clusters.limit = 1, 1
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for g := range errs {
		wg.Go(func() {
			p := make([]byte, len(disk))
			for range 200 {
				if _, err := m.ReadAt(p, 0); err != nil || !bytes.Equal(p, disk) {
					errs[g] = errors.Join(errors.New("differs"), err)
				}
			}
		})
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
}

// Each hostile or damaged field is refused with the right condition, when it is opened or read.
func TestRefused(t *testing.T) {
	u32 := func(off int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { binary.BigEndian.PutUint32(b[off:], v); return b }
	}
	u64 := func(off int, v uint64) func([]byte) []byte {
		return func(b []byte) []byte { binary.BigEndian.PutUint64(b[off:], v); return b }
	}
	cut := func(n int) func([]byte) []byte { return func(b []byte) []byte { return b[:n] } }
	both := func(f, g func([]byte) []byte) func([]byte) []byte {
		return func(b []byte) []byte { return g(f(b)) }
	}
	v2 := u32(4, 2)
	for name, c := range map[string]struct {
		change func([]byte) []byte
		want   error
	}{
		"empty file":                {cut(0), ErrCorrupt},
		"header cut":                {cut(90), ErrCorrupt},
		"no magic":                  {u32(0, 1), ErrCorrupt},
		"version 1":                 {u32(4, 1), errors.ErrUnsupported},
		"version 4":                 {u32(4, 4), errors.ErrUnsupported},
		"backing file":              {both(u64(8, 300), u32(16, 5)), ErrBackingFile},
		"backing size alone":        {u32(16, 5), ErrBackingFile},
		"cluster_bits 8":            {u32(20, 8), ErrCorrupt},
		"cluster_bits 22":           {u32(20, 22), ErrCorrupt},
		"cluster_bits 2^31":         {u32(20, 1<<31), ErrCorrupt},
		"encrypted":                 {u32(32, 1), ErrEncrypted},
		"luks":                      {u32(32, 2), ErrEncrypted},
		"data file bit":             {u64(72, featureDataFile), ErrDataFile},
		"data file name":            {u32(112, extDataFile), ErrDataFile},
		"marked corrupt":            {u64(72, featureCorrupt), ErrCorrupt},
		"extended L2":               {u64(72, featureExtendedL2), errors.ErrUnsupported},
		"unknown feature":           {u64(72, 1<<40), errors.ErrUnsupported},
		"compression without bit":   {u32(104, 1<<24), ErrCorrupt},
		"compression bit, zlib":     {u64(72, featureCompression), ErrCorrupt},
		"compression type 9":        {both(u64(72, featureCompression), u32(104, 9<<24)), errors.ErrUnsupported},
		"zstd cluster":              {both(u64(72, featureCompression), u32(104, 1<<24)), errors.ErrUnsupported},
		"header_length 96":          {u32(100, 96), ErrCorrupt},
		"header_length 105":         {u32(100, 105), ErrCorrupt},
		"header_length 2^31":        {u32(100, 1<<31), ErrCorrupt},
		"size 2^63":                 {u64(24, 1<<63), ErrCorrupt},
		"size 2^62":                 {u64(24, 1<<62), errors.ErrUnsupported},
		"size beyond L1":            {u64(24, 64*512+1), ErrCorrupt},
		"L1 of 2^32-1 entries":      {u32(36, 1<<32-1), errors.ErrUnsupported},
		"L1 behind the file":        {u64(40, 8*512), ErrCorrupt},
		"L1 at 0":                   {u64(40, 0), ErrCorrupt},
		"L1 unaligned":              {u64(40, 520), ErrCorrupt},
		"L1 at 2^63":                {u64(40, 1<<63), ErrCorrupt},
		"extension too long":        {u32(116, 1<<30), ErrCorrupt},
		"bitmaps extension of 16":   {u32(116, 16), ErrCorrupt},
		"70000 bitmaps":             {u32(120, 70000), ErrCorrupt},
		"bitmap directory of 2^40":  {u64(128, 1<<40), ErrCorrupt},
		"bitmap directory at 2^40":  {u64(136, 1<<40), ErrCorrupt},
		"bitmap extra data of 2^32": {u32(7*512+20, 1<<32-1), ErrCorrupt},
		"bitmap name of 2000":       {u32(7*512+16, 1<<24|16<<16|2000), ErrCorrupt},
		"bitmap granularity 2^40":   {u32(7*512+16, 1<<24|40<<16|7), ErrCorrupt},
		"bitmap flags":              {u32(7*512+12, 8), ErrCorrupt},
		"bitmap type 2":             {u32(7*512+16, 2<<24|16<<16|7), errors.ErrUnsupported},
		"bytes behind bitmaps":      {u64(128, 40), ErrCorrupt},
		"L2 behind the file":        {u64(512, 8*512), ErrCorrupt},
		"L2 unaligned":              {u64(512, 2*512+8|flagCopied), ErrCorrupt},
		"L1 reserved bit":           {u64(512, 2*512|1<<60), ErrCorrupt},
		"L2 cut":                    {cut(2*512 + 100), ErrCorrupt},
		"cluster behind the file":   {u64(1024, 1<<30), ErrCorrupt},
		"L2 reserved bit":           {u64(1024, 3*512|2), ErrCorrupt},
		"zero flag in version 2":    {v2, ErrCorrupt},
		"compressed and copied":     {u64(1024, 6*512|flagCompressed|flagCopied), ErrCorrupt},
		"compressed at 0":           {u64(1024, flagCompressed), ErrCorrupt},
		"compressed behind file":    {u64(1024, 1<<40|flagCompressed), ErrCorrupt},
		"not deflated":              {u64(1024, 3*512|flagCompressed), ErrCorrupt},
		"deflated short":            {u64(6*512, 0x0300), ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			b, _ := small()
			b = c.change(b)
			err := readAll(b)
			require.ErrorIs(t, err, c.want)
			var e *Error
			require.ErrorAs(t, err, &e)
		})
	}
	b, _ := small()
	require.NoError(t, readAll(b))
	require.NoError(t, readAll(u64(88, 0)(u32(120, 70000)(b))), "stale bitmaps are not looked at")
}

// readAll opens an image and reads everything that can be read.
func readAll(b []byte) error {
	m, err := Open(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return err
	}
	if _, err := m.Bitmaps(); err != nil {
		return err
	}
	for _, err := range m.Extents() {
		if err != nil {
			return err
		}
	}
	_, err = io.Copy(io.Discard, io.NewSectionReader(m, 0, m.Size()))
	return err
}

// A file of some hundred bytes cannot make the parser allocate what its fields claim.
func TestNoAllocationBombs(t *testing.T) {
	be := binary.BigEndian
	for name, change := range map[string]func(b []byte){
		"L1":        func(b []byte) { be.PutUint32(b[20:], 9); be.PutUint64(b[24:], 100<<30); be.PutUint32(b[36:], 4<<20) },
		"clusters":  func(b []byte) { be.PutUint32(b[20:], 21); be.PutUint64(b[24:], 1<<50); be.PutUint32(b[36:], 4<<20) },
		"extension": func(b []byte) { be.PutUint32(b[20:], 21); be.PutUint32(b[116:], 1<<21) },
		"bitmaps":   func(b []byte) { be.PutUint32(b[120:], 65535); be.PutUint64(b[128:], 64<<20) },
	} {
		b, _ := small()
		change(b)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := readAll(b)
		runtime.ReadMemStats(&after)
		require.Error(t, err, name)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(8<<20), name)
	}
}

func FuzzImage(f *testing.F) {
	b, _ := small()
	f.Add(b)
	b2 := bytes.Clone(b)
	binary.BigEndian.PutUint32(b2[4:], 2)
	f.Add(b2)
	f.Add(b[:120])
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Open(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		_, _ = m.Bitmaps()
		last, n := int64(0), 0
		for e, err := range m.Extents() {
			if err != nil {
				break
			}
			if e.Length <= 0 || e.Offset < last || e.Offset+e.Length > m.Size() {
				t.Fatalf("extent %+v after %d of %d", e, last, m.Size())
			}
			last = e.Offset + e.Length
			if n++; n > 2000 {
				break
			}
			p := make([]byte, min(e.Length, 64<<10))
			if _, err := m.ReadAt(p, e.Offset); err == nil && e.Zero && bytes.Count(p, []byte{0}) != len(p) {
				t.Fatalf("zero extent %+v has data", e)
			}
		}
		p := make([]byte, 4096)
		for _, off := range []int64{0, m.Size() / 2, m.Size() - 100} {
			if off >= 0 {
				_, _ = m.ReadAt(p, off)
			}
		}
	})
}
