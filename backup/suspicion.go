package backup

import (
	"context"
	"slices"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/manifest"
	"github.com/holdfast-backup/holdfast/repository"
)

// Suspicion says that a disk of a restore point was backed up while its change
// tracking lied.
type Suspicion struct {
	Point repository.PointID
	Disk  hypervisor.DiskID
	// Exact: the lie was found by the run that made the point, which then read the
	// disk in full: the point holds the right bytes. Otherwise it may not.
	Exact bool
	// Run found it, by Wrong wrong leaves of Leaves.
	Run           string
	Leaves, Wrong int64
}

// Suspicions returns what audits found about points, which are those of repo or
// some of them, by point. The second result says what of it cannot be read,
// although the rest can; nil if there is nothing.
func Suspicions(ctx context.Context, repo repository.Repository, points []*repository.Point) (map[repository.PointID][]Suspicion, error, error) {
	out := map[repository.PointID][]Suspicion{}
	listed := map[repository.PointID]bool{}
	for _, p := range points {
		listed[p.ID] = true
	}
	add := func(s Suspicion) {
		// A note and a document tell of the same finding.
		same := func(x Suspicion) bool { return x.Disk == s.Disk && x.Run == s.Run && x.Exact == s.Exact }
		if listed[s.Point] && !slices.ContainsFunc(out[s.Point], same) {
			out[s.Point] = append(out[s.Point], s)
		}
	}
	notes, damaged, err := auditNotes(ctx, repo)
	if err != nil {
		return nil, nil, err
	}
	for _, n := range notes {
		for _, id := range n.Suspects {
			add(Suspicion{Point: id, Disk: n.Disk, Run: n.Run, Leaves: n.Leaves, Wrong: n.Wrong})
		}
	}
	for _, p := range points {
		m, err := manifest.Parse(p)
		if err != nil {
			continue // it is listed with what its record says
		}
		for i := range m.Disks {
			d := &m.Disks[i]
			if !d.Audit.Lied() {
				continue
			}
			s := Suspicion{Disk: d.ID, Run: p.Run, Leaves: d.Audit.Leaves, Wrong: d.Audit.Wrong}
			for _, id := range d.Audit.Suspects {
				s.Point = id
				add(s)
			}
			s.Point, s.Exact = p.ID, true
			add(s)
		}
	}
	return out, damaged, nil
}
