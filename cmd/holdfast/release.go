package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

// releaseDoc is what holdfast release did.
type releaseDoc struct {
	VM        string `json:"vm"`
	UUID      string `json:"uuid"`
	Status    string `json:"status"`
	Baselines int    `json:"baselines"` // dropped
}

func (p *program) releaseCommand() *cobra.Command {
	var from hypervisorFlags
	var repo repositoryFlags
	c := &cobra.Command{
		Use:   "release --from URL [--repo REPO] VM",
		Short: "Drop the baselines kept on the hypervisor for a virtual machine",
		Long: `Drop the baselines kept on the hypervisor for a virtual machine. Restore points
stay as they are; the next backup reads everything again. With --repo only the
baselines of that repository are dropped.`,
		Args: exactly(1, "the virtual machine"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := required(cmd, "from", from.url); err != nil {
				return err
			}
			return p.release(cmd.Context(), &from, &repo, args[0])
		},
	}
	from.add(c, "from", fromHelp)
	repo.add(c, repoHelp+" whose baselines are dropped (default: of every repository)")
	return c
}

func (p *program) release(ctx context.Context, from *hypervisorFlags, rf *repositoryFlags, name string) (err error) {
	hv, err := from.open(ctx, p)
	if err != nil {
		return err
	}
	defer p.closing(hv)
	vm, err := hypervisor.Find(ctx, hv, name)
	if err != nil {
		return err
	}
	repo8 := ""
	if rf.location != "" {
		repo, err := rf.open(ctx, p, false)
		if err != nil {
			return err
		}
		repo8 = repo.Info().Repo8()
		if err := repo.Close(); err != nil {
			return err
		}
	}
	n, err := backup.ReleaseBaselines(ctx, hv, vm.ID, repo8)
	if err != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	if p.json {
		p.emit(releaseDoc{VM: vm.Name, UUID: vm.UUID, Status: statusSuccess, Baselines: n})
		return nil
	}
	if n == 0 {
		p.say("%s: there was nothing to drop", vm.Name)
		return nil
	}
	p.say("%s: dropped %s; the next backup reads everything", vm.Name, plural(n, "baseline", "baselines"))
	return nil
}
