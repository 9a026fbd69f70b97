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

// finishTimeout bounds how long a change that failed half-way is finished or
// undone.
const finishTimeout = time.Minute

// PasswordReport tells what a change of the password did.
type PasswordReport struct {
	// Changed is false if the repository had the new password already.
	Changed bool
	// Mended are files that an interrupted change had left with another password.
	Mended []string
}

// ChangePassword makes password the one that opens the repository, for Holdfast
// and for the stock program. What is stored stays as it is: the keys that encrypt
// it are random, and are wrapped anew. Whoever knows the old password and kept a
// copy of the repository's small files can still unwrap them.
//
// lock is the lock of maintenance, which the caller holds. Nothing may be written
// through this handle meanwhile; it works on with the new password. Other handles
// that are open cannot read for long, and must be opened anew.
//
// Killed at any moment, the repository opens with the old password or with the new
// one, or with both; the stock program opens it with one of them. Another call
// with the password that works finishes the change or undoes it. After an error
// that does not match repository.ErrOutcomeUnknown the old password is in force.
func (r *Repository) ChangePassword(ctx context.Context, lock repository.Lock, password secret.Secret) (*PasswordReport, error) {
	report, err := r.changePassword(ctx, lock, password)
	if err != nil {
		return nil, fmt.Errorf("change the password: %w", err)
	}
	return report, nil
}

func (r *Repository) changePassword(ctx context.Context, lock repository.Lock, password secret.Secret) (*PasswordReport, error) {
	if err := r.check(ctx); err != nil {
		return nil, err
	}
	if err := holdsMaintenance(ctx, lock); err != nil {
		return nil, err
	}
	if password.Empty() {
		return nil, fmt.Errorf("%w: the new password is empty", repository.ErrPassword)
	}
	r.maintaining.Lock()
	defer r.maintaining.Unlock()
	r.mu.Lock()
	writing := len(r.active)
	r.mu.Unlock()
	if writing > 0 {
		return nil, fmt.Errorf("%w: %d points are being written", repository.ErrLocked, writing)
	}
	if err := r.inv.load(ctx); err != nil {
		return nil, err
	}
	report := &PasswordReport{}
	// One change at a time: what an earlier one left would be lost in this one.
	old, err := r.settlePassword(ctx, lock)
	if err != nil {
		return nil, err
	}
	report.Mended = old.written
	if password.Equal(r.cfg.Password) {
		return report, nil
	}
	next, err := r.wrapAnew(ctx, old, password)
	if err != nil {
		return nil, err
	}
	if err := r.rewrap(ctx, lock, next); err != nil {
		if err := r.finishPassword(ctx, lock, old, next, err); err != nil {
			return nil, err
		}
	}
	report.Changed = true
	r.slot = next.slot
	if err := r.eng.usePassword(ctx, password); err != nil {
		r.cfg.Logger.Warn("the storage engine did not close well after a change of the password", "error", err)
	}
	return report, nil
}

// wrapping is everything that depends on the password.
type wrapping struct {
	slot    []byte
	blobs   map[blob.ID][]byte
	written []string // files that were changed to it
}

// settlePassword makes everything depend on the password of this handle that does.
func (r *Repository) settlePassword(ctx context.Context, lock repository.Lock) (*wrapping, error) {
	w := &wrapping{slot: r.slot, blobs: map[blob.ID][]byte{}}
	agreed := true
	for _, id := range passwordBlobs {
		e, known := r.inv.lookup(string(id))
		all, err := r.store.readForms(ctx, id)
		if err != nil {
			return nil, err
		}
		agreed = agreed && known && len(all) == 1 && sumOf(all[0].data) == e.Sum
		if len(all) > 0 {
			w.blobs[id] = all[0].data
		}
	}
	if !agreed {
		f, err := r.store.findForms(ctx, r.cfg.Password)
		if err != nil {
			return nil, err
		}
		if f == nil {
			return nil, fmt.Errorf("%w: %w", repository.ErrPassword, errChanging)
		}
		r.store.pin(f)
		for _, id := range passwordBlobs {
			delete(w.blobs, id)
			if x, ok := f[id]; ok {
				w.blobs[id] = x.data
			}
		}
	}
	return w, r.rewrap(ctx, lock, w)
}

// unsettled reports whether there is a key slot of another password. Files that
// are damaged do not count.
func (r *Repository) unsettled(ctx context.Context) (bool, error) {
	for _, name := range slotNames {
		b, err := r.dir.get(ctx, name, maxSlot)
		if err != nil {
			if ctx.Err() != nil {
				return false, err
			}
			continue
		}
		if s := parseSlot(b); s != nil && s.Repo == r.info.ID && !bytes.Equal(b, r.slot) {
			return true, nil
		}
	}
	return false, nil
}

// settle finishes, or undoes, what a change of the password that was interrupted
// left: this password works, so it stays.
func (m *maintainer) settle(ctx context.Context) error {
	mixed, err := m.r.unsettled(ctx)
	if err != nil || !mixed {
		return err
	}
	w, err := m.r.settlePassword(ctx, m.lock)
	if err != nil {
		return fmt.Errorf("finish an interrupted change of the password: %w", err)
	}
	m.note("a change of the password had been interrupted: %d files have the password in use again", len(w.written))
	return nil
}

// choosePassword makes the inventory vouch for what this handle's password opens,
// so that a repaired repository is of one password. It returns nil if there is no
// choice.
func (r *Repository) choosePassword(ctx context.Context) (forms, error) {
	mixed, err := r.unsettled(ctx)
	if err != nil {
		return nil, err
	}
	for _, id := range passwordBlobs {
		all, err := r.store.readForms(ctx, id)
		if err != nil {
			return nil, err
		}
		e, known := r.inv.lookup(string(id))
		mixed = mixed || len(all) > 1 || len(all) == 1 && known && sumOf(all[0].data) != e.Sum
	}
	if !mixed {
		return nil, nil
	}
	f, err := r.store.findForms(ctx, r.cfg.Password)
	if err != nil {
		return nil, err
	}
	if f == nil {
		// Damage, unless another password's forms are whole.
		_, err = r.store.pinForms(ctx, r.cfg.Password)
		return nil, err
	}
	r.store.pin(f)
	return f, nil
}

// wrapAnew makes what depends on the new password, as kopia would, and checks that
// it opens with that alone.
func (r *Repository) wrapAnew(ctx context.Context, old *wrapping, password secret.Secret) (*wrapping, error) {
	box := &formBox{Storage: r.store, blobs: map[blob.ID][]byte{}}
	for id, b := range old.blobs {
		box.blobs[id] = b
	}
	m, err := format.NewManager(ctx, box, "", time.Minute, r.cfg.Password.Reveal(), instant)
	if err != nil {
		return nil, fmt.Errorf("%w: the engine's own format: %w", repository.ErrDamaged, err)
	}
	if err := m.ChangePassword(ctx, password.Reveal()); err != nil {
		return nil, fmt.Errorf("the storage engine: %w", err)
	}
	w := &wrapping{blobs: box.blobs}
	if w.slot, err = newSlot(r.info.ID, r.keys.master, password, r.cfg.KDF, r.cfg.Rand); err != nil {
		return nil, err
	}
	if openForms(ctx, r.store, w.blobs[format.KopiaRepositoryBlobID], w.blobs[format.KopiaBlobCfgBlobID], password) == nil {
		return nil, errors.Join(errors.New("the storage engine's new format does not open"), ctx.Err())
	}
	return w, nil
}

// rewrap stores a wrapping, in an order in which at every moment, also when names
// that were not yet made durable are lost, one of the wrappings that were complete
// before stays so until this one is; and in which the engine's two blobs are never
// there under different passwords, as stock kopia leaves them when it is killed:
// it opens without the second.
func (r *Repository) rewrap(ctx context.Context, lock repository.Lock, w *wrapping) error {
	const repositoryBlob, configBlob = format.KopiaRepositoryBlobID, format.KopiaBlobCfgBlobID
	copyOf := func(i int) []string {
		return []string{copiesOf(configBlob)[i], copiesOf(repositoryBlob)[i]}
	}
	dataOf := func(file string) []byte {
		for _, id := range passwordBlobs {
			for _, f := range formsOf(id) {
				if f == file {
					return w.blobs[id]
				}
			}
		}
		return w.slot
	}
	put := func(files ...string) error {
		dirty := false
		for _, file := range files {
			data := dataOf(file)
			if data == nil || r.own.holds(ctx, file, data) {
				continue
			}
			dirty = true
			w.written = append(w.written, file)
			if err := r.dir.putBytes(ctx, file, data); err != nil {
				return err
			}
		}
		if !dirty {
			return nil
		}
		return r.dir.sync(ctx)
	}
	steps := []func() error{
		func() error { return put(copyOf(0)...) },
		func() error { return put(slotNames[2]) },
		func() error { return lock.Check(ctx) },
		func() error {
			if r.own.holds(ctx, blobFile(repositoryBlob), w.blobs[repositoryBlob]) {
				return nil
			}
			if err := r.dir.remove(ctx, blobFile(configBlob)); err != nil {
				return err
			}
			return r.dir.sync(ctx)
		},
		func() error { return put(blobFile(repositoryBlob)) },
		func() error { return put(blobFile(configBlob)) },
		func() error { return r.vouch(ctx, w) },
		func() error { return lock.Check(ctx) },
		func() error { return put(slotNames[0], slotNames[1]) },
		func() error { return put(copyOf(1)...) },
	}
	for _, step := range steps {
		if err := errors.Join(ctx.Err(), step()); err != nil {
			return err
		}
	}
	r.store.forgetSource()
	return nil
}

// vouch makes the inventory know the blobs of a wrapping.
func (r *Repository) vouch(ctx context.Context, w *wrapping) error {
	for id, data := range w.blobs {
		if e, ok := r.inv.lookup(string(id)); !ok || e.Sum != sumOf(data) {
			r.inv.added(blobEntry{Name: string(id), Size: int64(len(data)), Sum: sumOf(data), Time: r.cfg.Clock().Unix()})
		}
	}
	return r.inv.flush(ctx, false)
}

// finishPassword ends a change that failed half-way: forward if the engine has the
// new password already, else back. It returns nil if the new password is in force
// and nothing is missing.
func (r *Repository) finishPassword(ctx context.Context, lock repository.Lock, old, next *wrapping, cause error) error {
	fctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), finishTimeout)
	defer cancel()
	unknown := func(err error) error {
		return fmt.Errorf("%w: it was interrupted: the old password or the new one opens the repository, "+
			"and another change with the one that does finishes it: %w", repository.ErrOutcomeUnknown, errors.Join(cause, err))
	}
	now, err := r.dir.get(fctx, blobFile(format.KopiaRepositoryBlobID), maxSlot)
	if err != nil {
		return unknown(err)
	}
	if bytes.Equal(now, next.blobs[format.KopiaRepositoryBlobID]) {
		if err := r.rewrap(fctx, lock, next); err != nil {
			return unknown(err)
		}
		return nil
	}
	if err := r.rewrap(fctx, lock, old); err != nil {
		return unknown(err)
	}
	return cause
}
