package kopiarepo

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/kopia/kopia/repo/compression"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/secret"
)

// Config says where a repository is and how to work with it. Dir and Password
// are mandatory; everything else has a safe zero value.
type Config struct {
	// Dir is the directory of the repository, or a file: URL. Any other scheme is
	// refused with errors.ErrUnsupported.
	Dir string
	// Password opens both our key slots and kopia, verbatim.
	Password secret.Secret

	// AnchorFile remembers, on the client's side, the newest record of each chain,
	// so that a repository that was rolled back as a whole is found out. Empty:
	// not kept.
	AnchorFile string

	// Compressor is kopia's name of the compressor of blocks; empty:
	// DefaultCompressor. An unknown name is refused.
	Compressor string
	// Workers bounds how many blocks are compressed, encrypted and stored at a
	// time; zero: twice the number of CPUs.
	Workers int
	// ReadCache bounds the cache of decoded blocks that ReadAt uses, in bytes, per
	// repository; zero: 64 MiB.
	ReadCache int64
	// Reserve is the free space, in bytes, that data must leave so that deletion
	// and maintenance still work; zero: 64 MiB, or a sixteenth of a small volume.
	// Negative: none.
	Reserve int64

	// KDF is the cost of the key derivation of a new repository's key slot. The
	// zero value is right for everything but tests.
	KDF KDF

	Clock       func() time.Time // nil: the machine's clock
	Rand        io.Reader        // nil: crypto/rand
	Logger      *slog.Logger     // nil: discard
	StorageHook StorageHook      // nil: none

	// CheckpointBytes and CheckpointEvery say when a long run makes what it has
	// stored so far known to the engine; zero: 16 GiB of data, 40 minutes.
	CheckpointBytes int64
	CheckpointEvery time.Duration
}

// DefaultCompressor costs a third of the time of zstd-fastest and stores about a
// tenth more; zstd was what a full backup waited for (docs/performance.md).
const DefaultCompressor = "s2-default"

const (
	engineName      = "kopia 0.23.1"
	formatVersion   = 1
	maxPackSize     = 16 << 20
	kopiaHost       = "holdfast"
	kopiaUser       = "backup"
	defaultCache    = 64 << 20
	defaultReserve  = 64 << 20
	checkpointBytes = 16 << 30
	checkpointEvery = 40 * time.Minute
)

// KDF is the cost of Argon2id.
type KDF struct {
	MemoryKiB uint32 // zero: 64 MiB
	Time      uint32 // zero: 3 passes
	Threads   uint8  // zero: 2
}

func (k KDF) orDefault() KDF {
	if k.MemoryKiB == 0 {
		k.MemoryKiB = 64 << 10
	}
	if k.Time == 0 {
		k.Time = 3
	}
	if k.Threads == 0 {
		k.Threads = 2
	}
	return k
}

// complete checks the configuration and fills in defaults. realClock tells
// whether the caller left the clock to us.
func (c Config) complete() (_ Config, realClock bool, err error) {
	if c.Dir, err = localDir(c.Dir); err != nil {
		return c, false, err
	}
	if c.Password.Empty() {
		return c, false, fmt.Errorf("%w: the password is empty", repository.ErrPassword)
	}
	if c.Compressor == "" {
		c.Compressor = DefaultCompressor
	}
	if compression.ByName[compression.Name(c.Compressor)] == nil {
		return c, false, fmt.Errorf("unknown compressor %q", c.Compressor)
	}
	if c.Workers <= 0 {
		c.Workers = 2 * runtime.GOMAXPROCS(0)
	}
	if c.ReadCache <= 0 {
		c.ReadCache = defaultCache
	}
	if c.Reserve == 0 {
		c.Reserve = defaultReserve
	}
	if c.CheckpointBytes <= 0 {
		c.CheckpointBytes = checkpointBytes
	}
	if c.CheckpointEvery <= 0 {
		c.CheckpointEvery = checkpointEvery
	}
	if c.Clock == nil {
		c.Clock, realClock = time.Now, true //nolint:forbidigo // the one place where the clock is chosen
	}
	if c.Rand == nil {
		c.Rand = rand.Reader
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, realClock, nil
}

func localDir(location string) (string, error) {
	if location == "" {
		return "", errors.New("no repository directory was given")
	}
	if scheme, rest, ok := strings.Cut(location, ":"); ok && len(scheme) > 1 && isScheme(scheme) {
		if scheme != "file" {
			return "", fmt.Errorf("repository location %s://...: %w: only local directories are supported",
				scheme, errors.ErrUnsupported)
		}
		u, err := url.Parse(location)
		if err != nil {
			return "", fmt.Errorf("repository location %q: %w", location, err)
		}
		if location = u.Path; location == "" {
			location = rest
		}
	}
	return filepath.Abs(location)
}

func isScheme(s string) bool {
	for i, c := range s {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !letter && (i == 0 || (c < '0' || c > '9') && c != '+' && c != '-' && c != '.') {
			return false
		}
	}
	return true
}
