package kopiarepo

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"github.com/kopia/kopia/repo/blob/filesystem"
	"github.com/kopia/kopia/repo/format"

	"github.com/holdfast-backup/holdfast/secret"
)

// FilesOpenedBy returns the files under dir that a password opens: key slots, and
// forms of the engine's two blobs.
func FilesOpenedBy(ctx context.Context, dir string, password secret.Secret) (out []string) {
	for _, name := range slotNames {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			continue
		}
		s := parseSlot(b)
		if s == nil {
			continue
		}
		gcm, err := s.aead(password)
		if err != nil {
			continue
		}
		if _, err := gcm.Open(nil, s.Wrapped[:gcm.NonceSize()], s.Wrapped[gcm.NonceSize():], s.aad()); err == nil {
			out = append(out, name)
		}
	}
	store := &blobStore{dir: newDirStore(dir, nil), inv: newInventory(nil)}
	var opens []byte
	tried := map[string]bool{}
	for _, file := range formsOf(format.KopiaRepositoryBlobID) {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			continue
		}
		ok, known := tried[string(b)]
		if !known {
			ok = openForms(ctx, store, b, nil, password) != nil
			tried[string(b)] = ok
		}
		if ok {
			out, opens = append(out, file), b
		}
	}
	if opens == nil {
		return out
	}
	for _, file := range formsOf(format.KopiaBlobCfgBlobID) {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err == nil && openForms(ctx, store, opens, b, password) != nil {
			out = append(out, file)
		}
	}
	return out
}

// StockOpens reports whether kopia, with its own storage of directories and
// nothing of ours, opens the format of a repository.
func StockOpens(ctx context.Context, dir string, password secret.Secret) bool {
	st, err := filesystem.New(ctx, &filesystem.Options{Path: dir}, false)
	if err != nil {
		return false
	}
	_, err = format.NewManager(ctx, st, "", time.Minute, password.Reveal(), time.Now)
	return err == nil
}
