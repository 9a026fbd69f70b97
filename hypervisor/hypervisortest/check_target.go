package hypervisortest

import (
	"fmt"
	"slices"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// onTarget skips checks that need a Target.
func onTarget(f func(e *env, t hypervisor.Target)) func(e *env) {
	return func(e *env) {
		t, ok := e.hv.(hypervisor.Target)
		e.need(ok, "a Target")
		f(e, t)
	}
}

// spec returns a VM like the harness's, with its disks that snapshots include.
func (e *env) spec() *hypervisor.VMSpec {
	s := &hypervisor.VMSpec{
		Name: fmt.Sprintf("holdfast-suite-%08x-%d", uint32(e.seed), e.names), Owner: e.name("vm"),
		Identity: hypervisor.IdentityNew, Hardware: e.vm.Hardware, NICs: slices.Clone(e.vm.NICs),
		Native: &e.vm.Native, Attachments: e.vm.Attachments,
	}
	for _, id := range e.disks {
		d := e.vm.Disk(id)
		s.Disks = append(s.Disks, hypervisor.DiskSpec{ID: id, Size: d.Size, Bus: d.Bus, Slot: d.Slot})
	}
	if e.h.EditSpec != nil {
		e.h.EditSpec(s)
	}
	return s
}

// create makes a VM that is deleted at the end of the check.
func (e *env) create(t hypervisor.Target, spec *hypervisor.VMSpec) *hypervisor.VM {
	e.Helper()
	vm, err := t.CreateVM(e.ctx, spec)
	require.NoError(e, err)
	e.deleteLater(t, vm.ID)
	return vm
}

func (e *env) deleteLater(t hypervisor.Target, id hypervisor.VMID) {
	e.later(func() {
		_ = t.SetPower(e.ctx, id, hypervisor.PowerOff) // off, gone, or told below
		if err := t.DeleteVM(e.ctx, id); err != nil {
			e.Errorf("delete at the end of the check: %v", err)
		}
	})
}

// writer opens a disk for writing; a writer that is open is closed at the end.
func (e *env) writer(t hypervisor.Target, id hypervisor.VMID, disk hypervisor.DiskID) hypervisor.DiskWriter {
	e.Helper()
	w, err := t.OpenDiskWriter(e.ctx, id, disk)
	require.NoError(e, err)
	e.later(func() { _ = w.Close() }) // may have been closed by the check
	return w
}

// put writes p at off and requires that all of it was taken.
func (e *env) put(w hypervisor.DiskWriter, p []byte, off int64) {
	e.Helper()
	n, err := w.WriteAt(p, off)
	require.NoError(e, err)
	require.Equal(e, len(p), n)
}

// stored reads a whole disk of a VM that is off.
func (e *env) stored(t hypervisor.Target, id hypervisor.VMID, disk hypervisor.DiskID) []byte {
	e.Helper()
	r, err := t.OpenDisk(e.ctx, id, disk)
	require.NoError(e, err)
	defer func() { require.NoError(e, r.Close()) }()
	require.LessOrEqual(e, r.Size(), int64(maxDisk))
	p := make([]byte, r.Size())
	e.fill(r, p, 0)
	return p
}

func (e *env) vmIs(id hypervisor.VMID) *hypervisor.VM {
	e.Helper()
	vm, err := e.hv.VM(e.ctx, id)
	require.NoError(e, err)
	return vm
}

var targetChecks = []check{
	{"target/created-vm", onTarget(func(e *env, t hypervisor.Target) {
		spec := e.spec()
		vm := e.create(t, spec)
		require.Equal(e, spec.Name, vm.Name)
		require.True(e, vm.Incomplete)
		require.Equal(e, spec.Owner, vm.Owner)
		got := e.vmIs(vm.ID)
		require.True(e, got.Incomplete)
		require.Equal(e, spec.Owner, got.Owner)
		require.Equal(e, hypervisor.PoweredOff, got.Power)
		require.Equal(e, spec.Hardware.CPUs, got.Hardware.CPUs)
		require.Equal(e, spec.Hardware.MemoryBytes, got.Hardware.MemoryBytes)
		require.Equal(e, spec.Hardware.Firmware, got.Hardware.Firmware)
		require.Len(e, got.NICs, len(spec.NICs))
		require.Len(e, got.Disks, len(spec.Disks))
		for _, d := range spec.Disks {
			require.NotNil(e, got.Disk(d.ID), "disk %s", d.ID)
			require.Equal(e, d.Size, got.Disk(d.ID).Size, "disk %s", d.ID)
		}
	})},
	{"target/identity-is-new", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		require.Regexp(e, uuidRE, vm.UUID)
		require.NotEqual(e, e.vm.UUID, vm.UUID)
		for _, n := range vm.NICs {
			require.Regexp(e, macRE, n.MAC)
			for _, old := range e.vm.NICs {
				require.NotEqual(e, old.MAC, n.MAC)
			}
		}
	})},
	{"target/found-by-owner", onTarget(func(e *env, t hypervisor.Target) {
		spec := e.spec()
		vm := e.create(t, spec)
		require.Equal(e, []hypervisor.VMID{vm.ID}, e.list(hypervisor.Query{Owner: spec.Owner}))
		require.Contains(e, e.list(hypervisor.Query{Owner: hypervisor.RepoPrefix("c0ffee00")}), vm.ID)
		require.Empty(e, e.list(hypervisor.Query{Owner: hypervisor.RepoPrefix("deadbeef")}))
	})},
	{"target/attachments-carried", onTarget(func(e *env, t hypervisor.Target) {
		i := slices.IndexFunc(e.vm.Attachments, func(a hypervisor.Attachment) bool { return a.Kind == "nvram" })
		e.need(i >= 0, "a VM with NVRAM")
		want := e.attachment(e.vm.Attachments[i])
		for _, a := range e.create(t, e.spec()).Attachments {
			if a.Kind == "nvram" {
				e.same(want, e.attachment(a), "NVRAM")
				return
			}
		}
		require.Fail(e, "the created VM has no NVRAM")
	})},
	{"target/incomplete-does-not-start", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		e.fails(t.SetPower(e.ctx, vm.ID, hypervisor.PowerOn))
		require.Equal(e, hypervisor.PoweredOff, e.vmIs(vm.ID).Power)
	})},
	{"target/finish-start-stop", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		require.NoError(e, t.FinishVM(e.ctx, vm.ID))
		require.False(e, e.vmIs(vm.ID).Incomplete)
		require.NoError(e, t.FinishVM(e.ctx, vm.ID), "idempotent")
		for range 2 {
			require.NoError(e, t.SetPower(e.ctx, vm.ID, hypervisor.PowerOn))
			require.Equal(e, hypervisor.PoweredOn, e.vmIs(vm.ID).Power)
		}
		for range 2 {
			require.NoError(e, t.SetPower(e.ctx, vm.ID, hypervisor.PowerOff))
			require.Equal(e, hypervisor.PoweredOff, e.vmIs(vm.ID).Power)
		}
	})},
	{"target/owner-stays-when-finished", onTarget(func(e *env, t hypervisor.Target) {
		spec := e.spec()
		vm := e.create(t, spec)
		require.NoError(e, t.FinishVM(e.ctx, vm.ID))
		require.Equal(e, spec.Owner, e.vmIs(vm.ID).Owner)
	})},
	{"target/delete", onTarget(func(e *env, t hypervisor.Target) {
		spec := e.spec()
		vm := e.create(t, spec)
		require.NoError(e, t.DeleteVM(e.ctx, vm.ID))
		_, err := e.hv.VM(e.ctx, vm.ID)
		e.fails(err, hypervisor.ErrNotFound)
		require.NoError(e, t.DeleteVM(e.ctx, vm.ID), "idempotent")
		again := e.create(t, spec) // name and disks are free again
		for _, d := range spec.Disks {
			require.True(e, zeros(e.stored(t, again.ID, d.ID)), "disk %s of a new VM", d.ID)
		}
	})},
	{"target/delete-finished", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		require.NoError(e, t.FinishVM(e.ctx, vm.ID))
		require.NoError(e, t.DeleteVM(e.ctx, vm.ID))
		_, err := e.hv.VM(e.ctx, vm.ID)
		e.fails(err, hypervisor.ErrNotFound)
	})},
	{"target/finished-by-another-process", onTarget(func(e *env, t hypervisor.Target) {
		other, ok := e.reconnect().(hypervisor.Target)
		require.True(e, ok, "another connection is a Target too")
		vm := e.create(t, e.spec())
		require.NoError(e, other.FinishVM(e.ctx, vm.ID))
		require.NoError(e, t.SetPower(e.ctx, vm.ID, hypervisor.PowerOn))
		require.NoError(e, other.SetPower(e.ctx, vm.ID, hypervisor.PowerOff))
	})},
}

var targetWriteChecks = []check{
	{"write/new-disks-are-zeros", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		for _, d := range e.disks {
			require.True(e, zeros(e.stored(t, vm.ID, d)), "disk %s", d)
		}
	})},
	{"write/ascending", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		want := map[hypervisor.DiskID][]byte{}
		for _, d := range e.disks {
			p := make([]byte, e.size(d))
			w := e.writer(t, vm.ID, d)
			for off := int64(0); off < e.size(d); {
				n := min((1+e.rnd.Int64N(512))*e.sector, e.size(d)-off)
				switch e.rnd.IntN(3) {
				case 0:
					copy(p[off:], e.random(n))
					e.put(w, p[off:off+n], off)
				case 1:
					require.NoError(e, w.WriteZeroes(off, n))
				}
				off += n
			}
			require.NoError(e, w.Commit())
			require.NoError(e, w.Close())
			want[d] = p
		}
		for _, d := range e.disks {
			e.same(want[d], e.stored(t, vm.ID, d), "disk "+string(d)+" after Commit")
		}
		require.NoError(e, t.FinishVM(e.ctx, vm.ID))
		for _, d := range e.disks {
			e.same(want[d], e.stored(t, vm.ID, d), "disk "+string(d)+" after FinishVM")
		}
	})},
	{"write/last-bytes", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		d := e.disks[1]
		want := make([]byte, e.size(d))
		tail := e.size(d) % (1 << 20)
		copy(want[e.size(d)-tail:], e.random(tail))
		w := e.writer(t, vm.ID, d)
		e.put(w, want[e.size(d)-tail:], e.size(d)-tail)
		require.NoError(e, w.Commit())
		require.NoError(e, w.Close())
		e.same(want, e.stored(t, vm.ID, d), "the unaligned end of the disk")
	})},
	{"write/past-the-end", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		d := e.disks[0]
		w := e.writer(t, vm.ID, d)
		_, err := w.WriteAt(make([]byte, 1024), e.size(d)-512)
		require.Error(e, err)
		_, err = w.WriteAt(make([]byte, 512), -512)
		require.Error(e, err)
		require.Error(e, w.WriteZeroes(e.size(d), 512))
		require.NoError(e, w.Close())
	})},
	{"write/any-order-as-declared", onTarget(func(e *env, t hypervisor.Target) {
		e.need(e.caps.RandomWrite, "Capabilities.RandomWrite")
		vm := e.create(t, e.spec())
		d := e.disks[0]
		want := make([]byte, e.size(d))
		w := e.writer(t, vm.ID, d)
		for i := range 40 {
			off, n := e.place(d, 64<<10)
			if i%4 == 3 {
				clear(want[off : off+n])
				require.NoError(e, w.WriteZeroes(off, n))
				continue
			}
			copy(want[off:], e.random(n))
			e.put(w, want[off:off+n], off)
		}
		require.NoError(e, w.Commit())
		require.NoError(e, w.Close())
		e.same(want, e.stored(t, vm.ID, d), "written in any order")
	})},
	{"write/zeroes-over-data", onTarget(func(e *env, t hypervisor.Target) {
		e.need(e.caps.RandomWrite, "Capabilities.RandomWrite")
		vm := e.create(t, e.spec())
		d := e.disks[0]
		want := make([]byte, e.size(d))
		copy(want, e.random(64*e.sector))
		w := e.writer(t, vm.ID, d)
		e.put(w, want[:64*e.sector], 0)
		require.NoError(e, w.WriteZeroes(3*e.sector, 20*e.sector))
		clear(want[3*e.sector : 23*e.sector])
		require.NoError(e, w.Commit())
		require.NoError(e, w.Close())
		e.same(want, e.stored(t, vm.ID, d), "zeros over data")
	})},
	{"write/nothing-after-commit", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		d := e.disks[0]
		w := e.writer(t, vm.ID, d)
		p := e.random(e.sector)
		e.put(w, p, 0)
		require.NoError(e, w.Commit())
		_, err := w.WriteAt(e.random(e.sector), e.sector)
		require.Error(e, err)
		require.Error(e, w.WriteZeroes(e.sector, e.sector))
		require.NoError(e, w.Close())
		want := make([]byte, e.size(d))
		copy(want, p)
		e.same(want, e.stored(t, vm.ID, d), "what was committed")
	})},
	{"write/close-without-commit-abandons", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		d := e.disks[0]
		w := e.writer(t, vm.ID, d)
		e.put(w, e.random(32*e.sector), 0)
		require.NoError(e, w.Close())
		_, err := w.WriteAt(e.random(e.sector), 32*e.sector)
		require.Error(e, err)
		// What remains is not defined, but the disk can be written again.
		want := make([]byte, e.size(d))
		copy(want, e.random(16*e.sector))
		w = e.writer(t, vm.ID, d)
		e.put(w, want[:16*e.sector], 0)
		require.NoError(e, w.WriteZeroes(16*e.sector, e.size(d)-16*e.sector))
		require.NoError(e, w.Commit())
		require.NoError(e, w.Close())
		e.same(want, e.stored(t, vm.ID, d), "written after an abandoned attempt")
	})},
	{"write/abandoned-vm-can-be-deleted", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		w := e.writer(t, vm.ID, e.disks[0])
		e.put(w, e.random(e.sector), 0)
		require.NoError(e, w.Close())
		require.NoError(e, t.DeleteVM(e.ctx, vm.ID))
		_, err := e.hv.VM(e.ctx, vm.ID)
		e.fails(err, hypervisor.ErrNotFound)
	})},
	{"write/disks-in-parallel", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		want, errs := map[hypervisor.DiskID][]byte{}, make(chan error, len(e.disks))
		for _, d := range e.disks {
			want[d] = e.random(e.size(d))
			w, p := e.writer(t, vm.ID, d), want[d]
			go func() { errs <- writeAll(w, p) }()
		}
		for range e.disks {
			require.NoError(e, <-errs)
		}
		for _, d := range e.disks {
			e.same(want[d], e.stored(t, vm.ID, d), "disk "+string(d))
		}
	})},
	{"write/context-governs-the-writer", onTarget(func(e *env, t hypervisor.Target) {
		vm := e.create(t, e.spec())
		_, err := t.OpenDiskWriter(e.cancelled(), vm.ID, e.disks[0])
		e.fails(err)
	})},
}

func writeAll(w hypervisor.DiskWriter, p []byte) error {
	const piece = 128 << 10
	for off := 0; off < len(p); off += piece {
		if _, err := w.WriteAt(p[off:min(off+piece, len(p))], int64(off)); err != nil {
			return err
		}
	}
	if err := w.Commit(); err != nil {
		return err
	}
	return w.Close()
}
