package kvm

import (
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

// specOf describes a copy of a VM under another name.
func (l *lab) specOf(s hypervisor.Snapshot, name, format string) *hypervisor.VMSpec {
	vm := s.VM()
	spec := &hypervisor.VMSpec{
		Name: l.Name(name), Owner: "holdfast-c0ffee00-restore1-vm", Hardware: vm.Hardware, NICs: vm.NICs,
		Native: &vm.Native, Attachments: vm.Attachments,
	}
	for _, d := range vm.Disks {
		if d.Snapshottable {
			spec.Disks = append(spec.Disks, hypervisor.DiskSpec{ID: d.ID, Size: d.Size, Bus: d.Bus, Slot: d.Slot, Format: format})
		}
	}
	return spec
}

// restore makes a new VM from a snapshot.
func (l *lab) restore(s hypervisor.Snapshot, spec *hypervisor.VMSpec) *hypervisor.VM {
	l.t.Helper()
	vm, err := l.d.CreateVM(l.ctx, spec)
	require.NoError(l.t, err)
	for _, d := range spec.Disks {
		w, err := l.d.OpenDiskWriter(l.ctx, vm.ID, d.ID)
		require.NoError(l.t, err)
		require.NoError(l.t, hypervisor.Read(l.ctx, s, d.ID, nil, func(e hypervisor.Extent, p []byte) error {
			if p == nil {
				return w.WriteZeroes(e.Offset, e.Length)
			}
			_, err := w.WriteAt(p, e.Offset)
			return err
		}))
		require.NoError(l.t, w.Commit())
		require.NoError(l.t, w.Close())
	}
	return vm
}

func TestLiveRestoreAsNewVM(t *testing.T) {
	for _, format := range []string{"qcow2", "raw"} {
		t.Run(format, func(t *testing.T) {
			l := newLab(t)
			vm := l.VM(t, kvmlab.Spec{
				UEFI: true, MACs: []string{"52:54:00:aa:bb:02"}, AgentChannel: true,
				Disks: []kvmlab.Disk{
					{Size: 8*mib + 512, Data: []kvmlab.Range{{Off: 0, Len: 300 << 10}, {Off: 8 * mib, Len: 512}}, Seed: 1, Serial: "S1"},
					{Size: 4*mib + 4096, Data: []kvmlab.Range{{Off: 4 * mib, Len: 4096}}, Seed: 2},
				},
			})
			// Something in the NVRAM that no template has.
			nvram, err := os.OpenFile(vm.NVRAM(), os.O_RDWR, 0)
			require.NoError(t, err)
			_, err = nvram.WriteAt([]byte("holdfast was here"), 4096*3+7)
			require.NoError(t, err)
			require.NoError(t, nvram.Close())
			want := map[string][]byte{"vda": l.truth(vm, "vda"), "vdb": l.truth(vm, "vdb")}
			wantNVRAM, err := os.ReadFile(vm.NVRAM())
			require.NoError(t, err)

			s := l.snap(vm, nil)
			spec := l.specOf(s, "restored", format)
			got := l.restore(s, spec)
			require.NoError(t, s.Release(l.ctx, nil))
			require.True(t, got.Incomplete)
			require.NotEqual(t, vm.UUID(), got.UUID)
			require.NotEqual(t, "52:54:00:aa:bb:02", got.NICs[0].MAC)
			// Neither we nor libvirt can start it yet.
			require.Error(t, l.d.SetPower(l.ctx, got.ID, hypervisor.PowerOn))
			_, err = l.Virsh("start", spec.Name, "--paused")
			require.Error(t, err)
			require.NoError(t, l.d.FinishVM(l.ctx, got.ID))

			done, err := l.d.VM(l.ctx, got.ID)
			require.NoError(t, err)
			require.False(t, done.Incomplete)
			require.Equal(t, hypervisor.UEFI, done.Hardware.Firmware)
			for _, d := range done.Disks {
				out := filepath.Join(l.Dir, "restored-"+string(d.ID))
				tr, err := kvmlab.ImageTruth(d.Storage, d.Format, out)
				require.NoError(t, err)
				b, err := os.ReadFile(tr.Path)
				require.NoError(t, err)
				same(t, want[string(d.ID)], b)
				require.Equal(t, format, d.Format)
			}
			require.Len(t, done.Attachments, 1)
			r, err := done.Attachments[0].Open(l.ctx)
			require.NoError(t, err)
			b, err := io.ReadAll(r)
			require.NoError(t, err)
			require.NoError(t, r.Close())
			same(t, wantNVRAM, b)
			xml, err := l.Virsh("dumpxml", spec.Name)
			require.NoError(t, err)
			require.Contains(t, xml, "<serial>S1</serial>")
			require.Contains(t, xml, "org.qemu.guest_agent.0")

			_, err = l.Virsh("start", spec.Name, "--paused")
			require.NoError(t, err, "the restored VM starts")
			require.NoError(t, l.d.SetPower(l.ctx, got.ID, hypervisor.PowerOff))
			require.NoError(t, l.d.DeleteVM(l.ctx, got.ID))
			left, err := os.ReadDir(l.cfg.StorageDir)
			require.NoError(t, err)
			require.Empty(t, left)
			l.clean(vm)
		})
	}
}

func TestLiveKeepIdentity(t *testing.T) {
	l := newLab(t)
	vm := l.VM(t, kvmlab.Spec{Disks: []kvmlab.Disk{{Size: 2 * mib}}, MACs: []string{"52:54:00:aa:bb:03"}})
	uuid := vm.UUID()
	s := l.snap(vm, nil)
	spec := l.specOf(s, "kept", "")
	spec.Identity, spec.UUID = hypervisor.IdentityKeep, uuid
	_, err := l.d.CreateVM(l.ctx, spec)
	require.ErrorIs(t, err, hypervisor.ErrExists, "the UUID is taken")
	spec.UUID = ""
	_, err = l.d.CreateVM(l.ctx, spec)
	require.ErrorIs(t, err, hypervisor.ErrExists, "the MAC address is taken")
	require.NoError(t, s.Release(l.ctx, nil))
	vm.Undefine()
	spec.UUID = uuid
	got, err := l.d.CreateVM(l.ctx, spec)
	require.NoError(t, err)
	require.Equal(t, uuid, got.UUID)
	require.Equal(t, "52:54:00:aa:bb:03", got.NICs[0].MAC)
	require.NoError(t, l.d.DeleteVM(l.ctx, got.ID))
}

// TestLiveForeignHardware: a VM of another platform, with names that libvirt does
// not take.
func TestLiveForeignHardware(t *testing.T) {
	l := newLab(t)
	spec := &hypervisor.VMSpec{
		Name:     l.Name("from-elsewhere"),
		Hardware: hypervisor.Hardware{CPUs: 2, CoresPerSocket: 2, MemoryBytes: 64 * mib, Firmware: hypervisor.BIOS, Boot: []string{"scsi0-0"}},
		Disks: []hypervisor.DiskSpec{
			{ID: "scsi0-0", Size: 2 * mib, Bus: "scsi"}, {ID: "scsi0-1", Size: mib + 100, Bus: "nvme"}, {ID: "vda", Size: mib},
		},
		NICs:   []hypervisor.NIC{{ID: "4000", MAC: "00:50:56:00:00:01", Network: "user", Model: "VMXNET3", Connected: true}},
		Native: &hypervisor.NativeConfig{Format: "vmx", Data: []byte("x")},
	}
	vm, err := l.d.CreateVM(l.ctx, spec)
	require.NoError(t, err)
	require.Len(t, vm.Disks, 3)
	for _, d := range spec.Disks {
		w, err := l.d.OpenDiskWriter(l.ctx, vm.ID, d.ID)
		require.NoError(t, err)
		_, err = w.WriteAt([]byte(d.ID), 0)
		require.NoError(t, err)
		require.NoError(t, w.Commit())
		require.NoError(t, w.Close())
	}
	require.NoError(t, l.d.FinishVM(l.ctx, vm.ID))
	for _, d := range spec.Disks {
		r, err := l.d.OpenDisk(l.ctx, vm.ID, d.ID)
		require.NoError(t, err)
		p := make([]byte, len(d.ID))
		_, err = r.ReadAt(p, 0)
		require.NoError(t, err)
		require.Equal(t, string(d.ID), string(p))
		require.NoError(t, r.Close())
	}
	// It is not started: with hardware virtualisation inside a VM that works or not.
	require.NoError(t, l.d.DeleteVM(l.ctx, vm.ID))
}
