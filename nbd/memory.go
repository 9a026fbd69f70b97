package nbd

import (
	"context"
	"sync"
)

// Buffer classes of a server: most requests fit one of them.
const (
	smallBuffer = 64 << 10
	largeBuffer = 1 << 20
)

// buffers recycles data buffers. The contents of a buffer are stale.
type buffers struct{ small, large sync.Pool }

// get returns a buffer of n bytes.
func (b *buffers) get(n int64) []byte {
	pool, size := &b.small, int64(smallBuffer)
	switch {
	case n > largeBuffer:
		return make([]byte, n)
	case n > smallBuffer:
		pool, size = &b.large, largeBuffer
	}
	if p, ok := pool.Get().(*[]byte); ok {
		return (*p)[:n]
	}
	return make([]byte, n, size)
}

// put gives a buffer back.
func (b *buffers) put(p []byte) {
	p = p[:cap(p)]
	switch len(p) {
	case smallBuffer:
		b.small.Put(&p)
	case largeBuffer:
		b.large.Put(&p)
	}
}

// budget bounds the memory of one connection. One goroutine takes, any number give back.
type budget struct {
	mu    sync.Mutex
	free  int64
	freed chan struct{} // capacity 1: a hint that free grew
}

func newBudget(n int64) *budget { return &budget{free: n, freed: make(chan struct{}, 1)} }

// take waits until n bytes are free.
func (b *budget) take(ctx context.Context, n int64) error {
	for {
		b.mu.Lock()
		if b.free >= n {
			b.free -= n
			b.mu.Unlock()
			return nil
		}
		b.mu.Unlock()
		select {
		case <-b.freed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// give returns n bytes.
func (b *budget) give(n int64) {
	b.mu.Lock()
	b.free += n
	b.mu.Unlock()
	select {
	case b.freed <- struct{}{}:
	default:
	}
}
