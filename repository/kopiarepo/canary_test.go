package kopiarepo_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
	"github.com/holdfast-backup/holdfast/secret"
	"github.com/holdfast-backup/holdfast/secret/secrettest"
)

// TestCanariesStayInside uses passwords that occur nowhere else with every call of
// the package, well and badly, and then looks for them in what was logged, in
// errors, in printed values, in temporary files while they are there, in the
// client's memory and in every byte of the repository.
func TestCanariesStayInside(t *testing.T) {
	ctx := context.Background()
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	work := t.TempDir()
	const first, second, wrong = `canary one +/"& 7f3a`, `canary two +/"& 91bc`, `canary wrong +/"& 55de`
	canaries := []secrettest.Canary{secrettest.New("the password", first), secrettest.New("the new password", second), secrettest.New("the wrong password", wrong)}
	clean := func(where string, data any) {
		t.Helper()
		text := fmt.Sprintf("%v %+v %#v %s %x", data, data, data, data, data)
		if b, err := json.Marshal(data); err == nil {
			text += string(b)
		}
		require.Empty(t, secrettest.Search(where, []byte(text), canaries...))
	}
	var logged bytes.Buffer
	var found []string
	var mu sync.Mutex
	cfg := kopiarepo.Config{
		Dir: filepath.Join(work, "store"), Password: secret.New(first), KDF: cheapKDF, Reserve: -1,
		AnchorFile: filepath.Join(work, "anchors.json"),
		Logger:     slog.New(slog.NewJSONHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug})),
		StorageHook: func(_ context.Context, op kopiarepo.StorageOp) (func(error) error, error) {
			mu.Lock()
			defer mu.Unlock()
			more, err := secrettest.Tree(temp, canaries...) // the connection file is there but for a moment
			found = append(found, more...)
			return nil, err
		},
	}
	cfg.Logger.Debug("configuration", "config", cfg, "password", cfg.Password)
	clean("a configuration", cfg)

	r := create(t, cfg)
	m := newImage(2*mib, mib)
	m.fill(seed(t), 0)
	proof, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{chain: "vm", run: "r1", files: map[string][]byte{"nvram": []byte("x")}})
	require.NoError(t, err)
	clean("a proof", proof.Point())
	_, err = r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(t, err)
	lock, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{Holder: "canary test"})
	require.NoError(t, err)
	clean("a handle", r)
	report, err := r.ChangePassword(ctx, lock, secret.New(second))
	require.NoError(t, err)
	clean("a report", report)
	_, err = r.Maintain(ctx, lock, &repository.MaintainOptions{Full: true})
	require.NoError(t, err)
	require.NoError(t, r.Close())

	wrongly := cfg
	wrongly.Password = secret.New(wrong)
	for _, c := range []kopiarepo.Config{wrongly, cfg} { // cfg has the old one
		_, err = kopiarepo.Open(ctx, c)
		require.ErrorIs(t, err, repository.ErrPassword)
		clean("an error", err)
		_, err = kopiarepo.Repair(ctx, c, filepath.Join(work, "no"))
		require.ErrorIs(t, err, repository.ErrPassword)
		clean("an error", err)
	}
	cfg.Password = secret.New(second)
	_, err = kopiarepo.Create(ctx, cfg)
	require.ErrorIs(t, err, repository.ErrExists)
	clean("an error", err)
	rep, err := kopiarepo.Repair(ctx, cfg, filepath.Join(work, "repaired"))
	require.NoError(t, err)
	clean("a report", rep)
	// The engine does not open: its error names everything but the password.
	for _, id := range []string{"kopia.repository.f", "holdfast/copies/kopia.repository", "holdfast-2/copies/kopia.repository"} {
		require.NoError(t, os.WriteFile(filepath.Join(cfg.Dir, id), []byte("{}"), 0o600))
	}
	r = open(t, cfg)
	err = compare(ctx, r, proof.Point().ID, map[string]*image{"d": m})
	require.ErrorIs(t, err, repository.ErrDamaged)
	clean("an error", err)

	require.NotEmpty(t, logged.String())
	require.Contains(t, logged.String(), "[secret]")
	require.Empty(t, secrettest.Search("the log", logged.Bytes(), canaries...))
	require.Empty(t, found, "temporary files")
	for _, dir := range []string{work, temp} {
		more, err := secrettest.Tree(dir, canaries...)
		require.NoError(t, err)
		require.Empty(t, more)
	}
	left, err := os.ReadDir(temp)
	require.NoError(t, err)
	for _, e := range left {
		require.False(t, strings.HasPrefix(e.Name(), "holdfast-repository-"), "a connection file was left")
	}

	// The search itself bites: a leak into the repository, and one into the log.
	require.NoError(t, os.WriteFile(filepath.Join(cfg.Dir, "leak"), []byte("p="+cfg.Password.Reveal()), 0o600))
	more, err := secrettest.Tree(work, canaries...)
	require.NoError(t, err)
	require.Len(t, more, 1)
	cfg.Logger.Error("planted", "password", cfg.Password.Reveal())
	require.NotEmpty(t, secrettest.Search("the log", logged.Bytes(), canaries...))
}
