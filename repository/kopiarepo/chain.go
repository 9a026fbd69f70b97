package kopiarepo

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/repository"
)

// chain is what can be said of one chain from its records, its anchor, and what
// this client remembers of it.
type chain struct {
	name    string
	live    map[repository.PointID]*entry
	dead    map[repository.PointID]recordRef // deleted, with where their records were
	trusted map[int64]sum                    // digests of entries that are to be trusted
	lost    []*repository.Point              // vanished or untrusted
	lostAt  map[repository.PointID]recordRef
	head    *recordRef // newest entry known, trusted or not
	next    int64      // number that the next entry may take
	points  int64      // points so far
	lock    map[string]int64
	issues  []repository.Damage // redundancy that was lost, records that cannot be read
	stored  *numbered
	anchor  *anchor
}

func recordDir(chain string) string { return recordsDir + "/" + chain }

// chains lists the names of all chains that left a trace.
func (r *Repository) chains(ctx context.Context) ([]string, error) {
	names := map[string]bool{}
	for _, dir := range []string{primary + recordsDir, mirror + recordsDir, primary + anchorsDir, mirror + anchorsDir} {
		entries, err := r.dir.list(ctx, dir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if validChain(e.Name()) {
				names[e.Name()] = true
			}
		}
	}
	remembered, err := r.client.chains(r.info.ID)
	if err != nil {
		return nil, err
	}
	for _, name := range remembered {
		names[name] = true
	}
	out := make([]string, 0, len(names))
	for name := range names {
		out = append(out, name)
	}
	slices.Sort(out)
	return out, nil
}

// loadChain reads a chain. What another process deletes meanwhile looks like a loss:
// then it is read again.
func (r *Repository) loadChain(ctx context.Context, name string) (*chain, error) {
	for attempt := 0; ; attempt++ {
		c, err := r.readChain(ctx, name)
		if err != nil || len(c.lost) == 0 && len(c.issues) == 0 || attempt == maxRereads {
			return c, err
		}
		now, err := r.own.listNumbered(ctx, recordDir(name))
		if err != nil {
			return nil, err
		}
		if maps.Equal(now.primary, c.stored.primary) && maps.EqualFunc(now.mirror, c.stored.mirror, slices.Equal) {
			return c, nil
		}
	}
}

// maxRereads is how often something is read again that others are changing.
const maxRereads = 4

// readChain reads a chain once. From the newest entry to the oldest, each entry says
// what the one before it must be.
func (r *Repository) readChain(ctx context.Context, name string) (*chain, error) {
	c := &chain{
		name: name, live: map[repository.PointID]*entry{}, dead: map[repository.PointID]recordRef{},
		lostAt: map[repository.PointID]recordRef{}, lock: map[string]int64{}, trusted: map[int64]sum{},
	}
	var err error
	if c.stored, err = r.own.listNumbered(ctx, recordDir(name)); err != nil {
		return nil, err
	}
	if c.anchor, err = r.readAnchor(ctx, c); err != nil {
		return nil, err
	}
	remembered, err := r.client.anchor(r.info.ID, name)
	if err != nil {
		return nil, err
	}
	want := map[int64]recordRef{} // what an entry must be
	buried := map[int64]bool{}    // entries whose point was deleted
	settled := int64(0)           // up to here, only what an anchor lists is live
	for _, a := range []*anchor{remembered, c.anchor} {
		if a == nil {
			continue
		}
		for _, ref := range a.Live {
			want[ref.Log] = ref
		}
		want[a.Head.Log] = a.Head
		settled = max(settled, a.Head.Log)
		c.points = max(c.points, a.Points)
	}
	isLive := func(n int64) bool {
		for _, a := range []*anchor{c.anchor, remembered} {
			if a != nil && n <= a.Head.Log {
				return slices.ContainsFunc(a.Live, func(ref recordRef) bool { return ref.Log == n })
			}
		}
		return true
	}
	numbers := c.stored.numbers()
	for _, n := range slices.Backward(numbers) {
		if err := r.loadEntry(ctx, c, n, want, buried, isLive, settled); err != nil {
			return nil, err
		}
	}
	for n, ref := range want {
		c.advance(n, &ref)
		if !c.stored.primary[n] && len(c.stored.mirror[n]) == 0 && ref.Kind == kindDeleted {
			c.issue(n, "missing", "the record of a deletion is lost")
		}
		if c.stored.primary[n] || len(c.stored.mirror[n]) > 0 || buried[n] || ref.Kind != kindPoint || !isLive(n) {
			continue
		}
		c.lose(ref, repository.Vanished, "its record is missing, though later ones prove that it was committed")
	}
	return c, nil
}

func (c *chain) advance(n int64, ref *recordRef) {
	c.next = max(c.next, n+1)
	if ref != nil && (c.head == nil || ref.Log > c.head.Log) {
		c.head = ref
	}
}

func (c *chain) issue(n int64, problem, detail string) {
	c.issues = append(c.issues, repository.Damage{Object: primary + recordDir(c.name) + "/" + number(n), Problem: problem, Detail: detail})
}

func (c *chain) lose(ref recordRef, state repository.State, detail string) {
	p := &repository.Point{
		ID: ref.ID, Chain: c.name, Name: ref.Name, Run: ref.Run, Sequence: ref.Seq, Created: ref.Created,
		State: state, Detail: detail,
	}
	if p.ID == "" {
		p.ID = repository.PointID(fmt.Sprintf("unknown-%d", ref.Log))
	}
	c.lost = append(c.lost, p)
	ref.ID = p.ID
	c.lostAt[p.ID] = ref
}

// loadEntry decides about entry n. Entries after it were decided before.
func (r *Repository) loadEntry(ctx context.Context, c *chain, n int64, want map[int64]recordRef,
	buried map[int64]bool, isLive func(int64) bool, settled int64,
) error {
	candidates, err := r.own.readNumbered(ctx, typeRecord, recordDir(c.name), n, c.stored)
	if err != nil {
		return err
	}
	ref, expected := want[n]
	if !expected && !c.stored.primary[n] {
		return nil // a copy whose record was never made: its writer died
	}
	var (
		good   *entry
		reason error
		object = primary + recordDir(c.name) + "/" + number(n)
	)
	for i := range candidates {
		cand := &candidates[i]
		e, err := (*entry)(nil), cand.err
		if err == nil {
			e, err = parseRecord(c.name, n, cand)
		}
		if err == nil && expected && e.sum != ref.Sum {
			err = fmt.Errorf("%w: it is not the record that later ones, or an anchor, name", errForged)
			if cand.prefix == mirror {
				continue // the copy of a writer that lost a race
			}
		}
		if err != nil {
			reason = errors.Join(reason, err)
			if !buried[n] {
				c.issues = append(c.issues, repository.Damage{
					Object: cand.prefix + recordDir(c.name) + "/" + number(n), Problem: "record", Detail: err.Error(), Repairable: true,
				})
			}
			continue
		}
		if good == nil && (expected || cand.prefix == primary) {
			good = e
		}
	}
	if good == nil {
		c.advance(n, nil)
		switch {
		case ref.Kind == kindDeleted:
			c.issue(n, "record", "the record of a deletion is lost")
		case buried[n] || n <= settled && !isLive(n):
		case expected && reason == nil:
			c.lose(ref, repository.Vanished, "its record is missing, though later ones prove that it was committed")
		default:
			ref.Log = n
			c.lose(ref, repository.Untrusted, fmt.Sprintf("its record cannot be trusted: %v", reason))
		}
		return nil
	}
	if expected && !buried[n] && (good.Kind == kindDeleted || isLive(n)) {
		// Redundancy: an entry that something vouches for should be there twice.
		if !c.stored.primary[n] {
			c.issues = append(c.issues, repository.Damage{Object: object, Problem: "missing", Detail: "only its copy is left", Repairable: true})
		}
		if !hasCopy(candidates, good.sum) {
			c.issues = append(c.issues, repository.Damage{
				Object: mirror + recordDir(c.name) + "/" + number(n), Problem: "missing", Detail: "the copy is missing or damaged", Repairable: true,
			})
		}
	}
	c.trusted[n] = good.sum
	goodRef := good.ref()
	c.advance(n, &goodRef)
	c.points = max(c.points, good.Points)
	if good.Lock != "" {
		c.lock[good.Lock] = max(c.lock[good.Lock], good.Epoch)
	}
	if good.Prev != nil {
		if _, ok := want[good.Prev.Log]; !ok && good.Prev.Log < n {
			want[good.Prev.Log] = *good.Prev
		}
	}
	switch {
	case good.Kind == kindDeleted:
		t := good.gone.Target
		buried[t.Log] = true
		c.dead[good.ID] = t
		if _, ok := want[t.Log]; !ok && t.Log < n {
			want[t.Log] = t
		}
	case buried[n]:
	case n <= settled && !isLive(n):
		c.dead[good.ID] = goodRef // the anchor says so, though the deletion's record is lost
	default:
		c.live[good.ID] = good
	}
	return nil
}

func hasCopy(candidates []candidate, want sum) bool {
	return slices.ContainsFunc(candidates, func(c candidate) bool {
		return c.prefix == mirror && c.err == nil && c.sum == want
	})
}

func (r *Repository) readAnchor(ctx context.Context, c *chain) (*anchor, error) {
	name := anchorsDir + "/" + c.name
	cs, err := r.own.candidates(ctx, typeAnchor, name)
	if err != nil {
		return nil, err
	}
	var best *anchor
	var found [2]*anchor
	for i := range cs {
		if cs[i].err != nil {
			continue
		}
		a := &anchor{}
		if err := json.Unmarshal(cs[i].body, a); err != nil {
			cs[i].err = fmt.Errorf("%w: %w", errForged, err)
			continue
		}
		found[i] = a
		if best == nil || a.Head.Log > best.Head.Log {
			best = a
		}
	}
	for i := range cs {
		// The copy is written first, so it alone may be there after a crash in the
		// chain's very first commit.
		if found[i] == nil && (!cs[i].absent || best != nil && best.Head.Log > 1) {
			c.issues = append(c.issues, repository.Damage{
				Object: cs[i].prefix + name, Problem: "anchor", Detail: cs[i].err.Error(), Repairable: best != nil,
			})
		}
	}
	if best == nil && len(c.stored.primary) > 1 && cs[0].absent && cs[1].absent {
		c.issues = append(c.issues, repository.Damage{Object: primary + name, Problem: "missing", Detail: "the chain has no anchor"})
	}
	return best, nil
}

// writeAnchor records the chain's head and live points, inside and, if asked,
// with the client.
func (r *Repository) writeAnchor(ctx context.Context, c *chain) error {
	a := c.asAnchor()
	if a == nil {
		return nil
	}
	b, err := json.Marshal(a)
	if err != nil {
		return err
	}
	if _, err := r.own.put(ctx, typeAnchor, anchorsDir+"/"+c.name, nil, b); err != nil {
		return err
	}
	if err := r.dir.sync(ctx); err != nil {
		return err
	}
	return r.client.remember(r.info.ID, c.name, a)
}

func (c *chain) asAnchor() *anchor {
	if c.head == nil {
		return nil
	}
	a := &anchor{Head: *c.head, Points: c.points}
	for _, e := range c.live {
		a.Live = append(a.Live, e.ref())
	}
	// A lost point stays lost until it is deleted: forgetting it would hide it.
	for _, ref := range c.lostAt {
		if !ref.Sum.IsZero() {
			a.Live = append(a.Live, ref)
		}
	}
	slices.SortFunc(a.Live, func(x, y recordRef) int { return cmp.Compare(x.Log, y.Log) })
	return a
}

// listed returns the chain's points by sequence, the lost among them.
func (c *chain) listed() []*repository.Point {
	out := slices.Clone(c.lost)
	for _, e := range c.live {
		out = append(out, e.point())
	}
	slices.SortFunc(out, func(a, b *repository.Point) int {
		return cmp.Or(cmp.Compare(a.Sequence, b.Sequence), strings.Compare(string(a.ID), string(b.ID)))
	})
	return out
}

// appendRecord puts one entry at the head of the chain's log. build gets the
// chain as it is now, and fills in what depends on it; it may refuse.
func (r *Repository) appendRecord(ctx context.Context, name string, build func(*chain, *recordHeader) ([]byte, error)) (*chain, *entry, error) {
	for range 64 {
		c, err := r.loadChain(ctx, name)
		if err != nil {
			return nil, nil, err
		}
		h := &recordHeader{Chain: name, Log: max(c.next, 1), Points: c.points}
		if c.head != nil {
			h.Prev = c.head.public()
		}
		body, err := build(c, h)
		if err != nil {
			return nil, nil, err
		}
		s, err := r.own.createNumbered(ctx, typeRecord, recordDir(name), h.Log, h, body)
		if isTaken(err) {
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		return c, &entry{recordHeader: *h, sum: s}, nil
	}
	return nil, nil, fmt.Errorf("%w: too many writers on chain %s", repository.ErrLocked, name)
}
