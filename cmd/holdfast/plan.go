package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

// planDoc is what a backup would do.
type planDoc struct {
	VM     string     `json:"vm"`
	ID     string     `json:"id"`
	UUID   string     `json:"uuid"`
	Chain  string     `json:"chain"`
	Parent string     `json:"parent"`
	Agent  bool       `json:"agent"`
	Disks  []planDisk `json:"disks"`
	Notes  []string   `json:"notes"`
}

type planDisk struct {
	ID      string `json:"id"`
	Mode    string `json:"mode"`
	Reason  string `json:"reason"`
	Detail  string `json:"detail,omitempty"`
	Size    int64  `json:"size"`
	Backing string `json:"backing"`
}

func (p *program) planCommand() *cobra.Command {
	var from hypervisorFlags
	var repo repositoryFlags
	var what selection
	c := &cobra.Command{
		Use:   "plan --from URL [--repo REPO] VM",
		Short: "Show what a backup would do, per disk, and why",
		Args:  exactly(1, "the virtual machine"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := required(cmd, "from", from.url); err != nil {
				return err
			}
			return p.plan(cmd.Context(), &from, &repo, &what, args[0])
		},
	}
	from.add(c, "from", fromHelp)
	repo.add(c, repoHelp+"; without one the plan is that of a first backup")
	what.add(c)
	return c
}

func (p *program) plan(ctx context.Context, from *hypervisorFlags, rf *repositoryFlags, what *selection, name string) error {
	hv, err := from.open(ctx, p)
	if err != nil {
		return err
	}
	defer p.closing(hv)
	vm, err := hypervisor.Find(ctx, hv, name)
	if err != nil {
		return err
	}
	var repo repository.Repository
	if rf.location != "" {
		r, err := rf.open(ctx, p, false)
		switch {
		case err == nil:
			defer p.closing(r)
			repo = r
		case !errors.Is(err, repository.ErrNotRepository) || !isEmpty(rf.location):
			return err
		}
	}
	o := &backup.Options{}
	what.apply(o)
	plan, err := backup.MakePlan(ctx, hv, repo, vm.ID, o)
	if err != nil {
		return err
	}
	p.showPlan(plan)
	return nil
}

func (p *program) showPlan(plan *backup.Plan) {
	d := planDoc{
		VM: plan.VM.Name, ID: string(plan.VM.ID), UUID: plan.VM.UUID, Chain: plan.Chain, Parent: string(plan.Parent),
		Agent: plan.Agent, Disks: []planDisk{}, Notes: append([]string{}, plan.Notes...),
	}
	for _, x := range plan.Disks {
		d.Disks = append(d.Disks, planDisk{ID: string(x.ID), Mode: string(x.Mode), Reason: string(x.Reason), Detail: x.Detail, Size: x.Size, Backing: string(x.Backing)})
	}
	if p.json {
		p.emit(d)
		return
	}
	base := "there is no restore point yet"
	if d.Parent != "" {
		base = "on top of restore point " + d.Parent
	}
	p.say("%s: %s", d.VM, base)
	t := &table{indent: "  ", right: map[int]bool{3: true}}
	for _, x := range d.Disks {
		t.add(x.ID, x.Mode, x.Reason, bytesText(x.Size), x.Detail)
	}
	t.print(p.say)
	if !d.Agent {
		p.say("  no guest agent answers: the backup would be crash-consistent")
	}
	for _, n := range d.Notes {
		p.say("  note: %s", n)
	}
}

// isEmpty reports whether a backup into location would make the repository.
func isEmpty(location string) bool {
	empty, err := connect.Empty(location)
	return err == nil && empty
}
