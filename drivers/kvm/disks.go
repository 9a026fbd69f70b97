package kvm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// classify describes the disk in slot number n as far as the definition and, on
// the daemon's own host, the header of its image tell. Whether a disk is tracked
// is decided by its format (driver type), never by where it lies: qcow2 on a
// block device has bitmaps, raw in a file has none. Size is filled in later.
func classify(disk *libvirtxml.DomainDisk, n int, local bool) hypervisor.Disk {
	d := hypervisor.Disk{
		ID: hypervisor.DiskID(target(disk)), Slot: n, Format: diskFormat(disk),
		Snapshottable: true, Tracking: hypervisor.TrackingNone,
	}
	if disk.Target != nil {
		d.Bus = disk.Target.Bus
	}
	d.Controller, d.Slot = diskAddress(disk, n)
	path := sourcePath(disk.Source)
	bottom, top := path, (*header)(nil)
	if local && path != "" {
		bottom, top = chainBottom(path, d.Format)
	}
	describeSource(&d, disk, bottom, local)
	d.Attrs.ReadOnly = disk.ReadOnly != nil
	d.Attrs.Shared = disk.Shareable != nil
	d.Attrs.Ephemeral = disk.Transient != nil
	d.Attrs.Encrypted = disk.Encryption != nil || disk.Source != nil && disk.Source.Encryption != nil
	d.Attrs.Removable = disk.Device == "cdrom" || disk.Device == "floppy" ||
		disk.Target != nil && disk.Target.Removable == "on"

	refuse := func(r hypervisor.Reason, detail string) hypervisor.Disk {
		d.Snapshottable, d.Reason, d.Detail = false, r, detail
		return d
	}
	switch {
	case !hypervisor.ValidDiskID(d.ID):
		return refuse(hypervisor.ReasonRefused, fmt.Sprintf("target name %q cannot name a disk", d.ID))
	case disk.Device == "cdrom" || disk.Device == "floppy":
		return refuse(hypervisor.ReasonCDROM, "device is a "+disk.Device)
	case disk.Device == "lun":
		d.Backing = hypervisor.Passthrough
		return refuse(hypervisor.ReasonPassthrough, "the guest speaks SCSI to the LUN itself (device='lun')")
	case disk.Source != nil && (disk.Source.VHostUser != nil || disk.Source.VHostVDPA != nil || disk.Source.NVME != nil):
		d.Backing = hypervisor.Passthrough
		return refuse(hypervisor.ReasonPassthrough, "QEMU's block layer does not see the writes of this disk, or drives the device itself")
	case emptySource(disk.Source):
		return refuse(hypervisor.ReasonCDROM, "no medium")
	case d.Attrs.ReadOnly:
		return refuse(hypervisor.ReasonReadOnly, "the guest cannot write it")
	case d.Attrs.Shared:
		return refuse(hypervisor.ReasonShared, "other VMs may write it, and no snapshot of this VM would see that")
	case d.Attrs.Ephemeral:
		return refuse(hypervisor.ReasonIndependent, "transient: its changes are dropped when the VM stops")
	case disk.Source != nil && disk.Source.Dir != nil:
		return refuse(hypervisor.ReasonRefused, "a directory shown as a disk has no image")
	case top != nil && top.corrupt:
		return refuse(hypervisor.ReasonChainUnhealthy, "the qcow2 image is marked corrupt: run qemu-img check")
	}
	d.Tracking, d.Reason, d.Detail = tracking(d.Format, top)
	return d
}

// tracking tells whether QEMU can keep a persistent dirty bitmap for an image.
func tracking(format string, top *header) (hypervisor.Tracking, hypervisor.Reason, string) {
	switch {
	case format != "qcow2":
		return hypervisor.TrackingNone, hypervisor.ReasonNeverTracked, "format " + format + " cannot hold dirty bitmaps"
	case top != nil && top.version < 3:
		return hypervisor.TrackingNone, hypervisor.ReasonNeverTracked,
			"qcow2 version 2 cannot hold dirty bitmaps: qemu-img amend -o compat=1.1"
	}
	return hypervisor.TrackingBlocks, "", ""
}

// describeSource fills in where a disk lies and what identifies its content.
func describeSource(d *hypervisor.Disk, disk *libvirtxml.DomainDisk, bottom string, local bool) {
	s := disk.Source
	switch {
	case s == nil:
		d.Backing = hypervisor.File
	case s.File != nil:
		d.Backing, d.Storage = hypervisor.File, s.File.File
		d.Content = fileContent(bottom, local)
	case s.Block != nil:
		d.Backing, d.Storage = hypervisor.BlockVolume, s.Block.Dev
		d.Content = fileContent(bottom, local)
	case s.Network != nil:
		d.Backing = hypervisor.Network
		d.Storage = s.Network.Protocol + ":" + s.Network.Name
		d.Content = "network:" + d.Storage
	case s.Volume != nil:
		d.Backing = hypervisor.File
		d.Storage = s.Volume.Pool + "/" + s.Volume.Volume
		d.Content = "volume:" + d.Storage
	case s.NVME != nil && s.NVME.PCI != nil:
		d.Storage = "nvme"
	case s.Dir != nil:
		d.Backing, d.Storage = hypervisor.File, s.Dir.Dir
	}
}

// fileContent identifies what is behind a path. Device nodes are made anew at
// every boot, so that a block device is its path; the bitmaps in a qcow2 on it
// show a replacement.
func fileContent(path string, local bool) string {
	if path == "" {
		return ""
	}
	if !local {
		return "path:" + path
	}
	fi, err := os.Stat(path)
	if err != nil {
		return "path:" + path
	}
	if fi.Mode()&os.ModeDevice != 0 {
		return "block:" + path
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	id, err := fileIdentity(path)
	if err != nil {
		return "path:" + path
	}
	return "file:" + path + "#" + id
}

// emptySource reports whether a drive has no medium.
func emptySource(s *libvirtxml.DomainDiskSource) bool {
	if s == nil {
		return true
	}
	return s.File != nil && s.File.File == "" || s.Block != nil && s.Block.Dev == "" ||
		s.File == nil && s.Block == nil && s.Network == nil && s.Volume == nil &&
			s.Dir == nil && s.NVME == nil && s.VHostUser == nil && s.VHostVDPA == nil
}

// diskAddress names the controller of a disk and its place there; without an
// address the position in the definition stands in.
func diskAddress(disk *libvirtxml.DomainDisk, n int) (controller string, slot int) {
	a := disk.Address
	bus := ""
	if disk.Target != nil {
		bus = disk.Target.Bus
	}
	switch {
	case a == nil:
		return "", n
	case a.Drive != nil:
		if a.Drive.Controller != nil {
			controller = fmt.Sprintf("%s%d", bus, *a.Drive.Controller)
		}
		if a.Drive.Unit != nil {
			n = int(*a.Drive.Unit)
		}
	case a.PCI != nil:
		controller = "pci"
		if p := a.PCI; p.Domain != nil && p.Bus != nil && p.Slot != nil && p.Function != nil {
			controller = fmt.Sprintf("pci %04x:%02x:%02x.%x", *p.Domain, *p.Bus, *p.Slot, *p.Function)
		}
	}
	return controller, n
}

// hostDevices lists devices of the host that the guest has for itself and that
// are, or may be, storage: no snapshot holds them, and nobody shall believe so.
func hostDevices(dom *libvirtxml.Domain, local bool) []hypervisor.Disk {
	var disks []hypervisor.Disk
	for i := range dom.Devices.Hostdevs {
		what, storage := hostDevice(&dom.Devices.Hostdevs[i], local)
		if !storage {
			continue
		}
		disks = append(disks, hypervisor.Disk{
			ID: hypervisor.DiskID(fmt.Sprintf("hostdev%d", i)), Slot: i, Content: "hostdev:" + what,
			Backing: hypervisor.Passthrough, Bus: strings.ToLower(strings.Fields(what)[0]), Storage: what,
			Tracking: hypervisor.TrackingNone, Reason: hypervisor.ReasonPassthrough,
			Detail: "host device " + what + " is given to the guest: QEMU cannot snapshot it",
		})
	}
	return disks
}

// hostDevice names a host device, and tells whether it is storage: true also when
// that cannot be told.
func hostDevice(h *libvirtxml.DomainHostdev, local bool) (what string, storage bool) {
	switch {
	case h.SubsysSCSI != nil:
		what = "SCSI"
		if s := h.SubsysSCSI.Source; s != nil {
			switch {
			case s.Host != nil && s.Host.Adapter != nil:
				what += " " + s.Host.Adapter.Name
			case s.ISCSI != nil:
				what += " " + s.ISCSI.Name
			}
		}
		return what, true
	case h.SubsysSCSIHost != nil:
		return "SCSI host", true
	case h.SubsysPCI != nil:
		what = "PCI"
		if s := h.SubsysPCI.Source; s != nil && s.Address != nil {
			a := s.Address
			if a.Domain != nil && a.Bus != nil && a.Slot != nil && a.Function != nil {
				addr := fmt.Sprintf("%04x:%02x:%02x.%x", *a.Domain, *a.Bus, *a.Slot, *a.Function)
				return what + " " + addr, !local || mayStore("/sys/bus/pci/devices/"+addr+"/class", "0x01")
			}
		}
		return what, true
	case h.SubsysUSB != nil:
		what = "USB"
		if s := h.SubsysUSB.Source; s != nil && s.Vendor != nil && s.Product != nil {
			what += " " + s.Vendor.ID + ":" + s.Product.ID
			return what, !local || usbMayStore(s.Vendor.ID, s.Product.ID)
		}
		return what, true
	case h.CapsStorage != nil:
		return "block device", true
	}
	return "", false
}

// mayStore reads a class from sysfs: unreadable means that it may be storage.
func mayStore(file, class string) bool {
	b, err := os.ReadFile(file)
	return err != nil || strings.HasPrefix(string(b), class)
}

// usbMayStore looks for the device in sysfs and whether one of its interfaces is
// mass storage. A device that is not there may be anything.
func usbMayStore(vendor, product string) bool {
	vendor, product = strings.TrimPrefix(vendor, "0x"), strings.TrimPrefix(product, "0x")
	ids, err := filepath.Glob("/sys/bus/usb/devices/*/idVendor")
	if err != nil {
		return true
	}
	found := false
	for _, f := range ids {
		dir := filepath.Dir(f)
		v, _ := os.ReadFile(f)
		p, _ := os.ReadFile(filepath.Join(dir, "idProduct"))
		if strings.TrimSpace(string(v)) != vendor || strings.TrimSpace(string(p)) != product {
			continue
		}
		found = true
		classes, _ := filepath.Glob(filepath.Join(dir, "*", "bInterfaceClass"))
		for _, c := range classes {
			if mayStore(c, "08") {
				return true
			}
		}
	}
	return !found
}
