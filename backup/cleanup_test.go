package backup_test

import (
	"context"
	"io"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

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
			var dead atomic.Bool // calls are made by several goroutines
			r.hv = fakes.WithFaults(plain, fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
				if c.Op == fakes.OpRelease {
					dead.Store(true)
				}
				if dead.Load() {
					return fakes.Fault{Err: errBroken}
				}
				return fakes.Fault{}
			}))
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
