//go:build !(libvirt_dlopen && cgo && linux)

package kvm

import (
	"context"

	libvirt "github.com/digitalocean/go-libvirt"
)

func (c *rpcConn) versions(ctx context.Context) (uint64, uint64, error) {
	v, err := rpc(ctx, c, func(l *libvirt.Libvirt) ([2]uint64, error) {
		lib, err := l.ConnectGetLibVersion()
		if err != nil {
			return [2]uint64{}, err
		}
		hv, err := l.ConnectGetVersion()
		return [2]uint64{lib, hv}, err
	})
	return v[0], v[1], err
}

func (c *rpcConn) hostname(ctx context.Context) (string, error) {
	return rpc(ctx, c, func(l *libvirt.Libvirt) (string, error) { return l.ConnectGetHostname() })
}

func (c *rpcConn) domains(ctx context.Context) ([]string, error) {
	return rpc(ctx, c, func(l *libvirt.Libvirt) ([]string, error) {
		doms, _, err := l.ConnectListAllDomains(1, 0)
		ids := make([]string, len(doms))
		for i := range doms {
			ids[i] = uuidString(doms[i].UUID)
		}
		return ids, err
	})
}

func (c *rpcConn) lookupName(ctx context.Context, name string) (string, error) {
	return rpc(ctx, c, func(l *libvirt.Libvirt) (string, error) {
		d, err := l.DomainLookupByName(name)
		return uuidString(d.UUID), err
	})
}

func (c *rpcConn) domainXML(ctx context.Context, uuid string, flags uint32) (string, error) {
	return onDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) (string, error) {
		return l.DomainGetXMLDesc(d, libvirt.DomainXMLFlags(flags))
	})
}

func (c *rpcConn) state(ctx context.Context, uuid string) (int, int, error) {
	v, err := onDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) ([2]int, error) {
		s, r, err := l.DomainGetState(d, 0)
		return [2]int{int(s), int(r)}, err
	})
	return v[0], v[1], err
}

func (c *rpcConn) persistent(ctx context.Context, uuid string) (bool, error) {
	return onDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) (bool, error) {
		v, err := l.DomainIsPersistent(d)
		return v == 1, err
	})
}

func (c *rpcConn) managedSave(ctx context.Context, uuid string) (bool, error) {
	return onDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) (bool, error) {
		v, err := l.DomainHasManagedSaveImage(d, 0)
		return v == 1, err
	})
}

func (c *rpcConn) capacity(ctx context.Context, uuid, disk string) (int64, error) {
	return onDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) (int64, error) {
		_, size, _, err := l.DomainGetBlockInfo(d, disk, 0)
		return int64(size), err
	})
}

func (c *rpcConn) define(ctx context.Context, xml string) (string, error) {
	return rpc(ctx, c, func(l *libvirt.Libvirt) (string, error) {
		d, err := l.DomainDefineXMLFlags(xml, 0)
		return uuidString(d.UUID), err
	})
}

func (c *rpcConn) undefine(ctx context.Context, uuid string, flags uint32) error {
	return doDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		return l.DomainUndefineFlags(d, libvirt.DomainUndefineFlagsValues(flags))
	})
}

func (c *rpcConn) start(ctx context.Context, uuid string, flags uint32) error {
	return doDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		_, err := l.DomainCreateWithFlags(d, flags)
		return err
	})
}

func (c *rpcConn) destroy(ctx context.Context, uuid string) error {
	return doDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		return l.DomainDestroyFlags(d, 0)
	})
}

func (c *rpcConn) shutdown(ctx context.Context, uuid string) error {
	return doDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		return l.DomainShutdownFlags(d, 0)
	})
}

func (c *rpcConn) setMetadata(ctx context.Context, uuid, xml string, flags uint32) error {
	return doDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		var content libvirt.OptString
		key := libvirt.OptString{metadataKey}
		if xml != "" {
			content = libvirt.OptString{xml}
		}
		return l.DomainSetMetadata(d, metadataElement, content, key, libvirt.OptString{metadataURI},
			libvirt.DomainModificationImpact(flags))
	})
}

func (c *rpcConn) jobType(ctx context.Context, uuid string) (int, error) {
	return onDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) (int, error) {
		t, _, _, _, _, _, _, _, _, _, _, _, err := l.DomainGetJobInfo(d)
		return int(t), err
	})
}

func (c *rpcConn) jobOperation(ctx context.Context, uuid string) (int, error) {
	return onDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) (int, error) {
		_, params, err := l.DomainGetJobStats(d, 0)
		for _, p := range params {
			if p.Field != "operation" {
				continue
			}
			switch v := p.Value.I.(type) {
			case int32:
				return int(v), err
			case uint32:
				return int(v), err
			}
		}
		return 0, err
	})
}

func (c *rpcConn) abortJob(ctx context.Context, uuid string) error {
	return doDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error { return l.DomainAbortJob(d) })
}

func (c *rpcConn) blockJob(ctx context.Context, uuid, disk string) (int, bool, error) {
	v, err := onDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) ([2]int, error) {
		found, t, _, _, _, err := l.DomainGetBlockJobInfo(d, disk, 0)
		return [2]int{int(found), int(t)}, err
	})
	return v[1], v[0] == 1, err
}

func (c *rpcConn) backupBegin(ctx context.Context, uuid, backup, checkpoint string, flags uint32) error {
	return doDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		var cp libvirt.OptString
		if checkpoint != "" {
			cp = libvirt.OptString{checkpoint}
		}
		return l.DomainBackupBegin(d, backup, cp, libvirt.DomainBackupBeginFlags(flags))
	})
}

func (c *rpcConn) backupXML(ctx context.Context, uuid string) (string, error) {
	return onDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) (string, error) {
		return l.DomainBackupGetXMLDesc(d, 0)
	})
}

func (c *rpcConn) checkpoints(ctx context.Context, uuid string) ([]string, error) {
	return onDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) ([]string, error) {
		cps, _, err := l.DomainListAllCheckpoints(d, 1, 1<<1) // topological order
		names := make([]string, len(cps))
		for i := range cps {
			names[i] = cps[i].Name
		}
		return names, err
	})
}

func (c *rpcConn) checkpointXML(ctx context.Context, uuid, name string, flags uint32) (string, error) {
	return onDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) (string, error) {
		return l.DomainCheckpointGetXMLDesc(libvirt.DomainCheckpoint{Name: name, Dom: d}, flags)
	})
}

func (c *rpcConn) checkpointCreate(ctx context.Context, uuid, xml string, flags uint32) error {
	return doDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		_, err := l.DomainCheckpointCreateXML(d, xml, flags)
		return err
	})
}

func (c *rpcConn) checkpointDelete(ctx context.Context, uuid, name string, flags uint32) error {
	return doDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		return l.DomainCheckpointDelete(libvirt.DomainCheckpoint{Name: name, Dom: d}, libvirt.DomainCheckpointDeleteFlags(flags))
	})
}

func (c *rpcConn) agent(ctx context.Context, uuid, command string, timeout int) (string, error) {
	return onDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) (string, error) {
		out, err := l.QEMUDomainAgentCommand(d, command, int32(timeout), 0)
		if err != nil || len(out) == 0 {
			return "", err
		}
		return out[0], nil
	})
}

func (c *rpcConn) monitor(ctx context.Context, uuid, command string) (string, error) {
	return onDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) (string, error) {
		return l.QEMUDomainMonitorCommand(d, command, 0)
	})
}

func (c *rpcConn) networkExists(ctx context.Context, name string) (bool, error) {
	return rpc(ctx, c, func(l *libvirt.Libvirt) (bool, error) {
		_, err := l.NetworkLookupByName(name)
		if virCode(rpcError(err)) == virNoNetwork {
			return false, nil
		}
		return err == nil, err
	})
}

func (c *rpcConn) poolXML(ctx context.Context, name string) (string, error) {
	return rpc(ctx, c, func(l *libvirt.Libvirt) (string, error) {
		p, err := l.StoragePoolLookupByName(name)
		if err != nil {
			return "", err
		}
		return l.StoragePoolGetXMLDesc(p, 0)
	})
}

func (c *rpcConn) resume(ctx context.Context, uuid string) error {
	return doDomain(ctx, c, uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error { return l.DomainResume(d) })
}
