package repositorytest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

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
