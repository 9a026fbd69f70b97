package kopiarepo

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/format"
	"github.com/kopia/kopia/repo/maintenance"

	"github.com/holdfast-backup/holdfast/repository"
)

// kopia makes its storage anew from a saved description whenever a repository is
// opened, and finds the maker in a table of the process. So our storage has an
// entry there, made once, on first use; the description names an open blobStore.

const storageType = "holdfast"

type storageConfig struct {
	Handle string `json:"handle"`
}

var openStores struct {
	once sync.Once
	mu   sync.Mutex
	all  map[string]*blobStore
}

func registerStore(s *blobStore) {
	openStores.once.Do(func() {
		blob.AddSupportedStorage(storageType, storageConfig{}, func(_ context.Context, c *storageConfig, _ bool) (blob.Storage, error) {
			openStores.mu.Lock()
			defer openStores.mu.Unlock()
			s := openStores.all[c.Handle]
			if s == nil {
				return nil, errors.New("the repository was closed")
			}
			return s, nil
		})
		openStores.all = map[string]*blobStore{}
	})
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	s.handle = fmt.Sprintf("%x", b)
	openStores.mu.Lock()
	openStores.all[s.handle] = s
	openStores.mu.Unlock()
}

func unregisterStore(s *blobStore) {
	openStores.mu.Lock()
	delete(openStores.all, s.handle)
	openStores.mu.Unlock()
}

// initialize makes kopia's repository.
func initialize(ctx context.Context, s *blobStore, password Secret) error {
	err := repo.Initialize(ctx, s, &repo.NewRepositoryOptions{
		BlockFormat: format.ContentFormat{
			Hash: "BLAKE3-256", Encryption: "AES256-GCM-HMAC-SHA256",
			MutableParameters: format.MutableParameters{MaxPackSize: maxPackSize},
		},
		ObjectFormat: format.ObjectFormat{Splitter: "FIXED-4M"},
	}, string(password))
	if err != nil {
		return fmt.Errorf("create the engine's repository: %w", err)
	}
	return nil
}

// engine opens kopia on first use and keeps it open: that costs 0.3 s.
type engine struct {
	cfg    *Config
	store  *blobStore
	repoID string

	mu sync.Mutex
	dr repo.DirectRepository
}

func (e *engine) open(ctx context.Context) (repo.DirectRepository, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.dr != nil {
		return e.dr, nil
	}
	file, remove, err := e.connection()
	if err != nil {
		return nil, err
	}
	gctx, done := e.store.guard(ctx)
	r, err := repo.Open(gctx, file, string(e.cfg.Password), &repo.Options{
		TimeNowFunc:          increasing(e.cfg.Clock),
		DisableRepositoryLog: true,
		DoNotWaitForUpgrade:  true,
		OnFatalError: func(err error) {
			e.cfg.Logger.Error("the storage engine reports a fatal error", "error", err)
		},
	})
	err = done(err)
	if rerr := remove(); err == nil && rerr != nil {
		return nil, errors.Join(rerr, r.Close(ctx))
	}
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, ctx.Err()
	case errors.Is(err, repository.ErrNoSpace) || errors.Is(err, repository.ErrReadOnly):
		return nil, fmt.Errorf("open the storage engine: %w", err)
	case err != nil:
		// Our key slot took the password, so it is not the password.
		return nil, fmt.Errorf("%w: the storage engine does not open: %w", repository.ErrDamaged, err)
	}
	dr, ok := r.(repo.DirectRepository)
	if !ok {
		return nil, errors.New("the storage engine gives no direct access")
	}
	key, err := dr.DeriveKey("maintenance schedule", 32)
	if err != nil {
		return nil, errors.Join(err, dr.Close(ctx))
	}
	gcm, err := newGCM(key)
	if err != nil {
		return nil, errors.Join(err, dr.Close(ctx))
	}
	e.store.mu.Lock()
	e.store.schedule = gcm
	e.store.mu.Unlock()
	e.dr = dr
	return dr, nil
}

// increasing makes a clock that never says the same twice: of two changes to one
// thing at one instant, kopia drops the second.
func increasing(clock func() time.Time) func() time.Time {
	var mu sync.Mutex
	var last time.Time
	return func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		now := clock().Round(0)
		if !now.After(last) {
			now = last.Add(time.Microsecond)
		}
		last = now
		return now
	}
}

// connection makes the file that kopia opens a repository by, in a directory of
// its own. kopia would write it itself, but opens the repository once more to do so.
// It is read once, so that what a killed process leaves of it is a matter of luck.
func (e *engine) connection() (file string, remove func() error, err error) {
	dir, err := os.MkdirTemp("", "holdfast-repository-")
	if err != nil {
		return "", nil, err
	}
	remove = func() error { return os.RemoveAll(dir) }
	cache := e.cfg.CacheDir
	if cache != "" {
		cache = filepath.Join(cache, e.repoID)
	}
	info := e.store.ConnectionInfo()
	b, err := json.Marshal(&repo.LocalConfig{
		Storage: &info,
		Caching: &content.CachingOptions{CacheDirectory: cache},
		ClientOptions: repo.ClientOptions{
			Hostname: kopiaHost, Username: kopiaUser, Description: "Holdfast",
		},
	})
	file = filepath.Join(dir, "kopia.config")
	if err = errors.Join(err, os.WriteFile(file, b, 0o600)); err != nil {
		return "", nil, errors.Join(err, remove())
	}
	return file, remove, nil
}

// exclusive runs maintenance under kopia's own lock of the client, whose file lies
// beside the connection file.
func (e *engine) exclusive(ctx context.Context, w repo.DirectRepositoryWriter, mode maintenance.Mode,
	run func(context.Context, maintenance.RunParameters) error,
) (err error) {
	dir := filepath.Dir(w.ConfigFilename())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	return maintenance.RunExclusive(ctx, w, mode, false, run)
}

// become makes us the only one that may run kopia's maintenance.
func become(ctx context.Context, dr repo.DirectRepository) error {
	return repo.DirectWriteSession(ctx, dr, repo.WriteSessionOptions{Purpose: "create"},
		func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			p := maintenance.DefaultParams()
			p.Owner = dr.ClientOptions().UsernameAtHost()
			return maintenance.SetParams(ctx, w, &p)
		})
}

func (e *engine) close(ctx context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	var err error
	if e.dr != nil {
		err = e.dr.Close(ctx)
		e.dr = nil
	}
	return err
}
