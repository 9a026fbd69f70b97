package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/internal/lease"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/retention"
)

type pruneFlags struct {
	repo   repositoryFlags
	policy retention.Policy
	vm     string
	dryRun bool
	full   bool
}

// pruneDoc is what a prune did or would do.
type pruneDoc struct {
	Status      string          `json:"status"`
	Repository  string          `json:"repository"`
	DryRun      bool            `json:"dry_run"`
	Kept        []keptPoint     `json:"kept"`
	Removed     []removedPoint  `json:"removed"` // with a dry run: that would be removed
	Maintenance *maintenanceDoc `json:"maintenance,omitempty"`
	Error       *problem        `json:"error,omitempty"`
}

type keptPoint struct {
	Point   string    `json:"point"`
	VM      string    `json:"vm"`
	Created time.Time `json:"created"`
	Reasons []string  `json:"reasons"`
}

type removedPoint struct {
	Point   string    `json:"point"`
	VM      string    `json:"vm"`
	Created time.Time `json:"created"`
}

type maintenanceDoc struct {
	Ran         bool     `json:"ran"`
	BlobsBefore int64    `json:"blobs_before"`
	BlobsAfter  int64    `json:"blobs_after"`
	BytesBefore int64    `json:"bytes_before"`
	BytesAfter  int64    `json:"bytes_after"`
	Notes       []string `json:"notes"`
}

func (p *program) pruneCommand() *cobra.Command {
	var f pruneFlags
	c := &cobra.Command{
		Use:   "prune --repo REPO --keep-daily N ...",
		Short: "Remove restore points that no rule keeps, and give back their space",
		Long: `Remove restore points that no rule keeps, and give back their space.

Each rule keeps the newest point of so many hours, days, weeks, months or years
that have one, for each virtual machine on its own. The newest point of a virtual
machine is always kept; damaged points and points from the future are not touched.
Space comes back when it is safe: data that a running backup may be about to use
stays for a day or so.`,
		Example: `  holdfast prune --repo ./store --keep-daily 7 --keep-weekly 4 --dry-run`,
		Args:    exactly(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := required(cmd, "repo", f.repo.location); err != nil {
				return err
			}
			if err := f.policy.Validate(); err != nil {
				return usage("give at least one of --keep-last, --keep-hourly, --keep-daily, --keep-weekly, --keep-monthly, --keep-yearly", err)
			}
			return p.prune(cmd.Context(), &f)
		},
	}
	f.repo.add(c, repoHelp)
	fs := c.Flags()
	fs.IntVar(&f.policy.Last, "keep-last", 0, "keep the newest `n` points")
	fs.IntVar(&f.policy.Hourly, "keep-hourly", 0, "keep the newest point of each of `n` hours")
	fs.IntVar(&f.policy.Daily, "keep-daily", 0, "keep the newest point of each of `n` days")
	fs.IntVar(&f.policy.Weekly, "keep-weekly", 0, "keep the newest point of each of `n` weeks")
	fs.IntVar(&f.policy.Monthly, "keep-monthly", 0, "keep the newest point of each of `n` months")
	fs.IntVar(&f.policy.Yearly, "keep-yearly", 0, "keep the newest point of each of `n` years")
	fs.StringVar(&f.vm, "vm", "", "only points of this `VM`, by name or UUID")
	fs.BoolVar(&f.dryRun, "dry-run", false, "show what would be removed, and remove nothing")
	fs.BoolVar(&f.full, "full", false, "run all of maintenance, even what is not due")
	return c
}

func (p *program) prune(ctx context.Context, f *pruneFlags) error {
	repo, err := f.repo.open(ctx, p, false)
	if err != nil {
		return err
	}
	defer p.closing(repo)
	d := pruneDoc{Status: statusSuccess, Repository: repo.Info().Location, DryRun: f.dryRun, Kept: []keptPoint{}, Removed: []removedPoint{}}
	if f.dryRun {
		_, err = p.choose(ctx, f, repo, &d)
	} else {
		err = p.pruneLocked(ctx, f, repo, &d)
	}
	if err != nil {
		d.Status, d.Error = statusFailed, explain(ctx, err)
		p.ended(d.Error.exit())
	}
	if p.json {
		p.emit(d)
	} else {
		p.showPrune(d)
	}
	if err != nil {
		p.complain(d.Error)
		return errReported
	}
	return nil
}

// choose decides about every point. It returns what is to be removed.
func (p *program) choose(ctx context.Context, f *pruneFlags, repo repository.Repository, d *pruneDoc) ([]*repository.Point, error) {
	list, err := listPoints(ctx, repo, f.vm)
	if err != nil {
		return nil, err
	}
	if f.vm != "" && len(list) == 0 {
		return nil, noPointsOf(f.vm)
	}
	decisions, err := retention.Plan(list, f.policy, p.clock.Now())
	if err != nil {
		return nil, err
	}
	var remove []*repository.Point
	for _, x := range decisions {
		if x.Keep {
			d.Kept = append(d.Kept, keptPoint{Point: string(x.Point.ID), VM: x.Point.Name, Created: x.Point.Created.UTC(), Reasons: texts(x.Reasons)})
			continue
		}
		remove = append(remove, x.Point)
		if f.dryRun {
			d.Removed = append(d.Removed, removed(x.Point))
		}
	}
	return remove, nil
}

func removed(pt *repository.Point) removedPoint {
	return removedPoint{Point: string(pt.ID), VM: pt.Name, Created: pt.Created.UTC()}
}

// pruneLocked removes points and maintains the repository under its lock.
func (p *program) pruneLocked(ctx context.Context, f *pruneFlags, repo repository.Repository, d *pruneDoc) (err error) {
	work, l, err := lease.Take(ctx, repo, repository.LockMaintenance, lease.Options{
		Holder: lease.Holder("prune"), Takeover: lease.Dead, Clock: p.clock,
	})
	if err != nil {
		return fmt.Errorf("maintenance of the repository: %w", err)
	}
	defer func() {
		rctx, cancel := clock.WithTimeout(context.WithoutCancel(ctx), p.clock, time.Minute)
		defer cancel()
		err = errors.Join(err, l.Release(rctx))
	}()
	remove, err := p.choose(work, f, repo, d)
	if err != nil {
		return err
	}
	for _, pt := range remove {
		if err := repo.Delete(work, pt.ID, l.Lock); err != nil {
			return fmt.Errorf("remove restore point %s: %w", pt.ID, err)
		}
		d.Removed = append(d.Removed, removed(pt))
	}
	rep, err := repo.Maintain(work, l.Lock, &repository.MaintainOptions{Full: f.full})
	if err != nil {
		return err
	}
	d.Maintenance = &maintenanceDoc{
		Ran: rep.Ran, BlobsBefore: rep.BlobsBefore, BlobsAfter: rep.BlobsAfter,
		BytesBefore: rep.BytesBefore, BytesAfter: rep.BytesAfter, Notes: append([]string{}, rep.Notes...),
	}
	return nil
}

func (p *program) showPrune(d pruneDoc) {
	t := &table{}
	const stamp = "2006-01-02 15:04:05 MST"
	verb := "removed"
	if d.DryRun {
		verb = "would remove"
	}
	for _, k := range d.Kept {
		t.add("keep", k.Point, k.VM, k.Created.Format(stamp), strings.Join(k.Reasons, ", "))
	}
	for _, r := range d.Removed {
		t.add(verb, r.Point, r.VM, r.Created.Format(stamp))
	}
	t.print(p.say)
	p.say("%s kept, %s %s", plural(len(d.Kept), "restore point", "restore points"), verb, plural(len(d.Removed), "restore point", "restore points"))
	if m := d.Maintenance; m != nil {
		if !m.Ran {
			p.say("maintenance was not due: space comes back later, or with --full")
		} else {
			p.say("maintenance: %s before, %s after", bytesText(m.BytesBefore), bytesText(m.BytesAfter))
		}
		for _, n := range m.Notes {
			p.say("  %s", n)
		}
	}
}
