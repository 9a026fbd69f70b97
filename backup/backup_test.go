package backup_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/invariant"
	"github.com/holdfast-backup/holdfast/repository"
)

// rig is a VM on a fake hypervisor, a fake repository, and the truth about every
// point that was made of it.
type rig struct {
	t      *testing.T
	rnd    *rand.Rand
	world  *fakes.World
	hv     hypervisor.Hypervisor
	store  *fakes.Store
	repo   repository.Repository
	vm     hypervisor.VMID
	state  string
	truth  map[repository.PointID]map[hypervisor.DiskID]invariant.Truth
	claims []invariant.Claim
}

var seeds sync.Map

// seed is one per test, so that one number replays it.
func seed(t *testing.T) uint64 {
	fresh := rand.Uint64()
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		var err error
		fresh, err = strconv.ParseUint(v, 10, 64)
		require.NoError(t, err)
	}
	s, old := seeds.LoadOrStore(t.Name(), fresh)
	if !old {
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("replay with HOLDFAST_SEED=%d go test ./backup -run '^%s$'", s, t.Name())
			}
		})
	}
	return s.(uint64)
}

// stateDir is a directory in memory where there is one: journals sync every
// record, and these tests write thousands.
func stateDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "holdfast-test")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

const (
	sizeA = 9<<20 + 3*512
	sizeB = 5<<20 - 512
)

func newRig(t *testing.T, o fakes.Options, vm fakes.VMConfig) *rig {
	s := seed(t)
	o.Seed = s
	r := &rig{
		t: t, rnd: rand.New(rand.NewPCG(s, 1)), world: fakes.NewWorld(o), store: fakes.NewStore(),
		state: stateDir(t), truth: map[repository.PointID]map[hypervisor.DiskID]invariant.Truth{},
	}
	r.hv = r.world.Connect()
	if vm.Name == "" {
		vm.Name = "web1"
	}
	if vm.Disks == nil {
		vm.Disks = []fakes.DiskConfig{{ID: "vda", Size: sizeA}, {ID: "vdb", Size: sizeB}}
	}
	r.vm = r.world.AddVM(vm)
	repo, err := r.store.Open(t.Context(), fakes.RepositoryOptions{Seed: s})
	require.NoError(t, err)
	r.repo = repo
	for range 20 {
		r.scribble()
	}
	return r
}

// scribble is a guest that writes, zeroes and discards somewhere.
func (r *rig) scribble() {
	vm, err := r.hv.VM(r.t.Context(), r.vm)
	require.NoError(r.t, err)
	d := vm.Disks[r.rnd.IntN(len(vm.Disks))]
	if !d.Snapshottable {
		return
	}
	off := r.rnd.Int64N(d.Size/512) * 512
	n := min(512*(1+r.rnd.Int64N(400)), d.Size-off)
	if r.rnd.IntN(8) == 0 {
		off, n = d.Size-512, 512 // the last sector
	}
	switch r.rnd.IntN(5) {
	case 0:
		err = r.world.GuestZero(r.vm, d.ID, off, n)
	case 1:
		err = r.world.GuestDiscard(r.vm, d.ID, off, n)
	default:
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(r.rnd.Uint32())
		}
		err = r.world.GuestWrite(r.vm, d.ID, off, p)
	}
	require.NoError(r.t, err)
}

func (r *rig) options() *backup.Options {
	return &backup.Options{StateDir: r.state, Endpoint: "fake://", Location: "store", BlockSize: repository.LeafSize, InFlight: 3}
}

// run backs up, records the truth at the snapshot, and remembers the claim.
func (r *rig) run(ctx context.Context, change func(*backup.Options)) (*backup.Result, error) {
	o := r.options()
	truth := map[hypervisor.DiskID]invariant.Truth{}
	o.Events = &backup.Events{Stage: func(e backup.StageEvent) {
		if e.Stage != backup.StageSnapshot || e.Done {
			return
		}
		// Nothing writes between here and the snapshot in these tests.
		vm, err := r.hv.VM(context.Background(), r.vm)
		if err != nil {
			return
		}
		for _, d := range vm.Disks {
			if b, err := r.world.Bytes(r.vm, d.ID); err == nil {
				truth[d.ID] = b
			}
		}
	}}
	if change != nil {
		change(o)
	}
	res, err := backup.Run(ctx, r.hv, r.repo, r.vm, o)
	r.claims = append(r.claims, invariant.Claim{Run: res.Run, Point: res.Point()})
	if res.Point() != "" {
		kept := map[hypervisor.DiskID]invariant.Truth{}
		for _, d := range res.Disks {
			if d.Mode.Stored() {
				kept[d.ID] = truth[d.ID]
			}
		}
		r.truth[res.Point()] = kept
	}
	return res, err
}

// check checks the promise.
func (r *rig) check() {
	r.t.Helper()
	require.NoError(r.t, invariant.Check(context.Background(), invariant.World{
		Repo: r.repo, Hypervisor: r.hv, VMs: []hypervisor.VMID{r.vm}, Truth: r.truth, Claims: r.claims,
		Frozen: func(_ context.Context, vm hypervisor.VMID) (bool, error) { return r.world.Frozen(vm), nil },
		Leftovers: func(context.Context) (out []string, err error) {
			for _, l := range r.world.Leftovers() {
				if !l.Baseline {
					out = append(out, l.ID)
				}
			}
			return out, nil
		},
	}))
}

func (r *rig) mustRun(change func(*backup.Options)) *backup.Result {
	r.t.Helper()
	res, err := r.run(r.t.Context(), change)
	require.NoError(r.t, err)
	return res
}

func modes(res *backup.Result) map[hypervisor.DiskID]string {
	out := map[hypervisor.DiskID]string{}
	for _, d := range res.Disks {
		out[d.ID] = fmt.Sprintf("%s %s", d.Mode, d.Reason)
	}
	return out
}

func TestFullThenIncrementalsAreBitExact(t *testing.T) {
	for name, o := range map[string]fakes.Options{
		"random access": {}, "stream": {Sequential: true}, "nothing kept": {NoBaselines: true}, "no tracking": {NoTracking: true},
		"64 KiB granularity": {Granularity: 64 << 10},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, o, fakes.VMConfig{NVRAM: []byte("variables")})
			res := r.mustRun(nil)
			require.Equal(t, backup.Success, res.Status(), res.Degraded)
			require.Equal(t, map[hypervisor.DiskID]string{"vda": "full first", "vdb": "full first"}, modes(res))
			r.check()
			for range 6 {
				for range r.rnd.IntN(6) {
					r.scribble()
				}
				res = r.mustRun(nil)
				require.Equal(t, backup.Success, res.Status(), res.Degraded)
				want := "incremental changed-blocks"
				if o.NoTracking {
					want = "full never-tracked"
				}
				require.Equal(t, map[hypervisor.DiskID]string{"vda": want, "vdb": want}, modes(res))
				r.check()
			}
			require.Len(t, r.truth, 7)
		})
	}
}

func TestAnIncrementalReadsWhatChangedAndNothingElse(t *testing.T) {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{})
	r.mustRun(nil)
	res := r.mustRun(nil)
	_, read, stored := res.Totals()
	require.Zero(t, read)
	require.Zero(t, stored)
	require.NoError(t, r.world.GuestWrite(r.vm, "vda", 3<<20+5, []byte("x")))
	res = r.mustRun(nil)
	_, read, _ = res.Totals()
	require.Equal(t, int64(repository.LeafSize), read, "one block")
	require.Equal(t, int64(1), res.Disks[0].Stats.Written)
	r.check()
}

func TestOnlyTheDiskThatNeedsItIsReadInFull(t *testing.T) {
	for name, c := range map[string]struct {
		change func(r *rig) error
		want   map[hypervisor.DiskID]string
		opts   func(*backup.Options)
	}{
		"added": {
			func(r *rig) error {
				_, err := r.world.AddDisk(r.vm, fakes.DiskConfig{ID: "vdc", Size: 1 << 20})
				return err
			},
			map[hypervisor.DiskID]string{"vda": "incremental changed-blocks", "vdb": "incremental changed-blocks", "vdc": "full disk-added"},
			nil,
		},
		"removed": {
			func(r *rig) error { return r.world.RemoveDisk(r.vm, "vdb") },
			map[hypervisor.DiskID]string{"vda": "incremental changed-blocks"},
			nil,
		},
		"replaced": {
			func(r *rig) error { return r.world.ReplaceDisk(r.vm, "vdb", sizeB) },
			map[hypervisor.DiskID]string{"vda": "incremental changed-blocks", "vdb": "full disk-replaced"},
			nil,
		},
		"grown": {
			func(r *rig) error { return r.world.ResizeDisk(r.vm, "vdb", sizeB+1<<20) },
			map[hypervisor.DiskID]string{"vda": "incremental changed-blocks", "vdb": "full disk-resized"},
			nil,
		},
		"tracking lost": {
			func(r *rig) error { return r.world.LoseTracking(r.vm, "vdb", hypervisor.ReasonInconsistent) },
			map[hypervisor.DiskID]string{"vda": "incremental changed-blocks", "vdb": "full tracking-inconsistent"},
			nil,
		},
		"requested": {
			func(*rig) error { return nil },
			map[hypervisor.DiskID]string{"vda": "full requested", "vdb": "full requested"},
			func(o *backup.Options) { o.Full = true },
		},
		"excluded": {
			func(*rig) error { return nil },
			map[hypervisor.DiskID]string{"vda": "incremental changed-blocks", "vdb": "excluded rule-user"},
			func(o *backup.Options) { o.ExcludeDisks = []hypervisor.DiskID{"vdb"} },
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, fakes.Options{}, fakes.VMConfig{})
			r.mustRun(nil)
			r.scribble()
			require.NoError(t, c.change(r))
			r.scribble()
			res := r.mustRun(c.opts)
			require.Equal(t, backup.Success, res.Status(), res.Degraded)
			require.Equal(t, c.want, modes(res))
			r.check()
			r.scribble()
			res = r.mustRun(c.opts)
			if c.opts == nil {
				for _, d := range res.Disks {
					require.Equal(t, backup.Incremental, d.Mode, "the run after is incremental for %s", d.ID)
				}
			}
			r.check()
		})
	}
}

func TestDisksOutsideTheSnapshotAreNamed(t *testing.T) {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{Disks: []fakes.DiskConfig{
		{ID: "vda", Size: sizeA},
		{ID: "cd0", Size: 1 << 20, Attrs: hypervisor.Attrs{Removable: true, ReadOnly: true}, Refuse: hypervisor.ReasonCDROM},
		{ID: "lun", Size: 1 << 20, Backing: hypervisor.RDMPhysical, Refuse: hypervisor.ReasonRDMPhysical},
		{ID: "shr", Size: 1 << 20, Attrs: hypervisor.Attrs{Shared: true}, Refuse: hypervisor.ReasonShared},
	}})
	res := r.mustRun(nil)
	require.Equal(t, backup.Degraded, res.Status())
	require.Len(t, res.Degraded, 2)
	require.Equal(t, map[hypervisor.DiskID]string{
		"vda": "full first", "cd0": "excluded rule-cdrom", "lun": "unprotected rdm-physical", "shr": "unprotected shared",
	}, modes(res))
	r.check()

	_, err := r.run(t.Context(), func(o *backup.Options) { o.FailUnprotected = true })
	require.Error(t, err)
	r.check()
}

func TestConsistencyIsAskedForAndRecorded(t *testing.T) {
	agent := fakes.Guest{Agent: true, Level: hypervisor.FilesystemConsistent, Family: "linux"}
	fails, hangs, stuck := agent, agent, agent
	fails.Freeze, hangs.Freeze, stuck.ThawFails = fakes.FreezeFails, fakes.FreezeHangs, 100
	ask := func(q backup.Quiesce, m hypervisor.Consistency) func(*backup.Options) {
		return func(o *backup.Options) { o.Quiesce, o.MinConsistency, o.QuiesceTimeout = q, m, 50*time.Millisecond }
	}
	for name, c := range map[string]struct {
		guest  fakes.Guest
		opts   func(*backup.Options)
		status backup.Status
		level  hypervisor.Consistency
	}{
		"auto with agent":       {agent, ask(backup.QuiesceAuto, 0), backup.Success, hypervisor.FilesystemConsistent},
		"auto without agent":    {fakes.Guest{}, ask(backup.QuiesceAuto, 0), backup.Success, hypervisor.CrashConsistent},
		"auto, freeze fails":    {fails, ask(backup.QuiesceAuto, 0), backup.Success, hypervisor.CrashConsistent},
		"crash":                 {agent, ask(backup.QuiesceCrash, 0), backup.Success, hypervisor.CrashConsistent},
		"named and missed":      {fails, ask(backup.QuiesceFilesystem, 0), backup.Degraded, hypervisor.CrashConsistent},
		"named and hung":        {hangs, ask(backup.QuiesceFilesystem, 0), backup.Degraded, hypervisor.CrashConsistent},
		"minimum missed":        {fails, ask(backup.QuiesceFilesystem, 1), backup.Failed, 0},
		"minimum without agent": {fakes.Guest{}, ask(backup.QuiesceAuto, 1), backup.Failed, 0},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, fakes.Options{}, fakes.VMConfig{Guest: c.guest})
			res, err := r.run(t.Context(), c.opts)
			require.Equal(t, c.status, res.Status(), "%v %v", err, res.Degraded)
			if err == nil {
				require.Equal(t, c.level, res.Consistency.Level)
			} else {
				require.ErrorIs(t, err, hypervisor.ErrQuiesce)
			}
			r.check()
		})
	}
	t.Run("thaw that fails leaves an obligation that recover closes", func(t *testing.T) {
		r := newRig(t, fakes.Options{}, fakes.VMConfig{Guest: stuck})
		res := r.mustRun(ask(backup.QuiesceAuto, 0))
		require.Equal(t, backup.Degraded, res.Status())
		require.True(t, r.world.Frozen(r.vm))
		require.NoError(t, r.world.SetGuest(r.vm, agent))
		done := r.recover()
		require.Len(t, done, 1)
		require.NoError(t, done[0].Err)
		require.Equal(t, "thaw", done[0].Kind)
		r.check()
	})
}

// recover runs backup.Recover against the rig.
func (r *rig) recover() []backup.Recovered {
	r.t.Helper()
	done, err := backup.Recover(context.Background(), backup.RecoverOptions{
		StateDir: r.state,
		Connect:  func(context.Context, string) (hypervisor.Hypervisor, error) { return r.world.Connect(), nil },
		OpenRepository: func(ctx context.Context, _ string) (repository.Repository, error) {
			return r.store.Open(ctx, fakes.RepositoryOptions{})
		},
		Takeover: func(string) bool { return true },
	})
	require.NoError(r.t, err)
	return done
}

func TestASecondRunOfTheSameVMIsRefused(t *testing.T) {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{})
	var once sync.Once
	var second error
	res, err := r.run(t.Context(), func(o *backup.Options) {
		o.Events.Disk = func(backup.DiskEvent) {
			once.Do(func() {
				o2 := r.options()
				o2.Takeover = func(string) bool { return false }
				_, second = backup.Run(context.Background(), r.hv, r.repo, r.vm, o2)
			})
		}
	})
	require.NoError(t, err)
	require.ErrorIs(t, second, hypervisor.ErrBusy)
	require.ErrorIs(t, second, repository.ErrLocked)
	require.Equal(t, backup.Success, res.Status())
	r.check()
}

func pointsOfRun(run string) repository.Query { return repository.Query{Run: run} }
