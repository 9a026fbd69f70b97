package hypervisortest

import (
	"context"
	"slices"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

const noSuchVM hypervisor.VMID = "holdfast-suite-no-such-vm"

// unchanged requires that a refused CreateVM leaves the list of VMs as it was.
func (e *env) unchanged(f func()) {
	e.Helper()
	before := e.list(hypervisor.Query{})
	f()
	require.ElementsMatch(e, before, e.list(hypervisor.Query{}))
}

var targetRefusalChecks = []check{
	{"refuse/name-taken", onTarget(func(e *env, t hypervisor.Target) {
		e.unchanged(func() {
			spec := e.spec()
			spec.Name = e.vm.Name
			vm, err := t.CreateVM(e.ctx, spec)
			if err == nil {
				e.deleteLater(t, vm.ID)
			}
			e.fails(err, hypervisor.ErrExists)
		})
	})},
	{"refuse/name-of-an-incomplete-vm", onTarget(func(e *env, t hypervisor.Target) {
		spec := e.spec()
		e.create(t, spec)
		vm, err := t.CreateVM(e.ctx, spec)
		if err == nil {
			e.deleteLater(t, vm.ID)
		}
		e.fails(err, hypervisor.ErrExists)
	})},
	{"refuse/identity-of-a-vm-that-exists", onTarget(func(e *env, t hypervisor.Target) {
		e.unchanged(func() {
			spec := e.spec()
			spec.Identity, spec.UUID = hypervisor.IdentityKeep, e.vm.UUID
			vm, err := t.CreateVM(e.ctx, spec)
			if err == nil {
				e.deleteLater(t, vm.ID)
			}
			e.fails(err, hypervisor.ErrExists)
		})
	})},
	{"refuse/storage-too-small", onTarget(func(e *env, t hypervisor.Target) {
		e.need(e.h.SmallStorage != "", "Harness.SmallStorage")
		e.unchanged(func() {
			spec := e.spec()
			spec.Placement.Storage = e.h.SmallStorage
			spec.Disks = slices.Clone(spec.Disks)
			for i := range spec.Disks {
				spec.Disks[i].Size, spec.Disks[i].Storage = 8<<40, ""
			}
			vm, err := t.CreateVM(e.ctx, spec)
			if err == nil {
				e.deleteLater(t, vm.ID)
			}
			e.fails(err, hypervisor.ErrNoSpace)
		})
	})},
	{"refuse/storage-not-found", onTarget(func(e *env, t hypervisor.Target) {
		e.unchanged(func() {
			spec := e.spec()
			spec.Placement.Storage = "/holdfast-suite/no-such-storage"
			for i := range spec.Disks {
				spec.Disks[i].Storage = ""
			}
			vm, err := t.CreateVM(e.ctx, spec)
			if err == nil {
				e.deleteLater(t, vm.ID)
			}
			e.fails(err)
		})
	})},
	{"refuse/create-cancelled", onTarget(func(e *env, t hypervisor.Target) {
		e.unchanged(func() {
			vm, err := t.CreateVM(e.cancelled(), e.spec())
			if err == nil {
				e.deleteLater(t, vm.ID)
			}
			e.fails(err, context.Canceled)
		})
	})},
	{"refuse/delete-of-a-foreign-vm", onTarget(func(e *env, t hypervisor.Target) {
		e.fails(t.DeleteVM(e.ctx, e.h.VM), hypervisor.ErrNotOurs)
		require.Equal(e, e.vm.UUID, e.vmIs(e.h.VM).UUID, "it is still there")
		for _, d := range e.disks {
			e.frozen(d)
		}
	})},
	{"refuse/write-to-a-foreign-vm", onTarget(func(e *env, t hypervisor.Target) {
		want := e.frozen(e.disks[0])
		w, err := t.OpenDiskWriter(e.ctx, e.h.VM, e.disks[0])
		if err == nil {
			require.NoError(e, w.Close())
		}
		e.fails(err)
		s := e.snapshot(nil)
		e.same(want, e.readAll(s, e.disks[0]), "the foreign disk")
	})},
	{"refuse/write-to-a-complete-vm", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		require.NoError(e, t.FinishVM(e.ctx, vm.ID))
		w, err := t.OpenDiskWriter(e.ctx, vm.ID, e.disks[0])
		if err == nil {
			require.NoError(e, w.Close())
		}
		e.fails(err)
	})},
	{"refuse/what-is-not-there", onTarget(func(e *env, t hypervisor.Target) {
		_, err := t.OpenDiskWriter(e.ctx, noSuchVM, "disk0")
		e.fails(err, hypervisor.ErrNotFound)
		_, err = t.OpenDisk(e.ctx, noSuchVM, "disk0")
		e.fails(err, hypervisor.ErrNotFound)
		e.fails(t.FinishVM(e.ctx, noSuchVM), hypervisor.ErrNotFound)
		e.fails(t.SetPower(e.ctx, noSuchVM, hypervisor.PowerOn), hypervisor.ErrNotFound)
		require.NoError(e, t.DeleteVM(e.ctx, noSuchVM), "idempotent")
		vm := e.create(t, e.spec())
		_, err = t.OpenDiskWriter(e.ctx, vm.ID, "no-such-disk")
		e.fails(err, hypervisor.ErrNotFound)
		_, err = t.OpenDisk(e.ctx, vm.ID, "no-such-disk")
		e.fails(err, hypervisor.ErrNotFound)
	})},
	{"refuse/cancelled", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		ctx := e.cancelled()
		_, err := t.OpenDisk(ctx, vm.ID, e.disks[0])
		e.fails(err, context.Canceled)
		e.fails(t.FinishVM(ctx, vm.ID), context.Canceled)
		require.True(e, e.vmIs(vm.ID).Incomplete)
		require.NoError(e, t.FinishVM(e.ctx, vm.ID))
		e.fails(t.SetPower(ctx, vm.ID, hypervisor.PowerOn), context.Canceled)
		require.Equal(e, hypervisor.PoweredOff, e.vmIs(vm.ID).Power)
		e.fails(t.DeleteVM(ctx, vm.ID), context.Canceled)
		require.Equal(e, vm.UUID, e.vmIs(vm.ID).UUID, "it is still there")
	})},
}
