package kvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// FinishVM gives the disks of an incomplete VM their final names and removes the
// mark. It refuses while a disk is half written.
func (d *Driver) FinishVM(ctx context.Context, id hypervisor.VMID) error {
	return fail("FinishVM", id, "", "", d.finishVM(ctx, string(id)))
}

func (d *Driver) finishVM(ctx context.Context, uuid string) error {
	n, err := d.readNotes(ctx, uuid, xmlInactive)
	if err != nil {
		return err
	}
	if err := n.ours(); err != nil {
		return err
	}
	if n.Created.Incomplete == "" {
		return nil
	}
	if !d.ep.local {
		return d.remoteOnly("FinishVM", hypervisor.VMID(uuid))
	}
	dirs := map[string]bool{}
	for i := range n.Created.Files {
		f := &n.Created.Files[i]
		dirs[filepath.Dir(f.Path)] = true
		if f.Disk == "" {
			continue
		}
		if err := d.finishFile(f); err != nil {
			return fmt.Errorf("disk %s: %w", f.Disk, err)
		}
	}
	for dir := range dirs {
		if err := d.syncDir(dir); err != nil {
			return err
		}
	}
	return d.editNotes(ctx, uuid, affectLive|affectConfig, func(n *notes) { n.Created.Incomplete = "" })
}

// finishFile renames one image, unless an earlier attempt did.
func (d *Driver) finishFile(f *fileNote) error {
	_, err := d.files.lstat(f.Path + partialSuffix)
	if os.IsNotExist(err) {
		if _, err := d.files.lstat(f.Path); err != nil {
			return err
		}
		return nil
	}
	if err != nil {
		return err
	}
	if f.Format == "qcow2" {
		if _, err := headerOf(f.Path + partialSuffix); err != nil {
			return fmt.Errorf("it is being written, or was not committed: %w: %w", hypervisor.ErrBusy, err)
		}
	}
	if _, err := d.files.lstat(f.Path); err == nil {
		return fmt.Errorf("%s: %w", f.Path, hypervisor.ErrExists)
	} else if !os.IsNotExist(err) {
		return err
	}
	return d.files.rename(f.Path+partialSuffix, f.Path)
}

// SetPower starts, destroys or shuts down a domain and waits until it is so. A
// paused domain is resumed by PowerOn.
func (d *Driver) SetPower(ctx context.Context, id hypervisor.VMID, p hypervisor.Power) error {
	return fail("SetPower", id, "", "", d.setPower(ctx, string(id), p))
}

func (d *Driver) setPower(ctx context.Context, uuid string, p hypervisor.Power) error {
	state, _, err := d.conn.state(ctx, uuid)
	if err != nil {
		return err
	}
	off := func(s int) bool { return !active(s) }
	switch p {
	case hypervisor.PowerOn:
		return d.powerOn(ctx, uuid, state)
	case hypervisor.PowerOff:
		if !active(state) {
			return nil
		}
		if err := d.conn.destroy(ctx, uuid); err != nil && virCode(err) != virOperationInvalid && !errors.Is(err, hypervisor.ErrNotFound) {
			return err
		}
		return d.settled(d.waitState(ctx, uuid, off))
	case hypervisor.Shutdown:
		if !active(state) {
			return nil
		}
		if err := d.conn.shutdown(ctx, uuid); err != nil {
			return err
		}
		return d.settled(d.waitState(ctx, uuid, off))
	}
	return fmt.Errorf("power %q: %w", p, errors.ErrUnsupported)
}

// settled takes a transient domain that vanished as off.
func (d *Driver) settled(err error) error {
	if errors.Is(err, hypervisor.ErrNotFound) {
		return nil
	}
	return err
}

func (d *Driver) powerOn(ctx context.Context, uuid string, state int) error {
	n, err := d.readNotes(ctx, uuid, 0)
	if err != nil {
		return err
	}
	switch {
	case n.Created != nil && n.Created.Incomplete != "":
		return fmt.Errorf("the VM is incomplete: its restore has not finished: %w", errors.ErrUnsupported)
	case state == stateRunning || state == stateBlocked:
		return nil
	case state == statePaused:
		err = d.conn.resume(ctx, uuid)
	default:
		err = d.conn.start(ctx, uuid, 0)
	}
	if err != nil {
		return err
	}
	return d.waitState(ctx, uuid, func(s int) bool { return s == stateRunning || s == stateBlocked })
}

// DeleteVM destroys and undefines a domain that Holdfast made, and removes the
// files that it made for it.
func (d *Driver) DeleteVM(ctx context.Context, id hypervisor.VMID) error {
	err := d.deleteVM(ctx, string(id))
	if errors.Is(err, hypervisor.ErrNotFound) && ctx.Err() == nil {
		return nil
	}
	return fail("DeleteVM", id, "", "", err)
}

func (d *Driver) deleteVM(ctx context.Context, uuid string) error {
	n, err := d.readNotes(ctx, uuid, 0)
	if err != nil {
		return err
	}
	if err := n.ours(); err != nil {
		return err
	}
	if err := d.setPower(ctx, uuid, hypervisor.PowerOff); err != nil {
		return err
	}
	// Files first: while the domain is there, it tells which they are.
	if d.ep.local {
		for i := range n.Created.Files {
			path := n.Created.Files[i].Path
			for _, p := range []string{path, path + partialSuffix} {
				if err := d.removeIf(p, fs.FileMode.IsRegular); err != nil {
					return err
				}
			}
		}
	}
	return d.conn.undefine(ctx, uuid,
		undefineManagedSave|undefineSnapshotsMetadata|undefineCheckpointsMetadata|undefineNVRAM)
}
