package kvmlab_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

// patternFile writes a raw file of size bytes that is zero but for the ranges.
func patternFile(t *testing.T, size int64, ops ...kvmlab.WriteOp) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "want.raw")
	f, err := os.Create(path)
	require.NoError(t, err)
	require.NoError(t, f.Truncate(size))
	for _, op := range ops {
		_, err := f.WriteAt(bytes.Repeat([]byte{op.Pattern}, int(op.Len)), op.Off)
		require.NoError(t, err)
	}
	require.NoError(t, f.Close())
	return path
}

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
	// oddSize is no multiple of 1 MiB.
	oddSize = 20*mib + 512
)

func TestWritesReachTheTruthInEveryFormat(t *testing.T) {
	t.Parallel()
	formats := map[string]kvmlab.Format{
		"qcow2": kvmlab.Qcow2, "qcow2v2": kvmlab.Qcow2V2, "raw": kvmlab.Raw,
		"loop-raw": kvmlab.LoopRaw, "loop-qcow2": kvmlab.LoopQcow2,
	}
	for name, format := range formats {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lab := kvmlab.Connect(t)
			vm := lab.VM(t, kvmlab.Spec{Disks: []kvmlab.Disk{{Size: oddSize, Format: format}}})
			writes := []kvmlab.WriteOp{
				{Disk: "vda", Off: 0, Len: 512, Pattern: 0x11},
				{Disk: "vda", Off: 5*mib + 100*512, Len: 70 * kib, Pattern: 0x22},
				{Disk: "vda", Off: oddSize - 512, Len: 512, Pattern: 0x33},
			}
			require.NoError(t, vm.TryWrite(writes...))
			want := patternFile(t, oddSize, writes...)
			tr := vm.Truth("vda")
			require.Equal(t, oddSize, tr.Size)
			require.NoError(t, tr.CompareRaw(want), "paused")

			vm.WriteZero("vda", 5*mib+100*512, 64*kib)
			writes[1].Off, writes[1].Len = 5*mib+100*512+64*kib, 6*kib
			want = patternFile(t, oddSize, writes...)
			require.NoError(t, vm.Truth("vda").CompareRaw(want), "zeroed")

			vm.Destroy()
			require.NoError(t, vm.Truth("vda").CompareRaw(want), "off")
		})
	}
}

func TestCompareNamesTheFirstDifference(t *testing.T) {
	t.Parallel()
	a := patternFile(t, 3*mib)
	b := patternFile(t, 3*mib, kvmlab.WriteOp{Off: 2*mib + 7, Len: 1, Pattern: 1})
	off, err := kvmlab.FirstDifference(a, b)
	require.NoError(t, err)
	require.Equal(t, 2*mib+7, off)
	off, err = kvmlab.FirstDifference(a, a)
	require.NoError(t, err)
	require.Equal(t, int64(-1), off)
	short := patternFile(t, 3*mib-1)
	off, err = kvmlab.FirstDifference(a, short)
	require.NoError(t, err)
	require.Equal(t, 3*mib-1, off)
}

func TestFailedWriteIsAnError(t *testing.T) {
	t.Parallel()
	lab := kvmlab.Connect(t)
	vm := lab.VM(t, kvmlab.Spec{Disks: []kvmlab.Disk{{Size: mib}}})
	require.Error(t, vm.TryWrite(kvmlab.WriteOp{Disk: "vda", Off: 4 * mib, Len: 512}), "beyond the end")
	require.Error(t, vm.TryWrite(kvmlab.WriteOp{Disk: "vdb", Off: 0, Len: 512}), "no such disk")
	vm.Destroy()
	require.Error(t, vm.TryWrite(kvmlab.WriteOp{Disk: "vda", Off: 0, Len: 512}), "off")
}

func TestDiscardReadsAsZeroOnQcow2(t *testing.T) {
	t.Parallel()
	lab := kvmlab.Connect(t)
	vm := lab.VM(t, kvmlab.Spec{Disks: []kvmlab.Disk{{Size: oddSize, Data: []kvmlab.Range{{Off: 0, Len: 4 * mib}}, Seed: 1}}})
	vm.Discard("vda", 0, 4*mib)
	require.NoError(t, vm.Truth("vda").CompareRaw(patternFile(t, oddSize)))
}

func TestSeededDataIsTheSameTwice(t *testing.T) {
	t.Parallel()
	lab := kvmlab.Connect(t)
	spec := kvmlab.Disk{Size: oddSize, Data: []kvmlab.Range{{Off: mib, Len: 3*mib + 1}}, Seed: 42}
	raw := spec
	raw.Format = kvmlab.Raw
	vm := lab.VM(t, kvmlab.Spec{Power: kvmlab.Off, Disks: []kvmlab.Disk{spec, raw}})
	a, b := vm.Truth("vda"), vm.Truth("vdb")
	require.NoError(t, a.CompareRaw(b.Path))
	require.Error(t, a.CompareRaw(patternFile(t, oddSize)), "the disk is all zero")
	sumA, err := a.SHA256()
	require.NoError(t, err)
	sumB, err := b.SHA256()
	require.NoError(t, err)
	require.Equal(t, sumA, sumB)
}

func TestKillLosesNothingThatWasFlushed(t *testing.T) {
	t.Parallel()
	lab := kvmlab.Connect(t)
	vm := lab.VM(t, kvmlab.Spec{Disks: []kvmlab.Disk{{Size: oddSize}}})
	op := kvmlab.WriteOp{Disk: "vda", Off: mib, Len: mib, Pattern: 0x44}
	require.NoError(t, vm.TryWrite(op))
	vm.Flush("vda")
	vm.KillQEMU()
	require.Equal(t, "shut off", vm.State())
	vm.Start(kvmlab.Paused)
	require.Equal(t, "paused", vm.State())
	require.NoError(t, vm.Truth("vda").CompareRaw(patternFile(t, oddSize, op)))
}

func TestUndefineAndRedefineKeepIdentity(t *testing.T) {
	t.Parallel()
	lab := kvmlab.Connect(t)
	vm := lab.VM(t, kvmlab.Spec{Disks: []kvmlab.Disk{{Size: oddSize}}, UEFI: true, MACs: []string{"52:54:00:00:00:01"}})
	uuid, nvram := vm.UUID(), vm.NVRAM()
	require.FileExists(t, nvram)
	vm.ForeignCheckpoint("c0", "vda")
	require.Equal(t, []string{"c0"}, vm.Checkpoints())
	vm.Undefine()
	names, err := lab.Domains(vm.Name)
	require.NoError(t, err)
	require.Empty(t, names)
	require.Equal(t, []string{"c0"}, bitmapsOf(t, vm, "vda"), "the bitmap stays in the image")
	require.FileExists(t, nvram)
	vm.Redefine()
	require.Equal(t, uuid, vm.UUID())
	require.Empty(t, vm.Checkpoints())
	vm.Start(kvmlab.Paused)
	require.Equal(t, []string{"c0"}, vm.Bitmaps("vda"), "QEMU has loaded it")
}

// bitmapsOf reads an image's bitmaps while no domain uses it.
func bitmapsOf(t *testing.T, vm *kvmlab.VM, disk string) []string {
	t.Helper()
	names, err := kvmlab.ImageBitmaps(vm.Source(disk))
	require.NoError(t, err)
	return names
}

func TestDisksComeGoAndGrow(t *testing.T) {
	t.Parallel()
	lab := kvmlab.Connect(t)
	vm := lab.VM(t, kvmlab.Spec{Disks: []kvmlab.Disk{{Size: oddSize}}})
	require.Equal(t, "vdb", vm.AttachDisk(kvmlab.Disk{Size: 3 * mib, Format: kvmlab.Raw}), "hot")
	require.Equal(t, "paused", vm.State())
	vm.Write("vdb", 0, 3*mib, 0x55)
	require.NoError(t, vm.Truth("vdb").CompareRaw(patternFile(t, 3*mib, kvmlab.WriteOp{Len: 3 * mib, Pattern: 0x55})))

	vm.Resize("vda", 24*mib)
	vm.Write("vda", 24*mib-512, 512, 0x66)
	require.Equal(t, 24*mib, vm.Truth("vda").Size)
	vm.Resize("vdb", 4*mib)
	require.Equal(t, 4*mib, vm.Truth("vdb").Size)

	before := vm.Source("vda")
	vm.ReplaceDisk("vda", kvmlab.Disk{Size: 2 * mib, Format: kvmlab.LoopRaw})
	require.NotEqual(t, before, vm.Source("vda"))
	require.Equal(t, "paused", vm.State())
	require.NoError(t, vm.Truth("vda").CompareRaw(patternFile(t, 2*mib)))
	vm.Resize("vda", 3*mib)
	require.Equal(t, 3*mib, vm.Truth("vda").Size)

	vm.DetachDisk("vdb")
	require.Error(t, vm.TryWrite(kvmlab.WriteOp{Disk: "vdb", Len: 512}))
	vm.Destroy()
	vm.Resize("vda", 5*mib)
	vm.Start(kvmlab.Paused)
	vm.Write("vda", 5*mib-512, 512, 0x77)
	require.Equal(t, 5*mib, vm.Truth("vda").Size)
}

func TestExternalSnapshotMovesTheTruth(t *testing.T) {
	t.Parallel()
	lab := kvmlab.Connect(t)
	vm := lab.VM(t, kvmlab.Spec{Disks: []kvmlab.Disk{{Size: oddSize}, {Size: mib}}})
	first := kvmlab.WriteOp{Disk: "vda", Off: 0, Len: mib, Pattern: 1}
	require.NoError(t, vm.TryWrite(first))
	base, second := vm.Source("vda"), vm.Source("vdb")
	vm.ExternalSnapshot("s1", "vda")
	require.NotEqual(t, base, vm.Source("vda"))
	require.Equal(t, second, vm.Source("vdb"))
	require.Equal(t, []string{"s1"}, vm.Snapshots())
	then := kvmlab.WriteOp{Disk: "vda", Off: 512 * kib, Len: mib, Pattern: 2}
	require.NoError(t, vm.TryWrite(then))
	require.NoError(t, vm.Truth("vda").CompareRaw(patternFile(t, oddSize, first, then)))
}

func TestTransientMachineAndSpecialDevices(t *testing.T) {
	t.Parallel()
	lab := kvmlab.Connect(t)
	vm := lab.VM(t, kvmlab.Spec{Transient: true, AgentChannel: true, Disks: []kvmlab.Disk{
		{Size: oddSize, Serial: "S-1"},
		{Device: "cdrom"},
		{Device: "cdrom", Size: mib, Format: kvmlab.Raw, ReadOnly: true},
		{Size: mib, Format: kvmlab.Raw, ReadOnly: true},
		{Size: mib, Format: kvmlab.Raw, Shareable: true},
	}})
	require.Equal(t, "paused", vm.State())
	_, err := vm.TryFrozen()
	require.Error(t, err, "nobody is behind the channel")
	vm.Write("vdc", 0, 512, 1)
	require.Error(t, vm.TryWrite(kvmlab.WriteOp{Disk: "vdb", Len: 512, Pattern: 1}), "read-only")
	vm.KillQEMU()
}

func TestCensusFindsWhatABackupLeaves(t *testing.T) {
	t.Parallel()
	lab := kvmlab.Connect(t)
	vm := lab.VM(t, kvmlab.Spec{Disks: []kvmlab.Disk{{Size: oddSize}}})
	dir := filepath.Join(lab.Dir, "work")
	require.NoError(t, os.Mkdir(dir, 0o755))
	found, err := lab.Leftovers([]*kvmlab.VM{vm}, dir)
	require.NoError(t, err)
	require.Empty(t, found)

	job := filepath.Join(lab.Dir, "job.xml")
	sock, scratch := filepath.Join(dir, "n.sock"), filepath.Join(dir, "scratch")
	require.NoError(t, os.WriteFile(job, []byte(`<domainbackup mode='pull'><server transport='unix' socket='`+sock+
		`'/><disks><disk name='vda' backup='yes' type='file'><scratch file='`+scratch+`'/></disk></disks></domainbackup>`), 0o600))
	vm.ForeignCheckpoint("c0", "vda")
	_, err = vm.TryQMP("block-dirty-bitmap-add", map[string]any{"node": formatNode(t, vm), "name": "stray"})
	require.NoError(t, err)
	_, err = lab.Virsh("backup-begin", vm.Name, job)
	require.NoError(t, err)
	require.True(t, vm.JobActive())
	require.NotEmpty(t, vm.BlockJobs())
	vm.Write("vda", 0, mib, 9) // during the job, through copy-before-write

	found, err = lab.Leftovers([]*kvmlab.VM{vm}, dir)
	require.NoError(t, err)
	require.Contains(t, found, kvmlab.Leftover{Kind: kvmlab.LeftJob, Domain: vm.Name, ID: vm.Name})
	require.Contains(t, found, kvmlab.Leftover{Kind: kvmlab.LeftCheckpoint, Domain: vm.Name, ID: "c0"})
	require.Contains(t, found, kvmlab.Leftover{Kind: kvmlab.LeftBitmap, Domain: vm.Name, ID: "vda/stray"})
	require.Contains(t, found, kvmlab.Leftover{Kind: kvmlab.LeftSocket, ID: sock})
	require.Contains(t, found, kvmlab.Leftover{Kind: kvmlab.LeftFile, ID: scratch})

	foreign, err := kvmlab.Connect(t).Leftovers(nil)
	require.NoError(t, err)
	require.Empty(t, foreign, "what one lab does, another's census does not count")
	require.NoError(t, os.Rename(sock, sock+".moved"))
	found, err = lab.Leftovers([]*kvmlab.VM{vm}, dir)
	require.NoError(t, err)
	require.Contains(t, found, kvmlab.Leftover{Kind: kvmlab.LeftSocket, ID: sock}, "listening, without its file")
	require.NoError(t, os.Rename(sock+".moved", sock))

	_, err = lab.Virsh("domjobabort", vm.Name)
	require.NoError(t, err)
	vm.WaitJob(false, 20*time.Second)
	vm.DeleteCheckpoint("c0")
	_, err = vm.TryQMP("block-dirty-bitmap-remove", map[string]any{"node": formatNode(t, vm), "name": "stray"})
	require.NoError(t, err)
	other, err := exec.Command("virsh", "-q", "-c", lab.URI, "dumpxml", vm.Name).Output()
	require.NoError(t, err)
	require.NotEmpty(t, other)
	found, err = lab.Leftovers([]*kvmlab.VM{vm}, dir)
	require.NoError(t, err)
	require.Empty(t, found, "after cleaning up")

	found, err = lab.Leftovers(nil, dir)
	require.NoError(t, err)
	require.Equal(t, []kvmlab.Leftover{{Kind: kvmlab.LeftDomain, Domain: vm.Name, ID: vm.Name}}, found,
		"a domain that the caller does not know")
}

// formatNode returns the node name of the qcow2 layer of vda.
func formatNode(t *testing.T, vm *kvmlab.VM) string {
	t.Helper()
	node, err := vm.FormatNode("vda")
	require.NoError(t, err)
	return node
}

func TestCleanupRemovesEverythingOfTheLab(t *testing.T) {
	t.Parallel()
	outer := kvmlab.Connect(t)
	stays := outer.VM(t, kvmlab.Spec{Power: kvmlab.Off})
	var prefix, dir string
	t.Run("inner", func(t *testing.T) {
		lab := kvmlab.Connect(t)
		prefix, dir = lab.Prefix(), lab.Dir
		vm := lab.VM(t, kvmlab.Spec{UEFI: true, Power: kvmlab.Running, Disks: []kvmlab.Disk{{Size: mib}, {Size: mib, Format: kvmlab.LoopRaw}}})
		vm.ForeignCheckpoint("c0", "vda")
		vm.ExternalSnapshot("s0", "vda")
	})
	names, err := outer.Domains(prefix)
	require.NoError(t, err)
	require.Empty(t, names)
	require.NoDirExists(t, dir)
	out, err := exec.Command("losetup", "-a").CombinedOutput()
	require.NoError(t, err, string(out))
	require.NotContains(t, string(out), dir)
	nvram, err := filepath.Glob("/var/lib/libvirt/qemu/nvram/" + prefix + "*")
	require.NoError(t, err)
	require.Empty(t, nvram)
	require.Equal(t, "shut off", stays.State(), "another lab's domain")
}

func TestSmallFileSystemFillsUp(t *testing.T) {
	t.Parallel()
	kvmlab.Connect(t)
	f := kvmlab.NewSmallFS(t, 4*mib)
	require.LessOrEqual(t, f.Free(), 4*mib)
	require.NoError(t, f.TryFill(mib))
	require.LessOrEqual(t, f.Free(), mib)
	require.Error(t, os.WriteFile(filepath.Join(f.Dir, "x"), make([]byte, 2*mib), 0o600))
	require.NoError(t, os.Remove(filepath.Join(f.Dir, "x")))
	f.Release()
	require.NoError(t, os.WriteFile(filepath.Join(f.Dir, "x"), make([]byte, 2*mib), 0o600))
	f.ReadOnly(true)
	require.Error(t, os.WriteFile(filepath.Join(f.Dir, "y"), []byte{1}, 0o600))
	f.ReadOnly(false)
}
