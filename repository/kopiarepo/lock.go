package kopiarepo

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/repository"
)

// A lock is a directory of numbered files, one per epoch. The newest says who
// holds it and until when; taking a lock creates the next one, which only one can.

const locksDir = "locks"

type lease struct {
	Epoch    int64     `json:"epoch"`
	Holder   string    `json:"holder"`
	Nonce    []byte    `json:"nonce"`
	Until    time.Time `json:"until"`
	Released bool      `json:"released,omitempty"`
}

type lock struct {
	r    *Repository
	name string
	dir  string
	ttl  time.Duration

	mu       sync.Mutex
	lease    lease
	released bool
}

var _ repository.Lock = (*lock)(nil)

// lockDir makes a file name out of any lock name.
func lockDir(name string) string {
	return locksDir + "/n-" + strings.ReplaceAll(url.PathEscape(name), ".", "%2E")
}

// Lock takes a named lease.
func (r *Repository) Lock(ctx context.Context, name string, opts repository.LockOptions) (repository.Lock, error) {
	if err := r.check(ctx); err != nil {
		return nil, err
	}
	if name == "" || len(name) > 80 {
		return nil, fmt.Errorf("lock name %q is empty or too long", name)
	}
	if opts.TTL <= 0 {
		opts.TTL = repository.DefaultTTL
	}
	l := &lock{r: r, name: name, dir: lockDir(name), ttl: opts.TTL}
	for range 16 {
		newest, held, err := l.newest(ctx)
		if err != nil {
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		now := r.cfg.Clock()
		if held != nil && !held.Released && now.Before(held.Until) && (opts.Takeover == nil || !opts.Takeover(held.Holder)) {
			return nil, &repository.LockedError{Name: name, Holder: held.Holder, Until: held.Until}
		}
		l.lease = lease{Epoch: newest + 1, Holder: opts.Holder, Nonce: make([]byte, 16), Until: now.Add(opts.TTL)}
		if _, err := io.ReadFull(r.cfg.Rand, l.lease.Nonce); err != nil {
			return nil, err
		}
		b, err := l.encode()
		if err != nil {
			return nil, err
		}
		err = r.dir.create(ctx, l.file(l.lease.Epoch), b)
		if err == nil {
			l.forget(ctx, newest)
			return l, nil
		}
		// Lost the race, or lost the answer: look again.
		if _, held, lerr := l.newest(context.WithoutCancel(ctx)); lerr == nil && held != nil && string(held.Nonce) == string(l.lease.Nonce) {
			return l, nil
		}
		if !isTaken(err) {
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
	}
	return nil, &repository.LockedError{Name: name, Holder: "several at once", Until: r.cfg.Clock()}
}

func (l *lock) file(epoch int64) string     { return primary + l.dir + "/" + number(epoch) }
func (l *lock) fileName(epoch int64) string { return l.dir + "/" + number(epoch) }

func (l *lock) encode() ([]byte, error) {
	return l.r.keys.write(l.r.cfg.Rand, typeLock, l.fileName(l.lease.Epoch), &l.lease, nil)
}

// newest returns the newest epoch, and its lease unless that cannot be read. A
// lease that is damaged is as good as expired only when it is old by its file.
func (l *lock) newest(ctx context.Context) (int64, *lease, error) {
	entries, err := l.r.dir.list(ctx, primary+l.dir)
	if err != nil {
		return 0, nil, err
	}
	var epochs []int64
	for _, e := range entries {
		if n, ok := parseNumber(e.Name()); ok {
			epochs = append(epochs, n)
		}
	}
	if len(epochs) == 0 {
		return 0, nil, nil
	}
	epoch := slices.MaxFunc(epochs, cmp.Compare)
	b, err := l.r.dir.get(ctx, l.file(epoch), maxSlot)
	if err != nil {
		return 0, nil, err
	}
	header, _, err := l.r.keys.read(typeLock, l.fileName(epoch), b)
	var out lease
	if err == nil {
		err = json.Unmarshal(header, &out)
	}
	if err == nil && out.Epoch == epoch {
		return epoch, &out, nil
	}
	if ctx.Err() != nil {
		return 0, nil, ctx.Err()
	}
	_, mtime, err := l.r.dir.stat(ctx, l.file(epoch))
	if err != nil {
		return 0, nil, err
	}
	return epoch, &lease{Epoch: epoch, Holder: "unknown: the lease is damaged", Until: mtime.Add(l.ttl)}, nil
}

// forget removes leases of epochs before the newest, which nothing needs.
func (l *lock) forget(ctx context.Context, upTo int64) {
	entries, err := l.r.dir.list(ctx, primary+l.dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if n, ok := parseNumber(e.Name()); ok && n <= upTo {
			_ = l.r.dir.remove(ctx, l.file(n)) // the next holder tries again
		}
	}
}

func (l *lock) Name() string { return l.name }

func (l *lock) Epoch() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lease.Epoch
}

var errReleased = fmt.Errorf("%w: it was released", repository.ErrFenced)

// Check returns ErrFenced unless the lease is still ours.
func (l *lock) Check(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.check(ctx)
}

func (l *lock) check(ctx context.Context) error {
	if l.released {
		return fmt.Errorf("lock %s: %w", l.name, errReleased)
	}
	epoch, held, err := l.newest(ctx)
	switch {
	case err != nil:
		return fmt.Errorf("lock %s: %w", l.name, err)
	case epoch != l.lease.Epoch || held == nil || string(held.Nonce) != string(l.lease.Nonce) || held.Released:
		return fmt.Errorf("lock %s, epoch %d: %w", l.name, l.lease.Epoch, repository.ErrFenced)
	}
	return nil
}

// Renew extends the lease by its TTL.
func (l *lock) Renew(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.check(ctx); err != nil {
		return err
	}
	old := l.lease.Until
	l.lease.Until = l.r.cfg.Clock().Add(l.ttl)
	err := l.write(ctx)
	if err != nil {
		l.lease.Until = old
		return fmt.Errorf("lock %s: %w", l.name, err)
	}
	return l.check(ctx) // somebody may have taken it over meanwhile
}

func (l *lock) write(ctx context.Context) error {
	b, err := l.encode()
	if err != nil {
		return err
	}
	if err := l.r.dir.putBytes(ctx, l.file(l.lease.Epoch), b); err != nil {
		return err
	}
	return l.r.dir.sync(ctx)
}

// Release gives the lease back.
func (l *lock) Release(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.released {
		return nil
	}
	if err := l.check(ctx); err != nil {
		if errors.Is(err, repository.ErrFenced) {
			l.released = true
			return nil
		}
		return err
	}
	l.lease.Released = true
	if err := l.write(ctx); err != nil {
		l.lease.Released = false
		return fmt.Errorf("lock %s: %w", l.name, err)
	}
	l.released = true
	return nil
}
