package repositorytest

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

func pointChecks() []Check {
	return []Check{
		{"PointsInOrder", checkPointsOrder},
		{"PointsFiltered", checkPointsFilter},
		{"PointsStopEarly", checkPointsStop},
		{"PointFieldsRoundtrip", checkPointFields},
		{"QueryByRunFindsACommit", checkQueryRun},
		{"SequenceIsNotReused", checkSequence},
		{"ConcurrentCommitsOfOneChain", checkConcurrentCommits},
		{"DeleteTwice", checkDeleteTwice},
		{"DeleteNeedsMaintenanceLock", checkDeleteLock},
		{"DeleteAllStartsAnew", checkDeleteAll},
	}
}

// tiny is a plan of one small disk.
func (e *env) tiny(chain, name string) *pointPlan {
	p := one(e.random(small, small, 1))
	p.Chain, p.Name = chain, name
	return p
}

func checkPointsOrder(t T, h *Harness) {
	e := newEnv(t, h)
	chains := []string{"vm-b", "vm-a", "vm-c", "vm-a", "vm-b", "vm-a", "vm-a.x", "vm-a-x", "vm"}
	want := map[string][]repository.PointID{}
	for i, c := range chains {
		plan := e.tiny(c, "")
		plan.Created = time.Date(2026, 1, 20-i, 0, 0, 0, 0, time.UTC) // order is by sequence, not by time
		p := e.commit(plan)
		want[c] = append(want[c], p.ID)
		require.Equal(t, int64(len(want[c])), p.Sequence)
	}
	got := e.list(e.reopen(), repository.Query{})
	require.Len(t, got, len(chains))
	require.True(t, slices.IsSortedFunc(got, func(a, b *repository.Point) int {
		if a.Chain != b.Chain {
			if a.Chain < b.Chain {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.Sequence, b.Sequence)
	}), "by chain, then by sequence")
	seen := map[string][]repository.PointID{}
	for _, p := range got {
		seen[p.Chain] = append(seen[p.Chain], p.ID)
	}
	require.Equal(t, want, seen)
}

func checkPointsFilter(t T, h *Harness) {
	e := newEnv(t, h)
	var all []*repository.Point
	for _, p := range []struct{ chain, name string }{{"vm-1", "web"}, {"vm-2", "web"}, {"vm-1", "db"}, {"vm-1.2", "web"}} {
		all = append(all, e.commit(e.tiny(p.chain, p.name)))
	}
	for _, q := range []repository.Query{
		{},
		{Chain: "vm-1"},
		{Chain: "vm-1.2"},
		{Name: "web"},
		{Name: "db", Chain: "vm-1"},
		{Name: "db", Chain: "vm-2"},
		{Run: all[1].Run},
		{Run: all[1].Run, Chain: "vm-1"},
		{Chain: "vm"},
		{Chain: "none"},
		{Chain: "NO/../such*"},
		{Name: "we"},
		{Run: "run"},
	} {
		want := []repository.PointID{}
		for _, p := range all {
			if q.Match(p) {
				want = append(want, p.ID)
			}
		}
		require.ElementsMatch(t, want, ids(e.list(e.repo, q)), "%+v", q)
	}
}

func checkPointsStop(t T, h *Harness) {
	e := newEnv(t, h)
	for range 3 {
		e.commit(e.tiny("vm-1", ""))
	}
	n := 0
	for p, err := range e.repo.Points(e.ctx, repository.Query{}) {
		require.NoError(t, err)
		n++
		require.Equal(t, int64(n), p.Sequence)
		if n == 2 {
			break
		}
	}
	require.Len(t, e.list(e.repo, repository.Query{}), 3)
}

func checkPointFields(t T, h *Harness) {
	e := newEnv(t, h)
	parent := e.commit(one(e.random(2*small, small, 1)))
	lock := e.lock("vm-1")
	plan := child(parent.ID, e.random(2*small, small, 1), 0, 1)
	plan.Name = "Größe: web/1 \"x\"\n"
	plan.Lock = lock
	plan.Created = time.Date(2026, 7, 1, 12, 30, 0, 123456789, time.FixedZone("", -5*3600))
	plan.Labels = map[string]string{"": "empty key", "platform": "kvm", "note": "ä\nö <&>", "empty": ""}
	plan.Meta = []byte(`{"disks":[{"token":"AA==","n":9007199254740993}],"nil":null,"html":"<&>"}`)
	plan.files = map[string][]byte{"b": []byte("bb"), "a": []byte("a")}
	p := e.commit(plan)
	for _, got := range append(e.list(e.reopen(), repository.Query{Run: plan.Run}), p) {
		require.Equal(t, p.ID, got.ID)
		require.Equal(t, "vm-1", got.Chain)
		require.Equal(t, plan.Name, got.Name)
		require.Equal(t, plan.Run, got.Run)
		require.Equal(t, int64(2), got.Sequence)
		require.Equal(t, parent.ID, got.Parent)
		require.Equal(t, lock.Epoch(), got.Epoch)
		require.True(t, plan.Created.Equal(got.Created), "created %s, not %s", got.Created, plan.Created)
		require.Equal(t, plan.Labels, got.Labels)
		sameJSON(t, plan.Meta, got.Meta)
		require.Contains(t, string(got.Meta), "9007199254740993", "numbers keep their digits")
		require.ElementsMatch(t, []repository.File{{Name: "a", Size: 1}, {Name: "b", Size: 2}}, got.Files)
		require.Equal(t, repository.Committed, got.State)
		require.Equal(t, p.Disks, got.Disks)
	}
	require.NoError(t, lock.Release(e.ctx))
}

func checkQueryRun(t T, h *Harness) {
	e := newEnv(t, h)
	plan := e.tiny("vm-1", "web")
	plan.Run = "0123456789abcdef0123456789abcdef"
	w, err := e.write(e.repo, plan)
	require.NoError(t, err)
	require.Empty(t, e.list(e.repo, repository.Query{Run: plan.Run}), "before the commit")
	_, err = w.Commit(e.ctx, &plan.CommitInfo)
	require.NoError(t, err)
	require.Equal(t, []repository.PointID{w.ID()}, ids(e.list(e.reopen(), repository.Query{Run: plan.Run})))
}

func checkSequence(t T, h *Harness) {
	e := newEnv(t, h)
	var last *repository.Point
	for range 3 {
		last = e.commit(e.tiny("vm-1", ""))
	}
	require.Equal(t, int64(3), last.Sequence)
	e.deletePoint(last.ID)
	w, err := e.write(e.repo, e.tiny("vm-1", "")) // aborted points take no number
	require.NoError(t, err)
	require.NoError(t, w.Abort(e.ctx))
	require.Equal(t, int64(4), e.commit(e.tiny("vm-1", "")).Sequence)
	e.collect()
	require.Equal(t, int64(5), e.commit(e.tiny("vm-1", "")).Sequence)
	require.Equal(t, int64(1), e.commit(e.tiny("vm-2", "")).Sequence)
}

func checkConcurrentCommits(t T, h *Harness) {
	e := newEnv(t, h)
	const n = 6
	writers := make([]repository.Writer, n)
	for i := range n {
		w, err := e.write(e.repo, e.tiny("vm-1", fmt.Sprint("p", i)))
		require.NoError(t, err)
		writers[i] = w
	}
	require.NoError(t, together(n, func(i int) error {
		_, err := writers[i].Commit(e.ctx, &repository.CommitInfo{})
		return err
	}))
	got := e.list(e.repo, repository.Query{})
	require.Len(t, got, n)
	for i, p := range got {
		require.Equal(t, int64(i+1), p.Sequence)
		require.Equal(t, repository.Committed, p.State, p.Detail)
	}
}

func checkDeleteTwice(t T, h *Harness) {
	e := newEnv(t, h)
	p1, p2 := e.commit(e.tiny("vm-1", "")), e.commit(e.tiny("vm-1", ""))
	e.deletePoint(p1.ID)
	e.deletePoint(p1.ID)
	r := e.reopen()
	l := e.lock(repository.LockMaintenance)
	require.NoError(t, r.Delete(e.ctx, p1.ID, l), "a lock can be used with another value of the repository")
	require.NoError(t, l.Release(e.ctx))
	got := e.list(r, repository.Query{})
	require.Len(t, got, 1, "a deleted point is not listed, not even as vanished")
	require.Equal(t, p2.ID, got[0].ID)
}

func checkDeleteLock(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(2*small, small, 1)
	p := e.commit(one(d))
	require.Error(t, e.repo.Delete(e.ctx, p.ID, nil), "no lock")
	other := e.lock("vm-1")
	require.Error(t, e.repo.Delete(e.ctx, p.ID, other), "the lock of something else")
	require.NoError(t, other.Release(e.ctx))
	gone := e.lock(repository.LockMaintenance)
	require.NoError(t, gone.Release(e.ctx))
	require.ErrorIs(t, e.repo.Delete(e.ctx, p.ID, gone), repository.ErrFenced, "a lock that was given back")
	e.expectOne(p.ID, d)
}

func checkDeleteAll(t T, h *Harness) {
	e := newEnv(t, h)
	points, truths := e.generations(3)
	for _, p := range points {
		e.deletePoint(p.ID)
	}
	e.collect()
	require.Empty(t, e.list(e.reopen(), repository.Query{}))
	p := e.commit(one(truths[1]))
	e.expectOne(p.ID, truths[1])
	rep, err := e.repo.Verify(e.ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(t, err)
	require.Empty(t, rep.Damages)
}
