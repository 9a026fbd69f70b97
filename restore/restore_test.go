package restore_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/image/qcow2"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/restore"
)

const sizeA, sizeB = 7<<20 + 512, 3<<20 - 1024

// rig is a world with one point of one VM.
type rig struct {
	world *fakes.World
	hv    *fakes.Hypervisor
	store *fakes.Store
	repo  *fakes.Repository
	vm    hypervisor.VMID
	point repository.PointID
	truth map[hypervisor.DiskID]*fakes.DiskBytes
	state string
}

func newRig(t *testing.T) *rig {
	r := &rig{world: fakes.NewWorld(fakes.Options{Seed: 7}), store: fakes.NewStore(), state: t.TempDir(), truth: map[hypervisor.DiskID]*fakes.DiskBytes{}}
	r.hv = r.world.Connect()
	r.world.AddNetwork("lan2")
	r.world.AddStorage("fast", 1<<30)
	r.vm = r.world.AddVM(fakes.VMConfig{
		Name: "web1", NVRAM: []byte("efi variables"),
		Disks: []fakes.DiskConfig{{ID: "vda", Size: sizeA}, {ID: "vdb", Size: sizeB}},
		NICs:  []hypervisor.NIC{{}},
	})
	for _, w := range []struct {
		disk hypervisor.DiskID
		off  int64
		text string
	}{
		{"vda", 0, "boot"},
		{"vda", 3<<20 - 2, "across blocks"},
		{"vda", sizeA - 4, "last"},
		{"vdb", 1 << 20, "data"},
		{"vdb", sizeB - 1, "e"},
	} {
		require.NoError(t, r.world.GuestWrite(r.vm, w.disk, w.off, []byte(w.text)))
	}
	repo, err := r.store.Open(t.Context(), fakes.RepositoryOptions{Seed: 7})
	require.NoError(t, err)
	r.repo = repo
	for _, d := range []hypervisor.DiskID{"vda", "vdb"} {
		b, err := r.world.Bytes(r.vm, d)
		require.NoError(t, err)
		r.truth[d] = b
	}
	res, err := backup.Run(t.Context(), r.hv, r.repo, r.vm, &backup.Options{BlockSize: repository.LeafSize})
	require.NoError(t, err)
	r.point = res.Point()
	return r
}

func (r *rig) options() *restore.Options {
	return &restore.Options{StateDir: r.state, Endpoint: "fake://", InFlight: 3}
}

// same compares a reader with the truth.
func same(t *testing.T, want *fakes.DiskBytes, got io.ReaderAt) {
	t.Helper()
	a, b := make([]byte, want.Size()), make([]byte, want.Size())
	_, err := want.ReadAt(a, 0)
	if err != nil {
		require.ErrorIs(t, err, io.EOF)
	}
	n, err := got.ReadAt(b, 0)
	require.Equal(t, len(b), n, "%v", err)
	for i := range a {
		if a[i] != b[i] {
			t.Fatalf("byte %d is %#x and should be %#x", i, b[i], a[i])
		}
	}
}

func TestToVMMakesACopyThatCollidesWithNothing(t *testing.T) {
	r := newRig(t)
	res, err := restore.ToVM(t.Context(), r.repo, r.point, r.hv, &restore.VMOptions{
		Name: "web1-copy", Storage: map[hypervisor.DiskID]string{"vdb": "fast"}, Networks: map[string]string{fakes.DefaultNetwork: "lan2"},
	}, r.options())
	require.NoError(t, err)
	old, err := r.hv.VM(t.Context(), r.vm)
	require.NoError(t, err)
	vm := res.VM
	require.False(t, vm.Incomplete)
	require.NotEqual(t, old.UUID, vm.UUID)
	require.NotEqual(t, old.NICs[0].MAC, vm.NICs[0].MAC)
	require.Equal(t, "lan2", vm.NICs[0].Network)
	require.Equal(t, "fast", vm.Disk("vdb").Storage)
	require.Equal(t, old.Hardware, vm.Hardware)
	for id, want := range r.truth {
		got, err := r.world.Bytes(vm.ID, id)
		require.NoError(t, err)
		same(t, want, got)
	}
	require.Len(t, res.Disks, 2)
	for _, d := range res.Disks {
		require.True(t, d.Verified)
	}
	f, err := vm.Attachments[0].Open(t.Context())
	require.NoError(t, err)
	nvram, err := io.ReadAll(f)
	require.NoError(t, err)
	require.Equal(t, "efi variables", string(nvram))
	require.NoError(t, r.hv.SetPower(t.Context(), vm.ID, hypervisor.PowerOn))
}

func TestToVMRefusesConflictsBeforeItCreatesAnything(t *testing.T) {
	r := newRig(t)
	calls := atomic.Int64{}
	hv := fakes.WithFaults(r.hv, fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
		if c.Op == fakes.OpCreateVM {
			calls.Add(1)
		}
		return fakes.Fault{}
	})).(hypervisor.Target)
	for name, vo := range map[string]*restore.VMOptions{
		"name": nil, "identity": {Name: "other", Identity: hypervisor.IdentityKeep},
	} {
		_, err := restore.ToVM(t.Context(), r.repo, r.point, hv, vo, r.options())
		require.ErrorIs(t, err, hypervisor.ErrExists, name)
		require.NotEmpty(t, hypervisor.Hint(err), name)
	}
	require.Zero(t, calls.Load())
	require.NoError(t, r.world.RemoveVM(r.vm))
	res, err := restore.ToVM(t.Context(), r.repo, r.point, hv, &restore.VMOptions{Identity: hypervisor.IdentityKeep}, r.options())
	require.NoError(t, err)
	require.Equal(t, "web1", res.VM.Name)
}

func TestToVMLeavesNothingWhenAnyCallFails(t *testing.T) {
	broken := errors.New("broken on purpose")
	for _, after := range []bool{false, true} {
		for k := 1; ; k++ {
			r := newRig(t)
			hit := false
			var op fakes.Op
			hv := fakes.WithFaults(r.hv, fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
				if c.N != k {
					return fakes.Fault{}
				}
				hit, op = true, c.Op
				return fakes.Fault{Err: broken, After: after}
			})).(hypervisor.Target)
			res, err := restore.ToVM(t.Context(), r.repo, r.point, hv, &restore.VMOptions{Name: "copy"}, r.options())
			if !hit {
				require.NoError(t, err)
				require.Greater(t, k, 15)
				break
			}
			note := fmt.Sprintf("call %d, %s: %v", k, op, err)
			done, rerr := backup.Recover(t.Context(), backup.RecoverOptions{
				StateDir: r.state,
				Connect:  func(context.Context, string) (hypervisor.Hypervisor, error) { return r.world.Connect(), nil },
			})
			require.NoError(t, rerr, note)
			for _, d := range done {
				require.NoError(t, d.Err, note)
			}
			for _, l := range r.world.Leftovers() {
				require.True(t, l.Baseline, "%s: left over: %s", note, l.ID)
			}
			if err == nil {
				continue // a close that reported an error after all was committed, for example
			}
			require.ErrorIs(t, err, broken, note)
			if res.VM == nil && op != fakes.OpVM && op != fakes.OpFinishVM {
				_, ferr := hypervisor.Find(t.Context(), r.hv, "copy")
				require.ErrorIs(t, ferr, hypervisor.ErrNotFound, note)
			}
		}
	}
}

func TestToFilesWritesImagesThatAreTheTruth(t *testing.T) {
	r := newRig(t)
	dir := filepath.Join(t.TempDir(), "new", "dir")
	res, err := restore.ToFiles(t.Context(), r.repo, r.point, dir, restore.Raw, r.options())
	require.NoError(t, err)
	for id, want := range r.truth {
		f, err := os.Open(filepath.Join(dir, string(id)+".raw"))
		require.NoError(t, err)
		st, err := f.Stat()
		require.NoError(t, err)
		require.Equal(t, want.Size(), st.Size())
		same(t, want, f)
		require.NoError(t, f.Close())
	}
	require.FileExists(t, filepath.Join(dir, restore.DescriptionFile))
	require.Len(t, res.Files, 3)

	_, err = restore.ToFiles(t.Context(), r.repo, r.point, dir, restore.Raw, r.options())
	require.ErrorIs(t, err, hypervisor.ErrExists)

	q := t.TempDir()
	_, err = restore.ToFiles(t.Context(), r.repo, r.point, q, restore.QCOW2, &restore.Options{Disks: []hypervisor.DiskID{"vda"}})
	require.NoError(t, err)
	f, err := os.Open(filepath.Join(q, "vda.qcow2"))
	require.NoError(t, err)
	defer f.Close()
	st, err := f.Stat()
	require.NoError(t, err)
	img, err := qcow2.Open(f, st.Size())
	require.NoError(t, err)
	same(t, r.truth["vda"], img)
	require.NoFileExists(t, filepath.Join(q, "vdb.qcow2"))
}

func TestDamageIsAnErrorAndLeavesNoFile(t *testing.T) {
	r := newRig(t)
	hurt := 0
	for _, name := range r.store.Names("") {
		for _, how := range fakes.BlobDamages() {
			undo, err := r.store.Damage(name, how)
			require.NoError(t, err)
			dir := t.TempDir()
			repo, oerr := r.store.Open(t.Context(), fakes.RepositoryOptions{})
			if oerr == nil {
				_, err := restore.ToFiles(t.Context(), repo, r.point, dir, restore.Raw, &restore.Options{})
				if err == nil {
					for id, want := range r.truth {
						f, err := os.Open(filepath.Join(dir, string(id)+".raw"))
						require.NoError(t, err)
						same(t, want, f)
						require.NoError(t, f.Close())
					}
				} else {
					hurt++
					left, err := os.ReadDir(dir)
					require.NoError(t, err)
					require.Empty(t, left, "%s %s", name, how)
				}
			}
			undo()
		}
	}
	require.Positive(t, hurt)
}

func TestUnknownDisksAndPointsAreNamed(t *testing.T) {
	r := newRig(t)
	_, err := restore.ToFiles(t.Context(), r.repo, "no-such-point", t.TempDir(), restore.Raw, nil)
	require.ErrorIs(t, err, repository.ErrNotFound)
	_, err = restore.ToFiles(t.Context(), r.repo, r.point, t.TempDir(), restore.Raw, &restore.Options{Disks: []hypervisor.DiskID{"sdz"}})
	require.ErrorIs(t, err, hypervisor.ErrNotFound)
	_, err = restore.ToFiles(t.Context(), r.repo, r.point, t.TempDir(), "vmdk", nil)
	require.ErrorIs(t, err, errors.ErrUnsupported)
}
