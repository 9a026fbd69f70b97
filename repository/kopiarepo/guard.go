package kopiarepo

import (
	"context"
	"errors"
	"sync"
)

// kopia lists its indexes again and again, for ever, when listing fails, unless
// its context ends. A guard ends the contexts of calls into kopia when listing
// fails several times in a row, and turns the end into the error of the listing.
type guards struct {
	mu     sync.Mutex
	failed int // listings in a row
	next   int
	active map[int]context.CancelCauseFunc
}

const maxListFailures = 3

// guard returns a context for a call into kopia, and what turns its result into
// that of the caller, which must be called.
func (g *guards) guard(ctx context.Context) (context.Context, func(error) error) {
	inner, cancel := context.WithCancelCause(ctx)
	g.mu.Lock()
	if g.active == nil {
		g.active = map[int]context.CancelCauseFunc{}
	}
	id := g.next
	g.next++
	g.active[id] = cancel
	g.mu.Unlock()
	return inner, func(err error) error {
		g.mu.Lock()
		delete(g.active, id)
		g.mu.Unlock()
		cause := context.Cause(inner)
		cancel(nil)
		if err != nil && ctx.Err() == nil && cause != nil && !errors.Is(cause, context.Canceled) {
			return errors.Join(cause, err)
		}
		return err
	}
}

// listed notes the result of a listing.
func (g *guards) listed(ctx context.Context, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err == nil || ctx.Err() != nil {
		if err == nil {
			g.failed = 0
		}
		return
	}
	if g.failed++; g.failed < maxListFailures {
		return
	}
	g.failed = 0
	for _, cancel := range g.active {
		cancel(err)
	}
}
