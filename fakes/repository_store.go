package fakes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-backup/holdfast/repository"
)

// Store is the storage under memory repositories: named blobs, each operation on
// them atomic. It outlives the [Repository] values opened on it, as a disk
// outlives processes. It is safe for concurrent use.
//
// Names begin with "blocks/", "maps/", "disks/", "files/" (addressed by content),
// "records/", "tombs/" (the points), "locks/", "notes/", "pins/" (points being
// written), or are "format".
type Store struct {
	mu       sync.Mutex
	blobs    map[string]storeBlob
	gen      int64 // grows with each put and touch
	ops      int64
	procs    int
	hook     StoreHook
	capacity int64
	readOnly bool
	nonces   map[string]int64 // per chain and run, so that point IDs do not repeat

	last storeChange // what a stale list shows

	recording bool
	base      map[string]storeBlob
	log       []storeLogged

	ticks atomic.Int64
}

// storeChange is what the last change of a store replaced.
type storeChange struct {
	name  string
	blob  storeBlob
	there bool
}

type storeBlob struct {
	data []byte // never changed in place
	gen  int64
}

// NewStore returns an empty store.
func NewStore() *Store {
	return &Store{blobs: map[string]storeBlob{}, nonces: map[string]int64{}}
}

// StoreOpKind says what a storage operation does.
type StoreOpKind string

// Kinds of storage operations.
const (
	StorePut    StoreOpKind = "put"
	StoreTouch  StoreOpKind = "touch" // shields a blob that is stored already from maintenance
	StoreDelete StoreOpKind = "delete"
	StoreGet    StoreOpKind = "get"
	StoreList   StoreOpKind = "list"
)

// Mutates reports whether operations of the kind change the store.
func (k StoreOpKind) Mutates() bool {
	return k == StorePut || k == StoreTouch || k == StoreDelete
}

// StoreOp is one numbered storage operation.
type StoreOp struct {
	Seq     int64 // from 1, over all processes of the store
	Process int   // from 1, one for each Open
	Kind    StoreOpKind
	Name    string // of the blob; the prefix of a list
	Size    int64  // bytes to put; zero for other kinds
}

// String formats op for failure messages.
func (op StoreOp) String() string {
	return fmt.Sprintf("#%d process %d: %s %s (%d bytes)", op.Seq, op.Process, op.Kind, op.Name, op.Size)
}

// Names returns the names of all blobs that begin with prefix, sorted.
func (s *Store) Names(prefix string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for n := range s.blobs {
		if strings.HasPrefix(n, prefix) {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}

// Blob returns a copy of a blob.
func (s *Store) Blob(name string) ([]byte, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.blobs[name]
	return bytes.Clone(b.data), ok
}

// Bytes returns the sum of the sizes of all blobs.
func (s *Store) Bytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used()
}

func (s *Store) used() (n int64) {
	for _, b := range s.blobs {
		n += int64(len(b.data))
	}
	return n
}

// Ops returns how many operations were begun so far.
func (s *Store) Ops() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ops
}

// SetCapacity limits the sum of all blobs to n bytes: putting content beyond it
// is ErrNoSpace. Records, tombstones, locks, notes and pins are let through, as
// from a reserve. Zero means no limit.
func (s *Store) SetCapacity(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.capacity = n
}

// SetReadOnly makes every operation that changes the store fail with ErrReadOnly.
func (s *Store) SetReadOnly(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readOnly = on
}

func (s *Store) tick() time.Time {
	return time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).Add(time.Duration(s.ticks.Add(1)) * time.Millisecond)
}

func (s *Store) nonce(key string) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nonces[key]++
	return s.nonces[key]
}

func (s *Store) clone(blobs map[string]storeBlob) *Store {
	c := NewStore()
	c.blobs = maps.Clone(blobs)
	c.gen = s.gen
	c.capacity, c.readOnly = s.capacity, s.readOnly
	c.nonces = maps.Clone(s.nonces)
	c.ticks.Store(s.ticks.Load())
	return c
}

// Clone returns an independent copy of the store as it is now, without its hook
// and its log.
func (s *Store) Clone() *Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.clone(s.blobs)
}

var errNoBlob = errors.New("no such blob")

// storeView is what a condition sees, atomically with the operation it guards.
type storeView struct{ s *Store }

func (v storeView) get(name string) ([]byte, bool) {
	b, ok := v.s.blobs[name]
	return b.data, ok
}

func (v storeView) anyWithPrefix(prefix string) bool {
	for n := range v.s.blobs {
		if strings.HasPrefix(n, prefix) {
			return true
		}
	}
	return false
}

// storeCond is checked atomically with the effect of a put or delete; its error
// prevents the effect. nil: no condition.
type storeCond func(storeView) error

func allOf(conds ...storeCond) storeCond {
	return func(v storeView) error {
		for _, c := range conds {
			if c == nil {
				continue
			}
			if err := c(v); err != nil {
				return err
			}
		}
		return nil
	}
}

// storeConn is the view of one process.
type storeConn struct {
	s    *Store
	proc int
	dead atomic.Bool
}

func (s *Store) connect() *storeConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.procs++
	return &storeConn{s: s, proc: s.procs}
}

type storeEntry struct {
	name string
	size int64
	gen  int64
}

func (c *storeConn) get(ctx context.Context, name string) (data []byte, err error) {
	err = c.do(ctx, StoreOp{Kind: StoreGet, Name: name}, nil, func(s *Store, _ StoreFault) error {
		b, ok := s.blobs[name]
		if !ok {
			return fmt.Errorf("%s: %w", name, errNoBlob)
		}
		data = b.data
		return nil
	})
	if err != nil {
		return nil, err
	}
	return data, nil
}

// list returns what begins with prefix, sorted by name.
func (c *storeConn) list(ctx context.Context, prefix string) (out []storeEntry, err error) {
	err = c.do(ctx, StoreOp{Kind: StoreList, Name: prefix}, nil, func(s *Store, f StoreFault) error {
		for n, b := range s.blobs {
			if strings.HasPrefix(n, prefix) && !(f.Stale && n == s.last.name) {
				out = append(out, storeEntry{n, int64(len(b.data)), b.gen})
			}
		}
		if l := s.last; f.Stale && l.there && strings.HasPrefix(l.name, prefix) {
			out = append(out, storeEntry{l.name, int64(len(l.blob.data)), l.blob.gen})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(out, func(a, b storeEntry) int { return strings.Compare(a.name, b.name) })
	return out, nil
}

// put stores a copy of data.
func (c *storeConn) put(ctx context.Context, name string, data []byte, cond storeCond) error {
	data = bytes.Clone(data)
	return c.do(ctx, StoreOp{Kind: StorePut, Name: name, Size: int64(len(data))}, data, func(s *Store, f StoreFault) error {
		if cond != nil {
			if err := cond(storeView{s}); err != nil {
				return err
			}
		}
		if s.capacity > 0 && addressed(name) && s.used()+int64(len(data)) > s.capacity {
			return fmt.Errorf("put %s: %w", name, repository.ErrNoSpace)
		}
		s.change(name)
		s.gen++
		if f.Torn {
			data = data[:len(data)/2]
		}
		s.blobs[name] = storeBlob{data, s.gen}
		return nil
	})
}

// touch gives a blob a new generation if it is there with this size, and tells
// whether it is.
func (c *storeConn) touch(ctx context.Context, name string, size int64) (ok bool, err error) {
	err = c.do(ctx, StoreOp{Kind: StoreTouch, Name: name}, nil, func(s *Store, _ StoreFault) error {
		b, found := s.blobs[name]
		if ok = found && int64(len(b.data)) == size; ok {
			s.gen++
			s.blobs[name] = storeBlob{b.data, s.gen}
		}
		return nil
	})
	return ok, err
}

// del deletes a blob if it is there.
func (c *storeConn) del(ctx context.Context, name string, cond storeCond) error {
	return c.do(ctx, StoreOp{Kind: StoreDelete, Name: name}, nil, func(s *Store, _ StoreFault) error {
		if cond != nil {
			if err := cond(storeView{s}); err != nil {
				return err
			}
		}
		s.change(name)
		delete(s.blobs, name)
		return nil
	})
}

// change remembers a blob as it was before it is put or deleted. The caller holds mu.
func (s *Store) change(name string) {
	b, ok := s.blobs[name]
	s.last = storeChange{name, b, ok}
}
