package kvm

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// Names and kinds of the attachments of a domain.
const (
	attachNVRAM  = "nvram"
	attachKernel = "kernel"
	attachInitrd = "initrd"
)

// attachments lists the files of a domain that are neither definition nor disk.
func (d *Driver) attachments(dom *libvirtxml.Domain) []hypervisor.Attachment {
	var out []hypervisor.Attachment
	add := func(name, path string) {
		if path = strings.TrimSpace(path); path == "" {
			return
		}
		a := hypervisor.Attachment{Name: name, Kind: name, Size: -1, Open: d.opener(path)}
		if d.ep.local {
			fi, err := d.files.stat(path)
			if os.IsNotExist(err) && name == attachNVRAM {
				return // made at the first start
			}
			if err == nil && fi.Mode().IsRegular() {
				a.Size = fi.Size()
			}
		}
		out = append(out, a)
	}
	if nv := dom.OS.NVRam; nv != nil {
		path := nv.NVRam
		if p := sourcePath(nv.Source); p != "" {
			path = p
		}
		add(attachNVRAM, path)
	}
	add(attachKernel, dom.OS.Kernel)
	add(attachInitrd, dom.OS.Initrd)
	return out
}

// opener reads a file of the daemon's host.
func (d *Driver) opener(path string) func(context.Context) (io.ReadCloser, error) {
	return func(ctx context.Context) (io.ReadCloser, error) {
		if !d.ep.local {
			return nil, d.remoteOnly("attachment", "")
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		f, err := d.files.open(path, os.O_RDONLY)
		if err != nil {
			return nil, fail("attachment", "", "", "", fmt.Errorf("read %s: %w", path, err))
		}
		return f, nil
	}
}
