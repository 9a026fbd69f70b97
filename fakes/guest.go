package fakes

import (
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// errFreeze is what a guest that fails to freeze says.
var errFreeze = errors.New("the guest agent reported an error: freeze failed")

// GuestWrite stores p at a byte offset of a disk, as a program in the guest
// does that writes to the device. It works on frozen guests too: a freeze stops
// file systems, not devices. Writes from outside to a VM that is off are the
// same thing.
func (w *World) GuestWrite(vm hypervisor.VMID, disk hypervisor.DiskID, off int64, p []byte) error {
	return w.change(vm, disk, off, int64(len(p)), func(d *diskState) {
		d.img.write(p, off)
		d.track.mark(off, int64(len(p)), w.rnd.Float64)
	})
}

// GuestZero writes n zeros at off; space that is allocated stays so.
func (w *World) GuestZero(vm hypervisor.VMID, disk hypervisor.DiskID, off, n int64) error {
	return w.change(vm, disk, off, n, func(d *diskState) { w.clear(d, off, n, false) })
}

// GuestDiscard gives n bytes at off back: they read as zeros afterwards.
func (w *World) GuestDiscard(vm hypervisor.VMID, disk hypervisor.DiskID, off, n int64) error {
	return w.change(vm, disk, off, n, func(d *diskState) { w.clear(d, off, n, true) })
}

func (w *World) clear(d *diskState, off, n int64, discard bool) {
	for _, e := range d.img.zero(off, n, discard) {
		d.track.mark(e.Offset, e.Length, w.rnd.Float64)
	}
}

func (w *World) change(vm hypervisor.VMID, disk hypervisor.DiskID, off, n int64, f func(*diskState)) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, d, err := w.find(vm, disk)
	if err != nil {
		return err
	}
	if d.cfg.Attrs.ReadOnly {
		return fmt.Errorf("disk %s of VM %s is read-only", disk, vm)
	}
	if err := d.img.check(off, n); err != nil {
		return err
	}
	f(d)
	return nil
}

// SetGuest replaces the system inside a VM. A frozen guest stays frozen.
func (w *World) SetGuest(vm hypervisor.VMID, g Guest) error {
	return w.edit(vm, "", func(v *vmState, _ *diskState) { v.guest = g })
}

// Frozen tells whether a guest is frozen.
func (w *World) Frozen(vm hypervisor.VMID) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	v := w.vms[vm]
	return v != nil && v.frozen
}

// FrozenFor tells how long a guest has been frozen by now; zero if it is not.
func (w *World) FrozenFor(vm hypervisor.VMID) time.Duration {
	now := w.clock.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	if v := w.vms[vm]; v != nil && v.frozen {
		return now.Sub(v.frozenAt)
	}
	return 0
}

// freeze tells the guest to freeze, and notes it. The caller waits.
func (w *World) freeze(id hypervisor.VMID) (Guest, error) {
	now := w.clock.Now()
	w.mu.Lock()
	v, _, err := w.find(id, "")
	if err != nil {
		w.mu.Unlock()
		return Guest{}, err
	}
	g := v.guest
	if g.Freeze == FreezeFails {
		w.mu.Unlock()
		return g, errFreeze
	}
	if !v.frozen {
		v.frozen, v.frozenAt = true, now
	}
	w.mu.Unlock()
	return g, nil
}

// thaw makes a guest run again. A guest that is gone or not frozen is fine.
func (w *World) thaw(id hypervisor.VMID) error {
	w.mu.Lock()
	v := w.vms[id]
	if v == nil || !v.frozen {
		w.mu.Unlock()
		return nil
	}
	if v.guest.ThawFails != 0 {
		if v.guest.ThawFails > 0 {
			v.guest.ThawFails--
		}
		w.mu.Unlock()
		return fmt.Errorf("%w: the guest agent did not answer", hypervisor.ErrThawPending)
	}
	v.frozen = false
	hook := v.guest.OnThaw
	w.mu.Unlock()
	if hook != nil {
		hook()
	}
	return nil
}
