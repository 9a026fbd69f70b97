package kvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/hypervisor/hypervisortest"
	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

// guestWriter writes bytes to disks of a VM as its guest would, through the
// monitor.
type guestWriter struct {
	l  *lab
	vm *kvmlab.VM
	mu sync.Mutex
	n  int
}

func (g *guestWriter) write(disk hypervisor.DiskID, p []byte, off int64) error {
	g.mu.Lock()
	g.n++
	file := filepath.Join(g.l.Dir, fmt.Sprintf("write-%d", g.n))
	g.mu.Unlock()
	if err := os.WriteFile(file, p, 0o600); err != nil {
		return err
	}
	defer os.Remove(file) //nolint:errcheck // the lab's directory goes anyway
	_, err := g.l.Virsh("qemu-monitor-command", g.vm.Name, "--hmp", fmt.Sprintf(
		`qemu-io -d /machine/peripheral/virtio-disk%d/virtio-backend "write -s %s %d %d"`, disk[2]-'a', file, off, len(p)))
	return err
}

func (g *guestWriter) op(kind kvmlab.WriteKind) func(hypervisor.DiskID, int64, int64) error {
	return func(disk hypervisor.DiskID, off, n int64) error {
		return g.vm.TryWrite(kvmlab.WriteOp{Disk: string(disk), Off: off, Len: n, Kind: kind})
	}
}

// leftovers lists what is left of ours, apart from baselines.
func (l *lab) leftovers(vms ...*kvmlab.VM) ([]string, error) {
	all, err := l.Leftovers(vms, l.cfg.ScratchDir, l.cfg.StorageDir)
	var out []string
	for _, x := range all {
		// Sockets of other programs on this host are listed too.
		if x.Kind != kvmlab.LeftCheckpoint && (x.Kind != kvmlab.LeftSocket || strings.HasPrefix(x.ID, l.Dir)) {
			out = append(out, x.String())
		}
	}
	for _, vm := range vms {
		text, xerr := l.Virsh("dumpxml", vm.Name)
		err = errors.Join(err, xerr)
		if strings.Contains(text, metadataURI) {
			out = append(out, "notes in "+vm.Name+": "+text[:strings.Index(text, "<memory")])
		}
	}
	return out, err
}

// ownView hides the VMs of other tests on the same daemon, which come and go.
type ownView struct {
	*Driver
	prefix string
}

func (v ownView) VMs(ctx context.Context, q hypervisor.Query) iter.Seq2[*hypervisor.VM, error] {
	return func(yield func(*hypervisor.VM, error) bool) {
		for vm, err := range v.Driver.VMs(ctx, q) {
			if err == nil && !strings.HasPrefix(vm.Name, v.prefix) {
				continue
			}
			if !yield(vm, err) {
				return
			}
		}
	}
}

// harness is what is common to all runs of the suite on one VM.
func (l *lab) harness(vm, other *kvmlab.VM) *hypervisortest.Harness {
	g := &guestWriter{l: l, vm: vm}
	return &hypervisortest.Harness{
		Hypervisor: ownView{l.d, l.Prefix()}, VM: id(vm), OtherVM: id(other),
		GuestWrite: g.write, Discard: g.op(kvmlab.Discard), Zero: g.op(kvmlab.Zero),
		Truth: func(disk hypervisor.DiskID) (io.ReaderAt, error) {
			tr, err := vm.TryTruth(string(disk))
			if err != nil {
				return nil, err
			}
			b, err := os.ReadFile(tr.Path)
			return bytes.NewReader(b), errors.Join(err, os.Remove(tr.Path))
		},
		Reconnect: func() (hypervisor.Hypervisor, error) {
			d, err := Open(l.ctx, l.cfg)
			return ownView{d, l.Prefix()}, err
		},
		Leftovers: func() ([]string, error) { return l.leftovers(vm, other) },
		EditSpec:  func(s *hypervisor.VMSpec) { s.Name = l.Name(s.Name) },
	}
}

// TestLiveConformance runs the suite for drivers on a real libvirtd and QEMU.
func TestLiveConformance(t *testing.T) {
	l := newLab(t)
	small := kvmlab.NewSmallFS(t, 64*mib)
	vm := l.VM(t, kvmlab.Spec{UEFI: true, MemoryMiB: 64, Disks: []kvmlab.Disk{
		{Size: 8*mib + 512, Data: []kvmlab.Range{{Off: 0, Len: 300 << 10}, {Off: 5 * mib, Len: mib}}, Seed: 1},
		{Size: 4*mib + 4096, Data: []kvmlab.Range{{Off: 4 * mib, Len: 4096}}, Seed: 2},
		{Size: mib + 512, Format: kvmlab.Raw, Data: []kvmlab.Range{{Off: 0, Len: 8192}}, Seed: 3},
		{Size: mib, Shareable: true, Format: kvmlab.Raw},
	}})
	other := l.VM(t, kvmlab.Spec{Disks: []kvmlab.Disk{{Size: 2 * mib}}})
	hypervisortest.Run(t, func(hypervisortest.T) *hypervisortest.Harness {
		h := l.harness(vm, other)
		h.SmallStorage = small.Dir
		h.AddForeignSnapshot = func() (check, remove func() error, err error) {
			const name = "other-product"
			vm.ForeignCheckpoint(name, "vda", "vdb")
			check = func() error {
				if !slices.Contains(vm.Checkpoints(), name) {
					return errors.New("the foreign checkpoint is gone")
				}
				return nil
			}
			return check, func() error { vm.DeleteCheckpoint(name); return nil }, nil
		}
		return h
	})
	require.Empty(t, vm.Checkpoints())
}
