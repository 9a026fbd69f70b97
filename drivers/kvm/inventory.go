package kvm

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// VMs lists domains, running or not.
func (d *Driver) VMs(ctx context.Context, q hypervisor.Query) iter.Seq2[*hypervisor.VM, error] {
	return func(yield func(*hypervisor.VM, error) bool) {
		ids, err := d.candidates(ctx, q)
		if err != nil {
			yield(nil, fail("VMs", "", "", "", err))
			return
		}
		for _, id := range ids {
			vm, err := d.inventory(ctx, id, true)
			if errors.Is(err, hypervisor.ErrNotFound) && ctx.Err() == nil {
				continue // undefined since it was listed
			}
			if err != nil {
				yield(nil, fail("VMs", hypervisor.VMID(id), "", "", err))
				return
			}
			if matches(vm.VM, q) && !yield(vm.VM, nil) {
				return
			}
		}
	}
}

// candidates returns UUIDs of domains that may match.
func (d *Driver) candidates(ctx context.Context, q hypervisor.Query) ([]string, error) {
	switch {
	case q.UUID != "":
		return []string{strings.ToLower(q.UUID)}, nil
	case q.Name != "":
		id, err := d.conn.lookupName(ctx, q.Name)
		if errors.Is(err, hypervisor.ErrNotFound) {
			return nil, nil
		}
		return []string{id}, err
	}
	return d.conn.domains(ctx)
}

func matches(vm *hypervisor.VM, q hypervisor.Query) bool {
	return (q.Name == "" || vm.Name == q.Name) &&
		(q.UUID == "" || strings.EqualFold(vm.UUID, q.UUID)) &&
		(q.Owner == "" || vm.Owner != "" && strings.HasPrefix(vm.Owner, q.Owner))
}

// VM returns the current definition of one domain; its ID is the UUID. A guest
// agent that is connected is asked whether it answers, for two seconds at most.
func (d *Driver) VM(ctx context.Context, id hypervisor.VMID) (*hypervisor.VM, error) {
	m, err := d.inventory(ctx, string(id), true)
	if err != nil {
		return nil, fail("VM", id, "", "", err)
	}
	return m.VM, nil
}

// machine is a VM together with what only the driver needs to know of it.
type machine struct {
	*hypervisor.VM
	dom           *libvirtxml.Domain // live if it runs
	notes         *notes
	state, reason int
	persistent    bool
	saved         bool // a managed save image exists
}

// active reports whether the domain has a QEMU process.
func (m *machine) active() bool { return active(m.state) }

// inventory reads all there is to know of a domain. probe asks the guest agent.
func (d *Driver) inventory(ctx context.Context, uuid string, probe bool) (*machine, error) {
	text, err := d.conn.domainXML(ctx, uuid, 0)
	if err != nil {
		return nil, err
	}
	dom, err := parseDomain(text)
	if err != nil {
		return nil, err
	}
	m := &machine{dom: dom}
	if m.notes, err = notesOf(dom); err != nil {
		// Somebody else's damage must not make the VM invisible.
		d.cfg.Logger.WarnContext(ctx, "notes in domain metadata are unreadable", "vm", uuid, "error", err)
		m.notes = new(notes)
	}
	if m.state, m.reason, err = d.conn.state(ctx, uuid); err != nil {
		return nil, err
	}
	if m.persistent, err = d.conn.persistent(ctx, uuid); err != nil {
		return nil, err
	}
	if m.saved, err = d.conn.managedSave(ctx, uuid); err != nil {
		return nil, err
	}
	stored := text
	if m.active() {
		if stored, err = d.conn.domainXML(ctx, uuid, xmlInactive); err != nil {
			return nil, err
		}
	}
	vm := &hypervisor.VM{
		ID: hypervisor.VMID(dom.UUID), UUID: strings.ToLower(dom.UUID), Name: dom.Name, Host: d.host,
		Power:    power(m.state, m.saved),
		Hardware: hardware(dom),
		NICs:     nics(dom),
		Native:   hypervisor.NativeConfig{Format: nativeFormat, Data: []byte(stored)},
	}
	m.VM = vm
	if dom.Title != "" {
		vm.Tags = map[string]string{"title": dom.Title}
	}
	if c := m.notes.Created; c != nil && hypervisor.IsOurs(c.Owner) {
		vm.Owner, vm.Incomplete = c.Owner, c.Incomplete != ""
	}
	if vm.Disks, err = d.disks(ctx, m); err != nil {
		return nil, err
	}
	vm.Attachments = d.attachments(dom)
	vm.Guest = d.guest(ctx, m, probe)
	return m, ctx.Err()
}

const nativeFormat = "libvirt-domain-xml"

// disks classifies all disks and asks for their sizes.
func (d *Driver) disks(ctx context.Context, m *machine) ([]hypervisor.Disk, error) {
	uuid, dom := m.VM.UUID, m.dom
	var disks []hypervisor.Disk
	for i := range dom.Devices.Disks {
		disk := classify(&dom.Devices.Disks[i], i, d.ep.local)
		if m.Incomplete {
			if f := m.notes.Created.disk(disk.ID); f != nil {
				disk.Size = f.Size
			}
		} else if disk.Storage != "" && disk.ID != "" {
			size, err := d.conn.capacity(ctx, uuid, string(disk.ID))
			switch {
			case err == nil:
				disk.Size = size
			case ctx.Err() != nil, errors.Is(err, hypervisor.ErrNotFound), errors.Is(err, hypervisor.ErrUnavailable):
				return nil, err
			case disk.Snapshottable:
				disk.Snapshottable, disk.Tracking = false, hypervisor.TrackingNone
				disk.Reason = hypervisor.ReasonRefused
				disk.Detail = "its size cannot be read: " + err.Error()
			}
		}
		disks = append(disks, disk)
	}
	return append(disks, hostDevices(dom, d.ep.local)...), nil
}

func power(state int, saved bool) hypervisor.PowerState {
	switch state {
	case stateRunning, stateBlocked, stateShutdown:
		return hypervisor.PoweredOn
	case statePaused, statePMSuspended:
		return hypervisor.Paused
	case stateShutoff, stateCrashed:
		if saved {
			return hypervisor.Suspended
		}
		return hypervisor.PoweredOff
	}
	return hypervisor.PowerUnknown
}

func hardware(dom *libvirtxml.Domain) hypervisor.Hardware {
	h := hypervisor.Hardware{Firmware: hypervisor.BIOS, TPM: len(dom.Devices.TPMs) > 0, Boot: boot(dom)}
	if dom.VCPU != nil {
		h.CPUs = int(dom.VCPU.Value)
	}
	if dom.CPU != nil && dom.CPU.Topology != nil {
		h.CoresPerSocket = dom.CPU.Topology.Cores * max(dom.CPU.Topology.Dies, 1)
	}
	if dom.Memory != nil {
		h.MemoryBytes = int64(dom.Memory.Value) * memoryUnit(dom.Memory.Unit)
	}
	if t := dom.OS.Type; t != nil {
		h.Arch, h.Machine = t.Arch, t.Machine
	}
	if dom.OS.Firmware == "efi" || dom.OS.Loader != nil && dom.OS.Loader.Type == "pflash" {
		h.Firmware = hypervisor.UEFI
	}
	if dom.OS.Loader != nil && dom.OS.Loader.Secure == "yes" {
		h.SecureBoot = true
	}
	return h
}

// memoryUnit is the factor to bytes of libvirt's memory units; KiB unless said.
func memoryUnit(unit string) int64 {
	switch unit {
	case "b", "bytes":
		return 1
	case "KB":
		return 1000
	case "M", "MiB":
		return 1 << 20
	case "MB":
		return 1000 * 1000
	case "G", "GiB":
		return 1 << 30
	case "GB":
		return 1000 * 1000 * 1000
	case "T", "TiB":
		return 1 << 40
	case "TB":
		return 1000 * 1000 * 1000 * 1000
	}
	return 1 << 10
}

// boot gives the boot order: that of the devices if they have one, else that of
// the kinds of devices.
func boot(dom *libvirtxml.Domain) []string {
	order := map[uint]string{}
	last := uint(0)
	note := func(b *libvirtxml.DomainDeviceBoot, id string) {
		if b != nil && b.Order > 0 {
			order[b.Order] = id
			last = max(last, b.Order)
		}
	}
	for i := range dom.Devices.Disks {
		id := target(&dom.Devices.Disks[i])
		if dom.Devices.Disks[i].Device == "cdrom" {
			id = "cdrom"
		}
		note(dom.Devices.Disks[i].Boot, id)
	}
	for i := range dom.Devices.Interfaces {
		note(dom.Devices.Interfaces[i].Boot, nicID(i))
	}
	var out []string
	if len(order) > 0 && last < 1<<16 {
		for i := uint(1); i <= last; i++ {
			if id := order[i]; id != "" {
				out = append(out, id)
			}
		}
		return out
	}
	for _, b := range dom.OS.BootDevices {
		switch b.Dev {
		case "hd":
			for i := range dom.Devices.Disks {
				if dev := dom.Devices.Disks[i].Device; dev == "" || dev == "disk" || dev == "lun" {
					out = append(out, target(&dom.Devices.Disks[i]))
					break
				}
			}
		case "network":
			if len(dom.Devices.Interfaces) > 0 {
				out = append(out, nicID(0))
			}
		default:
			out = append(out, b.Dev)
		}
	}
	return out
}

func nicID(i int) string { return fmt.Sprintf("nic%d", i) }

func nics(dom *libvirtxml.Domain) []hypervisor.NIC {
	var out []hypervisor.NIC
	for i := range dom.Devices.Interfaces {
		nic := &dom.Devices.Interfaces[i]
		n := hypervisor.NIC{ID: nicID(i), Connected: nic.Link == nil || nic.Link.State != "down"}
		if nic.MAC != nil {
			n.MAC = strings.ToLower(nic.MAC.Address)
		}
		if nic.Model != nil {
			n.Model = nic.Model.Type
		}
		if s := nic.Source; s != nil {
			switch {
			case s.Network != nil:
				n.Network = s.Network.Network
			case s.Bridge != nil:
				n.Network = "bridge:" + s.Bridge.Bridge
			case s.Direct != nil:
				n.Network = "direct:" + s.Direct.Dev
			case s.User != nil:
				n.Network = userNetwork
			case s.Hostdev != nil:
				n.Network = "hostdev"
			}
		}
		out = append(out, n)
	}
	return out
}

// userNetwork is how QEMU's own user-mode network is named.
const userNetwork = "user"
