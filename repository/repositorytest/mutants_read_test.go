package repositorytest_test

import (
	"context"
	"errors"
	"io"
	"iter"
	"slices"

	"github.com/holdfast-backup/holdfast/repository"
)

func readMutants() []mutant {
	return []mutant{
		{"digests are dropped", "DigestsReturnedAsGiven", mutNoDigests},
		{"Leaves are those of the next block", "RoundtripNormalBlocks", mutWrongLeaves},
		{"damaged block reads as zeros", "DamageIsNeverReadAsContent", mutDamageIsZeros},
		{"zeros leave the buffer as it was", "ReadAtAnywhere", mutDirtyBuffer},
		{"read past the end is not EOF", "ReadAtEndOfDisk", mutNoEOF},
		{"extents forget the last block", "RoundtripSmallBlocks", mutShortExtents},
		{"extents reach past the end of the disk", "RoundtripSmallBlocks", mutLongExtents},
		{"concurrent reads share a buffer", "ConcurrentReaders", mutSharedBuffer},
		{"closed reader goes on", "ClosedReaderRefuses", mutNeverCloses},
		{"context of Disk does not govern reads", "CanceledReader", mutReaderIgnoresContext},
	}
}

func mutNoDigests(_ *bench, r repository.Repository) repository.Repository {
	return withDiskReader(r, func(d repository.DiskReader) repository.DiskReader {
		return &diskReaderTap{DiskReader: d, readBlock: func(ctx context.Context, i int64, buf []byte) (repository.Block, error) {
			b, err := d.ReadBlock(ctx, i, buf)
			clear(b.Leaves)
			return b, err
		}}
	})
}

func mutWrongLeaves(_ *bench, r repository.Repository) repository.Repository {
	return withDiskReader(r, func(d repository.DiskReader) repository.DiskReader {
		return &diskReaderTap{DiskReader: d, leaves: func(ctx context.Context, i int64) ([]repository.Digest, error) {
			return d.Leaves(ctx, min(i+1, repository.Blocks(d.Size(), d.BlockSize())-1))
		}}
	})
}

func mutDamageIsZeros(_ *bench, r repository.Repository) repository.Repository {
	return withDiskReader(r, func(d repository.DiskReader) repository.DiskReader {
		return &diskReaderTap{
			DiskReader: d,
			readAt: func(p []byte, off int64) (int, error) {
				n, err := d.ReadAt(p, off)
				if errors.Is(err, repository.ErrDamaged) {
					clear(p)
					return len(p), nil
				}
				return n, err
			},
			readBlock: func(ctx context.Context, i int64, buf []byte) (repository.Block, error) {
				b, err := d.ReadBlock(ctx, i, buf)
				if errors.Is(err, repository.ErrDamaged) {
					return repository.Block{Index: i}, nil
				}
				return b, err
			},
		}
	})
}

func mutDirtyBuffer(_ *bench, r repository.Repository) repository.Repository {
	return withDiskReader(r, func(d repository.DiskReader) repository.DiskReader {
		return &diskReaderTap{DiskReader: d, readAt: func(p []byte, off int64) (int, error) {
			old := slices.Clone(p)
			n, err := d.ReadAt(p, off)
			if n > 0 && !slices.ContainsFunc(p[:n], func(b byte) bool { return b != 0 }) {
				copy(p, old)
			}
			return n, err
		}}
	})
}

func mutNoEOF(_ *bench, r repository.Repository) repository.Repository {
	return withDiskReader(r, func(d repository.DiskReader) repository.DiskReader {
		return &diskReaderTap{DiskReader: d, readAt: func(p []byte, off int64) (int, error) {
			n, err := d.ReadAt(p, off)
			if errors.Is(err, io.EOF) {
				clear(p[n:])
				return len(p), nil
			}
			return n, err
		}}
	})
}

// mapExtents changes extents on their way out.
func mapExtents(r repository.Repository, f func(d repository.DiskReader, x repository.Extent) repository.Extent) repository.Repository {
	return withDiskReader(r, func(d repository.DiskReader) repository.DiskReader {
		return &diskReaderTap{DiskReader: d, extents: func(ctx context.Context) iter.Seq2[repository.Extent, error] {
			return func(yield func(repository.Extent, error) bool) {
				for x, err := range d.Extents(ctx) {
					if x = f(d, x); x.Length > 0 || err != nil {
						if !yield(x, err) {
							return
						}
					}
				}
			}
		}}
	})
}

func mutShortExtents(_ *bench, r repository.Repository) repository.Repository {
	return mapExtents(r, func(d repository.DiskReader, x repository.Extent) repository.Extent {
		if x.Offset+x.Length == d.Size() {
			whole := d.Size() / int64(d.BlockSize()) * int64(d.BlockSize())
			x.Length = max(0, min(x.Length, whole-x.Offset))
		}
		return x
	})
}

func mutLongExtents(_ *bench, r repository.Repository) repository.Repository {
	return mapExtents(r, func(d repository.DiskReader, x repository.Extent) repository.Extent {
		bs := int64(d.BlockSize())
		x.Length = (x.Length + bs - 1) / bs * bs
		return x
	})
}

func mutSharedBuffer(_ *bench, r repository.Repository) repository.Repository {
	return withDiskReader(r, func(d repository.DiskReader) repository.DiskReader {
		// The bug of a cache that is filled for one caller and read by another, in
		// one goroutine's clothes so that the race detector stays quiet: each block
		// is answered with what the read before it wanted.
		last := make(chan int64, 1)
		last <- 0
		return &diskReaderTap{DiskReader: d, readBlock: func(ctx context.Context, i int64, buf []byte) (repository.Block, error) {
			before := <-last
			last <- i
			if before > i { // two callers met
				b, err := d.ReadBlock(ctx, before, buf)
				b.Index = i
				return b, err
			}
			return d.ReadBlock(ctx, i, buf)
		}}
	})
}

type neverCloses struct{ repository.DiskReader }

func (neverCloses) Close() error { return nil }

func mutNeverCloses(_ *bench, r repository.Repository) repository.Repository {
	return withDiskReader(r, func(d repository.DiskReader) repository.DiskReader { return neverCloses{d} })
}

type detachedReader struct{ repository.Reader }

func (r detachedReader) Disk(ctx context.Context, id string) (repository.DiskReader, error) {
	return r.Reader.Disk(context.WithoutCancel(ctx), id)
}

func mutReaderIgnoresContext(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, open: func(ctx context.Context, id repository.PointID) (repository.Reader, error) {
		rd, err := r.Open(ctx, id)
		if err != nil {
			return nil, err
		}
		return detachedReader{rd}, nil
	}}
}
