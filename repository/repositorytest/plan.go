package repositorytest

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

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
