package fakes_test

import (
	"bytes"
	"context"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

const mib = 1 << 20

// twoDisks returns a platform with one VM of two disks of odd sizes.
func twoDisks(opts fakes.Options) (*fakes.World, hypervisor.VMID) {
	w := fakes.NewWorld(opts)
	return w, w.AddVM(fakes.VMConfig{
		Name:  "web1",
		Disks: []fakes.DiskConfig{{Size: 3*mib + 512}, {Size: 5*mib + 1536}},
		NICs:  []hypervisor.NIC{{Connected: true}},
		NVRAM: []byte("vars"),
		Guest: fakes.Guest{Agent: true, OS: "Debian", Family: "linux"},
	})
}

// requireSame fails at the first byte in which two buffers differ.
func requireSame(t *testing.T, want, got []byte) {
	t.Helper()
	require.Len(t, got, len(want))
	for i := range want {
		if want[i] != got[i] {
			require.FailNowf(t, "bytes differ", "at %d: want %#x, got %#x", i, want[i], got[i])
		}
	}
}

func readAll(t *testing.T, r io.ReaderAt, size int64) []byte {
	t.Helper()
	p := make([]byte, size)
	n, err := r.ReadAt(p, 0)
	if err != io.EOF {
		require.NoError(t, err)
	}
	require.Equal(t, len(p), n)
	return p
}

func truth(t *testing.T, w *fakes.World, vm hypervisor.VMID, disk hypervisor.DiskID) []byte {
	t.Helper()
	b, err := w.Bytes(vm, disk)
	require.NoError(t, err)
	return readAll(t, b, b.Size())
}

func TestSnapshotKeepsItsInstant(t *testing.T) {
	ctx := context.Background()
	w, id := twoDisks(fakes.Options{})
	h := w.Connect()
	require.NoError(t, w.GuestWrite(id, "disk0", 3*mib+500, []byte("last bytes!!")))
	before := truth(t, w, id, "disk0")

	snap, err := h.CreateSnapshot(ctx, id, nil)
	require.NoError(t, err)
	require.NoError(t, w.GuestWrite(id, "disk0", 3*mib+500, []byte("overwritten!")))
	r, err := snap.OpenDisk(ctx, "disk0")
	require.NoError(t, err)
	requireSame(t, before, readAll(t, r, r.Size()))
	require.False(t, bytes.Equal(before, truth(t, w, id, "disk0")))
	require.NoError(t, snap.Release(ctx, nil))
	_, err = r.ReadAt(make([]byte, 1), 0)
	require.Error(t, err)
	require.Empty(t, w.Leftovers())
}

func TestSparseDisksOfManyTiB(t *testing.T) {
	ctx := context.Background()
	w := fakes.NewWorld(fakes.Options{})
	const size = 64 << 40
	id := w.AddVM(fakes.VMConfig{Name: "big", Disks: []fakes.DiskConfig{{Size: size}}})
	h := w.Connect()
	first, err := h.CreateSnapshot(ctx, id, nil)
	require.NoError(t, err)
	base, err := first.Baseline("disk0")
	require.NoError(t, err)
	require.NoError(t, first.Release(ctx, []hypervisor.DiskID{"disk0"}))

	require.NoError(t, w.GuestWrite(id, "disk0", size-1, []byte{7}))
	require.NoError(t, w.GuestDiscard(id, "disk0", 0, size/2))
	second, err := h.CreateSnapshot(ctx, id, &hypervisor.SnapshotOptions{Since: []hypervisor.Baseline{base}})
	require.NoError(t, err)
	var got []hypervisor.Extent
	for e, err := range hypervisor.CheckedExtents(ctx, second, "disk0", &base) {
		require.NoError(t, err)
		got = append(got, e)
	}
	require.Equal(t, []hypervisor.Extent{{Offset: size - 64<<10, Length: 64 << 10}}, got)
	require.NoError(t, second.Release(ctx, nil))
	require.Equal(t, []fakes.Leftover{{
		Kind: fakes.LeftBaseline, ID: string(id) + "/baseline/disk0/" + base.Name,
		VM: id, Disk: "disk0", Name: base.Name, Baseline: true,
	}}, w.Leftovers())
}

func TestHangingGuestIsThawedAtTheDeadline(t *testing.T) {
	ctx := context.Background()
	clk := fakes.NewClock(time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC))
	w, id := twoDisks(fakes.Options{Clock: clk})
	require.NoError(t, w.SetGuest(id, fakes.Guest{Agent: true, Freeze: fakes.FreezeHangs}))
	h := w.Connect()
	done := make(chan error, 1)
	go func() {
		_, err := h.CreateSnapshot(ctx, id, &hypervisor.SnapshotOptions{
			MinConsistency: hypervisor.FilesystemConsistent, QuiesceTimeout: 5 * time.Second,
		})
		done <- err
	}()
	require.NoError(t, clk.WaitTimers(ctx, 1))
	clk.Advance(4 * time.Second)
	require.True(t, w.Frozen(id))
	require.Equal(t, 4*time.Second, w.FrozenFor(id))
	clk.Advance(time.Second)
	require.ErrorIs(t, <-done, hypervisor.ErrQuiesceTimeout)
	require.False(t, w.Frozen(id))
	require.Empty(t, w.Leftovers())
}

func TestThawThatFailsStaysOpen(t *testing.T) {
	ctx := context.Background()
	w, id := twoDisks(fakes.Options{})
	require.NoError(t, w.SetGuest(id, fakes.Guest{Agent: true, ThawFails: 2}))
	h := w.Connect()
	snap, err := h.CreateSnapshot(ctx, id, &hypervisor.SnapshotOptions{Quiesce: hypervisor.ApplicationConsistent})
	require.NoError(t, err)
	got := snap.Consistency()
	require.True(t, got.ThawPending)
	require.Equal(t, hypervisor.FilesystemConsistent, got.Level)
	require.NotEmpty(t, got.Reason)
	require.ErrorIs(t, h.Thaw(ctx, id), hypervisor.ErrThawPending)
	require.True(t, w.Frozen(id))
	require.NoError(t, h.Thaw(ctx, id))
	require.False(t, w.Frozen(id))
	require.NoError(t, snap.Release(ctx, nil))
	require.Empty(t, w.Leftovers())
}
