package kvmlab

import (
	"encoding/xml"
	"fmt"
	"strings"
)

// Power is the state in which a virtual machine is handed to the test.
type Power int

// Powers. The zero value is Paused: no virtual CPU load, and everything about
// backup works, guest writes through the monitor included.
const (
	Paused Power = iota
	Running
	Off
)

// Format says what a disk is made of.
type Format int

// Formats.
const (
	// Qcow2 is a qcow2 version 3 file: full backup and change tracking.
	Qcow2 Format = iota
	// Qcow2V2 is a qcow2 file of version 2 (compat=0.10), which cannot hold bitmaps.
	Qcow2V2
	// Raw is a raw file.
	Raw
	// LoopRaw is raw data on a block device (a loop device).
	LoopRaw
	// LoopQcow2 is qcow2 on a block device (a loop device).
	LoopQcow2
)

// driver returns the libvirt and qemu-img name of the format.
func (f Format) driver() string {
	if f == Raw || f == LoopRaw {
		return "raw"
	}
	return "qcow2"
}

func (f Format) loop() bool { return f == LoopRaw || f == LoopQcow2 }

// Range is a byte range of a disk.
type Range struct {
	Off, Len int64
}

// Disk describes one disk of a [Spec].
type Disk struct {
	// Size is the virtual size in bytes, a multiple of 512. A CD-ROM or floppy of
	// size zero has no medium.
	Size int64
	// Format is Qcow2 unless set.
	Format Format
	// Data lists ranges that hold pseudo-random bytes, drawn from Seed, before
	// the first start. The rest is unallocated.
	Data []Range
	Seed uint64
	// Ext4 puts an empty ext4 file system on the disk.
	Ext4 bool
	// From is a raw image file to copy the content from instead.
	From string
	// Bus is "virtio" for disks and "sata" for CD-ROMs unless set. Only virtio
	// disks can be written by the test.
	Bus string
	// Device is "disk" unless set; "cdrom", "floppy" and "lun" are others.
	Device string
	// Serial is the serial number shown to the guest, if not empty.
	Serial              string
	ReadOnly, Shareable bool
}

// Spec describes a virtual machine. The zero value is a paused machine without
// disks.
type Spec struct {
	// Name is a suffix for the domain's name; unset, a number is used.
	Name string
	// MemoryMiB is 64, or 192 with a Guest or UEFI, unless set.
	MemoryMiB int
	Disks     []Disk
	Power     Power
	// UEFI boots with OVMF and gives the domain its own NVRAM file.
	UEFI bool
	// Transient creates the domain without defining it.
	Transient bool
	// AgentChannel adds the guest agent's channel, with nobody behind it.
	// A Guest has it anyway.
	AgentChannel bool
	// Guest boots the tiny guest; the first disk gets an ext4 file system, mounted
	// at /mnt. Use it with Running.
	Guest *Guest
	// MACs adds one user-mode network card for each address.
	MACs []string
	// Extra is XML placed inside <devices>.
	Extra string
}

// domainXML renders the definition. Arguments are the lab's own values and those
// of the test, so only text is escaped.
func (s *Spec) domainXML(name string, disks []*vmDisk) string {
	var b strings.Builder
	mem := s.MemoryMiB
	if mem == 0 {
		mem = 64
		if s.Guest != nil || s.UEFI {
			mem = 192
		}
	}
	kind, cpu := "qemu", ""
	if s.Guest != nil && s.Guest.KVM {
		kind = "kvm"
		cpu = "<cpu mode='custom' match='exact' check='none'><model>qemu64</model></cpu>"
	}
	fmt.Fprintf(&b, "<domain type='%s'><name>%s</name><memory unit='MiB'>%d</memory><vcpu>1</vcpu>%s\n", kind, name, mem, cpu)
	b.WriteString("<os><type arch='x86_64' machine='q35'>hvm</type>")
	if s.UEFI {
		fmt.Fprintf(&b, "<loader readonly='yes' type='pflash'>%s</loader><nvram template='%s'/>", ovmfCode, ovmfVars)
	}
	if s.Guest != nil {
		fmt.Fprintf(&b, "<kernel>%s</kernel><initrd>%s</initrd><cmdline>%s</cmdline>",
			escape(s.Guest.kernel), escape(s.Guest.initrd), escape(s.Guest.cmdline()))
	}
	b.WriteString("</os>\n<features><acpi/><apic/></features>\n<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>\n")
	for _, d := range disks {
		b.WriteString(d.xml())
	}
	// Spare ports, so that a disk can be plugged in later.
	b.WriteString("<controller type='pci' index='0' model='pcie-root'/>")
	for range len(disks) + 10 {
		b.WriteString("<controller type='pci' model='pcie-root-port'/>")
	}
	b.WriteString("\n<controller type='usb' model='none'/><memballoon model='none'/>\n")
	for _, mac := range s.MACs {
		fmt.Fprintf(&b, "<interface type='user'><mac address='%s'/><model type='virtio'/></interface>\n", escape(mac))
	}
	if s.Guest != nil || s.AgentChannel {
		// No <source>: libvirt makes a path per start, so that a copy of this
		// definition can run beside the original.
		b.WriteString("<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\n")
	}
	if s.Guest != nil {
		fmt.Fprintf(&b, "<channel type='unix'><target type='virtio' name='%s'/></channel><serial type='pty'/>\n", controlPort)
	}
	b.WriteString(s.Extra)
	b.WriteString("</devices></domain>\n")
	return b.String()
}

func (d *vmDisk) xml() string {
	var b strings.Builder
	typ, attr := "file", "file"
	if d.loopDev != "" {
		typ, attr = "block", "dev"
	}
	fmt.Fprintf(&b, "<disk type='%s' device='%s'><driver name='qemu' type='%s' discard='unmap'/>", typ, d.device, d.spec.Format.driver())
	if src := d.source(); src != "" {
		fmt.Fprintf(&b, "<source %s='%s'/>", attr, escape(src))
	}
	fmt.Fprintf(&b, "<target dev='%s' bus='%s'/>", d.target, d.bus)
	if d.spec.Serial != "" {
		fmt.Fprintf(&b, "<serial>%s</serial>", escape(d.spec.Serial))
	}
	if d.spec.ReadOnly {
		b.WriteString("<readonly/>")
	}
	if d.spec.Shareable {
		b.WriteString("<shareable/>")
	}
	b.WriteString("</disk>\n")
	return b.String()
}

func escape(s string) string {
	var b strings.Builder
	// EscapeText fails only if the writer does.
	_ = xml.EscapeText(&b, []byte(s))
	return b.String()
}
