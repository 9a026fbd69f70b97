package kvm

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"time"

	"github.com/holdfast-backup/holdfast/internal/clock"
)

// Config says which daemon to use and where files go. URI is required; the zero
// value of everything else is a safe default.
type Config struct {
	// URI is a libvirt connection URI of the QEMU driver: qemu:///system,
	// qemu:///session, qemu+unix:///system?socket=PATH, qemu+ssh://host/system,
	// qemu+tcp://..., qemu+tls://.... Through a daemon on another host there is
	// inventory and power, but neither backup nor restore: disks travel over unix
	// sockets and files.
	URI string

	// ScratchDir is where QEMU keeps the old content of blocks that guests
	// overwrite during a backup: a directory that the QEMU user may enter.
	// Default: /var/tmp. Use one that no other program fills.
	ScratchDir string
	// SocketDir is where QEMU puts its NBD sockets; default: ScratchDir. Short:
	// the path of a socket has at most 107 bytes.
	SocketDir string
	// StorageDir is where new VMs go when neither a disk nor the placement names a
	// directory or storage pool. Default: /var/lib/libvirt/images.
	StorageDir string

	// ScratchMinFree is how many bytes must be free in ScratchDir for a backup to
	// start. Default: the size of the disks, at most 1 GiB, and ScratchReserve.
	ScratchMinFree int64
	// ScratchReserve is how many bytes stay free: when less are, the backup is
	// given up before a guest's write could fail. Default: 5 % of the file
	// system, at least 16 MiB and at most 1 GiB.
	ScratchReserve int64
	// Overcommit lets CreateVM make disks whose sizes add up to more than is free:
	// disks are sparse, and the caller knows that they will not fill.
	Overcommit bool

	// ReadInflight is the number of reads outstanding per disk; default 16.
	ReadInflight int

	// Logger gets what is worth knowing and is no error. Nil discards.
	Logger *slog.Logger
	// Clock and Sleep replace the system's time, for tests. Sleep returns early
	// with the context's error.
	Clock func() time.Time
	Sleep func(ctx context.Context, d time.Duration) error
	// Dialer replaces net.Dialer for unix and TCP connections to the daemon. The
	// leaf with the official binding cannot use it.
	Dialer func(ctx context.Context, network, address string) (net.Conn, error)
}

const (
	defaultScratchDir = "/var/tmp"
	defaultStorageDir = "/var/lib/libvirt/images"
	defaultInflight   = 16

	// closeTimeout bounds Close, cleanupTimeout what is undone after a failure.
	closeTimeout   = 10 * time.Second
	cleanupTimeout = 60 * time.Second
	// beginTimeout is more than the 30 s for which the daemon waits for a lock.
	beginTimeout = 45 * time.Second
)

// withDefaults checks the configuration and fills it in.
func (c Config) withDefaults() (Config, error) {
	if c.ScratchDir == "" {
		c.ScratchDir = defaultScratchDir
	}
	if c.SocketDir == "" {
		c.SocketDir = c.ScratchDir
	}
	if c.StorageDir == "" {
		c.StorageDir = defaultStorageDir
	}
	for _, dir := range []string{c.ScratchDir, c.SocketDir, c.StorageDir} {
		// Paths of a libvirt host, which is a POSIX one even if this is not.
		if dir[0] != '/' && !filepath.IsAbs(dir) {
			return c, errors.New("kvm: directory " + dir + " is not an absolute path")
		}
	}
	if c.ScratchMinFree < 0 || c.ScratchReserve < 0 || c.ReadInflight < 0 {
		return c, errors.New("kvm: limits must not be negative")
	}
	if c.ReadInflight == 0 {
		c.ReadInflight = defaultInflight
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Clock == nil {
		c.Clock = clock.Real().Now
	}
	if c.Sleep == nil {
		c.Sleep = sleep
	}
	if c.Dialer == nil {
		c.Dialer = new(net.Dialer).DialContext
	}
	return c, nil
}

// sleep waits for d or for the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
