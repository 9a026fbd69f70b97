package fakes

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// Hypervisor is one connection to a World. It is safe for concurrent use.
type Hypervisor struct {
	world  *World
	closed atomic.Bool
}

var (
	_ hypervisor.Target = (*Hypervisor)(nil)
	_ hypervisor.Thawer = (*Hypervisor)(nil)
)

// World returns the platform behind this connection.
func (h *Hypervisor) World() *World { return h.world }

// Info implements hypervisor.Hypervisor.
func (h *Hypervisor) Info() hypervisor.Info {
	o := &h.world.opts
	caps := hypervisor.Capabilities{
		ChangeTracking: !o.NoTracking, AtomicDisks: !o.NonAtomicDisks, RandomRead: !o.Sequential,
		RandomWrite: o.RandomWrite, Baselines: !o.NoBaselines && !o.NoTracking,
		MaxConsistency: hypervisor.ApplicationConsistent,
	}
	if o.NoQuiesce {
		caps.MaxConsistency = hypervisor.CrashConsistent
	}
	return hypervisor.Info{
		Platform: hypervisor.Fake, Product: o.Product, Version: "1", Endpoint: o.Endpoint,
		Transport: "memory", Capabilities: caps,
	}
}

// fail wraps an error as the contract asks.
func fail(op string, vm hypervisor.VMID, disk hypervisor.DiskID, err error) error {
	return &hypervisor.Error{Op: op, Platform: hypervisor.Fake, VM: vm, Disk: disk, Err: err}
}

// hinted is fail with the next step for a person.
func hinted(op string, vm hypervisor.VMID, disk hypervisor.DiskID, err error, hint string) error {
	return &hypervisor.Error{Op: op, Platform: hypervisor.Fake, VM: vm, Disk: disk, Err: err, Hint: hint}
}

// begin reports a call and refuses it on a dead context or connection.
func (h *Hypervisor) begin(ctx context.Context, c Call) error {
	h.world.report(c)
	if err := ctx.Err(); err != nil {
		return fail(string(c.Op), c.VM, c.Disk, err)
	}
	if h.closed.Load() {
		return fail(string(c.Op), c.VM, c.Disk, fmt.Errorf("%w: %w", hypervisor.ErrUnavailable, errClosed))
	}
	return nil
}

// VMs implements hypervisor.Hypervisor.
func (h *Hypervisor) VMs(ctx context.Context, q hypervisor.Query) iter.Seq2[*hypervisor.VM, error] {
	return func(yield func(*hypervisor.VM, error) bool) {
		if err := h.begin(ctx, Call{Op: OpVMs, Name: q.Name}); err != nil {
			yield(nil, err)
			return
		}
		for _, vm := range h.world.list(q) {
			if err := ctx.Err(); err != nil {
				yield(nil, fail("VMs", "", "", err))
				return
			}
			if !yield(vm, nil) {
				return
			}
		}
	}
}

func (w *World) list(q hypervisor.Query) []*hypervisor.VM {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []*hypervisor.VM
	for _, v := range w.sorted() {
		if (q.Name == "" || v.cfg.Name == q.Name) &&
			(q.UUID == "" || strings.EqualFold(v.cfg.UUID, q.UUID)) &&
			(q.Owner == "" || strings.HasPrefix(v.owner, q.Owner)) {
			out = append(out, w.definition(v))
		}
	}
	return out
}

// sorted returns the VMs in the order in which they were made.
func (w *World) sorted() []*vmState {
	return slices.SortedFunc(maps.Values(w.vms), func(a, b *vmState) int {
		return cmp.Or(cmp.Compare(len(a.id), len(b.id)), cmp.Compare(a.id, b.id))
	})
}

// VM implements hypervisor.Hypervisor.
func (h *Hypervisor) VM(ctx context.Context, id hypervisor.VMID) (*hypervisor.VM, error) {
	if err := h.begin(ctx, Call{Op: OpVM, VM: id}); err != nil {
		return nil, err
	}
	w := h.world
	w.mu.Lock()
	defer w.mu.Unlock()
	v, _, err := w.find(id, "")
	if err != nil {
		return nil, fail("VM", id, "", err)
	}
	return w.definition(v), nil
}

// Close implements hypervisor.Hypervisor. Readers and writers of the connection
// fail afterwards, as they do when its process dies.
func (h *Hypervisor) Close() error {
	h.world.report(Call{Op: OpClose})
	if h.closed.Swap(true) {
		return nil
	}
	w := h.world
	w.mu.Lock()
	defer w.mu.Unlock()
	for x := range w.open {
		if x.conn == h {
			w.drop(x)
		}
	}
	return nil
}

// Thaw implements hypervisor.Thawer.
func (h *Hypervisor) Thaw(ctx context.Context, id hypervisor.VMID) error {
	if err := h.begin(ctx, Call{Op: OpThaw, VM: id}); err != nil {
		return err
	}
	w := h.world
	w.mu.Lock()
	_, _, err := w.find(id, "")
	w.mu.Unlock()
	if err != nil {
		return fail("Thaw", id, "", err)
	}
	if err := w.thaw(id); err != nil {
		return fail("Thaw", id, "", err)
	}
	return nil
}
