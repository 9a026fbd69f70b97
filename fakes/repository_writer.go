package fakes

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/repository"
)

// pin is the sealed blob that shields what a point in the making uses.
type pin struct {
	Started time.Time `json:"started"`
	Maps    []blobRef `json:"maps,omitempty"`
}

// memoryWriter implements repository.Writer.
type memoryWriter struct {
	r      *Repository
	spec   repository.PointSpec
	id     repository.PointID
	key    repository.DigestKey
	pin    string
	parent map[string]parentDisk

	mu    sync.Mutex
	ended bool
	disks map[string]*memoryDisk
	files map[string]*fileRecord // nil while it is being stored
}

type parentDisk struct {
	disk     repository.Disk
	manifest *diskManifest
}

var errEnded = errors.New("the point was committed or aborted before")

// Begin implements repository.Repository.
func (r *Repository) Begin(ctx context.Context, spec *repository.PointSpec) (repository.Writer, error) {
	if err := r.begin(ctx); err != nil {
		return nil, err
	}
	switch {
	case spec == nil:
		return nil, errors.New("begin a point: no PointSpec")
	case !validName(spec.Chain, 128, false, "._-"):
		return nil, fmt.Errorf("begin a point: bad chain %q", spec.Chain)
	case !validName(spec.Run, 32, false, ""):
		return nil, fmt.Errorf("begin a point: bad run %q", spec.Run)
	}
	if spec.Lock != nil {
		if err := spec.Lock.Check(ctx); err != nil {
			return nil, fmt.Errorf("begin a point: %w", err)
		}
	}
	w := &memoryWriter{
		r: r, spec: *spec, key: r.digestKey(spec.Chain),
		parent: map[string]parentDisk{}, disks: map[string]*memoryDisk{}, files: map[string]*fileRecord{},
	}
	n := r.conn.s.nonce(spec.Chain + "/" + spec.Run)
	sum := blake3.Sum256(fmt.Appendf(nil, "%s %s %s %d", r.format.ID, spec.Chain, spec.Run, n))
	w.id = repository.PointID("p" + hex.EncodeToString(sum[:10]))
	w.pin = pinName(r.clock(), w.id)

	p := pin{Started: r.clock().UTC()}
	if spec.Parent != "" {
		rec, err := r.lookup(ctx, spec.Parent)
		if err != nil {
			return nil, fmt.Errorf("begin a point: parent: %w", err)
		}
		if rec.Chain != spec.Chain {
			return nil, fmt.Errorf("begin a point: parent %s is of chain %s, not %s", spec.Parent, rec.Chain, spec.Chain)
		}
		for _, d := range rec.Disks {
			m, err := r.loadManifest(ctx, d.Manifest)
			if err != nil {
				return nil, fmt.Errorf("begin a point: parent %s: disk %s: %w", spec.Parent, d.Disk.ID, err)
			}
			w.parent[d.Disk.ID] = parentDisk{d.Disk, m}
			for _, s := range m.Segments {
				p.Maps = append(p.Maps, s.Map)
			}
		}
	}
	raw, err := r.seal(w.pin, &p)
	if err != nil {
		return nil, err
	}
	if err := r.conn.put(ctx, w.pin, raw, nil); err != nil {
		return nil, fmt.Errorf("begin a point: %w", err)
	}
	if spec.Parent != "" {
		// Deleted and collected before the pin was there? Then it shields nothing.
		if _, err := r.lookup(ctx, spec.Parent); err != nil {
			return nil, errors.Join(fmt.Errorf("begin a point: parent: %w", err), r.conn.del(ctx, w.pin, nil))
		}
	}
	return w, nil
}

// ID implements repository.Writer.
func (w *memoryWriter) ID() repository.PointID { return w.id }

// DigestKey implements repository.Writer.
func (w *memoryWriter) DigestKey() repository.DigestKey { return w.key }

func (w *memoryWriter) begin(ctx context.Context) error {
	w.mu.Lock()
	ended := w.ended
	w.mu.Unlock()
	if ended {
		return fmt.Errorf("point %s: %w", w.id, errEnded)
	}
	return w.r.begin(ctx)
}

// Disk implements repository.Writer.
func (w *memoryWriter) Disk(ctx context.Context, spec repository.DiskSpec) (repository.DiskWriter, error) {
	if err := w.begin(ctx); err != nil {
		return nil, err
	}
	d := &memoryDisk{w: w, spec: spec, segBlocks: w.r.format.SegmentBlocks, flushing: make(chan struct{}, 1)}
	if spec.Inherit {
		p, ok := w.parent[spec.ID]
		switch {
		case w.spec.Parent == "":
			return nil, fmt.Errorf("disk %s: the point has no parent to inherit from", spec.ID)
		case !ok:
			return nil, fmt.Errorf("disk %s: %w in parent %s", spec.ID, repository.ErrNotFound, w.spec.Parent)
		case p.disk.Size != spec.Size:
			return nil, fmt.Errorf("disk %s: size %d, the parent's has %d", spec.ID, spec.Size, p.disk.Size)
		case spec.BlockSize == 0:
			d.spec.BlockSize = p.disk.BlockSize
		case p.disk.BlockSize != spec.BlockSize:
			return nil, fmt.Errorf("disk %s: block size %d, the parent's has %d", spec.ID, spec.BlockSize, p.disk.BlockSize)
		}
		d.segBlocks = p.manifest.SegmentBlocks
		d.inherited = map[int64]segmentRef{}
		for _, s := range p.manifest.Segments {
			d.inherited[s.Index] = s
		}
	}
	switch {
	case !validName(spec.ID, 64, true, "._-"):
		return nil, fmt.Errorf("bad disk ID %q", spec.ID)
	case spec.Size < 0:
		return nil, fmt.Errorf("disk %s: size %d", spec.ID, spec.Size)
	case !repository.ValidBlockSize(d.spec.BlockSize):
		return nil, fmt.Errorf("disk %s: block size %d", spec.ID, d.spec.BlockSize)
	}
	d.blocks = repository.Blocks(d.spec.Size, d.spec.BlockSize)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.disks[spec.ID] != nil {
		return nil, fmt.Errorf("disk %s of the point: %w", spec.ID, repository.ErrExists)
	}
	w.disks[spec.ID] = d
	return d, nil
}

// File implements repository.Writer.
func (w *memoryWriter) File(ctx context.Context, name string, rd io.Reader) error {
	if err := w.begin(ctx); err != nil {
		return err
	}
	if !validName(name, 64, true, "._-") {
		return fmt.Errorf("bad file name %q", name)
	}
	w.mu.Lock()
	_, taken := w.files[name]
	if !taken {
		w.files[name] = nil
	}
	w.mu.Unlock()
	if taken {
		return fmt.Errorf("file %s of the point: %w", name, repository.ErrExists)
	}
	rec, err := w.storeFile(ctx, name, rd)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		delete(w.files, name)
		return fmt.Errorf("file %s: %w", name, err)
	}
	w.files[name] = rec
	return nil
}

func (w *memoryWriter) storeFile(ctx context.Context, name string, rd io.Reader) (*fileRecord, error) {
	var b bytes.Buffer
	n, err := io.Copy(&b, io.LimitReader(rd, repository.MaxFile+1))
	if err != nil {
		return nil, err
	}
	if n > repository.MaxFile {
		return nil, fmt.Errorf("more than %d bytes", repository.MaxFile)
	}
	ref, _, err := w.r.putContent(ctx, prefixFile, b.Bytes())
	if err != nil {
		return nil, err
	}
	return &fileRecord{name, ref}, nil
}

// Commit implements repository.Writer.
func (w *memoryWriter) Commit(ctx context.Context, info *repository.CommitInfo) (*repository.Proof, error) {
	if err := w.begin(ctx); err != nil {
		return nil, err
	}
	if info == nil {
		info = &repository.CommitInfo{}
	}
	if len(info.Meta) > 0 && !json.Valid(info.Meta) {
		return nil, fmt.Errorf("commit %s: the meta document is not JSON", w.id)
	}
	rec, needs, err := w.close(info)
	if err != nil {
		return nil, fmt.Errorf("commit %s: %w", w.id, err)
	}
	proof, err := w.commit(ctx, rec, needs)
	if !errors.Is(err, repository.ErrOutcomeUnknown) {
		// What is known to exist, or not to, needs no pin. One that stays gets stale.
		_ = w.r.conn.del(ctx, w.pin, nil)
	}
	if err != nil {
		return nil, fmt.Errorf("commit %s: %w", w.id, err)
	}
	return proof, nil
}

// close ends the writer and makes its record, but for the place in the chain.
func (w *memoryWriter) close(info *repository.CommitInfo) (*pointRecord, map[string]int64, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return nil, nil, errEnded
	}
	rec := &pointRecord{
		ID: w.id, Chain: w.spec.Chain, Name: w.spec.Name, Run: w.spec.Run, Parent: w.spec.Parent,
		Created: info.Created.UTC(), Labels: maps.Clone(info.Labels), Meta: slices.Clone(info.Meta),
	}
	if w.spec.Lock != nil {
		rec.Epoch = w.spec.Lock.Epoch()
	}
	needs := map[string]int64{}
	for id, d := range w.disks {
		dr, ok := d.result()
		if !ok {
			return nil, nil, fmt.Errorf("disk %s is open", id)
		}
		rec.Disks = append(rec.Disks, *dr)
		maps.Copy(needs, d.needs)
	}
	for name, f := range w.files {
		if f == nil {
			return nil, nil, fmt.Errorf("file %s is open", name)
		}
		rec.Files = append(rec.Files, *f)
		needs[f.Blob.Name] = f.Blob.Size
	}
	if len(needs) == 0 {
		return nil, nil, errors.New("it has neither disks nor files")
	}
	slices.SortFunc(rec.Disks, func(a, b diskRecord) int { return cmp.Compare(a.Disk.ID, b.Disk.ID) })
	slices.SortFunc(rec.Files, func(a, b fileRecord) int { return cmp.Compare(a.Name, b.Name) })
	w.ended = true
	return rec, needs, nil
}

var errSlotTaken = errors.New("another point took this place of the chain")

func (w *memoryWriter) commit(ctx context.Context, rec *pointRecord, needs map[string]int64) (*repository.Proof, error) {
	if w.spec.Lock != nil {
		if err := w.spec.Lock.Check(ctx); err != nil {
			return nil, err
		}
	}
	total, err := w.r.inventory(ctx, needs)
	if err != nil {
		return nil, err
	}
	for {
		sc, err := w.r.scan(ctx, rec.Chain)
		if err != nil {
			return nil, err
		}
		for _, sp := range sc.points {
			if sp.rec != nil && sp.rec.Run == rec.Run {
				return nil, fmt.Errorf("run %s made point %s: %w", rec.Run, sp.place.id, repository.ErrExists)
			}
		}
		rec.Sequence = sc.last[rec.Chain] + 1
		rec.Known = sc.testimony(rec.Chain, "")
		sum, err := w.putRecord(ctx, rec)
		if errors.Is(err, errSlotTaken) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return repository.NewProof(repository.ProofFacts{
			Point: *rec.point(), Record: sum, BlobsChecked: len(needs), BytesChecked: total,
		})
	}
}

// putRecord makes the point visible.
func (w *memoryWriter) putRecord(ctx context.Context, rec *pointRecord) (repository.Digest, error) {
	at := place{rec.Chain, rec.Sequence, rec.ID}
	name := at.blob(prefixRecord)
	raw, err := w.r.seal(name, rec)
	if err != nil {
		return repository.Digest{}, err
	}
	sum := repository.Digest(blake3.Sum256(raw))
	if err := ctx.Err(); err != nil {
		return sum, err // the put does not begin: that the point is not there is known
	}
	err = w.r.conn.put(ctx, name, raw, allOf(w.r.heldBy(w.spec.Lock), func(v storeView) error {
		if _, ok := v.get(w.pin); !ok {
			return errors.New("it took so long that maintenance gave it up")
		}
		if v.anyWithPrefix(prefixRecord+at.slot()) || v.anyWithPrefix(prefixTomb+at.slot()) {
			return errSlotTaken
		}
		return nil
	}))
	if err == nil || errors.Is(err, errSlotTaken) || errors.Is(err, repository.ErrFenced) {
		return sum, err
	}
	// Did it arrive?
	stored, again := w.r.conn.get(ctx, name)
	switch {
	case again == nil && bytes.Equal(stored, raw):
		return sum, nil
	case errors.Is(again, errNoBlob):
		return sum, err
	}
	return sum, fmt.Errorf("%w: %w", repository.ErrOutcomeUnknown, err)
}

// inventory finds everything in needs stored with the right size and returns the
// sum of sizes.
func (r *Repository) inventory(ctx context.Context, needs map[string]int64) (total int64, err error) {
	sizes, err := r.sizes(ctx)
	if err != nil {
		return 0, err
	}
	for _, name := range slices.Sorted(maps.Keys(needs)) {
		if problem := sizes.check(blobRef{name, needs[name]}); problem != "" {
			return 0, &contentError{name, problem}
		}
		total += needs[name]
	}
	return total, nil
}

type blobSizes map[string]int64

func (r *Repository) sizes(ctx context.Context) (blobSizes, error) {
	out := blobSizes{}
	for _, prefix := range []string{prefixBlock, prefixMap, prefixDisk, prefixFile} {
		entries, err := r.conn.list(ctx, prefix)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			out[e.name] = e.size
		}
	}
	return out, nil
}

// check returns what is wrong with the presence of a blob, or "".
func (s blobSizes) check(ref blobRef) string {
	switch n, ok := s[ref.Name]; {
	case !ok:
		return "missing"
	case n < ref.Size:
		return "truncated"
	case n > ref.Size:
		return "size"
	}
	return ""
}

// Abort implements repository.Writer.
func (w *memoryWriter) Abort(ctx context.Context) error {
	w.mu.Lock()
	ended := w.ended
	w.ended = true
	w.mu.Unlock()
	if ended {
		return nil
	}
	if err := w.r.begin(ctx); err != nil {
		return fmt.Errorf("abort %s: %w", w.id, err)
	}
	if err := w.r.conn.del(ctx, w.pin, nil); err != nil {
		return fmt.Errorf("abort %s: %w", w.id, err)
	}
	return nil
}
