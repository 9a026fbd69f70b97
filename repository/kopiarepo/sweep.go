package kopiarepo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/snapshot"

	"github.com/holdfast-backup/holdfast/repository"
)

// allChains loads every chain.
func (r *Repository) allChains(ctx context.Context) ([]*chain, error) {
	names, err := r.chains(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]*chain, 0, len(names))
	for _, name := range names {
		c, err := r.loadChain(ctx, name)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// finishDeletes removes what is left of deleted points, and what runs that died
// made known to kopia.
func (m *maintainer) finishDeletes(ctx context.Context) error {
	r := m.r
	chains, err := r.allChains(ctx)
	if err != nil {
		return err
	}
	keep := map[repository.PointID]bool{}
	dead := map[repository.PointID]bool{}
	for _, c := range chains {
		for id := range c.live {
			keep[id] = true
		}
		for id := range c.lostAt {
			keep[id] = true
		}
		for id, ref := range c.dead {
			dead[id] = true
			if c.stored.primary[ref.Log] || len(c.stored.mirror[ref.Log]) > 0 {
				if err := m.lock.Check(ctx); err != nil {
					return err
				}
				if err := r.removeRemains(ctx, c, id, ref, ""); err != nil {
					return err
				}
			}
		}
	}
	ids, err := m.orphanSnapshots(ctx, keep, dead)
	if err != nil {
		return err
	}
	if len(ids) > 0 {
		if err := m.lock.Check(ctx); err != nil {
			return err
		}
		if err := r.dropSnapshots(ctx, ids); err != nil {
			return err
		}
		m.note("%d snapshots of deleted points or of runs that died were dropped", len(ids))
	}
	return m.sweepPacks(ctx, keep, dead)
}

// orphanSnapshots finds snapshots of ours that no record explains.
func (m *maintainer) orphanSnapshots(ctx context.Context, keep, dead map[repository.PointID]bool) ([]manifest.ID, error) {
	all, err := snapshot.ListSnapshotManifests(ctx, m.dr, nil, nil)
	if err != nil {
		return nil, err
	}
	list, err := snapshot.LoadSnapshots(ctx, m.dr, all)
	if err != nil {
		return nil, err
	}
	now := m.r.cfg.Clock()
	var out []manifest.ID
	for _, s := range list {
		id := repository.PointID(s.Tags[tagPoint])
		if id == "" || m.r.isActive(id) {
			continue // somebody else's, or being written right now
		}
		complete := s.Tags[tagKind] == kindComplete
		young := now.Sub(s.EndTime.ToTime()) < orphanAge
		if complete && keep[id] || !keep[id] && !dead[id] && young {
			continue
		}
		out = append(out, s.ID)
	}
	return out, nil
}

func (r *Repository) isActive(id repository.PointID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.active[id]
}

// sweepPacks removes lists of packs of points that are no more.
func (m *maintainer) sweepPacks(ctx context.Context, keep, dead map[repository.PointID]bool) error {
	now := m.r.cfg.Clock()
	for _, prefix := range []string{mirror, primary} {
		entries, err := m.r.dir.list(ctx, prefix+packsDir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			id := repository.PointID(e.Name())
			if keep[id] || m.r.isActive(id) {
				continue
			}
			info, err := e.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			if dead[id] || now.Sub(info.ModTime()) > orphanAge {
				if err := m.r.dir.remove(ctx, prefix+packsDir+"/"+e.Name()); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// renew brings the lists of packs, the inventory and the copies up to date.
func (m *maintainer) renew(ctx context.Context) error {
	r := m.r
	if err := m.dr.Refresh(ctx); err != nil {
		return err
	}
	needed, err := m.renewPacks(ctx)
	if err != nil {
		return fmt.Errorf("lists of packs: %w", err)
	}
	if err := m.adoptUnknown(ctx, needed); err != nil {
		return fmt.Errorf("inventory: %w", err)
	}
	r.mu.Lock()
	r.copied = map[string]sum{} // look at every copy
	r.mu.Unlock()
	if err := r.protect(ctx); err != nil {
		return err
	}
	if err := m.settle(ctx); err != nil {
		return err
	}
	if err := r.renewOwn(ctx); err != nil {
		return fmt.Errorf("copies of records: %w", err)
	}
	if len(r.inv.problems()) == 0 {
		if err := m.sweepCopies(ctx); err != nil {
			return err
		}
	}
	if err := r.inv.flush(ctx, true); err != nil {
		return err
	}
	if err := r.inv.forget(ctx); err != nil {
		return err
	}
	if err := r.dir.removeTemps(ctx, orphanAge); err != nil {
		return err
	}
	return r.dir.sync(ctx)
}

// renewPacks finds out exactly which packs each point needs now.
func (m *maintainer) renewPacks(ctx context.Context) (map[blob.ID]bool, error) {
	r := m.r
	chains, err := r.allChains(ctx)
	if err != nil {
		return nil, err
	}
	needed := map[blob.ID]bool{}
	v := r.newWalker(m.dr)
	for _, c := range chains {
		for _, e := range c.live {
			set, err := m.packsOf(ctx, v, e)
			if err != nil {
				if ctx.Err() != nil {
					return nil, err
				}
				m.note("point %s cannot be walked, and may keep space from being given back: %v", e.ID, err)
				continue
			}
			maps.Copy(needed, set)
			exact := sortedPacks(set)
			old, err := r.readPacks(ctx, e.ID)
			if err != nil {
				return nil, err
			}
			if old == nil || !slices.Equal(old, exact) {
				if _, err := r.writePacks(ctx, c.name, e.ID, exact); err != nil {
					return nil, err
				}
			}
		}
	}
	return needed, nil
}

func (m *maintainer) packsOf(ctx context.Context, v *walker, e *entry) (map[blob.ID]bool, error) {
	t, err := m.r.openTree(ctx, e)
	if err != nil {
		return nil, err
	}
	root, err := t.rootID()
	if err != nil {
		return nil, err
	}
	return v.packs(ctx, root)
}

// adoptUnknown takes blobs into the inventory that points or the engine need and
// that nobody told us about. Packs are taken only if all of them can be read.
func (m *maintainer) adoptUnknown(ctx context.Context, needed map[blob.ID]bool) error {
	var unknown []blob.ID
	err := m.r.store.walk(ctx, "", func(bm blob.Metadata) error {
		if _, known := m.r.inv.lookup(string(bm.BlobID)); known || !inventoried(string(bm.BlobID)) {
			return nil
		}
		if needed[bm.BlobID] || isEngineBlob(bm.BlobID) {
			unknown = append(unknown, bm.BlobID)
		}
		return nil
	})
	if err != nil || len(unknown) == 0 {
		return err
	}
	bad, err := m.r.readPacksOf(ctx, m.dr, unknown)
	if err != nil {
		return err
	}
	for _, id := range unknown {
		if len(bad[id]) > 0 {
			m.note("blob %s is needed, but %d of its contents cannot be read", id, len(bad[id]))
			continue
		}
		if err := m.r.adopt(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// isEngineBlob reports whether kopia itself needs the blob.
func isEngineBlob(id blob.ID) bool {
	return strings.HasPrefix(string(id), "x") || strings.HasPrefix(string(id), "kopia.")
}

// sweepCopies removes copies of blobs that are no more. A writer makes the copy before
// it makes the blob known, so what is new is left alone.
func (m *maintainer) sweepCopies(ctx context.Context) error {
	for _, prefix := range []string{mirror, primary} {
		entries, err := m.r.dir.list(ctx, prefix+copiesDir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if _, live := m.r.inv.lookup(e.Name()); live {
				continue
			}
			if info, err := e.Info(); err != nil || m.r.cfg.Clock().Sub(info.ModTime()) < orphanAge {
				continue
			}
			if err := m.r.dir.remove(ctx, prefix+copiesDir+"/"+e.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

// renewOwn writes copies of our own files that are missing or damaged. The files
// themselves are left as they are: what is damaged in place is for repair.
func (r *Repository) renewOwn(ctx context.Context) error {
	for i, name := range slotNames {
		if i == 0 {
			continue
		}
		if b, err := r.dir.get(ctx, name, maxSlot); err == nil && string(b) == string(r.slot) {
			continue
		}
		if err := r.dir.putBytes(ctx, name, r.slot); err != nil {
			return err
		}
	}
	chains, err := r.allChains(ctx)
	if err != nil {
		return err
	}
	for _, c := range chains {
		if err := r.renewChain(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// renewChain writes copies of trusted records that lack one, and the anchor.
// Copies that stand for no record are removed.
func (r *Repository) renewChain(ctx context.Context, c *chain) error {
	dir := recordDir(c.name)
	for n, trusted := range c.trusted {
		b, err := r.dir.get(ctx, primary+dir+"/"+number(n), maxOwnFile)
		if err != nil || sumOf(b) != trusted {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			continue
		}
		want := mirrorNumbered(dir, n, trusted)
		if !r.own.holds(ctx, want, b) {
			if err := r.dir.putBytes(ctx, want, b); err != nil {
				return err
			}
		}
		for _, name := range c.stored.mirror[n] {
			if name != want {
				if err := r.dir.remove(ctx, name); err != nil {
					return err
				}
			}
		}
	}
	if len(c.issues) > 0 && c.head != nil {
		return r.writeAnchor(ctx, c)
	}
	return nil
}
