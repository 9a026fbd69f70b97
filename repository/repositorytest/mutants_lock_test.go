package repositorytest_test

import (
	"context"
	"errors"
	"time"

	"github.com/holdfast-backup/holdfast/repository"
)

func lockMutants() []mutant {
	return []mutant{
		{"lock is not exclusive", "LockIsExclusive", mutSharedLock},
		{"lock is exclusive in one process only", "LockIsExclusive", mutProcessLock},
		{"lock race has two winners", "LockRace", mutSharedLock},
		{"epoch starts anew after a release", "LockEpochGrows", mutEpochStands},
		{"epoch is not checked at commit", "FencedCommitRefused", mutCommitUnfenced},
		{"epoch is not in the record", "EpochIsInTheRecord", mutCommitUnfenced},
		{"epoch is not checked at delete", "FencedDeleteRefused", mutDeleteUnfenced},
		{"release takes the lock from its next holder", "LockReleaseIsIdempotent", mutReleaseSteals},
		{"check answers from memory", "LockTakeoverFences", mutCheckFromMemory},
		{"lease never ends", "LockExpires", mutEndlessLease},
		{"lease is not extended by renew", "LockRenew", mutNoRenew},
		{"takeover does not ask", "LockTakeoverAsks", mutTakeoverSilent},
		{"locked error does not say by whom", "LockNamesHolder", mutBareLocked},
	}
}

func mutSharedLock(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, lock: func(ctx context.Context, name string, o repository.LockOptions) (repository.Lock, error) {
		o.Takeover = func(string) bool { return true }
		l, err := r.Lock(ctx, name, o)
		if err != nil {
			return nil, err
		}
		return &lockTap{Lock: l, check: func(context.Context) error { return nil }}, nil
	}}
}

func mutProcessLock(_ *bench, r repository.Repository) repository.Repository {
	mine := map[string]bool{}
	return &repositoryTap{Repository: r, lock: func(ctx context.Context, name string, o repository.LockOptions) (repository.Lock, error) {
		if !mine[name] {
			o.Takeover = func(string) bool { return true }
		}
		l, err := r.Lock(ctx, name, o)
		mine[name] = mine[name] || err == nil
		return l, err
	}}
}

func mutEpochStands(_ *bench, r repository.Repository) repository.Repository {
	return withLock(r, func(l repository.Lock) repository.Lock { return &lockTap{Lock: l, epoch: 1} })
}

func mutCommitUnfenced(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, begin: func(ctx context.Context, spec *repository.PointSpec) (repository.Writer, error) {
		without := *spec
		without.Lock = nil
		return r.Begin(ctx, &without)
	}}
}

func mutDeleteUnfenced(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, del: func(ctx context.Context, id repository.PointID, l repository.Lock) error {
		err := r.Delete(ctx, id, l)
		if errors.Is(err, repository.ErrFenced) {
			own, lockErr := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{Takeover: func(string) bool { return true }})
			if lockErr != nil {
				return lockErr
			}
			return r.Delete(ctx, id, own)
		}
		return err
	}}
}

func mutReleaseSteals(_ *bench, r repository.Repository) repository.Repository {
	return withLock(r, func(l repository.Lock) repository.Lock {
		return &lockTap{Lock: l, release: func(ctx context.Context) error {
			held, err := r.Lock(ctx, l.Name(), repository.LockOptions{Takeover: func(string) bool { return true }})
			if err != nil {
				return err
			}
			return held.Release(ctx)
		}}
	})
}

func mutCheckFromMemory(_ *bench, r repository.Repository) repository.Repository {
	return withLock(r, func(l repository.Lock) repository.Lock {
		return &lockTap{Lock: l, check: func(ctx context.Context) error { return ctx.Err() }}
	})
}

func mutEndlessLease(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, lock: func(ctx context.Context, name string, o repository.LockOptions) (repository.Lock, error) {
		o.TTL = 100 * 365 * 24 * time.Hour
		return r.Lock(ctx, name, o)
	}}
}

func mutNoRenew(_ *bench, r repository.Repository) repository.Repository {
	return withLock(r, func(l repository.Lock) repository.Lock { return &lockTap{Lock: l, renew: l.Check} })
}

func mutTakeoverSilent(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, lock: func(ctx context.Context, name string, o repository.LockOptions) (repository.Lock, error) {
		if o.Takeover != nil {
			o.Takeover = func(string) bool { return true }
		}
		return r.Lock(ctx, name, o)
	}}
}

func mutBareLocked(_ *bench, r repository.Repository) repository.Repository {
	return &repositoryTap{Repository: r, lock: func(ctx context.Context, name string, o repository.LockOptions) (repository.Lock, error) {
		l, err := r.Lock(ctx, name, o)
		if errors.Is(err, repository.ErrLocked) {
			return nil, repository.ErrLocked
		}
		return l, err
	}}
}
