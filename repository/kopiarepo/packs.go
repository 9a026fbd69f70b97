package kopiarepo

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"

	"github.com/holdfast-backup/holdfast/repository"
)

// Each point has a list of the packs that it needs, beside its record, so that
// maintenance, which moves data between packs, can renew it.

type packsHeader struct {
	Chain string `json:"chain"`
	Count int    `json:"count"`
}

func sortedPacks(set map[blob.ID]bool) []blob.ID { return slices.Sorted(maps.Keys(set)) }

func (r *Repository) writePacks(ctx context.Context, chain string, id repository.PointID, packs []blob.ID) (sum, error) {
	b, err := json.Marshal(packs)
	if err != nil {
		return sum{}, err
	}
	return r.own.put(ctx, typePacks, packsDir+"/"+string(id), packsHeader{chain, len(packs)}, deflate(b))
}

// chainOf returns the chain of a point by its list of packs; empty if unknown.
func (r *Repository) chainOf(ctx context.Context, id repository.PointID) string {
	c, err := r.own.get(ctx, typePacks, packsDir+"/"+string(id), nil)
	var h packsHeader
	if err != nil || json.Unmarshal(c.header, &h) != nil || !validChain(h.Chain) {
		return ""
	}
	return h.Chain
}

// readPacks returns the list of a point; nil if it is lost.
func (r *Repository) readPacks(ctx context.Context, id repository.PointID) ([]blob.ID, error) {
	c, err := r.own.get(ctx, typePacks, packsDir+"/"+string(id), nil)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		r.cfg.Logger.Warn("the list of packs of a point is lost", "point", id, "error", err)
		return nil, nil
	}
	b, err := inflate(c.body, maxOwnFile)
	if err != nil {
		return nil, nil //nolint:nilerr // lost: the caller finds out anew
	}
	var out []blob.ID
	if json.Unmarshal(b, &out) != nil {
		return nil, nil
	}
	if out == nil {
		out = []blob.ID{}
	}
	return out, nil
}

// checkPacks returns ErrDamaged if a pack that the point needs is not stored in
// full. The list of a point may name packs that it no longer needs: only when one
// of the list is missing is it found out exactly.
func (r *Repository) checkPacks(ctx context.Context, t *tree) error {
	list, err := r.readPacks(ctx, t.e.ID)
	if err != nil {
		return err
	}
	if list != nil {
		if _, _, err = r.checkStored(ctx, list); err == nil {
			return nil
		}
		if !errors.Is(err, repository.ErrDamaged) {
			return err
		}
	}
	root, err := t.rootID()
	if err != nil {
		return err
	}
	for attempt := 0; ; attempt++ {
		exact, err := r.newWalker(t.dr).packs(ctx, root)
		if err != nil {
			err = damaged(ctx, err, fmt.Sprintf("point %s", t.e.ID))
		} else {
			err = errors.Join(r.takeIn(ctx, t.dr, sortedPacks(exact), attempt), ctx.Err())
			if err == nil {
				_, _, err = r.checkStored(ctx, sortedPacks(exact))
			}
		}
		if err == nil || !errors.Is(err, repository.ErrDamaged) || attempt == maxRereads {
			return err
		}
		// Maintenance of another process may have moved what was in them. The index
		// comes first: what it names, the inventory has.
		if err := errors.Join(t.dr.Refresh(ctx), r.inv.load(ctx)); err != nil {
			return err
		}
	}
}

// takeIn takes packs into the inventory that nobody has taken there: their writer makes
// them known to the engine first, and may have died before it came to it, or is about
// to. All that is in them is read. The first attempt leaves it to others.
func (r *Repository) takeIn(ctx context.Context, dr repo.DirectRepository, packs []blob.ID, attempt int) error {
	if attempt == 0 {
		return nil
	}
	unknown := slices.DeleteFunc(slices.Clone(packs), func(id blob.ID) bool {
		_, known := r.inv.lookup(string(id))
		return known || r.inv.wasDeleted(string(id))
	})
	if len(unknown) == 0 {
		return nil
	}
	bad, err := r.readPacksOf(ctx, dr, unknown)
	if err != nil {
		return err
	}
	for _, id := range unknown {
		if len(bad[id]) > 0 {
			continue // checkStored says that it is not known
		}
		if err := r.adopt(ctx, id); err != nil && !isAbsent(err) {
			return fmt.Errorf("blob %s: %w", id, err)
		}
	}
	return nil
}

const quarantineName = "quarantine"

// isQuarantined reports whether verification found the blob's bytes wrong.
func (r *Repository) isQuarantined(id blob.ID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.quarantine[id]
}

func (r *Repository) loadQuarantine(ctx context.Context) error {
	c, err := r.own.get(ctx, typePacks, quarantineName, func(a, b *candidate) *candidate {
		if cmp.Compare(len(a.body), len(b.body)) < 0 {
			return b
		}
		return a
	})
	if errors.Is(err, errAbsent) {
		return nil
	}
	if err != nil {
		if ctx.Err() != nil {
			return err
		}
		r.cfg.Logger.Warn("the list of damaged blobs is lost", "error", err)
		return nil
	}
	var list []blob.ID
	if err := json.Unmarshal(c.body, &list); err != nil {
		return nil //nolint:nilerr // as above
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.quarantine = map[blob.ID]bool{}
	for _, id := range list {
		r.quarantine[id] = true
	}
	return nil
}

// setQuarantine replaces the list of damaged blobs, if it changed.
func (r *Repository) setQuarantine(ctx context.Context, set map[blob.ID]bool) error {
	r.mu.Lock()
	same := maps.Equal(r.quarantine, set)
	if !same {
		r.quarantine = set
	}
	r.mu.Unlock()
	if same {
		return nil
	}
	b, err := json.Marshal(sortedPacks(set))
	if err != nil {
		return err
	}
	if _, err := r.own.put(ctx, typePacks, quarantineName, nil, b); err != nil {
		return err
	}
	return r.dir.sync(ctx)
}
