//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/drivers/kvm"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

// readOnly reads what a full backup of a domain's first disk reads, as a backup
// does, and throws it away.
func readOnly(ctx context.Context, domain string) (err error) {
	scratch, err := os.MkdirTemp("/var/tmp", "hf-read")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	hv, err := kvm.Open(ctx, kvm.Config{URI: uri, ScratchDir: scratch})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, hv.Close()) }()
	vm, err := hypervisor.Find(ctx, hv, domain)
	if err != nil {
		return err
	}
	snap, err := hv.CreateSnapshot(ctx, vm.ID, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, snap.Release(context.WithoutCancel(ctx), nil)) }()
	disk := vm.Disks[0]
	r, err := snap.OpenDisk(ctx, disk.ID)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	bufs := make(chan []byte, 8)
	for range 8 {
		bufs <- make([]byte, mib)
	}
	for e, err := range hypervisor.CheckedExtents(gctx, snap, disk.ID, nil) {
		if err != nil {
			return err
		}
		for off := e.Offset; off < e.End() && !e.Zero; off += mib {
			buf := <-bufs
			p := buf[:min(mib, e.End()-off)]
			g.Go(func() error {
				defer func() { bufs <- buf }()
				if n, err := r.ReadAt(p, off); n < len(p) {
					return fmt.Errorf("%d of %d bytes at %d: %w", n, len(p), off, err)
				}
				return nil
			})
		}
	}
	return g.Wait()
}
