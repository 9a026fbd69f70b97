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
	"github.com/holdfast-backup/holdfast/secret"
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
func initialize(ctx context.Context, s *blobStore, password secret.Secret) error {
	err := repo.Initialize(ctx, s, &repo.NewRepositoryOptions{
		BlockFormat: format.ContentFormat{
			Hash: "BLAKE3-256", Encryption: "AES256-GCM-HMAC-SHA256",
			MutableParameters: format.MutableParameters{MaxPackSize: maxPackSize},
		},
		ObjectFormat: format.ObjectFormat{Splitter: "FIXED-4M"},
	}, password.Reveal())
	if err != nil {
		return fmt.Errorf("create the engine's repository: %w", err)
	}
	return nil
}

// engine opens kopia on first use and keeps it open: that costs 0.3 s.
type engine struct {
	cfg   *Config
	store *blobStore

	mu sync.Mutex
	dr repo.DirectRepository
}

func (e *engine) open(ctx context.Context) (repo.DirectRepository, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.dr != nil {
		return e.dr, nil
	}
	r, err := e.attempt(ctx)
	if err != nil && ctx.Err() == nil && !isStorageError(err) {
		again, perr := e.store.pinForms(ctx, e.cfg.Password)
		if perr != nil {
			return nil, fmt.Errorf("open the storage engine: %w", perr)
		}
		if again {
			r, err = e.attempt(ctx)
		}
	}
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, ctx.Err()
	case isStorageError(err):
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

// attempt opens kopia by a connection file that is there for as long as that takes.
func (e *engine) attempt(ctx context.Context) (repo.Repository, error) {
	file, remove, err := e.connection()
	if err != nil {
		return nil, err
	}
	gctx, done := e.store.guard(ctx)
	r, err := repo.Open(gctx, file, e.cfg.Password.Reveal(), &repo.Options{
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
	return r, err
}

func isStorageError(err error) bool {
	return errors.Is(err, repository.ErrNoSpace) || errors.Is(err, repository.ErrReadOnly)
}

// usePassword makes the engine open anew, with another password, when it is next
// needed.
func (e *engine) usePassword(ctx context.Context, password secret.Secret) error {
	err := e.close(ctx)
	e.mu.Lock()
	e.cfg.Password = password
	e.mu.Unlock()
	return err
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
	info := e.store.ConnectionInfo()
	b, err := json.Marshal(&repo.LocalConfig{
		Storage: &info,
		// No cache on disk: a check would read it in place of what is stored, and
		// a format that was cached before the password changed would not open.
		Caching: &content.CachingOptions{},
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
