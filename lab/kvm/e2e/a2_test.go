//go:build linux

package e2e

import (
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

const mib = 1 << 20

// TestA2RunningVM backs up a running VM under writes, in full and incrementally,
// and compares both points with the truth.
func TestA2RunningVM(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	sizes := map[string]int64{"vda": 512*mib + 3*512, "vdb": 96*mib - 512}
	vm := r.lab.VM(t, kvmlab.Spec{Name: "a2", Power: kvmlab.Running, Disks: []kvmlab.Disk{
		{Size: sizes["vda"], Data: []kvmlab.Range{{Off: 0, Len: 300 * mib}, {Off: 400 * mib, Len: 112 * mib}}, Seed: 1},
		{Size: sizes["vdb"], Data: []kvmlab.Range{{Off: 5 * mib, Len: 70 * mib}}, Seed: 2},
	}})
	for disk, size := range sizes {
		vm.Write(disk, size-512, 512, 0xE1) // the last sector
	}

	truth := r.truth(vm, "vda", "vdb")
	full := r.underWrites(vm, "vda", 400*mib, 112*mib, 0x51)
	require.Equal(t, map[string]string{"vda": "full first", "vdb": "full first"}, full.modes())
	r.same(full.Point, truth)

	for i := range 12 {
		off := r.rnd.Int64N(sizes["vda"]/512-200) * 512
		vm.Write("vda", off, 512*(1+r.rnd.Int64N(160)), byte(0x60+i))
	}
	vm.Write("vda", 64*mib, 64*mib, 0x61)
	vm.Write("vda", 400*mib, 112*mib, 0x62)
	vm.Write("vda", 128*mib, 170*mib, 0x63)
	vm.Discard("vda", 30*mib, 3*mib)
	vm.WriteZero("vdb", 20*mib+65536, mib)
	vm.Discard("vdb", 60*mib, 512*1024)
	vm.Write("vdb", sizes["vdb"]-1024, 1024, 0xE2)
	vm.Write("vda", sizes["vda"]-512, 512, 0xE3)
	truth = r.truth(vm, "vda", "vdb")
	inc := r.underWrites(vm, "vda", 400*mib, 112*mib, 0x52)
	require.Equal(t, map[string]string{"vda": "incremental changed-blocks", "vdb": "incremental changed-blocks"}, inc.modes())
	r.same(inc.Point, truth)
	r.same(full.Point, map[string]string{}) // the first point still restores

	name := r.lab.Name("copy")
	r.must("restore", "--repo", r.repo, "--point", inc.Point, "--to", r.lab.URI, "--name", name, "--storage", r.lab.Dir)
	for disk, want := range truth {
		sameFile(t, want, r.rawOf(name, disk))
	}
	require.Len(t, vm.Checkpoints(), 1)
	require.False(t, vm.JobActive())
}

// truth takes the content of disks with tools that are not ours.
func (r *rig) truth(vm *kvmlab.VM, disks ...string) map[string]string {
	r.t.Helper()
	out := map[string]string{}
	for _, d := range disks {
		out[d] = vm.Truth(d).Path
	}
	return out
}

// rawOf converts a disk of a domain that is off to a raw file.
func (r *rig) rawOf(domain, disk string) string {
	r.t.Helper()
	text, err := r.lab.Virsh("dumpxml", domain)
	require.NoError(r.t, err)
	var dom struct {
		Disks []struct {
			Driver struct {
				Type string `xml:"type,attr"`
			} `xml:"driver"`
			Source struct {
				File string `xml:"file,attr"`
			} `xml:"source"`
			Target struct {
				Dev string `xml:"dev,attr"`
			} `xml:"target"`
		} `xml:"devices>disk"`
	}
	require.NoError(r.t, xml.Unmarshal([]byte(text), &dom))
	out := fmt.Sprintf("%s/%s-%s.raw", r.lab.Dir, domain, disk)
	for _, d := range dom.Disks {
		if d.Target.Dev == disk {
			_, err = kvmlab.ImageTruth(d.Source.File, d.Driver.Type, out)
			require.NoError(r.t, err)
			return out
		}
	}
	require.Fail(r.t, "domain has no disk", "%s %s", domain, disk)
	return ""
}

// underWrites backs up while a writer overwrites n bytes from off of a disk, twice:
// at the moment of the snapshot, when the command is made to stand still, so that
// none of these blocks was read before, and again while it reads on. Data below off
// must be more than notRead bytes.
func (r *rig) underWrites(vm *kvmlab.VM, disk string, off, n int64, pattern byte) *backupLine {
	r.t.Helper()
	const notRead = 200 * mib
	var wg sync.WaitGroup
	var once sync.Once
	var read int64
	var failed error
	p := r.start(func(p *proc, e event) {
		if e.Event != "stage" || e.Stage != "snapshot" || e.State != "exit" {
			return
		}
		once.Do(func() {
			failed = p.cmd.Process.Signal(syscall.SIGSTOP)
			wg.Go(func() {
				var err error
				read, err = readBytes(p.cmd.Process.Pid)
				err = errors.Join(err, vm.TryWrite(kvmlab.WriteOp{Disk: disk, Off: off, Len: n, Pattern: pattern}),
					p.cmd.Process.Signal(syscall.SIGCONT))
				for at := off + n; at > off && err == nil; at -= 16 * mib { // against the reader
					begin := max(off, at-16*mib)
					err = vm.TryWrite(kvmlab.WriteOp{Disk: disk, Off: begin, Len: at - begin, Pattern: pattern + 0x80})
				}
				failed = errors.Join(failed, err)
			})
		})
	}, r.backupArgs(vm.Name)...)
	o := p.wait()
	wg.Wait()
	require.NoError(r.t, failed)
	require.Zero(r.t, o.code, "%s", o)
	require.Less(r.t, read, int64(notRead), "the command had read less than what lies below the blocks that were overwritten")
	require.GreaterOrEqual(r.t, n/mib, int64(100), "blocks overwritten before they were read")
	l := line(r.t, o)
	require.Equal(r.t, "success", l.Status, "%s", o)
	return l
}

// TestA2ReadBytes compares what an incremental says it read with what the process
// read from its sockets.
func TestA2ReadBytes(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	vm := r.lab.VM(t, kvmlab.Spec{Name: "a2r", Disks: []kvmlab.Disk{{Size: 200*mib + 512, Data: []kvmlab.Range{{Len: 150 * mib}}, Seed: 3}}})
	r.backup(vm.Name)
	idle, idleChars := r.counted(vm.Name, "--audit", "off")
	require.Zero(t, idle.read())
	require.Zero(t, idle.audited())
	const touched = 24
	for i := range int64(touched) {
		vm.Write("vda", 5*mib*i+100*512, 65536, byte(i+1))
	}
	busy, chars := r.counted(vm.Name, "--audit", "off")
	require.LessOrEqual(t, busy.read(), int64(touched*mib))
	require.Positive(t, busy.read())
	read := float64(chars - idleChars)
	require.InEpsilon(t, read, float64(busy.read()), 0.10, "read_bytes against read(2)")

	// An audit reads a sample of what did not change, and says so elsewhere.
	audited, chars := r.counted(vm.Name)
	require.Zero(t, audited.read())
	require.Positive(t, audited.audited())
	require.LessOrEqual(t, audited.audited(), int64(200*mib+512)/20)
	require.LessOrEqual(t, chars-idleChars, audited.audited()+mib, "audited_bytes against read(2); holes are not sent")
	require.Greater(t, chars-idleChars, audited.audited()/4)
}

// counted backs up and returns how many bytes the process had read with system
// calls when the transfer ended.
func (r *rig) counted(vm string, more ...string) (*backupLine, int64) {
	r.t.Helper()
	var chars int64
	p := r.start(func(p *proc, e event) {
		if e.Event == "stage" && e.Stage == "transfer" && e.State == "exit" {
			chars, _ = readBytes(p.cmd.Process.Pid) // zero is found below
		}
	}, r.backupArgs(vm, more...)...)
	o := p.wait()
	require.Zero(r.t, o.code, "%s", o)
	require.Positive(r.t, chars)
	return line(r.t, o), chars
}

// readBytes returns how many bytes a process has read with system calls, from files
// and sockets.
func readBytes(pid int) (n int64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err == nil {
		_, err = fmt.Sscanf(string(b), "rchar: %d", &n)
	}
	return n, err
}
