package repositorytest_test

import (
	"bytes"
	"context"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/holdfast-backup/holdfast/repository"
)

func writeMutants() []mutant {
	return []mutant{
		{"inherit ignores the tail", "IncrementalInheritsTail", mutInheritNoTail},
		{"inherit takes the first segment only", "RoundtripAcrossSegments", mutInheritFirstSegment},
		{"written zeros do not hide the parent's data", "IncrementalZeroesOut", mutStaleZeros},
		{"inherit of another size is taken as a new disk", "InheritMismatchRefused", mutInheritAnySize},
		{"double write is swallowed", "DoubleWriteRefused", mutDoubleWrite},
		{"written data is retained", "WrittenDataIsNotRetained", mutRetains},
		{"block of a wrong length is padded", "BadBlockRefused", mutPads},
		{"last block is dropped", "RoundtripSmallBlocks", mutDropsLast},
		{"block after Advance is lost", "AdvanceChangesNoContent", mutAdvanceLoses},
		{"stats forget zeros", "StatsCount", mutStats},
		{"cancellation is swallowed", "CanceledWriter", mutSwallowsCancel},
		{"file loses its end", "FilesRoundtrip", mutFileShort},
		{"file is kept although its source broke", "FileReadErrorSurfaces", mutFileError},
		{"commit closes open disks itself", "CommitWithOpenDiskRefused", mutClosesDisks},
		{"commit twice returns the proof again", "CommitTwiceRefused", mutCommitTwice},
		{"commit without inventory", "CommitChecksTheInventory", mutNoInventory},
		{"abort leaves a visible point", "AbortIsInvisible", mutAbortCommits},
		{"commit happens at the last Close", "UncommittedIsInvisible", mutCommitsEarly},
		{"parent of another chain is taken", "ParentOfOtherChainRefused", mutAnyParent},
		{"unknown parent means none", "ParentUnknownRefused", mutAnyParent},
	}
}

func mutInheritNoTail(_ *bench, r repository.Repository) repository.Repository {
	return withDisk(r, func(s repository.DiskSpec, d repository.DiskWriter) repository.DiskWriter {
		last := repository.Blocks(s.Size, s.BlockSize) - 1
		wrote := !s.Inherit
		return &diskTap{
			DiskWriter: d,
			write: func(ctx context.Context, b repository.Block) error {
				wrote = wrote || b.Index == last
				return d.WriteBlock(ctx, b)
			},
			close: func(ctx context.Context) error {
				if !wrote {
					if err := d.WriteBlock(ctx, repository.Block{Index: last}); err != nil {
						return err
					}
				}
				return d.Close(ctx)
			},
		}
	})
}

func mutInheritFirstSegment(_ *bench, r repository.Repository) repository.Repository {
	return withDisk(r, func(s repository.DiskSpec, d repository.DiskWriter) repository.DiskWriter {
		if !s.Inherit {
			return d
		}
		wrote := map[int64]bool{}
		return &diskTap{
			DiskWriter: d,
			write: func(ctx context.Context, b repository.Block) error {
				wrote[b.Index] = true
				return d.WriteBlock(ctx, b)
			},
			close: func(ctx context.Context) error {
				for i := int64(16); i < repository.Blocks(s.Size, s.BlockSize); i++ {
					if !wrote[i] {
						_ = d.WriteBlock(ctx, repository.Block{Index: i})
					}
				}
				return d.Close(ctx)
			},
		}
	})
}

func mutStaleZeros(_ *bench, r repository.Repository) repository.Repository {
	return withDisk(r, func(_ repository.DiskSpec, d repository.DiskWriter) repository.DiskWriter {
		return &diskTap{DiskWriter: d, write: func(ctx context.Context, b repository.Block) error {
			if b.Data == nil {
				return nil
			}
			return d.WriteBlock(ctx, b)
		}}
	})
}

func mutInheritAnySize(_ *bench, r repository.Repository) repository.Repository {
	return withWriter(r, func(_ *repository.PointSpec, w repository.Writer) repository.Writer {
		return &writerTap{Writer: w, disk: func(ctx context.Context, s repository.DiskSpec) (repository.DiskWriter, error) {
			d, err := w.Disk(ctx, s)
			if err != nil && s.Inherit {
				s.Inherit = false
				return w.Disk(ctx, s)
			}
			return d, err
		}}
	})
}

func mutDoubleWrite(_ *bench, r repository.Repository) repository.Repository {
	return withDisk(r, func(_ repository.DiskSpec, d repository.DiskWriter) repository.DiskWriter {
		var mu sync.Mutex
		seen := map[int64]bool{}
		return &diskTap{DiskWriter: d, write: func(ctx context.Context, b repository.Block) error {
			mu.Lock()
			again := seen[b.Index]
			seen[b.Index] = true
			mu.Unlock()
			if again {
				return nil
			}
			return d.WriteBlock(ctx, b)
		}}
	})
}

func mutRetains(_ *bench, r repository.Repository) repository.Repository {
	return withDisk(r, func(_ repository.DiskSpec, d repository.DiskWriter) repository.DiskWriter {
		var queue []repository.Block
		return &diskTap{
			DiskWriter: d,
			write: func(_ context.Context, b repository.Block) error {
				queue = append(queue, b)
				return nil
			},
			close: func(ctx context.Context) error {
				for _, b := range queue {
					if err := d.WriteBlock(ctx, b); err != nil {
						return err
					}
				}
				return d.Close(ctx)
			},
		}
	})
}

func mutPads(_ *bench, r repository.Repository) repository.Repository {
	return withDisk(r, func(s repository.DiskSpec, d repository.DiskWriter) repository.DiskWriter {
		n := repository.Blocks(s.Size, s.BlockSize)
		return &diskTap{DiskWriter: d, write: func(ctx context.Context, b repository.Block) error {
			if b.Index >= 0 && b.Index < n && b.Data != nil {
				want := repository.BlockLen(s.Size, s.BlockSize, b.Index)
				b.Data = append(bytes.Clone(b.Data), make([]byte, want)...)[:want]
			}
			return d.WriteBlock(ctx, b)
		}}
	})
}

func mutDropsLast(_ *bench, r repository.Repository) repository.Repository {
	return withDisk(r, func(s repository.DiskSpec, d repository.DiskWriter) repository.DiskWriter {
		n := repository.Blocks(s.Size, s.BlockSize)
		return &diskTap{DiskWriter: d, write: func(ctx context.Context, b repository.Block) error {
			if b.Index == n-1 {
				return nil
			}
			return d.WriteBlock(ctx, b)
		}}
	})
}

// advanceLoses forgets the rest of a segment once Advance was in the middle of it.
type advanceLoses struct {
	repository.DiskWriter
	mu   sync.Mutex
	next int64
}

func (d *advanceLoses) Advance(ctx context.Context, next int64) error {
	d.mu.Lock()
	d.next = max(d.next, next)
	d.mu.Unlock()
	return d.DiskWriter.Advance(ctx, next)
}

func (d *advanceLoses) WriteBlock(ctx context.Context, b repository.Block) error {
	d.mu.Lock()
	next := d.next
	d.mu.Unlock()
	if next%16 != 0 && b.Index/16 == next/16 && b.Index >= next {
		return nil
	}
	return d.DiskWriter.WriteBlock(ctx, b)
}

func mutAdvanceLoses(_ *bench, r repository.Repository) repository.Repository {
	return withDisk(r, func(_ repository.DiskSpec, d repository.DiskWriter) repository.DiskWriter {
		return &advanceLoses{DiskWriter: d}
	})
}

func mutStats(_ *bench, r repository.Repository) repository.Repository {
	return withWriter(r, func(_ *repository.PointSpec, w repository.Writer) repository.Writer {
		return &writerTap{Writer: w, commit: func(ctx context.Context, info *repository.CommitInfo) (*repository.Proof, error) {
			proof, err := w.Commit(ctx, info)
			if err != nil {
				return nil, err
			}
			p := proof.Point()
			p.Disks = slices.Clone(p.Disks)
			for i := range p.Disks {
				p.Disks[i].Stats.Zero = 0
			}
			return repository.NewProof(repository.ProofFacts{Point: p, Record: proof.Record(), BlobsChecked: proof.BlobsChecked()})
		}}
	})
}

func mutSwallowsCancel(_ *bench, r repository.Repository) repository.Repository {
	return withDisk(r, func(_ repository.DiskSpec, d repository.DiskWriter) repository.DiskWriter {
		return &diskTap{DiskWriter: d, write: func(ctx context.Context, b repository.Block) error {
			return d.WriteBlock(context.WithoutCancel(ctx), b)
		}}
	})
}

func mutFileShort(_ *bench, r repository.Repository) repository.Repository {
	return withWriter(r, func(_ *repository.PointSpec, w repository.Writer) repository.Writer {
		return &writerTap{Writer: w, file: func(ctx context.Context, name string, rd io.Reader) error {
			return w.File(ctx, name, io.LimitReader(rd, 1<<20))
		}}
	})
}

func mutFileError(_ *bench, r repository.Repository) repository.Repository {
	return withWriter(r, func(_ *repository.PointSpec, w repository.Writer) repository.Writer {
		return &writerTap{Writer: w, file: func(ctx context.Context, name string, rd io.Reader) error {
			got, err := io.ReadAll(io.LimitReader(rd, 1<<20))
			if err != nil {
				_ = w.File(ctx, name, strings.NewReader(string(got)))
				return err
			}
			return w.File(ctx, name, bytes.NewReader(got))
		}}
	})
}

func mutClosesDisks(_ *bench, r repository.Repository) repository.Repository {
	return withWriter(r, func(_ *repository.PointSpec, w repository.Writer) repository.Writer {
		var open []repository.DiskWriter
		return &writerTap{
			Writer: w,
			disk: func(ctx context.Context, s repository.DiskSpec) (repository.DiskWriter, error) {
				d, err := w.Disk(ctx, s)
				if err == nil {
					open = append(open, d)
				}
				return d, err
			},
			commit: func(ctx context.Context, info *repository.CommitInfo) (*repository.Proof, error) {
				for _, d := range open {
					if err := d.Close(ctx); err != nil {
						return nil, err
					}
				}
				return w.Commit(ctx, info)
			},
		}
	})
}

func mutCommitTwice(_ *bench, r repository.Repository) repository.Repository {
	return withWriter(r, func(_ *repository.PointSpec, w repository.Writer) repository.Writer {
		var first *repository.Proof
		return &writerTap{Writer: w, commit: func(ctx context.Context, info *repository.CommitInfo) (p *repository.Proof, err error) {
			if first == nil {
				first, err = w.Commit(ctx, info)
			}
			return first, err
		}}
	})
}

// mutNoInventory commits as if nothing was lost since it was written.
func mutNoInventory(b *bench, r repository.Repository) repository.Repository {
	return withWriter(r, func(_ *repository.PointSpec, w repository.Writer) repository.Writer {
		return &writerTap{Writer: w, commit: func(ctx context.Context, info *repository.CommitInfo) (*repository.Proof, error) {
			for _, d := range b.standing {
				d.undo()
			}
			proof, err := w.Commit(ctx, info)
			for _, d := range b.standing {
				undo, damageErr := b.store.Damage(d.object, d.how)
				if damageErr != nil {
					return nil, damageErr
				}
				d.undo = undo
			}
			return proof, err
		}}
	})
}

func mutAbortCommits(_ *bench, r repository.Repository) repository.Repository {
	return withWriter(r, func(_ *repository.PointSpec, w repository.Writer) repository.Writer {
		return &writerTap{Writer: w, abort: func(ctx context.Context) error {
			_, _ = w.Commit(ctx, &repository.CommitInfo{})
			return w.Abort(ctx)
		}}
	})
}

func mutCommitsEarly(_ *bench, r repository.Repository) repository.Repository {
	return withWriter(r, func(_ *repository.PointSpec, w repository.Writer) repository.Writer {
		return &writerTap{Writer: w, disk: func(ctx context.Context, s repository.DiskSpec) (repository.DiskWriter, error) {
			d, err := w.Disk(ctx, s)
			if err != nil {
				return nil, err
			}
			return &diskTap{DiskWriter: d, close: func(ctx context.Context) error {
				if err := d.Close(ctx); err != nil {
					return err
				}
				_, err := w.Commit(ctx, &repository.CommitInfo{})
				return err
			}}, nil
		}}
	})
}

func mutAnyParent(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, begin: func(ctx context.Context, spec *repository.PointSpec) (repository.Writer, error) {
		w, err := r.Begin(ctx, spec)
		if err != nil && spec.Parent != "" {
			without := *spec
			without.Parent = ""
			return r.Begin(ctx, &without)
		}
		return w, err
	}}
}
