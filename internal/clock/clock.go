// Package clock is how library code asks for the time, so that tests can give
// it another one: package fakes has a clock that a test moves by hand, and
// Real works inside a testing/synctest bubble.
package clock

import (
	"context"
	"errors"
	"time"
)

// Clock tells the time and waits. It is safe for concurrent use.
type Clock interface {
	// Now returns the current time.
	Now() time.Time
	// NewTimer returns a timer that fires once after d. The caller stops it.
	NewTimer(d time.Duration) Timer
	// After returns a channel that gets the time once after d. Prefer NewTimer
	// or Sleep where the wait can end early.
	After(d time.Duration) <-chan time.Time
}

// Timer fires once.
type Timer interface {
	// C is the channel on which the time is delivered.
	C() <-chan time.Time
	// Stop keeps the timer from firing. It reports false when the timer has
	// fired or was stopped before; the channel is never closed.
	Stop() bool
}

// Real returns the clock of the operating system.
func Real() Clock { return realClock{} }

type realClock struct{}

func (realClock) Now() time.Time {
	return time.Now() //nolint:forbidigo // the one place where time comes from
}

func (realClock) NewTimer(d time.Duration) Timer { return realTimer{time.NewTimer(d)} }

func (realClock) After(d time.Duration) <-chan time.Time { return time.After(d) }

type realTimer struct{ t *time.Timer }

func (t realTimer) C() <-chan time.Time { return t.t.C }

func (t realTimer) Stop() bool { return t.t.Stop() }

// Sleep waits for d on c, or until ctx ends, whose error it then returns. With
// d <= 0 it only looks at ctx.
func Sleep(ctx context.Context, c Clock, d time.Duration) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if d <= 0 {
		return nil
	}
	t := c.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// errDeadline is the cause of a context that WithTimeout ended.
var errDeadline = timeoutError{}

type timeoutError struct{}

func (timeoutError) Error() string   { return context.DeadlineExceeded.Error() }
func (timeoutError) Timeout() bool   { return true }
func (timeoutError) Temporary() bool { return true }

// Is makes the cause match context.DeadlineExceeded.
func (timeoutError) Is(target error) bool { return target == context.DeadlineExceeded }

// WithTimeout returns a context that ends d after now on c. Its Err is
// context.Canceled, as the time is not the runtime's; its cause matches
// context.DeadlineExceeded, see TimedOut. The returned function must be called:
// it stops the goroutine that waits.
func WithTimeout(ctx context.Context, c Clock, d time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	t := c.NewTimer(d)
	go func() {
		defer t.Stop()
		select {
		case <-t.C():
			cancel(errDeadline)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(context.Canceled) }
}

// TimedOut reports whether ctx ended because its time was over, by WithTimeout
// or by a deadline of package context.
func TimedOut(ctx context.Context) bool {
	return errors.Is(context.Cause(ctx), context.DeadlineExceeded)
}
