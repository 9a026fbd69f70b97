package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/internal/lease"
	"github.com/holdfast-backup/holdfast/repository"
)

// passwordDoc is what a change of the password did.
type passwordDoc struct {
	Status     string   `json:"status"` // success
	Repository string   `json:"repository"`
	Changed    bool     `json:"changed"` // false: it was the password already
	Mended     []string `json:"mended"`  // files that an interrupted change had left with another password
}

const newPasswordVariable = "HOLDFAST_NEW_REPO_PASSWORD"

func (p *program) passwordCommand() *cobra.Command {
	var repo repositoryFlags
	var file string
	c := &cobra.Command{
		Use:   "password --repo REPO",
		Short: "Change the password of a repository",
		Long: `Change the password of a repository, for Holdfast and for the stock kopia program.

The old password comes from --repo-password-file, from HOLDFAST_REPO_PASSWORD or is
asked for; the new one comes from --new-password-file, from
HOLDFAST_NEW_REPO_PASSWORD or is asked for twice. Let no backup run meanwhile: it
would fail.

When it is interrupted, the old password or the new one opens the repository. Run
it once more, with the same passwords: it finishes what was begun.

What is stored stays encrypted with the same keys. Who knew the old password and
kept copies of the repository's files can still read those.`,
		Example: `  holdfast password --repo ./store --repo-password-file old --new-password-file new`,
		Args:    exactly(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := required(cmd, "repo", repo.location); err != nil {
				return err
			}
			return p.password(cmd.Context(), &repo, file)
		},
	}
	repo.add(c, repoHelp)
	c.Flags().StringVar(&file, "new-password-file", "", "`file` with the new password of the repository")
	return c
}

func (p *program) password(ctx context.Context, rf *repositoryFlags, newFile string) error {
	dir, err := connect.Location(rf.location)
	if err != nil {
		return err
	}
	old, err := p.repoPassword(rf, dir, false)
	if err != nil {
		return err
	}
	next, err := p.newPassword(newFile)
	if err != nil {
		return err
	}
	rep, err := p.changePassword(ctx, dir, old, next)
	if errors.Is(err, repository.ErrPassword) {
		// An earlier change that was interrupted may have been complete: then the new
		// password is the one that opens.
		if again, nerr := p.changePassword(ctx, dir, next, next); nerr == nil {
			rep, err = again, nil
		} else if !errors.Is(nerr, repository.ErrPassword) {
			err = nerr
		}
	}
	if errors.Is(err, repository.ErrOutcomeUnknown) {
		return &hintedError{"run the same command again: it finishes the change", err}
	}
	if err != nil {
		return err
	}
	d := passwordDoc{Status: statusSuccess, Repository: dir, Changed: rep.Changed, Mended: texts(rep.Mended)}
	if p.json {
		p.emit(d)
		return nil
	}
	for _, f := range d.Mended {
		p.say("  %s was left by an interrupted change, and is mended", f)
	}
	if d.Changed {
		p.say("%s: the password is changed", dir)
	} else {
		p.say("%s: that is the password already", dir)
	}
	return nil
}

// newPassword finds the password that is to be. One that is typed is typed twice.
func (p *program) newPassword(file string) (connect.Secret, error) {
	s, err := p.secret("new password of the repository", file, "new-password-file", newPasswordVariable)
	if err != nil || file != "" || p.env(newPasswordVariable) != "" {
		return s, err
	}
	again, err := p.prompt("the same again")
	if err != nil {
		return connect.Secret{}, err
	}
	if !connect.NewSecret(again).Equal(s) {
		return connect.Secret{}, usage("", errors.New("the two passwords are not the same"))
	}
	return s, nil
}

// passwordChanger is a repository whose password can be changed.
type passwordChanger interface {
	ChangePassword(ctx context.Context, lock repository.Lock, password connect.Secret) (*connect.PasswordReport, error)
}

// changePassword changes it under the lock of maintenance.
func (p *program) changePassword(ctx context.Context, dir string, old, next connect.Secret) (_ *connect.PasswordReport, err error) {
	state, err := p.stateDir()
	if err != nil && !errors.Is(err, errNoState) {
		return nil, err
	}
	repo, err := p.connect.Repository(ctx, connect.RepositoryConfig{Location: dir, Password: old, StateDir: state})
	if err != nil {
		return nil, err
	}
	defer p.closing(repo)
	c, ok := repo.(passwordChanger)
	if !ok {
		return nil, fmt.Errorf("the password of this kind of repository cannot be changed: %w", errors.ErrUnsupported)
	}
	work, l, err := lease.Take(ctx, repo, repository.LockMaintenance, lease.Options{
		Holder: lease.Holder("password"), Takeover: lease.Dead, Clock: p.clock,
	})
	if err != nil {
		return nil, fmt.Errorf("maintenance of the repository: %w", err)
	}
	defer func() {
		rctx, cancel := clock.WithTimeout(context.WithoutCancel(ctx), p.clock, time.Minute)
		defer cancel()
		err = errors.Join(err, l.Release(rctx))
	}()
	return c.ChangePassword(work, l.Lock, next)
}
