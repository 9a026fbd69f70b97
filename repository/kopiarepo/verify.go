package kopiarepo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/repository"
)

// Verify checks what is stored. Blobs that turn out damaged are quarantined: later
// points store again what is in them.
func (r *Repository) Verify(ctx context.Context, opts *repository.VerifyOptions) (*repository.VerifyReport, error) {
	if err := r.check(ctx); err != nil {
		return nil, err
	}
	if opts == nil {
		opts = &repository.VerifyOptions{}
	}
	v := &verifier{r: r, opts: opts, report: &repository.VerifyReport{}, bad: map[blob.ID]bool{}, good: map[blob.ID]bool{}}
	gctx, done := r.store.guard(ctx)
	if err := done(v.run(gctx)); err != nil {
		return nil, fmt.Errorf("verify: %w", err)
	}
	return v.report, nil
}

type verifier struct {
	r      *Repository
	opts   *repository.VerifyOptions
	points []*entry
	all    bool // every point of the repository is checked

	mu          sync.Mutex
	report      *repository.VerifyReport
	bad, good   map[blob.ID]bool // packs with wrong and with right bytes
	done, total int64
}

func (v *verifier) found(d repository.Damage) {
	v.mu.Lock()
	v.report.Damages = append(v.report.Damages, d)
	v.mu.Unlock()
}

// progress counts bytes that were looked at.
func (v *verifier) progress(n int64) {
	v.mu.Lock()
	v.done += n
	done, total := v.done, v.total
	v.mu.Unlock()
	if v.opts.Progress != nil && total > 0 {
		v.opts.Progress(min(done, total), total)
	}
}

func (v *verifier) run(ctx context.Context) error {
	r := v.r
	if err := v.settled(ctx); err != nil {
		return err
	}
	v.r.store.forgetSource()
	dr, err := r.eng.open(ctx)
	if err != nil {
		if !errors.Is(err, repository.ErrDamaged) {
			return err
		}
		v.found(repository.Damage{Object: "storage engine", Problem: "does not open", Detail: err.Error(), Points: v.ids()})
	}
	if err := v.blobs(ctx, dr); err != nil {
		return err
	}
	if v.opts.Level >= repository.VerifyData && dr != nil {
		if err := v.data(ctx, dr); err != nil {
			return err
		}
	}
	if v.opts.Level >= repository.VerifyBlobs {
		v.quarantine(ctx)
	}
	if err := v.forgive(ctx); err != nil {
		return err
	}
	v.merge()
	return nil
}

// settled finds the points and checks our own files. Others may be at work: what is
// found is looked for again, and what was gone by itself was no damage.
func (v *verifier) settled(ctx context.Context) error {
	var before []repository.Damage
	for pass := range 5 {
		v.points, v.report = nil, &repository.VerifyReport{}
		if err := v.r.inv.load(ctx); err != nil {
			return err
		}
		if err := v.r.loadQuarantine(ctx); err != nil {
			return err
		}
		if err := v.selectPoints(ctx); err != nil {
			return err
		}
		if err := v.ownFiles(ctx); err != nil {
			return err
		}
		if pass > 0 {
			v.report.Damages = slices.DeleteFunc(v.report.Damages, func(d repository.Damage) bool {
				return !slices.ContainsFunc(before, func(b repository.Damage) bool { return b.Object == d.Object && b.Problem == d.Problem })
			})
		}
		now := v.report.Damages
		if len(now) == 0 || pass > 0 && len(now) == len(before) {
			break
		}
		before = now
	}
	return nil
}

// forgive takes back what was found of points that somebody deleted meanwhile.
func (v *verifier) forgive(ctx context.Context) error {
	if len(v.report.Damages) == 0 {
		return nil
	}
	chains, err := v.r.allChains(ctx)
	if err != nil {
		return err
	}
	dead := map[repository.PointID]bool{}
	for _, c := range chains {
		for id := range c.dead {
			dead[id] = true
		}
	}
	gone := func(id repository.PointID) bool { return dead[id] }
	v.report.Points = slices.DeleteFunc(v.report.Points, gone)
	v.report.Damages = slices.DeleteFunc(v.report.Damages, func(d repository.Damage) bool {
		return len(d.Points) > 0 && !slices.ContainsFunc(d.Points, func(id repository.PointID) bool { return !dead[id] })
	})
	for i := range v.report.Damages {
		d := &v.report.Damages[i]
		d.Points = slices.DeleteFunc(slices.Clone(d.Points), gone)
	}
	return nil
}

func (v *verifier) ids() []repository.PointID {
	out := make([]repository.PointID, len(v.points))
	for i, e := range v.points {
		out[i] = e.ID
	}
	return out
}

// selectPoints finds the points to check and reports those that are lost.
func (v *verifier) selectPoints(ctx context.Context) error {
	chains, err := v.r.allChains(ctx)
	if err != nil {
		return err
	}
	v.all = len(v.opts.Points) == 0
	want := map[repository.PointID]bool{}
	for _, id := range v.opts.Points {
		want[id] = true
	}
	for _, c := range chains {
		for _, d := range c.issues {
			v.found(d)
		}
		for _, p := range c.listed() {
			if !v.all && !want[p.ID] {
				continue
			}
			delete(want, p.ID)
			v.report.Points = append(v.report.Points, p.ID)
			if e := c.live[p.ID]; e != nil {
				v.points = append(v.points, e)
				continue
			}
			v.found(repository.Damage{
				Object: primary + recordDir(c.name) + "/" + number(c.lostAt[p.ID].Log), Problem: string(p.State), Detail: p.Detail,
				Points: []repository.PointID{p.ID},
			})
		}
	}
	for id := range want {
		return fmt.Errorf("point %s: %w", id, repository.ErrNotFound)
	}
	return nil
}

// blobs checks stored blobs against the inventory, and finds out which points need
// what is damaged.
func (v *verifier) blobs(ctx context.Context, dr repo.DirectRepository) error {
	for _, gap := range v.r.inv.problems() {
		v.found(repository.Damage{Object: gap, Problem: "inventory", Detail: "what it said of stored blobs is lost"})
	}
	entries := v.r.inv.settled()
	for _, id := range passwordBlobs {
		// After a change of the password that was interrupted: those that are in use.
		if e, ok := v.r.inv.lookup(string(id)); ok {
			entries[string(id)] = e
		}
	}
	var needed map[blob.ID]bool
	if !v.all && dr != nil {
		needed = map[blob.ID]bool{}
		w := v.r.newWalker(dr)
		for _, e := range v.points {
			set, err := v.packsOf(ctx, w, e)
			if err != nil && ctx.Err() != nil {
				return err
			}
			maps.Copy(needed, set)
		}
	}
	names := slices.Sorted(maps.Keys(entries))
	if needed != nil {
		names = slices.DeleteFunc(names, func(name string) bool { return !critical(name) && !needed[blob.ID(name)] })
	}
	v.plan(entries, names)

	packs := map[blob.ID]repository.Damage{} // damaged packs
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for _, name := range names {
		g.Go(func() error {
			d, err := v.blob(gctx, entries[name])
			if err != nil {
				return err
			}
			if d != nil {
				mu.Lock()
				packs[blob.ID(name)] = *d
				mu.Unlock()
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return v.affected(ctx, dr, packs)
}

func (v *verifier) packsOf(ctx context.Context, w *walker, e *entry) (map[blob.ID]bool, error) {
	t, err := v.r.openTree(ctx, e)
	if err != nil {
		return nil, err
	}
	root, err := t.rootID()
	if err != nil {
		return nil, err
	}
	return w.packs(ctx, root)
}

// plan adds up what there is to read.
func (v *verifier) plan(entries map[string]blobEntry, names []string) {
	if v.opts.Level < repository.VerifyBlobs {
		return
	}
	for _, name := range names {
		v.total += entries[name].Size * int64(1+len(v.copies(name)))
	}
	if v.opts.Level >= repository.VerifyData {
		for _, e := range v.points {
			for _, d := range e.body.Disks {
				v.total += d.Size
			}
		}
	}
}

func (v *verifier) copies(name string) []string {
	if !critical(name) {
		return nil
	}
	return copiesOf(blob.ID(name))
}

// blob checks one blob and its copies. It returns the damage if no good form of
// it is left.
func (v *verifier) blob(ctx context.Context, e blobEntry) (*repository.Damage, error) {
	v.mu.Lock()
	v.report.Blobs++
	v.mu.Unlock()
	id := blob.ID(e.Name)
	files := append([]string{blobFile(id)}, v.copies(e.Name)...)
	var damages []repository.Damage
	for _, file := range files {
		problem, err := v.file(ctx, file, e)
		if err != nil {
			return nil, err
		}
		if problem != "" {
			damages = append(damages, repository.Damage{Object: file, Problem: problem, Detail: fmt.Sprintf("blob of %d bytes", e.Size)})
		}
	}
	if len(damages) == 0 {
		v.mark(v.good, id)
		return nil, nil
	}
	// Somebody's maintenance may have deleted it while we looked.
	if err := v.r.inv.load(ctx); err != nil {
		return nil, err
	}
	if now, ok := v.r.inv.lookup(e.Name); !ok || now.Sum != e.Sum {
		return nil, nil
	}
	if len(damages) < len(files) {
		for _, d := range damages {
			d.Repairable = true
			v.found(d)
		}
		return nil, nil
	}
	for _, d := range damages[1:] {
		v.found(d)
	}
	return &damages[0], nil
}

func (v *verifier) mark(set map[blob.ID]bool, id blob.ID) {
	v.mu.Lock()
	set[id] = true
	v.mu.Unlock()
}

// file compares one file with the inventory.
func (v *verifier) file(ctx context.Context, file string, e blobEntry) (problem string, err error) {
	if e.Name == scheduleBlob {
		if b, err := v.r.dir.get(ctx, file, maxSmallBlob); err == nil && v.r.store.authenticSchedule(scheduleBlob, b) {
			v.progress(e.Size)
			return "", nil
		}
	}
	size, _, err := v.r.dir.stat(ctx, file)
	switch {
	case err != nil && ctx.Err() != nil:
		return "", err
	case isAbsent(err):
		problem = "missing"
	case err != nil:
		problem = "unreadable"
	case size < e.Size:
		problem = "truncated"
	case size != e.Size:
		problem = "size"
	}
	if v.opts.Level < repository.VerifyBlobs && !isPasswordBlob(e.Name) {
		return problem, nil // of another password, a file has the right size
	}
	if problem != "" {
		v.progress(e.Size)
		return problem, nil
	}
	h := newSum()
	err = v.r.dir.readRange(ctx, file, 0, -1, func(p []byte) error {
		_, _ = h.Write(p)
		v.progress(int64(len(p)))
		v.mu.Lock()
		v.report.Bytes += int64(len(p))
		v.mu.Unlock()
		return ctx.Err()
	})
	switch {
	case err != nil && ctx.Err() != nil:
		return "", err
	case err != nil:
		return "unreadable", nil //nolint:nilerr // a finding
	case sum(h.Sum(nil)) != e.Sum:
		return "digest", nil
	}
	return "", nil
}

// affected finds out which contents of damaged packs cannot be read, and which
// points need them.
func (v *verifier) affected(ctx context.Context, dr repo.DirectRepository, packs map[blob.ID]repository.Damage) error {
	if len(packs) == 0 {
		return nil
	}
	var contentsOf map[blob.ID][]content.ID
	if dr != nil {
		var err error
		if contentsOf, err = v.r.readPacksOf(ctx, dr, slices.Collect(maps.Keys(packs))); err != nil {
			return err
		}
	}
	w := v.r.newWalker(dr)
	packOf := map[content.ID]blob.ID{}
	w.want = map[content.ID]bool{}
	for id, cids := range contentsOf {
		for _, cid := range cids {
			w.want[cid] = true
			packOf[cid] = id
		}
	}
	hit := map[blob.ID][]repository.PointID{}
	for _, e := range v.points {
		if dr == nil || len(w.want) == 0 {
			break
		}
		cids, err := v.soughtBy(ctx, w, e)
		if err != nil {
			if ctx.Err() != nil {
				return err
			}
			v.found(repository.Damage{
				Object: "point " + string(e.ID), Problem: "unreadable", Detail: err.Error(), Points: []repository.PointID{e.ID},
			})
			continue
		}
		for _, cid := range cids {
			if id := packOf[cid]; !slices.Contains(hit[id], e.ID) {
				hit[id] = append(hit[id], e.ID)
			}
		}
	}
	for id, d := range packs {
		v.mark(v.bad, id)
		d.Points = hit[id]
		if n := len(contentsOf[id]); n > 0 {
			d.Detail = fmt.Sprintf("%s, of which %d pieces cannot be read", d.Detail, n)
		} else if isPack(id) {
			d.Detail += ", of which everything in use can be read"
		}
		v.found(d)
	}
	return nil
}

func isPack(id blob.ID) bool {
	return strings.HasPrefix(string(id), "p") || strings.HasPrefix(string(id), "q")
}

func (v *verifier) soughtBy(ctx context.Context, w *walker, e *entry) ([]content.ID, error) {
	t, err := v.r.openTree(ctx, e)
	if err != nil {
		return nil, err
	}
	root, err := t.rootID()
	if err != nil {
		return nil, err
	}
	out, err := w.sought(ctx, root)
	// Blocks of zeros are never read, so a point comes back without them.
	zeros := map[content.ID]bool{}
	for _, d := range t.cfg.Disks {
		for _, z := range d.Zeros {
			if cid, _, ok := z.ContentID(); ok {
				zeros[cid] = true
			}
		}
	}
	return slices.DeleteFunc(out, func(cid content.ID) bool { return zeros[cid] }), err
}

// readPacksOf reads every content that the engine finds in packs, and returns
// those that cannot be read.
func (r *Repository) readPacksOf(ctx context.Context, dr repo.DirectRepository, packs []blob.ID) (map[blob.ID][]content.ID, error) {
	want := map[blob.ID]bool{}
	for _, id := range packs {
		want[id] = true
	}
	var infos []content.Info
	err := dr.ContentReader().IterateContents(ctx, content.IterateOptions{}, func(ci content.Info) error {
		if want[ci.PackBlobID] {
			infos = append(infos, ci)
		}
		return ctx.Err()
	})
	if err != nil {
		return nil, err
	}
	bad := map[blob.ID][]content.ID{}
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for _, ci := range infos {
		g.Go(func() error {
			if _, err := getContent(gctx, dr, ci.ContentID); err != nil {
				if gctx.Err() != nil {
					return gctx.Err()
				}
				mu.Lock()
				bad[ci.PackBlobID] = append(bad[ci.PackBlobID], ci.ContentID)
				mu.Unlock()
			}
			return nil
		})
	}
	return bad, g.Wait()
}

// quarantine remembers which packs are damaged.
func (v *verifier) quarantine(ctx context.Context) {
	v.r.mu.Lock()
	set := maps.Clone(v.r.quarantine)
	v.r.mu.Unlock()
	if set == nil {
		set = map[blob.ID]bool{}
	}
	maps.Copy(set, v.bad)
	for id := range v.good {
		delete(set, id)
	}
	for id := range set {
		if _, ok := v.r.inv.lookup(string(id)); !ok {
			delete(set, id)
		}
	}
	if err := v.r.setQuarantine(ctx, set); err != nil {
		v.r.cfg.Logger.Warn("the list of damaged blobs was not stored", "error", err)
	}
}

// merge sorts findings and drops repeats.
func (v *verifier) merge() {
	slices.SortStableFunc(v.report.Damages, func(a, b repository.Damage) int {
		if c := strings.Compare(a.Object, b.Object); c != 0 {
			return c
		}
		return strings.Compare(a.Problem, b.Problem)
	})
	v.report.Damages = slices.CompactFunc(v.report.Damages, func(a, b repository.Damage) bool {
		return a.Object == b.Object && a.Problem == b.Problem && a.Detail == b.Detail && slices.Equal(a.Points, b.Points)
	})
}
