package hypervisor_test

import (
	"context"
	"errors"
	"io"
	"iter"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

const mib = 1 << 20

// snapshotOf returns a snapshot of a disk that holds p at off.
func snapshotOf(t *testing.T, opts fakes.Options, p []byte, off int64) (hypervisor.Snapshot, []byte) {
	t.Helper()
	w := fakes.NewWorld(opts)
	id := w.AddVM(fakes.VMConfig{Name: "web1", Disks: []fakes.DiskConfig{{Size: 4*mib + 512}}})
	require.NoError(t, w.GuestWrite(id, "disk0", off, p))
	want := make([]byte, 4*mib+512)
	copy(want[off:], p)
	s, err := w.Connect().CreateSnapshot(context.Background(), id, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Release(context.Background(), nil)) })
	return s, want
}

func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i%251 + 1)
	}
	return p
}

func TestReadByEitherTransport(t *testing.T) {
	for name, opts := range map[string]fakes.Options{"random": {}, "sequential": {Sequential: true}} {
		t.Run(name, func(t *testing.T) {
			s, want := snapshotOf(t, opts, pattern(3*mib), mib+512)
			got := make([]byte, len(want))
			require.NoError(t, hypervisor.Read(t.Context(), s, "disk0", nil, func(e hypervisor.Extent, p []byte) error {
				require.Len(t, p, int(e.Length))
				copy(got[e.Offset:], p)
				return nil
			}))
			for i := range want {
				if want[i] != got[i] {
					require.FailNowf(t, "bytes differ", "at %d: want %#x, got %#x", i, want[i], got[i])
				}
			}
			enough := errors.New("enough")
			err := hypervisor.Read(t.Context(), s, "disk0", nil, func(hypervisor.Extent, []byte) error { return enough })
			require.ErrorIs(t, err, enough)
			err = hypervisor.Read(t.Context(), s, "none", nil, func(hypervisor.Extent, []byte) error { return nil })
			require.ErrorIs(t, err, hypervisor.ErrNotFound)
		})
	}
}

// told is a snapshot whose driver says what a test wants.
type told struct {
	hypervisor.Snapshot
	extents []hypervisor.Extent
	err     error
	read    func(p []byte, off int64) (int, error)
}

func (s *told) Extents(context.Context, hypervisor.DiskID, *hypervisor.Baseline) iter.Seq2[hypervisor.Extent, error] {
	return func(yield func(hypervisor.Extent, error) bool) {
		for _, e := range s.extents {
			if !yield(e, nil) {
				return
			}
		}
		if s.err != nil {
			yield(hypervisor.Extent{}, s.err)
		}
	}
}

func (s *told) OpenDisk(ctx context.Context, d hypervisor.DiskID) (hypervisor.DiskReader, error) {
	r, err := s.Snapshot.OpenDisk(ctx, d)
	if s.read != nil {
		r = &toldReader{r, s.read}
	}
	return r, err
}

type toldReader struct {
	hypervisor.DiskReader
	read func(p []byte, off int64) (int, error)
}

func (r *toldReader) ReadAt(p []byte, off int64) (int, error) { return r.read(p, off) }

func TestCheckedExtentsStopABrokenDriver(t *testing.T) {
	s, _ := snapshotOf(t, fakes.Options{}, []byte("x"), 0)
	const size = 4*mib + 512
	for name, list := range map[string][]hypervisor.Extent{
		"unsorted":       {{Offset: mib, Length: 512}, {Offset: 0, Length: 512}},
		"overlapping":    {{Offset: 0, Length: 1024}, {Offset: 512, Length: 1024}},
		"empty":          {{Offset: 512}},
		"negative":       {{Offset: -512, Length: 512}},
		"past the end":   {{Offset: size - 512, Length: 1024}},
		"behind the end": {{Offset: size, Length: 512}},
		"overflow":       {{Offset: 512, Length: 1<<63 - 1}},
	} {
		t.Run(name, func(t *testing.T) {
			var last error
			n := 0
			for _, err := range hypervisor.CheckedExtents(t.Context(), &told{Snapshot: s, extents: list}, "disk0", nil) {
				require.NoError(t, last)
				if last = err; err == nil {
					n++
				}
			}
			var e *hypervisor.Error
			require.ErrorAs(t, last, &e)
			require.Equal(t, len(list)-1, n, "what was right before is passed on")
		})
	}
}

func TestCheckedExtentsPassOn(t *testing.T) {
	s, _ := snapshotOf(t, fakes.Options{}, []byte("x"), 0)
	good := []hypervisor.Extent{{Offset: 0, Length: 512}, {Offset: 512, Length: 512, Zero: true}, {Offset: 4 * mib, Length: 512}}
	broken := &told{Snapshot: s, extents: good, err: hypervisor.ErrBaselineInvalid}
	var got []hypervisor.Extent
	var last error
	for e, err := range hypervisor.CheckedExtents(t.Context(), broken, "disk0", nil) {
		if last = err; err == nil {
			got = append(got, e)
		}
	}
	require.Equal(t, good, got)
	require.ErrorIs(t, last, hypervisor.ErrBaselineInvalid)

	// A driver that forgets the context ends early, and is not believed.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for _, err := range hypervisor.CheckedExtents(ctx, &told{Snapshot: s, extents: good}, "disk0", nil) {
		cancel()
		last = err
	}
	require.ErrorIs(t, last, context.Canceled)
}

func TestReadRefusesShortReads(t *testing.T) {
	s, _ := snapshotOf(t, fakes.Options{}, pattern(mib), 0)
	for name, end := range map[string]error{"silent": nil, "at the end": io.EOF, "torn": io.ErrUnexpectedEOF} {
		short := &told{
			Snapshot: s, extents: []hypervisor.Extent{{Length: mib}},
			read: func(p []byte, _ int64) (int, error) { return len(p) - 1, end },
		}
		err := hypervisor.Read(t.Context(), short, "disk0", nil, func(hypervisor.Extent, []byte) error {
			return errors.New("a short piece was passed on")
		})
		require.ErrorIs(t, err, io.ErrUnexpectedEOF, name)
	}
}

func TestFind(t *testing.T) {
	ctx := context.Background()
	w := fakes.NewWorld(fakes.Options{})
	web := w.AddVM(fakes.VMConfig{Name: "web"})
	twins := []hypervisor.VMID{w.AddVM(fakes.VMConfig{Name: "twin"}), w.AddVM(fakes.VMConfig{Name: "twin"})}
	h := w.Connect()
	vm, err := h.VM(ctx, web)
	require.NoError(t, err)
	for _, s := range []string{"web", vm.UUID, string(web)} {
		got, err := hypervisor.Find(ctx, h, s)
		require.NoError(t, err)
		require.Equal(t, web, got.ID)
	}
	_, err = hypervisor.Find(ctx, h, "twin")
	require.ErrorIs(t, err, hypervisor.ErrAmbiguous)
	for _, id := range twins {
		vm, verr := h.VM(ctx, id)
		require.NoError(t, verr)
		require.Contains(t, hypervisor.Hint(err), vm.UUID)
	}
	_, err = hypervisor.Find(ctx, h, "none")
	require.ErrorIs(t, err, hypervisor.ErrNotFound)
	require.NotEmpty(t, hypervisor.Hint(err))

	// What fails to list is not taken for "not there".
	broken := fakes.WithFaults(h, fakes.NewScript(fakes.FailOp(fakes.OpVMs, fakes.FailBefore)))
	_, err = hypervisor.Find(ctx, broken, "web")
	require.ErrorIs(t, err, fakes.ErrInjected)
}

func TestThawIsUnsupportedWithoutAThawer(t *testing.T) {
	h := fakes.NewHypervisor(fakes.Options{})
	vm := h.World().AddVM(fakes.VMConfig{Name: "web"})
	require.NoError(t, hypervisor.Thaw(t.Context(), h, vm))
	require.ErrorIs(t, hypervisor.Thaw(t.Context(), struct{ hypervisor.Hypervisor }{h}, vm), errors.ErrUnsupported)
}

func TestDiskOfAVM(t *testing.T) {
	vm := &hypervisor.VM{Disks: []hypervisor.Disk{{ID: "a"}, {ID: "b"}}}
	vm.Disk("b").Size = 7
	require.Equal(t, int64(7), vm.Disks[1].Size)
	require.Nil(t, vm.Disk("c"))
	require.Equal(t, int64(30), hypervisor.Extent{Offset: 10, Length: 20}.End())
}
