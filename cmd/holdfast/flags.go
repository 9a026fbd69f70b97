package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

// hypervisorFlags say which hypervisor to use.
type hypervisorFlags struct {
	url, passwordFile, scratchDir, caFile, thumbprint string
}

// add registers the flags; urlFlag names the one for the URL, empty: none.
func (f *hypervisorFlags) add(cmd *cobra.Command, urlFlag, urlHelp string) {
	fs := cmd.Flags()
	if urlFlag != "" {
		fs.StringVar(&f.url, urlFlag, "", urlHelp)
	}
	fs.StringVar(&f.passwordFile, "password-file", "", "`file` with the password of the hypervisor")
	fs.StringVar(&f.scratchDir, "scratch-dir", "", "`directory` on the hypervisor for what guests overwrite during a backup")
	fs.StringVar(&f.caFile, "ca-file", "", "`file` with the certificates to trust")
	fs.StringVar(&f.thumbprint, "thumbprint", "", "SHA-256 `thumbprint` of the certificate to trust")
}

func (f *hypervisorFlags) config(p *program) connect.HypervisorConfig {
	return connect.HypervisorConfig{
		URL: f.url, ScratchDir: f.scratchDir, CAFile: f.caFile, Thumbprint: f.thumbprint,
		Password: func(context.Context) (connect.Secret, error) {
			return p.secret("password of the hypervisor", f.passwordFile, "password-file", "HOLDFAST_PASSWORD")
		},
	}
}

// open connects. The caller closes the result.
func (f *hypervisorFlags) open(ctx context.Context, p *program) (hypervisor.Hypervisor, error) {
	return p.connect.Hypervisor(ctx, f.config(p))
}

// repositoryFlags say which repository to use.
type repositoryFlags struct {
	location, passwordFile string
}

func (f *repositoryFlags) add(cmd *cobra.Command, help string) {
	fs := cmd.Flags()
	fs.StringVar(&f.location, "repo", "", help)
	fs.StringVar(&f.passwordFile, "repo-password-file", "", "`file` with the password of the repository")
}

const repoHelp = "`directory` of the repository"

// open opens the repository, or creates one where there is nothing. The caller
// closes the result.
func (f *repositoryFlags) open(ctx context.Context, p *program, create bool) (repository.Repository, error) {
	return f.openAt(ctx, p, f.location, create)
}

func (f *repositoryFlags) openAt(ctx context.Context, p *program, location string, create bool) (repository.Repository, error) {
	dir, err := connect.Location(location)
	if err != nil {
		return nil, err
	}
	pw, err := p.repoPassword(f, dir, create)
	if err != nil {
		return nil, err
	}
	state, err := p.stateDir()
	if err != nil && !errors.Is(err, errNoState) {
		return nil, err
	}
	return p.connect.Repository(ctx, connect.RepositoryConfig{Location: dir, Password: pw, Create: create, StateDir: state})
}

// repoPassword asks for the password of the repository once.
func (p *program) repoPassword(f *repositoryFlags, dir string, create bool) (connect.Secret, error) {
	if p.repoP != nil {
		return *p.repoP, nil
	}
	const what = "password of the repository"
	s, err := p.secret(what, f.passwordFile, "repo-password-file", "HOLDFAST_REPO_PASSWORD")
	if err != nil {
		return connect.Secret{}, err
	}
	if create && f.passwordFile == "" && p.env("HOLDFAST_REPO_PASSWORD") == "" {
		// It was typed. A slip in the password of a new repository would lose it.
		if empty, err := connect.Empty(dir); err == nil && empty {
			again, err := p.prompt("the same again, for the new repository")
			if err != nil {
				return connect.Secret{}, err
			}
			if !connect.NewSecret(again).Equal(s) {
				return connect.Secret{}, usage("", errors.New("the two passwords are not the same"))
			}
		}
	}
	p.repoP = &s
	return s, nil
}

// maxSecret is the largest password file that is read, in bytes.
const maxSecret = 64 << 10

// secret finds a password: in a file, in the environment, or by asking.
func (p *program) secret(what, file, flag, variable string) (connect.Secret, error) {
	var s string
	switch env := p.env(variable); {
	case file != "":
		f, err := os.Open(file)
		if err != nil {
			return connect.Secret{}, fmt.Errorf("%s: %w", what, err)
		}
		defer f.Close() //nolint:errcheck // only read
		b, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
		if err != nil {
			return connect.Secret{}, fmt.Errorf("%s: %w", what, err)
		}
		if len(b) > maxSecret {
			return connect.Secret{}, fmt.Errorf("%s: %s is too large to be a password", what, file)
		}
		s = strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	case env != "":
		s = env
	default:
		var err error
		s, err = p.prompt(what)
		if errors.Is(err, errNoTerminal) {
			return connect.Secret{}, usage("give --"+flag+" FILE, or set "+variable, fmt.Errorf("the %s is needed", what))
		}
		if err != nil {
			return connect.Secret{}, fmt.Errorf("%s: %w", what, err)
		}
	}
	if s == "" {
		return connect.Secret{}, usage("give --"+flag+" FILE, or set "+variable, fmt.Errorf("the %s is empty", what))
	}
	return connect.NewSecret(s), nil
}

// stateDir is where journals and leases of this host lie.
func (p *program) stateDir() (string, error) {
	dir := p.stateFlag
	if dir == "" {
		dir = p.env("HOLDFAST_STATE_DIR")
	}
	if dir == "" {
		if x := p.env("XDG_STATE_HOME"); filepath.IsAbs(x) {
			dir = filepath.Join(x, "holdfast")
		}
	}
	if dir == "" {
		for _, home := range []string{p.env("HOME"), p.env("USERPROFILE")} {
			if home != "" {
				dir = filepath.Join(home, ".local", "state", "holdfast")
				break
			}
		}
	}
	if dir == "" {
		return "", usage("give --state-dir", errNoState)
	}
	return filepath.Abs(dir)
}
