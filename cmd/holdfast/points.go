package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/manifest"
	"github.com/holdfast-backup/holdfast/repository"
)

// pointDoc is a restore point in the output of holdfast points.
type pointDoc struct {
	Point       string      `json:"point"`
	VM          string      `json:"vm"`
	UUID        string      `json:"uuid"`
	Platform    string      `json:"platform"`
	Chain       string      `json:"chain"`
	Sequence    int64       `json:"sequence"`
	Run         string      `json:"run"`
	Parent      string      `json:"parent"`
	Created     time.Time   `json:"created"`
	State       string      `json:"state"`
	Detail      string      `json:"detail,omitempty"`
	Status      string      `json:"status"`
	Consistency string      `json:"consistency"`
	Disks       []pointDisk `json:"disks"`
	// LyingTracker names the disks that were backed up under a change tracking
	// that was caught lying.
	LyingTracker []suspicionDoc `json:"lying_tracker,omitempty"`
}

type pointDisk struct {
	ID     string `json:"id"`
	Mode   string `json:"mode"`
	Reason string `json:"reason"`
	Size   int64  `json:"size"`
	Read   int64  `json:"read_bytes"`
	Stored int64  `json:"stored_bytes"`

	Audited int64 `json:"audited_bytes"`
}

func (p *program) pointsCommand() *cobra.Command {
	var repo repositoryFlags
	var vm string
	c := &cobra.Command{
		Use:   "points --repo REPO [--vm VM]",
		Short: "List restore points",
		Long: `List restore points, by virtual machine and age.

A point that was committed and has vanished, or whose record cannot be trusted,
is listed too, and the exit code is then 1. A point of a disk whose change tracking
was caught lying says so: it is SUSPECT when it may hold wrong bytes, and exact when
the lie was found by the backup that made it, which then read the disk in full.`,
		Args: exactly(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := required(cmd, "repo", repo.location); err != nil {
				return err
			}
			return p.points(cmd.Context(), &repo, vm)
		},
	}
	repo.add(c, repoHelp)
	c.Flags().StringVar(&vm, "vm", "", "only points of this `VM`, by name or UUID")
	return c
}

func (p *program) points(ctx context.Context, rf *repositoryFlags, vm string) error {
	repo, err := rf.open(ctx, p, false)
	if err != nil {
		return err
	}
	defer p.closing(repo)
	list, err := listPoints(ctx, repo, vm)
	if err != nil {
		return err
	}
	if vm != "" && len(list) == 0 {
		return noPointsOf(vm)
	}
	found, err := p.suspicions(ctx, repo, list)
	if err != nil {
		return err
	}
	t := &table{right: map[int]bool{4: true, 5: true}}
	t.add("POINT", "VM", "CREATED", "CONSISTENCY", "SIZE", "STORED", "STATE")
	for _, pt := range list {
		d := describePoint(pt)
		d.LyingTracker = found[pt.ID]
		if pt.State != repository.Committed {
			p.ended(exitFailed)
		}
		if p.json {
			p.emit(d)
			continue
		}
		var size, stored int64
		for _, x := range d.Disks {
			size += x.Size
			stored += x.Stored
		}
		state := d.Status
		if pt.State != repository.Committed {
			state = d.State + ": " + d.Detail
		}
		for _, s := range d.LyingTracker {
			state += ", " + s.short()
		}
		t.add(d.Point, d.VM, d.Created.Format("2006-01-02 15:04:05 MST"), d.Consistency, bytesText(size), bytesText(stored), state)
	}
	if len(list) == 0 {
		p.say("there are no restore points yet")
		return nil
	}
	t.print(p.say)
	return nil
}

func noPointsOf(vm string) error {
	return &hintedError{hint: "list all points with: holdfast points --repo REPO", err: fmt.Errorf("no restore points of %q: %w", vm, repository.ErrNotFound)}
}

// listPoints returns the points of a VM, or of all, by name, chain and sequence.
func listPoints(ctx context.Context, repo repository.Repository, vm string) ([]*repository.Point, error) {
	var out []*repository.Point
	for pt, err := range repo.Points(ctx, repository.Query{}) {
		if err != nil {
			return nil, fmt.Errorf("the list of restore points is not complete: %w", err)
		}
		if vm == "" || pt.Name == vm || pt.Chain == vm || pt.Labels[manifest.LabelUUID] == vm {
			out = append(out, pt)
		}
	}
	slices.SortStableFunc(out, func(a, b *repository.Point) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Chain, b.Chain), cmp.Compare(a.Sequence, b.Sequence))
	})
	return out, nil
}

func describePoint(pt *repository.Point) pointDoc {
	d := pointDoc{
		Point: string(pt.ID), VM: pt.Name, UUID: pt.Labels[manifest.LabelUUID], Platform: pt.Labels[manifest.LabelPlatform],
		Chain: pt.Chain, Sequence: pt.Sequence, Run: pt.Run, Parent: string(pt.Parent), Created: pt.Created.UTC(),
		State: string(pt.State), Detail: pt.Detail, Status: pt.Labels[manifest.LabelStatus],
		Consistency: pt.Labels[manifest.LabelConsistency], Disks: []pointDisk{},
	}
	if man, err := manifest.Parse(pt); err == nil {
		for _, x := range man.Disks {
			pd := pointDisk{ID: string(x.ID), Mode: string(x.Mode), Reason: string(x.Reason), Size: x.Size, Read: x.ReadBytes}
			if x.Audit != nil {
				pd.Audited = x.Audit.Bytes
			}
			if r := pt.Disk(string(x.ID)); r != nil {
				pd.Stored = r.Stats.Stored
			}
			d.Disks = append(d.Disks, pd)
		}
		return d
	}
	for _, x := range pt.Disks {
		d.Disks = append(d.Disks, pointDisk{ID: x.ID, Size: x.Size, Stored: x.Stats.Stored})
	}
	return d
}

// pointFlags name one restore point.
type pointFlags struct{ point, vm string }

// latest stands for the newest point of a VM.
const latest = "latest"

func (f *pointFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.point, "point", "", "`ID` of the restore point, or latest together with --vm")
	c.Flags().StringVar(&f.vm, "vm", "", "the `VM` of --point latest, by name or UUID")
}

// find returns the point that is meant. It must be committed.
func (f *pointFlags) find(ctx context.Context, repo repository.Repository) (*repository.Point, error) {
	if f.point != latest {
		all, err := listPoints(ctx, repo, "")
		if err != nil {
			return nil, err
		}
		for _, pt := range all {
			if string(pt.ID) != f.point {
				continue
			}
			if pt.State != repository.Committed {
				return nil, fmt.Errorf("restore point %s is %s: %s: %w", pt.ID, pt.State, pt.Detail, repository.ErrDamaged)
			}
			return pt, nil
		}
		return nil, &hintedError{hint: "list what is there with: holdfast points --repo REPO", err: fmt.Errorf("restore point %q: %w", f.point, repository.ErrNotFound)}
	}
	if f.vm == "" {
		return nil, usage("give --vm NAME", errors.New("--point latest needs a virtual machine"))
	}
	list, err := listPoints(ctx, repo, f.vm)
	if err != nil {
		return nil, err
	}
	var best *repository.Point
	chains := map[string]bool{}
	for _, pt := range list {
		chains[pt.Chain] = true
		if pt.State == repository.Committed && (best == nil || pt.Sequence > best.Sequence) {
			best = pt
		}
	}
	switch {
	case len(chains) > 1:
		return nil, &hintedError{hint: "name it by its UUID: " + uuids(list), err: fmt.Errorf("there are points of %d virtual machines of the name %q", len(chains), f.vm)}
	case best == nil:
		return nil, noPointsOf(f.vm)
	}
	return best, nil
}

func uuids(list []*repository.Point) string {
	s := ""
	seen := map[string]bool{}
	for _, pt := range list {
		if id := cmp.Or(pt.Labels[manifest.LabelUUID], pt.Chain); !seen[id] {
			seen[id] = true
			if s != "" {
				s += ", "
			}
			s += id
		}
	}
	return s
}
