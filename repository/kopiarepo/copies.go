package kopiarepo

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/kopia/kopia/repo/blob"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/repository"
)

// replicate gives every critical blob that should be stored its copies. What was
// copied before by this handle is not looked at again.
func (r *Repository) replicate(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for _, e := range r.inv.all() {
		if !critical(e.Name) || r.isCopied(e) {
			continue
		}
		g.Go(func() error {
			ok, err := r.copyBlob(gctx, e)
			if err != nil || !ok {
				return err
			}
			r.mu.Lock()
			r.copied[e.Name] = e.Sum
			r.mu.Unlock()
			return nil
		})
	}
	return g.Wait()
}

func (r *Repository) isCopied(e blobEntry) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.copied[e.Name] == e.Sum
}

// copyBlob writes the copies that are missing or differ from what the inventory
// says, from a source that does not.
func (r *Repository) copyBlob(ctx context.Context, e blobEntry) (bool, error) {
	id := blob.ID(e.Name)
	var good []byte
	var missing []string
	var unread error
	for _, file := range append([]string{blobFile(id)}, copiesOf(id)...) {
		b, err := r.dir.get(ctx, file, maxSmallBlob)
		if err != nil && ctx.Err() != nil {
			return false, err
		}
		if err != nil && !isAbsent(err) && !errors.Is(err, repository.ErrDamaged) {
			unread = errors.Join(unread, err)
		}
		switch {
		case err == nil && sumOf(b) == e.Sum:
			good = b
		case file != blobFile(id):
			missing = append(missing, file)
		}
	}
	if good == nil && unread != nil {
		return false, unread
	}
	if good == nil {
		// The blob was replaced or deleted by somebody else, or is lost: that is
		// for verification to say. A new point does not depend on it unless the
		// check of what it needs says so.
		if isPasswordBlob(e.Name) {
			r.store.unpin(e.Name)
		}
		r.cfg.Logger.Warn("no good form of a blob is left to copy", "blob", e.Name)
		return false, nil
	}
	for _, file := range missing {
		if err := r.dir.putBytes(ctx, file, good); err != nil {
			return false, err
		}
	}
	return true, nil
}

// stored looks at one blob: whether it is there with the size that the inventory
// knows. An unknown blob is reported as such.
func (r *Repository) stored(ctx context.Context, id blob.ID) (size int64, known bool, err error) {
	e, known := r.inv.lookup(string(id))
	size, _, err = r.dir.stat(ctx, blobFile(id))
	switch {
	case err != nil && ctx.Err() != nil:
		return 0, known, err
	case err != nil && critical(string(id)) && known && r.goodCopy(ctx, e) != nil:
		return e.Size, true, nil
	case err != nil:
		return 0, known, fmt.Errorf("%w: blob %s is missing: %w", repository.ErrDamaged, id, err)
	case known && size != e.Size && critical(string(id)) && r.goodCopy(ctx, e) != nil:
		return e.Size, true, nil
	case known && size != e.Size:
		return 0, known, fmt.Errorf("%w: blob %s has %d bytes, not %d", repository.ErrDamaged, id, size, e.Size)
	}
	return size, known, nil
}

// goodCopy returns the bytes of an undamaged copy, or nil.
func (r *Repository) goodCopy(ctx context.Context, e blobEntry) []byte {
	for _, file := range copiesOf(blob.ID(e.Name)) {
		if b, err := r.dir.get(ctx, file, maxSmallBlob); err == nil && sumOf(b) == e.Sum {
			return b
		}
	}
	return nil
}

// adopt takes a blob into the inventory that somebody stored without telling us:
// a writer that was killed, or the stock program. What is about to be deleted is not
// taken.
func (r *Repository) adopt(ctx context.Context, id blob.ID) error {
	if r.inv.wasDeleted(string(id)) {
		return nil
	}
	h := sha256.New()
	var size int64
	err := r.dir.readRange(ctx, blobFile(id), 0, -1, func(p []byte) error {
		size += int64(len(p))
		_, _ = h.Write(p)
		return nil
	})
	if err != nil {
		return err
	}
	_, mtime, err := r.dir.stat(ctx, blobFile(id))
	if err != nil {
		return err
	}
	r.inv.added(blobEntry{Name: string(id), Size: size, Sum: sum(h.Sum(nil)), Time: mtime.Unix()})
	return nil
}
