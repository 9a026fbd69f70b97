package fakes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-backup/holdfast/repository"
)

const prefixLock = "locks/"

// leaseBlob is the sealed state of a lock. It stays when the lock is released, so
// that the epoch goes on growing.
type leaseBlob struct {
	Epoch  int64     `json:"epoch"`
	Holder string    `json:"holder,omitempty"`
	Until  time.Time `json:"until"`
	Held   bool      `json:"held"`
}

// memoryLock implements repository.Lock.
type memoryLock struct {
	r     *Repository
	name  string
	epoch int64
	ttl   time.Duration
}

// errMoved tells that a blob changed between reading and replacing it.
var errMoved = errors.New("changed by somebody else")

// Lock implements repository.Repository. Names are [A-Za-z0-9._/-]{1,128}.
func (r *Repository) Lock(ctx context.Context, name string, opts repository.LockOptions) (repository.Lock, error) {
	if err := r.begin(ctx); err != nil {
		return nil, err
	}
	switch {
	case !validName(name, 128, true, "._/-"):
		return nil, fmt.Errorf("lock: bad name %q", name)
	case opts.TTL < 0:
		return nil, fmt.Errorf("lock %s: TTL %s", name, opts.TTL)
	case opts.TTL == 0:
		opts.TTL = repository.DefaultTTL
	}
	l := &memoryLock{r: r, name: name, ttl: opts.TTL}
	for {
		cur, raw, err := r.lease(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		now := r.clock()
		if cur.Held && now.Before(cur.Until) && (opts.Takeover == nil || !opts.Takeover(cur.Holder)) {
			return nil, &repository.LockedError{Name: name, Holder: cur.Holder, Until: cur.Until}
		}
		l.epoch = cur.Epoch + 1
		err = r.replaceLease(ctx, name, raw, leaseBlob{l.epoch, opts.Holder, now.Add(opts.TTL).UTC(), true})
		if errors.Is(err, errMoved) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		return l, nil
	}
}

// lease reads the state of a lock; raw is nil if it was never taken.
func (r *Repository) lease(ctx context.Context, name string) (cur leaseBlob, raw []byte, err error) {
	raw, err = r.conn.get(ctx, prefixLock+name)
	if errors.Is(err, errNoBlob) {
		return leaseBlob{}, nil, nil
	}
	if err == nil {
		err = r.unseal(prefixLock+name, raw, &cur)
	}
	return cur, raw, err
}

// replaceLease stores the state of a lock if it still is old.
func (r *Repository) replaceLease(ctx context.Context, name string, old []byte, lease leaseBlob) error {
	raw, err := r.seal(prefixLock+name, &lease)
	if err != nil {
		return err
	}
	return r.conn.put(ctx, prefixLock+name, raw, func(v storeView) error {
		cur, ok := v.get(prefixLock + name)
		if ok != (old != nil) || !bytes.Equal(cur, old) {
			return errMoved
		}
		return nil
	})
}

// heldBy is the condition that a lock still is its holder's; nil locks nothing.
func (r *Repository) heldBy(l repository.Lock) storeCond {
	if l == nil {
		return nil
	}
	name, epoch := l.Name(), l.Epoch()
	return func(v storeView) error {
		var cur leaseBlob
		raw, ok := v.get(prefixLock + name)
		if !ok {
			return fmt.Errorf("lock %s: %w", name, repository.ErrFenced)
		}
		if err := r.unseal(prefixLock+name, raw, &cur); err != nil {
			return err
		}
		return fenced(name, cur, epoch)
	}
}

func fenced(name string, cur leaseBlob, epoch int64) error {
	if !cur.Held || cur.Epoch != epoch {
		return fmt.Errorf("lock %s, epoch %d, now %d of %q: %w", name, epoch, cur.Epoch, cur.Holder, repository.ErrFenced)
	}
	return nil
}

// Name implements repository.Lock.
func (l *memoryLock) Name() string { return l.name }

// Epoch implements repository.Lock.
func (l *memoryLock) Epoch() int64 { return l.epoch }

// Check implements repository.Lock.
func (l *memoryLock) Check(ctx context.Context) error {
	_, _, err := l.read(ctx)
	return err
}

func (l *memoryLock) read(ctx context.Context) (leaseBlob, []byte, error) {
	if err := l.r.begin(ctx); err != nil {
		return leaseBlob{}, nil, err
	}
	cur, raw, err := l.r.lease(ctx, l.name)
	if err == nil {
		err = fenced(l.name, cur, l.epoch)
	}
	return cur, raw, err
}

// Renew implements repository.Lock.
func (l *memoryLock) Renew(ctx context.Context) error {
	return l.update(ctx, func(lease *leaseBlob) { lease.Until = l.r.clock().Add(l.ttl).UTC() })
}

// Release implements repository.Lock.
func (l *memoryLock) Release(ctx context.Context) error {
	err := l.update(ctx, func(lease *leaseBlob) { lease.Held, lease.Holder = false, "" })
	if errors.Is(err, repository.ErrFenced) {
		return nil
	}
	return err
}

func (l *memoryLock) update(ctx context.Context, change func(*leaseBlob)) error {
	for {
		cur, raw, err := l.read(ctx)
		if err != nil {
			return err
		}
		change(&cur)
		if err := l.r.replaceLease(ctx, l.name, raw, cur); !errors.Is(err, errMoved) {
			return err
		}
	}
}
