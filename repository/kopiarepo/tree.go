package kopiarepo

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// tree is the snapshot of a committed point, opened.
type tree struct {
	r    *Repository
	dr   repo.DirectRepository
	e    *entry
	cfg  pointConfig
	root map[string]*snapshot.DirEntry
}

func (r *Repository) openTree(ctx context.Context, e *entry) (*tree, error) {
	dr, err := r.eng.open(ctx)
	if err != nil {
		return nil, err
	}
	what := fmt.Sprintf("point %s", e.ID)
	id, err := object.ParseID(e.body.Root)
	if err != nil {
		return nil, damaged(ctx, err, what)
	}
	t := &tree{r: r, dr: dr, e: e}
	if t.root, _, err = getDir(ctx, dr, id); err != nil {
		return nil, damaged(ctx, err, what)
	}
	cfg := t.root[configFile]
	if cfg == nil {
		return nil, damaged(ctx, fmt.Errorf("%w: no %s", repository.ErrDamaged, configFile), what)
	}
	b, err := getObject(ctx, dr, cfg.ObjectID, maxConfig)
	if err == nil {
		err = json.Unmarshal(b, &t.cfg)
	}
	if err == nil && (t.cfg.Format != formatVersion || t.cfg.Point != e.ID || t.cfg.Chain != e.Chain) {
		err = fmt.Errorf("%s is that of point %q", configFile, t.cfg.Point)
	}
	if err != nil {
		return nil, damaged(ctx, err, what)
	}
	return t, nil
}

// disk opens the map of a disk. The record says what it must be.
func (t *tree) disk(ctx context.Context, id string) (*diskMap, error) {
	what := fmt.Sprintf("point %s, disk %s", t.e.ID, id)
	for i := range t.cfg.Disks {
		cfg := &t.cfg.Disks[i]
		if cfg.ID != id {
			continue
		}
		for _, d := range t.e.body.Disks {
			if d.ID == id && d.Size == cfg.Size && d.BlockSize == cfg.BlockSize && d.Root == cfg.Root {
				return t.r.newDiskMap(ctx, t.dr, t.root, cfg, what)
			}
		}
		return nil, fmt.Errorf("%s: %w: the snapshot does not agree with the record", what, repository.ErrDamaged)
	}
	return nil, fmt.Errorf("%s: %w", what, repository.ErrNotFound)
}

// dirBuilder collects the entries of a directory and what they sum up to.
type dirBuilder struct {
	mtime   fs.UTCTimestamp
	entries []*snapshot.DirEntry
	sum     fs.DirectorySummary
}

func (w *writer) newDir() *dirBuilder {
	t := fs.UTCTimestampFromTime(w.start)
	return &dirBuilder{mtime: t, sum: fs.DirectorySummary{MaxModTime: t}}
}

func (b *dirBuilder) file(name string, size int64, id object.ID) {
	b.add(&snapshot.DirEntry{
		Name: name, Type: snapshot.EntryTypeFile, Permissions: 0o600, FileSize: size, ModTime: b.mtime, ObjectID: id,
	})
}

func (b *dirBuilder) add(e *snapshot.DirEntry) {
	b.entries = append(b.entries, e)
	if e.ModTime.After(b.sum.MaxModTime) {
		b.sum.MaxModTime = e.ModTime
	}
	if s := e.DirSummary; s != nil {
		b.sum.TotalFileCount += s.TotalFileCount
		b.sum.TotalFileSize += s.TotalFileSize
		b.sum.TotalDirCount += s.TotalDirCount
		return
	}
	b.sum.TotalFileCount++
	b.sum.TotalFileSize += e.FileSize
}

// putDir stores a directory, and returns the entry to name it by.
func (w *writer) putDir(ctx context.Context, name string, b *dirBuilder) (*snapshot.DirEntry, error) {
	slices.SortFunc(b.entries, func(x, y *snapshot.DirEntry) int { return strings.Compare(x.Name, y.Name) })
	b.sum.TotalDirCount++
	body, err := json.Marshal(&snapshot.DirManifest{StreamType: "kopia:directory", Entries: b.entries, Summary: &b.sum})
	if err != nil {
		return nil, err
	}
	out, err := w.sess.put(ctx, append(body, '\n'), "k", DefaultCompressor)
	if err != nil {
		return nil, fmt.Errorf("directory %s: %w", name, err)
	}
	return &snapshot.DirEntry{
		Name: name, Type: snapshot.EntryTypeDirectory, Permissions: 0o700, ModTime: b.mtime, ObjectID: out.id, DirSummary: &b.sum,
	}, nil
}

// buildTree stores the directories of the point, and returns the root.
func (w *writer) buildTree(ctx context.Context) (*snapshot.DirEntry, []diskBody, error) {
	root, digests := w.newDir(), w.newDir()
	cfg := pointConfig{
		Format: formatVersion, Repo: w.r.info.ID, Point: w.id, Chain: w.spec.Chain, Name: w.spec.Name, Run: w.spec.Run,
		DigestKey: hexKey(w.key), Files: slices.Clone(w.files),
	}
	var disks []diskBody
	for _, d := range w.disks {
		dc, data, leaves, err := w.buildDisk(ctx, d)
		if err != nil {
			return nil, nil, fmt.Errorf("disk %s: %w", d.id, err)
		}
		root.add(data)
		digests.add(leaves)
		cfg.Disks = append(cfg.Disks, *dc)
		disks = append(disks, diskBody{ID: d.id, Size: d.size, BlockSize: d.blockSize, Root: dc.Root, Stats: d.Stats()})
	}
	for _, f := range w.files {
		root.file(fileEntry(f.Name), f.Size, w.fobjs[f.Name])
	}
	e, err := w.putDir(ctx, digestsName, digests)
	if err != nil {
		return nil, nil, err
	}
	root.add(e)
	b, err := json.MarshalIndent(&cfg, "", " ")
	if err != nil {
		return nil, nil, err
	}
	out, err := w.sess.put(ctx, append(b, '\n'), "k", DefaultCompressor)
	if err != nil {
		return nil, nil, err
	}
	root.file(configFile, int64(len(b)+1), out.id)
	e, err = w.putDir(ctx, "/", root)
	return e, disks, err
}

// buildDisk stores the directories of one disk. Shards of which nothing was
// written are the parent's, unread.
func (w *writer) buildDisk(ctx context.Context, d *diskWriter) (*diskConfig, *snapshot.DirEntry, *snapshot.DirEntry, error) {
	cfg := &diskConfig{ID: d.id, Size: d.size, BlockSize: d.blockSize, SegmentBytes: digest.SegmentSpan}
	zeros, zsegs := map[object.ID]bool{}, map[object.ID]bool{}
	sums := maps.Clone(d.sums)
	if sums == nil {
		sums = map[int64]repository.Digest{}
	}
	if d.parent != nil {
		maps.Copy(zeros, d.parent.zeros)
		maps.Copy(zsegs, d.parent.zsegs)
	}
	data, leaves := w.newDir(), w.newDir()
	for first := int64(0); first < d.segments(); first += shardSegments {
		last := min(first+shardSegments, d.segments())
		touched := d.parent == nil
		for s := first; s < last && !touched; s++ {
			_, touched = d.sealed[s]
		}
		if !touched {
			data.add(d.parent.root[eight(first)])
			if e := d.parent.digests[eight(first)]; e != nil {
				leaves.add(e)
			}
			continue
		}
		if err := w.buildShard(ctx, d, first, last, data, leaves, sums, zsegs); err != nil {
			return nil, nil, nil, err
		}
	}
	raw := encodeSums(sums)
	out, err := w.sess.put(ctx, raw, digestPrefix, DefaultCompressor)
	if err != nil {
		return nil, nil, nil, err
	}
	leaves.file(segmentsName, int64(len(raw)), out.id)
	cfg.Root = rootOf(w.hasher, d.size, sums)

	w.zeroMu.Lock()
	for n, id := range w.zeros {
		if n == d.blockSize || d.blocks() > 0 && n == d.blockLen(d.blocks()-1) {
			zeros[id] = true
		}
	}
	w.zeroMu.Unlock()
	cfg.Zeros, cfg.ZeroSegments = sortedObjects(zeros), sortedObjects(zsegs)

	dataEntry, err := w.putDir(ctx, diskDir(d.id), data)
	if err != nil {
		return nil, nil, nil, err
	}
	leafEntry, err := w.putDir(ctx, diskDir(d.id), leaves)
	return cfg, dataEntry, leafEntry, err
}

func (w *writer) buildShard(ctx context.Context, d *diskWriter, first, last int64, data, leaves *dirBuilder,
	sums map[int64]repository.Digest, zsegs map[object.ID]bool,
) error {
	shard, digests := w.newDir(), w.newDir()
	for s := first; s < last; s++ {
		out, written := d.sealed[s]
		switch {
		case !written && d.parent != nil:
			e, err := d.parent.entry(ctx, d.parent.root, "d", s)
			if err != nil {
				return err
			}
			if e == nil {
				return fmt.Errorf("segment %d of the parent: %w: it is missing", s, repository.ErrDamaged)
			}
			shard.add(e)
			if e, err = d.parent.entry(ctx, d.parent.digests, "h", s); err != nil {
				return err
			}
			if e != nil {
				digests.add(e)
			}
			continue
		case !written:
			z, err := w.zeroSegment(ctx, d.geometry, s)
			if err != nil {
				return err
			}
			out = sealedSegment{object: z}
		}
		shard.file(eight(s), d.segmentLen(s), out.object)
		if out.digests == object.EmptyID {
			delete(sums, s)
			zsegs[out.object] = true
			continue
		}
		sums[s] = out.sum
		digests.file(eight(s), int64(leavesOf(d.segmentLen(s)))*32, out.digests)
	}
	e, err := w.putDir(ctx, eight(first), shard)
	if err != nil {
		return err
	}
	data.add(e)
	if len(digests.entries) == 0 {
		return nil
	}
	if e, err = w.putDir(ctx, eight(first), digests); err != nil {
		return err
	}
	leaves.add(e)
	return nil
}

func sortedObjects(m map[object.ID]bool) []object.ID {
	out := slices.Collect(maps.Keys(m))
	slices.SortFunc(out, func(a, b object.ID) int { return strings.Compare(a.String(), b.String()) })
	return out
}
