package backup

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/lease"
	"github.com/holdfast-backup/holdfast/repository"
)

// Run backs up one VM into repo. It returns a result beside every error. When
// ctx ends, the run is undone on a context of its own before Run returns.
func Run(ctx context.Context, hv hypervisor.Hypervisor, repo repository.Repository, id hypervisor.VMID, opts *Options) (*Result, error) {
	o := opts.withDefaults()
	r := &run{o: &o, hv: hv, repo: repo, res: &Result{VM: VMRef{ID: id}, Started: o.Clock.Now()}}
	r.res.err = r.all(ctx)
	r.res.Finished = o.Clock.Now()
	return r.res, r.res.err
}

// run is the state of one backup. Its fields are filled stage by stage, and read
// by unwind, which undoes whatever is there.
type run struct {
	o    *Options
	hv   hypervisor.Hypervisor
	repo repository.Repository
	res  *Result

	book   *book // journal and the copy of it in the repository
	vm     *hypervisor.VM
	plan   *Plan
	name   string // owner name of everything made on the hypervisor
	lease  *lease.Lease
	snap   hypervisor.Snapshot
	parent repository.Reader
	writer repository.Writer
	// baselines are those that the point stands on; the release keeps them.
	baselines map[hypervisor.DiskID]hypervisor.Baseline

	// committed: the point exists. unknown: it may exist.
	committed, unknown bool
}

// all goes through the stages. After the commit nothing can make the run fail
// any more: it can only be degraded.
func (r *run) all(ctx context.Context) (err error) {
	if err := r.o.check(); err != nil {
		return err
	}
	if r.res.Run, err = newRun(r.o); err != nil {
		return err
	}
	if r.res.AuditSeed, err = newSeed(r.o); err != nil {
		return err
	}
	r.name = hypervisor.Name{Repo: r.repo.Info().Repo8(), Run: r.res.Run, Kind: snapKind}.String()
	if r.book, err = openBook(r); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.unwind(ctx, err)) }()

	var work context.Context // ends with ctx, or when the lease is lost
	for _, s := range []struct {
		stage Stage
		do    func() error
	}{
		{StagePlan, func() error { return r.makePlan(ctx) }},
		{StagePreflight, func() (err error) { work, err = r.preflight(ctx); return err }},
		{StageSnapshot, func() error { return r.snapshot(work) }},
		{StageTransfer, func() error { return r.transfer(work) }},
		{StageCommit, func() error { return r.commit(work) }},
		{StageRelease, func() error { return r.release(ctx) }},
	} {
		err := r.enter(s.stage)
		if err == nil || r.committed {
			err = errors.Join(err, s.do())
		}
		if err != nil && work != nil && ctx.Err() == nil {
			// The lease ended the work: its loss is the cause, what it broke is not.
			if cause := context.Cause(work); cause != nil && !errors.Is(err, cause) {
				err = errors.Join(cause, err)
			}
		}
		err = errors.Join(err, r.leave(s.stage, err))
		if err != nil && r.committed {
			r.res.degrade(string(s.stage) + ": " + err.Error()) // the point stands
		} else if err != nil {
			return err
		}
	}
	return nil
}

func (r *run) enter(s Stage) error {
	r.o.Events.stage(StageEvent{Run: r.res.Run, VM: r.label(), Stage: s, Time: r.o.Clock.Now()})
	return r.book.stage(s, string(r.res.VM.ID), true)
}

func (r *run) leave(s Stage, err error) error {
	r.o.Events.stage(StageEvent{Run: r.res.Run, VM: r.label(), Stage: s, Done: true, Err: err, Time: r.o.Clock.Now()})
	if err != nil {
		return nil // a stage that failed was not left in order
	}
	return r.book.stage(s, string(r.res.VM.ID), false)
}

func (r *run) label() string {
	if r.res.VM.Name != "" {
		return r.res.VM.Name
	}
	return string(r.res.VM.ID)
}

func (r *run) makePlan(ctx context.Context) (err error) {
	if r.vm, err = r.hv.VM(ctx, r.res.VM.ID); err != nil {
		return err
	}
	r.res.VM = VMRef{ID: r.vm.ID, UUID: r.vm.UUID, Name: r.vm.Name}
	if r.vm.Incomplete {
		return &hypervisor.Error{Op: "backup", VM: r.vm.ID, Hint: "finish or remove it with: holdfast recover", Err: fmt.Errorf("VM %s is an unfinished restore: %w", r.vm.Name, hypervisor.ErrBusy)}
	}
	if r.plan, err = makePlan(ctx, r.hv, r.repo, r.vm, r.o); err != nil {
		return err
	}
	r.res.Chain = r.plan.Chain
	for _, n := range r.plan.Notes {
		r.o.Events.notice(r.vm.Name, n)
	}
	if r.o.FailUnprotected {
		for _, d := range r.plan.Unprotected() {
			return &hypervisor.Error{Op: "plan", VM: r.vm.ID, Disk: d.ID, Hint: "exclude the disk by name, or allow unprotected disks", Err: fmt.Errorf("disk cannot be protected: %s", d.Reason)}
		}
	}
	return nil
}

// preflight takes the lease, cleans up after dead runs on this VM, and proves
// that the repository can be written.
func (r *run) preflight(ctx context.Context) (context.Context, error) {
	holder := r.o.Holder
	if holder == "" {
		holder = lease.Holder(r.res.Run)
	}
	work, l, err := lease.Take(ctx, r.repo, leaseName(r.plan.Chain), lease.Options{
		Holder: holder, TTL: r.o.LeaseTTL, Takeover: r.o.Takeover, Clock: r.o.Clock,
	})
	if err != nil {
		var locked *repository.LockedError
		if errors.As(err, &locked) {
			return nil, &hypervisor.Error{Op: "backup", VM: r.vm.ID, Hint: "wait for it, or run holdfast recover if it is dead", Err: fmt.Errorf("another run works on %s: %w", r.vm.Name, errors.Join(hypervisor.ErrBusy, err))}
		}
		return nil, fmt.Errorf("lease on %s: %w", r.vm.Name, err)
	}
	r.lease = l
	// The plan was made without the lease: another run may have committed since.
	again, err := makePlan(work, r.hv, r.repo, r.vm, r.o)
	if err != nil {
		return nil, err
	}
	if again.Parent != r.plan.Parent || !maps.Equal(again.lies, r.plan.lies) {
		r.plan = again
	}
	r.plan.stale = again.stale // without the lease, a newer point could have been missed
	if err := r.releaseOrphans(work); err != nil {
		return nil, err
	}
	r.dropStaleNotes(work)
	return work, r.begin(work)
}

// snapKind is the kind in the owner name of a run's snapshot.
const snapKind = "snap"

func leaseName(chain string) string { return "vm-" + chain }

// begin opens the point that the run writes, and its parent.
func (r *run) begin(ctx context.Context) (err error) {
	if r.plan.Parent != "" {
		r.parent, err = r.repo.Open(ctx, r.plan.Parent)
		if err == nil {
			r.writer, err = r.repo.Begin(ctx, &repository.PointSpec{Chain: r.plan.Chain, Name: r.vm.Name, Run: r.res.Run, Parent: r.plan.Parent, Lock: r.lease.Lock})
		}
		if err == nil {
			r.res.Parent = r.plan.Parent
			return nil
		}
		if ctx.Err() != nil || !(errors.Is(err, repository.ErrDamaged) || errors.Is(err, repository.ErrNotFound)) {
			return fmt.Errorf("restore point %s as a base: %w", r.plan.Parent, err)
		}
		// The base cannot be used: what it would have given is read again.
		r.o.Events.notice(r.vm.Name, fmt.Sprintf("restore point %s cannot be used as a base: %v", r.plan.Parent, err))
		r.plan.broken = err
		r.plan.fill(r.vm, r.o)
	}
	r.writer, err = r.repo.Begin(ctx, &repository.PointSpec{Chain: r.plan.Chain, Name: r.vm.Name, Run: r.res.Run, Lock: r.lease.Lock})
	return err
}
