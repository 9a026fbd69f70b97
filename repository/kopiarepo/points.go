package kopiarepo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"

	"github.com/kopia/kopia/repo/manifest"

	"github.com/holdfast-backup/holdfast/repository"
)

// Points lists points by chain, then by sequence. It does not open the engine.
func (r *Repository) Points(ctx context.Context, q repository.Query) iter.Seq2[*repository.Point, error] {
	return func(yield func(*repository.Point, error) bool) {
		if err := r.check(ctx); err != nil {
			yield(nil, err)
			return
		}
		names := []string{q.Chain}
		if q.Chain == "" {
			var err error
			if names, err = r.chains(ctx); err != nil {
				yield(nil, fmt.Errorf("list points: %w", err))
				return
			}
		} else if !validChain(q.Chain) {
			return
		}
		for _, name := range names {
			c, err := r.loadChain(ctx, name)
			if err != nil {
				yield(nil, fmt.Errorf("list points of chain %s: %w", name, err))
				return
			}
			if a := c.asAnchor(); a != nil && len(c.lost) == 0 {
				if err := r.client.remember(r.info.ID, name, a); err != nil {
					r.cfg.Logger.Warn("the client's anchor was not renewed", "error", err)
				}
			}
			for _, p := range c.listed() {
				// What cannot be read cannot be told not to match.
				if unknown := p.State != repository.Committed && p.Run == "" && p.Name == ""; !unknown && !q.Match(p) {
					continue
				}
				if !yield(p, nil) {
					return
				}
			}
		}
	}
}

// find returns the chain that a point is, or was, in.
func (r *Repository) find(ctx context.Context, id repository.PointID) (*chain, error) {
	if !validPoint(id) {
		return nil, fmt.Errorf("point %q: %w", id, repository.ErrNotFound)
	}
	names, err := r.chains(ctx)
	if err != nil {
		return nil, err
	}
	if likely := r.chainOf(ctx, id); likely != "" {
		names = append([]string{likely}, names...)
	}
	for _, name := range names {
		c, err := r.loadChain(ctx, name)
		if err != nil {
			return nil, err
		}
		if _, ok := c.dead[id]; ok {
			return c, nil
		}
		if _, ok := c.lostAt[id]; ok {
			return c, nil
		}
		if c.live[id] != nil {
			return c, nil
		}
	}
	return nil, fmt.Errorf("point %s: %w", id, repository.ErrNotFound)
}

// Open opens a committed point for reading.
func (r *Repository) Open(ctx context.Context, id repository.PointID) (repository.Reader, error) {
	if err := r.check(ctx); err != nil {
		return nil, err
	}
	c, err := r.find(ctx, id)
	if err != nil {
		return nil, err
	}
	e := c.live[id]
	if e == nil {
		for _, p := range c.lost {
			if p.ID == id {
				return nil, fmt.Errorf("point %s: %w: it is %s: %s", id, repository.ErrDamaged, p.State, p.Detail)
			}
		}
		return nil, fmt.Errorf("point %s: %w", id, repository.ErrNotFound)
	}
	t, err := r.openTree(ctx, e)
	if err != nil {
		return nil, err
	}
	return &reader{r: r, t: t}, nil
}

// Delete removes a point for good.
func (r *Repository) Delete(ctx context.Context, id repository.PointID, lock repository.Lock) error {
	if err := r.check(ctx); err != nil {
		return err
	}
	if err := holdsMaintenance(ctx, lock); err != nil {
		return fmt.Errorf("delete point %s: %w", id, err)
	}
	c, err := r.find(ctx, id)
	if err != nil {
		return err
	}
	if _, ok := c.dead[id]; ok {
		return nil
	}
	target := c.lostAt[id]
	var snapshotID string
	if e := c.live[id]; e != nil {
		target, snapshotID = e.ref(), e.body.Snapshot
	}
	// The deletion is recorded first: from then on the point is gone, and whatever
	// of it is left is for maintenance to remove.
	c, e, err := r.appendRecord(ctx, c.name, func(c *chain, h *recordHeader) ([]byte, error) {
		if err := lock.Check(ctx); err != nil {
			return nil, err
		}
		h.Kind, h.ID, h.Seq = kindDeleted, id, target.Seq
		h.Lock, h.Epoch = lock.Name(), lock.Epoch()
		return json.Marshal(&tombstone{Target: target, At: r.cfg.Clock().UTC()})
	})
	if err != nil {
		return fmt.Errorf("delete point %s: %w", id, err)
	}
	ref := e.ref()
	delete(c.live, id)
	delete(c.lostAt, id)
	c.advance(e.Log, &ref)
	if err := r.writeAnchor(ctx, c); err != nil {
		r.cfg.Logger.Warn("the anchor of a chain was not renewed", "chain", c.name, "error", err)
	}
	if err := r.removeRemains(ctx, c, id, target, snapshotID); err != nil {
		r.cfg.Logger.Warn("the remains of a deleted point are left to maintenance", "point", id, "error", err)
	}
	return nil
}

// removeRemains removes the files and the snapshot of a deleted point.
func (r *Repository) removeRemains(ctx context.Context, c *chain, id repository.PointID, target recordRef, snapshotID string) error {
	if err := r.own.removeNumbered(ctx, recordDir(c.name), target.Log, c.stored); err != nil {
		return err
	}
	if err := r.own.remove(ctx, packsDir+"/"+string(id)); err != nil {
		return err
	}
	if err := r.dir.sync(ctx); err != nil {
		return err
	}
	if snapshotID == "" {
		return nil
	}
	if err := r.dropSnapshots(ctx, []manifest.ID{manifest.ID(snapshotID)}); err != nil {
		return err
	}
	return errors.Join(r.protect(ctx), ctx.Err())
}
