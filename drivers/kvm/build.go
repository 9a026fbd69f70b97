package kvm

import (
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// plannedDisk is a disk of a VM that is about to be made.
type plannedDisk struct {
	hypervisor.DiskSpec
	dev    string // target name in the new domain
	bus    string
	format string // "qcow2" or "raw"
	path   string // final path of the image
}

// buildDomain makes the definition of a new domain: typed parts come from spec,
// and from a libvirt definition that came with it what is known to be harmless.
// dropped names what was left out of that. nvram, kernel and initrd are paths of
// files that go with the domain, empty for none.
func buildDomain(spec *hypervisor.VMSpec, disks []plannedDisk, files map[string]string, n *notes) (text string, dropped []string, err error) {
	dom := new(libvirtxml.Domain)
	var native *libvirtxml.Domain
	if spec.Native != nil && spec.Native.Format == nativeFormat {
		if native, err = parseDomain(string(spec.Native.Data)); err != nil {
			return "", nil, fmt.Errorf("definition in the restore point: %w", err)
		}
		dropped = unknownParts(string(spec.Native.Data))
		dropped = append(dropped, harmless(dom, native)...)
	} else {
		defaults(dom, &spec.Hardware)
	}
	h := &spec.Hardware
	dom.Name = spec.Name
	if spec.Identity == hypervisor.IdentityKeep {
		dom.UUID = spec.UUID
		if native != nil {
			dom.GenID = native.GenID
		}
	}
	dom.Memory = &libvirtxml.DomainMemory{Value: uint(h.MemoryBytes >> 10), Unit: "KiB"}
	if dom.CurrentMemory != nil && int64(dom.CurrentMemory.Value)*memoryUnit(dom.CurrentMemory.Unit) > h.MemoryBytes {
		dom.CurrentMemory = nil
	}
	if dom.VCPU == nil || int(dom.VCPU.Value) != h.CPUs {
		dom.VCPU = &libvirtxml.DomainVCPU{Value: uint(h.CPUs)}
	}
	firmware(dom, native, h, files[attachNVRAM])
	dom.OS.Kernel, dom.OS.Initrd = files[attachKernel], files[attachInitrd]
	if native != nil && dom.OS.Kernel != "" {
		dom.OS.Cmdline = native.OS.Cmdline
	}
	for i := range disks {
		dom.Devices.Disks = append(dom.Devices.Disks, buildDisk(&disks[i], native))
	}
	if native != nil {
		dropped = append(dropped, drives(dom, native, disks)...)
	}
	dropped = append(dropped, buildNICs(dom, native, spec)...)
	bootOrder(dom, spec)
	if dom.Metadata, err = buildMetadata(n); err != nil {
		return "", nil, err
	}
	text, err = marshalDomain(dom)
	return text, dropped, err
}

// buildMetadata puts the notes into a definition.
func buildMetadata(n *notes) (*libvirtxml.DomainMetadata, error) {
	text, err := n.render()
	if err != nil {
		return nil, err
	}
	rest, ok := strings.CutPrefix(text, "<domain>")
	rest, ok2 := strings.CutSuffix(rest, "</domain>")
	if !ok || !ok2 {
		return nil, errors.New("notes have no content")
	}
	root := metadataKey + ":domain"
	return &libvirtxml.DomainMetadata{
		XML: "<" + root + ` xmlns:` + metadataKey + `="` + metadataURI + `">` + rest + "</" + root + ">",
	}, nil
}

// defaults fills in a domain that did not come from libvirt.
func defaults(dom *libvirtxml.Domain, h *hypervisor.Hardware) {
	arch := h.Arch
	if arch == "" {
		arch = "x86_64"
	}
	machine := "q35"
	if arch != "x86_64" && arch != "i686" {
		machine = "virt"
	}
	dom.Type = domainType()
	dom.OS = &libvirtxml.DomainOS{Type: &libvirtxml.DomainOSType{Arch: arch, Machine: machine, Type: "hvm"}}
	dom.Features = &libvirtxml.DomainFeatureList{ACPI: &libvirtxml.DomainFeature{}, APIC: &libvirtxml.DomainFeatureAPIC{}}
	dom.Clock = &libvirtxml.DomainClock{Offset: "utc"}
	if dom.Type == "kvm" && machine == "q35" {
		dom.CPU = &libvirtxml.DomainCPU{Mode: "host-model"}
		if h.CoresPerSocket > 0 && h.CPUs%h.CoresPerSocket == 0 {
			dom.CPU.Topology = &libvirtxml.DomainCPUTopology{
				Sockets: h.CPUs / h.CoresPerSocket, Cores: h.CoresPerSocket, Threads: 1,
			}
		}
	}
	port := uint(0)
	dom.Devices = &libvirtxml.DomainDeviceList{
		Serials: []libvirtxml.DomainSerial{{Source: ptySource(), Target: &libvirtxml.DomainSerialTarget{Port: &port}}},
		Channels: []libvirtxml.DomainChannel{{
			Source: unixSource(),
			Target: &libvirtxml.DomainChannelTarget{VirtIO: &libvirtxml.DomainChannelTargetVirtIO{Name: "org.qemu.guest_agent.0"}},
		}},
		Videos: []libvirtxml.DomainVideo{{Model: libvirtxml.DomainVideoModel{Type: "vga"}}},
		Graphics: []libvirtxml.DomainGraphic{{
			VNC: &libvirtxml.DomainGraphicVNC{AutoPort: "yes", Listen: "127.0.0.1"},
		}},
	}
}

// domainType is hardware virtualisation where the host has it.
func domainType() string {
	if _, err := os.Stat("/dev/kvm"); err == nil {
		return "kvm"
	}
	return "qemu"
}

func ptySource() *libvirtxml.DomainChardevSource {
	return &libvirtxml.DomainChardevSource{Pty: &libvirtxml.DomainChardevSourcePty{}}
}

func unixSource() *libvirtxml.DomainChardevSource {
	return &libvirtxml.DomainChardevSource{UNIX: &libvirtxml.DomainChardevSourceUNIX{Mode: "bind"}}
}

// firmware sets loader and NVRAM. A loader is taken from the definition only if
// it is one of the distribution's files; else libvirt chooses one.
func firmware(dom, native *libvirtxml.Domain, h *hypervisor.Hardware, nvram string) {
	os := dom.OS
	os.Firmware, os.FirmwareInfo, os.Loader, os.NVRam = "", nil, nil, nil
	if h.Firmware != hypervisor.UEFI {
		return
	}
	if nvram != "" {
		os.NVRam = &libvirtxml.DomainNVRam{NVRam: nvram}
	}
	if native != nil {
		if l := native.OS.Loader; native.OS.Firmware == "" && l != nil && trustedLoader(l.Path) {
			os.Loader = &libvirtxml.DomainLoader{Path: strings.TrimSpace(l.Path), Readonly: "yes", Secure: l.Secure, Type: "pflash"}
			return
		}
		os.FirmwareInfo = native.OS.FirmwareInfo
	}
	os.Firmware = "efi"
	if h.SecureBoot {
		os.Loader = &libvirtxml.DomainLoader{Secure: "yes"}
	}
}

// trustedLoader reports whether a path is a firmware file of the distribution.
func trustedLoader(path string) bool {
	path = strings.TrimSpace(path)
	if !strings.HasPrefix(path, "/usr/share/") || strings.Contains(path, "/../") {
		return false
	}
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular()
}

// buildDisk describes one disk. Details of the device come from the disk in the
// same slot of the native definition.
func buildDisk(p *plannedDisk, native *libvirtxml.Domain) libvirtxml.DomainDisk {
	d := libvirtxml.DomainDisk{
		Device: "disk",
		Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: p.format, Discard: "unmap"},
		Source: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: p.path}},
		Target: &libvirtxml.DomainDiskTarget{Dev: p.dev, Bus: p.bus},
	}
	if native == nil {
		return d
	}
	old := findDisk(native, string(p.ID))
	if old == nil || old.Target == nil || old.Target.Bus != p.bus {
		return d
	}
	d.Address, d.Serial, d.WWN, d.Vendor, d.Product = old.Address, old.Serial, old.WWN, old.Vendor, old.Product
	d.Geometry, d.BlockIO, d.Boot, d.Model = old.Geometry, old.BlockIO, old.Boot, old.Model
	d.Target.RotationRate, d.Target.Removable = old.Target.RotationRate, old.Target.Removable
	if o := old.Driver; o != nil {
		d.Driver.Cache, d.Driver.IO, d.Driver.DetectZeros = o.Cache, o.IO, o.DetectZeros
		d.Driver.ErrorPolicy, d.Driver.RErrorPolicy = o.ErrorPolicy, o.RErrorPolicy
		d.Driver.IOThread, d.Driver.Queues, d.Driver.QueueSize = o.IOThread, o.Queues, o.QueueSize
		if o.Discard != "" {
			d.Driver.Discard = o.Discard
		}
	}
	return d
}

// drives keeps drives for removable media, empty, and names the disks of the
// native definition that the new domain has not.
func drives(dom, native *libvirtxml.Domain, disks []plannedDisk) (dropped []string) {
	have := map[string]bool{}
	for i := range disks {
		have[string(disks[i].ID)] = true
	}
	for i := range native.Devices.Disks {
		old := &native.Devices.Disks[i]
		slot := target(old)
		if have[slot] {
			continue
		}
		if old.Device != "cdrom" && old.Device != "floppy" || !hypervisor.ValidDiskID(hypervisor.DiskID(slot)) {
			dropped = append(dropped, "disk "+slot)
			continue
		}
		dom.Devices.Disks = append(dom.Devices.Disks, libvirtxml.DomainDisk{
			Device: old.Device, Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: "raw"},
			Target: &libvirtxml.DomainDiskTarget{Dev: slot, Bus: old.Target.Bus}, Boot: old.Boot,
			ReadOnly: &libvirtxml.DomainDiskReadOnly{}, Address: old.Address,
		})
		if !emptySource(old.Source) {
			dropped = append(dropped, "medium in "+slot)
		}
	}
	return dropped
}

// buildNICs makes the network cards.
func buildNICs(dom, native *libvirtxml.Domain, spec *hypervisor.VMSpec) (dropped []string) {
	for i := range spec.NICs {
		nic := &spec.NICs[i]
		n := libvirtxml.DomainInterface{Source: nicSource(nic.Network)}
		if spec.Identity == hypervisor.IdentityKeep && nic.MAC != "" {
			n.MAC = &libvirtxml.DomainInterfaceMAC{Address: nic.MAC}
		}
		if model := nicModel(nic.Model); model != "" {
			n.Model = &libvirtxml.DomainInterfaceModel{Type: model}
		}
		if !nic.Connected {
			n.Link = &libvirtxml.DomainInterfaceLink{State: "down"}
		}
		if native != nil && i < len(native.Devices.Interfaces) && nicID(i) == nic.ID {
			old := &native.Devices.Interfaces[i]
			n.Address, n.Boot, n.MTU = old.Address, old.Boot, old.MTU
			if old.FilterRef != nil {
				dropped = append(dropped, "network filter of "+nic.ID)
			}
		}
		dom.Devices.Interfaces = append(dom.Devices.Interfaces, n)
	}
	return dropped
}

// nicSource understands the network names that the inventory gives.
func nicSource(network string) *libvirtxml.DomainInterfaceSource {
	kind, name, ok := strings.Cut(network, ":")
	switch {
	case ok && kind == "bridge":
		return &libvirtxml.DomainInterfaceSource{Bridge: &libvirtxml.DomainInterfaceSourceBridge{Bridge: name}}
	case ok && kind == "direct":
		return &libvirtxml.DomainInterfaceSource{Direct: &libvirtxml.DomainInterfaceSourceDirect{Dev: name, Mode: "bridge"}}
	case network == "" || network == userNetwork:
		return &libvirtxml.DomainInterfaceSource{User: &libvirtxml.DomainInterfaceSourceUser{}}
	}
	return &libvirtxml.DomainInterfaceSource{Network: &libvirtxml.DomainInterfaceSourceNetwork{Network: network}}
}

// nicModel maps models of other platforms to ones that QEMU has.
func nicModel(model string) string {
	switch m := strings.ToLower(model); m {
	case "virtio", "e1000", "e1000e", "rtl8139", "igb", "vmxnet3", "ne2k_pci", "pcnet", "virtio-transitional", "virtio-non-transitional":
		return m
	case "":
		return "virtio"
	}
	return "e1000e"
}

// bootOrder sets the order of devices, unless the native definition has one.
func bootOrder(dom *libvirtxml.Domain, spec *hypervisor.VMSpec) {
	for i := range dom.Devices.Disks {
		if dom.Devices.Disks[i].Boot != nil {
			return
		}
	}
	for i := range dom.Devices.Interfaces {
		if dom.Devices.Interfaces[i].Boot != nil {
			return
		}
	}
	if len(dom.OS.BootDevices) > 0 {
		return
	}
	order := uint(1)
	for _, id := range spec.Hardware.Boot {
		for i := range dom.Devices.Disks {
			if target(&dom.Devices.Disks[i]) == id {
				dom.Devices.Disks[i].Boot = &libvirtxml.DomainDeviceBoot{Order: order}
				order++
			}
		}
	}
	if order == 1 && len(dom.Devices.Disks) > 0 {
		dom.Devices.Disks[0].Boot = &libvirtxml.DomainDeviceBoot{Order: 1}
	}
}

// unknownParts lists elements of a definition, and of its devices, that this
// driver does not know: they cannot be judged, so they are not restored.
func unknownParts(text string) []string {
	dec := xml.NewDecoder(strings.NewReader(text))
	var out []string
	depth := 0
	inDevices := false
	for {
		tok, err := dec.Token()
		if err != nil {
			return out
		}
		switch t := tok.(type) {
		case xml.StartElement:
			depth++
			name := t.Name.Local
			switch {
			case depth == 2:
				inDevices = name == "devices"
				if t.Name.Space != "" || !knownElement[name] {
					out = append(out, elementName(t.Name))
				}
			case depth == 3 && inDevices && (t.Name.Space != "" || !knownDevice[name]):
				out = append(out, "device "+elementName(t.Name))
			}
		case xml.EndElement:
			depth--
		}
	}
}

func elementName(n xml.Name) string {
	if strings.Contains(n.Space, "/qemu/") {
		return "qemu:" + n.Local
	}
	return n.Local
}

func set(names string) map[string]bool {
	m := map[string]bool{}
	for _, n := range strings.Fields(names) {
		m[n] = true
	}
	return m
}

// Elements whose every part is copied, rebuilt or reported by this package.
var (
	knownElement = set(`name uuid genid title description metadata maxMemory memory currentMemory blkiotune memtune
		memoryBacking vcpu vcpus iothreads iothreadids cputune numatune resource sysinfo os features cpu clock
		on_poweroff on_reboot on_crash pm perf devices seclabel keywrap launchSecurity`)
	knownDevice = set(`emulator disk controller lease filesystem interface smartcard serial parallel console channel
		input tpm graphics sound audio video hostdev redirdev redirfilter hub watchdog memballoon rng nvram panic
		shmem memory iommu vsock crypto pstore`)
)
