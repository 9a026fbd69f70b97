package vmdk

import (
	"slices"
	"sync"
)

// cache keeps the blocks used last. The mutex is not held while a block is loaded, so two
// readers may load the same one; both loads are right.
type cache struct {
	limit int

	mu     sync.Mutex
	blocks map[uint64][]byte
	order  []uint64 // the one used last at the end
}

func (c *cache) get(key uint64, load func() ([]byte, error)) ([]byte, error) {
	c.mu.Lock()
	b, ok := c.blocks[key]
	if ok {
		c.touch(key)
	}
	c.mu.Unlock()
	if ok {
		return b, nil
	}
	b, err := load()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.blocks == nil {
		c.blocks = make(map[uint64][]byte)
	}
	c.blocks[key] = b
	c.touch(key)
	if len(c.order) > c.limit {
		delete(c.blocks, c.order[0])
		c.order = slices.Delete(c.order, 0, 1)
	}
	return b, nil
}

// touch moves key to the end of order. The caller holds mu.
func (c *cache) touch(key uint64) {
	if n := len(c.order); n > 0 && c.order[n-1] == key {
		return
	}
	if i := slices.Index(c.order, key); i >= 0 {
		c.order = slices.Delete(c.order, i, i+1)
	}
	c.order = append(c.order, key)
}
