package kopiarepo_test

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
	"github.com/holdfast-backup/holdfast/secret"
)

const newPassword = "a new one, with ß and a \" in it"

func with(cfg kopiarepo.Config, password string) kopiarepo.Config {
	cfg.Password = secret.New(password)
	return cfg
}

// changePassword opens a repository and changes its password.
func changePassword(ctx context.Context, cfg kopiarepo.Config, password string) (*kopiarepo.PasswordReport, error) {
	r, err := kopiarepo.Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	lock, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{
		Holder: "test", Takeover: func(string) bool { return true },
	})
	if err != nil {
		return nil, err
	}
	report, err := r.ChangePassword(ctx, lock, secret.New(password))
	_ = lock.Release(context.WithoutCancel(ctx))
	return report, err
}

// small makes a repository with one point.
func small(t *testing.T, dir string) (*image, repository.PointID) {
	t.Helper()
	rnd := seed(t)
	m := newImage(3*mib+123, mib)
	m.fill(rnd, 0)
	m.fill(rnd, 3)
	r := create(t, config(dir))
	proof, err := backup(context.Background(), r, map[string]*image{"d": m}, backupOptions{chain: "vm", run: "r1"})
	require.NoError(t, err)
	require.NoError(t, r.Close())
	return m, proof.Point().ID
}

// works reports whether a password gives the bytes back. It fails the test if the
// answer is neither that nor repository.ErrPassword.
func works(t *testing.T, what, dir, password string, m *image, id repository.PointID) bool {
	t.Helper()
	ctx := context.Background()
	r, err := kopiarepo.Open(ctx, with(config(dir), password))
	if err == nil {
		defer r.Close()
		err = compare(ctx, r, id, map[string]*image{"d": m})
	}
	if err != nil {
		require.ErrorIs(t, err, repository.ErrPassword, "%s: password %q", what, password)
	}
	return err == nil
}

// whole checks that a repository is sound, and that nothing of the other password
// is left in it.
func whole(t *testing.T, what, dir, password, other string, m *image, id repository.PointID) {
	t.Helper()
	ctx := context.Background()
	r, err := kopiarepo.Open(ctx, with(config(dir), password))
	require.NoError(t, err, what)
	defer func() { require.NoError(t, r.Close()) }()
	require.NoError(t, compare(ctx, r, id, map[string]*image{"d": m}), what)
	rep, err := r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyBlobs})
	require.NoError(t, err, what)
	require.Empty(t, rep.Damages, what)
	require.Empty(t, kopiarepo.FilesOpenedBy(ctx, dir, secret.New(other)), what)
	require.Len(t, kopiarepo.FilesOpenedBy(ctx, dir, secret.New(password)), 9, what)
	if os.Getenv("HOLDFAST_NIGHTLY") != "" { // it follows from the files
		require.True(t, kopiarepo.StockOpens(ctx, dir, secret.New(password)), what)
		require.False(t, kopiarepo.StockOpens(ctx, dir, secret.New(other)), what)
	}
}

// contents reads all files under a directory.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		out[filepath.ToSlash(rel)] = string(b)
		return err
	}))
	return out
}

func TestPasswordChange(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	m, id := small(t, dir)
	before := contents(t, dir)

	_, err := changePassword(ctx, with(config(dir), "wrong"), newPassword)
	require.ErrorIs(t, err, repository.ErrPassword)
	require.Len(t, contents(t, dir), len(before))
	for name, b := range contents(t, dir) {
		require.True(t, before[name] == b, "%s was changed with a wrong password", name)
	}

	cfg := config(dir)
	r := open(t, cfg)
	require.NoError(t, compare(ctx, r, id, map[string]*image{"d": m}))
	other, err := r.Lock(ctx, "something", repository.LockOptions{})
	require.NoError(t, err)
	for _, l := range []repository.Lock{nil, other} {
		_, err = r.ChangePassword(ctx, l, secret.New(newPassword))
		require.ErrorIs(t, err, repository.ErrFenced)
	}
	lock, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{})
	require.NoError(t, err)
	_, err = r.ChangePassword(ctx, lock, secret.Secret{})
	require.ErrorIs(t, err, repository.ErrPassword)
	w, err := r.Begin(ctx, &repository.PointSpec{Chain: "vm", Name: "vm", Run: "r2"})
	require.NoError(t, err)
	_, err = r.ChangePassword(ctx, lock, secret.New(newPassword))
	require.ErrorIs(t, err, repository.ErrLocked, "while a point is written")
	require.NoError(t, w.Abort(ctx))
	require.Empty(t, kopiarepo.FilesOpenedBy(ctx, dir, secret.New(newPassword)), "nothing changed")

	rep, err := r.ChangePassword(ctx, lock, secret.New(newPassword))
	require.NoError(t, err)
	require.True(t, rep.Changed)
	require.Empty(t, rep.Mended)
	whole(t, "changed", dir, newPassword, password, m, id)
	_, err = kopiarepo.Open(ctx, config(dir))
	require.ErrorIs(t, err, repository.ErrPassword)

	// A copy of the old password is noticed without reading packs, and renewed.
	const oldCopy = "holdfast-2/copies/kopia.repository"
	require.NoError(t, os.WriteFile(filepath.Join(dir, oldCopy), []byte(before[oldCopy]), 0o600))
	records, err := r.Verify(ctx, nil)
	require.NoError(t, err)
	require.Len(t, records.Damages, 1, "verify saw nothing")
	require.True(t, records.Damages[0].Object == oldCopy && records.Damages[0].Repairable, records.Damages)

	// The same handle works on.
	next := m.clone()
	next.zero(3)
	proof, err := backup(ctx, r, map[string]*image{"d": next}, backupOptions{chain: "vm", run: "r3", parent: id, changed: map[string][]int64{"d": {3}}})
	require.NoError(t, err)
	_, err = r.Maintain(ctx, lock, &repository.MaintainOptions{Full: true})
	require.NoError(t, err)
	again, err := r.ChangePassword(ctx, lock, secret.New(newPassword))
	require.NoError(t, err)
	require.False(t, again.Changed)
	require.NoError(t, r.Close())
	cfg = with(cfg, newPassword)
	r = open(t, cfg)
	require.NoError(t, compare(ctx, r, proof.Point().ID, map[string]*image{"d": next}))
	whole(t, "and used", dir, newPassword, password, m, id)
}

// TestPasswordChangeBehindOurBack: the stock program changes the password of its
// part alone. Ours goes on with the old one, says so, and brings both together.
func TestPasswordChangeBehindOurBack(t *testing.T) {
	kopia := stockKopia(t)
	ctx := context.Background()
	dir := t.TempDir()
	m, id := small(t, dir)
	kopia("repository", "connect", "filesystem", "--path", dir, "--override-hostname", "holdfast", "--override-username", "backup")
	kopia("repository", "change-password", "--new-password", newPassword)
	sec := secret.New(newPassword)
	require.True(t, kopiarepo.StockOpens(ctx, dir, sec))

	require.True(t, works(t, "by a copy", dir, password, m, id))
	require.False(t, works(t, "no slot", dir, newPassword, m, id))
	r := open(t, config(dir))
	rep, err := r.Verify(ctx, nil)
	require.NoError(t, err)
	require.NotEmpty(t, rep.Damages)
	for _, d := range rep.Damages {
		require.True(t, d.Repairable, d)
	}
	require.NoError(t, r.Close())
	report, err := changePassword(ctx, config(dir), newPassword)
	require.NoError(t, err)
	require.True(t, report.Changed)
	whole(t, "together again", dir, newPassword, password, m, id)
}

// TestStockProgramAfterPasswordChange: the real program, with the new password.
func TestStockProgramAfterPasswordChange(t *testing.T) {
	kopia := stockKopia(t) // with password
	dir := t.TempDir()
	r := create(t, with(config(dir), newPassword))
	require.NoError(t, r.Close())
	_, err := changePassword(context.Background(), with(config(dir), newPassword), password)
	require.NoError(t, err)
	kopia("repository", "connect", "filesystem", "--path", dir, "--override-hostname", "holdfast", "--override-username", "backup", "--readonly")
	kopia("snapshot", "list", "--all")
	kopia("maintenance", "info")
}
