package fakes

import (
	"cmp"
	"fmt"
	"io"
	"slices"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// Kinds of Leftover.
const (
	LeftSnapshot   = "snapshot"
	LeftBaseline   = "baseline"
	LeftIncomplete = "incomplete-vm"
	LeftFrozen     = "frozen-guest"
	LeftReader     = "reader"
	LeftWriter     = "writer"
)

// Leftover is something that Holdfast made on the platform and that is there.
type Leftover struct {
	Kind     string            `json:"kind"`
	ID       string            `json:"id"` // names it for a person
	VM       hypervisor.VMID   `json:"vm"`
	Disk     hypervisor.DiskID `json:"disk,omitempty"`
	Name     string            `json:"name,omitempty"` // owner name
	Baseline bool              `json:"baseline"`       // meant to stay
}

// Leftovers is the census of all that Holdfast has made and not removed:
// unreleased snapshots, retained baselines, incomplete VMs, frozen guests, open
// readers and writers. Complete VMs are results, not leftovers. The order is
// stable.
func (w *World) Leftovers() []Leftover {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []Leftover
	for _, v := range w.vms {
		if v.frozen {
			out = append(out, Leftover{Kind: LeftFrozen, VM: v.id})
		}
		if v.unready {
			out = append(out, Leftover{Kind: LeftIncomplete, VM: v.id, Name: v.owner})
		}
		for name, s := range v.snaps {
			if hypervisor.IsOurs(name) && s.taken {
				out = append(out, Leftover{Kind: LeftSnapshot, VM: v.id, Name: name})
			}
		}
		for _, b := range v.baselines() {
			out = append(out, Leftover{Kind: LeftBaseline, VM: v.id, Disk: b.Disk, Name: b.Name, Baseline: true})
		}
	}
	for x := range w.open {
		out = append(out, Leftover{Kind: x.kind, VM: x.vm, Disk: x.disk})
	}
	for i := range out {
		o := &out[i]
		o.ID = fmt.Sprintf("%s/%s", o.VM, o.Kind)
		for _, part := range []string{string(o.Disk), o.Name} {
			if part != "" {
				o.ID += "/" + part
			}
		}
	}
	slices.SortFunc(out, func(a, b Leftover) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// DiskBytes is the content of a disk at the moment when it was asked for.
type DiskBytes struct{ img *image }

var _ io.ReaderAt = (*DiskBytes)(nil)

// Bytes returns the truth about a disk. Later writes do not change the result.
func (w *World) Bytes(vm hypervisor.VMID, disk hypervisor.DiskID) (*DiskBytes, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, d, err := w.find(vm, disk)
	if err != nil {
		return nil, err
	}
	return &DiskBytes{img: d.img.freeze()}, nil
}

// ReadAt implements io.ReaderAt. It may be called concurrently.
func (b *DiskBytes) ReadAt(p []byte, off int64) (int, error) { return b.img.readAt(p, off) }

// Size is the size of the disk in bytes.
func (b *DiskBytes) Size() int64 { return b.img.size }

// Allocated lists the parts that take space, ascending.
func (b *DiskBytes) Allocated() []hypervisor.Extent { return b.img.allocated() }
