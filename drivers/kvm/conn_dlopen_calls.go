//go:build libvirt_dlopen && cgo && linux

package kvm

import (
	"context"

	"libvirt.org/go/libvirt"
)

func (c *dlopenConn) versions(ctx context.Context) (uint64, uint64, error) {
	v, err := lib(ctx, c, func(l *libvirt.Connect) ([2]uint64, error) {
		lv, err := l.GetLibVersion()
		if err != nil {
			return [2]uint64{}, err
		}
		hv, err := l.GetVersion()
		return [2]uint64{uint64(lv), uint64(hv)}, err
	})
	return v[0], v[1], err
}

func (c *dlopenConn) hostname(ctx context.Context) (string, error) {
	return lib(ctx, c, func(l *libvirt.Connect) (string, error) { return l.GetHostname() })
}

func (c *dlopenConn) domains(ctx context.Context) ([]string, error) {
	return lib(ctx, c, func(l *libvirt.Connect) ([]string, error) {
		doms, err := l.ListAllDomains(0)
		if err != nil {
			return nil, err
		}
		ids := make([]string, len(doms))
		for i := range doms {
			defer doms[i].Free() //nolint:errcheck // gives back memory alone
			if ids[i], err = doms[i].GetUUIDString(); err != nil {
				return nil, err
			}
		}
		return ids, nil
	})
}

func (c *dlopenConn) lookupName(ctx context.Context, name string) (string, error) {
	return lib(ctx, c, func(l *libvirt.Connect) (string, error) {
		d, err := l.LookupDomainByName(name)
		if err != nil {
			return "", err
		}
		defer d.Free() //nolint:errcheck // gives back memory alone
		return d.GetUUIDString()
	})
}

func (c *dlopenConn) domainXML(ctx context.Context, uuid string, flags uint32) (string, error) {
	return onDomain(ctx, c, uuid, func(d *libvirt.Domain) (string, error) {
		return d.GetXMLDesc(libvirt.DomainXMLFlags(flags))
	})
}

func (c *dlopenConn) state(ctx context.Context, uuid string) (int, int, error) {
	v, err := onDomain(ctx, c, uuid, func(d *libvirt.Domain) ([2]int, error) {
		s, r, err := d.GetState()
		return [2]int{int(s), r}, err
	})
	return v[0], v[1], err
}

func (c *dlopenConn) persistent(ctx context.Context, uuid string) (bool, error) {
	return onDomain(ctx, c, uuid, func(d *libvirt.Domain) (bool, error) { return d.IsPersistent() })
}

func (c *dlopenConn) managedSave(ctx context.Context, uuid string) (bool, error) {
	return onDomain(ctx, c, uuid, func(d *libvirt.Domain) (bool, error) { return d.HasManagedSaveImage(0) })
}

func (c *dlopenConn) capacity(ctx context.Context, uuid, disk string) (int64, error) {
	return onDomain(ctx, c, uuid, func(d *libvirt.Domain) (int64, error) {
		info, err := d.GetBlockInfo(disk, 0)
		if err != nil {
			return 0, err
		}
		return int64(info.Capacity), nil
	})
}

func (c *dlopenConn) define(ctx context.Context, xml string) (string, error) {
	return lib(ctx, c, func(l *libvirt.Connect) (string, error) {
		d, err := l.DomainDefineXML(xml)
		if err != nil {
			return "", err
		}
		defer d.Free() //nolint:errcheck // gives back memory alone
		return d.GetUUIDString()
	})
}

func (c *dlopenConn) undefine(ctx context.Context, uuid string, flags uint32) error {
	return doDomain(ctx, c, uuid, func(d *libvirt.Domain) error {
		return d.UndefineFlags(libvirt.DomainUndefineFlagsValues(flags))
	})
}

func (c *dlopenConn) start(ctx context.Context, uuid string, flags uint32) error {
	return doDomain(ctx, c, uuid, func(d *libvirt.Domain) error {
		return d.CreateWithFlags(libvirt.DomainCreateFlags(flags))
	})
}

func (c *dlopenConn) destroy(ctx context.Context, uuid string) error {
	return doDomain(ctx, c, uuid, func(d *libvirt.Domain) error { return d.DestroyFlags(0) })
}

func (c *dlopenConn) shutdown(ctx context.Context, uuid string) error {
	return doDomain(ctx, c, uuid, func(d *libvirt.Domain) error { return d.ShutdownFlags(0) })
}

func (c *dlopenConn) setMetadata(ctx context.Context, uuid, xml string, flags uint32) error {
	return doDomain(ctx, c, uuid, func(d *libvirt.Domain) error {
		return d.SetMetadata(metadataElement, xml, metadataKey, metadataURI, libvirt.DomainModificationImpact(flags))
	})
}

func (c *dlopenConn) jobType(ctx context.Context, uuid string) (int, error) {
	return onDomain(ctx, c, uuid, func(d *libvirt.Domain) (int, error) {
		info, err := d.GetJobInfo()
		if err != nil {
			return 0, err
		}
		return int(info.Type), nil
	})
}

func (c *dlopenConn) jobOperation(ctx context.Context, uuid string) (int, error) {
	return onDomain(ctx, c, uuid, func(d *libvirt.Domain) (int, error) {
		info, err := d.GetJobStats(0)
		if err != nil {
			return 0, err
		}
		return int(info.Operation), nil
	})
}

func (c *dlopenConn) abortJob(ctx context.Context, uuid string) error {
	return doDomain(ctx, c, uuid, func(d *libvirt.Domain) error { return d.AbortJob() })
}

func (c *dlopenConn) blockJob(ctx context.Context, uuid, disk string) (int, bool, error) {
	t, err := onDomain(ctx, c, uuid, func(d *libvirt.Domain) (int, error) {
		info, err := d.GetBlockJobInfo(disk, 0)
		if err != nil {
			return 0, err
		}
		return int(info.Type), nil
	})
	return t, t != 0, err
}

func (c *dlopenConn) backupBegin(ctx context.Context, uuid, backup, checkpoint string, flags uint32) error {
	return doDomain(ctx, c, uuid, func(d *libvirt.Domain) error {
		return d.BackupBegin(backup, checkpoint, libvirt.DomainBackupBeginFlags(flags))
	})
}

func (c *dlopenConn) backupXML(ctx context.Context, uuid string) (string, error) {
	return onDomain(ctx, c, uuid, func(d *libvirt.Domain) (string, error) { return d.BackupGetXMLDesc(0) })
}

func (c *dlopenConn) checkpoints(ctx context.Context, uuid string) ([]string, error) {
	return onDomain(ctx, c, uuid, func(d *libvirt.Domain) ([]string, error) {
		cps, err := d.ListAllCheckpoints(libvirt.DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL)
		if err != nil {
			return nil, err
		}
		names := make([]string, len(cps))
		for i := range cps {
			defer cps[i].Free() //nolint:errcheck // gives back memory alone
			if names[i], err = cps[i].GetName(); err != nil {
				return nil, err
			}
		}
		return names, nil
	})
}

// onCheckpoint is onDomain with a checkpoint looked up.
func onCheckpoint[T any](ctx context.Context, c *dlopenConn, uuid, name string, f func(*libvirt.DomainCheckpoint) (T, error)) (T, error) {
	return onDomain(ctx, c, uuid, func(d *libvirt.Domain) (T, error) {
		cp, err := d.CheckpointLookupByName(name, 0)
		if err != nil {
			var zero T
			return zero, err
		}
		defer cp.Free() //nolint:errcheck // gives back memory alone
		return f(cp)
	})
}

func (c *dlopenConn) checkpointXML(ctx context.Context, uuid, name string, flags uint32) (string, error) {
	return onCheckpoint(ctx, c, uuid, name, func(cp *libvirt.DomainCheckpoint) (string, error) {
		return cp.GetXMLDesc(libvirt.DomainCheckpointXMLFlags(flags))
	})
}

func (c *dlopenConn) checkpointCreate(ctx context.Context, uuid, xml string, flags uint32) error {
	return doDomain(ctx, c, uuid, func(d *libvirt.Domain) error {
		cp, err := d.CreateCheckpointXML(xml, libvirt.DomainCheckpointCreateFlags(flags))
		if err != nil {
			return err
		}
		return cp.Free()
	})
}

func (c *dlopenConn) checkpointDelete(ctx context.Context, uuid, name string, flags uint32) error {
	_, err := onCheckpoint(ctx, c, uuid, name, func(cp *libvirt.DomainCheckpoint) (struct{}, error) {
		return struct{}{}, cp.Delete(libvirt.DomainCheckpointDeleteFlags(flags))
	})
	return err
}

func (c *dlopenConn) agent(ctx context.Context, uuid, command string, timeout int) (string, error) {
	return onDomain(ctx, c, uuid, func(d *libvirt.Domain) (string, error) {
		return d.QemuAgentCommand(command, libvirt.DomainQemuAgentCommandTimeout(timeout), 0)
	})
}

func (c *dlopenConn) monitor(ctx context.Context, uuid, command string) (string, error) {
	return onDomain(ctx, c, uuid, func(d *libvirt.Domain) (string, error) { return d.QemuMonitorCommand(command, 0) })
}

func (c *dlopenConn) networkExists(ctx context.Context, name string) (bool, error) {
	return lib(ctx, c, func(l *libvirt.Connect) (bool, error) {
		n, err := l.LookupNetworkByName(name)
		if virCode(dlopenError(err)) == virNoNetwork {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		return true, n.Free()
	})
}

func (c *dlopenConn) poolXML(ctx context.Context, name string) (string, error) {
	return lib(ctx, c, func(l *libvirt.Connect) (string, error) {
		p, err := l.LookupStoragePoolByName(name)
		if err != nil {
			return "", err
		}
		defer p.Free() //nolint:errcheck // gives back memory alone
		return p.GetXMLDesc(0)
	})
}

func (c *dlopenConn) resume(ctx context.Context, uuid string) error {
	return doDomain(ctx, c, uuid, func(d *libvirt.Domain) error { return d.Resume() })
}
