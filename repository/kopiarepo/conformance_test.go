package kopiarepo_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
	"github.com/holdfast-backup/holdfast/repository/repositorytest"
)

// template is an empty repository that conformance checks copy: creating one costs
// kopia's key derivation three times.
func template(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "template")
	r, err := kopiarepo.Create(context.Background(), config(dir))
	require.NoError(t, err)
	require.NoError(t, r.Close())
	return dir
}

func TestConformance(t *testing.T) {
	samples := 40
	if testing.Short() {
		samples = 12
	}
	from := template(t)
	repositorytest.Run(t, func(t repositorytest.T) *repositorytest.Harness {
		dir, err := os.MkdirTemp("", "holdfast-conformance-")
		require.NoError(t, err)
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		dir = filepath.Join(dir, "repo")
		require.NoError(t, os.CopyFS(dir, os.DirFS(from)))
		c := newClock()
		reopen := func(ctx context.Context) (repository.Repository, error) {
			cfg := config(dir)
			cfg.Clock = c.Now
			r, err := kopiarepo.Open(ctx, cfg)
			if err != nil {
				return nil, err
			}
			return r, nil
		}
		r, err := reopen(t.Context())
		require.NoError(t, err)
		return &repositorytest.Harness{
			Repository: r, Reopen: reopen, Advance: c.Advance, SafetyTime: 30 * time.Hour, DamageSamples: samples,
			Objects: func() []string { return stored(t, dir) },
			Damage:  func(object string, how repositorytest.Damage) (func(), error) { return damage(dir, object, how) },
		}
	})
}

// stored lists what a repository stores, but for what nothing depends on: leases,
// and kopia's session markers.
func stored(t repositorytest.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if !strings.Contains(rel, "/locks/") && !strings.Contains(rel, ".tmp.") && !strings.HasPrefix(rel, "s/") {
			out = append(out, rel)
		}
		return nil
	})
	require.NoError(t, err)
	// A record is lost only together with its copy. Checks draw from what there is:
	// let them draw some of these.
	for _, name := range out {
		if record, ok := strings.CutPrefix(name, "holdfast/"); ok && strings.HasPrefix(record, "records/") {
			for range 8 {
				out = append(out, "both:"+record)
			}
		}
	}
	return out
}

// damageBoth damages a record and its copy.
func damageBoth(dir, record string, how repositorytest.Damage) (func(), error) {
	var undo []func()
	copies, err := filepath.Glob(filepath.Join(dir, "holdfast-2", record+"-*"))
	if err != nil {
		return nil, err
	}
	for _, p := range append(copies, filepath.Join(dir, "holdfast", record)) {
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return nil, err
		}
		u, err := damage(dir, rel, how)
		if err != nil {
			return nil, err
		}
		undo = append(undo, u)
	}
	return func() {
		for _, u := range undo {
			u()
		}
	}, nil
}

// damage damages a stored file and returns what takes the damage back.
func damage(dir, object string, how repositorytest.Damage) (func(), error) {
	if record, ok := strings.CutPrefix(object, "both:"); ok {
		return damageBoth(dir, record, how)
	}
	p := filepath.Join(dir, filepath.FromSlash(object))
	old, err := os.ReadFile(p)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(p)
	if err != nil {
		return nil, err
	}
	b := append([]byte(nil), old...)
	switch {
	case how == repositorytest.Lost:
		b = nil
	case len(b) == 0:
		return nil, errors.ErrUnsupported
	case how == repositorytest.Flip:
		b[len(b)/3] ^= 1 << (len(b) % 8)
	case how == repositorytest.Truncate:
		b = b[:len(b)/2]
	case how == repositorytest.Empty:
		b = b[:0]
	}
	if how == repositorytest.Lost {
		err = os.Remove(p)
	} else {
		err = os.WriteFile(p, b, 0o600)
	}
	return func() {
		_ = os.WriteFile(p, old, 0o600)
		_ = os.Chtimes(p, info.ModTime(), info.ModTime())
	}, err
}
