package kvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// faultOp is an operation of the driver.
type faultOp struct {
	name  string
	setUp func(*faultWorld) // without faults
	run   func(context.Context, *faultWorld) error
	// tolerated are calls, by the beginning of their name, whose failure is no failure
	// of the operation, and why.
	tolerated map[string]string
	// partial: what it leaves is the state of a VM that the caller goes on with.
	partial bool
	// undone: it leaves nothing even if an answer was lost.
	undone bool
	// once: it cannot be repeated in the same world.
	once bool
}

var (
	probed = map[string]string{
		"agent":       "an inventory says that the agent does not answer",
		"thaw":        "is tried again until the guest is seen thawed",
		"capacity":    "the disk is not in the snapshot, with the reason",
		"room":        "of what lies elsewhere nothing is known",
		"attachments": "the size of one that cannot be looked at is unknown",
	}
	quiesce = hypervisor.SnapshotOptions{Quiesce: hypervisor.FilesystemConsistent, MinConsistency: hypervisor.FilesystemConsistent}
)

func spec(w *faultWorld) *hypervisor.VMSpec {
	return &hypervisor.VMSpec{
		Name: "web1", Owner: run1, Identity: hypervisor.IdentityKeep, UUID: testUUID,
		Hardware: hypervisor.Hardware{CPUs: 1, MemoryBytes: 64 << 20, Firmware: hypervisor.UEFI},
		Disks: []hypervisor.DiskSpec{
			{ID: "vda", Size: 1 << 20, Bus: "virtio", Format: "qcow2", Storage: "pool"},
			{ID: "vdb", Size: 1 << 20, Bus: "virtio", Format: "raw"},
		},
		NICs:        []hypervisor.NIC{{ID: "nic0", MAC: "52:54:00:00:00:01", Network: "default", Connected: true}},
		Attachments: []hypervisor.Attachment{{Name: attachNVRAM, Kind: attachNVRAM, Open: w.attachment}},
	}
}

type countedReader struct {
	io.Reader
	w *faultWorld
}

func (r countedReader) Close() error { r.w.open--; return nil }

func (w *faultWorld) attachment(ctx context.Context) (io.ReadCloser, error) {
	r, err := call(ctx, w.conn.f, "attachment", func() (io.ReadCloser, error) {
		return countedReader{bytes.NewReader([]byte("vars")), w}, nil
	})
	if err == nil {
		w.open++
	}
	return r, err
}

func noVM(w *faultWorld) { w.f.gone, w.f.other, w.f.state0 = true, true, stateShutoff }

func incompleteVM(w *faultWorld) {
	noVM(w)
	_, err := w.d.CreateVM(w.ctx, spec(w))
	require.NoError(w.t, err)
}

func writtenVM(w *faultWorld) {
	incompleteVM(w)
	require.NoError(w.t, writeDisks(w.ctx, w))
}

func finishedVM(w *faultWorld) {
	writtenVM(w)
	require.NoError(w.t, w.d.FinishVM(w.ctx, vmID))
}

func writeDisks(ctx context.Context, w *faultWorld) error {
	for _, disk := range []hypervisor.DiskID{"vda", "vdb"} {
		dw, err := w.d.OpenDiskWriter(ctx, vmID, disk)
		if err != nil {
			return err
		}
		_, err = dw.WriteAt(bytes.Repeat([]byte{7}, 4096), 0)
		if err = errors.Join(err, dw.WriteZeroes(4096, 8192), dw.Commit(), dw.Close()); err != nil {
			return err
		}
	}
	return nil
}

// faultOps are all operations that talk to the daemon.
var faultOps = []faultOp{
	{name: "connect", run: func(ctx context.Context, w *faultWorld) error {
		_, err := newDriver(ctx, w.d.cfg, w.d.ep, w.conn)
		return err
	}},
	{name: "inventory", setUp: func(w *faultWorld) { w.f.other = true }, tolerated: probed, run: func(ctx context.Context, w *faultWorld) error {
		vms, err := collect(w.d.VMs(ctx, hypervisor.Query{}))
		if err != nil {
			return err
		}
		named, err := collect(w.d.VMs(ctx, hypervisor.Query{Name: "web1"}))
		if err != nil {
			return err
		}
		vm, err := w.d.VM(ctx, vmID)
		if err != nil {
			return err
		}
		return errors.Join(expect("VMs", len(vms), 2), expect("VMs of the name", len(named), 1), expect("disks", len(vm.Disks), 3))
	}},
	{name: "full", undone: true, tolerated: probed, run: func(ctx context.Context, w *faultWorld) error {
		return w.backup(ctx, hypervisor.SnapshotOptions{})
	}},
	{name: "quiesced", tolerated: probed, run: func(ctx context.Context, w *faultWorld) error {
		return w.backup(ctx, quiesce, "vda", "vdb")
	}, once: true},
	{name: "incremental", undone: true, setUp: keepsBaselines, tolerated: probed, run: func(ctx context.Context, w *faultWorld) error {
		return w.backup(ctx, hypervisor.SnapshotOptions{Since: w.base})
	}},
	{name: "one disk kept", setUp: keepsBaselines, tolerated: probed, once: true, run: func(ctx context.Context, w *faultWorld) error {
		return w.backup(ctx, hypervisor.SnapshotOptions{Since: w.base}, "vda")
	}},
	{name: "incremental after libvirt lost its checkpoints", setUp: func(w *faultWorld) {
		keepsBaselines(w)
		w.f.cps = map[string]string{}
	}, tolerated: map[string]string{
		"agent": "as above", "capacity": "as above",
		"checkpointCreate": "the disks are read in full, with the reason", "room": "as above",
	}, run: func(ctx context.Context, w *faultWorld) error {
		return w.backup(ctx, hypervisor.SnapshotOptions{Since: w.base})
	}},
	{name: "of a VM that was shut down", setUp: off(shutoffShutdown), tolerated: map[string]string{
		"capacity":  "as above",
		"clean end": "the domain is ended in another way", "room": "as above",
	}, run: func(ctx context.Context, w *faultWorld) error {
		return w.backup(ctx, hypervisor.SnapshotOptions{})
	}},
	{name: "of a VM that was destroyed", setUp: off(shutoffDestroyed), tolerated: probed, run: func(ctx context.Context, w *faultWorld) error {
		return w.backup(ctx, hypervisor.SnapshotOptions{})
	}},
	{name: "resume by another process", setUp: func(w *faultWorld) {
		s, err := w.d.CreateSnapshot(w.ctx, vmID, &hypervisor.SnapshotOptions{Name: run2})
		require.NoError(w.t, err)
		w.ref = s.Ref()
		w.reconnect()
		w.conn.closed = 0
	}, once: true, tolerated: probed, partial: true, run: func(ctx context.Context, w *faultWorld) error {
		refs, err := collect(w.d.Snapshots(ctx, vmID))
		if err != nil {
			return err
		}
		if err := expect("snapshots", len(refs), 1); err != nil {
			return err
		}
		s, err := w.d.OpenSnapshot(ctx, w.ref)
		if err != nil {
			return err
		}
		return w.release(ctx, s, nil)
	}},
	{name: "baselines", setUp: keepsBaselines, run: func(ctx context.Context, w *faultWorld) error {
		list, err := collect(w.d.Baselines(ctx, vmID))
		if err != nil {
			return err
		}
		return expect("baselines", len(list), 2)
	}},
	{name: "forget one disk", setUp: keepsBaselines, run: func(ctx context.Context, w *faultWorld) error {
		if err := w.d.ForgetBaseline(ctx, w.base[0]); err != nil {
			return err
		}
		list, err := collect(w.d.Baselines(ctx, vmID))
		return errors.Join(err, expect("baselines", len(list), 1))
	}},
	{name: "forget the last disk", setUp: func(w *faultWorld) {
		keepsBaselines(w)
		require.NoError(w.t, w.d.ForgetBaseline(w.ctx, w.base[0]))
	}, tolerated: probed, run: forgetLast},
	{name: "forget where the VM is off", setUp: func(w *faultWorld) {
		keepsBaselines(w)
		require.NoError(w.t, w.d.ForgetBaseline(w.ctx, w.base[0]))
		off(shutoffDestroyed)(w)
	}, tolerated: probed, run: forgetLast},
	{name: "forget where a bitmap is lost", setUp: func(w *faultWorld) {
		keepsBaselines(w)
		require.NoError(w.t, w.d.ForgetBaseline(w.ctx, w.base[0]))
		w.f.lost = []string{"vdb"}
	}, tolerated: map[string]string{
		"agent": "as above", "capacity": "as above",
		"checkpointCreate": "then no bitmap of it is left", "room": "as above",
	}, run: forgetLast},
	{name: "thaw", setUp: func(w *faultWorld) {
		require.NoError(w.t, w.d.editNotes(w.ctx, testUUID, affectLive, func(n *notes) { n.Freeze = &runNote{Run: run2} }))
		_, err := w.f.agentReply("guest-fsfreeze-freeze")
		require.NoError(w.t, err)
	}, tolerated: probed, partial: true, run: func(ctx context.Context, w *faultWorld) error {
		err := w.d.Thaw(ctx, vmID)
		if status, _ := w.f.agentReply("guest-fsfreeze-status"); err == nil && status != `{"return":"thawed"}` {
			w.wrong("%s", status)
		}
		return err
	}},
	{name: "create a VM", undone: true, setUp: noVM, tolerated: probed, run: func(ctx context.Context, w *faultWorld) error {
		vm, err := w.d.CreateVM(ctx, spec(w))
		if err != nil {
			return err
		}
		if !vm.Incomplete || len(vm.Disks) != 2 {
			w.wrong("VM %+v", vm)
		}
		w.conn.f.disarm() // how it is deleted is another operation
		return w.d.DeleteVM(w.ctx, vm.ID)
	}},
	{name: "write its disks", setUp: incompleteVM, partial: true, once: true, run: writeDisks, tolerated: map[string]string{
		"file punch": "zeros are written instead",
	}},
	{name: "finish it", setUp: writtenVM, partial: true, once: true, run: func(ctx context.Context, w *faultWorld) error {
		if err := w.d.FinishVM(ctx, vmID); err != nil {
			if again := w.d.FinishVM(w.ctx, vmID); again != nil {
				w.wrong("the second FinishVM: %v", again)
			}
			return err
		}
		r, err := w.d.OpenDisk(ctx, vmID, "vda")
		if err != nil {
			return err
		}
		var b [4096]byte
		_, err = r.ReadAt(b[:], 0)
		if err == nil && b[4095] != 7 {
			w.wrong("read %d", b[4095])
		}
		return errors.Join(err, r.Close())
	}, tolerated: probed},
	{name: "power", setUp: finishedVM, partial: true, run: func(ctx context.Context, w *faultWorld) error {
		for i, p := range []hypervisor.Power{hypervisor.PowerOn, hypervisor.PowerOff, hypervisor.PowerOn, hypervisor.Shutdown} {
			if err := w.d.SetPower(ctx, vmID, p); err != nil {
				return err
			}
			if running := w.f.state0 == stateRunning; running != (i%2 == 0) {
				w.wrong("%s: state %d", p, w.f.state0)
			}
		}
		return nil
	}},
	{name: "resume a paused VM", setUp: func(w *faultWorld) { w.f.state0 = statePaused }, partial: true, run: func(ctx context.Context, w *faultWorld) error {
		err := w.d.SetPower(ctx, vmID, hypervisor.PowerOn)
		if err == nil && w.f.state0 != stateRunning {
			return fmt.Errorf("%w: state %d", errUnexpected, w.f.state0)
		}
		return err
	}},
	{name: "delete a VM", setUp: func(w *faultWorld) {
		finishedVM(w)
		w.f.state0 = stateRunning
		w.f.meta[affectLive] = w.f.meta[affectConfig]
	}, partial: true, run: func(ctx context.Context, w *faultWorld) error {
		err := w.d.DeleteVM(ctx, vmID)
		if err == nil && !w.f.gone {
			return fmt.Errorf("%w: it is there", errUnexpected)
		}
		if err == nil {
			if left := w.leftovers(); len(left) > 0 {
				w.wrong("left: %v", left)
			}
		}
		return err
	}},
}

func forgetLast(ctx context.Context, w *faultWorld) error {
	if err := w.d.ForgetBaseline(ctx, w.base[1]); err != nil {
		return err
	}
	if len(w.f.cps) > 0 || w.f.meta[affectConfig] != "" {
		w.wrong("checkpoints %v, notes %q", w.f.cps, w.f.meta[affectConfig])
	}
	return nil
}

// TestEveryCallOfEveryOperationFails: each call to the daemon fails before or after it
// took effect, or the caller gives up in it. The operation says so, leaves nothing or what
// recovery finds, ends all it began, and comes to its end when it is tried again.
func TestEveryCallOfEveryOperationFails(t *testing.T) {
	for i := range faultOps {
		op := &faultOps[i]
		t.Run(op.name, func(t *testing.T) {
			t.Parallel()
			runs := 0
			settles(t, op, 0, before)
			for k := 1; ; k++ {
				what := settles(t, op, k, before)
				if what == "" {
					require.Greater(t, runs, 1)
					t.Logf("each of %d calls", runs)
					return
				}
				if !asks.MatchString(what) {
					settles(t, op, k, after)
				}
				if !strings.Contains(what, onFile) { // they know no context
					settles(t, op, k, canceled)
				}
				runs++
			}
		})
	}
}
