package kvm

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// sinceSet is what becomes of the baselines that a snapshot is to be read
// against: nil error means valid.
type sinceSet map[hypervisor.Baseline]error

// baselinePlan chooses one checkpoint per disk to read against.
type baselinePlan struct {
	verdicts sinceSet
	// order lists the valid baselines of each disk, oldest first. A job reads a
	// disk against one checkpoint: the oldest, whose changes include those of the
	// others.
	order map[string][]hypervisor.Baseline
}

// base is the checkpoint to read a disk against, empty for all of it.
func (p *baselinePlan) base(disk string) string {
	if l := p.order[disk]; len(l) > 0 {
		return l[0].Name
	}
	return ""
}

// invalidate gives up the base of a disk.
func (p *baselinePlan) invalidate(disk string, reason hypervisor.Reason, err error) {
	l := p.order[disk]
	if len(l) == 0 {
		return
	}
	name := l[0].Name
	p.order[disk] = nil
	for _, b := range l {
		if b.Name == name {
			p.verdicts[b] = &hypervisor.BaselineError{Reason: reason, Err: err}
		} else {
			p.order[disk] = append(p.order[disk], b)
		}
	}
}

// planBaselines checks the baselines as far as that is possible without a job,
// and defines checkpoints again that libvirt has lost but the images have not.
// The domain must run.
func (d *Driver) planBaselines(ctx context.Context, m *machine, disks []hypervisor.DiskID, since []hypervisor.Baseline) (*baselinePlan, error) {
	vm := m.VM
	p := &baselinePlan{verdicts: sinceSet{}, order: map[string][]hypervisor.Baseline{}}
	if len(since) == 0 {
		return p, nil
	}
	existing, err := d.conn.checkpoints(ctx, vm.UUID)
	if err != nil {
		return nil, err
	}
	tokens := map[hypervisor.Baseline]*token{}
	for _, b := range since {
		t, err := checkBaseline(m, disks, b)
		p.verdicts[b] = err
		if err == nil {
			tokens[b] = t
		}
	}
	covers := map[string][]string{}
	for b, t := range tokens {
		if _, done := covers[b.Name]; done {
			continue
		}
		if !slices.Contains(existing, b.Name) {
			if err := d.redefine(ctx, vm, b.Name, t); err != nil {
				if ctx.Err() != nil || errors.Is(err, hypervisor.ErrUnavailable) {
					return nil, err
				}
				d.cfg.Logger.InfoContext(ctx, "checkpoint could not be defined again", "vm", vm.Name, "checkpoint", b.Name, "error", err)
				covers[b.Name] = nil
				continue
			}
		}
		text, err := d.conn.checkpointXML(ctx, vm.UUID, b.Name, checkpointNoDom)
		if err != nil {
			return nil, err
		}
		c, err := parseCheckpoint(text)
		if err != nil {
			return nil, err
		}
		covers[b.Name] = c.tracked()
	}
	if existing, err = d.conn.checkpoints(ctx, vm.UUID); err != nil {
		return nil, err
	}
	for b := range tokens {
		if !slices.Contains(covers[b.Name], string(b.Disk)) {
			p.verdicts[b] = &hypervisor.BaselineError{
				Reason: hypervisor.ReasonBaselineMissing,
				Err:    fmt.Errorf("no checkpoint %s with this disk, and none can be made from the image", b.Name),
			}
			continue
		}
		p.order[string(b.Disk)] = append(p.order[string(b.Disk)], b)
	}
	for _, l := range p.order {
		slices.SortFunc(l, func(a, b hypervisor.Baseline) int {
			return slices.Index(existing, a.Name) - slices.Index(existing, b.Name)
		})
	}
	return p, nil
}

// checkBaseline holds a baseline against the disk that is there now.
func checkBaseline(m *machine, disks []hypervisor.DiskID, b hypervisor.Baseline) (*token, error) {
	vm := m.VM
	invalid := func(r hypervisor.Reason, format string, args ...any) (*token, error) {
		return nil, &hypervisor.BaselineError{Reason: r, Err: fmt.Errorf(format, args...)}
	}
	disk := vm.Disk(b.Disk)
	t, err := parseToken(b.Token)
	switch {
	case b.Platform != hypervisor.KVM || b.VM != vm.ID:
		return invalid(hypervisor.ReasonBaselineMissing, "it is of %s %s", b.Platform, b.VM)
	case disk == nil || !slices.Contains(disks, b.Disk):
		return invalid(hypervisor.ReasonBaselineMissing, "the disk is not part of the snapshot")
	case disk.Tracking == hypervisor.TrackingNone:
		return invalid(disk.Reason, "%s", disk.Detail)
	case !hypervisor.IsOurs(b.Name):
		return invalid(hypervisor.ReasonBaselineMissing, "%q is not a checkpoint of ours", b.Name)
	case err != nil:
		return invalid(hypervisor.ReasonBaselineMissing, "%w", err)
	case m.notes.forgot(b.Name, string(b.Disk)):
		return invalid(hypervisor.ReasonBaselineMissing, "it was forgotten")
	case t.Content != "" && t.Content != disk.Content:
		return invalid(hypervisor.ReasonDiskReplaced, "%s, now %s", t.Content, disk.Content)
	case t.Size != 0 && t.Size != disk.Size:
		return invalid(hypervisor.ReasonDiskResized, "from %d to %d bytes", t.Size, disk.Size)
	case !slices.Contains(t.Disks, string(b.Disk)):
		return invalid(hypervisor.ReasonBaselineMissing, "its checkpoint does not cover the disk")
	}
	return t, nil
}

// redefine gives libvirt back a checkpoint that it has lost: the domain was
// undefined, or was transient. libvirt checks that the bitmaps are in the images.
// A disk whose bitmap is gone is left out.
func (d *Driver) redefine(ctx context.Context, vm *hypervisor.VM, name string, t *token) error {
	c := checkpoint{Name: name, Description: t.All, Created: t.Created}
	for i := range vm.Disks {
		disk := &vm.Disks[i]
		if disk.Backing == hypervisor.Passthrough && disk.Storage == "" || !hypervisor.ValidDiskID(disk.ID) {
			continue
		}
		cd := checkpointDisk{Name: string(disk.ID), Checkpoint: "no"}
		if disk.Tracking == hypervisor.TrackingBlocks && slices.Contains(t.Disks, cd.Name) {
			cd.Checkpoint, cd.Bitmap = "bitmap", name
		}
		if cd.Checkpoint == "no" && disk.Backing == hypervisor.Passthrough {
			continue
		}
		c.Disks = append(c.Disks, cd)
	}
	for {
		if len(c.tracked()) == 0 {
			return hypervisor.ErrNotFound
		}
		text, err := marshalXML(c)
		if err != nil {
			return err
		}
		err = d.conn.checkpointCreate(ctx, vm.UUID, text, redefine|redefineValidate)
		if err == nil || virCode(err) != virCheckpointBroken {
			return err
		}
		bad := diskInMessage(err, c.tracked())
		if bad == "" {
			return err
		}
		for i := range c.Disks {
			if c.Disks[i].Name == bad {
				c.Disks[i].Checkpoint, c.Disks[i].Bitmap = "no", ""
			}
		}
	}
}

var diskRE = regexp.MustCompile(`\bdisk '?([A-Za-z0-9._-]+)`)

// diskInMessage finds which of the disks libvirt's words speak of, "" for none.
func diskInMessage(err error, disks []string) string {
	for _, m := range diskRE.FindAllStringSubmatch(err.Error(), -1) {
		if slices.Contains(disks, m[1]) {
			return m[1]
		}
	}
	return ""
}

// Baselines lists what Holdfast left on the domain: for each disk of each
// checkpoint of ours a baseline, without those of unreleased snapshots.
func (d *Driver) Baselines(ctx context.Context, id hypervisor.VMID) iter.Seq2[hypervisor.Baseline, error] {
	return func(yield func(hypervisor.Baseline, error) bool) {
		list, err := d.baselines(ctx, string(id))
		if err != nil {
			yield(hypervisor.Baseline{}, fail("Baselines", id, "", "", err))
			return
		}
		for _, b := range list {
			if !yield(b, nil) {
				return
			}
		}
	}
}

func (d *Driver) baselines(ctx context.Context, uuid string) ([]hypervisor.Baseline, error) {
	n, err := d.readNotes(ctx, uuid, 0)
	if err != nil {
		return nil, err
	}
	names, err := d.conn.checkpoints(ctx, uuid)
	if err != nil {
		return nil, err
	}
	pending, err := d.pendingName(ctx, uuid)
	if err != nil {
		return nil, err
	}
	var list []hypervisor.Baseline
	for _, name := range names {
		if !hypervisor.IsOurs(name) || name == pending {
			continue
		}
		c, err := d.checkpoint(ctx, uuid, name)
		if errors.Is(err, hypervisor.ErrNotFound) {
			continue // deleted since it was listed
		}
		if err != nil {
			return nil, err
		}
		for _, disk := range c.tracked() {
			if n.forgot(name, disk) {
				continue
			}
			b, err := baselineOf(hypervisor.VMID(uuid), c, disk)
			if err != nil {
				return nil, err
			}
			list = append(list, b)
		}
	}
	return list, nil
}

// pendingName is the owner name of the unreleased snapshot whose job runs.
func (d *Driver) pendingName(ctx context.Context, uuid string) (string, error) {
	j, err := d.job(ctx, uuid)
	if err != nil || j == nil {
		return "", err
	}
	return j.owner(uuid), nil
}

func (d *Driver) checkpoint(ctx context.Context, uuid, name string) (*checkpoint, error) {
	text, err := d.conn.checkpointXML(ctx, uuid, name, checkpointNoDom)
	if err != nil {
		return nil, err
	}
	return parseCheckpoint(text)
}

// ForgetBaseline removes a disk's baseline. A checkpoint goes with the last of
// its disks: until then it is noted in the domain which are not needed. A domain
// that is off is started, paused, to remove the bitmaps from its images.
func (d *Driver) ForgetBaseline(ctx context.Context, b hypervisor.Baseline) error {
	if b.Platform != hypervisor.KVM || !hypervisor.IsOurs(b.Name) {
		return fail("ForgetBaseline", b.VM, b.Disk, "", fmt.Errorf("baseline %q: %w", b.Name, hypervisor.ErrNotOurs))
	}
	err := d.forget(ctx, string(b.VM), b.Name, func(disk string) bool { return disk == string(b.Disk) })
	if errors.Is(err, hypervisor.ErrNotFound) && ctx.Err() == nil {
		return nil // the domain, or the checkpoint, is gone
	}
	return fail("ForgetBaseline", b.VM, b.Disk, hypervisor.Hint(err), err)
}

// forget notes that disks of a checkpoint are not needed, and deletes the
// checkpoint when none is.
func (d *Driver) forget(ctx context.Context, uuid, name string, which func(disk string) bool) error {
	drop := func() error {
		return d.editNotes(ctx, uuid, affectLive|affectConfig, func(n *notes) {
			n.drop(func(cp string) bool { return cp == name })
		})
	}
	c, err := d.checkpoint(ctx, uuid, name)
	if virCode(err) == virNoCheckpoint {
		return drop() // whoever deleted it may not have come to that
	}
	if err != nil {
		return err
	}
	pending, err := d.pendingName(ctx, uuid)
	if err != nil {
		return err
	}
	if pending == name {
		return fmt.Errorf("checkpoint %s belongs to an unreleased snapshot: %w", name, hypervisor.ErrBusy)
	}
	n, err := d.readNotes(ctx, uuid, 0)
	if err != nil {
		return err
	}
	var dropped []string
	needed := false
	for _, disk := range c.tracked() {
		if which(disk) || n.forgot(name, disk) {
			dropped = append(dropped, disk)
		} else {
			needed = true
		}
	}
	if needed {
		return d.editNotes(ctx, uuid, affectLive|affectConfig, func(n *notes) {
			for _, disk := range dropped {
				n.forget(name, disk)
			}
		})
	}
	if err := d.deleteCheckpoint(ctx, uuid, name); err != nil {
		return err
	}
	return drop()
}

// deleteCheckpoint removes a checkpoint of ours and its bitmaps. Where a bitmap
// is lost, what libvirt knows of it is removed alone.
func (d *Driver) deleteCheckpoint(ctx context.Context, uuid, name string) error {
	if !hypervisor.IsOurs(name) {
		return hypervisor.ErrNotOurs
	}
	m, err := d.inventory(ctx, uuid, false)
	if err != nil {
		return err
	}
	if err := d.roomForBitmaps(m); err != nil {
		return err
	}
	stop := func(context.Context) error { return nil }
	if !m.active() {
		if stop, err = d.startPaused(ctx, m, name); err != nil {
			return err
		}
	}
	err = d.conn.checkpointDelete(ctx, uuid, name, 0)
	switch virCode(err) {
	case virInternal, virCheckpointBroken:
		d.cfg.Logger.InfoContext(ctx, "bitmaps of a checkpoint are lost", "vm", m.Name, "checkpoint", name, "error", err)
		err = d.deleteBroken(ctx, m, name)
	}
	if virCode(err) == virNoCheckpoint {
		err = nil
	}
	cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	return errors.Join(err, stop(cctx))
}

// deleteBroken deletes a checkpoint some of whose bitmaps are lost: what libvirt
// knows of it goes first, then it is defined again with the disks that still have
// their bitmap, and these are removed with it.
func (d *Driver) deleteBroken(ctx context.Context, m *machine, name string) error {
	c, err := d.checkpoint(ctx, m.UUID, name)
	if err != nil {
		return err
	}
	if err := d.conn.checkpointDelete(ctx, m.UUID, name, metadataOnly); err != nil {
		return err
	}
	t := &token{Version: 1, Created: c.Created, Disks: c.tracked(), All: c.Description}
	// An error is no proof that it was not defined: without it there is nothing to delete.
	err = d.redefine(ctx, m.VM, name, t)
	d.cfg.Logger.InfoContext(ctx, "checkpoint defined again for the bitmaps that are left", "vm", m.Name, "checkpoint", name, "error", err)
	err = d.conn.checkpointDelete(ctx, m.UUID, name, 0)
	if code := virCode(err); code == virInternal || code == virCheckpointBroken {
		return d.conn.checkpointDelete(ctx, m.UUID, name, metadataOnly)
	}
	return err
}

// roomForBitmaps refuses to change bitmaps while a file system that holds an
// image is nearly full: QEMU was seen to leave unusable images behind then.
func (d *Driver) roomForBitmaps(m *machine) error {
	if !d.ep.local {
		return nil
	}
	for i := range m.Disks {
		disk := &m.Disks[i]
		if disk.Backing != hypervisor.File || disk.Tracking != hypervisor.TrackingBlocks || !filepath.IsAbs(disk.Storage) {
			continue
		}
		free, total, err := d.files.space(disk.Storage)
		if err == nil && free < total/50 {
			return &hypervisor.Error{
				Op: "remove bitmaps", Platform: hypervisor.KVM, VM: m.ID, Disk: disk.ID,
				Hint: "make room on the volume of " + disk.Storage + ", then run holdfast recover",
				Err: fmt.Errorf("less than 2 %% of the volume is free (%d of %d bytes), where changing bitmaps can ruin an image: %w",
					free, total, hypervisor.ErrNoSpace),
			}
		}
	}
	return nil
}
