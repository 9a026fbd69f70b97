package backup

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/manifest"
	"github.com/holdfast-backup/holdfast/repository"
)

// auditPrefix begins the names of the notes that say what audits found:
// audit/POINT/DISK, POINT being the parent that was compared with, DISK a digest
// of the disk's ID.
const auditPrefix = "audit/"

// auditNote is durable before anything is done about a wrong leaf, so that a run
// that dies afterwards is not followed by an incremental on the same baseline,
// and outlives the points in whose documents the same is written.
type auditNote struct {
	Version  int                  `json:"version"`
	Chain    string               `json:"chain"`
	Parent   repository.PointID   `json:"parent"`
	Sequence int64                `json:"sequence"` // of parent
	Disk     hypervisor.DiskID    `json:"disk"`
	Run      string               `json:"run"` // that found it
	Time     time.Time            `json:"time"`
	Seed     uint64               `json:"seed,string"`
	Leaves   int64                `json:"leaves"`
	Wrong    int64                `json:"wrong"`
	Offsets  []int64              `json:"offsets"`
	Suspects []repository.PointID `json:"suspects,omitempty"`
}

const auditNoteVersion = 1

func (n *auditNote) name() string {
	sum := sha256.Sum256([]byte(n.Disk))
	return auditPrefix + string(n.Parent) + "/" + hex.EncodeToString(sum[:8])
}

// auditNotes reads what audits found. Notes that are damaged are not an error but
// come as damaged: everything else can still be told.
func auditNotes(ctx context.Context, repo repository.Repository) (notes []auditNote, damaged, err error) {
	for raw, err := range repo.Notes(ctx, auditPrefix) {
		if err != nil {
			if ctx.Err() == nil && errors.Is(err, repository.ErrDamaged) {
				return notes, errors.Join(damaged, err), nil // it comes last
			}
			return nil, nil, fmt.Errorf("what audits have found: %w", err)
		}
		var n auditNote
		if err := json.Unmarshal(raw.Value, &n); err != nil {
			damaged = errors.Join(damaged, fmt.Errorf("note %s: %w", raw.Name, err))
			continue
		}
		if n.Version != auditNoteVersion || n.name() != raw.Name {
			damaged = errors.Join(damaged, fmt.Errorf("note %s: version %d is not known, or its name is not its own", raw.Name, n.Version))
			continue
		}
		notes = append(notes, n)
	}
	return notes, damaged, nil
}

// lied makes durable that the change tracking of a disk was caught since the
// parent of this run, and finds the points that it may have spoilt. What of it
// fails is in a.Err.
func (r *run) lied(ctx context.Context, disk hypervisor.DiskID, a *AuditResult) {
	var err error
	if a.Suspects, err = suspects(ctx, r.repo, r.plan.parent, disk); err != nil {
		a.Err = fmt.Errorf("which earlier points are affected is not known: %w", err)
	}
	n := &auditNote{
		Version: auditNoteVersion, Chain: r.plan.Chain, Parent: r.plan.parent.ID, Sequence: r.plan.parent.Sequence, Disk: disk,
		Run: r.res.Run, Time: r.o.Clock.Now().UTC(), Seed: r.res.AuditSeed,
		Leaves: a.Leaves, Wrong: a.Wrong, Offsets: a.Offsets, Suspects: a.Suspects,
	}
	raw, err := json.Marshal(n)
	if err == nil {
		err = r.repo.PutNote(ctx, n.name(), raw)
	}
	if err != nil {
		a.Err = errors.Join(a.Err, fmt.Errorf("what was found could not be noted: %w", err))
	}
}

// suspects returns the points of parent's chain that hold a disk as its change
// tracking told it, newest first: parent and those before it, back to the last
// one for which the disk was read in full.
func suspects(ctx context.Context, repo repository.Repository, parent *repository.Point, disk hypervisor.DiskID) (out []repository.PointID, err error) {
	var older []*repository.Point
	for p, err := range repo.Points(ctx, repository.Query{Chain: parent.Chain}) {
		if err != nil {
			return nil, err
		}
		if p.State == repository.Committed && p.Sequence <= parent.Sequence {
			older = append(older, p)
		}
	}
	slices.SortFunc(older, func(a, b *repository.Point) int { return cmp.Compare(b.Sequence, a.Sequence) })
	for _, p := range older {
		m, err := manifest.Parse(p)
		if err != nil {
			return out, err
		}
		if d := m.Disk(disk); d == nil || d.Mode != Incremental {
			break
		}
		out = append(out, p.ID)
	}
	return out, nil
}

// distrust takes from the repository which disks must not be read by the baseline
// of the plan's parent, and which notes nobody needs any more. A lie that was
// found after some point discredits the baselines of all points up to it: any of
// them is the parent again once the newer ones are deleted.
func (p *Plan) distrust(ctx context.Context, repo repository.Repository) error {
	notes, damaged, err := auditNotes(ctx, repo)
	if err != nil {
		return err
	}
	if damaged != nil {
		p.Notes = append(p.Notes, "part of what audits have found cannot be read: "+damaged.Error())
	}
	p.lies, p.stale = map[hypervisor.DiskID]string{}, nil
	for i := range notes {
		n := &notes[i]
		switch {
		case n.Chain != p.Chain:
		case p.oldest > n.Sequence:
			p.stale = append(p.stale, n.name())
		case p.parent != nil && p.parent.Sequence <= n.Sequence:
			p.lies[n.Disk] = fmt.Sprintf("run %s found %d wrong leaves", n.Run, n.Wrong)
		}
	}
	return nil
}

// dropStaleNotes removes what audits found about points that are gone. Failing
// costs some bytes until the next run.
func (r *run) dropStaleNotes(ctx context.Context) {
	for _, name := range r.plan.stale {
		if err := r.repo.DeleteNote(ctx, name); err != nil {
			r.o.Events.notice(r.vm.Name, fmt.Sprintf("note %s about points that are gone stays: %v", name, err))
			return
		}
	}
}

// auditVerdicts makes the run degraded for every disk whose change tracking was
// caught, or could not be audited as it should have been.
func (r *run) auditVerdicts() {
	for i := range r.res.Disks {
		d := &r.res.Disks[i]
		if d.Audit.Lied() {
			why := fmt.Sprintf("the change tracking of disk %s lied: %s; the disk was read in full, so this point is exact, and will be again by the next run", d.ID, d.Detail)
			if len(d.Audit.Suspects) > 0 {
				why += fmt.Sprintf("; points that may hold wrong bytes of it: %s", joinIDs(d.Audit.Suspects))
			}
			r.res.degrade(why)
		}
		if d.Audit.Err != nil {
			r.res.degrade(fmt.Sprintf("audit of disk %s: %v", d.ID, d.Audit.Err))
		}
	}
}

func joinIDs(ids []repository.PointID) string {
	s := ""
	for i, id := range ids {
		if i > 0 {
			s += ", "
		}
		s += string(id)
	}
	return s
}
