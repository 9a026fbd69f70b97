package fakes

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/holdfast-backup/holdfast/repository"
)

// ErrKilled is what every storage operation of a killed process returns.
var ErrKilled = errors.New("this process was killed")

// StoreFault tells what shall happen to an operation. The zero value lets it
// through.
type StoreFault struct {
	// Hold delays the operation until the channel is closed or the context ends.
	Hold <-chan struct{}
	// Hang waits until the context ends and returns its error.
	Hang bool
	// Err is returned instead of the result.
	Err error
	// Kill ends the process that makes the call: this and every later storage
	// operation of that Repository is ErrKilled. Others go on.
	Kill bool
	// After lets Hang, Err or Kill strike after the operation had its effect
	// instead of before it.
	After bool
	// Torn lets a put store the first half of its bytes and ends the process, as
	// Kill does. Other operations ignore it.
	Torn bool
	// Stale lets a list miss the last change of the store. Other operations ignore it.
	Stale bool
}

// StoreHook sees each storage operation before it happens. It is called without
// any lock held, concurrently, and may block. ctx is that of the operation.
type StoreHook func(ctx context.Context, op StoreOp) StoreFault

// SetHook installs a hook for all processes; nil removes it.
func (s *Store) SetHook(h StoreHook) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hook = h
}

// StoreFaultAt returns a hook that lets fault happen to the k-th operation it
// sees, counted from 1, and to no other.
func StoreFaultAt(k int64, fault StoreFault) StoreHook {
	return StoreFaultOn("", "", k, fault)
}

// StoreFaultOn returns a hook that lets fault happen to the k-th operation,
// counted from 1, of a kind on names with a prefix. An empty kind means any.
func StoreFaultOn(kind StoreOpKind, prefix string, k int64, fault StoreFault) StoreHook {
	var seen atomic.Int64
	return func(_ context.Context, op StoreOp) StoreFault {
		if kind != "" && op.Kind != kind || !strings.HasPrefix(op.Name, prefix) || seen.Add(1) != k {
			return StoreFault{}
		}
		return fault
	}
}

// StoreHooks returns a hook that asks each of hooks, in order, and uses the first
// fault that is not zero. Every hook sees every operation.
func StoreHooks(hooks ...StoreHook) StoreHook {
	return func(ctx context.Context, op StoreOp) (fault StoreFault) {
		for _, h := range hooks {
			if f := h(ctx, op); fault == (StoreFault{}) {
				fault = f
			}
		}
		return fault
	}
}

// do runs one operation through the hook. Only effect runs under the mutex.
func (c *storeConn) do(ctx context.Context, op StoreOp, data []byte, effect func(*Store, StoreFault) error) error {
	if c.dead.Load() {
		return ErrKilled
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	s := c.s
	s.mu.Lock()
	s.ops++
	op.Seq, op.Process = s.ops, c.proc
	hook := s.hook
	s.mu.Unlock()

	var fault StoreFault
	if hook != nil {
		fault = hook(ctx, op)
	}
	if fault.Hold != nil {
		select {
		case <-fault.Hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if fault.Torn = fault.Torn && op.Kind == StorePut; fault.Torn {
		fault.Kill, fault.After = true, true
		data = data[:len(data)/2]
	}
	if !fault.After {
		if err := c.strike(ctx, op, fault); err != nil {
			return err
		}
	}
	if c.dead.Load() { // killed by another goroutine while this one waited
		return ErrKilled
	}
	err := s.apply(op, data, func(s *Store) error { return effect(s, fault) })
	if fault.After {
		if struck := c.strike(ctx, op, fault); struck != nil {
			return struck
		}
	}
	return err
}

func (c *storeConn) strike(ctx context.Context, op StoreOp, fault StoreFault) error {
	switch {
	case fault.Kill:
		c.dead.Store(true)
		return ErrKilled
	case fault.Hang:
		<-ctx.Done()
		return ctx.Err()
	case fault.Err != nil:
		return fmt.Errorf("%s %s: %w", op.Kind, op.Name, fault.Err)
	}
	return nil
}

func (s *Store) apply(op StoreOp, data []byte, effect func(*Store) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readOnly && op.Kind.Mutates() {
		return fmt.Errorf("%s %s: %w", op.Kind, op.Name, repository.ErrReadOnly)
	}
	if err := effect(s); err != nil {
		return err
	}
	if s.recording && op.Kind.Mutates() {
		s.log = append(s.log, storeLogged{op, data})
	}
	return nil
}

// storeLogged is an operation in the log; data is what a put stored.
type storeLogged struct {
	op   StoreOp
	data []byte
}

// Record begins a new log, with the state of now as its beginning: from here on
// every operation that changes the store is kept for [Store.ReplayTo].
func (s *Store) Record() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recording, s.base, s.log = true, maps.Clone(s.blobs), nil
}

// Log returns the operations that changed the store since Record, in order of
// their effect.
func (s *Store) Log() []StoreOp {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]StoreOp, len(s.log))
	for i, l := range s.log {
		out[i] = l.op
	}
	return out
}

// ReplayTo returns a new store as it was after the first k operations of the log.
// It panics if the log is shorter.
func (s *Store) ReplayTo(k int) *Store { return s.replay(k, nil, -1) }

// ReplayTorn is like ReplayTo, but of the k-th operation, if it is a put, only
// the first keep bytes arrived. It panics if there is no such operation.
func (s *Store) ReplayTorn(k int, keep int64) *Store {
	return s.replay(k-1, []int{k - 1}, max(0, keep))
}

// ReplayWith is like ReplayTo, and then some later operations of the log, counted from
// 0, happened too: those of them that had begun by then and were not ended.
func (s *Store) ReplayWith(k int, also ...int) *Store { return s.replay(k, also, -1) }

// replay: of the operations in also, only keep bytes arrive, if it is not negative.
func (s *Store) replay(k int, also []int, keep int64) *Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.recording || k < 0 || k > len(s.log) || len(also) > 0 && slices.Max(also) >= len(s.log) {
		panic(fmt.Sprintf("fakes: replay of %d operations and %v, the log has %d", k, also, len(s.log)))
	}
	c := s.clone(s.base)
	for _, l := range s.log[:k] {
		c.redo(l, -1)
	}
	for _, i := range also {
		c.redo(s.log[i], keep)
	}
	return c
}

func (s *Store) redo(l storeLogged, keep int64) {
	data := l.data
	if keep >= 0 {
		data = data[:min(int64(len(data)), keep)]
	}
	s.gen++
	switch l.op.Kind {
	case StorePut:
		s.blobs[l.op.Name] = storeBlob{data, s.gen}
	case StoreTouch:
		if b, ok := s.blobs[l.op.Name]; ok {
			s.blobs[l.op.Name] = storeBlob{b.data, s.gen}
		}
	case StoreDelete:
		delete(s.blobs, l.op.Name)
	}
}

// BlobDamage is a way to damage a blob.
type BlobDamage string

// Ways to damage a blob.
const (
	BlobFlip     BlobDamage = "flip"     // one bit, in the middle
	BlobTruncate BlobDamage = "truncate" // the last half is gone
	BlobEmpty    BlobDamage = "empty"
	BlobLost     BlobDamage = "lost"
	BlobGrown    BlobDamage = "grown" // one byte too many
)

// BlobDamages returns every way to damage a blob.
func BlobDamages() []BlobDamage {
	return []BlobDamage{BlobFlip, BlobTruncate, BlobEmpty, BlobLost, BlobGrown}
}

// Damage damages a blob behind the back of every process, unlogged. It returns a
// function that puts the blob back as it was. An unknown name is an error.
func (s *Store) Damage(name string, how BlobDamage) (undo func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.blobs[name]
	if !ok {
		return nil, fmt.Errorf("damage %s: %w", name, errNoBlob)
	}
	data := slices.Clone(b.data)
	switch how {
	case BlobFlip:
		if len(data) == 0 {
			return nil, fmt.Errorf("damage %s: it has no bit", name)
		}
		data[len(data)/2] ^= 1 << (len(data) % 8)
	case BlobTruncate:
		data = data[:len(data)/2]
	case BlobEmpty:
		data = nil
	case BlobGrown:
		data = append(data, 0)
	case BlobLost:
	default:
		return nil, fmt.Errorf("damage %s: no way %q", name, how)
	}
	if how == BlobLost {
		delete(s.blobs, name)
	} else {
		s.blobs[name] = storeBlob{data, b.gen}
	}
	return func() { s.restore(name, b) }, nil
}

// Swap exchanges the contents of two blobs, unlogged.
func (s *Store) Swap(a, b string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	x, okA := s.blobs[a]
	y, okB := s.blobs[b]
	if !okA || !okB {
		return fmt.Errorf("swap %s and %s: %w", a, b, errNoBlob)
	}
	s.blobs[a], s.blobs[b] = storeBlob{y.data, x.gen}, storeBlob{x.data, y.gen}
	return nil
}

func (s *Store) restore(name string, b storeBlob) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blobs[name] = b
}
