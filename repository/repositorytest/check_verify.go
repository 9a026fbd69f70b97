package repositorytest

import (
	"sync"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

var levels = []repository.VerifyLevel{repository.VerifyRecords, repository.VerifyBlobs, repository.VerifyData}

func verifyChecks() []Check {
	return []Check{
		{"VerifyClean", checkVerifyClean},
		{"VerifySubset", checkVerifySubset},
		{"VerifyProgress", checkVerifyProgress},
	}
}

func maintainChecks() []Check {
	return []Check{
		{"MaintainKeepsEveryPoint", checkMaintainKeeps},
		{"MaintainFreesSpace", checkMaintainFrees},
		{"MaintainSparesPointsInTheMaking", checkMaintainSpares},
		{"MaintainSparesTheParentOfAWriter", checkMaintainParent},
	}
}

func checkVerifyClean(t T, h *Harness) {
	e := newEnv(t, h)
	points, _ := e.generations(3)
	plan := e.tiny("vm-2", "")
	plan.files = map[string][]byte{"f": []byte("file")}
	points = append(points, e.commit(plan))
	e.deletePoint(points[1].ID)
	require.NoError(t, e.repo.PutNote(e.ctx, "n", []byte("v")))
	want := []repository.PointID{points[0].ID, points[2].ID, points[3].ID}
	for _, r := range []repository.Repository{e.repo, e.reopen()} {
		for _, level := range levels {
			rep, err := r.Verify(e.ctx, &repository.VerifyOptions{Level: level})
			require.NoError(t, err, "level %d", level)
			require.True(t, rep.OK(), "level %d: %+v", level, rep.Damages)
			require.Empty(t, rep.Damaged())
			require.ElementsMatch(t, want, rep.Points, "level %d", level)
			require.Positive(t, rep.Blobs, "level %d", level)
		}
		e.collect()
	}
	deep, err := e.repo.Verify(e.ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(t, err)
	require.Positive(t, deep.Bytes)
	rep, err := e.repo.Verify(e.ctx, nil)
	require.NoError(t, err, "no options check records and inventory")
	require.ElementsMatch(t, want, rep.Points)
}

func checkVerifySubset(t T, h *Harness) {
	e := newEnv(t, h)
	points, _ := e.generations(3)
	for _, level := range levels {
		rep, err := e.repo.Verify(e.ctx, &repository.VerifyOptions{Level: level, Points: []repository.PointID{points[1].ID}})
		require.NoError(t, err)
		require.Equal(t, []repository.PointID{points[1].ID}, rep.Points)
		require.True(t, rep.OK(), "%+v", rep.Damages)
	}
}

func checkVerifyProgress(t T, h *Harness) {
	e := newEnv(t, h)
	e.generations(2)
	for _, level := range levels[1:] {
		var mu sync.Mutex
		var calls, last, total int64
		_, err := e.repo.Verify(e.ctx, &repository.VerifyOptions{Level: level, Progress: func(done, of int64) {
			mu.Lock()
			defer mu.Unlock()
			if done > of || of <= 0 {
				t.Errorf("level %d: progress %d of %d", level, done, of)
			}
			calls++
			last, total = max(last, done), max(total, of)
		}})
		require.NoError(t, err)
		require.Positive(t, calls, "level %d", level)
		require.Equal(t, total, last, "level %d ends in full", level)
	}
}

func checkMaintainKeeps(t T, h *Harness) {
	e := newEnv(t, h)
	points, truths := e.generations(5)
	for _, k := range []int{1, 3} {
		e.deletePoint(points[k].ID)
	}
	files := map[string][]byte{"f": []byte("file")}
	alone := e.commit(&pointPlan{files: files})
	for range 3 {
		e.collect()
		for _, k := range []int{0, 2, 4} {
			e.expectOne(points[k].ID, truths[k])
		}
		require.NoError(t, e.compare(e.repo, alone.ID, nil, files))
		rep, err := e.repo.Verify(e.ctx, &repository.VerifyOptions{Level: repository.VerifyData})
		require.NoError(t, err)
		require.Empty(t, rep.Damages)
	}
}

func (e *env) needsNoSafetyTime() {
	e.Helper()
	if e.h.SafetyTime > 0 {
		e.needsClock()
	}
}

func checkMaintainFrees(t T, h *Harness) {
	e := newEnv(t, h)
	e.needsNoSafetyTime()
	d := e.random(12*normal, normal, 1)
	for _, b := range d.blocks {
		noise(e.rng, b)
	}
	keep := e.random(2*normal, normal, 1)
	plan := one(keep)
	plan.Chain = "vm-2"
	kept := e.commit(plan)
	p := e.commit(one(d))
	w, err := e.write(e.repo, one(e.random(4*normal, normal, 1)))
	require.NoError(t, err)
	require.NoError(t, w.Abort(e.ctx))
	e.deletePoint(p.ID)
	var freed int64
	for range 4 { // an engine may need several cycles
		rep := e.collect()
		freed += rep.BytesBefore - rep.BytesAfter
	}
	require.Greater(t, freed, d.size*9/10, "bytes freed")
	e.expectOne(kept.ID, keep)
	e.expectOne(e.commit(one(d)).ID, d)
}

// checkMaintainSpares maintains between the writing and the commit of a point that
// shares content with a deleted one.
func checkMaintainSpares(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(20*small+oddTail, small, 1)
	old := e.commit(one(d))
	e.deletePoint(old.ID)
	plan := one(d) // deduplicated against what nobody needs any more
	plan.disks["d1"] = diskPlan{truth: d, advance: true}
	w, err := e.write(e.repo, plan)
	require.NoError(t, err)
	e.withMaintenance(func(l repository.Lock) {
		_, err := e.repo.Maintain(e.ctx, l, &repository.MaintainOptions{Full: true})
		require.NoError(t, err)
	})
	_, err = w.Commit(e.ctx, &plan.CommitInfo)
	require.NoError(t, err, "maintenance took what a point in the making needs")
	e.expectOne(w.ID(), d)
}

func checkMaintainParent(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(20*small+oddTail, small, 1)
	p := e.commit(one(d))
	next := d.clone()
	next.fill(e.rng, 3)
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run(), Parent: p.ID})
	require.NoError(t, err)
	e.deletePoint(p.ID)
	e.withMaintenance(func(l repository.Lock) {
		_, err := e.repo.Maintain(e.ctx, l, &repository.MaintainOptions{Full: true})
		require.NoError(t, err)
	})
	require.NoError(t, writeDisk(e.ctx, w, "d1", diskPlan{truth: next, inherit: true, write: []int64{3}}))
	_, err = w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	e.expectOne(w.ID(), next)
}
