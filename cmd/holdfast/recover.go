package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

// recoverDoc is what was done about one obligation of an interrupted run.
type recoverDoc struct {
	Run    string   `json:"run"`
	Kind   string   `json:"kind"`
	VM     string   `json:"vm"`
	Object string   `json:"object"`
	State  string   `json:"state"` // closed or open
	Error  *problem `json:"error,omitempty"`
}

// Values of recoverDoc.State.
const (
	stateClosed = "closed"
	stateOpen   = "open"
)

func (p *program) recoverCommand() *cobra.Command {
	var repo repositoryFlags
	var hv hypervisorFlags
	c := &cobra.Command{
		Use:   "recover [--repo REPO]",
		Short: "Finish or undo what an interrupted run left behind",
		Long: `Finish or undo what an interrupted run left behind: thaw guests, release
snapshots, forget baselines that no restore point needs, remove unfinished virtual
machines and files. Runs that are alive are left alone.

Hypervisors and repositories are found from the journals in the state directory.
With --repo the obligations that runs of other hosts left in that repository are
closed too. The exit code is 3 when something stays open.`,
		Args: exactly(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.recoverRuns(cmd.Context(), &repo, &hv)
		},
	}
	repo.add(c, repoHelp+" whose records of open obligations are gone through too")
	hv.add(c, "", "")
	return c
}

func (p *program) recoverRuns(ctx context.Context, rf *repositoryFlags, hf *hypervisorFlags) error {
	state, err := p.stateDir()
	if err != nil {
		return err
	}
	o := backup.RecoverOptions{
		StateDir: state, Clock: p.clock,
		Connect: func(ctx context.Context, endpoint string) (hypervisor.Hypervisor, error) {
			if endpoint == "" {
				return nil, errors.New("the run recorded no hypervisor")
			}
			cfg := hf.config(p)
			cfg.URL = endpoint
			return p.connect.Hypervisor(ctx, cfg)
		},
		OpenRepository: func(ctx context.Context, location string) (repository.Repository, error) {
			if location == "" {
				return nil, errors.New("the run recorded no repository")
			}
			return rf.openAt(ctx, p, location, false)
		},
	}
	if rf.location != "" {
		if o.Location, err = connect.Location(rf.location); err != nil {
			return err
		}
	}
	done, err := backup.Recover(ctx, o)
	open := p.showRecovered(ctx, done)
	switch {
	case err != nil:
		return err
	case context.Cause(ctx) != nil:
		return context.Cause(ctx)
	case open > 0:
		p.ended(exitDegraded)
	}
	return nil
}

// showRecovered tells what was closed, and returns how much stays open.
func (p *program) showRecovered(ctx context.Context, done []backup.Recovered) (open int) {
	for _, r := range done {
		d := recoverDoc{Run: r.Run, Kind: r.Kind, VM: string(r.VM), Object: r.Object, State: stateClosed}
		if r.Err != nil {
			d.State, d.Error = stateOpen, explain(ctx, r.Err)
			open++
		}
		if p.json {
			p.emit(d)
			continue
		}
		line := fmt.Sprintf("%s: run %s: %s %s %s", d.State, d.Run, d.Kind, d.VM, d.Object)
		if d.Error != nil {
			line += ": " + d.Error.Message
			if d.Error.Hint != "" {
				line += " (" + d.Error.Hint + ")"
			}
		}
		p.say("%s", line)
	}
	switch {
	case len(done) == 0:
		p.say("nothing was left behind")
	case open > 0:
		p.say("%s closed, %d still open: run holdfast recover again when the cause is gone", plural(len(done)-open, "obligation", "obligations"), open)
	default:
		p.say("%s closed, nothing is open", plural(len(done), "obligation", "obligations"))
	}
	return open
}
