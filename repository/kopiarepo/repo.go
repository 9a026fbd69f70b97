package kopiarepo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// Repository is a repository in a local directory. It is safe for concurrent use.
type Repository struct {
	cfg    Config
	dir    *dirStore
	keys   *keys
	own    *ownFiles
	inv    *inventory
	store  *blobStore
	eng    *engine
	client *clientAnchors
	info   repository.Info
	slot   []byte // what each copy of the key slot should hold

	cache   *blockCache
	maps    *mapCache
	workers chan struct{} // bounds blocks being stored

	maintaining sync.Mutex // one maintenance at a time

	notes sync.Mutex // orders writers of notes, so that their generations grow

	mu         sync.Mutex
	closed     bool
	active     map[repository.PointID]bool // points being written by this handle
	copied     map[string]sum              // critical blobs whose copies are in place
	quarantine map[blob.ID]bool
}

var _ repository.Repository = (*Repository)(nil)

const formatName = "format.json"

type formatDoc struct {
	ID           string    `json:"id"`
	Format       int       `json:"format"`
	Engine       string    `json:"engine"`
	Created      time.Time `json:"created"`
	SegmentBytes int64     `json:"segment_bytes"`
	PublicKey    []byte    `json:"public_key"` // Ed25519, of the inventory
}

// Open opens the repository in cfg.Dir. Conditions: repository.ErrNotRepository,
// repository.ErrPassword, repository.ErrDamaged. The storage engine itself is
// opened when it is first needed.
func Open(ctx context.Context, cfg Config) (*Repository, error) {
	cfg, realClock, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	switch kind, err := inspect(cfg.Dir); {
	case err != nil:
		return nil, err
	case kind != dirRepository:
		return nil, fmt.Errorf("%w: %s %s", repository.ErrNotRepository, cfg.Dir, kind)
	}
	dir := newDirStore(cfg.Dir, cfg.StorageHook)
	id, master, slot, err := openSlots(ctx, dir, cfg.Password)
	if err != nil {
		return nil, fmt.Errorf("open repository %s: %w", cfg.Dir, err)
	}
	r, err := assemble(cfg, realClock, dir, id, master, slot)
	if err != nil {
		return nil, err
	}
	if err := r.readFormat(ctx); err != nil {
		return nil, fmt.Errorf("open repository %s: %w", cfg.Dir, err)
	}
	if err := r.inv.load(ctx); err != nil {
		return nil, fmt.Errorf("open repository %s: %w", cfg.Dir, err)
	}
	registerStore(r.store)
	return r, nil
}

func assemble(cfg Config, realClock bool, dir *dirStore, id string, master, slot []byte) (*Repository, error) {
	k, err := newKeys(master)
	if err != nil {
		return nil, err
	}
	own := &ownFiles{dir: dir, keys: k, rnd: cfg.Rand}
	inv := newInventory(own, cfg.Clock)
	store := &blobStore{dir: dir, inv: inv, reserve: cfg.Reserve}
	if !realClock {
		dir.clock = cfg.Clock
	}
	store.forgetSource()
	store.put = map[blob.ID]putInfo{}
	r := &Repository{
		cfg: cfg, dir: dir, keys: k, own: own, inv: inv, store: store, slot: slot,
		client: &clientAnchors{file: cfg.AnchorFile},
		cache:  newBlockCache(cfg.ReadCache), maps: newMapCache(),
		workers: make(chan struct{}, cfg.Workers),
		active:  map[repository.PointID]bool{}, copied: map[string]sum{},
		info: repository.Info{
			ID: id, Engine: engineName, Location: cfg.Dir, SegmentBytes: digest.SegmentSpan, FormatVersion: formatVersion,
		},
	}
	r.eng = &engine{cfg: &r.cfg, store: store}
	return r, nil
}

func (r *Repository) readFormat(ctx context.Context) error {
	c, err := r.own.get(ctx, typeFormat, formatName, nil)
	if err != nil {
		if ctx.Err() != nil {
			return err
		}
		// Nothing depends on it but the date: verification reports it.
		r.cfg.Logger.Warn("the description of the repository is damaged", "error", err)
		return nil
	}
	var doc formatDoc
	if err := json.Unmarshal(c.header, &doc); err != nil || doc.ID != r.info.ID {
		return fmt.Errorf("%w: description of the repository", repository.ErrDamaged)
	}
	if doc.Format != formatVersion {
		return fmt.Errorf("repository has format %d, this program knows %d: %w", doc.Format, formatVersion, errors.ErrUnsupported)
	}
	r.info.Created = doc.Created
	return nil
}

// Create makes a repository in a directory that does not exist or is empty.
// Conditions: repository.ErrExists if there is one, repository.ErrNotRepository if
// there is something else.
func Create(ctx context.Context, cfg Config) (*Repository, error) {
	cfg, realClock, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	kind, err := inspect(cfg.Dir)
	switch {
	case err != nil:
		return nil, err
	case kind == dirRepository:
		return nil, fmt.Errorf("%w: %s is a repository", repository.ErrExists, cfg.Dir)
	case kind == dirOther || kind == dirKopia:
		return nil, fmt.Errorf("%w: %s %s", repository.ErrNotRepository, cfg.Dir, kind)
	}
	r, err := create(ctx, cfg, realClock)
	if err != nil {
		return nil, fmt.Errorf("create repository %s: %w", cfg.Dir, err)
	}
	return r, nil
}

// OpenOrCreate opens the repository in cfg.Dir; in a directory that does not exist
// or is empty it creates one. Anything else is repository.ErrNotRepository, and is
// not touched.
func OpenOrCreate(ctx context.Context, cfg Config) (*Repository, error) {
	r, err := Create(ctx, cfg)
	if errors.Is(err, repository.ErrExists) {
		return Open(ctx, cfg)
	}
	return r, err
}

func create(ctx context.Context, cfg Config, realClock bool) (_ *Repository, err error) {
	dir := newDirStore(cfg.Dir, cfg.StorageHook)
	unlock, err := claim(cfg.Dir)
	if err != nil {
		return nil, classify(OpCreate, creatingName, err)
	}
	defer func() { err = errors.Join(err, unlock(err == nil)) }()

	secret := make([]byte, 16+32)
	if _, err := io.ReadFull(cfg.Rand, secret); err != nil {
		return nil, err
	}
	id := fmt.Sprintf("%x", secret[:16])
	slot, err := newSlot(id, secret[16:], cfg.Password, cfg.KDF, cfg.Rand)
	if err != nil {
		return nil, err
	}
	for _, name := range slotNames {
		if err := dir.putBytes(ctx, name, slot); err != nil {
			return nil, err
		}
	}
	if err := dir.putBytes(ctx, shardsFile, []byte(shardsText)); err != nil {
		return nil, err
	}
	r, err := assemble(cfg, realClock, dir, id, secret[16:], slot)
	if err != nil {
		return nil, err
	}
	registerStore(r.store)
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	if err := initialize(ctx, r.store, cfg.Password); err != nil {
		return nil, err
	}
	dr, err := r.eng.open(ctx)
	if err != nil {
		return nil, err
	}
	if err := become(ctx, dr); err != nil {
		return nil, err
	}
	if err := r.protect(ctx); err != nil {
		return nil, err
	}
	r.info.Created = cfg.Clock().UTC()
	doc := formatDoc{
		ID: id, Format: formatVersion, Engine: engineName, Created: r.info.Created,
		SegmentBytes: digest.SegmentSpan, PublicKey: r.keys.public(),
	}
	if err := dir.sync(ctx); err != nil {
		return nil, err
	}
	if _, err := r.own.put(ctx, typeFormat, formatName, doc, nil); err != nil {
		return nil, err
	}
	return r, dir.sync(ctx)
}

// protect gives every critical blob its copies and makes the inventory durable.
func (r *Repository) protect(ctx context.Context) error {
	for {
		begin := r.cfg.Clock()
		if err := r.dir.sync(ctx); err != nil {
			return err
		}
		if err := r.replicate(ctx); err != nil {
			return fmt.Errorf("copies: %w", err)
		}
		if err := r.inv.flush(ctx, false); err != nil {
			return err
		}
		if elapsed(begin, r.cfg.Clock()) < maxUnsaved {
			return nil
		}
		// It stood still, and maintenance of another process may have swept copies
		// of blobs that it did not know.
		r.mu.Lock()
		r.copied = map[string]sum{}
		r.mu.Unlock()
	}
}

// dirKind is what a directory holds.
type dirKind string

const (
	dirEmpty      dirKind = "is empty"
	dirHalf       dirKind = "holds a repository whose creation was interrupted"
	dirRepository dirKind = "is a repository"
	dirKopia      dirKind = "is a kopia repository that Holdfast did not create"
	dirOther      dirKind = "holds other things"
)

const creatingName = "holdfast/creating"

func inspect(dir string) (dirKind, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return dirEmpty, nil
	}
	if err != nil {
		return "", fmt.Errorf("%w: %w", repository.ErrNotRepository, err)
	}
	if len(entries) == 0 {
		return dirEmpty, nil
	}
	d := newDirStore(dir, nil)
	exists := func(name string) bool {
		_, err := os.Stat(d.path(name))
		return err == nil
	}
	complete := exists(primary + formatName)
	if !complete && exists(creatingName) {
		return dirHalf, nil
	}
	if complete || exists(mirror+formatName) {
		return dirRepository, nil
	}
	for _, name := range slotNames {
		if exists(name) {
			return dirRepository, nil
		}
	}
	if exists("kopia.repository" + blobSuffix) {
		return dirKopia, nil
	}
	return dirOther, nil
}

// claim marks dir as being created by this process, clearing away what a dead one
// left. The returned function ends the claim; done says whether creation is
// complete.
func claim(dir string) (func(done bool) error, error) {
	d := newDirStore(dir, nil)
	if err := os.MkdirAll(d.path("holdfast"), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(d.path(creatingName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if ok, err := tryFlock(f); err != nil || !ok {
		_ = f.Close()
		return nil, errors.Join(fmt.Errorf("%w: somebody else is creating it", repository.ErrLocked), err)
	}
	abandon := func(err error) (func(bool) error, error) {
		_ = f.Close()
		return nil, err
	}
	// While the marker is there and the description is not, all of it is ours.
	kind, err := inspect(dir)
	if err != nil {
		return abandon(err)
	}
	if kind != dirHalf {
		_ = os.Remove(d.path(creatingName))
		return abandon(fmt.Errorf("%w: %s %s", repository.ErrExists, dir, kind))
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return abandon(err)
	}
	for _, e := range entries {
		if e.Name() != "holdfast" && ours(e.Name()) {
			if err := os.RemoveAll(d.path(e.Name())); err != nil {
				return abandon(err)
			}
		}
	}
	if entries, err = os.ReadDir(d.path("holdfast")); err != nil {
		return abandon(err)
	}
	for _, e := range entries {
		if "holdfast/"+e.Name() != creatingName {
			if err := os.RemoveAll(d.path("holdfast/" + e.Name())); err != nil {
				return abandon(err)
			}
		}
	}
	return func(done bool) error {
		defer func() { _ = f.Close() }()
		if !done {
			return nil // the next attempt clears it away
		}
		return errors.Join(os.Remove(d.path(creatingName)), syncDir(d.path("holdfast")))
	}, nil
}

// ours reports whether creation makes an entry of this name.
func ours(name string) bool {
	return name == "holdfast-2" || name == shardsFile || strings.HasPrefix(name, "kopia.") ||
		len(name) == 1 && strings.Contains("pqxsn_", name) || strings.Contains(name, tempInfix) ||
		strings.HasSuffix(name, blobSuffix) && strings.HasPrefix(name, "x")
}

// Info tells what this repository is.
func (r *Repository) Info() repository.Info { return r.info }

// Close gives back local resources. Locks are not released.
func (r *Repository) Close() error {
	r.mu.Lock()
	closed := r.closed
	r.closed = true
	r.mu.Unlock()
	if closed {
		return nil
	}
	err := r.eng.close(context.Background())
	unregisterStore(r.store)
	return err
}

var errClosed = errors.New("the repository is closed")

func (r *Repository) check(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return errClosed
	}
	return ctx.Err()
}
