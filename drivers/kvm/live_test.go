package kvm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

const mib = 1 << 20

// lab is a real libvirtd with a driver on it, and the directories of the driver.
type lab struct {
	*kvmlab.Lab
	t   *testing.T
	d   *Driver
	ctx context.Context
	cfg Config
}

// newLab skips the test unless a lab is named.
func newLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{Lab: kvmlab.Connect(t), t: t}
	ctx, cancel := context.WithTimeout(context.Background(), 9*time.Minute)
	t.Cleanup(cancel)
	l.ctx = ctx
	l.cfg = Config{
		URI: l.URI, ScratchDir: filepath.Join(l.Dir, "scratch"), StorageDir: filepath.Join(l.Dir, "storage"),
	}
	for _, dir := range []string{l.cfg.ScratchDir, l.cfg.StorageDir} {
		require.NoError(t, os.Mkdir(dir, 0o755))
	}
	l.d = l.open()
	return l
}

// open makes another connection, as another process would.
func (l *lab) open() *Driver {
	l.t.Helper()
	d, err := Open(l.ctx, l.cfg)
	require.NoError(l.t, err)
	l.t.Cleanup(func() { _ = d.Close() })
	return d
}

// twoDisks is a paused VM with two qcow2 disks of odd sizes.
func (l *lab) twoDisks(power kvmlab.Power) *kvmlab.VM {
	l.t.Helper()
	return l.VM(l.t, kvmlab.Spec{Power: power, Disks: []kvmlab.Disk{
		{Size: 8*mib + 512, Data: []kvmlab.Range{{Off: 0, Len: 300 << 10}, {Off: 5 * mib, Len: mib}}, Seed: 1},
		{Size: 4*mib + 4096, Data: []kvmlab.Range{{Off: 4 * mib, Len: 4096}}, Seed: 2},
	}})
}

func id(vm *kvmlab.VM) hypervisor.VMID { return hypervisor.VMID(vm.UUID()) }

// snap makes a snapshot that is released at the end if the test did not.
func (l *lab) snap(vm *kvmlab.VM, opts *hypervisor.SnapshotOptions) hypervisor.Snapshot {
	l.t.Helper()
	s, err := l.d.CreateSnapshot(l.ctx, id(vm), opts)
	require.NoError(l.t, err)
	l.t.Cleanup(func() { _ = s.Release(context.Background(), nil) })
	return s
}

// read gives the content of a disk: base overlaid with what Extents yields.
func (l *lab) read(s hypervisor.Snapshot, disk hypervisor.DiskID, base []byte, since *hypervisor.Baseline) (content []byte, touched int64) {
	l.t.Helper()
	size := s.VM().Disk(disk).Size
	out := make([]byte, size)
	copy(out, base)
	err := hypervisor.Read(l.ctx, s, disk, since, func(e hypervisor.Extent, p []byte) error {
		touched += e.Length
		if p == nil {
			clear(out[e.Offset:e.End()])
			return nil
		}
		copy(out[e.Offset:e.End()], p)
		return nil
	})
	require.NoError(l.t, err)
	return out, touched
}

// truth is the content of a disk by other means.
func (l *lab) truth(vm *kvmlab.VM, disk string) []byte {
	l.t.Helper()
	b, err := os.ReadFile(vm.Truth(disk).Path)
	require.NoError(l.t, err)
	return b
}

// same compares contents and names the first difference.
func same(t *testing.T, want, got []byte) {
	t.Helper()
	if bytes.Equal(want, got) {
		return
	}
	n := 0
	for n < min(len(want), len(got)) && want[n] == got[n] {
		n++
	}
	require.Failf(t, "contents differ", "at byte %d (%d wanted, %d got)", n, len(want), len(got))
}

// baselines returns the new baselines of all disks that have one.
func (l *lab) baselines(s hypervisor.Snapshot) []hypervisor.Baseline {
	l.t.Helper()
	var out []hypervisor.Baseline
	for _, d := range s.VM().Disks {
		b, err := s.Baseline(d.ID)
		if errors.Is(err, hypervisor.ErrBaselineInvalid) {
			continue
		}
		require.NoError(l.t, err)
		out = append(out, b)
	}
	return out
}

func of(list []hypervisor.Baseline, disk hypervisor.DiskID) *hypervisor.Baseline {
	for i := range list {
		if list[i].Disk == disk {
			return &list[i]
		}
	}
	return nil
}

// full backs all disks up and keeps their baselines.
func (l *lab) full(vm *kvmlab.VM) (content map[hypervisor.DiskID][]byte, base []hypervisor.Baseline) {
	l.t.Helper()
	s := l.snap(vm, nil)
	content = map[hypervisor.DiskID][]byte{}
	var keep []hypervisor.DiskID
	for _, d := range s.VM().Disks {
		if d.Snapshottable {
			content[d.ID], _ = l.read(s, d.ID, nil, nil)
			same(l.t, l.truth(vm, string(d.ID)), content[d.ID])
			keep = append(keep, d.ID)
		}
	}
	base = l.baselines(s)
	require.NoError(l.t, s.Release(l.ctx, keep))
	return content, base
}

// clean requires that nothing of ours is left but checkpoints.
func (l *lab) clean(vms ...*kvmlab.VM) {
	l.t.Helper()
	left, err := l.Leftovers(vms, l.cfg.ScratchDir)
	require.NoError(l.t, err)
	for _, x := range left {
		if x.Kind == kvmlab.LeftSocket && !strings.HasPrefix(x.ID, l.Dir) {
			continue // of another program on this host
		}
		require.Equal(l.t, kvmlab.LeftCheckpoint, x.Kind, "left over: %s", x)
	}
	for _, vm := range vms {
		refs := 0
		for _, err := range l.d.Snapshots(l.ctx, id(vm)) {
			require.NoError(l.t, err)
			refs++
		}
		require.Zero(l.t, refs)
	}
}

// incremental checks that each disk is read right against base, and returns the
// bytes touched.
func (l *lab) incremental(vm *kvmlab.VM, content map[hypervisor.DiskID][]byte, base []hypervisor.Baseline) map[hypervisor.DiskID]int64 {
	l.t.Helper()
	s := l.snap(vm, &hypervisor.SnapshotOptions{Since: base})
	touched := map[hypervisor.DiskID]int64{}
	for disk := range content {
		got, n := l.read(s, disk, content[disk], of(base, disk))
		same(l.t, l.truth(vm, string(disk)), got)
		touched[disk] = n
	}
	require.NoError(l.t, s.Release(l.ctx, nil))
	return touched
}

func TestLiveFullAndIncremental(t *testing.T) {
	for name, power := range map[string]kvmlab.Power{"paused": kvmlab.Paused, "running": kvmlab.Running, "offline": kvmlab.Off} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			vm := l.twoDisks(power)
			content, base := l.full(vm)
			require.Len(t, base, 2)
			l.clean(vm)
			if power == kvmlab.Off {
				vm.Start(kvmlab.Paused)
			}
			vm.Write("vda", 8*mib, 512, 0x11) // the last sector
			vm.Write("vda", 5*mib, 64<<10, 0x12)
			vm.WriteZero("vda", 5*mib+64<<10, 64<<10)
			vm.Discard("vda", 0, 128<<10)
			vm.Write("vdb", 0, 512, 0x13)
			if power == kvmlab.Off {
				vm.Destroy()
			}
			touched := l.incremental(vm, content, base)
			require.LessOrEqual(t, touched["vda"], int64(64<<10*6))
			require.LessOrEqual(t, touched["vdb"], int64(64<<10))
			require.Equal(t, power != kvmlab.Off, vm.Active())
			for _, b := range base {
				require.NoError(t, l.d.ForgetBaseline(l.ctx, b))
			}
			require.Empty(t, vm.Checkpoints())
			l.clean(vm)
		})
	}
}

var _ io.ReaderAt = (*reader)(nil)
