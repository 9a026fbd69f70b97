package fakes

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"strings"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// maxAttachment bounds what CreateVM reads of one attachment, in bytes.
const maxAttachment = 64 << 20

// CreateVM implements hypervisor.Target.
func (h *Hypervisor) CreateVM(ctx context.Context, spec *hypervisor.VMSpec) (*hypervisor.VM, error) {
	if err := h.begin(ctx, Call{Op: OpCreateVM, Name: spec.Owner}); err != nil {
		return nil, err
	}
	if !hypervisor.IsOurs(spec.Owner) {
		return nil, fail("CreateVM", "", "", fmt.Errorf("%q is not an owner name: %w", spec.Owner, hypervisor.ErrNotOurs))
	}
	cfg := VMConfig{
		Name: spec.Name, Host: spec.Placement.Host, Hardware: spec.Hardware, Owner: spec.Owner,
		Power: hypervisor.PoweredOff,
	}
	if spec.Native != nil && spec.Native.Format == "fake-json" {
		cfg.Native = hypervisor.NativeConfig{Format: spec.Native.Format, Data: bytes.Clone(spec.Native.Data)}
	}
	for _, n := range spec.NICs {
		if spec.Identity != hypervisor.IdentityKeep {
			n.MAC = ""
		}
		cfg.NICs = append(cfg.NICs, n)
	}
	if spec.Identity == hypervisor.IdentityKeep {
		cfg.UUID = spec.UUID
	}
	for _, d := range spec.Disks {
		cfg.Disks = append(cfg.Disks, DiskConfig{
			ID: d.ID, Size: d.Size, Bus: d.Bus, Format: d.Format,
			Storage: orElse(d.Storage, orElse(spec.Placement.Storage, DefaultStorage)),
		})
	}
	nvram, err := readNVRAM(ctx, spec.Attachments)
	if err != nil {
		return nil, fail("CreateVM", "", "", err)
	}
	cfg.NVRAM = nvram

	w := h.world
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.preflight(&cfg); err != nil {
		return nil, err
	}
	v := w.addVM(cfg)
	v.unready = true
	for i, d := range v.disks {
		d.slot = spec.Disks[i].Slot
	}
	return w.definition(v), nil
}

// readNVRAM reads the firmware variables out of the attachments, nil if there
// are none. Others have no place on this platform.
func readNVRAM(ctx context.Context, list []hypervisor.Attachment) ([]byte, error) {
	for _, a := range list {
		if a.Kind != "nvram" {
			continue
		}
		r, err := a.Open(ctx)
		if err != nil {
			return nil, fmt.Errorf("attachment %s: %w", a.Name, err)
		}
		data, err := io.ReadAll(io.LimitReader(r, maxAttachment+1))
		if cerr := r.Close(); err == nil {
			err = cerr
		}
		if err == nil && len(data) > maxAttachment {
			err = fmt.Errorf("more than %d bytes", maxAttachment)
		}
		if err != nil {
			return nil, fmt.Errorf("attachment %s: %w", a.Name, err)
		}
		return data, nil
	}
	return nil, nil
}

// preflight refuses a VM before anything is made of it. The lock is held.
func (w *World) preflight(cfg *VMConfig) error {
	if cfg.Name == "" {
		return fail("CreateVM", "", "", fmt.Errorf("a VM needs a name"))
	}
	for _, v := range w.vms {
		if v.cfg.Name == cfg.Name {
			return hinted("CreateVM", v.id, "", fmt.Errorf("name %q: %w", cfg.Name, hypervisor.ErrExists), "choose another name")
		}
		if cfg.UUID != "" && strings.EqualFold(v.cfg.UUID, cfg.UUID) {
			return hinted("CreateVM", v.id, "", fmt.Errorf("UUID %s: %w", cfg.UUID, hypervisor.ErrExists), "restore with a new identity")
		}
	}
	need, seen := map[string]int64{}, map[hypervisor.DiskID]bool{}
	for _, d := range cfg.Disks {
		switch {
		case !hypervisor.ValidDiskID(d.ID) || seen[d.ID]:
			return fail("CreateVM", "", d.ID, fmt.Errorf("disk ID %q is not valid or not unique", d.ID))
		case d.Size <= 0 || d.Size > math.MaxInt64-need[d.Storage]:
			return fail("CreateVM", "", d.ID, fmt.Errorf("size %d is not possible", d.Size))
		}
		seen[d.ID] = true
		need[d.Storage] += d.Size
	}
	for name, n := range need {
		capacity, ok := w.storages[name]
		if !ok {
			return hinted("CreateVM", "", "", fmt.Errorf("storage %q: %w", name, hypervisor.ErrNotFound), "map the disk to another storage")
		}
		if free := capacity - w.used(name); capacity > 0 && n > free {
			return hinted("CreateVM", "", "", fmt.Errorf("storage %q has %d bytes free of %d needed: %w", name, free, n, hypervisor.ErrNoSpace), "map the disks to another storage")
		}
	}
	for _, n := range cfg.NICs {
		if name := orElse(n.Network, DefaultNetwork); !w.networks[name] {
			return hinted("CreateVM", "", "", fmt.Errorf("network %q: %w", name, hypervisor.ErrNotFound), "map the network to another one")
		}
	}
	return nil
}

func (w *World) used(storage string) int64 {
	var n int64
	for _, v := range w.vms {
		for _, d := range v.disks {
			if d.cfg.Storage == storage {
				n += d.img.size
			}
		}
	}
	return n
}

// OpenDisk implements hypervisor.Target.
func (h *Hypervisor) OpenDisk(ctx context.Context, id hypervisor.VMID, disk hypervisor.DiskID) (hypervisor.DiskReader, error) {
	if err := h.begin(ctx, Call{Op: OpOpenTargetDisk, VM: id, Disk: disk}); err != nil {
		return nil, err
	}
	w := h.world
	w.mu.Lock()
	v, d, err := w.find(id, disk)
	if err == nil && v.power != hypervisor.PoweredOff {
		err = fmt.Errorf("the VM is %s: %w", v.power, hypervisor.ErrBusy)
	}
	if err == nil && d.writer != nil {
		err = fmt.Errorf("the disk is being written: %w", hypervisor.ErrBusy)
	}
	if err != nil {
		w.mu.Unlock()
		return nil, fail("OpenDisk", id, disk, err)
	}
	img := d.img.freeze()
	w.mu.Unlock()
	return h.openReader(ctx, img, &handle{vm: id, disk: disk}), nil
}

// FinishVM implements hypervisor.Target.
func (h *Hypervisor) FinishVM(ctx context.Context, id hypervisor.VMID) error {
	if err := h.begin(ctx, Call{Op: OpFinishVM, VM: id}); err != nil {
		return err
	}
	w := h.world
	w.mu.Lock()
	defer w.mu.Unlock()
	v, _, err := w.find(id, "")
	if err != nil {
		return fail("FinishVM", id, "", err)
	}
	if v.owner == "" {
		return fail("FinishVM", id, "", hypervisor.ErrNotOurs)
	}
	for _, d := range v.disks {
		if d.writer != nil {
			return hinted("FinishVM", id, d.cfg.ID, fmt.Errorf("the disk is being written: %w", hypervisor.ErrBusy), "commit or close its writer")
		}
	}
	v.unready = false
	return nil
}

// SetPower implements hypervisor.Target.
func (h *Hypervisor) SetPower(ctx context.Context, id hypervisor.VMID, p hypervisor.Power) error {
	if err := h.begin(ctx, Call{Op: OpSetPower, VM: id, Name: string(p)}); err != nil {
		return err
	}
	w := h.world
	w.mu.Lock()
	defer w.mu.Unlock()
	v, _, err := w.find(id, "")
	if err != nil {
		return fail("SetPower", id, "", err)
	}
	switch p {
	case hypervisor.PowerOn:
		if v.unready {
			return hinted("SetPower", id, "", fmt.Errorf("the VM is incomplete: %w", hypervisor.ErrBusy), "finish the restore, or delete the VM")
		}
		v.setPower(hypervisor.PoweredOn)
	case hypervisor.PowerOff, hypervisor.Shutdown:
		v.setPower(hypervisor.PoweredOff)
	default:
		return fail("SetPower", id, "", fmt.Errorf("%q is not a power state to ask for", p))
	}
	return nil
}

// DeleteVM implements hypervisor.Target. A running VM is powered off first.
func (h *Hypervisor) DeleteVM(ctx context.Context, id hypervisor.VMID) error {
	if err := h.begin(ctx, Call{Op: OpDeleteVM, VM: id}); err != nil {
		return err
	}
	w := h.world
	w.mu.Lock()
	defer w.mu.Unlock()
	v := w.vms[id]
	if v == nil {
		return nil
	}
	if !hypervisor.IsOurs(v.owner) {
		return hinted("DeleteVM", id, "", hypervisor.ErrNotOurs, "delete it with the tools of the platform if that is meant")
	}
	w.remove(v)
	return nil
}
