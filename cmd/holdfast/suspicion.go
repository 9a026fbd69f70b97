package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/repository"
)

// suspicionDoc says that a disk of a restore point was backed up while its change
// tracking lied.
type suspicionDoc struct {
	Point  string `json:"point"`
	Disk   string `json:"disk"`
	Exact  bool   `json:"exact"` // the disk was read in full by the same run
	Run    string `json:"run"`   // that found it
	Leaves int64  `json:"leaves"`
	Wrong  int64  `json:"wrong"`
}

// short is for a table.
func (s *suspicionDoc) short() string {
	if s.Exact {
		return fmt.Sprintf("%s: tracking lied, read in full: exact", s.Disk)
	}
	return fmt.Sprintf("SUSPECT: %s: tracking lied", s.Disk)
}

func (s *suspicionDoc) long() string {
	what := fmt.Sprintf("the change tracking of disk %s lied", s.Disk)
	how := fmt.Sprintf("%d of %d samples of what it called unchanged had changed", s.Wrong, s.Leaves)
	if s.Exact {
		return fmt.Sprintf("%s (%s); the backup found it and read the disk in full: the point is exact", what, how)
	}
	return fmt.Sprintf("%s, as run %s found later (%s): the point may hold wrong bytes of it", what, s.Run, how)
}

// suspicions returns what audits found about points, by point.
func (p *program) suspicions(ctx context.Context, repo repository.Repository, list []*repository.Point) (map[repository.PointID][]suspicionDoc, error) {
	found, damaged, err := backup.Suspicions(ctx, repo, list)
	if err != nil {
		return nil, err
	}
	if damaged != nil {
		p.note("part of what audits have found cannot be read: " + message(damaged))
	}
	out := map[repository.PointID][]suspicionDoc{}
	for id, all := range found {
		for _, s := range all {
			out[id] = append(out[id], suspicionDoc{
				Point: string(id), Disk: string(s.Disk), Exact: s.Exact, Run: s.Run, Leaves: s.Leaves, Wrong: s.Wrong,
			})
		}
	}
	return out, nil
}

// addSuspicions names the points of a check that were made under a lying change
// tracking. Damage that hides some of it is in the check's findings already.
func (p *program) addSuspicions(ctx context.Context, repo repository.Repository, d *verifyDoc) error {
	list, err := listPoints(ctx, repo, "")
	var found map[repository.PointID][]suspicionDoc
	if err == nil {
		found, err = p.suspicions(ctx, repo, list)
	}
	if err != nil {
		if ctx.Err() == nil && (errors.Is(err, repository.ErrDamaged) || d.Status == statusDamaged) {
			p.note("what audits have found cannot be told: " + message(err))
			return nil
		}
		return err
	}
	for _, pt := range list {
		if !slices.Contains(d.Points, string(pt.ID)) {
			continue
		}
		for _, s := range found[pt.ID] {
			d.LyingTracker = append(d.LyingTracker, s)
			if !s.Exact && d.Status == statusSound {
				d.Status = statusSuspect
			}
		}
	}
	return nil
}
