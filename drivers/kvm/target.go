package kvm

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// droppedTag is the tag under which CreateVM tells what of the original
// definition the new VM has not.
const droppedTag = "holdfast.not-restored"

// CreateVM defines a domain that is marked incomplete in its metadata, with disks
// under temporary names: until FinishVM renames them libvirt cannot start it. Of
// a native libvirt definition only what is known to be harmless is taken; the tag
// "holdfast.not-restored" of the result lists what was not.
func (d *Driver) CreateVM(ctx context.Context, spec *hypervisor.VMSpec) (*hypervisor.VM, error) {
	const op = "CreateVM"
	if !d.ep.local {
		return nil, d.remoteOnly(op, "")
	}
	p, err := d.planVM(ctx, spec)
	if err != nil {
		return nil, fail(op, "", "", hypervisor.Hint(err), err)
	}
	uuid, err := d.conn.define(ctx, p.xml)
	if err != nil {
		// It may be defined all the same, if the answer was lost.
		err = errors.Join(fmt.Errorf("define %s: %w", spec.Name, err), d.undoCreate(ctx, spec.Name, p.owner))
		return nil, fail(op, "", "", hypervisor.Hint(err), err)
	}
	vm, err := d.fillVM(ctx, uuid, p)
	if err != nil {
		hint := hypervisor.Hint(err)
		return nil, fail(op, hypervisor.VMID(uuid), "", hint, errors.Join(err, d.undoCreate(ctx, spec.Name, p.owner)))
	}
	if len(p.dropped) > 0 {
		if vm.Tags == nil {
			vm.Tags = map[string]string{}
		}
		vm.Tags[droppedTag] = strings.Join(p.dropped, ", ")
		d.cfg.Logger.WarnContext(ctx, "parts of the definition are not restored", "vm", spec.Name, "parts", p.dropped)
	}
	return vm, nil
}

// undoCreate removes a half-made domain on a context of its own.
func (d *Driver) undoCreate(ctx context.Context, name, owner string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	uuid, err := d.conn.lookupName(ctx, name)
	if errors.Is(err, hypervisor.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	n, err := d.readNotes(ctx, uuid, xmlInactive)
	if err != nil || n.Created == nil || n.Created.Owner != owner {
		return err // somebody else's domain of that name
	}
	return d.deleteVM(ctx, uuid)
}

// vmPlan is a VM that is about to be made.
type vmPlan struct {
	owner   string
	disks   []plannedDisk
	notes   *notes
	xml     string
	dropped []string
	attach  map[string]hypervisor.Attachment // by the path to write it to
}

// planVM checks everything that can be checked beforehand.
func (d *Driver) planVM(ctx context.Context, spec *hypervisor.VMSpec) (*vmPlan, error) {
	if spec.Name == "" || strings.ContainsAny(spec.Name, "/\n\x00") {
		return nil, fmt.Errorf("%q cannot be the name of a domain", spec.Name)
	}
	if spec.Hardware.CPUs <= 0 || spec.Hardware.MemoryBytes < 1<<20 {
		return nil, fmt.Errorf("%d CPUs and %d bytes of memory make no VM", spec.Hardware.CPUs, spec.Hardware.MemoryBytes)
	}
	owner, err := ownName(spec.Owner)
	if err != nil {
		return nil, err
	}
	if err := d.checkIdentity(ctx, spec); err != nil {
		return nil, err
	}
	if err := d.checkNetworks(ctx, spec); err != nil {
		return nil, err
	}
	p := &vmPlan{owner: owner, attach: map[string]hypervisor.Attachment{}}
	p.notes = &notes{Created: &createdNote{Owner: owner, Incomplete: "yes"}}
	if err := d.placeDisks(ctx, spec, p); err != nil {
		return nil, err
	}
	files, err := d.placeAttachments(ctx, spec, p)
	if err != nil {
		return nil, err
	}
	p.xml, p.dropped, err = buildDomain(spec, p.disks, files, p.notes)
	return p, err
}

// checkIdentity refuses names, UUIDs and MAC addresses that are taken.
func (d *Driver) checkIdentity(ctx context.Context, spec *hypervisor.VMSpec) error {
	if _, err := d.conn.lookupName(ctx, spec.Name); err == nil {
		return fmt.Errorf("a VM with the name %q: %w", spec.Name, hypervisor.ErrExists)
	} else if !errors.Is(err, hypervisor.ErrNotFound) {
		return err
	}
	if spec.Identity != hypervisor.IdentityKeep {
		return nil
	}
	if spec.UUID != "" {
		if !validUUID(spec.UUID) {
			return fmt.Errorf("%q is no UUID", spec.UUID)
		}
		if _, _, err := d.conn.state(ctx, spec.UUID); err == nil {
			return fmt.Errorf("a VM with the UUID %s: %w", spec.UUID, hypervisor.ErrExists)
		} else if !errors.Is(err, hypervisor.ErrNotFound) {
			return err
		}
	}
	macs := map[string]bool{}
	for _, n := range spec.NICs {
		if n.MAC != "" {
			macs[strings.ToLower(n.MAC)] = true
		}
	}
	if len(macs) == 0 {
		return nil
	}
	ids, err := d.conn.domains(ctx)
	if err != nil {
		return err
	}
	for _, id := range ids {
		text, err := d.conn.domainXML(ctx, id, 0)
		if errors.Is(err, hypervisor.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		dom, err := parseDomain(text)
		if err != nil {
			return err
		}
		for _, n := range nics(dom) {
			if macs[n.MAC] {
				return fmt.Errorf("VM %s has the MAC address %s: %w", dom.Name, n.MAC, hypervisor.ErrExists)
			}
		}
	}
	return nil
}

func (d *Driver) checkNetworks(ctx context.Context, spec *hypervisor.VMSpec) error {
	for i := range spec.NICs {
		s := nicSource(spec.NICs[i].Network)
		if s.Network == nil {
			continue
		}
		ok, err := d.conn.networkExists(ctx, s.Network.Network)
		if err != nil {
			return err
		}
		if !ok {
			return &hypervisor.Error{
				Op: "network", Platform: hypervisor.KVM,
				Hint: "map it to one of this host: --map net:" + s.Network.Network + "=NETWORK, bridge:NAME or user",
				Err:  fmt.Errorf("network %q of %s: %w", s.Network.Network, spec.NICs[i].ID, hypervisor.ErrNotFound),
			}
		}
	}
	return nil
}

// placeDisks chooses target names and paths, and checks that there is room.
func (d *Driver) placeDisks(ctx context.Context, spec *hypervisor.VMSpec, p *vmPlan) error {
	need := map[string]int64{}
	used := map[string]bool{}
	for i := range spec.Disks {
		s := spec.Disks[i]
		if !hypervisor.ValidDiskID(s.ID) || s.Size <= 0 {
			return fmt.Errorf("disk %q of %d bytes", s.ID, s.Size)
		}
		s.Size = (s.Size + 511) &^ 511 // QEMU's disks have whole sectors
		disk := plannedDisk{DiskSpec: s, format: "qcow2", bus: diskBus(s.Bus)}
		if s.Format == "raw" {
			disk.format = "raw"
		}
		disk.dev = targetName(string(s.ID), disk.bus, used)
		if disk.dev == "" {
			return fmt.Errorf("disk %q is there twice", s.ID)
		}
		used[disk.dev] = true
		storage := s.Storage
		if storage == "" {
			storage = spec.Placement.Storage
		}
		dir, err := d.storageDir(ctx, storage)
		if err != nil {
			return err
		}
		need[dir] += s.Size
		if disk.path, err = d.freePath(dir, fileBase(spec.Name)+"-"+disk.dev, "."+disk.format); err != nil {
			return err
		}
		p.disks = append(p.disks, disk)
		f := fileNote{Path: disk.path, Disk: disk.dev, Format: disk.format, Size: s.Size}
		if disk.dev != string(s.ID) {
			f.Alias = string(s.ID)
		}
		p.notes.Created.Files = append(p.notes.Created.Files, f)
	}
	for dir, n := range need {
		free, _, err := d.files.space(dir)
		if err != nil {
			return err
		}
		if free < n && !d.cfg.Overcommit {
			return &hypervisor.Error{
				Op: "storage", Platform: hypervisor.KVM, Hint: "make room, or choose another storage",
				Err: fmt.Errorf("%s has %d bytes free, the disks have %d: %w", dir, free, n, hypervisor.ErrNoSpace),
			}
		}
	}
	return nil
}

// diskBus maps buses to ones that libvirt has.
func diskBus(bus string) string {
	switch b := strings.ToLower(bus); b {
	case "virtio", "scsi", "sata", "ide", "usb":
		return b
	case "nvme":
		return "sata"
	}
	return "virtio"
}

// targetName is the disk's own ID where libvirt takes it, else the next free name
// of its bus.
func targetName(id, bus string, used map[string]bool) string {
	prefix := map[string]string{"virtio": "vd", "ide": "hd"}[bus]
	if prefix == "" {
		prefix = "sd"
	}
	if rest, ok := strings.CutPrefix(id, prefix); ok && rest != "" && strings.Trim(rest, "abcdefghijklmnopqrstuvwxyz") == "" {
		if used[id] {
			return ""
		}
		return id
	}
	for n := range 26 * 27 {
		name := prefix + string(rune('a'+n%26))
		if n >= 26 {
			name = prefix + string(rune('a'+n/26-1)) + string(rune('a'+n%26))
		}
		if !used[name] {
			return name
		}
	}
	return ""
}

// fileBase turns a VM's name into something that every file system takes.
func fileBase(name string) string {
	out := []byte(name)
	for i, c := range out {
		ok := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.' && i > 0
		if !ok {
			out[i] = '_'
		}
	}
	return string(out[:min(len(out), 100)])
}

// partialSuffix is what the name of a disk ends in until its VM is complete.
const partialSuffix = ".partial"

// freePath returns a path in dir at which nothing is, nor anything unfinished.
func (d *Driver) freePath(dir, base, ext string) (string, error) {
	for n := range 1000 {
		p := filepath.Join(dir, base+ext)
		if n > 0 {
			p = filepath.Join(dir, fmt.Sprintf("%s.%d%s", base, n, ext))
		}
		_, err := d.files.lstat(p)
		_, perr := d.files.lstat(p + partialSuffix)
		if os.IsNotExist(err) && os.IsNotExist(perr) {
			return p, nil
		}
		for _, err := range []error{err, perr} {
			if err != nil && !os.IsNotExist(err) {
				return "", err
			}
		}
	}
	return "", fmt.Errorf("no name is free for %s in %s: %w", base, dir, hypervisor.ErrExists)
}

// storageDir finds the directory that a storage name means: an absolute path, or
// a libvirt storage pool of directories.
func (d *Driver) storageDir(ctx context.Context, storage string) (string, error) {
	dir := storage
	switch {
	case storage == "":
		dir = d.cfg.StorageDir
	case !strings.HasPrefix(storage, "/"):
		text, err := d.conn.poolXML(ctx, storage)
		if err != nil {
			return "", fmt.Errorf("storage pool %q: %w", storage, err)
		}
		var pool struct {
			Type string `xml:"type,attr"`
			Path string `xml:"target>path"`
		}
		if err := xml.Unmarshal([]byte(text), &pool); err != nil {
			return "", fmt.Errorf("storage pool %q: %w", storage, err)
		}
		if pool.Type != "dir" && pool.Type != "fs" && pool.Type != "netfs" {
			return "", fmt.Errorf("storage pool %q is of type %q, only directories can be used: %w", storage, pool.Type, errors.ErrUnsupported)
		}
		dir = pool.Path
	}
	fi, err := d.files.stat(dir)
	if os.IsNotExist(err) {
		return "", fmt.Errorf("storage %s: %w", dir, hypervisor.ErrNotFound)
	}
	if err != nil {
		return "", err
	}
	if !fi.IsDir() {
		return "", fmt.Errorf("storage %s is not a directory: %w", dir, errors.ErrUnsupported)
	}
	return dir, nil
}

// maxAttachment bounds NVRAM, kernel and initrd that are written, in bytes.
const maxAttachment = 1 << 30

// placeAttachments chooses where NVRAM, kernel and initrd go.
func (d *Driver) placeAttachments(ctx context.Context, spec *hypervisor.VMSpec, p *vmPlan) (map[string]string, error) {
	files := map[string]string{}
	dir, err := d.storageDir(ctx, spec.Placement.Storage)
	if err != nil {
		return nil, err
	}
	for _, a := range spec.Attachments {
		suffix := map[string]string{attachNVRAM: "_VARS.fd", attachKernel: "-kernel", attachInitrd: "-initrd"}[a.Kind]
		if suffix == "" || files[a.Kind] != "" || a.Open == nil || a.Kind == attachNVRAM && spec.Hardware.Firmware != hypervisor.UEFI {
			p.dropped = append(p.dropped, "attachment "+a.Name)
			continue
		}
		path, err := d.freePath(dir, fileBase(spec.Name), suffix)
		if err != nil {
			return nil, err
		}
		files[a.Kind] = path
		p.attach[path] = a
		p.notes.Created.Files = append(p.notes.Created.Files, fileNote{Path: path})
	}
	return files, nil
}

// fillVM makes the files of a domain that is defined.
func (d *Driver) fillVM(ctx context.Context, uuid string, p *vmPlan) (*hypervisor.VM, error) {
	for path, a := range p.attach {
		if err := d.writeAttachment(ctx, path, a); err != nil {
			return nil, fmt.Errorf("attachment %s: %w", a.Name, err)
		}
	}
	for i := range p.disks {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		f := &p.notes.Created.Files[i]
		if err := d.emptyImage(f, os.O_EXCL); err != nil {
			return nil, err
		}
	}
	m, err := d.inventory(ctx, uuid, false)
	if err != nil {
		return nil, err
	}
	return m.VM, nil
}

func (d *Driver) writeAttachment(ctx context.Context, path string, a hypervisor.Attachment) (err error) {
	r, err := a.Open(ctx)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // only read
	f, err := d.files.open(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	n, err := io.Copy(f, io.LimitReader(r, maxAttachment+1))
	if err != nil {
		return noSpace(err)
	}
	if n > maxAttachment {
		return fmt.Errorf("it has more than %d bytes", maxAttachment)
	}
	return f.Sync()
}
