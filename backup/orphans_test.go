package backup_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/journal/journaltest"
	"github.com/holdfast-backup/holdfast/repository"
)

// diesWithItsSnapshot lets a run die once it has its snapshot.
func (r *rig) diesWithItsSnapshot() {
	r.t.Helper()
	plain := r.hv
	r.diesAt(fakes.OpOpenDisk)
	res, err := r.run(r.t.Context(), nil)
	require.ErrorIs(r.t, err, errBroken)
	require.Empty(r.t, res.Point())
	r.hv = plain
	require.Len(r.t, r.snapshots(), 1)
}

func (r *rig) snapshots() (out []hypervisor.SnapshotRef) {
	r.t.Helper()
	for ref, err := range r.hv.Snapshots(r.t.Context(), r.vm) {
		require.NoError(r.t, err)
		out = append(out, ref)
	}
	return out
}

// TestTheNextRunReleasesWhatADeadOneLeft: no recover has to come first, and the
// journal of the dead run need not be there. What others made is left alone.
func TestTheNextRunReleasesWhatADeadOneLeft(t *testing.T) {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{})
	r.mustRun(nil)
	r.scribble()
	r.diesWithItsSnapshot()
	left := r.snapshots()[0].Name
	theirs, err := r.hv.CreateSnapshot(t.Context(), r.vm, &hypervisor.SnapshotOptions{
		Name: hypervisor.Name{Repo: "0badf00d", Run: "20260102t030405aaaaaaaaaa", Kind: "snap"}.String(),
	})
	require.NoError(t, err)

	var said []string
	res := r.mustRun(func(o *backup.Options) {
		o.StateDir = t.TempDir()
		o.Takeover = func(string) bool { return true }
		o.Events.Notice = func(e backup.NoticeEvent) { said = append(said, e.Text) }
	})
	require.Equal(t, backup.Success, res.Status(), "%v", res.Degraded)
	require.Contains(t, strings.Join(said, "\n"), left)
	require.Len(t, r.snapshots(), 1, "of another repository")
	require.NoError(t, theirs.Release(t.Context(), nil))
}

// TestRecoverWithoutTheRepositorySaysSo, and leaves open what is owed.
func TestRecoverWithoutTheRepositorySaysSo(t *testing.T) {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{})
	r.diesWithItsSnapshot()
	for range 2 {
		done, err := backup.Recover(t.Context(), backup.RecoverOptions{
			StateDir: r.state,
			Connect:  func(context.Context, string) (hypervisor.Hypervisor, error) { return r.world.Connect(), nil },
			OpenRepository: func(context.Context, string) (repository.Repository, error) {
				return nil, errBroken
			},
			Takeover: func(string) bool { return true },
		})
		require.NoError(t, err)
		require.NotEmpty(t, done)
		for _, d := range done {
			require.ErrorIs(t, d.Err, errBroken, "%s %s", d.Kind, d.Object)
		}
	}
	require.Len(t, r.snapshots(), 1)
	for _, d := range r.recover() {
		require.NoError(t, d.Err)
	}
	require.Empty(t, r.snapshots())
	r.check()
}

// TestAStageThatCannotBeWrittenDownIsNotBegun: what happened in it, nobody would know.
func TestAStageThatCannotBeWrittenDownIsNotBegun(t *testing.T) {
	for _, stage := range []backup.Stage{backup.StageSnapshot, backup.StageTransfer, backup.StageCommit} {
		t.Run(string(stage), func(t *testing.T) {
			r := newRig(t, fakes.Options{}, fakes.VMConfig{})
			var full atomic.Bool
			disk := journaltest.NewDisk()
			res, err := r.run(t.Context(), func(o *backup.Options) {
				o.JournalFS = disk.Process(func(op journaltest.Op) journaltest.Fault {
					if full.Load() && op.Kind == journaltest.OpWrite {
						return journaltest.Fault{Err: errBroken}
					}
					return journaltest.Fault{}
				})
				before := o.Events.Stage
				o.Events.Stage = func(e backup.StageEvent) {
					before(e)
					if e.Stage == stage && !e.Done {
						full.Store(true)
					}
				}
			})
			require.ErrorIs(t, err, errBroken)
			require.Empty(t, res.Point())
			require.Empty(t, r.snapshots())
			for p, err := range r.repo.Points(t.Context(), repository.Query{}) {
				require.NoError(t, err)
				require.Fail(t, "committed", "%v", p)
			}
		})
	}
}

// runsDry gives n bytes and then no more.
type runsDry struct{ n int }

var errNoRandomness = errors.New("no randomness")

func (r *runsDry) Read(p []byte) (int, error) {
	if r.n == 0 {
		return 0, errNoRandomness
	}
	n := copy(p, make([]byte, min(r.n, len(p))))
	r.n -= n
	return n, nil
}

// TestARunWithoutRandomnessDoesNotBegin: neither its name nor what it audits may be
// guessed.
func TestARunWithoutRandomnessDoesNotBegin(t *testing.T) {
	for n := range 13 { // the name takes 5 bytes, the seed 8
		r := newRig(t, fakes.Options{}, fakes.VMConfig{})
		_, err := r.run(t.Context(), func(o *backup.Options) { o.Rand = &runsDry{n} })
		require.ErrorIs(t, err, errNoRandomness, "%d bytes", n)
		require.Empty(t, r.snapshots())
	}
}
