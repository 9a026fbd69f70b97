package kopiarepo

import (
	"container/list"
	"context"
	"sync"

	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"

	"github.com/holdfast-backup/holdfast/repository"
)

// lru keeps the values used last, up to a number of bytes. Concurrent requests
// for one key load it once. It is safe for concurrent use; values are shared and
// must not be changed.
type lru[K comparable, V any] struct {
	mu      sync.Mutex
	max     int64
	used    int64
	order   *list.List // of *lruItem[K, V], newest first
	items   map[K]*list.Element
	loading map[K]*lruLoad[V]
}

type lruItem[K comparable, V any] struct {
	key  K
	v    V
	size int64
}

type lruLoad[V any] struct {
	done chan struct{}
	v    V
	err  error
}

func newLRU[K comparable, V any](limit int64) *lru[K, V] {
	return &lru[K, V]{max: limit, order: list.New(), items: map[K]*list.Element{}, loading: map[K]*lruLoad[V]{}}
}

// get returns the value of key, loading it if needed. load returns its size too.
func (c *lru[K, V]) get(ctx context.Context, key K, load func(context.Context) (V, int64, error)) (V, error) {
	for {
		c.mu.Lock()
		if el, ok := c.items[key]; ok {
			c.order.MoveToFront(el)
			c.mu.Unlock()
			return el.Value.(*lruItem[K, V]).v, nil
		}
		l, ok := c.loading[key]
		if !ok {
			l = &lruLoad[V]{done: make(chan struct{})}
			c.loading[key] = l
			c.mu.Unlock()
			return c.load(ctx, key, l, load)
		}
		c.mu.Unlock()
		select {
		case <-ctx.Done():
			var zero V
			return zero, ctx.Err()
		case <-l.done:
		}
		if l.err == nil {
			return l.v, nil
		}
		if ctx.Err() != nil || !isContext(l.err) {
			return l.v, l.err
		}
		// The one that loaded gave up; we have not.
	}
}

func (c *lru[K, V]) load(ctx context.Context, key K, l *lruLoad[V], load func(context.Context) (V, int64, error)) (V, error) {
	v, size, err := load(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	l.v, l.err = v, err
	delete(c.loading, key)
	close(l.done)
	if err != nil || size > c.max {
		return v, err
	}
	c.items[key] = c.order.PushFront(&lruItem[K, V]{key, v, size})
	for c.used += size; c.used > c.max; {
		el := c.order.Back()
		old := el.Value.(*lruItem[K, V])
		c.order.Remove(el)
		delete(c.items, old.key)
		c.used -= old.size
	}
	return v, nil
}

// clear drops everything.
func (c *lru[K, V]) clear() {
	c.mu.Lock()
	c.order.Init()
	c.items, c.used = map[K]*list.Element{}, 0
	c.mu.Unlock()
}

type blockCache = lru[content.ID, []byte]

func newBlockCache(limit int64) *blockCache { return newLRU[content.ID, []byte](limit) }

// segmentKey names the map of a segment by what it is made of.
type segmentKey struct {
	object, digests object.ID
	length          int64
	blockSize       int
}

// segmentMap is the map of one segment: the object of each block, and the leaf
// digests; both nil if the segment is zeros.
type segmentMap struct {
	blocks []object.ID
	leaves []repository.Digest
}

type mapCache = lru[segmentKey, *segmentMap]

const mapCacheBytes = 32 << 20

func newMapCache() *mapCache { return newLRU[segmentKey, *segmentMap](mapCacheBytes) }
