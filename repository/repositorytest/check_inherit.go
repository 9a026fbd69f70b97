package repositorytest

import (
	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

func inheritChecks() []Check {
	return []Check{
		{"IncrementalInherits", checkIncremental},
		{"IncrementalWritesNothing", checkInheritAll},
		{"IncrementalZeroesOut", checkZeroesOut},
		{"IncrementalInheritsTail", checkInheritTail},
		{"NoInheritMeansZeros", checkNoInherit},
		{"DeleteParentReadChild", checkDeleteParent},
		{"DeleteMiddleOfChain", checkDeleteMiddle},
		{"DeleteChildReadParent", checkDeleteChild},
		{"SiblingsOfOneParent", checkSiblings},
	}
}

func checkIncremental(t T, h *Harness) {
	e := newEnv(t, h)
	for _, bs := range []int{small, normal} {
		d := e.random(40*int64(small)+oddTail, bs, 0.7)
		p1 := e.commit(one(d))
		next := d.clone()
		var write []int64
		for i := int64(0); i < d.count(); i += 3 {
			next.fill(e.rng, i)
			write = append(write, i)
		}
		p2 := e.commit(child(p1.ID, next, write...))
		require.Equal(t, p1.ID, p2.Parent)
		e.expectOne(p2.ID, next)
		e.expectOne(p1.ID, d)
	}
}

func checkInheritAll(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(40*small+oddTail, small, 0.5)
	p1 := e.commit(one(d))
	p2 := e.commit(child(p1.ID, d))
	e.expectOne(p2.ID, d)
	require.Equal(t, p1.Disk("d1").Root, p2.Disk("d1").Root)
	s := p2.Disk("d1").Stats
	require.Zero(t, s.Written+s.Zero+s.BytesIn)
	require.Positive(t, s.Inherited)
	plan := child(p2.ID, d)
	plan.disks["d1"] = diskPlan{truth: d, inherit: true, write: []int64{}, advance: true}
	e.expectOne(e.commit(plan).ID, d)
}

func checkZeroesOut(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(36*small+oddTail, small, 1)
	p1 := e.commit(one(d))
	next := d.clone()
	zero := []int64{0, 5, 17, 36}
	for _, i := range zero {
		delete(next.blocks, i)
	}
	p2 := e.commit(child(p1.ID, next, zero...))
	e.expectOne(p2.ID, next)
	e.expectOne(p1.ID, d)
	// All of a disk becomes zeros, then gets data again.
	empty := newDisk(d.size, d.bs)
	var all []int64
	for i := range d.count() {
		all = append(all, i)
	}
	p3 := e.commit(child(p2.ID, empty, all...))
	e.expectOne(p3.ID, empty)
	require.Equal(t, int64(37), p3.Disk("d1").Stats.Zero)
	back := empty.clone()
	back.fill(e.rng, 36)
	e.expectOne(e.commit(child(p3.ID, back, 36)).ID, back)
}

func checkInheritTail(t T, h *Harness) {
	e := newEnv(t, h)
	for _, size := range []int64{5*small + 1, 33*small + oddTail, 100} {
		d := e.random(size, small, 0.6) // the tail always holds data
		p1 := e.commit(one(d))
		next := d.clone()
		next.fill(e.rng, 0)
		p2 := e.commit(child(p1.ID, next, 0))
		e.expectOne(p2.ID, next)
		last := next.clone()
		last.fill(e.rng, d.count()-1)
		e.expectOne(e.commit(child(p2.ID, last, d.count()-1)).ID, last)
	}
}

func checkNoInherit(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(20*small, small, 1)
	p1 := e.commit(one(d))
	only := newDisk(d.size, d.bs)
	only.fill(e.rng, 3)
	plan := one(only)
	plan.Parent = p1.ID
	e.expectOne(e.commit(plan).ID, only)
	// A disk of the parent that the child does not name is not in the child.
	plan = one(only)
	plan.disks["d2"] = diskPlan{truth: d}
	both := e.commit(plan)
	c := e.commit(child(both.ID, only))
	require.Len(t, c.Disks, 1)
	require.Nil(t, c.Disk("d2"))
	e.expectOne(c.ID, only)
}

// generations commits n points, each a child of the one before.
func (e *env) generations(n int) (points []*repository.Point, truths []*disk) {
	d := e.random(34*small+oddTail, small, 0.7)
	for k := range n {
		if k == 0 {
			points = append(points, e.commit(one(d)))
		} else {
			d = d.clone()
			write := []int64{int64(k), int64(20 + k), 34}
			for _, i := range write {
				d.fill(e.rng, i)
			}
			points = append(points, e.commit(child(points[k-1].ID, d, write...)))
		}
		truths = append(truths, d)
	}
	return points, truths
}

// collect maintains in full, past safety times if the clock can be moved.
func (e *env) collect() *repository.MaintainReport {
	e.Helper()
	if e.h.SafetyTime > 0 && e.h.Advance != nil {
		e.h.Advance(e.h.SafetyTime + 1)
	}
	var rep *repository.MaintainReport
	e.withMaintenance(func(l repository.Lock) {
		var err error
		rep, err = e.repo.Maintain(e.ctx, l, &repository.MaintainOptions{Full: true})
		require.NoError(e, err, "maintain")
	})
	return rep
}

func checkDeleteParent(t T, h *Harness) {
	e := newEnv(t, h)
	p, d := e.generations(2)
	e.deletePoint(p[0].ID)
	e.collect()
	_, err := e.repo.Open(e.ctx, p[0].ID)
	require.ErrorIs(t, err, repository.ErrNotFound)
	e.expectOne(p[1].ID, d[1])
	e.expect(e.reopen(), p[1].ID, map[string]*disk{"d1": d[1]})
	// And it goes on being a parent.
	next := d[1].clone()
	next.fill(e.rng, 9)
	e.expectOne(e.commit(child(p[1].ID, next, 9)).ID, next)
}

func checkDeleteMiddle(t T, h *Harness) {
	e := newEnv(t, h)
	p, d := e.generations(5)
	for _, k := range []int{2, 1} {
		e.deletePoint(p[k].ID)
		e.collect()
	}
	for _, k := range []int{0, 3, 4} {
		e.expectOne(p[k].ID, d[k])
	}
	require.Equal(t, []repository.PointID{p[0].ID, p[3].ID, p[4].ID}, ids(e.list(e.reopen(), repository.Query{})))
}

func checkDeleteChild(t T, h *Harness) {
	e := newEnv(t, h)
	p, d := e.generations(3)
	e.deletePoint(p[2].ID)
	e.collect()
	e.expectOne(p[0].ID, d[0])
	e.expectOne(p[1].ID, d[1])
}

func checkSiblings(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(20*small, small, 1)
	p := e.commit(one(d))
	a, b := d.clone(), d.clone()
	a.fill(e.rng, 1)
	b.fill(e.rng, 1)
	b.fill(e.rng, 2)
	// Both are written at once.
	wa, err := e.write(e.repo, child(p.ID, a, 1))
	require.NoError(t, err)
	wb, err := e.write(e.repo, child(p.ID, b, 1, 2))
	require.NoError(t, err)
	_, err = wb.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	_, err = wa.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	e.expectOne(p.ID, d)
	e.expectOne(wa.ID(), a)
	e.expectOne(wb.ID(), b)
}
