package fakes

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// verifier collects what a check finds. Each blob is looked at once, and each
// finding names every point that is affected.
type verifier struct {
	r        *Repository
	opts     repository.VerifyOptions
	report   *repository.VerifyReport
	sizes    blobSizes
	users    map[blobRef][]repository.PointID
	maps     map[blobRef]segmentMap // decoded; nil: damaged
	done     int64
	total    int64
	reported map[string]bool
}

// Verify implements repository.Repository.
func (r *Repository) Verify(ctx context.Context, opts *repository.VerifyOptions) (*repository.VerifyReport, error) {
	if err := r.begin(ctx); err != nil {
		return nil, err
	}
	v := &verifier{
		r: r, report: &repository.VerifyReport{},
		users: map[blobRef][]repository.PointID{}, reported: map[string]bool{},
	}
	if opts != nil {
		v.opts = *opts
	}
	if err := v.run(ctx); err != nil {
		return nil, fmt.Errorf("verify: %w", err)
	}
	return v.report, nil
}

func (v *verifier) run(ctx context.Context) error {
	sc, err := v.r.scan(ctx, "")
	if err != nil {
		return err
	}
	v.report.Bytes += sc.read
	for _, id := range v.opts.Points {
		if sc.find(id) == nil {
			return fmt.Errorf("point %s: %w", id, repository.ErrNotFound)
		}
	}
	if v.sizes, err = v.r.sizes(ctx); err != nil {
		return err
	}
	var disks []verifiedDisk
	for i := range sc.points {
		sp := &sc.points[i]
		if len(v.opts.Points) > 0 && !slices.Contains(v.opts.Points, sp.place.id) {
			continue
		}
		v.report.Points = append(v.report.Points, sp.place.id)
		v.report.Blobs++
		if sp.rec == nil {
			problem := "digest"
			if sp.point.State == repository.Vanished {
				problem = "missing"
			}
			v.find(sp.place.blob(prefixRecord), problem, sp.point.Detail, sp.place.id)
			continue
		}
		found, err := v.collect(ctx, sp.rec)
		if err != nil {
			return err
		}
		disks = append(disks, found...)
	}
	if len(v.opts.Points) == 0 {
		v.report.Damages = append(v.report.Damages, sc.problems...)
		if err := v.sealed(ctx); err != nil {
			return err
		}
		if v.opts.Level >= repository.VerifyBlobs {
			if err := v.unused(ctx); err != nil {
				return err
			}
		}
	}
	if err := v.blobs(ctx); err != nil {
		return err
	}
	for i := range disks {
		if err := v.disk(ctx, &disks[i]); err != nil {
			return err
		}
	}
	return v.forgive(ctx)
}

// forgive takes back what was found of points that somebody deleted meanwhile.
func (v *verifier) forgive(ctx context.Context) error {
	if len(v.report.Damages) == 0 {
		return nil
	}
	sc, err := v.r.scan(ctx, "")
	if err != nil {
		return err
	}
	gone := func(id repository.PointID) bool { return sc.find(id) == nil }
	v.report.Points = slices.DeleteFunc(v.report.Points, gone)
	v.report.Damages = slices.DeleteFunc(v.report.Damages, func(d repository.Damage) bool {
		return len(d.Points) > 0 && !slices.ContainsFunc(d.Points, func(id repository.PointID) bool { return !gone(id) })
	})
	for i := range v.report.Damages {
		d := &v.report.Damages[i]
		d.Points = slices.DeleteFunc(slices.Clone(d.Points), gone)
	}
	return nil
}

func (v *verifier) find(object, problem, detail string, points ...repository.PointID) {
	v.reported[object] = true
	v.report.Damages = append(v.report.Damages, repository.Damage{
		Object: object, Problem: problem, Detail: detail, Points: points,
	})
}

func (v *verifier) use(ref blobRef, id repository.PointID) {
	if ids := v.users[ref]; len(ids) == 0 || ids[len(ids)-1] != id {
		v.users[ref] = append(ids, id)
	}
}

// verifiedDisk is a disk whose maps could be read; rec of the point it is of.
type verifiedDisk struct {
	point repository.PointID
	disk  *loadedDisk
	key   repository.DigestKey
}

// collect notes every blob that a point uses. Maps are read for that.
func (v *verifier) collect(ctx context.Context, rec *pointRecord) (out []verifiedDisk, err error) {
	for _, f := range rec.Files {
		v.use(f.Blob, rec.ID)
	}
	for _, d := range rec.Disks {
		v.use(d.Manifest, rec.ID)
		m, err := v.r.loadManifest(ctx, d.Manifest)
		if err != nil && !errors.Is(err, repository.ErrDamaged) {
			return nil, err
		}
		if err != nil {
			continue // found again, as a blob
		}
		v.report.Bytes += d.Manifest.Size
		if m.Size != d.Disk.Size || m.BlockSize != d.Disk.BlockSize {
			v.find(d.Manifest.Name, "size", "not the geometry of the record", rec.ID)
			continue
		}
		ld := &loadedDisk{d.Disk, m, map[int64]segmentMap{}}
		whole := true
		for _, ref := range m.Segments {
			v.use(ref.Map, rec.ID)
			seg, err := v.segment(ctx, ref, m.SegmentBlocks)
			if err != nil {
				return nil, err
			}
			whole = whole && seg != nil
			ld.segments[ref.Index] = seg
			for _, e := range seg {
				v.use(e.ref(), rec.ID)
			}
		}
		if whole {
			out = append(out, verifiedDisk{rec.ID, ld, v.r.digestKey(rec.Chain)})
		}
	}
	return out, nil
}

// segment reads a map, once; nil if it is damaged.
func (v *verifier) segment(ctx context.Context, ref segmentRef, blocks int) (segmentMap, error) {
	if seg, ok := v.maps[ref.Map]; ok {
		return seg, nil
	}
	seg, err := v.r.loadSegment(ctx, ref, blocks)
	if err != nil && !errors.Is(err, repository.ErrDamaged) {
		return nil, err
	}
	if err == nil {
		v.report.Bytes += ref.Map.Size
	}
	setIn(&v.maps, ref.Map, seg)
	return seg, nil
}

// blobs checks every blob in use: presence and size, and at deeper levels the
// digest. Maps and manifests were read, so their digests are checked anyway.
func (v *verifier) blobs(ctx context.Context) error {
	refs := slices.SortedFunc(maps.Keys(v.users), func(a, b blobRef) int { return strings.Compare(a.Name, b.Name) })
	for _, ref := range refs {
		v.total += ref.Size
	}
	if v.opts.Level >= repository.VerifyData {
		v.total *= 2 // the blocks are read again, against their leaves
	}
	for _, ref := range refs {
		v.report.Blobs++
		problem := v.sizes.check(ref)
		structure := !strings.HasPrefix(ref.Name, prefixBlock) && !strings.HasPrefix(ref.Name, prefixFile)
		if problem == "" && (structure || v.opts.Level >= repository.VerifyBlobs) {
			var err error
			if problem, err = v.content(ctx, ref); err != nil {
				return err
			}
		}
		if problem != "" {
			v.find(ref.Name, problem, "", v.users[ref]...)
		}
		v.progress(ref.Size)
	}
	return nil
}

func (v *verifier) content(ctx context.Context, ref blobRef) (problem string, err error) {
	data, err := v.r.conn.get(ctx, ref.Name)
	if errors.Is(err, errNoBlob) {
		return "missing", nil
	}
	if err != nil {
		return "", err
	}
	v.report.Bytes += int64(len(data))
	return ref.check(data), nil
}

// unused checks content that no point uses. It may go away meanwhile.
func (v *verifier) unused(ctx context.Context) error {
	used := map[string]bool{}
	for ref := range v.users {
		used[ref.Name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(v.sizes)) {
		if used[name] {
			continue
		}
		v.report.Blobs++
		problem, err := v.content(ctx, blobRef{name, v.sizes[name]})
		if err != nil {
			return err
		}
		if problem != "" && problem != "missing" {
			v.find(name, problem, "no point uses it")
		}
	}
	return nil
}

func (v *verifier) progress(n int64) {
	v.done = min(v.done+n, v.total)
	if v.opts.Progress != nil {
		v.opts.Progress(v.done, v.total)
	}
}

// disk checks the root of a disk against its leaves, and at the deepest level the
// leaves against the data.
func (v *verifier) disk(ctx context.Context, vd *verifiedDisk) error {
	ld := vd.disk
	h := digest.New(vd.key)
	root := newRootBuilder(vd.key, ld.disk.Size, ld.disk.BlockSize)
	for i := range ld.indexes() {
		e, _ := ld.entry(i)
		root.add(i, e.leaves)
		if v.opts.Level < repository.VerifyData || v.reported[e.ref().Name] {
			continue
		}
		object := fmt.Sprintf("%s/%s/block %d", vd.point, ld.disk.ID, i)
		data, err := v.r.getContent(ctx, e.ref())
		switch {
		case errors.Is(err, repository.ErrDamaged):
			v.find(object, "digest", err.Error(), vd.point)
		case err != nil:
			return err
		case !slices.Equal(h.Leaves(nil, data), e.leaves):
			v.find(object, "digest", "the data does not match its leaves", vd.point)
		case len(data) != repository.BlockLen(ld.disk.Size, ld.disk.BlockSize, i):
			v.find(object, "size", fmt.Sprintf("%d bytes", len(data)), vd.point)
		}
		v.report.Bytes += int64(len(data))
		v.progress(int64(len(data)))
	}
	if root.sum() != ld.disk.Root {
		v.find(fmt.Sprintf("%s/%s", vd.point, ld.disk.ID), "digest", "the leaves do not match the root", vd.point)
	}
	return nil
}

// sealed checks the sealed blobs that belong to no point.
func (v *verifier) sealed(ctx context.Context) error {
	for _, prefix := range []string{prefixNote, prefixLock, prefixPin} {
		entries, err := v.r.conn.list(ctx, prefix)
		if err != nil {
			return err
		}
		for _, e := range entries {
			raw, err := v.r.conn.get(ctx, e.name)
			if errors.Is(err, errNoBlob) {
				continue
			}
			if err != nil {
				return err
			}
			v.report.Blobs++
			v.report.Bytes += int64(len(raw))
			var any map[string]any
			if err := v.r.unseal(e.name, raw, &any); err != nil {
				v.find(e.name, "digest", err.Error())
			}
		}
	}
	return nil
}
