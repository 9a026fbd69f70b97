package restore

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// copyDisk copies a disk of a point to a writer: blocks are fetched, decoded and
// hashed in parallel, compared with the digests that were stored when they left
// their hypervisor, and written in ascending order. At the end the root of the
// digest tree must be that of the record. The writer is committed by the caller.
func (j *job) copyDisk(ctx context.Context, id hypervisor.DiskID, w hypervisor.DiskWriter, res *DiskResult) error {
	rec := j.reader.Point().Disk(string(id))
	r, err := j.reader.Disk(ctx, string(id))
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // a reader has nothing to lose
	c := &copier{
		j: j, id: id, r: r, w: w, size: r.Size(), bs: r.BlockSize(),
		hash: digest.New(j.reader.DigestKey()),
		bufs: make(chan []byte, j.o.InFlight),
	}
	c.tree = c.hash.Tree(c.size)
	for range j.o.InFlight {
		c.bufs <- nil
	}
	if err := c.run(ctx); err != nil {
		return fmt.Errorf("disk %s of point %s: %w", id, j.res.Point, err)
	}
	if got := c.tree.Sum(); got != rec.Root {
		return fmt.Errorf("disk %s of point %s: digest tree has root %s, and the record says %s: %w", id, j.res.Point, got, rec.Root, repository.ErrDamaged)
	}
	res.Size, res.Data, res.Verified = c.size, c.data, true
	return nil
}

// fetched is a block on its way from a fetcher to the writer.
type fetched struct {
	block repository.Block
	buf   []byte
	err   error
}

type copier struct {
	j    *job
	id   hypervisor.DiskID
	r    repository.DiskReader
	w    hypervisor.DiskWriter
	hash *digest.Hasher
	size int64
	bs   int
	bufs chan []byte

	tree *digest.Tree // of what was written
	next int64        // offset behind what was written
	data int64
}

func (c *copier) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	queue := make(chan chan fetched, cap(c.bufs))
	g.Go(func() error {
		defer close(queue)
		return c.fetch(ctx, queue)
	})
	g.Go(func() error {
		for slot := range queue {
			var f fetched
			select {
			case f = <-slot:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if f.err != nil {
				return f.err
			}
			if err := c.write(f); err != nil {
				return err
			}
			c.bufs <- f.buf
			c.j.o.Events.progress(c.id, c.next, c.size)
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return err
	}
	if err := c.zeros(c.size); err != nil {
		return err
	}
	c.j.o.Events.progress(c.id, c.size, c.size)
	return nil
}

// fetch starts a fetcher per block that holds data, in order, as buffers come
// free. It returns when all fetchers have ended.
func (c *copier) fetch(ctx context.Context, queue chan<- chan fetched) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	bs := int64(c.bs)
	for e, err := range c.r.Extents(ctx) {
		if err != nil {
			return err
		}
		for b := e.Offset / bs; b*bs < e.Offset+e.Length; b++ {
			var buf []byte
			select {
			case buf = <-c.bufs:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if buf == nil {
				buf = make([]byte, c.bs)
			}
			slot := make(chan fetched, 1)
			wg.Go(func() { slot <- c.block(ctx, b, buf) })
			select {
			case queue <- slot:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
	return nil
}

// block fetches one block and proves it.
func (c *copier) block(ctx context.Context, index int64, buf []byte) fetched {
	b, err := c.r.ReadBlock(ctx, index, buf)
	if err != nil {
		return fetched{err: err}
	}
	off, n := index*int64(c.bs), repository.BlockLen(c.size, c.bs, index)
	if b.Data != nil && len(b.Data) != n {
		return fetched{err: fmt.Errorf("block at %d has %d bytes and should have %d: %w", off, len(b.Data), n, repository.ErrDamaged)}
	}
	count := (n + repository.LeafSize - 1) / repository.LeafSize
	got := make([]repository.Digest, count)
	if b.Data != nil {
		got = c.hash.Leaves(got[:0], b.Data)
	}
	for i := range got {
		var want repository.Digest
		if i < len(b.Leaves) {
			want = b.Leaves[i]
		}
		if got[i] != want {
			return fetched{err: fmt.Errorf("bytes at %d are not those that were backed up: %w", off+int64(i)*repository.LeafSize, repository.ErrDamaged)}
		}
	}
	return fetched{block: repository.Block{Index: index, Data: b.Data, Leaves: got}, buf: buf}
}

// write puts a block in its place, and zeros before it.
func (c *copier) write(f fetched) error {
	off := f.block.Index * int64(c.bs)
	if err := c.zeros(off); err != nil {
		return err
	}
	c.tree.Put(off, f.block.Leaves)
	n := int64(repository.BlockLen(c.size, c.bs, f.block.Index))
	if f.block.Data == nil {
		return c.zeros(off + n)
	}
	if _, err := c.w.WriteAt(f.block.Data, off); err != nil {
		return err
	}
	c.next = off + n
	c.data += n
	return nil
}

// zeros fills up to end.
func (c *copier) zeros(end int64) error {
	if end <= c.next {
		return nil
	}
	err := c.w.WriteZeroes(c.next, end-c.next)
	c.next = end
	return err
}
