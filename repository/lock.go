package repository

import (
	"context"
	"fmt"
	"time"
)

// LockMaintenance is the name of the lock for Delete and Maintain.
const LockMaintenance = "maintenance"

// Lock is a lease with a fencing epoch. Each time a name is locked anew its epoch
// grows; a holder whose epoch is no longer the newest is fenced: whatever it
// tries to commit or delete fails with ErrFenced.
type Lock interface {
	Name() string
	Epoch() int64
	// Renew extends the lease by its TTL; ErrFenced if somebody else took it.
	Renew(ctx context.Context) error
	// Check returns ErrFenced unless the lease is still ours. It reads storage.
	Check(ctx context.Context) error
	// Release gives the lease back. It is idempotent, and does nothing if the
	// lease was taken over.
	Release(ctx context.Context) error
}

// LockOptions say who locks and for how long.
type LockOptions struct {
	// Holder names the holder to others: host, process, run.
	Holder string
	// TTL is how long the lease lasts unless renewed; zero means DefaultTTL. Its
	// end is judged by the clock of the one that wants to take over.
	TTL time.Duration
	// Takeover is asked, when somebody holds an unexpired lease, whether the
	// caller knows that holder to be dead. nil: never.
	Takeover func(holder string) bool
}

// DefaultTTL is how long a lease lasts unless it is renewed.
const DefaultTTL = 10 * time.Minute

// LockedError says who holds a lock. It matches ErrLocked.
type LockedError struct {
	Name   string
	Holder string
	Until  time.Time
}

// Error names the lock, its holder and its end.
func (e *LockedError) Error() string {
	return fmt.Sprintf("%s is locked by %s until %s", e.Name, e.Holder, e.Until.UTC().Format(time.RFC3339))
}

// Is makes the error match ErrLocked.
func (e *LockedError) Is(target error) bool { return target == ErrLocked }
