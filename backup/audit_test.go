package backup_test

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/manifest"
	"github.com/holdfast-backup/holdfast/repository"
)

// auditAll compares every leaf that is called unchanged: no lie can be missed.
func auditAll(o *backup.Options) { o.Audit = backup.AuditRate{Share: 1} }

func auditOff(o *backup.Options) { o.Audit = backup.AuditRate{Off: true} }

// lie makes the guest write one sector that the change tracking of vda hides, in
// the leaf with this number.
func (r *rig) lie(leaf int64, value byte) {
	r.t.Helper()
	require.NoError(r.t, r.world.SetLying(r.vm, "vda", 1))
	require.NoError(r.t, r.world.GuestWrite(r.vm, "vda", leaf*repository.LeafSize+512, bytes.Repeat([]byte{value}, 512)))
	require.NoError(r.t, r.world.SetLying(r.vm, "vda", 0))
}

// point reads the record of a point and its document.
func (r *rig) point(id repository.PointID) (*repository.Point, *manifest.Manifest) {
	r.t.Helper()
	rd, err := r.repo.Open(r.t.Context(), id)
	require.NoError(r.t, err)
	defer rd.Close()
	m, err := manifest.Parse(rd.Point())
	require.NoError(r.t, err)
	return rd.Point(), m
}

func (r *rig) suspicions() map[repository.PointID][]backup.Suspicion {
	r.t.Helper()
	var all []*repository.Point
	for p, err := range r.repo.Points(r.t.Context(), repository.Query{}) {
		require.NoError(r.t, err)
		all = append(all, p)
	}
	found, damaged, err := backup.Suspicions(r.t.Context(), r.repo, all)
	require.NoError(r.t, err)
	require.NoError(r.t, damaged)
	return found
}

// baselinesOf lists the disks of which a baseline is kept on the hypervisor.
func (r *rig) baselinesOf() map[hypervisor.DiskID]bool {
	r.t.Helper()
	out := map[hypervisor.DiskID]bool{}
	for b, err := range r.hv.Baselines(r.t.Context(), r.vm) {
		require.NoError(r.t, err)
		out[b.Disk] = true
	}
	return out
}

// TestALyingTrackerIsCaught: the run that catches it reads the disk in full at
// once, so that its point is exact, and is degraded; nothing stands on the lie:
// the next run reads the disk in full for that reason, and the one after is
// incremental again. The other disk stays incremental throughout.
func TestALyingTrackerIsCaught(t *testing.T) {
	for name, o := range map[string]fakes.Options{"baselines kept": {}, "nothing kept": {NoBaselines: true}} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, o, fakes.VMConfig{})
			first := r.mustRun(nil)
			r.lie(7, 0xA1)
			var audits []backup.AuditEvent
			var order []string
			caught := r.mustRun(func(o *backup.Options) {
				auditAll(o)
				o.Events.Audit = func(e backup.AuditEvent) {
					if e.Disk == "vda" {
						audits = append(audits, e)
						order = append(order, "audit")
					}
				}
				o.Events.Disk = func(e backup.DiskEvent) {
					if e.Disk == "vda" {
						order = append(order, string(e.Mode)+" "+string(e.Reason))
					}
				}
			})
			require.Equal(t, backup.Degraded, caught.Status())
			require.Equal(t, map[hypervisor.DiskID]string{"vda": "full audit-mismatch", "vdb": "incremental changed-blocks"}, modes(caught))
			require.Equal(t, []string{"audit", "full audit-mismatch"}, order)
			require.Len(t, audits, 1)
			require.Equal(t, int64(1), audits[0].Wrong)
			d := caught.Disks[0]
			require.True(t, d.Audit.Lied())
			require.Equal(t, []int64{7 * repository.LeafSize}, d.Audit.Offsets)
			require.Equal(t, int64(37), d.Audit.Leaves, "every leaf")
			require.Equal(t, int64(sizeA), d.AuditedBytes)
			require.Positive(t, d.ReadBytes)
			require.Empty(t, d.Audit.Suspects, "the point before was read in full")
			require.Len(t, caught.Degraded, 1)
			require.Contains(t, caught.Degraded[0], "vda")
			r.check() // exact all the same

			rec, doc := r.point(caught.Point())
			require.Equal(t, "degraded", rec.Labels[manifest.LabelStatus])
			require.Equal(t, caught.Degraded, doc.Degraded)
			require.Nil(t, doc.Disk("vda").Baseline, "nothing stands on a tracking that lied")
			require.NotNil(t, doc.Disk("vdb").Baseline)
			require.True(t, doc.Disk("vda").Audit.Lied())
			require.Equal(t, caught.AuditSeed, doc.Disk("vda").Audit.Seed)
			require.False(t, r.baselinesOf()["vda"])
			require.Equal(t, map[repository.PointID][]backup.Suspicion{
				caught.Point(): {{Point: caught.Point(), Disk: "vda", Exact: true, Run: caught.Run, Leaves: 37, Wrong: 1}},
			}, r.suspicions())
			require.NotEqual(t, first.Point(), caught.Point())

			next := r.mustRun(auditAll)
			require.Equal(t, backup.Success, next.Status(), next.Degraded)
			require.Equal(t, map[hypervisor.DiskID]string{"vda": "full audit-mismatch", "vdb": "incremental changed-blocks"}, modes(next))
			r.check()
			r.scribble()
			last := r.mustRun(auditAll)
			require.Equal(t, backup.Success, last.Status(), last.Degraded)
			require.Equal(t, map[hypervisor.DiskID]string{"vda": "incremental changed-blocks", "vdb": "incremental changed-blocks"}, modes(last))
			r.check()
			require.Len(t, r.suspicions(), 1)
		})
	}
}

// TestPointsMadeUnderALieAreNamed: incrementals that trusted the lie are named
// until they are gone, also when the point of the run that found it is gone, and
// the full that they stand on is not.
func TestPointsMadeUnderALieAreNamed(t *testing.T) {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{})
	first := r.mustRun(nil)
	r.lie(3, 0xB1)
	var suspect []repository.PointID
	for range 2 {
		res := r.mustRun(auditOff)
		require.Equal(t, backup.Success, res.Status(), "nobody can know")
		suspect = append(suspect, res.Point())
		delete(r.truth[res.Point()], "vda") // it is wrong
	}
	caught := r.mustRun(auditAll)
	require.Equal(t, backup.Degraded, caught.Status())
	require.Equal(t, []repository.PointID{suspect[1], suspect[0]}, caught.Disks[0].Audit.Suspects)
	r.check()
	named := func() (out []repository.PointID) {
		for id, list := range r.suspicions() {
			require.Len(t, list, 1, id)
			require.Equal(t, id == caught.Point(), list[0].Exact)
			out = append(out, id)
		}
		return out
	}
	require.ElementsMatch(t, append([]repository.PointID{caught.Point()}, suspect...), named())
	require.NotContains(t, named(), first.Point())

	r.mustRun(nil) // the next point no longer stands on the one that found it
	r.delete(caught.Point())
	require.ElementsMatch(t, suspect, named())
	r.delete(suspect[1]) // the parent that was compared with
	r.mustRun(nil)
	require.ElementsMatch(t, suspect[:1], named())
	require.Len(t, r.auditNotes(), 1)
	r.delete(suspect[0])
	require.Empty(t, named())
	r.mustRun(nil)
	require.Len(t, r.auditNotes(), 1, "the baseline of the first point cannot be believed either")
	r.delete(first.Point())
	r.mustRun(nil)
	require.Empty(t, r.auditNotes(), "nobody needs them any more")
	r.check()
}

func (r *rig) auditNotes() (out []string) {
	r.t.Helper()
	for n, err := range r.repo.Notes(r.t.Context(), "audit/") {
		require.NoError(r.t, err)
		out = append(out, n.Name)
	}
	return out
}

// delete removes a point as prune does.
func (r *rig) delete(id repository.PointID) {
	r.t.Helper()
	l, err := r.repo.Lock(r.t.Context(), repository.LockMaintenance, repository.LockOptions{Holder: "test"})
	require.NoError(r.t, err)
	require.NoError(r.t, r.repo.Delete(r.t.Context(), id, l))
	require.NoError(r.t, l.Release(r.t.Context()))
	delete(r.truth, id)
	for i := range r.claims {
		if r.claims[i].Point == id {
			r.claims[i].Run, r.claims[i].Point = "", ""
		}
	}
}

// TestARunThatDiesLeavesWhatItsAuditFound: the lie is known before anything else
// is done about it, so the next run does not build on it, even without an audit.
func TestARunThatDiesLeavesWhatItsAuditFound(t *testing.T) {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{})
	r.mustRun(nil)
	r.lie(11, 0xC1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	res, err := r.run(ctx, func(o *backup.Options) {
		auditAll(o)
		o.Events.Disk = func(e backup.DiskEvent) {
			if e.Reason == backup.ReasonAuditMismatch {
				cancel()
			}
		}
	})
	require.ErrorIs(t, err, context.Canceled)
	require.Empty(t, res.Point())
	r.check()
	require.Len(t, r.auditNotes(), 1)
	next := r.mustRun(auditOff)
	require.Equal(t, "full audit-mismatch", modes(next)["vda"])
	require.Equal(t, "incremental changed-blocks", modes(next)["vdb"])
	r.check()
	require.Equal(t, "incremental changed-blocks", modes(r.mustRun(auditAll))["vda"])
	r.check()
}

// TestALieDiscreditsOlderBaselines: when the points that knew of the lie are
// deleted, an older one is the parent again, and a platform that keeps nothing
// would take its baseline, which the lie began after.
func TestALieDiscreditsOlderBaselines(t *testing.T) {
	r := newRig(t, fakes.Options{NoBaselines: true}, fakes.VMConfig{})
	r.mustRun(nil)
	r.lie(9, 0xC7)
	trusted := r.mustRun(auditOff)
	delete(r.truth[trusted.Point()], "vda")
	caught := r.mustRun(auditAll)
	require.True(t, caught.Disks[0].Audit.Lied())
	r.delete(caught.Point())
	r.delete(trusted.Point())
	next := r.mustRun(auditOff)
	require.Equal(t, "full audit-mismatch", modes(next)["vda"])
	require.Equal(t, "incremental changed-blocks", modes(next)["vdb"])
	r.check()
}

// TestASourceThatCannotBeBelievedFails: a leaf that accuses the tracker is read
// again; two answers prove nothing about the tracker and cannot be backed up.
func TestASourceThatCannotBeBelievedFails(t *testing.T) {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{})
	r.mustRun(nil)
	plain := r.hv
	r.hv = &flipping{Hypervisor: plain}
	res, err := r.run(t.Context(), auditAll)
	r.hv = plain
	var he *hypervisor.Error
	require.ErrorAs(t, err, &he)
	require.Equal(t, hypervisor.DiskID("vda"), he.Disk)
	require.NotEmpty(t, he.Hint)
	require.Equal(t, backup.Failed, res.Status())
	require.Empty(t, r.auditNotes(), "the tracker is not to blame")
	r.check()
	require.Equal(t, backup.Success, r.mustRun(auditAll).Status())
}

// flipping turns a bit over in every other reading of one leaf of vda.
type flipping struct{ hypervisor.Hypervisor }

func (f *flipping) CreateSnapshot(ctx context.Context, vm hypervisor.VMID, o *hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
	s, err := f.Hypervisor.CreateSnapshot(ctx, vm, o)
	if err != nil {
		return nil, err
	}
	return &flippingSnapshot{s}, nil
}

type flippingSnapshot struct{ hypervisor.Snapshot }

func (s *flippingSnapshot) OpenDisk(ctx context.Context, disk hypervisor.DiskID) (hypervisor.DiskReader, error) {
	r, err := s.Snapshot.OpenDisk(ctx, disk)
	if err != nil || disk != "vda" {
		return r, err
	}
	return &flippingReader{DiskReader: r}, nil
}

type flippingReader struct {
	hypervisor.DiskReader
	reads atomic.Int64
}

func (r *flippingReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.DiskReader.ReadAt(p, off)
	if off == 4*repository.LeafSize && n > 0 && r.reads.Add(1)%2 == 1 {
		p[n/2] ^= 1
	}
	return n, err
}

// TestAuditedBytesAreNotReadBytes: what the audit reads is told apart, is what
// was asked for, and is nothing where nothing can be compared.
func TestAuditedBytesAreNotReadBytes(t *testing.T) {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{})
	first := r.mustRun(auditAll)
	require.Zero(t, first.Audited(), "a full has nothing to audit")

	var progress, readProgress atomic.Int64
	res := r.mustRun(func(o *backup.Options) {
		auditAll(o)
		o.Events.Progress = func(e backup.ProgressEvent) {
			readProgress.Add(e.Read)
			progress.Add(e.Audited)
		}
	})
	_, read, _ := res.Totals()
	require.Zero(t, read)
	require.Equal(t, int64(sizeA+sizeB), res.Audited())
	require.Equal(t, int64(sizeA+sizeB), progress.Load())
	require.Zero(t, readProgress.Load())
	_, doc := r.point(res.Point())
	require.Zero(t, doc.Disk("vda").ReadBytes)
	require.Equal(t, int64(sizeA), doc.Disk("vda").Audit.Bytes)

	require.NoError(t, r.world.GuestWrite(r.vm, "vda", 5, []byte("x")))
	res = r.mustRun(auditAll)
	require.Equal(t, int64(repository.LeafSize), res.Disks[0].ReadBytes)
	require.Equal(t, int64(sizeA-repository.LeafSize), res.Disks[0].AuditedBytes, "what is read anyway is not audited")

	res = r.mustRun(nil)
	require.Contains(t, []int64{repository.LeafSize, sizeA % repository.LeafSize}, res.Disks[0].AuditedBytes, "the default: at most 5 %% of 9 MiB, which is one leaf")
	require.NotZero(t, res.AuditSeed)
	require.Zero(t, r.mustRun(auditOff).Audited())
	r.check()
}

// TestAStreamIsNotAudited: a transport without random access costs no audit and
// says so by its bytes.
func TestAStreamIsNotAudited(t *testing.T) {
	r := newRig(t, fakes.Options{Sequential: true}, fakes.VMConfig{})
	r.mustRun(nil)
	r.scribble()
	res := r.mustRun(auditAll)
	require.Equal(t, backup.Success, res.Status(), res.Degraded)
	require.Zero(t, res.Audited())
	r.check()
}

// TestAnAuditIsReplayed: a seed, given or drawn from the injected randomness, is
// told and draws the same leaves again.
func TestAnAuditIsReplayed(t *testing.T) {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{})
	r.mustRun(nil)
	plain := r.hv
	audited := func(change func(*backup.Options)) (uint64, []int64) {
		var offsets []int64
		r.hv = fakes.WithFaults(plain, fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
			if c.Op == fakes.OpReadHole || c.Op == fakes.OpReadAt {
				offsets = append(offsets, c.Offset)
			}
			return fakes.Fault{}
		}))
		res := r.mustRun(func(o *backup.Options) {
			o.Audit, o.InFlight, o.ExcludeDisks = backup.AuditRate{Share: 0.3}, 1, []hypervisor.DiskID{"vdb"}
			change(o)
		})
		r.hv = plain
		require.NotEmpty(t, offsets)
		return res.AuditSeed, offsets
	}
	s1, a := audited(func(*backup.Options) {})
	s2, b := audited(func(o *backup.Options) { o.AuditSeed = s1 })
	require.Equal(t, s1, s2)
	require.Equal(t, a, b)
	s3, _ := audited(func(*backup.Options) {})
	require.NotEqual(t, s1, s3)
	s4, _ := audited(func(o *backup.Options) { o.Rand = bytes.NewReader([]byte("abcdeXXXXXXXX")) })
	require.Equal(t, uint64(0x5858585858585858), s4)
}

// TestAnAuditThatCannotReadDegrades: a sector that did not change and cannot be
// read does not cost the day's changes, and is not passed over in silence.
func TestAnAuditThatCannotReadDegrades(t *testing.T) {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{})
	r.mustRun(nil)
	plain := r.hv
	r.hv = fakes.WithFaults(plain, fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
		if (c.Op == fakes.OpReadHole || c.Op == fakes.OpReadAt) && c.Disk == "vda" {
			return fakes.Fault{Err: errBroken}
		}
		return fakes.Fault{}
	}))
	res := r.mustRun(auditAll)
	r.hv = plain
	require.Equal(t, backup.Degraded, res.Status())
	require.ErrorIs(t, res.Disks[0].Audit.Err, errBroken)
	require.False(t, res.Disks[0].Audit.Lied())
	require.NoError(t, res.Disks[1].Audit.Err)
	require.Len(t, res.Degraded, 1)
	require.Equal(t, "incremental changed-blocks", modes(res)["vda"])
	_, doc := r.point(res.Point())
	require.NotEmpty(t, doc.Disk("vda").Audit.Error)
	r.check()
	require.Empty(t, r.suspicions())
}

// TestANoteThatCannotBeWrittenIsTold: the point is exact and says what happened,
// and so does the result.
func TestANoteThatCannotBeWrittenIsTold(t *testing.T) {
	r := newRig(t, fakes.Options{}, fakes.VMConfig{})
	r.mustRun(nil)
	r.lie(2, 0xD1)
	r.repo = &noAuditNotes{Repository: r.repo}
	res := r.mustRun(auditAll)
	require.Equal(t, backup.Degraded, res.Status())
	require.Len(t, res.Degraded, 2)
	require.ErrorIs(t, res.Disks[0].Audit.Err, errBroken)
	require.Equal(t, "full audit-mismatch", modes(res)["vda"])
	require.Equal(t, "full audit-mismatch", modes(r.mustRun(nil))["vda"])
	r.check()
	require.Contains(t, r.suspicions(), res.Point())
}

// noAuditNotes is a repository that cannot store what audits find.
type noAuditNotes struct{ repository.Repository }

func (n *noAuditNotes) PutNote(ctx context.Context, name string, value []byte) error {
	if len(name) > 6 && name[:6] == "audit/" {
		return errors.Join(errBroken, ctx.Err())
	}
	return n.Repository.PutNote(ctx, name, value)
}
