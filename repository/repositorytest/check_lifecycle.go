package repositorytest

import (
	"encoding/hex"
	"strings"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

func lifecycleChecks() []Check {
	return []Check{
		{"InfoIsComplete", checkInfo},
		{"EmptyRepository", checkEmpty},
		{"CloseTwice", checkCloseTwice},
		{"ReopenSeesAll", checkReopen},
		{"UncommittedIsInvisible", checkUncommitted},
		{"AbortIsInvisible", checkAbort},
		{"AbortAfterCommitDoesNothing", checkAbortAfterCommit},
		{"CommitTwiceRefused", checkCommitTwice},
		{"CommitWithOpenDiskRefused", checkCommitOpenDisk},
		{"EndedWriterRefuses", checkEnded},
		{"ProofIsTheListedPoint", checkProof},
		{"NotFound", checkNotFound},
	}
}

func checkInfo(t T, h *Harness) {
	e := newEnv(t, h)
	info := e.repo.Info()
	_, err := hex.DecodeString(info.ID)
	require.NoError(t, err, "ID %q is hex", info.ID)
	require.GreaterOrEqual(t, len(info.ID), 32)
	require.Equal(t, strings.ToLower(info.ID), info.ID)
	require.NotEmpty(t, info.Engine)
	require.NotEmpty(t, info.Location)
	require.Positive(t, info.SegmentBytes)
	require.Zero(t, info.SegmentBytes%repository.DefaultBlockSize)
	require.Positive(t, info.FormatVersion)
	require.False(t, info.Created.IsZero())
	again := e.reopen().Info()
	require.Equal(t, info.ID, again.ID)
	require.True(t, info.Created.Equal(again.Created), "created %s, then %s", info.Created, again.Created)
}

func checkEmpty(t T, h *Harness) {
	e := newEnv(t, h)
	require.Empty(t, e.list(e.repo, repository.Query{}))
	for range e.repo.Notes(e.ctx, "") {
		t.Errorf("a new repository has a note")
	}
	rep, err := e.repo.Verify(e.ctx, nil)
	require.NoError(t, err)
	require.True(t, rep.OK(), "damages: %+v", rep.Damages)
}

func checkCloseTwice(t T, h *Harness) {
	e := newEnv(t, h)
	r := e.reopen()
	require.NoError(t, r.Close())
	require.NoError(t, r.Close())
	_, err := r.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: "r1"})
	require.Error(t, err, "begin on a closed repository")
	require.NotEmpty(t, r.Info().ID, "Info does no I/O")

	p := e.commit(one(e.random(3*small, small, 1)))
	rd, err := e.repo.Open(e.ctx, p.ID)
	require.NoError(t, err)
	d, err := rd.Disk(e.ctx, "d1")
	require.NoError(t, err)
	require.NoError(t, d.Close())
	require.NoError(t, d.Close())
	require.NoError(t, rd.Close())
	require.NoError(t, rd.Close())
}

func checkReopen(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(5*small+oddTail, small, 0.6)
	p1 := e.commit(one(d))
	next := d.clone()
	next.fill(e.rng, 2)
	plan := child(p1.ID, next, 2)
	plan.files = map[string][]byte{"config.xml": []byte("<domain/>")}
	p2 := e.commit(plan)
	require.NoError(t, e.repo.PutNote(e.ctx, "open/1", []byte("thaw")))

	r := e.reopen()
	require.Equal(t, []repository.PointID{p1.ID, p2.ID}, ids(e.list(r, repository.Query{})))
	e.expect(r, p1.ID, map[string]*disk{"d1": d})
	require.NoError(t, e.compare(r, p2.ID, map[string]*disk{"d1": next}, plan.files))
	for n, err := range r.Notes(e.ctx, "") {
		require.NoError(t, err)
		require.Equal(t, "open/1", n.Name)
	}
	// The other way round: what the new process commits, the old one sees.
	w, err := e.write(r, child(p2.ID, next))
	require.NoError(t, err)
	_, err = w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	e.expectOne(w.ID(), next)
}

// invisible requires that a point cannot be seen by anybody.
func (e *env) invisible(id repository.PointID) {
	e.Helper()
	for _, r := range []repository.Repository{e.repo, e.reopen()} {
		for _, p := range e.list(r, repository.Query{}) {
			require.NotEqual(e, id, p.ID, "listed as %s", p.State)
		}
		_, err := r.Open(e.ctx, id)
		require.ErrorIs(e, err, repository.ErrNotFound)
	}
}

func checkUncommitted(t T, h *Harness) {
	e := newEnv(t, h)
	w, err := e.write(e.repo, one(e.random(4*small, small, 1)))
	require.NoError(t, err)
	e.invisible(w.ID())
	_, err = e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: "next", Parent: w.ID()})
	require.Error(t, err, "a point that is not committed is no parent")
	require.NoError(t, w.Abort(e.ctx))
}

func checkAbort(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(4*small, small, 1)
	before := e.commit(one(d))
	w, err := e.write(e.repo, one(e.random(4*small, small, 1)))
	require.NoError(t, err)
	require.NoError(t, w.Abort(e.ctx))
	require.NoError(t, w.Abort(e.ctx), "abort after abort")
	e.invisible(w.ID())
	_, err = w.Commit(e.ctx, &repository.CommitInfo{})
	require.Error(t, err, "commit after abort")
	e.invisible(w.ID())
	require.Equal(t, []repository.PointID{before.ID}, ids(e.list(e.repo, repository.Query{})))
	e.expectOne(before.ID, d)

	// Aborted in the middle of a disk.
	w, err = e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run()})
	require.NoError(t, err)
	dw, err := w.Disk(e.ctx, repository.DiskSpec{ID: "d1", Size: small, BlockSize: small})
	require.NoError(t, err)
	require.NoError(t, dw.WriteBlock(e.ctx, repository.Block{Index: 0}))
	require.NoError(t, w.Abort(e.ctx))
	e.invisible(w.ID())
}

func checkAbortAfterCommit(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(4*small, small, 1)
	plan := one(d)
	w, err := e.write(e.repo, plan)
	require.NoError(t, err)
	_, err = w.Commit(e.ctx, &plan.CommitInfo)
	require.NoError(t, err)
	require.NoError(t, w.Abort(e.ctx))
	e.expectOne(w.ID(), d)
}

func checkCommitTwice(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(2*small, small, 1)
	plan := one(d)
	w, err := e.write(e.repo, plan)
	require.NoError(t, err)
	_, err = w.Commit(e.ctx, &plan.CommitInfo)
	require.NoError(t, err)
	proof, err := w.Commit(e.ctx, &plan.CommitInfo)
	require.Error(t, err)
	require.Nil(t, proof)
	require.Equal(t, []repository.PointID{w.ID()}, ids(e.list(e.repo, repository.Query{})))
	e.expectOne(w.ID(), d)
}

func checkCommitOpenDisk(t T, h *Harness) {
	e := newEnv(t, h)
	plan := one(e.random(2*small, small, 1))
	w, err := e.write(e.repo, plan)
	require.NoError(t, err)
	_, err = w.Disk(e.ctx, repository.DiskSpec{ID: "d2", Size: small, BlockSize: small})
	require.NoError(t, err)
	proof, err := w.Commit(e.ctx, &plan.CommitInfo)
	require.Error(t, err, "d2 was not closed")
	require.Nil(t, proof)
	e.invisible(w.ID())
	require.NoError(t, w.Abort(e.ctx))
	e.invisible(w.ID())
}

func checkEnded(t T, h *Harness) {
	e := newEnv(t, h)
	for _, end := range []string{"commit", "abort"} {
		d := e.random(4*small, small, 1)
		plan := one(d)
		w, err := e.write(e.repo, plan)
		require.NoError(t, err)
		if end == "commit" {
			_, err = w.Commit(e.ctx, &plan.CommitInfo)
		} else {
			err = w.Abort(e.ctx)
		}
		require.NoError(t, err)
		dw, err := w.Disk(e.ctx, repository.DiskSpec{ID: "late", Size: small, BlockSize: small})
		if err == nil {
			err = dw.WriteBlock(e.ctx, repository.Block{Index: 0})
		}
		require.Error(t, err, "a disk after %s", end)
		require.Error(t, w.File(e.ctx, "late", strings.NewReader("x")), "a file after %s", end)
		if end == "commit" {
			e.expectOne(w.ID(), d)
		}
	}
}

func checkProof(t T, h *Harness) {
	e := newEnv(t, h)
	plan := one(e.random(6*small+1, small, 0.5))
	plan.Name, plan.Labels, plan.Meta = "web1", map[string]string{"platform": "kvm"}, []byte(`{"a":1}`)
	plan.files = map[string][]byte{"nvram": []byte("vars")}
	w, err := e.write(e.repo, plan)
	require.NoError(t, err)
	proof, err := w.Commit(e.ctx, &plan.CommitInfo)
	require.NoError(t, err)
	require.False(t, proof.Record().IsZero())
	require.Positive(t, proof.BlobsChecked())
	proved := proof.Point()
	listed := e.list(e.repo, repository.Query{})
	require.Len(t, listed, 1)
	rd, err := e.repo.Open(e.ctx, w.ID())
	require.NoError(t, err)
	defer func() { require.NoError(t, rd.Close()) }()
	for _, p := range []*repository.Point{listed[0], rd.Point()} {
		require.True(t, proved.Created.Equal(p.Created), "created %s, listed %s", proved.Created, p.Created)
		sameJSON(t, proved.Meta, p.Meta)
		q, want := *p, proved
		q.Created, q.Meta, want.Meta = want.Created, nil, nil
		require.Equal(t, want, q)
	}
}

func checkNotFound(t T, h *Harness) {
	e := newEnv(t, h)
	_, err := e.repo.Open(e.ctx, "no-such-point")
	require.ErrorIs(t, err, repository.ErrNotFound)
	p := e.commit(one(e.random(small, small, 1)))
	_, err = e.repo.Open(e.ctx, "no-such-point")
	require.ErrorIs(t, err, repository.ErrNotFound)
	_, err = e.repo.Verify(e.ctx, &repository.VerifyOptions{Points: []repository.PointID{"no-such-point"}})
	require.ErrorIs(t, err, repository.ErrNotFound)
	rd, err := e.repo.Open(e.ctx, p.ID)
	require.NoError(t, err)
	defer func() { require.NoError(t, rd.Close()) }()
	_, err = rd.Disk(e.ctx, "d2")
	require.ErrorIs(t, err, repository.ErrNotFound)
	_, err = rd.File(e.ctx, "config.xml")
	require.ErrorIs(t, err, repository.ErrNotFound)
}
