package fakes

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/repository"
)

// pinAge is how long a point may be in the making before maintenance gives it up.
const pinAge = 24 * time.Hour

func pinName(started time.Time, id repository.PointID) string {
	return fmt.Sprintf("%s%016x.%s", prefixPin, started.UnixMilli(), id)
}

// pinStarted reads the time in the name of a pin, which is there even if the pin
// was torn or damaged.
func pinStarted(name string) (time.Time, bool) {
	num, _, ok := strings.Cut(strings.TrimPrefix(name, prefixPin), ".")
	ms, err := strconv.ParseInt(num, 16, 64)
	return time.UnixMilli(ms), ok && err == nil
}

func checkMaintenance(ctx context.Context, lock repository.Lock) error {
	if lock == nil || lock.Name() != repository.LockMaintenance {
		return fmt.Errorf("it needs the lock %q", repository.LockMaintenance)
	}
	return lock.Check(ctx)
}

// Delete implements repository.Repository.
func (r *Repository) Delete(ctx context.Context, id repository.PointID, lock repository.Lock) error {
	if err := r.begin(ctx); err != nil {
		return err
	}
	if err := checkMaintenance(ctx, lock); err != nil {
		return fmt.Errorf("delete %s: %w", id, err)
	}
	sc, err := r.scan(ctx, "")
	if err != nil {
		return fmt.Errorf("delete %s: %w", id, err)
	}
	at, dead := sc.dead[id]
	if !dead {
		sp := sc.find(id)
		if sp == nil {
			return fmt.Errorf("delete %s: %w", id, repository.ErrNotFound)
		}
		at = sp.place
		name := at.blob(prefixTomb)
		raw, err := r.seal(name, &tombstone{
			ID: id, Chain: at.chain, Sequence: at.seq, Epoch: lock.Epoch(), Known: sc.testimony(at.chain, id),
		})
		if err != nil {
			return err
		}
		if err := r.conn.put(ctx, name, raw, r.heldBy(lock)); err != nil {
			return fmt.Errorf("delete %s: %w", id, err)
		}
	}
	if err := r.conn.del(ctx, at.blob(prefixRecord), r.heldBy(lock)); err != nil {
		return fmt.Errorf("delete %s: %w", id, err)
	}
	return nil
}

// Maintain implements repository.Repository. It removes content that no record
// and no pin needs, by mark and sweep, and is always due. While a record or map
// cannot be read it removes nothing, since it cannot know what that one needs.
func (r *Repository) Maintain(ctx context.Context, lock repository.Lock, _ *repository.MaintainOptions) (*repository.MaintainReport, error) {
	if err := r.begin(ctx); err != nil {
		return nil, err
	}
	if err := checkMaintenance(ctx, lock); err != nil {
		return nil, fmt.Errorf("maintain: %w", err)
	}
	rep, err := r.maintain(ctx, lock)
	if err != nil {
		return nil, fmt.Errorf("maintain: %w", err)
	}
	return rep, nil
}

func (r *Repository) maintain(ctx context.Context, lock repository.Lock) (*repository.MaintainReport, error) {
	rep := &repository.MaintainReport{Ran: true}
	// The order matters. Content is listed first: what is stored or touched later
	// has another generation and is not deleted. Pins come before records: a point
	// whose pin is gone has its record already, or never will.
	var content []storeEntry
	for _, prefix := range []string{prefixBlock, prefixMap, prefixDisk, prefixFile} {
		entries, err := r.conn.list(ctx, prefix)
		if err != nil {
			return nil, err
		}
		content = append(content, entries...)
	}
	for _, e := range content {
		rep.BlobsBefore++
		rep.BytesBefore += e.size
	}
	rep.BlobsAfter, rep.BytesAfter = rep.BlobsBefore, rep.BytesBefore

	m := &marker{r: r, live: map[string]bool{}, since: int64(1)<<62 - 1}
	if err := m.pins(ctx, lock); err != nil {
		return nil, err
	}
	sc, err := r.scan(ctx, "")
	if err != nil {
		return nil, err
	}
	for _, name := range sc.strays {
		if err := r.conn.del(ctx, name, r.heldBy(lock)); err != nil {
			return nil, err
		}
	}
	for i := range sc.points {
		if err := m.point(ctx, &sc.points[i]); err != nil {
			return nil, err
		}
	}
	rep.Notes = m.blockers
	if len(m.blockers) > 0 {
		return rep, nil
	}
	for _, e := range content {
		if m.live[e.name] || e.gen >= m.since {
			continue
		}
		gone, err := r.sweep(ctx, e, lock)
		if err != nil {
			return nil, err
		}
		if gone {
			rep.BlobsAfter--
			rep.BytesAfter -= e.size
		}
	}
	return rep, nil
}

// sweep deletes a blob unless it was touched since it was listed.
func (r *Repository) sweep(ctx context.Context, e storeEntry, lock repository.Lock) (bool, error) {
	err := r.conn.del(ctx, e.name, allOf(r.heldBy(lock), func(v storeView) error {
		if b, ok := v.s.blobs[e.name]; ok && b.gen != e.gen {
			return errMoved
		}
		return nil
	}))
	if errors.Is(err, errMoved) {
		return false, nil
	}
	return err == nil, err
}

// marker collects what is needed.
type marker struct {
	r        *Repository
	live     map[string]bool
	since    int64 // generation of the oldest pin: what is younger stays
	blockers []string
}

// pins marks what points in the making inherit, and gives up those that are too
// old.
func (m *marker) pins(ctx context.Context, lock repository.Lock) error {
	entries, err := m.r.conn.list(ctx, prefixPin)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if started, ok := pinStarted(e.name); !ok || m.r.clock().Sub(started) > pinAge {
			if err := m.r.conn.del(ctx, e.name, m.r.heldBy(lock)); err != nil {
				return err
			}
			continue
		}
		m.since = min(m.since, e.gen)
		raw, err := m.r.conn.get(ctx, e.name)
		if errors.Is(err, errNoBlob) {
			continue // ended since it was listed
		}
		if err != nil {
			return err
		}
		var p pin
		if err := m.r.unseal(e.name, raw, &p); err != nil {
			m.block(e.name, err)
			continue
		}
		for _, ref := range p.Maps {
			if err := m.segment(ctx, ref); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *marker) block(what string, err error) {
	m.blockers = append(m.blockers, fmt.Sprintf("nothing was removed, since %s cannot be read: %v", what, err))
}

func (m *marker) point(ctx context.Context, sp *scannedPoint) error {
	if sp.rec == nil {
		m.block("point "+string(sp.place.id), errors.New(sp.point.Detail))
		return nil
	}
	for _, f := range sp.rec.Files {
		m.live[f.Blob.Name] = true
	}
	for _, d := range sp.rec.Disks {
		m.live[d.Manifest.Name] = true
		man, err := m.r.loadManifest(ctx, d.Manifest)
		if errors.Is(err, repository.ErrDamaged) {
			m.block("point "+string(sp.place.id), err)
			continue
		}
		if err != nil {
			return err
		}
		for _, s := range man.Segments {
			if err := m.segment(ctx, s.Map); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *marker) segment(ctx context.Context, ref blobRef) error {
	if m.live[ref.Name] {
		return nil
	}
	m.live[ref.Name] = true
	seg, err := m.r.loadSegment(ctx, segmentRef{Map: ref}, maxSegmentBlocks)
	if errors.Is(err, repository.ErrDamaged) {
		m.block("map "+ref.Name, err)
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range seg {
		m.live[e.ref().Name] = true
	}
	return nil
}
