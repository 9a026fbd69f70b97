package kopiarepo

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/filesystem"
	"github.com/kopia/kopia/repo/format"

	"github.com/holdfast-backup/holdfast/repository"
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
	store := &blobStore{dir: newDirStore(dir, nil), inv: newInventory(nil, time.Now)}
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

// Adopt takes a stored blob into the inventory, and Protect writes that down.
func (r *Repository) Adopt(ctx context.Context, id string) error { return r.adopt(ctx, blob.ID(id)) }

// LoadInventory reads what is new in the inventory's log, and returns what of it is lost.
func (r *Repository) LoadInventory(ctx context.Context) ([]string, error) {
	err := r.inv.load(ctx)
	return r.inv.problems(), err
}

// Protect makes durable what is known.
func (r *Repository) Protect(ctx context.Context) error { return r.protect(ctx) }

// VerifyFile checks one stored file as Verify does, without opening the engine, and
// returns what it found; known is false for a file that protects nothing.
func (r *Repository) VerifyFile(ctx context.Context, name string) (found []repository.Damage, known bool, err error) {
	v := &verifier{
		r: r, all: true, opts: &repository.VerifyOptions{Level: repository.VerifyBlobs}, report: &repository.VerifyReport{},
		bad: map[blob.ID]bool{}, good: map[blob.ID]bool{},
	}
	own := strings.TrimPrefix(strings.TrimPrefix(name, primary), mirror)
	switch head, _, _ := strings.Cut(own, "/"); {
	case slices.Contains(slotNames[:], name):
		err = v.slots(ctx)
	case name == shardsFile:
		err = v.shards(ctx)
	case own == name || head == strings.TrimSuffix(copiesDir, "/"):
		return r.verifyBlob(ctx, v, name)
	case head == "records", head == "anchors":
		err = v.selectPoints(ctx)
	case head == strings.TrimSuffix(packsDir, "/"):
		err = v.pair(ctx, typePacks, own, false)
	case own == quarantineName:
		err = v.pair(ctx, typePacks, own, true)
	case own == formatName:
		err = v.format(ctx)
	case head == "notes":
		err = v.noteFiles(ctx)
	case head == inventoryDir, own == inventoryHead:
		err = v.inventoryFiles(ctx)
	default:
		return nil, false, nil
	}
	return v.report.Damages, true, err
}

func (r *Repository) verifyBlob(ctx context.Context, v *verifier, name string) ([]repository.Damage, bool, error) {
	for _, e := range r.inv.all() {
		files := append([]string{blobFile(blob.ID(e.Name))}, v.copies(e.Name)...)
		if !slices.Contains(files, name) {
			continue
		}
		d, err := v.blob(ctx, e)
		if d != nil {
			v.found(*d)
		}
		return v.report.Damages, true, err
	}
	return nil, false, nil
}
