package backup_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

var errBroken = errors.New("broken on purpose")

// scenario is a VM with history: one full, then writes and a new disk. What is
// injected hits the incremental that follows.
func scenario(t *testing.T) *rig {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{
		NVRAM: []byte("variables"),
		Guest: fakes.Guest{Agent: true, Level: hypervisor.FilesystemConsistent, Family: "linux"},
	})
	r.mustRun(nil)
	_, err := r.world.AddDisk(r.vm, fakes.DiskConfig{ID: "vdc", Size: 1<<20 + 512})
	require.NoError(t, err)
	for range 5 {
		r.scribble()
	}
	return r
}

// after is what follows every fault: recover, the promise, a clean run, the
// promise again.
func (r *rig) after(note string) {
	r.t.Helper()
	for _, d := range r.recover() {
		require.NoError(r.t, d.Err, "%s: recover %s %s", note, d.Kind, d.Object)
	}
	r.check()
	r.hv = r.world.Connect()
	repo, err := r.store.Open(context.Background(), fakes.RepositoryOptions{})
	require.NoError(r.t, err)
	r.repo = repo
	r.scribble()
	res := r.mustRun(func(o *backup.Options) { o.Takeover = func(string) bool { return true } })
	require.Equal(r.t, backup.Success, res.Status(), "%s: %v", note, res.Degraded)
	r.check()
	require.Empty(r.t, r.recover(), note)
}

// TestEveryHypervisorCallFailsOnce fails call k of an incremental, for every k,
// in every way: before its effect, after its effect so that the outcome is
// unknown, and with the process dead from then on.
func TestEveryHypervisorCallFailsOnce(t *testing.T) {
	count := func(t *testing.T, inject fakes.Injector) (int, *rig, *backup.Result, error) {
		r := scenario(t)
		plain := r.hv
		var n atomic.Int64
		r.hv = fakes.WithFaults(plain, fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
			n.Add(1)
			return inject.Inject(c)
		}))
		res, err := r.run(t.Context(), nil)
		r.hv = plain
		return int(n.Load()), r, res, err
	}
	total, _, _, err := count(t, fakes.InjectorFunc(func(fakes.Call) fakes.Fault { return fakes.Fault{} }))
	require.NoError(t, err)
	require.Greater(t, total, 30)
	for name, mode := range map[string]func(k int) fakes.Injector{
		"before": func(k int) fakes.Injector { return at(k, fakes.Fault{Err: errBroken}) },
		"after":  func(k int) fakes.Injector { return at(k, fakes.Fault{After: true, Err: errBroken}) },
		"killed": func(k int) fakes.Injector {
			return fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
				if c.N >= k {
					return fakes.Fault{Err: errBroken}
				}
				return fakes.Fault{}
			})
		},
		"killed after": func(k int) fakes.Injector {
			return fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
				switch {
				case c.N > k:
					return fakes.Fault{Err: errBroken}
				case c.N == k:
					return fakes.Fault{After: true, Err: errBroken}
				}
				return fakes.Fault{}
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for k := 1; k <= total; k++ {
				var op fakes.Op
				inject := mode(k)
				_, r, res, err := count(t, fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
					if c.N == k {
						op = c.Op
					}
					return inject.Inject(c)
				}))
				note := fmt.Sprintf("%s call %d of %d, %s: %s, %v", name, k, total, op, res.Status(), err)
				if res.Status() == backup.Success && res.Point() == "" {
					t.Fatal(note)
				}
				if err != nil {
					require.ErrorIs(t, err, errBroken, note)
				}
				r.after(note)
			}
		})
	}
}

func at(k int, f fakes.Fault) fakes.Injector {
	return fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
		if c.N == k {
			return f
		}
		return fakes.Fault{}
	})
}

// TestEveryStorageOperationFailsOnce does the same to the repository.
func TestEveryStorageOperationFailsOnce(t *testing.T) {
	run := func(t *testing.T, hook fakes.StoreHook) (int64, *rig, *backup.Result, error) {
		r := scenario(t)
		before := r.store.Ops()
		r.store.SetHook(hook)
		res, err := r.run(t.Context(), nil)
		r.store.SetHook(nil)
		return r.store.Ops() - before, r, res, err
	}
	total, _, _, err := run(t, nil)
	require.NoError(t, err)
	for name, f := range map[string]fakes.StoreFault{
		"before": {Err: errBroken}, "after": {Err: errBroken, After: true},
		"killed": {Kill: true}, "killed after": {Kill: true, After: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for k := int64(1); k <= total; k++ {
				var op fakes.StoreOp
				var seen atomic.Int64
				_, r, res, err := run(t, func(_ context.Context, o fakes.StoreOp) fakes.StoreFault {
					if seen.Add(1) != k {
						return fakes.StoreFault{}
					}
					op = o
					return f
				})
				note := fmt.Sprintf("%s operation %d of %d, %s %s: %s, %v", name, k, total, op.Kind, op.Name, res.Status(), err)
				if err != nil && !errors.Is(err, errBroken) && !errors.Is(err, fakes.ErrKilled) {
					t.Fatal("the cause is lost: " + note)
				}
				r.afterStore(note)
			}
		})
	}
}

// afterStore allows what a storage fault may leave: a point whose run did not
// hear of its commit.
func (r *rig) afterStore(note string) {
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
	r.after(note)
}

// TestCancelAtEveryCall cancels the run during call k.
func TestCancelAtEveryCall(t *testing.T) {
	step := 1
	if testing.Short() { // under the race detector
		step = 4
	}
	for k := 1; ; k += step {
		r := scenario(t)
		plain := r.hv
		ctx, cancel := context.WithCancel(t.Context())
		hit := false
		r.hv = fakes.WithFaults(plain, fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
			if c.N != k {
				return fakes.Fault{}
			}
			hit = true
			return fakes.Fault{Do: cancel}
		}))
		res, err := r.run(ctx, nil)
		cancel()
		r.hv = plain
		if !hit {
			require.Greater(t, k, 30)
			return
		}
		note := fmt.Sprintf("cancel at call %d: %s, %v", k, res.Status(), err)
		if err != nil {
			require.ErrorIs(t, err, context.Canceled, note)
		} else {
			require.NotEmpty(t, res.Point(), note)
		}
		r.check()
		r.after(note)
	}
}
