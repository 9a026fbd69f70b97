package kopiarepo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"

	"github.com/holdfast-backup/holdfast/repository"
)

// inventory knows every blob that kopia stored through us: its size and the
// digest of its bytes. It is a numbered log of signed changes, each naming the
// digest of the one before; some entries hold everything, so that older ones can
// go. It is safe for concurrent use.
type inventory struct {
	own *ownFiles
	now func() time.Time

	busy chan struct{} // holds an element while the log is read or written: entries are applied in order

	mu      sync.Mutex
	head    int64
	headSum sum
	base    int64 // newest entry that holds everything
	live    map[string]blobEntry
	gone    map[string]bool // deleted by maintenance, until the log forgets
	pending map[string]*blobEntry
	gaps    []string // what of the log could not be read
}

type blobEntry struct {
	Name string `json:"n"`
	Size int64  `json:"s"`
	Sum  sum    `json:"h"`
	Time int64  `json:"t"` // Unix seconds of the last put
}

type inventoryHeader struct {
	Seq  int64 `json:"seq"`
	Prev sum   `json:"prev"`
	Full bool  `json:"full,omitempty"`
}

type inventoryBody struct {
	Add []blobEntry `json:"add,omitempty"`
	Del []string    `json:"del,omitempty"`
}

const (
	inventoryDir     = "inventory"
	inventoryHead    = "inventory-head"
	maxInventoryBody = 4 << 30
	// fullEvery: how many changes may follow an entry that holds everything.
	fullEvery = 64
)

func newInventory(own *ownFiles, now func() time.Time) *inventory {
	return &inventory{own: own, now: now, busy: make(chan struct{}, 1), live: map[string]blobEntry{}, gone: map[string]bool{}, pending: map[string]*blobEntry{}}
}

// inventoried says whether blobs of this name are in the inventory. Session
// markers and logs come and go, and nothing depends on them.
func inventoried(name string) bool {
	return !strings.HasPrefix(name, "s") && !strings.HasPrefix(name, "_")
}

// critical says whether the loss of this blob would stop more than the points
// whose data it holds. Those have copies.
func critical(name string) bool {
	switch name[:min(1, len(name))] {
	case "x", "q":
		return true
	}
	return strings.HasPrefix(name, "kopia.")
}

// load reads log entries newer than the known head.
func (v *inventory) load(ctx context.Context) error {
	if err := v.begin(ctx); err != nil {
		return err
	}
	defer v.end()
	return v.loadAgain(ctx, maxRereads)
}

// begin waits until nobody else reads or writes the log.
func (v *inventory) begin(ctx context.Context) error {
	select {
	case v.busy <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (v *inventory) end() { <-v.busy }

func (v *inventory) loadAgain(ctx context.Context, rereads int) error {
	anchored, err := v.anchored(ctx) // first: what it names is in a list that is made later
	if err != nil {
		return err
	}
	l, err := v.own.listNumbered(ctx, inventoryDir)
	if err != nil {
		return fmt.Errorf("inventory: %w", err)
	}
	v.mu.Lock()
	head := v.head
	v.mu.Unlock()
	numbers := slices.DeleteFunc(l.numbers(), func(n int64) bool {
		// The copy of an entry whose writer died before it was made is none.
		return n <= head || !l.primary[n] && n > anchored
	})
	start := 0
	if head == 0 {
		// Begin at the newest entry that holds everything and can be trusted.
		for i := len(numbers) - 1; i > 0; i-- {
			if e, err := v.read(ctx, numbers[i], l, sum{}); err != nil {
				return err
			} else if e != nil && e.Full {
				start = i
				break
			}
		}
	}
	for i := start; i < len(numbers); i++ {
		want := sum{}
		if i+1 < len(numbers) {
			if next, err := v.read(ctx, numbers[i+1], l, sum{}); err != nil {
				return err
			} else if next != nil {
				want = next.Prev
			}
		}
		e, err := v.read(ctx, numbers[i], l, want)
		if err != nil {
			return err
		}
		if e == nil && rereads > 0 {
			// A newer entry may hold everything by now, and this one be gone.
			now, err := v.own.listNumbered(ctx, inventoryDir)
			if err != nil {
				return err
			}
			if n := numbers[i]; !now.primary[n] && len(now.mirror[n]) == 0 {
				return v.loadAgain(ctx, rereads-1)
			}
		}
		v.apply(numbers[i], e)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if gap := fmt.Sprintf("%s: what came after entry %d", inventoryDir, v.head); v.head < anchored && !slices.Contains(v.gaps, gap) {
		v.gaps = append(v.gaps, gap)
	}
	return nil
}

// anchored returns the newest entry that is known to have been made.
func (v *inventory) anchored(ctx context.Context) (int64, error) {
	c, err := v.own.get(ctx, typeAnchor, inventoryHead, func(a, b *candidate) *candidate {
		if seqOf(b) > seqOf(a) {
			return b
		}
		return a
	})
	if err != nil {
		return 0, ctx.Err() // without it, entries speak for themselves
	}
	return seqOf(c), nil
}

func seqOf(c *candidate) int64 {
	var h inventoryHeader
	_ = json.Unmarshal(c.header, &h) // authenticated: it parses
	return h.Seq
}

type inventoryEntry struct {
	inventoryHeader
	inventoryBody
	sum sum
}

// read returns entry n, preferring the form with digest want; nil if no form of
// it can be trusted.
func (v *inventory) read(ctx context.Context, n int64, l *numbered, want sum) (*inventoryEntry, error) {
	cs, err := v.own.readNumbered(ctx, typeInventory, inventoryDir, n, l)
	if err != nil {
		return nil, err
	}
	var best *inventoryEntry
	for _, c := range cs {
		if c.err != nil {
			continue
		}
		e := &inventoryEntry{sum: c.sum}
		if json.Unmarshal(c.header, &e.inventoryHeader) != nil || e.Seq != n {
			continue
		}
		body, err := inflate(c.body, maxInventoryBody)
		if err != nil || json.Unmarshal(body, &e.inventoryBody) != nil {
			continue
		}
		if best == nil || c.sum == want {
			best = e
		}
	}
	return best, nil
}

func (v *inventory) apply(n int64, e *inventoryEntry) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if e == nil {
		v.gaps = append(v.gaps, fmt.Sprintf("%s/%s", inventoryDir, number(n)))
		v.head, v.headSum = n, sum{}
		return
	}
	if v.head == 0 && n != 1 && !e.Full {
		v.gaps = append(v.gaps, fmt.Sprintf("%s: what came before entry %d", inventoryDir, n))
	}
	if v.head != 0 && !v.headSum.IsZero() && (n != v.head+1 || e.Prev != v.headSum) && !e.Full {
		v.gaps = append(v.gaps, fmt.Sprintf("%s: entry %d does not follow entry %d", inventoryDir, n, v.head))
	}
	if e.Full {
		v.live = make(map[string]blobEntry, len(e.Add))
		v.gone = map[string]bool{}
		v.base = n
		v.gaps = nil
	}
	for _, b := range e.Add {
		v.live[b.Name] = b
		delete(v.gone, b.Name)
	}
	for _, name := range e.Del {
		delete(v.live, name)
		// What this process was about to add goes, too, though it is still stored:
		// who deletes writes it down first.
		delete(v.pending, name)
		v.gone[name] = true
	}
	v.head, v.headSum = n, e.sum
}

// added notes a blob that was put.
func (v *inventory) added(e blobEntry) {
	v.mu.Lock()
	v.pending[e.Name] = &e
	v.mu.Unlock()
}

// deleted notes blobs that are about to be deleted for good.
func (v *inventory) deleted(names []string) {
	v.mu.Lock()
	for _, name := range names {
		v.pending[name] = nil
	}
	v.mu.Unlock()
}

// lookup returns what is known of a blob.
func (v *inventory) lookup(name string) (blobEntry, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if e, ok := v.pending[name]; ok {
		if e == nil {
			return blobEntry{}, false
		}
		return *e, true
	}
	e, ok := v.live[name]
	return e, ok
}

// wasDeleted reports whether maintenance deleted the blob.
func (v *inventory) wasDeleted(name string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if e, ok := v.pending[name]; ok {
		return e == nil
	}
	return v.gone[name]
}

// all returns every blob that should be stored, sorted by name.
func (v *inventory) all() []blobEntry {
	v.mu.Lock()
	out := make([]blobEntry, 0, len(v.live)+len(v.pending))
	for name, e := range v.live {
		if _, ok := v.pending[name]; !ok {
			out = append(out, e)
		}
	}
	for _, e := range v.pending {
		if e != nil {
			out = append(out, *e)
		}
	}
	v.mu.Unlock()
	slices.SortFunc(out, func(a, b blobEntry) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// isSettled reports whether the log holds the blob.
func (v *inventory) isSettled(name string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, ok := v.live[name]
	return ok
}

// settled returns what the log holds, without what is still to be written to it.
func (v *inventory) settled() map[string]blobEntry {
	v.mu.Lock()
	defer v.mu.Unlock()
	out := make(map[string]blobEntry, len(v.live))
	for name, e := range v.live {
		if _, ok := v.pending[name]; !ok {
			out[name] = e
		}
	}
	return out
}

func (v *inventory) problems() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.gaps)
}

// holds reports whether entry n was taken into account.
func (v *inventory) holds(n int64) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return n <= v.head
}

func (v *inventory) position() (int64, sum) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.head, v.headSum
}

// flush makes what was noted durable in the log. full writes everything.
func (v *inventory) flush(ctx context.Context, full bool) error {
	if err := v.begin(ctx); err != nil {
		return err
	}
	defer v.end()
	for range 64 {
		if err := v.loadAgain(ctx, maxRereads); err != nil {
			return err
		}
		if err := v.dropCollected(ctx); err != nil {
			return err
		}
		header, body, taken := v.change(full)
		if taken == nil {
			return nil
		}
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		s, err := v.own.createNumbered(ctx, typeInventory, inventoryDir, header.Seq, header, deflate(b))
		if err != nil && errors.Is(err, fs.ErrExist) {
			continue // somebody else was faster: read theirs, then write ours
		}
		if err != nil {
			return fmt.Errorf("inventory: %w", err)
		}
		v.commit(header, body, s, taken)
		if _, err := v.own.put(ctx, typeAnchor, inventoryHead, inventoryHeader{Seq: header.Seq, Prev: s}, nil); err != nil {
			return fmt.Errorf("inventory: %w", err)
		}
		return nil
	}
	return fmt.Errorf("inventory: %w: too many writers", repository.ErrLocked)
}

// dropCollected forgets what this process put so long ago that maintenance of another
// one may have collected it, and did: this one stood still before it came to write it
// down. Who collects afterwards writes an entry first, and ours is refused.
func (v *inventory) dropCollected(ctx context.Context) error {
	before := v.now().Add(-maxUnsaved).Unix()
	v.mu.Lock()
	var old []blobEntry
	for _, e := range v.pending {
		if e != nil && e.Time < before {
			old = append(old, *e)
		}
	}
	v.mu.Unlock()
	for _, e := range old {
		_, _, err := v.own.dir.stat(ctx, blobFile(blob.ID(e.Name)))
		if err != nil && !isAbsent(err) {
			return fmt.Errorf("blob %s: %w", e.Name, err)
		}
		if err == nil {
			continue
		}
		v.mu.Lock()
		if p := v.pending[e.Name]; p != nil && *p == e {
			delete(v.pending, e.Name)
		}
		v.mu.Unlock()
	}
	return nil
}

// change collects what is to be written; taken is nil if nothing is.
func (v *inventory) change(full bool) (h inventoryHeader, body inventoryBody, taken map[string]*blobEntry) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.pending) == 0 && !full {
		return h, body, nil
	}
	taken = make(map[string]*blobEntry, len(v.pending))
	for name, e := range v.pending {
		taken[name] = e
	}
	// A gap in the log must not be papered over by an entry that claims to hold
	// everything: adopt does that, after the blobs were looked at.
	h = inventoryHeader{Seq: v.head + 1, Prev: v.headSum, Full: full || v.head-v.base >= fullEvery && len(v.gaps) == 0}
	if h.Full {
		for name, e := range v.live {
			if _, ok := taken[name]; !ok {
				body.Add = append(body.Add, e)
			}
		}
	}
	for name, e := range taken {
		if e != nil {
			body.Add = append(body.Add, *e)
		} else if !h.Full {
			body.Del = append(body.Del, name)
		}
	}
	slices.SortFunc(body.Add, func(a, b blobEntry) int { return strings.Compare(a.Name, b.Name) })
	slices.Sort(body.Del)
	return h, body, taken
}

func (v *inventory) commit(h inventoryHeader, body inventoryBody, s sum, taken map[string]*blobEntry) {
	v.apply(h.Seq, &inventoryEntry{inventoryHeader: h, inventoryBody: body, sum: s})
	v.mu.Lock()
	for name, e := range taken {
		if v.pending[name] == e {
			delete(v.pending, name)
		}
		if e == nil {
			v.gone[name] = true
		}
	}
	v.mu.Unlock()
}

// forget removes log entries that a later one replaced.
func (v *inventory) forget(ctx context.Context) error {
	v.mu.Lock()
	base := v.base
	v.mu.Unlock()
	l, err := v.own.listNumbered(ctx, inventoryDir)
	if err != nil {
		return err
	}
	for _, n := range l.numbers() {
		if n < base {
			if err := v.own.removeNumbered(ctx, inventoryDir, n, l); err != nil {
				return err
			}
		}
	}
	return nil
}
