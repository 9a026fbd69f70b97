package kopiarepo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/format"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/secret"
)

// Two of kopia's blobs are encrypted with a key made of the password, and nothing
// else is. While a password is being changed, and after a change that was killed,
// some of their forms, the blob itself and its copies, open with the old password
// and some with the new one.

var passwordBlobs = [...]blob.ID{format.KopiaRepositoryBlobID, format.KopiaBlobCfgBlobID}

func isPasswordBlob(name string) bool {
	return name == format.KopiaRepositoryBlobID || name == format.KopiaBlobCfgBlobID
}

// formsOf returns the files that hold a blob and its copies.
func formsOf(id blob.ID) []string { return append([]string{blobFile(id)}, copiesOf(id)...) }

// forms are the two blobs as one password opens them.
type forms map[blob.ID]form

type form struct {
	file string // where it was read
	data []byte
}

// readForms returns the different forms of a blob that are stored, the one that
// the inventory knows first.
func (s *blobStore) readForms(ctx context.Context, id blob.ID) ([]form, error) {
	want, _ := s.inv.lookup(string(id))
	var out []form
	for _, file := range formsOf(id) {
		b, err := s.dir.get(ctx, file, maxSlot)
		if err != nil {
			if ctx.Err() != nil {
				return nil, err
			}
			continue
		}
		known := false
		for _, f := range out {
			known = known || bytes.Equal(f.data, b)
		}
		switch {
		case known:
		case sumOf(b) == want.Sum:
			out = append([]form{{file, b}}, out...)
		default:
			out = append(out, form{file, b})
		}
	}
	return out, nil
}

// findForms looks for forms that the password opens; nil if there are none. It
// costs one of kopia's key derivations for each form that it tries.
func (s *blobStore) findForms(ctx context.Context, password secret.Secret) (forms, error) {
	repositories, err := s.readForms(ctx, format.KopiaRepositoryBlobID)
	if err != nil {
		return nil, err
	}
	configs, err := s.readForms(ctx, format.KopiaBlobCfgBlobID)
	if err != nil {
		return nil, err
	}
	for _, r := range repositories {
		if openForms(ctx, s, r.data, nil, password) == nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			continue
		}
		for _, c := range configs {
			if openForms(ctx, s, r.data, c.data, password) != nil {
				return forms{format.KopiaRepositoryBlobID: r, format.KopiaBlobCfgBlobID: c}, nil
			}
		}
		// kopia opens without the other blob, which holds settings of object
		// stores. For a directory there are none.
		return forms{format.KopiaRepositoryBlobID: r}, nil
	}
	return nil, ctx.Err()
}

// openForms returns kopia's manager of the two blobs, or nil if the password does
// not open them. Without blobcfg, kopia goes by defaults.
func openForms(ctx context.Context, s *blobStore, repo, blobcfg []byte, password secret.Secret) *format.Manager {
	box := &formBox{Storage: s, blobs: map[blob.ID][]byte{format.KopiaRepositoryBlobID: repo}}
	if blobcfg != nil {
		box.blobs[format.KopiaBlobCfgBlobID] = blobcfg
	}
	m, err := format.NewManager(ctx, box, "", time.Minute, password.Reveal(), instant)
	if err != nil {
		return nil
	}
	return m
}

// instant is the clock of a manager that lives for one: its cache never expires.
func instant() time.Time { return time.Unix(0, 0) }

// formBox shows kopia's format manager nothing but the two blobs, in memory.
type formBox struct {
	blob.Storage // for what the manager does not use

	blobs map[blob.ID][]byte
}

// GetBlob implements blob.Storage.
func (b *formBox) GetBlob(_ context.Context, id blob.ID, offset, length int64, out blob.OutputBuffer) error {
	data, ok := b.blobs[id]
	switch {
	case !ok:
		return blob.ErrBlobNotFound
	case offset != 0 || length >= 0:
		return blob.ErrInvalidRange
	}
	out.Reset()
	_, err := out.Write(data)
	return err
}

// PutBlob implements blob.Storage.
func (b *formBox) PutBlob(_ context.Context, id blob.ID, data blob.Bytes, _ blob.PutOptions) error {
	var out bytes.Buffer
	if _, err := data.WriteTo(&out); err != nil {
		return err
	}
	b.blobs[id] = out.Bytes()
	return nil
}

// DeleteBlob implements blob.Storage.
func (b *formBox) DeleteBlob(context.Context, blob.ID) error { return errDelete }

// pin makes the store serve these forms, and the inventory, once it is flushed,
// vouch for them.
func (s *blobStore) pin(f forms) {
	for _, id := range passwordBlobs {
		x, ok := f[id]
		s.mu.Lock()
		if ok {
			s.source[id] = x.file
		} else {
			delete(s.source, id)
		}
		s.mu.Unlock()
		if e, known := s.inv.lookup(string(id)); ok && (!known || e.Sum != sumOf(x.data)) {
			s.inv.added(blobEntry{Name: string(id), Size: int64(len(x.data)), Sum: sumOf(x.data), Time: e.Time})
		}
	}
}

// unpin forgets what pin noted of a blob of which that form is gone: somebody else
// has finished the change of the password.
func (s *blobStore) unpin(name string) {
	s.inv.mu.Lock()
	delete(s.inv.pending, name)
	s.inv.mu.Unlock()
}

// errChanging explains why a password opens a key slot and nothing else.
var errChanging = errors.New("a change of the password was interrupted, and this is not the one in force; " +
	"try the other one, and change the password once more")

// pinForms is what to do when kopia does not open although a key slot took the
// password. It reports whether it is worth trying again.
func (s *blobStore) pinForms(ctx context.Context, password secret.Secret) (bool, error) {
	f, err := s.findForms(ctx, password)
	if err != nil {
		return false, err
	}
	if f == nil {
		// Wrong password or damage? kopia calls both a wrong password.
		all, err := s.readForms(ctx, format.KopiaRepositoryBlobID)
		if err != nil {
			return false, err
		}
		e, known := s.inv.lookup(format.KopiaRepositoryBlobID)
		for _, x := range all {
			if known && sumOf(x.data) == e.Sum {
				return false, fmt.Errorf("%w: %w", repository.ErrPassword, errChanging)
			}
		}
		return false, nil
	}
	before := s.sources()
	s.pin(f)
	after := s.sources()
	return before != after, nil
}

// sources tells which files the two blobs are served from.
func (s *blobStore) sources() (out [len(passwordBlobs)]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, id := range passwordBlobs {
		out[i] = s.source[id]
		if out[i] == "" {
			out[i] = blobFile(id)
		}
	}
	return out
}
