package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/repository"
)

// verifyDoc is the outcome of a check.
type verifyDoc struct {
	Status        string      `json:"status"` // sound, suspect or damaged
	Repository    string      `json:"repository"`
	Level         string      `json:"level"`
	Points        []string    `json:"points"`
	DamagedPoints []string    `json:"damaged_points"`
	Blobs         int64       `json:"blobs"`
	Bytes         int64       `json:"bytes"`
	Damages       []damageDoc `json:"damages"`
	DurationMS    float64     `json:"duration_ms"`
	// LyingTracker names the points that were made under a change tracking that
	// was caught lying.
	LyingTracker []suspicionDoc `json:"lying_tracker,omitempty"`
}

type damageDoc struct {
	Object     string   `json:"object"`
	Problem    string   `json:"problem"`
	Detail     string   `json:"detail"`
	Points     []string `json:"points"`
	Repairable bool     `json:"repairable"`
}

// Values of verifyDoc.Status.
const (
	statusSound   = "sound"
	statusSuspect = "suspect" // what is stored is sound, and points may have been wrong from the start
	statusDamaged = "damaged"
)

var levels = map[string]repository.VerifyLevel{
	"records": repository.VerifyRecords, "blobs": repository.VerifyBlobs, "data": repository.VerifyData,
}

func (p *program) verifyCommand() *cobra.Command {
	var repo repositoryFlags
	var point pointFlags
	var level string
	c := &cobra.Command{
		Use:   "verify --repo REPO [--point ID]",
		Short: "Check what is stored, and name the restore points that damage affects",
		Long: `Check what is stored, and name the restore points that damage affects.

Levels, each with the ones before it: records looks at records, chains and the
presence of every stored object; blobs reads every stored object once and finds
any changed bit; data also decodes every block of every disk and compares it with
the digest that was computed when it left the hypervisor. The default is blobs
for a whole repository and data for one point.

Points that were made while the change tracking of the hypervisor lied are named
too: they are stored soundly, but may not hold what the disk held.

The exit code is 1 when there is damage, and 3 when there is none and a point may
be wrong because the change tracking lied.`,
		Args: exactly(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := required(cmd, "repo", repo.location); err != nil {
				return err
			}
			if level == "" {
				level = "blobs"
				if point.point != "" {
					level = "data"
				}
			}
			if _, ok := levels[level]; !ok {
				return usage("", fmt.Errorf("--level %q is neither records, blobs nor data", level))
			}
			return p.verify(cmd.Context(), &repo, &point, level)
		},
	}
	repo.add(c, repoHelp)
	point.add(c)
	c.Flags().StringVar(&level, "level", "", "`how` deep to look: records, blobs or data")
	return c
}

func (p *program) verify(ctx context.Context, rf *repositoryFlags, point *pointFlags, level string) error {
	repo, err := rf.open(ctx, p, false)
	if err != nil {
		return err
	}
	defer p.closing(repo)
	var points []repository.PointID
	if point.point != "" {
		pt, err := point.find(ctx, repo)
		if err != nil {
			return err
		}
		points = append(points, pt.ID)
	}
	d, err := p.check(ctx, repo, points, level, p.watcher())
	if err != nil {
		return err
	}
	if d.Status == statusSuspect {
		p.ended(exitDegraded)
	}
	p.showVerify(d)
	return nil
}

// check verifies a repository with progress. Damage makes the command exit with 1.
func (p *program) check(ctx context.Context, repo repository.Repository, points []repository.PointID, level string, w watcher) (*verifyDoc, error) {
	defer w.end()
	start := p.clock.Now()
	rep, err := repo.Verify(ctx, &repository.VerifyOptions{Points: points, Level: levels[level], Progress: func(done, total int64) {
		w.watch(event{Event: eventProgress, Time: p.now(), VM: "verify", Disk: "repository", Done: &done, Size: &total})
	}})
	if err != nil {
		return nil, err
	}
	d := describeVerify(rep, repo.Info().Location, level)
	if err := p.addSuspicions(ctx, repo, d); err != nil {
		return nil, err
	}
	d.DurationMS = ms(p.clock.Now().Sub(start))
	if !rep.OK() {
		p.ended(exitFailed)
	}
	return d, nil
}

func texts[T ~string](list []T) []string {
	out := make([]string, 0, len(list))
	for _, x := range list {
		out = append(out, string(x))
	}
	return out
}

func (p *program) showVerify(d *verifyDoc) {
	if p.json {
		p.emit(d)
		return
	}
	what := fmt.Sprintf("%s, %s, %s read in %s (level %s)", plural(len(d.Points), "restore point", "restore points"),
		plural(int(d.Blobs), "stored object", "stored objects"), bytesText(d.Bytes), durationText(msDuration(d.DurationMS)), d.Level)
	switch d.Status {
	case statusSound:
		p.say("sound: %s", what)
	case statusSuspect:
		p.say("SUSPECT: everything is stored soundly, but change tracking lied: %s", what)
	default:
		p.say("DAMAGED: %s", what)
	}
	for _, s := range d.LyingTracker {
		p.say("  restore point %s: %s", s.Point, s.long())
	}
	if d.Status != statusDamaged {
		return
	}
	for _, x := range d.Damages {
		line := fmt.Sprintf("  %s: %s", x.Object, x.Problem)
		if x.Detail != "" {
			line += ": " + x.Detail
		}
		switch {
		case x.Repairable:
			line += " (a copy exists: holdfast repair)"
		case len(x.Points) == 0:
			line += " (no restore point needs it)"
		}
		p.say("%s", line)
	}
	for _, id := range d.DamagedPoints {
		p.say("  restore point %s cannot be restored in full", id)
	}
	if len(d.DamagedPoints) == 0 {
		p.say("  every restore point that was checked can still be restored")
	}
}

// describeVerify is a report as people and programs get it.
func describeVerify(rep *repository.VerifyReport, location, level string) *verifyDoc {
	d := &verifyDoc{
		Status: statusSound, Repository: location, Level: level, Points: texts(rep.Points),
		DamagedPoints: texts(rep.Damaged()), Blobs: rep.Blobs, Bytes: rep.Bytes, Damages: []damageDoc{},
	}
	for _, x := range rep.Damages {
		d.Damages = append(d.Damages, damageDoc{Object: x.Object, Problem: x.Problem, Detail: x.Detail, Points: texts(x.Points), Repairable: x.Repairable})
	}
	if !rep.OK() {
		d.Status = statusDamaged
	}
	return d
}
