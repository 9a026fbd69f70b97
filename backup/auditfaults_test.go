package backup_test

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/internal/tally"
	"github.com/holdfast-backup/holdfast/repository"
)

// nightly reports whether the long form of a test is asked for.
func nightly() bool { return os.Getenv("HOLDFAST_NIGHTLY") != "" }

// sparse returns the first of the calls that a test tries, and the distance of one
// to the next: those of the shard at night, few and others each time by day.
func sparse(t *testing.T, byDay int) (first, step int) {
	t.Helper()
	if nightly() {
		index, of := tally.Shard(t)
		return index + 1, of
	}
	t.Logf("replay with HOLDFAST_SEED=%d", seed(t))
	return 1 + rand.New(rand.NewPCG(seed(t), 9)).IntN(byDay), byDay
}

// record tells what a campaign counted, none of it a violation.
func record(t *testing.T, name, about, test string, counts ...tally.Count) {
	t.Helper()
	if nightly() {
		tally.Record(t, tally.Campaign{
			Name: name, About: about, Seed: seed(t), Counts: counts,
			Command: "HOLDFAST_NIGHTLY=1 go test -count=1 -run " + test + " ./backup",
		})
	}
}

// liar is a VM of whose disk vda one change is hidden. What is injected hits the
// run that audits all of it.
func liar(t *testing.T) *rig {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{})
	r.mustRun(nil)
	r.writeB(0xE1) // vda is left alone: an honest change of the same leaf would end the lie
	r.lie(20, 0xF1)
	return r
}

// writeB is a change of vdb that is tracked.
func (r *rig) writeB(value byte) {
	r.t.Helper()
	require.NoError(r.t, r.world.GuestWrite(r.vm, "vdb", r.rnd.Int64N(sizeB/512)*512, bytes.Repeat([]byte{value}, 512)))
}

// afterLie is what follows a fault in the run that may have caught the liar:
// recover, the promise, a run that audits everything, the promise again. A point
// whose audit could not be finished is degraded and may be wrong: then the next
// audit has to name it.
func (r *rig) afterLie(res *backup.Result, note string) {
	r.t.Helper()
	unsure := res.Point() != "" && !res.Disks[0].Audit.Lied() && res.Disks[0].Mode == backup.Incremental
	if unsure {
		require.Equal(r.t, backup.Degraded, res.Status(), note)
		require.Error(r.t, res.Disks[0].Audit.Err, note)
		delete(r.truth[res.Point()], "vda")
	}
	for _, d := range r.recover() {
		require.NoError(r.t, d.Err, "%s: recover %s %s", note, d.Kind, d.Object)
	}
	r.check()
	r.hv = r.world.Connect()
	repo, err := r.store.Open(context.Background(), fakes.RepositoryOptions{})
	require.NoError(r.t, err)
	r.repo = repo
	r.writeB(0xE2)
	again := r.mustRun(func(o *backup.Options) {
		auditAll(o)
		o.Takeover = func(string) bool { return true }
	})
	switch {
	case again.Disks[0].Audit.Lied():
		require.Equal(r.t, backup.Degraded, again.Status(), note)
	default:
		require.Equal(r.t, backup.Success, again.Status(), "%s: %v", note, again.Degraded)
		require.Equal(r.t, "full audit-mismatch", modes(again)["vda"], "%s: the lie was found before", note)
	}
	r.check()
	if unsure {
		require.Contains(r.t, r.suspicions(), res.Point(), note)
	}
	require.Empty(r.t, r.recover(), note)
}

// TestEveryCallFailsOnceWhileALiarIsCaught fails, or cancels at, each call of the
// hypervisor in a run that catches a lying change tracking.
func TestEveryCallFailsOnceWhileALiarIsCaught(t *testing.T) {
	var tried atomic.Int64
	t.Cleanup(func() {
		record(t, "audit-calls", "Each call of the hypervisor fails, or the run is cancelled at it, while an audit catches a lying change tracking.",
			"TestEveryCallFailsOnceWhileALiarIsCaught", tally.Count{Name: "faults", Value: tried.Load()})
	})
	for name, fault := range map[string]func(cancel func()) fakes.Fault{
		"before": func(func()) fakes.Fault { return fakes.Fault{Err: errBroken} },
		"after":  func(func()) fakes.Fault { return fakes.Fault{Err: errBroken, After: true} },
		"short":  func(func()) fakes.Fault { return fakes.Fault{Err: errBroken, Short: true} },
		"cancel": func(cancel func()) fakes.Fault { return fakes.Fault{Do: cancel} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first, step := sparse(t, 25)
			for k := first; ; k += step {
				r := liar(t)
				ctx, cancel := context.WithCancel(t.Context())
				var op fakes.Op
				var hit atomic.Bool
				plain := r.hv
				r.hv = fakes.WithFaults(plain, fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
					if c.N != k {
						return fakes.Fault{}
					}
					op = c.Op
					hit.Store(true)
					return fault(cancel)
				}))
				res, err := r.run(ctx, auditAll)
				cancel()
				r.hv = plain
				note := fmt.Sprintf("%s call %d, %s: %s, %v", name, k, op, res.Status(), err)
				if !hit.Load() {
					require.Greater(t, k, 60, "the audit reads every leaf")
					return
				}
				tried.Add(1)
				require.NotEqual(t, backup.Success, res.Status(), note)
				r.afterLie(res, note)
			}
		})
	}
}

// TestEveryStorageOperationFailsOnceWhileALiarIsCaught does the same to the
// repository.
func TestEveryStorageOperationFailsOnceWhileALiarIsCaught(t *testing.T) {
	var tried atomic.Int64
	t.Cleanup(func() {
		record(t, "audit-storage", "Each operation of the repository's storage fails, or the process is killed at it, while an audit catches a lying change tracking.",
			"TestEveryStorageOperationFailsOnceWhileALiarIsCaught", tally.Count{Name: "faults", Value: tried.Load()})
	})
	for name, f := range map[string]fakes.StoreFault{
		"before": {Err: errBroken}, "after": {Err: errBroken, After: true}, "killed": {Kill: true}, "killed after": {Kill: true, After: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first, step := sparse(t, 25)
			for k := int64(first); ; k += int64(step) {
				r := liar(t)
				var op fakes.StoreOp
				var seen atomic.Int64
				r.store.SetHook(func(_ context.Context, o fakes.StoreOp) fakes.StoreFault {
					if seen.Add(1) != k {
						return fakes.StoreFault{}
					}
					op = o
					return f
				})
				res, err := r.run(t.Context(), auditAll)
				r.store.SetHook(nil)
				note := fmt.Sprintf("%s operation %d, %s %s: %s, %v", name, k, op.Kind, op.Name, res.Status(), err)
				if seen.Load() < k {
					require.Greater(t, k, int64(20))
					return
				}
				tried.Add(1)
				require.NotEqual(t, backup.Success, res.Status(), note)
				r.claimUnheard(note)
				r.afterLie(res, note)
			}
		})
	}
}

// claimUnheard notes points of runs that did not hear of their commit.
func (r *rig) claimUnheard(note string) {
	r.t.Helper()
	repo, err := r.store.Open(context.Background(), fakes.RepositoryOptions{})
	require.NoError(r.t, err, note)
	r.repo = repo
	for i, c := range r.claims {
		if c.Point != "" {
			continue
		}
		for p, err := range repo.Points(context.Background(), pointsOfRun(c.Run)) {
			require.NoError(r.t, err, note)
			r.claims[i].Point = p.ID
		}
	}
}

// TestTheDefaultAuditFindsALiar measures detection through the whole pipeline: a
// disk just large enough for a sample of 115 MiB, of which the tracking hides one
// leaf in a hundred, is caught in 99 % of single runs; one in a thousand, in 37 %.
func TestTheDefaultAuditFindsALiar(t *testing.T) {
	const size = 2400 << 20
	type lies struct {
		name   string
		share  float64
		trials int
		goal   float64
	}
	campaign := []lies{{"audit-five-percent", 0.05, 2, 1 - 1e-10}}
	if nightly() {
		_, of := tally.Shard(t)
		n := (1000 + of - 1) / of
		campaign = []lies{{"audit-one-percent", 0.01, n, 0.99}, {"audit-one-permille", 0.001, n, 0.369}}
	}
	for _, c := range campaign {
		t.Run(fmt.Sprintf("%.1f%%", c.share*100), func(t *testing.T) {
			r := newRig(t, fakes.Options{}, fakes.VMConfig{Disks: []fakes.DiskConfig{{ID: "vda", Size: size}}})
			rnd := rand.New(rand.NewPCG(seed(t), 7))
			t.Logf("replay with HOLDFAST_SEED=%d", seed(t))
			run := func(full bool) *backup.Result {
				return r.mustRun(func(o *backup.Options) {
					o.Full, o.AuditSeed = full, rnd.Uint64()|1
				})
			}
			run(false)
			const leaves = size / repository.LeafSize
			wrong := int(math.Ceil(c.share * leaves))
			found := 0
			for i := range c.trials {
				require.NoError(t, r.world.GuestDiscard(r.vm, "vda", 0, size)) // it keeps the disk small
				run(true)
				hidden := map[int64]bool{}
				for len(hidden) < wrong {
					leaf := rnd.Int64N(leaves)
					if !hidden[leaf] {
						r.lie(leaf, byte(i)+1)
						hidden[leaf] = true
					}
				}
				res := run(false)
				require.Equal(t, int64(115<<20), res.Audited())
				d := res.Disks[0]
				require.Equal(t, d.Audit.Lied(), res.Status() == backup.Degraded)
				for _, off := range d.Audit.Offsets {
					require.True(t, hidden[off/repository.LeafSize], "leaf at %d is as it was", off)
				}
				if d.Audit.Lied() {
					found++
				}
			}
			record(t, c.name, fmt.Sprintf("The change tracking of a disk of 2.4 GiB hides changes in %.1f %% of the leaves, and the default audit looks for them in one run.", c.share*100),
				"TestTheDefaultAuditFindsALiar", tally.Count{Name: "runs", Value: int64(c.trials)}, tally.Count{Name: "found", Value: int64(found)})
			t.Logf("%d of %d leaves hidden: found in %d of %d runs", wrong, leaves, found, c.trials)
			require.GreaterOrEqual(t, found, backup.LeastFound(c.trials, c.goal))
		})
	}
}

// TestAHonestTrackerIsNeverAccused: random writes, zeroes and discards between
// runs that audit everything, at granularities finer and coarser than a leaf.
func TestAHonestTrackerIsNeverAccused(t *testing.T) {
	for _, g := range []int64{4 << 10, 64 << 10, 1 << 20} {
		r := newRig(t, fakes.Options{Granularity: g}, fakes.VMConfig{})
		r.mustRun(nil)
		rounds := 2
		if nightly() {
			rounds = 100
		}
		for range rounds {
			for range r.rnd.IntN(8) {
				r.scribble()
			}
			res := r.mustRun(auditAll)
			require.Equal(t, backup.Success, res.Status(), res.Degraded)
			r.check()
		}
	}
}
