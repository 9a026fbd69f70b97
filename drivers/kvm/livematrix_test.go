package kvm

import (
	"context"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

// reasons makes a snapshot and tells for each baseline why it cannot be used,
// "" if it can. Every disk that can is read and compared with the truth.
func (l *lab) reasons(vm *kvmlab.VM, content map[hypervisor.DiskID][]byte, base []hypervisor.Baseline) map[hypervisor.DiskID]hypervisor.Reason {
	l.t.Helper()
	s := l.snap(vm, &hypervisor.SnapshotOptions{Since: base})
	out := map[hypervisor.DiskID]hypervisor.Reason{}
	for i := range base {
		b := &base[i]
		var err error
		for _, err = range s.Extents(l.ctx, b.Disk, b) {
			if err != nil {
				break
			}
		}
		if err != nil {
			require.ErrorIs(l.t, err, hypervisor.ErrBaselineInvalid)
			out[b.Disk] = hypervisor.BaselineReason(err)
			got, _ := l.read(s, b.Disk, nil, nil)
			same(l.t, l.truth(vm, string(b.Disk)), got)
			continue
		}
		out[b.Disk] = ""
		got, _ := l.read(s, b.Disk, content[b.Disk], b)
		same(l.t, l.truth(vm, string(b.Disk)), got)
	}
	require.NoError(l.t, s.Release(l.ctx, nil))
	return out
}

type verdicts = map[hypervisor.DiskID]hypervisor.Reason

func TestLiveWhatHappensBetweenBackups(t *testing.T) {
	both := func(r hypervisor.Reason) verdicts { return verdicts{"vda": r, "vdb": r} }
	for name, c := range map[string]struct {
		between func(vm *kvmlab.VM)
		want    verdicts
	}{
		"qemu killed": {func(vm *kvmlab.VM) {
			vm.KillQEMU()
			vm.Start(kvmlab.Paused)
		}, both(hypervisor.ReasonInconsistent)},
		"qemu killed after a clean stop": {func(vm *kvmlab.VM) {
			vm.Destroy()
			vm.Start(kvmlab.Paused)
			vm.KillQEMU()
			vm.Start(kvmlab.Paused)
		}, both(hypervisor.ReasonInconsistent)},
		"restarted": {func(vm *kvmlab.VM) {
			vm.Destroy()
			vm.Start(kvmlab.Paused)
		}, both("")},
		"undefined and defined again": {func(vm *kvmlab.VM) {
			vm.Undefine()
			vm.Redefine()
			vm.Start(kvmlab.Paused)
		}, both("")},
		"undefined, defined, off": {func(vm *kvmlab.VM) {
			vm.Undefine()
			vm.Redefine()
		}, both("")},
		"disk grown": {
			func(vm *kvmlab.VM) { vm.Resize("vda", 10*mib) },
			verdicts{"vda": hypervisor.ReasonDiskResized, "vdb": ""},
		},
		"disk replaced": {func(vm *kvmlab.VM) {
			vm.ReplaceDisk("vda", kvmlab.Disk{Size: 8*mib + 512, Data: []kvmlab.Range{{Off: 4096, Len: 8192}}, Seed: 9})
		}, verdicts{"vda": hypervisor.ReasonDiskReplaced, "vdb": ""}},
		"external snapshot": {func(vm *kvmlab.VM) { vm.ExternalSnapshot("ext") }, both("")},
		"foreign checkpoint": {func(vm *kvmlab.VM) {
			vm.ForeignCheckpoint("theirs", "vda", "vdb")
			vm.Write("vda", 7*mib, 4096, 0x66)
		}, both("")},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			l := newLab(t)
			vm := l.twoDisks(kvmlab.Paused)
			content, base := l.full(vm)
			vm.Write("vda", 6*mib, 200<<10, 0x21)
			vm.Write("vdb", 0, 4096, 0x22)
			c.between(vm)
			require.Equal(t, c.want, l.reasons(vm, content, base))
			for _, b := range base {
				require.NoError(t, l.d.ForgetBaseline(l.ctx, b), "the old checkpoint goes, broken or not")
			}
			if name == "foreign checkpoint" {
				require.Equal(t, []string{"theirs"}, vm.Checkpoints())
			} else {
				require.Empty(t, vm.Checkpoints())
			}
			l.clean(vm)
		})
	}
}

func TestLiveHotAddedDisk(t *testing.T) {
	l := newLab(t)
	vm := l.twoDisks(kvmlab.Paused)
	content, base := l.full(vm)
	added := hypervisor.DiskID(vm.AttachDisk(kvmlab.Disk{Size: 3 * mib, Data: []kvmlab.Range{{Off: 0, Len: 65536}}, Seed: 5}))
	vm.Write("vda", mib, 4096, 0x31)
	s := l.snap(vm, &hypervisor.SnapshotOptions{Since: base})
	got, _ := l.read(s, added, nil, nil)
	same(t, l.truth(vm, string(added)), got)
	content[added] = got
	got, n := l.read(s, "vda", content["vda"], of(base, "vda"))
	same(t, l.truth(vm, "vda"), got)
	require.LessOrEqual(t, n, int64(64<<10))
	content["vda"] = got
	next := l.baselines(s)
	require.Len(t, next, 3)
	require.NoError(t, s.Release(l.ctx, []hypervisor.DiskID{"vda", "vdb", added}))
	vm.Write(string(added), 2*mib, 4096, 0x32)
	touched := l.incremental(vm, content, next)
	require.LessOrEqual(t, touched[added], int64(64<<10))
}

func TestLiveUntrackedDisks(t *testing.T) {
	for name, disk := range map[string]kvmlab.Disk{
		"raw":      {Size: 3*mib + 512, Format: kvmlab.Raw, Data: []kvmlab.Range{{Off: mib, Len: 8192}}},
		"loop":     {Size: 4 * mib, Format: kvmlab.LoopRaw, Data: []kvmlab.Range{{Off: mib, Len: 8192}}},
		"qcow2-v2": {Size: 3*mib + 512, Format: kvmlab.Qcow2V2, Data: []kvmlab.Range{{Off: mib, Len: 8192}}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			vm := l.VM(t, kvmlab.Spec{Disks: []kvmlab.Disk{{Size: 2 * mib}, disk}})
			s := l.snap(vm, nil)
			def := s.VM().Disk("vdb")
			require.True(t, def.Snapshottable)
			require.Equal(t, hypervisor.TrackingNone, def.Tracking)
			require.Equal(t, hypervisor.ReasonNeverTracked, def.Reason)
			_, err := s.Baseline("vdb")
			require.ErrorIs(t, err, hypervisor.ErrBaselineInvalid)
			require.Equal(t, hypervisor.ReasonNeverTracked, hypervisor.BaselineReason(err))
			want := l.truth(vm, "vdb")
			vm.Write("vdb", mib, 4096, 0x44) // after the instant
			got, _ := l.read(s, "vdb", nil, nil)
			same(t, want, got)
			require.NoError(t, s.Release(l.ctx, nil))
			l.clean(vm)
		})
	}
}

func TestLiveQcow2OnBlockDeviceIsTracked(t *testing.T) {
	l := newLab(t)
	vm := l.VM(t, kvmlab.Spec{Disks: []kvmlab.Disk{{Size: 4 * mib, Format: kvmlab.LoopQcow2, Data: []kvmlab.Range{{Off: 0, Len: 8192}}}}})
	content, base := l.full(vm)
	require.Len(t, base, 1)
	vm.Write("vda", 2*mib, 4096, 0x45)
	require.LessOrEqual(t, l.incremental(vm, content, base)["vda"], int64(64<<10))
}

func TestLiveTransientDomain(t *testing.T) {
	l := newLab(t)
	vm := l.VM(t, kvmlab.Spec{Transient: true, Disks: []kvmlab.Disk{{Size: 4 * mib, Data: []kvmlab.Range{{Off: 0, Len: 8192}}}}})
	content, base := l.full(vm)
	vm.Write("vda", 2*mib, 4096, 0x46)
	require.LessOrEqual(t, l.incremental(vm, content, base)["vda"], int64(64<<10))
}

func TestLivePointInTime(t *testing.T) {
	l := newLab(t)
	vm := l.twoDisks(kvmlab.Running)
	want := l.truth(vm, "vda")
	s := l.snap(vm, nil)
	r, err := s.OpenDisk(l.ctx, "vda")
	require.NoError(t, err)
	head := make([]byte, mib)
	_, err = r.ReadAt(head, 0)
	require.NoError(t, err)
	vm.Write("vda", 0, 8*mib+512, 0x55)
	got, _ := l.read(s, "vda", nil, nil)
	same(t, want, got)
	same(t, want[:mib], head)
	// The end of the disk, and holes.
	p := make([]byte, 1024)
	n, err := r.ReadAt(p, 8*mib)
	require.Equal(t, 512, n)
	require.Equal(t, io.EOF, err)
	hr, ok := r.(hypervisor.HoleReader)
	require.True(t, ok)
	_, hole, err := hr.ReadHole(make([]byte, 64<<10), 2*mib)
	require.NoError(t, err)
	t.Logf("hole told: %v", hole)
	require.NoError(t, r.Close())
	require.NoError(t, s.Release(l.ctx, nil))
}

func TestLiveSecondBackupIsBusyAtOnce(t *testing.T) {
	l := newLab(t)
	vm := l.twoDisks(kvmlab.Paused)
	s := l.snap(vm, nil)
	start := time.Now()
	_, err := l.open().CreateSnapshot(l.ctx, id(vm), nil)
	require.ErrorIs(t, err, hypervisor.ErrBusy)
	require.ErrorContains(t, err, s.Ref().Name)
	require.Less(t, time.Since(start), 10*time.Second, "libvirt alone would wait 30 s")
	got, _ := l.read(s, "vda", nil, nil)
	same(t, l.truth(vm, "vda"), got)
}

func TestLiveForeignBlockJobIsBusy(t *testing.T) {
	l := newLab(t)
	vm := l.twoDisks(kvmlab.Paused)
	_, err := l.Virsh("blockcopy", vm.Name, "vda", "--dest", filepath.Join(l.Dir, "copy"), "--format", "qcow2", "--transient-job")
	require.NoError(t, err)
	_, err = l.d.CreateSnapshot(l.ctx, id(vm), nil)
	require.ErrorIs(t, err, hypervisor.ErrBusy)
	require.ErrorContains(t, err, "vda")
	_, err = l.Virsh("blockjob", vm.Name, "vda", "--abort")
	require.NoError(t, err)
	l.full(vm)
}

// TestLiveScratchGuard: a neighbour fills the scratch file system during the
// transfer. The job is given up while there is room, every guest write reaches
// the disk, and the reader is told why.
func TestLiveScratchGuard(t *testing.T) {
	l := newLab(t)
	small := kvmlab.NewSmallFS(t, 96*mib)
	l.cfg.ScratchDir, l.cfg.ScratchReserve, l.cfg.ScratchMinFree = small.Dir, 32*mib, 48*mib
	l.d = l.open()
	vm := l.twoDisks(kvmlab.Paused)
	s := l.snap(vm, nil)
	r, err := s.OpenDisk(l.ctx, "vda")
	require.NoError(t, err)
	p := make([]byte, 4096)
	_, err = r.ReadAt(p, 0)
	require.NoError(t, err)
	require.NoError(t, small.TryFill(28*mib))
	for i := range int64(64) {
		vm.Write("vda", i*128<<10, 128<<10, byte(i)+1)
	}
	vm.WaitJob(false, 20*time.Second)
	require.Greater(t, small.Free(), int64(8*mib), "there was always room")
	_, err = r.ReadAt(p, 4096)
	require.ErrorIs(t, err, hypervisor.ErrNoSpace)
	require.ErrorContains(t, err, small.Dir)
	var last error
	for _, last = range s.Extents(l.ctx, "vda", nil) {
	}
	require.ErrorIs(t, last, hypervisor.ErrNoSpace)
	truth := l.truth(vm, "vda")
	for i := range 64 {
		require.Equal(t, byte(i)+1, truth[i*128<<10], "guest write %d", i)
	}
	require.NoError(t, s.Release(l.ctx, nil))
	require.Empty(t, vm.Checkpoints())
	small.Release()
	l.full(vm)
	// And with too little room no backup starts.
	require.NoError(t, small.TryFill(28*mib))
	_, err = l.d.CreateSnapshot(l.ctx, id(vm), nil)
	require.ErrorIs(t, err, hypervisor.ErrNoSpace)
	require.NotEmpty(t, hypervisor.Hint(err))
	require.False(t, vm.JobActive())
}

// TestLiveOrphans: the first process dies with a snapshot open; a second one
// resumes it, finds it by itself, and cleans up.
func TestLiveOrphans(t *testing.T) {
	for name, power := range map[string]kvmlab.Power{"paused": kvmlab.Paused, "offline": kvmlab.Off} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			vm := l.twoDisks(power)
			content, base := l.full(vm)
			first := l.open()
			s, err := first.CreateSnapshot(l.ctx, id(vm), &hypervisor.SnapshotOptions{Since: base})
			require.NoError(t, err)
			want := l.truth(vm, "vda")
			require.NoError(t, first.Close())

			second := l.open()
			var refs []hypervisor.SnapshotRef
			for ref, err := range second.Snapshots(l.ctx, id(vm)) {
				require.NoError(t, err)
				refs = append(refs, ref)
			}
			require.Equal(t, []hypervisor.SnapshotRef{s.Ref()}, refs)
			again, err := second.OpenSnapshot(l.ctx, refs[0])
			require.NoError(t, err)
			require.Equal(t, s.Consistency(), again.Consistency())
			got, _ := l.read(again, "vda", content["vda"], of(base, "vda"))
			same(t, want, got)
			b1, err := s.Baseline("vdb")
			require.NoError(t, err)
			b2, err := again.Baseline("vdb")
			require.NoError(t, err)
			require.Equal(t, b1, b2)
			require.NoError(t, again.Release(l.ctx, nil))
			require.Equal(t, power != kvmlab.Off, vm.Active())
			require.Len(t, vm.Checkpoints(), 1, "the old baseline stays")
			_, err = second.OpenSnapshot(l.ctx, refs[0])
			require.ErrorIs(t, err, hypervisor.ErrNotFound)
			l.clean(vm)
		})
	}
}

// TestLiveDomainDiesDuringBackup: readers fail with a cause, Release cleans up.
func TestLiveDomainDiesDuringBackup(t *testing.T) {
	for name, kill := range map[string]func(*kvmlab.VM){"destroyed": (*kvmlab.VM).Destroy, "killed": (*kvmlab.VM).KillQEMU} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			vm := l.twoDisks(kvmlab.Paused)
			s := l.snap(vm, nil)
			r, err := s.OpenDisk(l.ctx, "vda")
			require.NoError(t, err)
			kill(vm)
			_, err = r.ReadAt(make([]byte, 512), 0)
			require.ErrorIs(t, err, hypervisor.ErrUnavailable)
			require.NoError(t, s.Release(l.ctx, nil))
			require.False(t, vm.Active())
			require.Empty(t, vm.Checkpoints(), "no checkpoint that no restore point knows")
			l.clean(vm)
		})
	}
}

func TestLiveClassification(t *testing.T) {
	l := newLab(t)
	vm := l.VM(t, kvmlab.Spec{MACs: []string{"52:54:00:aa:bb:01"}, Disks: []kvmlab.Disk{
		{Size: 2 * mib},
		{Size: mib, Format: kvmlab.Raw, Shareable: true},
		{Size: mib, ReadOnly: true},
		{Device: "cdrom"},
	}})
	got, err := l.d.VM(l.ctx, id(vm))
	require.NoError(t, err)
	require.Equal(t, vm.Name, got.Name)
	require.Equal(t, hypervisor.Paused, got.Power)
	require.Equal(t, int64(64*mib), got.Hardware.MemoryBytes)
	require.Equal(t, 1, got.Hardware.CPUs)
	require.Len(t, got.NICs, 1)
	require.Equal(t, "52:54:00:aa:bb:01", got.NICs[0].MAC)
	reasons := map[hypervisor.Reason]int{}
	for _, d := range got.Disks {
		reasons[d.Reason]++
		require.Equal(t, d.Reason == "", d.Snapshottable)
	}
	require.Equal(t, map[hypervisor.Reason]int{
		"": 1, hypervisor.ReasonShared: 1, hypervisor.ReasonReadOnly: 1, hypervisor.ReasonCDROM: 1,
	}, reasons)
	l.full(vm) // the job leaves the others alone
}

func TestLiveOfflineLevelSurvivesBackups(t *testing.T) {
	l := newLab(t)
	vm := l.twoDisks(kvmlab.Paused)
	require.True(t, l.d.shutDown1(l.ctx, vm.UUID())) // a clean end, as libvirt sees it
	for range 4 {
		s := l.snap(vm, &hypervisor.SnapshotOptions{MinConsistency: hypervisor.FilesystemConsistent})
		require.Equal(t, hypervisor.ApplicationConsistent, s.Consistency().Level)
		require.Equal(t, "offline", s.Consistency().Means)
		require.NoError(t, s.Release(l.ctx, nil))
	}
	vm.Start(kvmlab.Paused)
	vm.Destroy()
	_, err := l.d.CreateSnapshot(l.ctx, id(vm), &hypervisor.SnapshotOptions{MinConsistency: hypervisor.FilesystemConsistent})
	require.ErrorIs(t, err, hypervisor.ErrQuiesce)
	require.False(t, vm.Active())
	l.clean(vm)
}

func TestLiveCancelledCreateLeavesNothing(t *testing.T) {
	l := newLab(t)
	vm := l.twoDisks(kvmlab.Off)
	ctx, cancel := context.WithTimeout(l.ctx, 300*time.Millisecond)
	defer cancel()
	s, err := l.d.CreateSnapshot(ctx, id(vm), nil)
	if err == nil {
		require.NoError(t, s.Release(l.ctx, nil))
		t.Skip("the machine was faster than the deadline")
	}
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.False(t, vm.Active())
	require.Empty(t, vm.Checkpoints())
	l.clean(vm)
}
