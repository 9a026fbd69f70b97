package fakes

import (
	"fmt"
	"slices"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// edit changes a VM, and a disk when disk is not empty, under the lock.
func (w *World) edit(vm hypervisor.VMID, disk hypervisor.DiskID, f func(*vmState, *diskState)) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	v, d, err := w.find(vm, disk)
	if err != nil {
		return err
	}
	f(v, d)
	return nil
}

// RemoveVM deletes a VM behind Holdfast's back, with snapshots and baselines.
func (w *World) RemoveVM(vm hypervisor.VMID) error {
	return w.edit(vm, "", func(v *vmState, _ *diskState) { w.remove(v) })
}

// remove takes a VM away; readers of its snapshots fail from now on.
func (w *World) remove(v *vmState) {
	for _, s := range v.snaps {
		s.gone.Store(true)
	}
	delete(w.vms, v.id)
	for x := range w.open {
		if x.vm == v.id {
			w.drop(x)
		}
	}
}

// RenameVM gives a VM another name. Its ID and UUID stay.
func (w *World) RenameVM(vm hypervisor.VMID, name string) error {
	return w.edit(vm, "", func(v *vmState, _ *diskState) { v.cfg.Name = name })
}

// Redefine is what undefining and defining a VM again does: disks and snapshots
// stay, the retained baselines are gone.
func (w *World) Redefine(vm hypervisor.VMID) error {
	return w.edit(vm, "", func(v *vmState, _ *diskState) {
		clear(v.anchors)
		for _, d := range v.disks {
			d.track.lose(hypervisor.ReasonBaselineMissing)
		}
	})
}

// SetPower changes the power state at once. Leaving "on" thaws a guest.
func (w *World) SetPower(vm hypervisor.VMID, p hypervisor.PowerState) error {
	return w.edit(vm, "", func(v *vmState, _ *diskState) { v.setPower(p) })
}

func (v *vmState) setPower(p hypervisor.PowerState) {
	v.power = p
	if p == hypervisor.PoweredOff {
		v.frozen = false
	}
}

// AddDisk plugs a new disk in. Its ID must be free; empty: the next diskN.
func (w *World) AddDisk(vm hypervisor.VMID, cfg DiskConfig) (hypervisor.DiskID, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	v, _, err := w.find(vm, "")
	if err != nil {
		return "", err
	}
	slot := 0
	for _, d := range v.disks {
		slot = max(slot, d.slot+1)
		if d.cfg.ID == cfg.ID {
			return "", fmt.Errorf("disk %s of VM %s: %w", cfg.ID, vm, hypervisor.ErrExists)
		}
	}
	if cfg.ID == "" {
		cfg.ID = hypervisor.DiskID(fmt.Sprintf("disk%d", slot))
	}
	v.disks = append(v.disks, w.newDisk(cfg, slot))
	return cfg.ID, nil
}

// RemoveDisk unplugs a disk and deletes it. Snapshots keep what they froze.
func (w *World) RemoveDisk(vm hypervisor.VMID, disk hypervisor.DiskID) error {
	return w.edit(vm, disk, func(v *vmState, d *diskState) {
		v.disks = slices.DeleteFunc(v.disks, func(x *diskState) bool { return x == d })
	})
}

// ReplaceDisk plugs an empty disk of another size into the same slot.
func (w *World) ReplaceDisk(vm hypervisor.VMID, disk hypervisor.DiskID, size int64) error {
	return w.edit(vm, disk, func(v *vmState, d *diskState) {
		cfg := d.cfg
		cfg.Size = size
		v.disks[slices.Index(v.disks, d)] = w.newDisk(cfg, d.slot)
	})
}

// ResizeDisk changes the size of a disk; what is cut off is lost.
func (w *World) ResizeDisk(vm hypervisor.VMID, disk hypervisor.DiskID, size int64) error {
	if size < 0 {
		return fmt.Errorf("size %d is negative", size)
	}
	return w.edit(vm, disk, func(_ *vmState, d *diskState) {
		d.img.resize(size)
		d.cfg.Size = size
	})
}

// LoseTracking makes the platform forget what changed on a disk. Baselines of
// it are refused from then on, with the reason; empty: ReasonTrackingLost.
func (w *World) LoseTracking(vm hypervisor.VMID, disk hypervisor.DiskID, why hypervisor.Reason) error {
	if why == "" {
		why = hypervisor.ReasonTrackingLost
	}
	return w.edit(vm, disk, func(_ *vmState, d *diskState) { d.track.lose(why) })
}

// SetLying makes the change tracking of a disk drop a share of the changes that
// follow, between 0 and 1, as broken platforms did. Nothing else shows it.
func (w *World) SetLying(vm hypervisor.VMID, disk hypervisor.DiskID, share float64) error {
	return w.edit(vm, disk, func(_ *vmState, d *diskState) { d.track.lie = share })
}

// SetNVRAM replaces the firmware variables of a VM; nil removes them.
func (w *World) SetNVRAM(vm hypervisor.VMID, data []byte) error {
	return w.edit(vm, "", func(v *vmState, _ *diskState) { v.cfg.NVRAM = slices.Clone(data) })
}

// AddForeignSnapshot makes a snapshot that another product or a person made.
// Its name must not be one that Holdfast gives. It is never listed, and
// touching it is refused.
func (w *World) AddForeignSnapshot(vm hypervisor.VMID, name string) error {
	if hypervisor.IsOurs(name) {
		return fmt.Errorf("%q is a name that Holdfast gives", name)
	}
	return w.edit(vm, "", func(v *vmState, _ *diskState) {
		s := &snapState{name: name, token: name, def: w.definition(v), taken: true}
		s.disks = map[hypervisor.DiskID]*frozenDisk{}
		v.snaps[name] = s
	})
}

// RemoveForeignSnapshot removes what AddForeignSnapshot made.
func (w *World) RemoveForeignSnapshot(vm hypervisor.VMID, name string) error {
	if hypervisor.IsOurs(name) {
		return fmt.Errorf("%q is a name that Holdfast gives", name)
	}
	return w.edit(vm, "", func(v *vmState, _ *diskState) { delete(v.snaps, name) })
}

// Foreign lists the snapshots of a VM that are not Holdfast's, sorted.
func (w *World) Foreign(vm hypervisor.VMID) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	if v := w.vms[vm]; v != nil {
		for name := range v.snaps {
			if !hypervisor.IsOurs(name) {
				out = append(out, name)
			}
		}
	}
	slices.Sort(out)
	return out
}
