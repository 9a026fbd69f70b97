package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

// lieNights is how many audited backups the demo makes before it gives up: each
// finds the lie with a probability of more than 99 %.
const lieNights = 5

// hideChanges makes the hypervisor hide every change of the data disk from now
// on, or be honest again. What it has hidden stays hidden.
func (s *demoSite) hideChanges(hide bool) error {
	share := 0.0
	if hide {
		share = 1
	}
	return s.world.SetLying(s.vm, demoData, share)
}

// rewrite is a guest that replaces a third of its data disk.
func (s *demoSite) rewrite() (int64, error) {
	p := make([]byte, 32<<20)
	s.noise(p)
	return int64(len(p)), s.world.GuestWrite(s.vm, demoData, 16<<20, p)
}

// runLie tells the story of a change tracking that lies: what it does to a backup
// that trusts it, how the audit finds it, and what becomes of the points.
func (d *demo) runLie(ctx context.Context, f *demoFlags) error {
	d.p.say("Holdfast demo: the hypervisor's change tracking lies about one disk.\n")
	if err := d.build(ctx, f.seed); err != nil {
		return err
	}
	full, err := d.backup(ctx, demoBackup{name: "full backup"})
	if err != nil {
		return err
	}
	trusting, err := d.trustLiar(ctx)
	if err != nil {
		return err
	}
	caught, missed, err := d.catchLiar(ctx, f)
	if err != nil {
		return err
	}
	again, err := d.afterLie(ctx)
	if err != nil {
		return err
	}
	if err := d.restoreFiles(ctx, again); err != nil {
		return err
	}
	return d.named(ctx, full.Point(), caught.Point(), append(missed, trusting.Point()))
}

// trustLiar backs up without an audit: a success by its own account, and wrong.
func (d *demo) trustLiar(ctx context.Context) (*backup.Result, error) {
	begin := d.p.clock.Now()
	if err := d.site.hideChanges(true); err != nil {
		return nil, err
	}
	n, err := d.site.rewrite()
	if err != nil {
		return nil, err
	}
	d.step(demoStep{
		Step: "the lie", Detail: fmt.Sprintf("the guest rewrites %s of disk %s, and the hypervisor calls all of it unchanged", bytesText(n), demoData), DurationMS: d.since(begin),
	})
	res, err := d.backup(ctx, demoBackup{
		name: "without audit", modes: expectModes{demoData: backup.Incremental}, audit: backup.AuditRate{Off: true},
	})
	if err != nil {
		return nil, err
	}
	begin = d.p.clock.Now()
	wrong := d.sameAsTruth(ctx, res.Point())
	var differs *wrongDisk
	if !errors.As(wrong, &differs) {
		return nil, fmt.Errorf("the point of a backup that trusted a lie should be wrong: %w", errors.Join(wrong, errNoLie))
	}
	d.step(demoStep{
		Step: "what that did", Detail: fmt.Sprintf("status %s, exit code 0, and point %s is wrong: disk %s, %s", res.Status(), res.Point(), differs.disk, differs.err), DurationMS: d.since(begin),
	})
	d.proved("without an audit the lie stays unseen: point %s says success and is wrong", res.Point())
	return res, nil
}

var errNoLie = errors.New("it is not")

// catchLiar backs up with the default audit until the lie is found. missed are
// points of backups whose sample missed it.
func (d *demo) catchLiar(ctx context.Context, f *demoFlags) (caught *backup.Result, missed []repository.PointID, err error) {
	for night := range uint64(lieNights) {
		res, err := d.backup(ctx, demoBackup{name: "with audit", seed: f.seed + night + 1, mayLie: true})
		if err != nil {
			return nil, nil, err
		}
		var disk *backup.DiskResult
		for i := range res.Disks {
			if res.Disks[i].Audit.Lied() {
				disk = &res.Disks[i]
			}
		}
		if disk == nil {
			missed = append(missed, res.Point())
			continue
		}
		if disk.ID != demoData || disk.Mode != backup.Full || disk.Reason != backup.ReasonAuditMismatch || res.Status() != backup.Degraded {
			return nil, nil, fmt.Errorf("the audit should have made disk %s full (%s): %s (%s), status %s", demoData, backup.ReasonAuditMismatch, disk.Mode, disk.Reason, res.Status())
		}
		begin := d.p.clock.Now()
		if err := d.sameAsTruth(ctx, res.Point()); err != nil {
			return nil, nil, fmt.Errorf("the point of the backup that found the lie: %w", err)
		}
		d.step(demoStep{
			Step: "caught", Detail: fmt.Sprintf("status %s, exit code %d: %d of %d random samples of what it called unchanged had changed; disk %s was read in full at once, and point %s is identical with the truth",
				res.Status(), exitDegraded, disk.Audit.Wrong, disk.Audit.Leaves, disk.ID, res.Point()), DurationMS: d.since(begin),
		})
		d.proved("the audit found the lie: %d of %d samples of what was called unchanged had changed; point %s is exact all the same", disk.Audit.Wrong, disk.Audit.Leaves, res.Point())
		return res, missed, nil
	}
	return nil, nil, fmt.Errorf("%d audits did not find the lie", lieNights)
}

// afterLie backs up twice after the hypervisor was mended: in full, and then
// incrementally again. It returns the newest point.
func (d *demo) afterLie(ctx context.Context) (repository.PointID, error) {
	if err := d.site.hideChanges(false); err != nil {
		return "", err
	}
	next, err := d.backup(ctx, demoBackup{name: "the next one", modes: expectModes{demoSystem: backup.Incremental, demoData: backup.Full}})
	if err != nil {
		return "", err
	}
	for _, x := range next.Disks {
		if x.ID == demoData && x.Reason != backup.ReasonAuditMismatch {
			return "", fmt.Errorf("the next backup of disk %s is a full for another reason: %s", x.ID, x.Reason)
		}
	}
	d.proved("nothing stands on a tracking that lied: the next backup read disk %s in full (%s)", demoData, backup.ReasonAuditMismatch)
	if err := d.change(); err != nil {
		return "", err
	}
	last, err := d.backup(ctx, demoBackup{name: "mended", modes: expectModes{demoSystem: backup.Incremental, demoData: backup.Incremental}})
	if err != nil {
		return "", err
	}
	return last.Point(), nil
}

// named checks that points and verify name the points made under the lie, and no
// others.
func (d *demo) named(ctx context.Context, sound, exact repository.PointID, suspect []repository.PointID) error {
	list, err := listPoints(ctx, d.repo, "")
	if err != nil {
		return err
	}
	found, err := d.p.suspicions(ctx, d.repo, list)
	if err != nil {
		return err
	}
	if len(found) != len(suspect)+1 || len(found[sound]) != 0 {
		return fmt.Errorf("%d points are named, and %d were made under the lie", len(found), len(suspect)+1)
	}
	for _, id := range append(suspect, exact) {
		if len(found[id]) != 1 || found[id][0].Exact != (id == exact) || found[id][0].Disk != string(demoData) {
			return fmt.Errorf("point %s was made under the lie, and that is not what is said of it", id)
		}
	}
	if err := d.verify(ctx, statusSuspect); err != nil {
		return err
	}
	for _, pt := range list {
		for i := range found[pt.ID] {
			d.step(demoStep{Step: "named", Detail: fmt.Sprintf("point %s: %s", pt.ID, found[pt.ID][i].long())})
		}
	}
	d.proved("holdfast points and holdfast verify name the points made under the lie: %s may be wrong, %s is exact", strings.Join(texts(suspect), ", "), exact)
	return nil
}

// wrongDisk says that a point is not what its disk was.
type wrongDisk struct {
	disk hypervisor.DiskID
	err  error
}

func (e *wrongDisk) Error() string { return fmt.Sprintf("disk %s: %v", e.disk, e.err) }
func (e *wrongDisk) Unwrap() error { return e.err }

// sameAsTruth compares all disks of a point with what they held at its snapshot.
func (d *demo) sameAsTruth(ctx context.Context, point repository.PointID) (err error) {
	r, err := d.repo.Open(ctx, point)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	for _, id := range demoDisks() {
		x, err := r.Disk(ctx, string(id))
		if err != nil {
			return err
		}
		_, err = compare(x, x.Size(), d.truth[point][id])
		if cerr := x.Close(); cerr != nil {
			return cerr
		}
		if err != nil {
			return &wrongDisk{disk: id, err: err}
		}
	}
	return nil
}

// lieSummary says what came out of it.
func (d *demo) lieSummary(f *demoFlags) {
	p := d.p
	p.say("\nProven:")
	for _, s := range d.doc.Proven {
		p.say("  * %s", s)
	}
	if f.keep {
		p.say("\nThe repository and the restored files are in %s", d.doc.Dir)
	}
	p.say("\nEach incremental audits at most 115 MiB and 5 %% of each disk, see --audit of: holdfast backup --help")
}
