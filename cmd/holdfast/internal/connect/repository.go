package connect

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
)

// RepositoryConfig says which repository to open.
type RepositoryConfig struct {
	Location string // see Location
	Password Secret
	// Create makes a repository in a directory that is missing or empty.
	Create bool
	// StateDir, if set, is where this client remembers the newest records that it
	// saw, so that it notices a repository that was rolled back.
	StateDir string

	Logger *slog.Logger // may be nil
}

// LocationError says that something is not the address of a repository.
type LocationError struct {
	Location string
	Hint     string
	Err      error
}

// Error names the location and what is wrong with it.
func (e *LocationError) Error() string { return fmt.Sprintf("repository %q: %v", e.Location, e.Err) }

// Unwrap returns the cause.
func (e *LocationError) Unwrap() error { return e.Err }

// Is makes the error match ErrUsage.
func (e *LocationError) Is(target error) bool { return target == ErrUsage }

const supportedRepositories = "a repository is a directory on this machine, for example ./store"

// Location returns the absolute form of a repository's address: it is found again
// from any working directory. Other things than directories are refused with
// errors.ErrUnsupported.
func Location(s string) (string, error) {
	if s == "" {
		return "", &LocationError{Location: s, Hint: "give --repo a directory", Err: errors.New("no repository was named")}
	}
	if scheme, _, ok := strings.Cut(s, ":"); ok && len(scheme) > 1 && isScheme(scheme) {
		if scheme != "file" {
			return "", &LocationError{Location: redact(s), Hint: supportedRepositories, Err: fmt.Errorf("storage of kind %q is not supported yet: %w", scheme, errors.ErrUnsupported)}
		}
		u, err := url.Parse(s)
		if err != nil || u.Path == "" || (u.Host != "" && u.Host != "localhost") {
			return "", &LocationError{Location: redact(s), Hint: supportedRepositories, Err: errors.New("it is not a file URL of this machine")}
		}
		s = u.Path
	}
	return filepath.Abs(s)
}

func redact(s string) string {
	if u, err := url.Parse(s); err == nil {
		return u.Redacted()
	}
	scheme, _, _ := strings.Cut(s, ":")
	return scheme + ":..."
}

func isScheme(s string) bool {
	for i, c := range s {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !letter && (i == 0 || (c < '0' || c > '9') && c != '+' && c != '-' && c != '.') {
			return false
		}
	}
	return true
}

// Empty reports whether a backup into location would create the repository: its
// directory is missing or empty.
func Empty(location string) (bool, error) {
	dir, err := Location(location)
	if err != nil {
		return false, err
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("%w: %w", repository.ErrNotRepository, err)
	}
	return len(entries) == 0, nil
}

// Repository opens the repository at a location, or creates it. The caller
// closes it.
func Repository(ctx context.Context, cfg RepositoryConfig) (repository.Repository, error) {
	dir, err := Location(cfg.Location)
	if err != nil {
		return nil, err
	}
	open := kopiarepo.Open
	if cfg.Create {
		open = kopiarepo.OpenOrCreate
	}
	r, err := open(ctx, engine(dir, cfg))
	if err != nil {
		return nil, err
	}
	return r, nil
}

func engine(dir string, cfg RepositoryConfig) kopiarepo.Config {
	c := kopiarepo.Config{Dir: dir, Password: cfg.Password, Logger: cfg.Logger}
	// A client that cannot keep a memory does without one: it is a second line of
	// defence. What needs the state directory says so itself.
	if cfg.StateDir != "" && os.MkdirAll(cfg.StateDir, 0o700) == nil {
		c.AnchorFile = filepath.Join(cfg.StateDir, "anchors.json")
	}
	return c
}
