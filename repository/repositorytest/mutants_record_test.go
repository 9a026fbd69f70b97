package repositorytest_test

import (
	"context"
	"encoding/json"
	"iter"
	"slices"
	"strings"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/repository"
)

func recordMutants() []mutant {
	return []mutant{
		{"Points misses the vanished", "LostRecordsAreNoticed", mutOnlyCommitted},
		{"Points are in the order of their time", "PointsInOrder", mutOrder},
		{"Points ignores the filter by run", "PointsFiltered", mutNoRunFilter},
		{"labels are lost", "PointFieldsRoundtrip", mutNoLabels},
		{"meta goes through float64", "PointFieldsRoundtrip", mutMetaFloat},
		{"root depends on the block size", "RootIndependentOfBlockSize", mutRootBlockSize},
		{"proof names another sequence", "ProofIsTheListedPoint", mutProof},
		{"delete removes shared blocks", "DeleteParentReadChild", mutDeleteShared},
		{"delete needs no lock", "DeleteNeedsMaintenanceLock", mutDeleteAnyLock},
		{"delete twice is an error", "DeleteTwice", mutDeleteOnce},
		{"delete does nothing", "DeleteAllStartsAnew", mutDeleteNothing},
		{"verify is always clean", "DamageIsFoundAndNamed", mutVerifyClean},
		{"verify names every point", "DamageIsFoundAndNamed", mutVerifyAll},
		{"verify looks at presence only", "DamageIsFoundAndNamed", mutVerifyShallow},
		{"verify at the deepest level does not compare data", "DigestsReturnedAsGiven", mutVerifyNoData},
		{"maintain frees nothing", "MaintainFreesSpace", mutMaintainNothing},
		{"maintain spares no writer", "MaintainSparesPointsInTheMaking", mutMaintainGreedy},
		{"note names are patterns", "NotesByPrefix", mutNotesPattern},
		{"old note is kept beside the new", "NotesPutReplaceDelete", mutNotesKeep},
		{"cancellation of listings is swallowed", "CanceledRepositoryMethods", mutListUncanceled},
	}
}

func mutOnlyCommitted(_ *bench, r repository.Repository) repository.Repository {
	return withPoint(r, func(p *repository.Point) bool { return p.State == repository.Committed })
}

func mutOrder(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, points: func(ctx context.Context, q repository.Query) iter.Seq2[*repository.Point, error] {
		return func(yield func(*repository.Point, error) bool) {
			var all []*repository.Point
			for p, err := range r.Points(ctx, q) {
				if err != nil {
					yield(nil, err)
					return
				}
				all = append(all, p)
			}
			slices.SortStableFunc(all, func(a, b *repository.Point) int { return a.Created.Compare(b.Created) })
			for _, p := range all {
				if !yield(p, nil) {
					return
				}
			}
		}
	}}
}

func mutNoRunFilter(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, points: func(ctx context.Context, q repository.Query) iter.Seq2[*repository.Point, error] {
		q.Run = ""
		return r.Points(ctx, q)
	}}
}

func mutNoLabels(_ *bench, r repository.Repository) repository.Repository {
	return withPoint(r, func(p *repository.Point) bool { delete(p.Labels, ""); return true })
}

func mutMetaFloat(_ *bench, r repository.Repository) repository.Repository {
	return withPoint(r, func(p *repository.Point) bool {
		var v any
		if json.Unmarshal(p.Meta, &v) == nil {
			p.Meta, _ = json.Marshal(v)
		}
		return true
	})
}

// mapProof changes the point of each proof.
func mapProof(r repository.Repository, f func(p *repository.Point)) repository.Repository {
	return withWriter(r, func(_ *repository.PointSpec, w repository.Writer) repository.Writer {
		return &writerTap{Writer: w, commit: func(ctx context.Context, info *repository.CommitInfo) (*repository.Proof, error) {
			proof, err := w.Commit(ctx, info)
			if err != nil {
				return nil, err
			}
			p := proof.Point()
			p.Disks = slices.Clone(p.Disks)
			f(&p)
			return repository.NewProof(repository.ProofFacts{Point: p, Record: proof.Record(), BlobsChecked: proof.BlobsChecked()})
		}}
	})
}

func mutRootBlockSize(_ *bench, r repository.Repository) repository.Repository {
	return mapProof(r, func(p *repository.Point) {
		for i, d := range p.Disks {
			p.Disks[i].Root = blake3.Sum256(append(d.Root[:], byte(d.BlockSize>>18)))
		}
	})
}

func mutProof(_ *bench, r repository.Repository) repository.Repository {
	return mapProof(r, func(p *repository.Point) { p.Sequence++ })
}

// mutDeleteShared deletes with a point every block that came with it.
func mutDeleteShared(b *bench, r repository.Repository) repository.Repository {
	came := map[repository.PointID][]string{}
	tap := withWriter(r, func(_ *repository.PointSpec, w repository.Writer) repository.Writer {
		before := b.store.Names("blocks/")
		return &writerTap{Writer: w, commit: func(ctx context.Context, info *repository.CommitInfo) (*repository.Proof, error) {
			came[w.ID()] = slices.DeleteFunc(b.store.Names("blocks/"), func(n string) bool { return slices.Contains(before, n) })
			return w.Commit(ctx, info)
		}}
	}).(*repositoryTap)
	tap.del = func(ctx context.Context, id repository.PointID, l repository.Lock) error {
		for _, n := range came[id] {
			if _, err := b.store.Damage(n, fakes.BlobLost); err != nil {
				return err
			}
		}
		return r.Delete(ctx, id, l)
	}
	return tap
}

func mutDeleteAnyLock(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, del: func(ctx context.Context, id repository.PointID, l repository.Lock) error {
		if l == nil || l.Name() != repository.LockMaintenance {
			own, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{})
			if err != nil {
				return err
			}
			l = own
		}
		return r.Delete(ctx, id, l)
	}}
}

func mutDeleteOnce(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, del: func(ctx context.Context, id repository.PointID, l repository.Lock) error {
		if _, err := r.Open(ctx, id); err != nil {
			return err
		}
		return r.Delete(ctx, id, l)
	}}
}

func mutDeleteNothing(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, del: func(ctx context.Context, _ repository.PointID, l repository.Lock) error {
		return l.Check(ctx)
	}}
}

// mapReport changes the report of each check.
func mapReport(r repository.Repository, f func(rep *repository.VerifyReport)) repository.Repository {
	return &repositoryTap{Repository: r, verify: func(ctx context.Context, o *repository.VerifyOptions) (*repository.VerifyReport, error) {
		rep, err := r.Verify(ctx, o)
		if err == nil {
			f(rep)
		}
		return rep, err
	}}
}

func mutVerifyClean(_ *bench, r repository.Repository) repository.Repository {
	return mapReport(r, func(rep *repository.VerifyReport) { rep.Damages = nil })
}

func mutVerifyAll(_ *bench, r repository.Repository) repository.Repository {
	return mapReport(r, func(rep *repository.VerifyReport) {
		for i := range rep.Damages {
			rep.Damages[i].Points = rep.Points
		}
	})
}

func capLevel(r repository.Repository, level repository.VerifyLevel) repository.Repository {
	return &repositoryTap{Repository: r, verify: func(ctx context.Context, o *repository.VerifyOptions) (*repository.VerifyReport, error) {
		if o != nil {
			low := *o
			low.Level = min(low.Level, level)
			o = &low
		}
		return r.Verify(ctx, o)
	}}
}

func mutVerifyShallow(_ *bench, r repository.Repository) repository.Repository {
	return capLevel(r, repository.VerifyRecords)
}

func mutVerifyNoData(_ *bench, r repository.Repository) repository.Repository {
	return capLevel(r, repository.VerifyBlobs)
}

func mutMaintainNothing(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, maintain: func(ctx context.Context, l repository.Lock, _ *repository.MaintainOptions) (*repository.MaintainReport, error) {
		return &repository.MaintainReport{Ran: true}, l.Check(ctx)
	}}
}

// mutMaintainGreedy does not know of points in the making.
func mutMaintainGreedy(b *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, maintain: func(ctx context.Context, l repository.Lock, o *repository.MaintainOptions) (*repository.MaintainReport, error) {
		var undo []func()
		for _, n := range b.store.Names("pins/") {
			u, err := b.store.Damage(n, fakes.BlobLost)
			if err != nil {
				return nil, err
			}
			undo = append(undo, u)
		}
		rep, err := r.Maintain(ctx, l, o)
		for _, u := range undo {
			u()
		}
		return rep, err
	}}
}

func mutNotesPattern(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, notes: func(ctx context.Context, prefix string) iter.Seq2[repository.Note, error] {
		return r.Notes(ctx, strings.TrimSuffix(prefix, "."))
	}}
}

func mutNotesKeep(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, putNote: func(ctx context.Context, name string, value []byte) error {
		for n, err := range r.Notes(ctx, name) {
			if err == nil && n.Name == name {
				name += ".1"
				break
			}
		}
		return r.PutNote(ctx, name, value)
	}}
}

func mutListUncanceled(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, points: func(ctx context.Context, q repository.Query) iter.Seq2[*repository.Point, error] {
		return r.Points(context.WithoutCancel(ctx), q)
	}}
}
