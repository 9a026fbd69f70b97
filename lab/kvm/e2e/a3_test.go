//go:build linux

package e2e

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

const (
	inc = "incremental changed-blocks"
)

// TestA3Changes has a history for each thing that can happen to a VM between two
// backups: the mode and reason of every disk, identical bytes, nothing foreign
// touched.
func TestA3Changes(t *testing.T) {
	two := []kvmlab.Disk{
		{Size: 48*mib + 512, Data: []kvmlab.Range{{Len: 8 * mib}}, Seed: 1},
		{Size: 16*mib - 512, Data: []kvmlab.Range{{Len: 3 * mib}}, Seed: 2},
	}
	for name, c := range map[string]struct {
		disks  []kvmlab.Disk
		power  kvmlab.Power
		change func(r *rig, vm *kvmlab.VM)
		want   map[string]string // of the second backup
		third  map[string]string // of the one after it; nil: all incremental
		check  func(r *rig, vm *kvmlab.VM)
	}{
		"paused":  {disks: two, want: map[string]string{"vda": inc, "vdb": inc}},
		"running": {disks: two, power: kvmlab.Running, want: map[string]string{"vda": inc, "vdb": inc}},
		"offline": {
			disks: two, power: kvmlab.Off, want: map[string]string{"vda": inc, "vdb": inc},
			check: func(r *rig, vm *kvmlab.VM) { require.Equal(r.t, "shut off", vm.State()) },
		},
		"QEMU killed": {
			disks: two,
			change: func(r *rig, vm *kvmlab.VM) {
				vm.KillQEMU()
				vm.Start(kvmlab.Paused)
			},
			// QEMU never stopped in order since the baseline: its bitmaps were never
			// written into the images, and libvirt calls them missing or broken.
			want: map[string]string{"vda": "full tracking-inconsistent", "vdb": "full tracking-inconsistent"},
		},
		"QEMU killed after an orderly stop": {
			disks: two,
			change: func(r *rig, vm *kvmlab.VM) {
				vm.Destroy()
				vm.Start(kvmlab.Paused)
				vm.KillQEMU()
				vm.Start(kvmlab.Paused)
			},
			want: map[string]string{"vda": "full tracking-inconsistent", "vdb": "full tracking-inconsistent"},
		},
		"disk added": {
			disks: two,
			change: func(r *rig, vm *kvmlab.VM) {
				vm.AttachDisk(kvmlab.Disk{Size: 5 * mib, Data: []kvmlab.Range{{Len: mib}}, Seed: 9})
			},
			want: map[string]string{"vda": inc, "vdb": inc, "vdc": "full disk-added"},
		},
		"disk grown": {
			disks:  two,
			change: func(r *rig, vm *kvmlab.VM) { vm.Resize("vdb", 24*mib+512) },
			want:   map[string]string{"vda": inc, "vdb": "full disk-resized"},
		},
		"disk replaced": {
			disks: two,
			change: func(r *rig, vm *kvmlab.VM) {
				vm.ReplaceDisk("vdb", kvmlab.Disk{Size: 16*mib - 512, Data: []kvmlab.Range{{Len: 2 * mib}}, Seed: 7})
			},
			want: map[string]string{"vda": inc, "vdb": "full disk-replaced"},
		},
		"redefined": {
			disks: two,
			change: func(r *rig, vm *kvmlab.VM) {
				vm.Undefine()
				vm.Redefine()
				vm.Start(kvmlab.Paused)
			},
			want: map[string]string{"vda": inc, "vdb": inc},
		},
		"raw disk": {
			disks: []kvmlab.Disk{two[0], {Size: 9 * mib, Format: kvmlab.Raw, Data: []kvmlab.Range{{Len: 4 * mib}}, Seed: 5}},
			want:  map[string]string{"vda": inc, "vdb": "full never-tracked"},
			third: map[string]string{"vda": inc, "vdb": "full never-tracked"},
		},
		"block device": {
			disks: []kvmlab.Disk{two[0], {Size: 9 * mib, Format: kvmlab.LoopRaw, Data: []kvmlab.Range{{Len: 4 * mib}}, Seed: 5}},
			want:  map[string]string{"vda": inc, "vdb": "full never-tracked"},
			third: map[string]string{"vda": inc, "vdb": "full never-tracked"},
		},
		"external snapshot": {
			disks:  two,
			change: func(r *rig, vm *kvmlab.VM) { vm.ExternalSnapshot("theirs", "vda", "vdb") },
			want:   map[string]string{"vda": inc, "vdb": inc},
			check:  func(r *rig, vm *kvmlab.VM) { require.Equal(r.t, []string{"theirs"}, vm.Snapshots()) },
		},
		"foreign checkpoint": {
			disks:  two,
			change: func(r *rig, vm *kvmlab.VM) { vm.ForeignCheckpoint("theirs", "vda", "vdb") },
			want:   map[string]string{"vda": inc, "vdb": inc},
			check:  func(r *rig, vm *kvmlab.VM) { require.Contains(r.t, vm.Checkpoints(), "theirs") },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			vm := r.lab.VM(t, kvmlab.Spec{Name: "a3", Power: c.power, Disks: c.disks})
			r.scribble(vm, c.power, "vda", "vdb")
			truth := r.truth(vm, keys(c.disks)...)
			first := r.backup(vm.Name)
			r.same(first.Point, truth)

			r.scribble(vm, c.power, "vda", "vdb")
			if c.change != nil {
				c.change(r, vm)
			}
			var disks []string
			for d := range c.want {
				disks = append(disks, d)
			}
			r.scribble(vm, c.power, disks...)
			truth = r.truth(vm, disks...)
			second := r.backup(vm.Name)
			require.Equal(t, c.want, second.modes())
			r.same(second.Point, truth)

			r.scribble(vm, c.power, disks...)
			truth = r.truth(vm, disks...)
			third := r.backup(vm.Name)
			want := c.third
			if want == nil {
				want = map[string]string{}
				for d := range c.want {
					want[d] = inc
				}
			}
			require.Equal(t, want, third.modes())
			r.same(third.Point, truth)
			if c.check != nil {
				c.check(r, vm)
			}
			r.nothingLeft(vm)
		})
	}
}

func keys(disks []kvmlab.Disk) []string {
	return []string{"vda", "vdb", "vdc"}[:len(disks)]
}

// scribble writes to disks as a guest would, when there is one that runs.
func (r *rig) scribble(vm *kvmlab.VM, power kvmlab.Power, disks ...string) {
	r.t.Helper()
	if power == kvmlab.Off {
		return
	}
	for _, d := range disks {
		for range 3 {
			vm.Write(d, r.rnd.Int64N(4*mib/512)*512, 512*(1+r.rnd.Int64N(300)), byte(1+r.rnd.IntN(255)))
		}
		vm.Discard(d, 65536*r.rnd.Int64N(16), 65536)
	}
}

// nothingLeft wants one declared baseline per VM and repository at most, and
// nothing else of ours.
func (r *rig) nothingLeft(vms ...*kvmlab.VM) {
	r.t.Helper()
	left, err := r.lab.Leftovers(vms, r.scratch())
	require.NoError(r.t, err)
	ours := map[string]int{}
	for _, l := range left {
		if l.Kind != kvmlab.LeftCheckpoint {
			r.t.Errorf("left over: %s", l)
		} else if n, err := hypervisor.ParseName(l.ID); err == nil {
			ours[l.Domain+" "+n.Repo]++
		}
	}
	for vm, n := range ours {
		require.Equal(r.t, 1, n, "checkpoints of one repository on %s", vm)
	}
}

// TestA3SecondBackup starts a backup while one of the same VM runs.
func TestA3SecondBackup(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	vm := r.lab.VM(t, kvmlab.Spec{Name: "a3b", Disks: []kvmlab.Disk{{Size: 256 * mib, Data: []kvmlab.Range{{Len: 200 * mib}}, Seed: 1}}})
	truth := r.truth(vm, "vda")
	var second *outcome
	var took time.Duration
	var once sync.Once
	p := r.start(func(_ *proc, e event) {
		if e.Event == "stage" && e.Stage == "snapshot" && e.State == "exit" {
			once.Do(func() {
				begin := time.Now()
				second = r.run(r.backupArgs(vm.Name)...)
				took = time.Since(begin)
			})
		}
	}, r.backupArgs(vm.Name)...)
	o := p.wait()
	require.Zero(t, o.code, "%s", o)
	require.NotNil(t, second)
	require.Equal(t, 1, second.code, "%s", second)
	l := line(t, second)
	require.Equal(t, "failed", l.Status)
	require.NotNil(t, l.Error)
	require.NotEmpty(t, l.Error.Hint)
	t.Logf("refused after %v: %s", took, l.Error.Message)
	r.same(line(t, o).Point, truth)
	r.nothingLeft(vm)
}

// TestA3ScratchFilled has a neighbour fill the scratch file system in mid-transfer
// while the guest writes: the job is aborted with room left, and every guest write
// is on the source.
func TestA3ScratchFilled(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	vm := r.lab.VM(t, kvmlab.Spec{Name: "a3s", Disks: []kvmlab.Disk{{Size: 600 * mib, Data: []kvmlab.Range{{Len: 600 * mib}}, Seed: 1}}})
	fs := kvmlab.NewSmallFS(t, 900*mib)
	var wg sync.WaitGroup
	var once sync.Once
	var failed error
	var lowest int64
	args := []string{"backup", "--from", r.lab.URI, "--repo", r.repo, "--scratch-dir", fs.Dir, "--json", "--events", vm.Name}
	p := r.start(func(p *proc, e event) {
		if e.Event != "stage" || e.Stage != "snapshot" || e.State != "exit" {
			return
		}
		once.Do(func() {
			// The command waits, so that filling does not race with its end.
			failed = errors.Join(p.cmd.Process.Signal(syscall.SIGSTOP),
				fs.TryFill(24*mib), p.cmd.Process.Signal(syscall.SIGCONT))
			wg.Go(func() {
				for i := range int64(20) {
					op := kvmlab.WriteOp{Disk: "vda", Off: 400*mib + i*mib, Len: 65536, Pattern: byte(i + 1)}
					if err := vm.TryWrite(op); err != nil && failed == nil {
						failed = err
					}
					if n, err := fs.TryFree(); err == nil && (lowest == 0 || n < lowest) {
						lowest = n
					}
				}
			})
		})
	}, args...)
	o := p.wait()
	wg.Wait()
	require.NoError(t, failed, "every guest write is answered")
	require.Equal(t, 1, o.code, "%s", o)
	l := line(t, o)
	require.Equal(t, "failed", l.Status)
	require.Contains(t, l.Error.Message, "scratch")
	require.Positive(t, lowest, "room was left all the time")
	got, err := os.Open(vm.Truth("vda").Path)
	require.NoError(t, err)
	defer got.Close()
	for i := range int64(20) {
		var b [65536]byte
		_, err := got.ReadAt(b[:], 400*mib+i*mib)
		require.NoError(t, err)
		require.Equal(t, byte(i+1), b[0], "guest write %d is on the disk", i)
		require.Equal(t, byte(i+1), b[65535], "guest write %d is on the disk", i)
	}
	fs.Release()
	require.False(t, vm.JobActive())
	truth := r.truth(vm, "vda")
	next := r.backup(vm.Name)
	r.same(next.Point, truth)
	r.nothingLeft(vm)
}
