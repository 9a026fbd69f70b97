package fakes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/repository"
)

const (
	prefixRecord = "records/"
	prefixTomb   = "tombs/"
	prefixPin    = "pins/"
)

// pointRecord is the sealed blob whose put commits a point.
type pointRecord struct {
	ID       repository.PointID `json:"id"`
	Chain    string             `json:"chain"`
	Name     string             `json:"name"`
	Run      string             `json:"run"`
	Sequence int64              `json:"sequence"`
	Parent   repository.PointID `json:"parent,omitempty"`
	Epoch    int64              `json:"epoch"`
	Created  time.Time          `json:"created"`
	Labels   map[string]string  `json:"labels,omitempty"`
	Meta     []byte             `json:"meta,omitempty"`
	Disks    []diskRecord       `json:"disks,omitempty"`
	Files    []fileRecord       `json:"files,omitempty"`
	Known    []knownPoint       `json:"known,omitempty"`
}

type diskRecord struct {
	Disk     repository.Disk `json:"disk"`
	Manifest blobRef         `json:"manifest"`
}

type fileRecord struct {
	Name string  `json:"name"`
	Blob blobRef `json:"blob"`
}

// knownPoint is what later records and tombstones of a chain testify of a point
// that was there when they were made.
type knownPoint struct {
	ID       repository.PointID `json:"id"`
	Name     string             `json:"name"`
	Run      string             `json:"run"`
	Sequence int64              `json:"sequence"`
	Created  time.Time          `json:"created"`
	Record   repository.Digest  `json:"record"`
}

// tombstone is the sealed blob that makes a deletion legitimate.
type tombstone struct {
	ID       repository.PointID `json:"id"`
	Chain    string             `json:"chain"`
	Sequence int64              `json:"sequence"`
	Epoch    int64              `json:"epoch"`
	Known    []knownPoint       `json:"known,omitempty"`
}

func (rec *pointRecord) point() *repository.Point {
	p := &repository.Point{
		ID: rec.ID, Chain: rec.Chain, Name: rec.Name, Run: rec.Run, Sequence: rec.Sequence,
		Parent: rec.Parent, Epoch: rec.Epoch, Created: rec.Created, Labels: maps.Clone(rec.Labels),
		Meta: slices.Clone(rec.Meta), State: repository.Committed,
	}
	for _, d := range rec.Disks {
		p.Disks = append(p.Disks, d.Disk)
	}
	for _, f := range rec.Files {
		p.Files = append(p.Files, repository.File{Name: f.Name, Size: f.Blob.Size})
	}
	return p
}

// place is where a point stands; names of records and tombstones spell it.
type place struct {
	chain string
	seq   int64
	id    repository.PointID
}

func (p place) slot() string { return fmt.Sprintf("%s/%012d.", p.chain, p.seq) }

func (p place) blob(prefix string) string { return prefix + p.slot() + string(p.id) }

func parsePlace(name, prefix string) (p place, ok bool) {
	chain, rest, ok := strings.Cut(strings.TrimPrefix(name, prefix), "/")
	if !ok {
		return p, false
	}
	num, id, ok := strings.Cut(rest, ".")
	seq, err := strconv.ParseInt(num, 10, 64)
	p = place{chain, seq, repository.PointID(id)}
	return p, ok && err == nil && id != "" && p.blob(prefix) == name
}

// scannedPoint is a point as found; rec is nil unless it is Committed.
type scannedPoint struct {
	place  place
	point  *repository.Point
	rec    *pointRecord
	digest repository.Digest
}

// scan is everything that records and tombstones say.
type scan struct {
	points   []scannedPoint // by chain, then by sequence; without deleted points
	dead     map[repository.PointID]place
	last     map[string]int64 // highest sequence number ever seen, per chain
	problems []repository.Damage
	strays   []string // records of points that have a tombstone
	read     int64    // bytes
}

func (sc *scan) find(id repository.PointID) *scannedPoint {
	for i := range sc.points {
		if sc.points[i].place.id == id {
			return &sc.points[i]
		}
	}
	return nil
}

// scan reads the records of one chain, or of all if chain is empty. On an error
// it returns what it has found before.
func (r *Repository) scan(ctx context.Context, chain string) (*scan, error) {
	sc := &scan{dead: map[repository.PointID]place{}, last: map[string]int64{}}
	under := ""
	if chain != "" {
		under = chain + "/"
	}
	// Tombstones are listed after records: a point deleted in between is seen as
	// deleted, not as vanished.
	records, err := r.conn.list(ctx, prefixRecord+under)
	if err != nil {
		return sc, err
	}
	tombs, err := r.conn.list(ctx, prefixTomb+under)
	if err != nil {
		return sc, err
	}
	known := map[place]knownPoint{}
	for _, e := range tombs {
		if err := r.scanTomb(ctx, sc, known, e.name); err != nil {
			return sc, err
		}
	}
	for _, e := range records {
		if err := r.scanRecord(ctx, sc, known, e.name); err != nil {
			sc.sort()
			return sc, err
		}
	}
	for i := range sc.points {
		sp := &sc.points[i]
		if k, ok := known[sp.place]; ok {
			delete(known, sp.place)
			if sp.rec == nil {
				sp.point.Name, sp.point.Run, sp.point.Created = k.Name, k.Run, k.Created
			} else if k.Record != sp.digest {
				sp.distrust("rolled back: a later record knows another content")
				sp.point.Name, sp.point.Run, sp.point.Created = k.Name, k.Run, k.Created
			}
		}
	}
	for at, k := range known {
		sc.last[at.chain] = max(sc.last[at.chain], at.seq)
		if _, gone := sc.dead[at.id]; gone {
			continue
		}
		sc.points = append(sc.points, scannedPoint{place: at, point: &repository.Point{
			ID: at.id, Chain: at.chain, Name: k.Name, Run: k.Run, Sequence: at.seq, Created: k.Created,
			State: repository.Vanished, Detail: "later records of the chain know it, and its record is missing",
		}})
	}
	sc.sort()
	return sc, nil
}

func (sc *scan) sort() {
	slices.SortFunc(sc.points, func(a, b scannedPoint) int {
		if c := strings.Compare(a.place.chain, b.place.chain); c != 0 {
			return c
		}
		return cmp.Compare(a.place.seq, b.place.seq)
	})
}

func (sp *scannedPoint) distrust(detail string) {
	sp.rec = nil
	sp.point = &repository.Point{
		ID: sp.place.id, Chain: sp.place.chain, Sequence: sp.place.seq,
		State: repository.Untrusted, Detail: detail,
	}
}

func (r *Repository) scanTomb(ctx context.Context, sc *scan, known map[place]knownPoint, name string) error {
	at, ok := parsePlace(name, prefixTomb)
	if !ok {
		sc.problems = append(sc.problems, repository.Damage{Object: name, Problem: "name", Detail: "no tombstone has this name"})
		return nil
	}
	sc.last[at.chain] = max(sc.last[at.chain], at.seq)
	raw, err := r.conn.get(ctx, name)
	if err != nil {
		return err
	}
	sc.read += int64(len(raw))
	var t tombstone
	if err := r.unseal(name, raw, &t); err != nil {
		// Without the tombstone the deletion is not legitimate; if other records
		// know the point it is reported as vanished.
		sc.problems = append(sc.problems, repository.Damage{Object: name, Problem: "digest", Detail: err.Error()})
		return nil
	}
	sc.dead[at.id] = at
	for _, k := range t.Known {
		known[place{at.chain, k.Sequence, k.ID}] = k
	}
	return nil
}

func (r *Repository) scanRecord(ctx context.Context, sc *scan, known map[place]knownPoint, name string) error {
	at, ok := parsePlace(name, prefixRecord)
	if !ok {
		sc.problems = append(sc.problems, repository.Damage{Object: name, Problem: "name", Detail: "no record has this name"})
		return nil
	}
	sc.last[at.chain] = max(sc.last[at.chain], at.seq)
	if _, gone := sc.dead[at.id]; gone {
		sc.strays = append(sc.strays, name)
		return nil
	}
	rec, sum, n, err := r.readRecord(ctx, name)
	sc.read += n
	sp := scannedPoint{place: at, rec: rec, digest: sum}
	switch {
	case errors.Is(err, errNoBlob):
		// Deleted since it was listed? The tombstone comes before the record goes.
		dead, err := r.buried(ctx, at)
		if dead {
			sc.dead[at.id] = at
		}
		return err
	case errors.Is(err, repository.ErrDamaged):
		sp.distrust(err.Error())
	case err != nil:
		return err
	default:
		sp.point = rec.point()
		for _, k := range rec.Known {
			known[place{at.chain, k.Sequence, k.ID}] = k
		}
	}
	sc.points = append(sc.points, sp)
	return nil
}

// readRecord reads one record and proves it. Errors match errNoBlob or
// ErrDamaged, or are those of the storage.
func (r *Repository) readRecord(ctx context.Context, name string) (*pointRecord, repository.Digest, int64, error) {
	raw, err := r.conn.get(ctx, name)
	if err != nil {
		return nil, repository.Digest{}, 0, err
	}
	sum := repository.Digest(blake3.Sum256(raw))
	rec := &pointRecord{}
	if err := r.unseal(name, raw, rec); err != nil {
		return nil, sum, int64(len(raw)), err
	}
	return rec, sum, int64(len(raw)), nil
}

// testimony lists the points of a scan that a new record or tombstone of the chain
// testifies of; without is left out.
func (sc *scan) testimony(chain string, without repository.PointID) (out []knownPoint) {
	for _, sp := range sc.points {
		if sp.place.chain != chain || sp.place.id == without {
			continue
		}
		out = append(out, knownPoint{
			ID: sp.place.id, Name: sp.point.Name, Run: sp.point.Run, Sequence: sp.place.seq,
			Created: sp.point.Created, Record: sp.digest,
		})
	}
	return out
}

// locate finds the record blob of a point by its name alone.
func (r *Repository) locate(ctx context.Context, id repository.PointID) (place, error) {
	entries, err := r.conn.list(ctx, prefixRecord)
	if err != nil {
		return place{}, err
	}
	for _, e := range entries {
		if at, ok := parsePlace(e.name, prefixRecord); ok && at.id == id {
			return at, nil
		}
	}
	return place{}, fmt.Errorf("point %s: %w", id, repository.ErrNotFound)
}

// lookup reads the record of a committed point. ErrNotFound, or ErrDamaged if it
// is untrusted or has vanished.
func (r *Repository) lookup(ctx context.Context, id repository.PointID) (*pointRecord, error) {
	at, err := r.locate(ctx, id)
	if errors.Is(err, repository.ErrNotFound) {
		sc, scanErr := r.scan(ctx, "")
		if scanErr != nil {
			return nil, scanErr
		}
		if sp := sc.find(id); sp != nil && sp.rec == nil {
			return nil, fmt.Errorf("point %s: %w: %s", id, repository.ErrDamaged, sp.point.Detail)
		}
		return nil, err
	}
	if err != nil {
		return nil, err
	}
	dead, err := r.buried(ctx, at)
	if err != nil {
		return nil, err
	}
	if dead {
		return nil, fmt.Errorf("point %s: %w: deleted", id, repository.ErrNotFound)
	}
	rec, _, _, err := r.readRecord(ctx, at.blob(prefixRecord))
	if errors.Is(err, errNoBlob) {
		return nil, fmt.Errorf("point %s: %w: deleted", id, repository.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("point %s: %w", id, err)
	}
	return rec, nil
}

// buried reports whether a point has a tombstone. One that cannot be trusted
// deletes nothing.
func (r *Repository) buried(ctx context.Context, at place) (bool, error) {
	name := at.blob(prefixTomb)
	raw, err := r.conn.get(ctx, name)
	if errors.Is(err, errNoBlob) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return r.unseal(name, raw, &tombstone{}) == nil, nil
}
