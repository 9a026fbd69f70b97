package kopiarepo

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/repository"
)

// walker visits everything that snapshots refer to. What several points share is
// visited once. It is safe for concurrent use.
type walker struct {
	dr repo.DirectRepository

	mu   sync.Mutex
	cids map[object.ID][]blob.ID    // packs of an object
	hits map[object.ID][]content.ID // contents of an object that are sought
	want map[content.ID]bool        // contents sought; nil: none
	fail map[object.ID]error        // objects that cannot be walked
}

func (r *Repository) newWalker(dr repo.DirectRepository) *walker {
	return &walker{
		dr: dr, cids: map[object.ID][]blob.ID{},
		hits: map[object.ID][]content.ID{}, fail: map[object.ID]error{},
	}
}

// rootID returns the object of the snapshot's root.
func (t *tree) rootID() (object.ID, error) { return object.ParseID(t.e.body.Root) }

// objects returns every object under root, root included, without repeats.
func (v *walker) objects(ctx context.Context, root object.ID) ([]object.ID, error) {
	seen := map[object.ID]bool{root: true}
	out := []object.ID{root}
	for queue := []object.ID{root}; len(queue) > 0; {
		dir := queue[0]
		queue = queue[1:]
		_, entries, err := getDir(ctx, v.dr, dir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if seen[e.ObjectID] {
				continue
			}
			seen[e.ObjectID] = true
			out = append(out, e.ObjectID)
			if e.Type == snapshot.EntryTypeDirectory {
				queue = append(queue, e.ObjectID)
			}
		}
	}
	return out, nil
}

// visit looks at one object: the packs that it needs, and the contents sought.
func (v *walker) visit(ctx context.Context, id object.ID) ([]blob.ID, []content.ID, error) {
	v.mu.Lock()
	packs, ok := v.cids[id]
	hits, err := v.hits[id], v.fail[id]
	v.mu.Unlock()
	if ok || err != nil {
		return packs, hits, err
	}
	packs, hits, err = v.look(ctx, id)
	if err != nil && ctx.Err() != nil {
		return nil, nil, ctx.Err()
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if err != nil {
		v.fail[id] = err
		return nil, nil, err
	}
	v.cids[id], v.hits[id] = packs, hits
	return packs, hits, nil
}

func (v *walker) look(ctx context.Context, id object.ID) ([]blob.ID, []content.ID, error) {
	cids := []content.ID{}
	if cid, _, ok := id.ContentID(); ok {
		cids = append(cids, cid)
	} else {
		var err error
		if cids, err = object.VerifyObject(ctx, contents{v.dr.ContentReader()}, id); err != nil {
			return nil, nil, fmt.Errorf("%w: object %s: %w", repository.ErrDamaged, id, err)
		}
	}
	set := map[blob.ID]bool{}
	var hits []content.ID
	for _, cid := range cids {
		info, err := v.dr.ContentReader().ContentInfo(ctx, cid)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: object %s: %w", repository.ErrDamaged, id, err)
		}
		set[info.PackBlobID] = true
		if v.want[cid] {
			hits = append(hits, cid)
		}
	}
	return sortedPacks(set), hits, nil
}

// packs returns the packs that a point needs.
func (v *walker) packs(ctx context.Context, root object.ID) (map[blob.ID]bool, error) {
	objects, err := v.objects(ctx, root)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	set := map[blob.ID]bool{}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for _, id := range objects {
		g.Go(func() error {
			packs, _, err := v.visit(ctx, id)
			mu.Lock()
			for _, p := range packs {
				set[p] = true
			}
			mu.Unlock()
			return err
		})
	}
	return set, g.Wait()
}

// sought returns which of the contents sought a point needs. An object that
// cannot be walked at all is an error.
func (v *walker) sought(ctx context.Context, root object.ID) ([]content.ID, error) {
	objects, err := v.objects(ctx, root)
	if err != nil {
		return nil, err
	}
	set := map[content.ID]bool{}
	for _, id := range objects {
		_, hits, err := v.visit(ctx, id)
		if err != nil {
			return nil, err
		}
		for _, cid := range hits {
			set[cid] = true
		}
	}
	out := make([]content.ID, 0, len(set))
	for cid := range set {
		out = append(out, cid)
	}
	slices.SortFunc(out, func(a, b content.ID) int { return strings.Compare(a.String(), b.String()) })
	return out, nil
}
