package backup_test

import (
	"context"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

// diesAt lets every call of the hypervisor fail from the first one of op on, and
// returns whether that came.
func (r *rig) diesAt(op fakes.Op) *atomic.Bool {
	dead := &atomic.Bool{} // calls are made by several goroutines
	r.hv = fakes.WithFaults(r.hv, fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
		if c.Op == op {
			dead.Store(true)
		}
		if dead.Load() {
			return fakes.Fault{Err: errBroken}
		}
		return fakes.Fault{}
	}))
	return dead
}

// TestDeathAfterCommitCostsNoFullRead: the run dies after its commit and before it
// has released the snapshot. Whoever releases it then keeps the baselines that the
// point stands on.
func TestDeathAfterCommitCostsNoFullRead(t *testing.T) {
	for name, recovers := range map[string]bool{"next run": false, "recover": true} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, fakes.Options{}, fakes.VMConfig{})
			r.mustRun(nil)
			r.scribble()
			plain := r.hv
			dead := r.diesAt(fakes.OpRelease)
			res := r.mustRun(nil)
			r.hv = plain
			require.True(t, dead.Load())
			require.Equal(t, backup.Degraded, res.Status(), "the snapshot is still there")
			if recovers {
				for _, d := range r.recover() {
					require.NoError(t, d.Err)
				}
				r.check()
			}
			r.scribble()
			res = r.mustRun(func(o *backup.Options) { o.Takeover = func(string) bool { return true } })
			require.Equal(t, map[hypervisor.DiskID]string{
				"vda": "incremental changed-blocks", "vdb": "incremental changed-blocks",
			}, modes(res))
			r.recover()
			r.check()
		})
	}
}

// longer is a hypervisor whose attachments are said to be a byte longer than they
// are.
type longer struct{ hypervisor.Hypervisor }

func (h longer) CreateSnapshot(ctx context.Context, id hypervisor.VMID, o *hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
	s, err := h.Hypervisor.CreateSnapshot(ctx, id, o)
	if err != nil {
		return nil, err
	}
	return longerSnapshot{s}, nil
}

type longerSnapshot struct{ hypervisor.Snapshot }

func (s longerSnapshot) VM() *hypervisor.VM {
	vm := *s.Snapshot.VM()
	vm.Attachments = append([]hypervisor.Attachment(nil), vm.Attachments...)
	for i := range vm.Attachments {
		vm.Attachments[i].Size++
	}
	return &vm
}

// TestAttachmentThatEndsEarlyIsNoBackup: half an NVRAM is none.
func TestAttachmentThatEndsEarlyIsNoBackup(t *testing.T) {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{NVRAM: []byte("variables")})
	plain := r.hv
	r.hv = longer{plain}
	res, err := r.run(t.Context(), nil)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.Empty(t, res.Point())
	r.hv = plain
	r.check()
	for p, err := range r.repo.Points(t.Context(), repository.Query{}) {
		require.NoError(t, err)
		require.Fail(t, "a point of half an attachment", "%v", p)
	}
}

// TestStaleOwnerForgetsNoBaseline: a run that hangs after its release loses its lease
// to another host, which commits. When it goes on it leaves the baseline of the
// other alone, says so, and recover closes what it owes.
func TestStaleOwnerForgetsNoBaseline(t *testing.T) {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{})
	r.mustRun(nil)
	r.scribble()
	plain := r.hv
	var once sync.Once
	var other *backup.Result
	var failed error
	r.hv = fakes.WithFaults(plain, fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
		if c.Op != fakes.OpRelease {
			return fakes.Fault{}
		}
		return fakes.Fault{After: true, Do: func() {
			once.Do(func() {
				r.scribble()
				o := r.options()
				o.StateDir, o.Takeover = t.TempDir(), func(string) bool { return true }
				other, failed = backup.Run(t.Context(), plain, r.repo, r.vm, o)
			})
		}}
	}))
	res := r.mustRun(nil)
	r.hv = plain
	require.NoError(t, failed)
	require.Equal(t, backup.Success, other.Status())
	require.Equal(t, backup.Degraded, res.Status())
	require.Contains(t, strings.Join(res.Degraded, "\n"), repository.ErrFenced.Error())
	for _, d := range r.recover() {
		require.NoError(t, d.Err)
	}
	r.scribble()
	res = r.mustRun(nil)
	require.Equal(t, map[hypervisor.DiskID]string{
		"vda": "incremental changed-blocks", "vdb": "incremental changed-blocks",
	}, modes(res))
}
