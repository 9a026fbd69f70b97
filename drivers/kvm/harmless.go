package kvm

import (
	"slices"
	"strings"

	"libvirt.org/go/libvirtxml"
)

// harmless copies from a native definition what describes the machine and cannot
// reach into the host: no command lines, host devices, host paths, sockets or
// pinning. It returns what it left out, for people.
func harmless(dom, old *libvirtxml.Domain) (dropped []string) {
	drop := func(is bool, what string) {
		if is {
			dropped = append(dropped, what)
		}
	}
	dom.Type = "qemu"
	if old.Type == "kvm" {
		dom.Type = domainType()
		drop(dom.Type != "kvm", "hardware virtualisation: this host has no /dev/kvm")
	}
	dom.Title, dom.Description = old.Title, old.Description
	dom.CurrentMemory, dom.MaximumMemory = old.CurrentMemory, old.MaximumMemory
	dom.VCPU, dom.VCPUs = old.VCPU, old.VCPUs
	if dom.VCPU != nil {
		dom.VCPU = &libvirtxml.DomainVCPU{Value: old.VCPU.Value, Current: old.VCPU.Current}
	}
	dom.IOThreads, dom.IOThreadIDs = old.IOThreads, old.IOThreadIDs
	for i := range old.SysInfo {
		if old.SysInfo[i].SMBIOS != nil {
			dom.SysInfo = append(dom.SysInfo, old.SysInfo[i])
		} else {
			drop(true, "sysinfo")
		}
	}
	o := old.OS
	dom.OS = &libvirtxml.DomainOS{Type: o.Type, BootDevices: o.BootDevices, BootMenu: o.BootMenu, BIOS: o.BIOS, SMBios: o.SMBios}
	if dom.OS.Type == nil {
		dom.OS.Type = &libvirtxml.DomainOSType{Type: "hvm"}
	}
	dom.Features, dom.CPU, dom.Clock, dom.PM = old.Features, old.CPU, old.Clock, old.PM
	dom.OnPoweroff, dom.OnReboot, dom.OnCrash = old.OnPoweroff, old.OnReboot, old.OnCrash

	drop(old.MemoryBacking != nil, "memoryBacking")
	drop(old.BlockIOTune != nil, "blkiotune")
	drop(old.MemoryTune != nil, "memtune")
	drop(old.CPUTune != nil, "cputune")
	drop(old.NUMATune != nil, "numatune")
	drop(old.Perf != nil, "perf")
	drop(old.KeyWrap != nil, "keywrap")
	drop(old.LaunchSecurity != nil, "launchSecurity")
	drop(o.DTB != "", "device tree")
	drop(o.ACPI != nil, "ACPI tables")
	drop(o.Shim != "", "shim")
	// Elements of other namespaces are in unknownParts.

	v := old.Devices
	dom.Devices = new(libvirtxml.DomainDeviceList)
	n := dom.Devices
	for i := range v.Controllers {
		c := v.Controllers[i]
		c.Alias = nil
		n.Controllers = append(n.Controllers, c)
	}
	n.Videos, n.Sounds, n.Hubs, n.Watchdogs, n.Panics = v.Videos, v.Sounds, v.Hubs, v.Watchdogs, v.Panics
	n.MemBalloon, n.NVRAM, n.IOMMU = v.MemBalloon, v.NVRAM, v.IOMMU
	drop(len(v.Leases) > 0, "lease")
	drop(len(v.Filesystems) > 0, "filesystem")
	drop(len(v.Smartcards) > 0, "smartcard")
	drop(len(v.Parallels) > 0, "parallel port")
	drop(len(v.Hostdevs) > 0, "hostdev")
	drop(len(v.Shmems) > 0, "shmem")
	drop(len(v.Memorydevs) > 0, "memory device")
	drop(len(v.Crypto) > 0, "crypto device")
	drop(v.PStore != nil, "pstore")
	drop(v.VSock != nil, "vsock")
	drop(v.Emulator != "" && !strings.HasPrefix(v.Emulator, "/usr/"), "emulator "+v.Emulator)
	dropped = append(dropped, harmlessChars(n, v)...)
	dropped = append(dropped, harmlessDisplay(n, v)...)
	return dropped
}

// harmlessChars copies character devices with the ends that libvirt makes itself.
func harmlessChars(n, v *libvirtxml.DomainDeviceList) (dropped []string) {
	for i := range v.Serials {
		s := &v.Serials[i]
		if s.Source != nil && s.Source.Pty == nil {
			dropped = append(dropped, "backend of a serial port")
		}
		n.Serials = append(n.Serials, libvirtxml.DomainSerial{Source: ptySource(), Target: s.Target, Address: s.Address})
	}
	for i := range v.Consoles {
		c := &v.Consoles[i]
		n.Consoles = append(n.Consoles, libvirtxml.DomainConsole{Source: ptySource(), Target: c.Target, Address: c.Address})
	}
	for i := range v.Channels {
		c := &v.Channels[i]
		if c.Target == nil || c.Target.VirtIO == nil || c.Source == nil {
			dropped = append(dropped, "channel")
			continue
		}
		out := libvirtxml.DomainChannel{
			Target:  &libvirtxml.DomainChannelTarget{VirtIO: &libvirtxml.DomainChannelTargetVirtIO{Name: c.Target.VirtIO.Name}},
			Address: c.Address,
		}
		switch {
		case c.Source.UNIX != nil:
			out.Source = unixSource()
		case c.Source.SpiceVMC != nil && hasSpice(v):
			out.Source = &libvirtxml.DomainChardevSource{SpiceVMC: c.Source.SpiceVMC}
		default:
			dropped = append(dropped, "channel "+c.Target.VirtIO.Name)
			continue
		}
		n.Channels = append(n.Channels, out)
	}
	for i := range v.RNGs {
		r := v.RNGs[i]
		b := r.Backend
		if b == nil || b.BuiltIn == nil &&
			(b.Random == nil || !slices.Contains([]string{"", "/dev/urandom", "/dev/random", "/dev/hwrng"}, b.Random.Device)) {
			dropped = append(dropped, "random number generator")
			continue
		}
		r.Alias = nil
		n.RNGs = append(n.RNGs, r)
	}
	for i := range v.TPMs {
		t := v.TPMs[i]
		if t.Backend == nil || t.Backend.Emulator == nil {
			dropped = append(dropped, "TPM")
			continue
		}
		t.Alias = nil
		t.Backend = &libvirtxml.DomainTPMBackend{Emulator: &libvirtxml.DomainTPMBackendEmulator{Version: t.Backend.Emulator.Version}}
		n.TPMs = append(n.TPMs, t)
		dropped = append(dropped, "content of the TPM")
	}
	return dropped
}

func hasSpice(v *libvirtxml.DomainDeviceList) bool {
	return slices.ContainsFunc(v.Graphics, func(g libvirtxml.DomainGraphic) bool { return g.Spice != nil })
}

// harmlessDisplay copies displays, which listen on the loopback address alone,
// and what people type on.
func harmlessDisplay(n, v *libvirtxml.DomainDeviceList) (dropped []string) {
	for i := range v.Graphics {
		g := &v.Graphics[i]
		switch {
		case g.VNC != nil:
			n.Graphics = append(n.Graphics, libvirtxml.DomainGraphic{
				VNC: &libvirtxml.DomainGraphicVNC{AutoPort: "yes", Listen: "127.0.0.1", Keymap: g.VNC.Keymap},
			})
		case g.Spice != nil:
			n.Graphics = append(n.Graphics, libvirtxml.DomainGraphic{
				Spice: &libvirtxml.DomainGraphicSpice{AutoPort: "yes", Listen: "127.0.0.1", Keymap: g.Spice.Keymap},
			})
		default:
			dropped = append(dropped, "display")
		}
	}
	for i := range v.Inputs {
		in := v.Inputs[i]
		if in.Source != nil || in.Type == "passthrough" || in.Type == "evdev" {
			dropped = append(dropped, "input "+in.Type)
			continue
		}
		in.Alias = nil
		n.Inputs = append(n.Inputs, in)
	}
	for i := range v.RedirDevs {
		r := v.RedirDevs[i]
		if r.Source == nil || r.Source.SpiceVMC == nil || !hasSpice(v) {
			dropped = append(dropped, "redirdev")
			continue
		}
		r.Alias = nil
		n.RedirDevs = append(n.RedirDevs, r)
	}
	for i := range v.Audios {
		a := &v.Audios[i]
		if a.None != nil || a.SPICE != nil {
			n.Audios = append(n.Audios, *a)
		} else {
			dropped = append(dropped, "audio backend")
		}
	}
	return dropped
}
