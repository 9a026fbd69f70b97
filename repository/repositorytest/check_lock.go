package repositorytest

import (
	"errors"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

func lockChecks() []Check {
	return []Check{
		{"LockIsExclusive", checkLockExclusive},
		{"LockNamesHolder", checkLockedError},
		{"LocksAreIndependent", checkLocksIndependent},
		{"LockEpochGrows", checkLockEpoch},
		{"LockReleaseIsIdempotent", checkLockRelease},
		{"LockTakeoverAsks", checkLockTakeover},
		{"LockTakeoverFences", checkLockFences},
		{"LockRace", checkLockRace},
		{"LockExpires", checkLockExpiry},
		{"LockRenew", checkLockRenew},
		{"LockExpiredButNotTaken", checkLockExpiredHeld},
	}
}

func fenceChecks() []Check {
	return []Check{
		{"FencedCommitRefused", checkFencedCommit},
		{"FencedBeginRefused", checkFencedBegin},
		{"FencedDeleteRefused", checkFencedDelete},
		{"FencedMaintainRefused", checkFencedMaintain},
		{"EpochIsInTheRecord", checkEpochRecord},
	}
}

var dead = func(string) bool { return true }

// takeOver takes a lock away from whoever holds it.
func (e *env) takeOver(r repository.Repository, name string) repository.Lock {
	e.Helper()
	l, err := r.Lock(e.ctx, name, repository.LockOptions{Holder: "the heir", Takeover: dead})
	require.NoError(e, err)
	return l
}

func checkLockExclusive(t T, h *Harness) {
	e := newEnv(t, h)
	l := e.lock("vm-1")
	require.Equal(t, "vm-1", l.Name())
	for _, r := range []repository.Repository{e.repo, e.reopen()} {
		_, err := r.Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "the suite"}) // also for the same holder
		require.ErrorIs(t, err, repository.ErrLocked)
	}
	require.NoError(t, l.Check(e.ctx))
	require.NoError(t, l.Release(e.ctx))
	require.ErrorIs(t, l.Check(e.ctx), repository.ErrFenced, "a lock that was given back")
	require.ErrorIs(t, l.Renew(e.ctx), repository.ErrFenced)
	other, err := e.reopen().Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "other"})
	require.NoError(t, err)
	require.NoError(t, other.Check(e.ctx))
	require.ErrorIs(t, l.Check(e.ctx), repository.ErrFenced)
}

func checkLockedError(t T, h *Harness) {
	e := newEnv(t, h)
	_, err := e.repo.Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "host a, run 7", TTL: time.Hour})
	require.NoError(t, err)
	_, err = e.reopen().Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "other"})
	var locked *repository.LockedError
	require.ErrorAs(t, err, &locked)
	require.Equal(t, "vm-1", locked.Name)
	require.Equal(t, "host a, run 7", locked.Holder)
	require.False(t, locked.Until.IsZero())
}

func checkLocksIndependent(t T, h *Harness) {
	e := newEnv(t, h)
	a, b, m := e.lock("vm-a"), e.lock("vm-b"), e.lock(repository.LockMaintenance)
	require.NoError(t, a.Release(e.ctx))
	require.NoError(t, b.Check(e.ctx))
	require.NoError(t, m.Check(e.ctx))
	e.takeOver(e.repo, "vm-b")
	require.ErrorIs(t, b.Check(e.ctx), repository.ErrFenced)
	require.NoError(t, m.Check(e.ctx))
}

func checkLockEpoch(t T, h *Harness) {
	e := newEnv(t, h)
	last := int64(0)
	for i := range 6 {
		r := e.repo
		if i%2 == 1 {
			r = e.reopen()
		}
		l, err := r.Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "x", Takeover: dead})
		require.NoError(t, err)
		require.Greater(t, l.Epoch(), last)
		last = l.Epoch()
		if i%3 != 2 {
			require.NoError(t, l.Release(e.ctx))
		}
	}
}

func checkLockRelease(t T, h *Harness) {
	e := newEnv(t, h)
	l := e.lock("vm-1")
	require.NoError(t, l.Release(e.ctx))
	require.NoError(t, l.Release(e.ctx))
	next := e.lock("vm-1")
	require.NoError(t, l.Release(e.ctx), "release of a lock that somebody else has by now")
	require.NoError(t, next.Check(e.ctx), "it was not released for him")
	_, err := e.repo.Lock(e.ctx, "vm-1", repository.LockOptions{})
	require.ErrorIs(t, err, repository.ErrLocked)
}

func checkLockTakeover(t T, h *Harness) {
	e := newEnv(t, h)
	_, err := e.repo.Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "host a"})
	require.NoError(t, err)
	var asked []string
	_, err = e.repo.Lock(e.ctx, "vm-1", repository.LockOptions{
		Holder: "b", Takeover: func(holder string) bool { asked = append(asked, holder); return false },
	})
	require.ErrorIs(t, err, repository.ErrLocked, "the holder lives")
	require.Equal(t, []string{"host a"}, asked)
	l, err := e.repo.Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "b", Takeover: dead})
	require.NoError(t, err)
	require.NoError(t, l.Check(e.ctx))
	// Nobody is asked about a free lock.
	l, err = e.repo.Lock(e.ctx, "vm-2", repository.LockOptions{Holder: "b", Takeover: func(holder string) bool {
		t.Errorf("asked whether %q is dead, who holds nothing", holder)
		return false
	}})
	require.NoError(t, err)
	require.NoError(t, l.Release(e.ctx))
}

func checkLockFences(t T, h *Harness) {
	e := newEnv(t, h)
	l := e.lock("vm-1")
	heir := e.takeOver(e.reopen(), "vm-1")
	require.Greater(t, heir.Epoch(), l.Epoch())
	require.ErrorIs(t, l.Check(e.ctx), repository.ErrFenced)
	require.ErrorIs(t, l.Renew(e.ctx), repository.ErrFenced)
	require.NoError(t, l.Release(e.ctx))
	require.NoError(t, heir.Check(e.ctx))
	require.NoError(t, heir.Renew(e.ctx))
	require.NoError(t, heir.Release(e.ctx))
}

func checkLockRace(t T, h *Harness) {
	e := newEnv(t, h)
	const n = 8
	var repos [n]repository.Repository
	for i := range repos {
		repos[i] = e.repo
		if i < 2 {
			repos[i] = e.reopen()
		}
	}
	var got [n]repository.Lock
	require.NoError(t, together(n, func(i int) error {
		l, err := repos[i].Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "x"})
		if err != nil && !errors.Is(err, repository.ErrLocked) {
			return err
		}
		got[i] = l
		return nil
	}))
	winners := 0
	for _, l := range got {
		if l != nil {
			winners++
			require.NoError(t, l.Check(e.ctx))
		}
	}
	require.Equal(t, 1, winners)
}

func (e *env) needsClock() {
	e.Helper()
	if e.h.Advance == nil {
		e.Skip("the harness cannot move the clock")
	}
}

func checkLockExpiry(t T, h *Harness) {
	e := newEnv(t, h)
	e.needsClock()
	old, err := e.repo.Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "a", TTL: time.Minute})
	require.NoError(t, err)
	byDefault, err := e.repo.Lock(e.ctx, "vm-2", repository.LockOptions{Holder: "a"})
	require.NoError(t, err)
	e.h.Advance(50 * time.Second)
	_, err = e.repo.Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "b"})
	require.ErrorIs(t, err, repository.ErrLocked, "ten seconds before its end")
	e.h.Advance(11 * time.Second)
	l, err := e.reopen().Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "b", Takeover: func(string) bool {
		t.Errorf("nobody needs to be asked about an expired lease")
		return false
	}})
	require.NoError(t, err)
	require.Greater(t, l.Epoch(), old.Epoch())
	require.ErrorIs(t, old.Check(e.ctx), repository.ErrFenced)
	require.ErrorIs(t, old.Renew(e.ctx), repository.ErrFenced)
	_, err = e.repo.Lock(e.ctx, "vm-2", repository.LockOptions{})
	require.ErrorIs(t, err, repository.ErrLocked, "after a minute of the default TTL")
	e.h.Advance(repository.DefaultTTL)
	_, err = e.repo.Lock(e.ctx, "vm-2", repository.LockOptions{})
	require.NoError(t, err)
	require.ErrorIs(t, byDefault.Check(e.ctx), repository.ErrFenced)
}

func checkLockRenew(t T, h *Harness) {
	e := newEnv(t, h)
	e.needsClock()
	l, err := e.repo.Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "a", TTL: time.Minute})
	require.NoError(t, err)
	epoch := l.Epoch()
	for range 4 {
		e.h.Advance(45 * time.Second)
		require.NoError(t, l.Renew(e.ctx))
		_, err := e.repo.Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "b"})
		require.ErrorIs(t, err, repository.ErrLocked)
	}
	require.Equal(t, epoch, l.Epoch(), "renewing is not locking anew")
	require.NoError(t, l.Check(e.ctx))
	e.h.Advance(61 * time.Second)
	_, err = e.repo.Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "b"})
	require.NoError(t, err)
}

func checkLockExpiredHeld(t T, h *Harness) {
	e := newEnv(t, h)
	e.needsClock()
	l, err := e.repo.Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "a", TTL: time.Minute})
	require.NoError(t, err)
	e.h.Advance(time.Hour)
	require.NoError(t, l.Check(e.ctx), "nobody else took it")
	require.NoError(t, l.Renew(e.ctx))
	_, err = e.repo.Lock(e.ctx, "vm-1", repository.LockOptions{Holder: "b"})
	require.ErrorIs(t, err, repository.ErrLocked, "it was renewed in time")
}

func checkFencedCommit(t T, h *Harness) {
	e := newEnv(t, h)
	l := e.lock("vm-1")
	plan := one(e.random(3*small, small, 1))
	plan.Lock = l
	w, err := e.write(e.repo, plan)
	require.NoError(t, err)
	heir := e.takeOver(e.reopen(), "vm-1")
	proof, err := w.Commit(e.ctx, &plan.CommitInfo)
	require.ErrorIs(t, err, repository.ErrFenced)
	require.Nil(t, proof)
	e.invisible(w.ID())
	require.NoError(t, w.Abort(e.ctx))

	d := e.random(3*small, small, 1)
	plan = one(d)
	plan.Lock = heir
	e.expectOne(e.commit(plan).ID, d)

	// A lock that was given back fences as well.
	plan = one(d)
	plan.Lock = heir
	w, err = e.write(e.repo, plan)
	require.NoError(t, err)
	require.NoError(t, heir.Release(e.ctx))
	_, err = w.Commit(e.ctx, &plan.CommitInfo)
	require.ErrorIs(t, err, repository.ErrFenced)
	e.invisible(w.ID())
}

func checkFencedBegin(t T, h *Harness) {
	e := newEnv(t, h)
	l := e.lock("vm-1")
	e.takeOver(e.repo, "vm-1")
	plan := one(e.random(small, small, 1))
	plan.Lock = l
	w, err := e.write(e.repo, plan)
	if err == nil { // it may be noticed at the end only
		_, err = w.Commit(e.ctx, &plan.CommitInfo)
	}
	require.ErrorIs(t, err, repository.ErrFenced)
	require.Empty(t, e.list(e.repo, repository.Query{}))
}

func checkFencedDelete(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(3*small, small, 1)
	p := e.commit(one(d))
	l := e.lock(repository.LockMaintenance)
	heir := e.takeOver(e.reopen(), repository.LockMaintenance)
	require.ErrorIs(t, e.repo.Delete(e.ctx, p.ID, l), repository.ErrFenced)
	e.expectOne(p.ID, d)
	require.NoError(t, e.repo.Delete(e.ctx, p.ID, heir))
	require.Empty(t, e.list(e.repo, repository.Query{}))
}

func checkFencedMaintain(t T, h *Harness) {
	e := newEnv(t, h)
	_, err := e.repo.Maintain(e.ctx, nil, nil)
	require.Error(t, err, "no lock")
	other := e.lock("vm-1")
	_, err = e.repo.Maintain(e.ctx, other, nil)
	require.Error(t, err, "the lock of something else")
	l := e.lock(repository.LockMaintenance)
	e.takeOver(e.repo, repository.LockMaintenance)
	_, err = e.repo.Maintain(e.ctx, l, &repository.MaintainOptions{Full: true})
	require.ErrorIs(t, err, repository.ErrFenced)
}

func checkEpochRecord(t T, h *Harness) {
	e := newEnv(t, h)
	require.Zero(t, e.commit(e.tiny("vm-1", "")).Epoch, "not fenced")
	last := int64(0)
	for range 3 {
		l := e.takeOver(e.repo, "vm-1")
		plan := e.tiny("vm-1", "")
		plan.Lock = l
		p := e.commit(plan)
		require.Equal(t, l.Epoch(), p.Epoch)
		require.Greater(t, p.Epoch, last)
		last = p.Epoch
	}
}
