package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
)

// repairDoc is what a repair brought back.
type repairDoc struct {
	Status     string     `json:"status"` // of the new repository: sound or damaged
	Repository string     `json:"repository"`
	To         string     `json:"to"`
	Files      int64      `json:"files"`
	Bytes      int64      `json:"bytes"`
	Restored   []string   `json:"restored"` // files that came from a copy
	Damaged    []string   `json:"damaged"`  // files that were taken over damaged
	Lost       []string   `json:"lost"`     // files of which nothing is left
	Verify     *verifyDoc `json:"verify"`
}

func (p *program) repairCommand() *cobra.Command {
	var repo repositoryFlags
	var to string
	c := &cobra.Command{
		Use:   "repair --repo REPO --to DIR",
		Short: "Bring back from copies what can be, into a new repository, then verify it",
		Long: `Bring back from copies what can be, into a new repository, then verify it.

The damaged repository is only read. The exit code is 1 when the new one still has
damage; the output names the restore points that it affects.`,
		Args: exactly(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := errors.Join(required(cmd, "repo", repo.location), required(cmd, "to", to)); err != nil {
				return err
			}
			return p.repair(cmd.Context(), &repo, to)
		},
	}
	repo.add(c, repoHelp)
	c.Flags().StringVar(&to, "to", "", "`directory` of the new repository, missing or empty")
	return c
}

func (p *program) repair(ctx context.Context, rf *repositoryFlags, to string) error {
	from, err := connect.Location(rf.location)
	if err != nil {
		return err
	}
	if to, err = connect.Location(to); err != nil {
		return err
	}
	pw, err := p.repoPassword(rf, from, false)
	if err != nil {
		return err
	}
	start := p.clock.Now()
	rep, err := p.connect.Repair(ctx, connect.RepositoryConfig{Location: from, Password: pw}, to)
	if err != nil {
		return err
	}
	d := repairDoc{
		Status: statusSound, Repository: from, To: to, Files: rep.Files, Bytes: rep.Bytes,
		Restored: texts(rep.Restored), Damaged: texts(rep.Damaged), Lost: texts(rep.Lost),
		Verify: describeVerify(rep.Verify, to, "blobs"),
	}
	d.Verify.DurationMS = ms(p.clock.Now().Sub(start))
	if d.Verify.Status != statusSound {
		d.Status = statusDamaged
		p.ended(exitFailed)
	}
	p.showRepair(d)
	return nil
}

func (p *program) showRepair(d repairDoc) {
	if p.json {
		p.emit(d)
		return
	}
	p.say("%s: %s, %s brought over to %s", d.Repository, plural(int(d.Files), "file", "files"), bytesText(d.Bytes), d.To)
	for _, x := range []struct {
		what  string
		files []string
	}{{"came back from a copy", d.Restored}, {"is damaged, and there is no good copy", d.Damaged}, {"is lost", d.Lost}} {
		for _, f := range x.files {
			p.say("  %s %s", f, x.what)
		}
	}
	p.showVerify(d.Verify)
}
