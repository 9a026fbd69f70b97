package repositorytest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// Block sizes and a length that most checks use.
const (
	small   = repository.LeafSize
	normal  = repository.DefaultBlockSize
	oddTail = 12_345
)

// env is what a check works with.
type env struct {
	T
	h    *Harness
	repo repository.Repository
	ctx  context.Context
	rng  *rand.Rand
	runs int
}

func newEnv(t T, h *Harness) *env {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err, "HOLDFAST_SEED")
		seed = n
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	return &env{T: t, h: h, repo: h.Repository, ctx: t.Context(), rng: rand.New(rand.NewPCG(seed, 1))}
}

// reopen opens the repository as another process would.
func (e *env) reopen() repository.Repository {
	e.Helper()
	r, err := e.h.Reopen(e.ctx)
	require.NoError(e, err, "reopen")
	e.Cleanup(func() {
		if err := r.Close(); err != nil {
			e.Errorf("close a reopened repository: %v", err)
		}
	})
	return r
}

// run makes a run ID.
func (e *env) run() string {
	e.runs++
	return fmt.Sprintf("run%04d", e.runs)
}

// lock takes a lock that must be free.
func (e *env) lock(name string) repository.Lock {
	e.Helper()
	l, err := e.repo.Lock(e.ctx, name, repository.LockOptions{Holder: "the suite"})
	require.NoError(e, err, "lock %s", name)
	return l
}

// withMaintenance calls f under the maintenance lock.
func (e *env) withMaintenance(f func(l repository.Lock)) {
	e.Helper()
	l := e.lock(repository.LockMaintenance)
	f(l)
	require.NoError(e, l.Release(e.ctx))
}

func (e *env) deletePoint(id repository.PointID) {
	e.Helper()
	e.withMaintenance(func(l repository.Lock) {
		require.NoError(e, e.repo.Delete(e.ctx, id, l), "delete %s", id)
	})
}

// disk is the truth of a disk: blocks that hold data; all others are zeros.
type disk struct {
	size   int64
	bs     int
	blocks map[int64][]byte
}

func newDisk(size int64, bs int) *disk { return &disk{size, bs, map[int64][]byte{}} }

func (d *disk) count() int64 { return repository.Blocks(d.size, d.bs) }

func (d *disk) clone() *disk { return &disk{d.size, d.bs, maps.Clone(d.blocks)} }

// at returns n bytes at off.
func (d *disk) at(off int64, n int) []byte {
	out := make([]byte, n)
	for i := off / int64(d.bs); i*int64(d.bs) < off+int64(n); i++ {
		b, start := d.blocks[i], i*int64(d.bs)
		if start >= off {
			copy(out[start-off:], b)
		} else if off-start < int64(len(b)) {
			copy(out, b[off-start:])
		}
	}
	return out
}

// fill gives block i new random content: noise, noise in one leaf only, or a byte
// at one end.
func (d *disk) fill(rng *rand.Rand, i int64) {
	b := make([]byte, repository.BlockLen(d.size, d.bs, i))
	switch rng.IntN(5) {
	case 0:
		b[0] = byte(1 + rng.IntN(255))
	case 1:
		b[len(b)-1] = byte(1 + rng.IntN(255))
	case 2:
		noise(rng, b[len(b)/repository.LeafSize/2*repository.LeafSize:])
	default:
		noise(rng, b)
	}
	d.blocks[i] = b
}

// noise fills b, not with zeros only.
func noise(rng *rand.Rand, b []byte) {
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(rng.IntN(256))
	}
	_, _ = rand.NewChaCha8(seed).Read(b)
	b[0] |= 1
}

// random returns a disk of which a share of the blocks, and always the last one,
// holds data.
func (e *env) random(size int64, bs int, share float64) *disk {
	d := newDisk(size, bs)
	for i := range d.count() {
		if i == d.count()-1 || e.rng.Float64() < share {
			d.fill(e.rng, i)
		}
	}
	return d
}

// reblock returns the same content in blocks of another size.
func (d *disk) reblock(bs int) *disk {
	out := newDisk(d.size, bs)
	for i := range out.count() {
		b := d.at(i*int64(bs), repository.BlockLen(d.size, bs, i))
		if !digest.IsZero(b) {
			out.blocks[i] = b
		}
	}
	return out
}

// root computes the root independently of any engine.
func (d *disk) root(key repository.DigestKey) repository.Digest {
	h := digest.New(key)
	r := h.Root(d.size)
	segments := map[int64][]repository.Digest{}
	for i, b := range d.blocks {
		off := i * int64(d.bs)
		s := off / digest.SegmentSpan
		if segments[s] == nil {
			n := min(d.size-s*digest.SegmentSpan, digest.SegmentSpan)
			segments[s] = make([]repository.Digest, (n+repository.LeafSize-1)/repository.LeafSize)
		}
		copy(segments[s][off%digest.SegmentSpan/repository.LeafSize:], h.Leaves(nil, b))
	}
	for _, s := range slices.Sorted(maps.Keys(segments)) {
		r.Add(s, h.Segment(segments[s]))
	}
	return r.Sum()
}

// diskPlan says how a disk of a point is written.
type diskPlan struct {
	truth   *disk
	inherit bool
	// write lists the blocks to write; nil means all that hold data. Blocks that
	// hold none are written as zeros.
	write   []int64
	advance bool // call Advance after each block
}

// pointPlan is a point to write.
type pointPlan struct {
	repository.PointSpec
	repository.CommitInfo
	disks map[string]diskPlan
	files map[string][]byte
}

// write writes a point but for its commit.
func (e *env) write(repo repository.Repository, p *pointPlan) (repository.Writer, error) {
	if p.Chain == "" {
		p.Chain = "vm-1"
	}
	if p.Run == "" {
		p.Run = e.run()
	}
	if p.Created.IsZero() {
		p.Created = time.Date(2026, 2, 3, 4, 5, 6, 7000, time.UTC).Add(time.Duration(e.runs) * time.Hour)
	}
	w, err := repo.Begin(e.ctx, &p.PointSpec)
	if err != nil {
		return nil, fmt.Errorf("begin: %w", err)
	}
	for _, id := range slices.Sorted(maps.Keys(p.disks)) {
		if err := writeDisk(e.ctx, w, id, p.disks[id]); err != nil {
			return w, fmt.Errorf("disk %s: %w", id, err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(p.files)) {
		if err := w.File(e.ctx, name, bytes.NewReader(p.files[name])); err != nil {
			return w, fmt.Errorf("file %s: %w", name, err)
		}
	}
	return w, nil
}

func writeDisk(ctx context.Context, w repository.Writer, id string, p diskPlan) error {
	t := p.truth
	d, err := w.Disk(ctx, repository.DiskSpec{ID: id, Size: t.size, BlockSize: t.bs, Inherit: p.inherit})
	if err != nil {
		return err
	}
	write := p.write
	if write == nil && !p.inherit {
		write = slices.Sorted(maps.Keys(t.blocks))
	}
	h := digest.New(w.DigestKey())
	for _, i := range write {
		if err := d.WriteBlock(ctx, t.block(h, i)); err != nil {
			return fmt.Errorf("block %d: %w", i, err)
		}
		if p.advance {
			if err := d.Advance(ctx, i+1); err != nil {
				return fmt.Errorf("advance to %d: %w", i+1, err)
			}
		}
	}
	return d.Close(ctx)
}

// block returns block i as WriteBlock takes it.
func (d *disk) block(h *digest.Hasher, i int64) repository.Block {
	b := repository.Block{Index: i}
	if data := d.blocks[i]; data != nil {
		b.Data, b.Leaves = data, h.Leaves(nil, data)
	}
	return b
}

// commit writes and commits a point, all of which must succeed.
func (e *env) commit(p *pointPlan) *repository.Point {
	e.Helper()
	w, err := e.write(e.repo, p)
	require.NoError(e, err)
	proof, err := w.Commit(e.ctx, &p.CommitInfo)
	require.NoError(e, err, "commit")
	require.NotNil(e, proof, "a commit without error has a proof")
	pt := proof.Point()
	require.Equal(e, w.ID(), pt.ID)
	return &pt
}

// one is a plan of one disk "d1", written in full.
func one(d *disk) *pointPlan {
	return &pointPlan{disks: map[string]diskPlan{"d1": {truth: d}}}
}

// child is a plan of one disk "d1" that inherits and writes the given blocks.
func child(parent repository.PointID, d *disk, write ...int64) *pointPlan {
	return &pointPlan{
		PointSpec: repository.PointSpec{Parent: parent},
		disks:     map[string]diskPlan{"d1": {truth: d, inherit: true, write: write}},
	}
}

// expect requires that a point reads back exactly as disks, in every way.
func (e *env) expect(repo repository.Repository, id repository.PointID, disks map[string]*disk) {
	e.Helper()
	require.NoError(e, e.compare(repo, id, disks, nil), "point %s", id)
}

// expectOne is expect for the disk of one.
func (e *env) expectOne(id repository.PointID, d *disk) {
	e.Helper()
	e.expect(e.repo, id, map[string]*disk{"d1": d})
}

// errWrong marks bytes that were read without an error and are not the truth.
var errWrong = errors.New("wrong content")

// compare reads a point in full and returns the first error or difference, the
// latter matching errWrong.
func (e *env) compare(repo repository.Repository, id repository.PointID, disks map[string]*disk, files map[string][]byte) (err error) {
	rd, err := repo.Open(e.ctx, id)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer func() { err = errors.Join(err, rd.Close()) }()
	p := rd.Point()
	if p.ID != id || p.State != repository.Committed || len(p.Disks) != len(disks) {
		return fmt.Errorf("%w: opened point %s in state %q with %d disks", errWrong, p.ID, p.State, len(p.Disks))
	}
	for _, name := range slices.Sorted(maps.Keys(disks)) {
		if err := e.compareDisk(rd, name, disks[name]); err != nil {
			return fmt.Errorf("disk %s: %w", name, err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		got, err := readFile(e.ctx, rd, name)
		if err != nil {
			return fmt.Errorf("file %s: %w", name, err)
		}
		if err := sameBytes(0, files[name], got); err != nil {
			return fmt.Errorf("file %s: %w", name, err)
		}
	}
	return nil
}

func (e *env) compareDisk(rd repository.Reader, name string, want *disk) (err error) {
	rec := rd.Point().Disk(name)
	if rec == nil || rec.Size != want.size || rec.BlockSize != want.bs {
		return fmt.Errorf("%w: the record has %+v", errWrong, rec)
	}
	if rec.Root != want.root(rd.DigestKey()) {
		return fmt.Errorf("%w: the root is not that of the content", errWrong)
	}
	d, err := rd.Disk(e.ctx, name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if d.Size() != want.size || d.BlockSize() != want.bs {
		return fmt.Errorf("%w: size %d, block size %d", errWrong, d.Size(), d.BlockSize())
	}
	data, err := extents(e.ctx, d)
	if err != nil {
		return err
	}
	if !maps.EqualFunc(data, want.blocks, func(struct{}, []byte) bool { return true }) {
		return fmt.Errorf("%w: extents hold blocks %v, data is in %v", errWrong,
			slices.Sorted(maps.Keys(data)), slices.Sorted(maps.Keys(want.blocks)))
	}
	h := digest.New(rd.DigestKey())
	buf := make([]byte, want.bs)
	for _, i := range want.interesting(e.rng) {
		if err := compareBlock(e.ctx, d, h, want, i, buf); err != nil {
			return fmt.Errorf("block %d: %w", i, err)
		}
	}
	return nil
}

// interesting returns the blocks to compare: all of a small disk; of a large one
// those with data, their neighbours, and some others.
func (d *disk) interesting(rng *rand.Rand) []int64 {
	n := d.count()
	set := map[int64]bool{}
	for i := range min(n, 64) {
		set[i] = true
		set[rng.Int64N(n)] = true
	}
	for i := range d.blocks {
		for j := max(0, i-1); j <= min(n-1, i+1); j++ {
			set[j] = true
		}
	}
	return slices.Sorted(maps.Keys(set))
}

func compareBlock(ctx context.Context, d repository.DiskReader, h *digest.Hasher, want *disk, i int64, buf []byte) error {
	n := repository.BlockLen(want.size, want.bs, i)
	truth := want.blocks[i]
	b, err := d.ReadBlock(ctx, i, buf)
	if err != nil {
		return err
	}
	wantLeaves := make([]repository.Digest, (n+repository.LeafSize-1)/repository.LeafSize)
	if truth != nil {
		wantLeaves = h.Leaves(nil, truth)
	}
	switch {
	case b.Index != i:
		return fmt.Errorf("%w: ReadBlock returned block %d", errWrong, b.Index)
	case truth == nil && b.Data != nil:
		return fmt.Errorf("%w: a block of zeros has data", errWrong)
	case !slices.Equal(b.Leaves, wantLeaves) && (truth != nil || len(b.Leaves) != 0):
		return fmt.Errorf("%w: ReadBlock returned other digests", errWrong)
	}
	if truth != nil {
		if err := sameBytes(0, truth, b.Data); err != nil {
			return err
		}
	}
	leaves, err := d.Leaves(ctx, i)
	if err != nil {
		return fmt.Errorf("leaves: %w", err)
	}
	if !slices.Equal(leaves, wantLeaves) && (truth != nil || len(leaves) != 0) {
		return fmt.Errorf("%w: Leaves returned other digests", errWrong)
	}
	got := make([]byte, n)
	if m, err := d.ReadAt(got, i*int64(want.bs)); err != nil && !(errors.Is(err, io.EOF) && m == n) {
		return fmt.Errorf("read: %w", err)
	}
	return sameBytes(0, want.at(i*int64(want.bs), n), got)
}

// extents collects the blocks that hold data, and checks the form of the listing.
func extents(ctx context.Context, d repository.DiskReader) (map[int64]struct{}, error) {
	out := map[int64]struct{}{}
	bs, end := int64(d.BlockSize()), int64(0)
	for x, err := range d.Extents(ctx) {
		if err != nil {
			return nil, fmt.Errorf("extents: %w", err)
		}
		stop := x.Offset + x.Length
		if x.Offset < end || x.Length <= 0 || stop > d.Size() || x.Offset%bs != 0 || stop%bs != 0 && stop != d.Size() {
			return nil, fmt.Errorf("%w: extent %+v after %d on a disk of %d", errWrong, x, end, d.Size())
		}
		for i := x.Offset / bs; i*bs < stop; i++ {
			out[i] = struct{}{}
		}
		end = stop
	}
	return out, nil
}

// sameBytes compares large buffers and names the first difference.
func sameBytes(off int64, want, got []byte) error {
	if bytes.Equal(want, got) {
		return nil
	}
	if len(want) != len(got) {
		return fmt.Errorf("%w: %d bytes, not %d", errWrong, len(got), len(want))
	}
	for i := range want {
		if want[i] != got[i] {
			return fmt.Errorf("%w: byte %d is %#x, not %#x", errWrong, off+int64(i), got[i], want[i])
		}
	}
	return nil
}

func readFile(ctx context.Context, rd repository.Reader, name string) (b []byte, err error) {
	f, err := rd.File(ctx, name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return io.ReadAll(f)
}

// list collects a listing.
func list(ctx context.Context, repo repository.Repository, q repository.Query) (out []*repository.Point, err error) {
	for p, err := range repo.Points(ctx, q) {
		if err != nil {
			return out, err
		}
		out = append(out, p)
	}
	return out, nil
}

func (e *env) list(repo repository.Repository, q repository.Query) []*repository.Point {
	e.Helper()
	out, err := list(e.ctx, repo, q)
	require.NoError(e, err, "list points")
	return out
}

// ids returns the IDs of committed points in a listing.
func ids(points []*repository.Point) []repository.PointID {
	out := []repository.PointID{}
	for _, p := range points {
		if p.State == repository.Committed {
			out = append(out, p.ID)
		}
	}
	return out
}

// sameJSON compares documents by meaning.
func sameJSON(t T, want, got json.RawMessage) {
	t.Helper()
	if len(want) == 0 {
		require.Empty(t, got)
		return
	}
	require.JSONEq(t, string(want), string(got))
}
