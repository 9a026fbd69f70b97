package campaign_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/internal/invariant"
	"github.com/holdfast-backup/holdfast/internal/journal"
	"github.com/holdfast-backup/holdfast/internal/journal/journaltest"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/restore"
)

const (
	sizeA, sizeB = 2*repository.LeafSize + 512, repository.LeafSize - 1024

	stateDir = "/state"
	cleanup  = time.Minute // that a run may take after its end
)

// env is a world: what outlives processes, and the truth about it.
type env struct {
	mu     sync.Mutex // guards what several processes of a simulation learn
	shared bool       // others are at work: hooks stay

	rnd    *rand.Rand
	world  *fakes.World
	store  *fakes.Store
	disk   *journaltest.Disk
	dir    string // for restored files
	vms    []hypervisor.VMID
	truth  map[repository.PointID]map[hypervisor.DiskID]invariant.Truth
	claims []invariant.Claim
	points []repository.PointID        // acknowledged, in order
	doomed map[repository.PointID]bool // somebody asked for their deletion
	flight int                         // blocks that a backup has under way
}

func newEnv(seed uint64, dir string, o fakes.Options) *env {
	o.Seed = seed
	return &env{
		rnd: rand.New(rand.NewPCG(seed, 5)), world: fakes.NewWorld(o), store: fakes.NewStore(), disk: journaltest.NewDisk(), dir: dir,
		truth: map[repository.PointID]map[hypervisor.DiskID]invariant.Truth{}, doomed: map[repository.PointID]bool{}, flight: 2,
	}
}

// out is where files are restored to.
func (e *env) out() string { return filepath.Join(e.dir, "out") }

// addVM makes a VM with two disks, unless cfg has others, and some content.
func (e *env) addVM(cfg fakes.VMConfig) hypervisor.VMID {
	cfg.Name = fmt.Sprintf("web%d", len(e.vms)+1)
	if cfg.Disks == nil {
		cfg.Disks = []fakes.DiskConfig{{ID: "vda", Size: sizeA}, {ID: "vdb", Size: sizeB}}
	}
	id := e.world.AddVM(cfg)
	e.vms = append(e.vms, id)
	for range 4 {
		e.scribble(id)
	}
	return id
}

// scribble changes something on each disk of a VM that can be written.
func (e *env) scribble(vm hypervisor.VMID) {
	def, err := e.world.Connect().VM(context.Background(), vm)
	must(err)
	for _, d := range def.Disks {
		if d.Attrs.ReadOnly || d.Size == 0 {
			continue
		}
		off := e.rnd.Int64N(d.Size/512) * 512
		n := min(512*(1+e.rnd.Int64N(200)), d.Size-off)
		if e.rnd.IntN(4) == 0 {
			must(e.world.GuestDiscard(vm, d.ID, off, n))
			continue
		}
		p := make([]byte, n)
		for i := 0; i < len(p); i += 8 {
			binary.LittleEndian.PutUint64(p[i:], e.rnd.Uint64())
		}
		must(e.world.GuestWrite(vm, d.ID, off, p))
	}
}

// must is for what cannot fail, since nothing is injected into it.
func must(err error) {
	if err != nil {
		panic(fmt.Sprintf("campaign: preparation failed: %v", err))
	}
}

// process is one process: its connections, and the faults that it meets.
type process struct {
	e    *env
	in   *injector // nil: it meets none
	hv   hypervisor.Hypervisor
	repo repository.Repository
	fs   *journaltest.Process
	disk *journaltest.Disk
	rand io.Reader

	holder   string                   // in leases
	takeover func(holder string) bool // is that one dead?
	clock    clock.Clock
	told     strings.Builder // results of runs, for what they say of failures
}

func anybody(string) bool { return true }

// start makes a process. With in, it may fail to open the repository.
func (e *env) start(ctx context.Context, in *injector) (*process, error) {
	p := &process{e: e, in: in, hv: e.world.Connect(), disk: e.disk, rand: e.chacha(), takeover: anybody}
	var hook journaltest.Hook
	if in != nil {
		hook = in.journal
		in.kill = func() {} // until there is something to kill
		p.hv = fakes.WithFaults(p.hv, in)
		e.store.SetHook(in.storage)
	}
	p.fs = e.disk.Process(hook)
	if in != nil {
		in.kill = p.fs.Kill
	}
	var err error
	if p.repo, err = e.store.Open(ctx, fakes.RepositoryOptions{Seed: 1}); err != nil {
		return p, err
	}
	return p, nil
}

func (e *env) chacha() io.Reader {
	var s [32]byte
	for i := range s {
		s[i] = byte(e.rnd.Uint32())
	}
	return rand.NewChaCha8(s)
}

// plain starts a process that meets no faults.
func (e *env) plain() *process {
	if e.shared { // it only looks
		repo, err := e.store.Open(context.Background(), fakes.RepositoryOptions{Seed: 1})
		must(err)
		return &process{e: e, hv: e.world.Connect(), repo: repo}
	}
	e.store.SetHook(nil)
	p, err := e.start(context.Background(), nil)
	must(err)
	return p
}

// backup backs up a VM, notes what it said of itself and what the truth is.
func (p *process) backup(ctx context.Context, vm hypervisor.VMID, change func(*backup.Options)) (*backup.Result, error) {
	o := &backup.Options{
		StateDir: stateDir, JournalFS: p.fs, Endpoint: "fake://", Location: "store", BlockSize: repository.LeafSize, InFlight: p.e.flight,
		CleanupTimeout: cleanup, Rand: p.rand, Takeover: p.takeover, Holder: p.holder, Clock: p.clock,
	}
	truth := map[hypervisor.DiskID]invariant.Truth{}
	o.Events = &backup.Events{Stage: func(ev backup.StageEvent) {
		if ev.Stage != backup.StageSnapshot || ev.Done {
			return
		}
		def, err := p.e.world.Connect().VM(context.Background(), vm)
		must(err)
		for _, d := range def.Disks {
			b, err := p.e.world.Bytes(vm, d.ID)
			must(err)
			truth[d.ID] = b
		}
	}}
	if change != nil {
		change(o)
	}
	res, err := backup.Run(ctx, p.hv, p.repo, vm, o)
	p.e.mu.Lock()
	defer p.e.mu.Unlock()
	fmt.Fprintf(&p.told, "%+v\n", *res)
	if p.in != nil && p.in.wasKilled() {
		p.e.pending(res, truth)
		return res, fakes.ErrKilled // nobody hears what it says
	}
	if (err == nil) != (res.Point() != "") || (res.Status() == backup.Failed) != (err != nil) {
		return res, violation("I5: status %s, point %q, error %v", res.Status(), res.Point(), err)
	}
	p.e.claims = append(p.e.claims, invariant.Claim{Run: res.Run, Point: res.Point()})
	if err != nil {
		p.e.pending(res, truth)
		return res, err
	}
	p.e.points = append(p.e.points, res.Point())
	p.e.remember(res.Point(), res, truth)
	return res, nil
}

func (e *env) remember(id repository.PointID, res *backup.Result, truth map[hypervisor.DiskID]invariant.Truth) {
	kept := map[hypervisor.DiskID]invariant.Truth{}
	for _, d := range res.Disks {
		if d.Mode.Stored() {
			kept[d.ID] = truth[d.ID]
		}
	}
	e.truth[id] = kept
}

// pending remembers the truth about a point that may exist although its run did not
// say so.
func (e *env) pending(res *backup.Result, truth map[hypervisor.DiskID]invariant.Truth) {
	repo := e.plain().repo
	for p, err := range repo.Points(context.Background(), repository.Query{Run: res.Run}) {
		if err == nil && res.Run != "" {
			kept := map[hypervisor.DiskID]invariant.Truth{}
			for _, d := range p.Disks {
				kept[hypervisor.DiskID(d.ID)] = truth[hypervisor.DiskID(d.ID)]
			}
			e.truth[p.ID] = kept
		}
	}
}

// errViolation marks what breaks the promise.
var errViolation = errors.New("violation")

func violation(format string, args ...any) error {
	return fmt.Errorf("%w: %w", errViolation, fmt.Errorf(format, args...))
}

// target is the hypervisor to restore to.
func (p *process) target() hypervisor.Target { return p.hv.(hypervisor.Target) }

func (p *process) restoreOptions() *restore.Options {
	return &restore.Options{
		StateDir: stateDir, JournalFS: p.fs, Endpoint: "fake://", Location: "store", InFlight: 2, CleanupTimeout: cleanup, Rand: p.rand,
		Clock: p.clock,
	}
}

// toVM restores a point as a VM and compares it.
func (p *process) toVM(ctx context.Context, id repository.PointID, vo *restore.VMOptions, disks ...hypervisor.DiskID) error {
	o := p.restoreOptions()
	o.Disks = disks
	res, err := restore.ToVM(ctx, p.repo, id, p.target(), vo, o)
	if err != nil {
		return err
	}
	for disk, want := range p.e.truth[id] {
		if res.VM.Disk(disk) == nil {
			if len(disks) == 0 {
				return violation("I1: restored VM has no disk %s", disk)
			}
			continue
		}
		got, err := p.e.world.Bytes(res.VM.ID, disk)
		must(err)
		if err := equal(want, got); err != nil {
			return violation("I1: restored disk %s: %w", disk, err)
		}
	}
	return nil
}

// toFiles restores a point to files and compares raw ones.
func (p *process) toFiles(ctx context.Context, id repository.PointID, f restore.Format) error {
	dir := p.e.out()
	if _, err := restore.ToFiles(ctx, p.repo, id, dir, f, p.restoreOptions()); err != nil {
		return err
	}
	if f != restore.Raw {
		return nil
	}
	for disk, want := range p.e.truth[id] {
		file, err := os.Open(filepath.Join(dir, string(disk)+".raw"))
		if err != nil {
			return violation("I1: %w", err)
		}
		err = equal(want, file)
		must(file.Close())
		if err != nil {
			return violation("I1: restored file of disk %s: %w", disk, err)
		}
	}
	return nil
}

func equal(want invariant.Truth, got io.ReaderAt) error {
	a, b := make([]byte, want.Size()), make([]byte, want.Size())
	if n, err := want.ReadAt(a, 0); n < len(a) {
		return err
	}
	if n, err := got.ReadAt(b, 0); n < len(b) {
		return err
	}
	for i := range a {
		if a[i] != b[i] {
			return fmt.Errorf("byte %d is %#x and should be %#x", i, b[i], a[i])
		}
	}
	return nil
}

// recover does what "holdfast recover" does.
func (p *process) recover(ctx context.Context) error {
	done, err := backup.Recover(ctx, backup.RecoverOptions{
		StateDir: stateDir, JournalFS: p.fs, Location: "store",
		Connect:        func(context.Context, string) (hypervisor.Hypervisor, error) { return p.hv, nil },
		OpenRepository: func(context.Context, string) (repository.Repository, error) { return p.repo, nil },
		Takeover:       p.takeover,
		Clock:          p.clock,
	})
	for _, d := range done {
		if d.Err != nil {
			err = errors.Join(err, fmt.Errorf("recover %s %s %s: %w", d.Run, d.Kind, d.Object, d.Err))
		}
	}
	return err
}

// open counts the journals of runs that did not end.
func (p *process) open() (int, error) {
	list, err := journal.List(backup.JournalDir(stateDir), &journal.Options{FS: p.fs})
	if err != nil {
		return 0, violation("list of journals: %w", err)
	}
	return len(list), nil
}

// check is the promise.
func (e *env) check() error {
	p := e.plain()
	claims := e.claims[:0:0]
	for _, c := range e.claims {
		if !e.doomed[c.Point] {
			claims = append(claims, c)
		}
	}
	err := invariant.Check(context.Background(), invariant.World{
		Repo: p.repo, Hypervisor: p.hv, VMs: e.vms, Truth: e.truth, Claims: claims,
		Frozen: func(_ context.Context, vm hypervisor.VMID) (bool, error) { return e.world.Frozen(vm), nil },
		Leftovers: func(context.Context) (out []string, err error) {
			for _, l := range e.world.Leftovers() {
				if !l.Baseline {
					out = append(out, l.ID)
				}
			}
			return out, nil
		},
	})
	if err != nil {
		return violation("%w", err)
	}
	return nil
}
