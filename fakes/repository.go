package fakes

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync/atomic"
	"time"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/repository"
)

// RepositoryOptions configure a memory repository. The zero value works.
type RepositoryOptions struct {
	// Clock tells the time for leases, stale pins and Info.Created; it may be
	// called concurrently. nil: a clock of the Store that starts at the beginning
	// of 2026 and moves on by a millisecond each time it is read.
	Clock func() time.Time
	// Seed makes the identity and the keys of a new repository. A Store that
	// holds a repository already keeps what it has.
	Seed uint64
	// SegmentBlocks is how many blocks one stored map covers, at most 4096; zero
	// means 16, so that small disks have several. It counts for a new repository.
	SegmentBlocks int
}

// Repository is an in-memory engine of the whole repository contract, for tests
// of what is built on that contract. Its state is in a [Store] and outlives it:
// each value stands for one process. It is safe for concurrent use, and holds no
// mutex while a storage operation runs.
type Repository struct {
	conn   *storeConn
	clock  func() time.Time
	format repositoryFormat
	info   repository.Info
	mac    [32]byte
	closed atomic.Bool
}

var _ repository.Repository = (*Repository)(nil)

// repositoryFormat is the blob that makes a store a repository.
type repositoryFormat struct {
	ID            string    `json:"id"`
	Version       int       `json:"version"`
	Created       time.Time `json:"created"`
	SegmentBlocks int       `json:"segment_blocks"`
	Key           []byte    `json:"key"`
}

const formatBlob = "format"

// NewRepository returns a repository on a new Store; see [NewStore] for one whose
// storage outlives it.
func NewRepository(opts RepositoryOptions) *Repository {
	r, err := NewStore().Open(context.Background(), opts)
	if err != nil {
		panic(fmt.Sprintf("fakes: a fresh store without faults failed: %v", err)) // wrong options
	}
	return r
}

// Open opens the repository in the store, and makes one first if the store is
// empty. Each call stands for a new process. It returns ErrNotRepository if other
// things are in the store, and ErrDamaged if its format cannot be read.
func (s *Store) Open(ctx context.Context, opts RepositoryOptions) (*Repository, error) {
	if opts.SegmentBlocks < 0 || opts.SegmentBlocks > maxSegmentBlocks {
		return nil, fmt.Errorf("segment of %d blocks: at most %d", opts.SegmentBlocks, maxSegmentBlocks)
	}
	r := &Repository{conn: s.connect(), clock: opts.Clock}
	if r.clock == nil {
		r.clock = s.tick
	}
	raw, err := r.conn.get(ctx, formatBlob)
	if errors.Is(err, errNoBlob) {
		raw, err = r.create(ctx, opts)
	}
	if err != nil {
		return nil, fmt.Errorf("open memory repository: %w", err)
	}
	body, sum, ok := strings.Cut(string(raw), "\n")
	want := blake3.Sum256([]byte(body))
	if !ok || sum != hex.EncodeToString(want[:]) {
		return nil, fmt.Errorf("open memory repository: format: %w", repository.ErrDamaged)
	}
	if err := json.Unmarshal([]byte(body), &r.format); err != nil {
		return nil, fmt.Errorf("open memory repository: format: %w: %w", repository.ErrDamaged, err)
	}
	blake3.DeriveKey("holdfast memory repository: records", r.format.Key, r.mac[:])
	r.info = repository.Info{
		ID:            r.format.ID,
		Engine:        "memory",
		Location:      "memory:" + r.format.ID[:8],
		SegmentBytes:  int64(r.format.SegmentBlocks) * repository.DefaultBlockSize,
		FormatVersion: r.format.Version,
		Created:       r.format.Created,
	}
	return r, nil
}

func (r *Repository) create(ctx context.Context, opts RepositoryOptions) ([]byte, error) {
	var id, key [32]byte
	seed := fmt.Appendf(nil, "%016x", opts.Seed)
	blake3.DeriveKey("holdfast memory repository: id", seed, id[:])
	blake3.DeriveKey("holdfast memory repository: key", seed, key[:])
	f := repositoryFormat{
		ID:            hex.EncodeToString(id[:16]),
		Version:       1,
		Created:       r.clock().UTC(),
		SegmentBlocks: opts.SegmentBlocks,
		Key:           key[:],
	}
	if f.SegmentBlocks == 0 {
		f.SegmentBlocks = 16
	}
	raw, err := json.Marshal(&f)
	if err != nil {
		return nil, err
	}
	sum := blake3.Sum256(raw)
	raw = append(append(raw, '\n'), hex.EncodeToString(sum[:])...)
	err = r.conn.put(ctx, formatBlob, raw, func(v storeView) error {
		if v.anyWithPrefix("") {
			return repository.ErrNotRepository
		}
		return nil
	})
	if errors.Is(err, repository.ErrNotRepository) {
		// Another process may have made it in between.
		if raw, again := r.conn.get(ctx, formatBlob); again == nil {
			return raw, nil
		}
	}
	return raw, err
}

// Info implements repository.Repository.
func (r *Repository) Info() repository.Info { return r.info }

// Close implements repository.Repository.
func (r *Repository) Close() error {
	r.closed.Store(true)
	return nil
}

// begin is the first thing that every method does.
func (r *Repository) begin(ctx context.Context) error {
	if r.closed.Load() {
		return fmt.Errorf("memory repository: %w", fs.ErrClosed)
	}
	return ctx.Err()
}

// digestKey returns the key of a chain's leaf digests.
func (r *Repository) digestKey(chain string) (k repository.DigestKey) {
	blake3.DeriveKey("holdfast memory repository: digest key of a chain",
		append([]byte(chain+"\x00"), r.format.Key...), k[:])
	return k
}

// sealSize is the length of what seal appends to a body.
const sealSize = 1 + 64

// seal encodes v as JSON, authenticated together with the name it is stored under.
func (r *Repository) seal(name string, v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return append(append(body, '\n'), r.sum(name, body)...), nil
}

func (r *Repository) sum(name string, body []byte) string {
	h, err := blake3.NewKeyed(r.mac[:])
	if err != nil {
		panic(fmt.Sprintf("fakes: a 32-byte key was refused: %v", err)) // cannot happen
	}
	_, _ = h.Write(fmt.Appendf(nil, "%d %s\n", len(name), name))
	_, _ = h.Write(body)
	return hex.EncodeToString(h.Sum(nil))
}

// unseal decodes what seal made under the same name. Its errors match ErrDamaged.
func (r *Repository) unseal(name string, raw []byte, v any) error {
	if len(raw) < sealSize || raw[len(raw)-sealSize] != '\n' {
		return fmt.Errorf("%s: %w: truncated", name, repository.ErrDamaged)
	}
	body := raw[:len(raw)-sealSize]
	if r.sum(name, body) != string(raw[len(raw)-sealSize+1:]) {
		return fmt.Errorf("%s: %w: authentication", name, repository.ErrDamaged)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("%s: %w: %w", name, repository.ErrDamaged, err)
	}
	return nil
}

// validName reports whether s has 1 to limit bytes, all letters a-z, digits or in
// extra; upper-case letters too if upper.
func validName(s string, limit int, upper bool, extra string) bool {
	if s == "" || len(s) > limit {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		case upper && c >= 'A' && c <= 'Z':
		case strings.IndexByte(extra, c) >= 0:
		default:
			return false
		}
	}
	return true
}
