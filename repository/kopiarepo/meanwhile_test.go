package kopiarepo_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
)

// TestPrunedMeanwhile deletes points, and by maintenance moves and deletes their data,
// at some storage operation of another process. That is not damage: what the other one
// does with the point that is left succeeds. Only a run that stood still for days does
// not, and says so.
func TestPrunedMeanwhile(t *testing.T) {
	p := newPruning(t)
	stride := 60 // a sample; at night most operations are tried
	if os.Getenv("HOLDFAST_NIGHTLY") != "" {
		stride = 3
	}
	for _, c := range []struct {
		name  string
		sleep bool // days pass at that operation, or before the first one
		do    func(*kopiarepo.Repository) error
	}{
		{"verify records", true, verifies(repository.VerifyRecords)},
		{"verify blobs", true, verifies(repository.VerifyBlobs)},
		{"verify data", true, verifies(repository.VerifyData)},
		{"list", true, p.list},
		{"read", true, p.read},
		{"full", false, p.next("")},
		{"incremental", false, p.next(p.kept)},
		{"full, suspended", true, p.next("")},
		{"incremental, suspended", true, p.next(p.kept)},
	} {
		t.Run(c.name, func(t *testing.T) {
			for at := 1 + p.rnd.IntN(stride); ; at += 1 + p.rnd.IntN(2*stride) {
				err, pruned := p.prune(t, number(at), c.sleep, c.do)
				if !c.sleep || !errors.Is(err, repository.ErrStale) {
					require.NoError(t, err, "pruned at operation %d", at)
				}
				if !pruned {
					break
				}
			}
		})
	}
}

// TestPrunedAt prunes at the operations that matter.
func TestPrunedAt(t *testing.T) {
	p := newPruning(t)
	for _, c := range []struct {
		name  string
		when  occasion
		sleep bool
		do    func(*kopiarepo.Repository) error
		want  error
	}{
		{"records are read", once(kopiarepo.OpGet, "holdfast/records/vm/"), true, p.list, nil},
		{"the inventory is read", once(kopiarepo.OpGet, "holdfast/inventory/"), true, p.next(""), nil},
		{"packs are looked at", once(kopiarepo.OpStat, "p/"), false, p.next(p.kept), nil},
		{"the parent is pinned", once(kopiarepo.OpPut, "q/"), true, p.next(p.kept), repository.ErrStale},
		{"the list of packs is stored", once(kopiarepo.OpPut, "holdfast/packs/"), true, p.next(""), repository.ErrStale},
		{"the copy is made", after(kopiarepo.OpPut, "holdfast-2/copies/q"), false, p.next(""), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			err, pruned := p.prune(t, c.when, c.sleep, c.do)
			require.True(t, pruned)
			require.ErrorIs(t, err, c.want)
		})
	}
}

func verifies(level repository.VerifyLevel) func(*kopiarepo.Repository) error {
	return func(r *kopiarepo.Repository) error {
		rep, err := r.Verify(context.Background(), &repository.VerifyOptions{Level: level})
		if err == nil && len(rep.Damages) > 0 {
			err = fmt.Errorf("damages: %v", rep.Damages)
		}
		return err
	}
}

// occasion says whether a storage operation is the one; n counts from 1.
type occasion func(n int, op kopiarepo.StorageOp) bool

func number(at int) occasion {
	return func(n int, _ kopiarepo.StorageOp) bool { return n == at }
}

func once(kind kopiarepo.OpKind, prefix string) occasion {
	return func(_ int, op kopiarepo.StorageOp) bool { return op.Kind == kind && strings.HasPrefix(op.Name, prefix) }
}

// after is the operation that follows the first one of those.
func after(kind kopiarepo.OpKind, prefix string) occasion {
	first, seen := once(kind, prefix), false
	return func(n int, op kopiarepo.StorageOp) bool {
		if seen {
			return true
		}
		seen = first(n, op)
		return false
	}
}

// TestDeletedBlobIsNotAddedAgain has a process take a blob into the inventory while
// maintenance of another one has written down that it goes, and not yet deleted it.
func TestDeletedBlobIsNotAddedAgain(t *testing.T) {
	ctx := context.Background()
	p := newPruning(t)
	cfg := p.config(copyTree(t, p.base))
	r := open(t, cfg)
	var added []string
	var failed error
	cfg.StorageHook = func(_ context.Context, op kopiarepo.StorageOp) (func(error) error, error) {
		name, ok := strings.CutSuffix(op.Name, ".f")
		if op.Kind == kopiarepo.OpDelete && ok && !strings.HasPrefix(name, "s/") {
			name = strings.ReplaceAll(name, "/", "")
			added = append(added, name)
			failed = errors.Join(failed, r.Adopt(ctx, name), r.Protect(ctx))
		}
		return nil, nil
	}
	other := open(t, cfg)
	for _, id := range p.ids[:len(p.ids)-1] {
		deletePoint(ctx, t, other, id)
	}
	for range 3 {
		p.clock.Advance(26 * time.Hour)
		maintain(ctx, t, other)
	}
	require.NoError(t, failed)
	require.NotEmpty(t, added)
	require.NoError(t, verifies(repository.VerifyBlobs)(r))
}

// pruning has a repository of three points of one disk, of which the last is kept.
type pruning struct {
	rnd   *rand.Rand
	base  string
	clock *clock
	ids   []repository.PointID
	kept  repository.PointID
	disks map[string]*image // of the point that is kept
}

func newPruning(t *testing.T) *pruning {
	p := &pruning{rnd: seed(t), base: t.TempDir() + "/base", clock: newClock()}
	r := create(t, p.config(p.base))
	shared := newImage(3*mib+700, mib)
	shared.fill(p.rnd, 3)
	for k := range 3 {
		m := shared.clone()
		m.fill(p.rnd, int64(k))
		p.disks = map[string]*image{"d": m}
		proof, err := backup(context.Background(), r, p.disks, backupOptions{chain: "vm", run: fmt.Sprintf("r%d", k)})
		require.NoError(t, err)
		p.kept = proof.Point().ID
		p.ids = append(p.ids, p.kept)
	}
	require.NoError(t, r.Close())
	p.clock.Advance(50 * time.Hour)
	return p
}

func (p *pruning) config(dir string) kopiarepo.Config {
	cfg := config(dir)
	cfg.Clock = p.clock.Now
	return cfg
}

// list wants no point in the list that would be called lost.
func (p *pruning) list(r *kopiarepo.Repository) error {
	found := false
	for pt, err := range r.Points(context.Background(), repository.Query{}) {
		if err != nil {
			return err
		}
		if pt.State != repository.Committed {
			return fmt.Errorf("point %s is %v: %s", pt.ID, pt.State, pt.Detail)
		}
		found = found || pt.ID == p.kept
	}
	if !found {
		return fmt.Errorf("point %s is not in the list", p.kept)
	}
	return nil
}

func (p *pruning) read(r *kopiarepo.Repository) error {
	return compare(context.Background(), r, p.kept, p.disks)
}

// next backs up what the kept point holds once more.
func (p *pruning) next(parent repository.PointID) func(*kopiarepo.Repository) error {
	return func(r *kopiarepo.Repository) error {
		_, err := backup(context.Background(), r, p.disks, backupOptions{chain: "vm", run: "next", parent: parent})
		return err
	}
}

// prune does something in a copy of the repository, keeps the last point alone at some
// moment of it, and returns whether that came. Afterwards all is well.
func (p *pruning) prune(t *testing.T, when occasion, sleep bool, do func(*kopiarepo.Repository) error) (result error, pruned bool) {
	ctx := context.Background()
	cfg := p.config(copyTree(t, p.base))
	other := open(t, cfg)
	deletes := func() {
		for _, id := range p.ids[:len(p.ids)-1] {
			deletePoint(ctx, t, other, id)
		}
	}
	rounds := func(n int) {
		for range n {
			p.clock.Advance(26 * time.Hour)
			maintain(ctx, t, other)
		}
	}
	var mu sync.Mutex
	n, armed := 0, false
	var at kopiarepo.StorageOp
	cfg.StorageHook = func(_ context.Context, op kopiarepo.StorageOp) (func(error) error, error) {
		mu.Lock()
		defer mu.Unlock()
		if n++; !armed || pruned || !when(n, op) {
			return nil, nil
		}
		pruned, at = true, op
		if sleep {
			deletes()
			rounds(3)
		} else {
			maintain(ctx, t, other)
		}
		return nil, nil
	}
	r := open(t, cfg)
	_, err := backup(ctx, other, p.disks, backupOptions{chain: "other", run: "r"}) // something new to load
	require.NoError(t, err)
	if !sleep { // the process has seen what is to be moved
		require.NoError(t, compare(ctx, r, p.kept, p.disks))
		deletes()
		rounds(2)
		p.clock.Advance(26 * time.Hour)
	}
	mu.Lock()
	n, armed = 0, true
	mu.Unlock()
	result = do(r)
	require.NoError(t, r.Close())
	require.NoError(t, other.Close())

	later := open(t, p.config(cfg.Dir))
	for _, pt := range points(t, later, repository.Query{}) {
		if !slices.Contains(p.ids[:len(p.ids)-1], pt.ID) {
			require.NoError(t, compare(ctx, later, pt.ID, p.disks), "pruned at %v; it said %v", at, result)
		}
	}
	rep, err := later.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(t, err)
	require.Empty(t, rep.Damages, "pruned at %v; it said %v", at, result)
	require.NoError(t, later.Close())
	if !pruned {
		require.Greater(t, n, 10)
	}
	return result, pruned
}
