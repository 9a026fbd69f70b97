package kvm

import (
	"errors"
	"fmt"

	"libvirt.org/go/libvirtxml"
)

// maxDomainXML bounds definitions that are parsed, in bytes.
const maxDomainXML = 8 << 20

// parseDomain parses a domain definition. It never panics, whatever the input.
func parseDomain(text string) (dom *libvirtxml.Domain, err error) {
	if len(text) > maxDomainXML {
		return nil, fmt.Errorf("domain XML of %d bytes", len(text))
	}
	// The library indexes attributes that a hostile document may lack.
	defer func() {
		if p := recover(); p != nil {
			dom, err = nil, fmt.Errorf("domain XML is malformed: %v", p)
		}
	}()
	dom = new(libvirtxml.Domain)
	if err := dom.Unmarshal(text); err != nil {
		return nil, fmt.Errorf("domain XML: %w", err)
	}
	if dom.Devices == nil {
		dom.Devices = new(libvirtxml.DomainDeviceList)
	}
	if dom.OS == nil {
		dom.OS = new(libvirtxml.DomainOS)
	}
	return dom, nil
}

// target returns the name of a disk's slot.
func target(d *libvirtxml.DomainDisk) string {
	if d.Target == nil {
		return ""
	}
	return d.Target.Dev
}

// diskFormat returns the format that the definition states; raw when it says
// nothing, as libvirt has it.
func diskFormat(d *libvirtxml.DomainDisk) string {
	if d.Driver != nil && d.Driver.Type != "" {
		return d.Driver.Type
	}
	return "raw"
}

// sourcePath returns the path of a source that is a file or block device.
func sourcePath(s *libvirtxml.DomainDiskSource) string {
	switch {
	case s == nil:
		return ""
	case s.File != nil:
		return s.File.File
	case s.Block != nil:
		return s.Block.Dev
	}
	return ""
}

// findDisk returns the disk in a slot.
func findDisk(dom *libvirtxml.Domain, slot string) *libvirtxml.DomainDisk {
	for i := range dom.Devices.Disks {
		if target(&dom.Devices.Disks[i]) == slot {
			return &dom.Devices.Disks[i]
		}
	}
	return nil
}

// agentChannel returns whether the domain has the channel of the guest agent, and
// its state: "connected", "disconnected" or unknown.
func agentChannel(dom *libvirtxml.Domain) (present bool, state string) {
	for i := range dom.Devices.Channels {
		t := dom.Devices.Channels[i].Target
		if t != nil && t.VirtIO != nil && t.VirtIO.Name == "org.qemu.guest_agent.0" {
			return true, t.VirtIO.State
		}
	}
	return false, ""
}

// marshalDomain renders a definition.
func marshalDomain(dom *libvirtxml.Domain) (string, error) {
	s, err := dom.Marshal()
	if err != nil {
		return "", errors.Join(errors.New("domain XML"), err)
	}
	return s, nil
}
