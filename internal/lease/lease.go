// Package lease keeps a repository lock alive while work is done under it, and
// tells whether the holder of another one is dead.
package lease

import (
	"context"
	"fmt"
	"time"

	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/repository"
)

// Options say who asks for a lease.
type Options struct {
	Holder   string
	TTL      time.Duration
	Takeover func(holder string) bool
	Clock    clock.Clock
}

// Lease is a lock that renews itself until it is released. When it cannot be
// kept, the context of Take's result ends with the reason as its cause.
type Lease struct {
	repository.Lock
	stop context.CancelFunc
	done chan struct{}
}

// Take locks name and returns a context that ends when the lease is lost.
func Take(ctx context.Context, repo repository.Repository, name string, o Options) (context.Context, *Lease, error) {
	if o.TTL <= 0 {
		o.TTL = repository.DefaultTTL
	}
	lock, err := repo.Lock(ctx, name, repository.LockOptions{Holder: o.Holder, TTL: o.TTL, Takeover: o.Takeover})
	if err != nil {
		return nil, nil, err
	}
	work, fail := context.WithCancelCause(ctx)
	keep, stop := context.WithCancel(ctx)
	l := &Lease{Lock: lock, stop: stop, done: make(chan struct{})}
	go func() {
		defer close(l.done)
		defer fail(nil)
		left := o.Clock.Now().Add(o.TTL)
		for {
			if clock.Sleep(keep, o.Clock, o.TTL/3) != nil {
				return
			}
			err := lock.Renew(keep)
			switch {
			case err == nil:
				left = o.Clock.Now().Add(o.TTL)
			case keep.Err() != nil:
				return
			case o.Clock.Now().After(left) || isFenced(err):
				fail(fmt.Errorf("lease %s: %w", name, err))
				<-keep.Done()
				return
			}
		}
	}()
	return work, l, nil
}

// Release stops renewing and gives the lock back. It is idempotent.
func (l *Lease) Release(ctx context.Context) error {
	l.stop()
	<-l.done
	return l.Lock.Release(ctx)
}
