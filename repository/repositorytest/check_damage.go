package repositorytest

import (
	"errors"
	"fmt"
	"slices"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

func damageChecks() []Check {
	return []Check{
		{"DamageIsFoundAndNamed", checkDamageFound},
		{"DamageIsNeverReadAsContent", checkDamageRead},
		{"LostRecordsAreNoticed", checkVanished},
		{"CommitChecksTheInventory", checkInventory},
		{"NoDedupAgainstWhatIsLost", checkPoisonedDedup},
		{"ChildOfADamagedParent", checkDamagedParent},
	}
}

func (e *env) needsDamage() {
	e.Helper()
	if e.h.Damage == nil || e.h.Objects == nil {
		e.Skip("the harness cannot damage objects")
	}
}

// trial is one damage to try.
type trial struct {
	object string
	how    Damage
}

// trials draws damages of all objects but those in without.
func (e *env) trials(without []string, hows ...Damage) (out []trial) {
	for _, o := range e.h.Objects() {
		if slices.Contains(without, o) {
			continue
		}
		for _, how := range hows {
			out = append(out, trial{o, how})
		}
	}
	slices.SortFunc(out, func(a, b trial) int {
		if a.object != b.object {
			if a.object < b.object {
				return -1
			}
			return 1
		}
		return slices.Index(hows, a.how) - slices.Index(hows, b.how)
	})
	e.rng.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	limit := e.h.DamageSamples
	if limit == 0 {
		limit = 60
	}
	return out[:min(len(out), limit)]
}

// damaged calls f while one damage stands. It reports false if it cannot be done.
func (e *env) damaged(tr trial, f func()) bool {
	e.Helper()
	undo, err := e.h.Damage(tr.object, tr.how)
	if errors.Is(err, errors.ErrUnsupported) {
		return false
	}
	require.NoError(e, err, "damage %s: %s", tr.object, tr.how)
	f()
	undo()
	return true
}

// stock is a repository with some points to damage.
type stock struct {
	points []repository.PointID // by sequence, of one chain
	disks  map[repository.PointID]map[string]*disk
	files  map[repository.PointID]map[string][]byte
}

// stock commits four points that share content; the second is deleted, and what
// it alone needed is collected if that can be done now.
func (e *env) stock() *stock {
	e.Helper()
	s := &stock{disks: map[repository.PointID]map[string]*disk{}, files: map[repository.PointID]map[string][]byte{}}
	d := e.random(18*small+oddTail, small, 0.6)
	var parent, deleted repository.PointID
	for k := range 4 {
		plan := one(d)
		if k > 0 {
			d = d.clone()
			d.fill(e.rng, int64(k))
			plan = child(parent, d, int64(k))
		}
		plan.files = map[string][]byte{"config": fmt.Append(nil, "config ", k), "same": []byte("same in all")}
		p := e.commit(plan)
		parent = p.ID
		if k != 1 {
			s.points = append(s.points, p.ID)
			s.disks[p.ID], s.files[p.ID] = map[string]*disk{"d1": d}, plan.files
		} else {
			deleted = p.ID
		}
	}
	e.deletePoint(deleted)
	e.collect()
	return s
}

func (e *env) read(r repository.Repository, s *stock, id repository.PointID) error {
	return e.compare(r, id, s.disks[id], s.files[id])
}

func checkDamageFound(t T, h *Harness) {
	e := newEnv(t, h)
	e.needsDamage()
	s := e.stock()
	found := 0
	for _, tr := range e.trials(nil, Flip, Truncate, Empty, Lost) {
		e.damaged(tr, func() {
			r, err := e.h.Reopen(e.ctx)
			require.NoError(t, err, "%v: the repository does not open", tr)
			defer func() { require.NoError(t, r.Close()) }()
			rep, err := r.Verify(e.ctx, &repository.VerifyOptions{Level: repository.VerifyBlobs})
			require.NoError(t, err, "%v: verify", tr)
			named := rep.Damaged()
			repairable := slices.ContainsFunc(rep.Damages, func(d repository.Damage) bool { return d.Repairable })
			for i, id := range s.points {
				err := e.read(r, s, id)
				require.NotErrorIs(t, err, errWrong, "%v: point %d", tr, i)
				switch {
				case err == nil && slices.Contains(named, id) && !repairable:
					require.Fail(t, "a point is named that can be read in full", "%v: point %d: %+v", tr, i, rep.Damages)
				case err != nil && !slices.Contains(named, id) && !e.lastRecord(r, s, tr, id):
					require.Fail(t, "a point is not named that cannot be read", "%v: point %d: %v", tr, i, err)
				}
			}
			switch {
			case !rep.OK():
				found++
			case e.lastRecord(r, s, tr, s.points[len(s.points)-1]):
			case tr.how == Lost && h.SafetyTime > 0 && h.Advance == nil: // it may be garbage
			default:
				require.Fail(t, "damage is not found", "%v", tr)
			}
		})
	}
	require.Positive(t, found)
	rep, err := e.repo.Verify(e.ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(t, err)
	require.True(t, rep.OK(), "after all damage was taken back: %+v", rep.Damages)
}

// lastRecord reports the one loss that nothing stored can prove: the newest
// record of a chain.
func (e *env) lastRecord(r repository.Repository, s *stock, tr trial, id repository.PointID) bool {
	e.Helper()
	if tr.how != Lost || id != s.points[len(s.points)-1] {
		return false
	}
	return !slices.ContainsFunc(e.list(r, repository.Query{}), func(p *repository.Point) bool { return p.ID == id })
}

func checkDamageRead(t T, h *Harness) {
	e := newEnv(t, h)
	e.needsDamage()
	d := e.random(8*small+oddTail, small, 1)
	empty := e.h.Objects()
	p := e.commit(one(d))
	noticed := 0
	for _, tr := range e.trials(empty, Flip, Truncate, Empty, Lost) {
		e.damaged(tr, func() {
			r, err := e.h.Reopen(e.ctx)
			require.NoError(t, err, "%v", tr)
			defer func() { require.NoError(t, r.Close()) }()
			rd, err := r.Open(e.ctx, p.ID)
			if err != nil {
				if tr.how != Lost || !errors.Is(err, repository.ErrNotFound) {
					require.ErrorIs(t, err, repository.ErrDamaged, "%v", tr)
				}
				noticed++
				return
			}
			defer func() { require.NoError(t, rd.Close()) }()
			if e.readDamaged(rd, d, tr) {
				noticed++
			}
		})
	}
	require.Positive(t, noticed)
	e.expectOne(p.ID, d)
}

// readDamaged reads a disk in every way and reports whether there were errors,
// all of which must match ErrDamaged. Bytes without an error must be right.
func (e *env) readDamaged(rd repository.Reader, d *disk, tr trial) (noticed bool) {
	e.Helper()
	dr, err := rd.Disk(e.ctx, "d1")
	if err != nil {
		require.ErrorIs(e, err, repository.ErrDamaged, "%v", tr)
		return true
	}
	defer func() { require.NoError(e, dr.Close()) }()
	buf := make([]byte, d.bs)
	for i := range d.count() {
		b, err := dr.ReadBlock(e.ctx, i, buf)
		if err != nil {
			require.ErrorIs(e, err, repository.ErrDamaged, "%v: block %d", tr, i)
			noticed = true
		} else {
			require.NoError(e, sameBytes(i*int64(d.bs), d.blocks[i], b.Data), "%v: block %d", tr, i)
		}
		n := repository.BlockLen(d.size, d.bs, i)
		got := make([]byte, n)
		m, readErr := dr.ReadAt(got, i*int64(d.bs))
		if m == n {
			require.NoError(e, sameBytes(i*int64(d.bs), d.blocks[i], got), "%v: block %d", tr, i)
		} else {
			require.ErrorIs(e, readErr, repository.ErrDamaged, "%v: block %d", tr, i)
		}
		require.Equal(e, err != nil, m != n, "%v: ReadBlock and ReadAt of block %d disagree: %v, %v", tr, i, err, readErr)
		if leaves, err := dr.Leaves(e.ctx, i); err == nil {
			require.NotEmpty(e, leaves)
		}
	}
	return noticed
}

// checkVanished loses each object; no point but the newest may be missing from a
// listing without a word.
func checkVanished(t T, h *Harness) {
	e := newEnv(t, h)
	e.needsDamage()
	s := e.stock()
	states := map[repository.State]int{}
	for _, tr := range e.trials(nil, Lost, Flip) {
		e.damaged(tr, func() {
			r, err := e.h.Reopen(e.ctx)
			require.NoError(t, err, "%v", tr)
			defer func() { require.NoError(t, r.Close()) }()
			seen := map[repository.PointID]repository.State{}
			for _, p := range e.list(r, repository.Query{}) {
				seen[p.ID] = p.State
				if p.State != repository.Committed {
					states[p.State]++
					require.NotEmpty(t, p.Detail, "%v: point %s is %s", tr, p.ID, p.State)
					require.Equal(t, "vm-1", p.Chain)
					_, err := r.Open(e.ctx, p.ID)
					require.Error(t, err, "%v: a point that is %s opens", tr, p.State)
				}
			}
			for i, id := range s.points {
				if seen[id] == "" && !e.lastRecord(r, s, tr, id) {
					require.Fail(t, "a point is gone without a word", "%v: point %d", tr, i)
				}
			}
		})
	}
	require.Positive(t, states[repository.Vanished]+states[repository.Untrusted], "no loss of a record was seen: %v", states)
}

// checkInventory loses what a point needs before its commit.
func checkInventory(t T, h *Harness) {
	e := newEnv(t, h)
	e.needsDamage()
	refused := 0
	for _, how := range []Damage{Lost, Truncate, Empty} {
		before := e.h.Objects()
		d := e.random(6*small, small, 1)
		plan := one(d)
		w, err := e.write(e.repo, plan)
		require.NoError(t, err)
		var undo []func()
		for _, o := range e.h.Objects() {
			if slices.Contains(before, o) {
				continue
			}
			u, err := e.h.Damage(o, how)
			if errors.Is(err, errors.ErrUnsupported) {
				continue
			}
			require.NoError(t, err)
			undo = append(undo, u)
		}
		if len(undo) == 0 {
			t.Logf("nothing is stored before the commit")
			require.NoError(t, w.Abort(e.ctx))
			continue
		}
		proof, err := w.Commit(e.ctx, &plan.CommitInfo)
		if err == nil {
			require.NotNil(t, proof)
			require.NoError(t, e.compare(e.repo, w.ID(), map[string]*disk{"d1": d}, nil),
				"%s: the commit succeeded, so the point must be readable", how)
			e.deletePoint(w.ID())
		} else {
			refused++
			e.invisible(w.ID())
			require.NoError(t, w.Abort(e.ctx))
		}
		for _, u := range undo {
			u()
		}
	}
	t.Logf("%d commits refused", refused)
}

// checkPoisonedDedup backs up the same bytes again after parts of them were lost.
func checkPoisonedDedup(t T, h *Harness) {
	e := newEnv(t, h)
	e.needsDamage()
	before := e.h.Objects()
	d := e.random(5*small, small, 1)
	e.commit(one(d))
	for _, tr := range e.trials(before, Lost, Truncate) {
		var id repository.PointID
		e.damaged(tr, func() {
			r, err := e.h.Reopen(e.ctx)
			require.NoError(t, err, "%v", tr)
			defer func() { require.NoError(t, r.Close()) }()
			plan := one(d)
			w, err := e.write(r, plan)
			if err == nil {
				_, err = w.Commit(e.ctx, &plan.CommitInfo)
			}
			if err != nil {
				t.Logf("%v: refused: %v", tr, err)
				if w != nil {
					require.NoError(t, w.Abort(e.ctx))
				}
				return
			}
			id = w.ID()
			require.NoError(t, e.compare(r, id, map[string]*disk{"d1": d}, nil),
				"%v: a backup succeeded that cannot be read", tr)
		})
		if id != "" {
			e.deletePoint(id)
		}
	}
}

// checkDamagedParent makes children of a parent while it is damaged. A child that
// commits must be readable.
func checkDamagedParent(t T, h *Harness) {
	e := newEnv(t, h)
	e.needsDamage()
	before := e.h.Objects()
	d := e.random(20*small, small, 1)
	p := e.commit(one(d))
	next := d.clone()
	next.fill(e.rng, 2)
	refused := 0
	for _, tr := range e.trials(before, Lost, Truncate) {
		var id repository.PointID
		e.damaged(tr, func() {
			r, err := e.h.Reopen(e.ctx)
			require.NoError(t, err, "%v", tr)
			defer func() { require.NoError(t, r.Close()) }()
			plan := child(p.ID, next, 2)
			w, err := e.write(r, plan)
			if err == nil {
				_, err = w.Commit(e.ctx, &plan.CommitInfo)
			}
			if err != nil {
				refused++
				if w != nil {
					require.NoError(t, w.Abort(e.ctx))
				}
				return
			}
			id = w.ID()
			require.NoError(t, e.compare(r, id, map[string]*disk{"d1": next}, nil),
				"%v: a child was committed that cannot be read", tr)
		})
		if id != "" {
			e.deletePoint(id)
		}
	}
	require.Positive(t, refused)
}
