package campaign_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/journal/journaltest"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/restore"
)

// story is something that people do, in which everything that can fail does.
type story struct {
	name string
	o    fakes.Options
	vm   fakes.VMConfig
	// before is what has happened; nothing fails in it. nil: one full backup.
	before func(e *env)
	// act is what is tried.
	act func(ctx context.Context, p *process) error
	// refused: act fails with this, when nothing else does.
	refused error
	// orphans: baselines are left that the next backup forgets, and recover does not
	// know of: there is no obligation about a point that somebody deletes.
	orphans bool
	// degraded: backups of this VM are, and say so.
	degraded bool
	// after prepares the clean backup that follows; nil: changes on each VM.
	after func(e *env)
}

func (s *story) begin(e *env) {
	e.addVM(s.vm)
	if s.before != nil {
		s.before(e)
		return
	}
	e.mustBackup(nil)
	e.scribble(e.vms[0])
}

// mustBackup backs every VM up.
func (e *env) mustBackup(change func(*backup.Options)) {
	p := e.plain()
	for _, vm := range e.vms {
		_, err := p.backup(context.Background(), vm, change)
		must(err)
	}
}

// one backs up the first VM.
func one(change func(*backup.Options)) func(context.Context, *process) error {
	return func(ctx context.Context, p *process) error {
		_, err := p.backup(ctx, p.e.vms[0], change)
		return err
	}
}

// changed is a full backup, and then something that an administrator does.
func changed(do func(w *fakes.World, vm hypervisor.VMID) error) func(*env) {
	return func(e *env) {
		e.mustBackup(nil)
		e.scribble(e.vms[0])
		must(do(e.world, e.vms[0]))
	}
}

// killed is a backup that ended with its process at the first call of an operation.
// between happens after the backup before it.
func killed(op fakes.Op, m mode, between ...func()) func(*env) {
	return func(e *env) {
		vm := e.vms[0]
		e.mustBackup(nil)
		e.scribble(vm)
		for _, do := range between {
			do()
		}
		e.dying(target{site{seamHypervisor, string(op), "*"}, 1}, m, one(nil))
	}
}

// dying does something in a process that dies at a call.
func (e *env) dying(x target, m mode, act func(context.Context, *process) error) {
	in := &injector{mode: m, cancel: func() {}, target: x}
	p, err := e.start(context.Background(), in)
	must(err)
	if err = act(context.Background(), p); !in.wasKilled() {
		panic(fmt.Sprintf("campaign: the call at which the process should die is never made: %s: %v: %v", x, err, in.trace))
	}
}

func agent(g fakes.Guest) fakes.VMConfig {
	g.Agent, g.Family = true, "linux"
	return fakes.VMConfig{Guest: g}
}

func disks(d ...fakes.DiskConfig) fakes.VMConfig {
	return fakes.VMConfig{Disks: append([]fakes.DiskConfig{{ID: "vda", Size: sizeA}}, d...)}
}

func newest(p *process) repository.PointID { return p.e.points[len(p.e.points)-1] }

// prune deletes points and maintains the repository.
func prune(ctx context.Context, p *process, ids []repository.PointID) (err error) {
	lock, err := p.repo.Lock(ctx, repository.LockMaintenance, repository.LockOptions{Holder: p.holder, Takeover: p.takeover})
	if err != nil {
		return err
	}
	defer func() {
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
		defer cancel()
		err = errors.Join(err, lock.Release(rctx))
	}()
	for _, id := range ids {
		p.e.mu.Lock()
		p.e.doomed[id] = true
		p.e.mu.Unlock()
		if err := p.repo.Delete(ctx, id, lock); err != nil {
			return err
		}
	}
	_, err = p.repo.Maintain(ctx, lock, &repository.MaintainOptions{Full: true})
	return err
}

func verify(ctx context.Context, p *process, o *repository.VerifyOptions) error {
	rep, err := p.repo.Verify(ctx, o)
	if err != nil {
		return err
	}
	if len(rep.Damages) > 0 {
		return violation("I5: a sound repository is called damaged: %v", rep.Damages)
	}
	return nil
}

// recovers recovers, and believes it.
func recovers(ctx context.Context, p *process) error {
	err := p.recover(ctx)
	if err != nil || p.in.wasKilled() || p.in.mode == stale {
		return err // what a list hides, nobody can know
	}
	for _, l := range p.e.world.Leftovers() {
		if !l.Baseline {
			return violation("I5: recover says that all is closed, and %s is there", l.ID)
		}
	}
	return nil
}

func twoVMs(e *env) { e.addVM(fakes.VMConfig{}) }

func threePoints(e *env) {
	for range 3 {
		e.mustBackup(nil)
		e.scribble(e.vms[0])
	}
}

func auditAll(o *backup.Options) { o.Audit, o.AuditSeed = backup.AuditRate{Share: 1}, 1 }

var stories = []story{
	{name: "full", before: func(*env) {}, act: one(nil)},
	{name: "incremental", act: one(nil)},
	{name: "incremental, third", before: func(e *env) {
		e.mustBackup(nil)
		e.scribble(e.vms[0])
		e.mustBackup(nil)
		e.scribble(e.vms[0])
	}, act: one(nil)},
	{name: "full by wish", act: one(func(o *backup.Options) { o.Full = true })},
	{name: "disk added", before: changed(func(w *fakes.World, vm hypervisor.VMID) error {
		_, err := w.AddDisk(vm, fakes.DiskConfig{ID: "vdc", Size: sizeB})
		return err
	}), act: one(nil)},
	{name: "disk removed", before: changed(func(w *fakes.World, vm hypervisor.VMID) error { return w.RemoveDisk(vm, "vdb") }), act: one(nil)},
	{name: "disk grown", before: changed(func(w *fakes.World, vm hypervisor.VMID) error { return w.ResizeDisk(vm, "vda", 2*sizeA) }), act: one(nil)},
	{name: "disk replaced", before: changed(func(w *fakes.World, vm hypervisor.VMID) error { return w.ReplaceDisk(vm, "vdb", sizeB+512) }), act: one(nil)},
	{name: "baseline lost", before: changed(func(w *fakes.World, vm hypervisor.VMID) error { return w.Redefine(vm) }), act: one(nil)},
	{name: "tracking lost", before: changed(func(w *fakes.World, vm hypervisor.VMID) error { return w.LoseTracking(vm, "vda", "") }), act: one(nil)},
	{name: "renamed", before: changed(func(w *fakes.World, vm hypervisor.VMID) error { return w.RenameVM(vm, "other") }), act: one(nil)},
	{name: "untracked disk", vm: disks(fakes.DiskConfig{ID: "raw", Size: sizeB, Untracked: true}), act: one(nil)},
	{name: "no tracking", o: fakes.Options{NoTracking: true}, act: one(nil)},
	{name: "no baselines", o: fakes.Options{NoBaselines: true}, act: one(nil)},
	{name: "streams", o: fakes.Options{Sequential: true}, act: one(nil)},
	{name: "one snapshot", o: fakes.Options{OneSnapshot: true}, vm: agent(fakes.Guest{}), act: one(nil)},
	{name: "disks one after another", o: fakes.Options{NonAtomicDisks: true}, vm: agent(fakes.Guest{}), act: one(nil)},
	{name: "quiesced", vm: agent(fakes.Guest{Level: hypervisor.ApplicationConsistent}), act: one(nil)},
	{name: "freeze fails", vm: agent(fakes.Guest{Freeze: fakes.FreezeFails}), act: one(nil)},
	{name: "freeze hangs", vm: agent(fakes.Guest{Freeze: fakes.FreezeHangs}), act: one(nil)},
	{name: "thaw fails twice", vm: agent(fakes.Guest{ThawFails: 2}), act: one(nil)},
	{name: "quiesce or nothing", vm: agent(fakes.Guest{Freeze: fakes.FreezeFails}), before: func(*env) {}, act: one(func(o *backup.Options) {
		o.Quiesce, o.MinConsistency = backup.QuiesceFilesystem, hypervisor.FilesystemConsistent
	}), refused: hypervisor.ErrQuiesce},
	{name: "off", vm: fakes.VMConfig{Power: hypervisor.PoweredOff}, act: one(nil)},
	{name: "firmware variables", vm: fakes.VMConfig{NVRAM: []byte("efi variables")}, act: one(nil)},
	{name: "several VMs", before: func(e *env) {
		twoVMs(e)
		e.mustBackup(nil)
		e.scribble(e.vms[0])
		e.scribble(e.vms[1])
	}, act: func(ctx context.Context, p *process) error {
		_, first := p.backup(ctx, p.e.vms[0], nil)
		_, second := p.backup(ctx, p.e.vms[1], nil)
		return errors.Join(first, second)
	}},
	{name: "disk excluded", vm: disks(fakes.DiskConfig{ID: "tmp", Size: sizeB}), act: one(func(o *backup.Options) {
		o.ExcludeDisks = []hypervisor.DiskID{"tmp"}
	})},
	{name: "passthrough disk", vm: disks(fakes.DiskConfig{ID: "lun", Size: sizeB, Backing: hypervisor.Passthrough}), act: one(nil), degraded: true},
	{name: "audit", act: one(auditAll)},
	{name: "audit of a liar", before: func(e *env) {
		e.mustBackup(nil)
		must(e.world.SetLying(e.vms[0], "vda", 1))
		for range 3 {
			e.scribble(e.vms[0])
		}
	}, act: func(ctx context.Context, p *process) error {
		res, err := p.backup(ctx, p.e.vms[0], auditAll)
		for _, d := range res.Disks {
			// A lie and a fault that hides it are two things at once: the run must say so.
			if d.Audit.Err != nil && res.Point() != "" {
				if len(res.Degraded) == 0 {
					return violation("I5: an audit that was not finished: %w", d.Audit.Err)
				}
				p.e.truth[res.Point()][d.ID] = nil
			}
		}
		return err
	}, degraded: true, after: func(e *env) {
		must(e.world.SetLying(e.vms[0], "vda", 0))
		must(e.world.LoseTracking(e.vms[0], "vda", ""))
	}},
	{name: "restore", act: func(ctx context.Context, p *process) error {
		return p.toVM(ctx, newest(p), &restore.VMOptions{Name: "copy"})
	}},
	{name: "restore of an older point", vm: fakes.VMConfig{NVRAM: []byte("efi")}, before: threePoints, act: func(ctx context.Context, p *process) error {
		return p.toVM(ctx, p.e.points[0], &restore.VMOptions{Name: "copy", PowerOn: true})
	}},
	{name: "restore of one disk", act: func(ctx context.Context, p *process) error {
		return p.toVM(ctx, newest(p), &restore.VMOptions{Name: "copy"}, "vdb")
	}},
	{name: "restore, name taken", act: func(ctx context.Context, p *process) error {
		return p.toVM(ctx, newest(p), nil)
	}, refused: hypervisor.ErrExists},
	{name: "restore, random writes", o: fakes.Options{RandomWrite: true}, act: func(ctx context.Context, p *process) error {
		return p.toVM(ctx, newest(p), &restore.VMOptions{Name: "copy"})
	}},
	{name: "restore to raw files", vm: fakes.VMConfig{NVRAM: []byte("efi")}, act: func(ctx context.Context, p *process) error {
		return p.toFiles(ctx, newest(p), restore.Raw)
	}},
	{name: "restore to qcow2 files", act: func(ctx context.Context, p *process) error {
		return p.toFiles(ctx, newest(p), restore.QCOW2)
	}},
	{name: "prune", before: threePoints, act: func(ctx context.Context, p *process) error { return prune(ctx, p, p.e.points[:2]) }},
	{name: "prune of the newest", before: threePoints, act: func(ctx context.Context, p *process) error { return prune(ctx, p, p.e.points[2:]) }, orphans: true},
	{name: "maintenance", act: func(ctx context.Context, p *process) error { return prune(ctx, p, nil) }},
	{name: "verify", before: threePoints, act: func(ctx context.Context, p *process) error { return verify(ctx, p, nil) }},
	{name: "verify of all data", act: func(ctx context.Context, p *process) error {
		return verify(ctx, p, &repository.VerifyOptions{Level: repository.VerifyData})
	}},
	{name: "recover, snapshot left", before: killed(fakes.OpOpenDisk, killAfter), act: recovers},
	{name: "recover, frozen", vm: agent(fakes.Guest{}), before: func(e *env) {
		g := fakes.Guest{Agent: true, Family: "linux"}
		bad := g
		bad.ThawFails = -1
		killed(fakes.OpThaw, killBefore, func() { must(e.world.SetGuest(e.vms[0], bad)) })(e)
		must(e.world.SetGuest(e.vms[0], g))
	}, act: recovers},
	{name: "recover, baselines", before: killed(fakes.OpForgetBaseline, killBefore), act: recovers},
	{name: "recover on another host", before: func(e *env) {
		killed(fakes.OpOpenDisk, killAfter)(e)
		e.disk = newDisk()
	}, act: recovers},
	{name: "recover, torn journal", before: func(e *env) {
		e.mustBackup(nil)
		e.scribble(e.vms[0])
		e.dying(target{site{seamJournal, string(journaltest.OpWrite), "journal"}, 4}, torn, one(nil))
	}, act: recovers},
	{name: "recover, unfinished VM", before: func(e *env) {
		e.mustBackup(nil)
		e.dying(target{site{seamHypervisor, string(fakes.OpFinishVM), "*"}, 1}, killBefore, func(ctx context.Context, p *process) error {
			return p.toVM(ctx, newest(p), &restore.VMOptions{Name: "copy"})
		})
	}, act: recovers},
	{name: "backup after a kill", before: killed(fakes.OpOpenDisk, killAfter), act: one(nil)},
	{name: "backup by another host after a kill", before: func(e *env) {
		killed(fakes.OpRelease, killBefore)(e)
		e.disk = newDisk()
	}, act: one(nil)},
	{name: "release of baselines", act: func(ctx context.Context, p *process) error {
		_, err := backup.ReleaseBaselines(ctx, p.hv, p.e.vms[0], p.repo.Info().Repo8())
		return err
	}},
	{name: "plan", act: func(ctx context.Context, p *process) error {
		_, err := backup.MakePlan(ctx, p.hv, p.repo, p.e.vms[0], nil)
		return err
	}},
	{name: "list", before: threePoints, act: func(ctx context.Context, p *process) error {
		var points []*repository.Point
		for pt, err := range p.repo.Points(ctx, repository.Query{}) {
			if err != nil {
				return err
			}
			if pt.State != repository.Committed {
				return violation("I1: point %s is %s", pt.ID, pt.State)
			}
			points = append(points, pt)
		}
		_, damaged, err := backup.Suspicions(ctx, p.repo, points)
		return errors.Join(damaged, err)
	}},
}
