package kvm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// Driver is a libvirt daemon. It is safe for concurrent use.
type Driver struct {
	cfg  Config
	ep   *endpoint
	conn conn
	// files is replaced by tests.
	files hostFiles
	info  hypervisor.Info
	host  string

	meta semaphore // held while a domain's metadata is read, changed and written

	life context.Context // ends with Close
	stop context.CancelFunc
	wg   sync.WaitGroup // goroutines of the driver's own

	mu     sync.Mutex
	closed bool
}

var (
	_ hypervisor.Target = (*Driver)(nil)
	_ hypervisor.Thawer = (*Driver)(nil)
)

// Open connects to the daemon that cfg.URI names and asks for its version. ctx
// governs the connecting alone. The caller must Close the driver.
func Open(ctx context.Context, cfg Config) (*Driver, error) {
	fail := func(hint string, err error) (*Driver, error) {
		return nil, &hypervisor.Error{Op: "Open", Platform: hypervisor.KVM, Hint: hint, Err: err}
	}
	cfg, err := cfg.withDefaults()
	if err != nil {
		return fail("", err)
	}
	ep, err := parseURI(cfg.URI)
	if err != nil {
		return fail("libvirt URIs look like qemu:///system or qemu+ssh://host/system", err)
	}
	if off := ep.unverified(); off != "" {
		cfg.Logger.Warn("the identity of the libvirt host is not verified, as its URI asks", "uri", ep.public(), "parameter", off)
	}
	c, err := openConn(ctx, ep, cfg.Dialer)
	if err != nil {
		return fail(openHint(ep, err), fmt.Errorf("%s: %w", ep.public(), err))
	}
	d, err := newDriver(ctx, cfg, ep, c)
	if err != nil {
		return fail("", errors.Join(err, c.close()))
	}
	return d, nil
}

func openHint(ep *endpoint, err error) string {
	switch {
	case errors.Is(err, hypervisor.ErrAuth):
		return "the user must be allowed to use libvirt: root, or a member of the group libvirt"
	case errors.Is(err, hypervisor.ErrUnavailable) && ep.transport == "unix":
		return "is libvirtd running, and may this user open its socket?"
	}
	return ""
}

// newDriver makes a driver on an open connection.
func newDriver(ctx context.Context, cfg Config, ep *endpoint, c conn) (*Driver, error) {
	lib, hv, err := c.versions(ctx)
	if err != nil {
		return nil, err
	}
	host, err := c.hostname(ctx)
	if err != nil {
		return nil, err
	}
	d := &Driver{cfg: cfg, ep: ep, conn: c, files: osFiles{}, host: host, meta: newSemaphore()}
	d.life, d.stop = context.WithCancel(context.Background())
	d.info = hypervisor.Info{
		Platform:  hypervisor.KVM,
		Product:   "QEMU",
		Version:   fmt.Sprintf("%s (libvirt %s)", version(hv), version(lib)),
		Endpoint:  ep.public(),
		Transport: c.leaf(),
		Capabilities: hypervisor.Capabilities{
			ChangeTracking: ep.local,
			AtomicDisks:    ep.local,
			RandomRead:     ep.local,
			Baselines:      ep.local,
		},
	}
	if ep.local {
		d.info.Capabilities.MaxConsistency = hypervisor.ApplicationConsistent
	}
	return d, nil
}

// version renders libvirt's version numbers.
func version(v uint64) string {
	return fmt.Sprintf("%d.%d.%d", v/1000000, v/1000%1000, v%1000)
}

// Info tells what this daemon is and can do. It does no I/O.
func (d *Driver) Info() hypervisor.Info { return d.info }

// Close ends the connection and the driver's goroutines. It is idempotent and
// does not release snapshots: a backup job goes on in QEMU.
func (d *Driver) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	d.mu.Unlock()
	d.stop()
	d.wg.Wait()
	if err := d.conn.close(); err != nil {
		return &hypervisor.Error{Op: "Close", Platform: hypervisor.KVM, Err: err}
	}
	return nil
}

// background runs f in a goroutine that Close ends and waits for. It reports
// false, without running f, when the driver is closed already.
func (d *Driver) background(f func(ctx context.Context)) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return false
	}
	d.wg.Add(1)
	go func() {
		defer d.wg.Done()
		f(d.life)
	}()
	return true
}

// fail gives an error its operation and object. An error that has them already is
// passed on, and so is the end of the caller's context.
func fail(op string, id hypervisor.VMID, disk hypervisor.DiskID, hint string, err error) error {
	if err == nil {
		return nil
	}
	var e *hypervisor.Error
	if errors.As(err, &e) && e == err { //nolint:errorlint // only an error that is one itself, not one that wraps one
		return err
	}
	return &hypervisor.Error{Op: op, Platform: hypervisor.KVM, VM: id, Disk: disk, Hint: hint, Err: err}
}

// remoteOnly is the answer to what needs the files of the daemon's host.
func (d *Driver) remoteOnly(op string, id hypervisor.VMID) error {
	return fail(op, id, "", "run Holdfast on the hypervisor host itself, with qemu:///system",
		fmt.Errorf("%s is a daemon on another host, whose disks and NBD sockets cannot be reached: %w",
			d.ep.public(), errors.ErrUnsupported))
}

// ownName checks the owner name of a run, or makes one that belongs to no
// repository.
func ownName(name string) (string, error) {
	if name != "" {
		if _, err := hypervisor.ParseName(name); err != nil {
			return "", err
		}
		return name, nil
	}
	var r [8]byte
	if _, err := rand.Read(r[:]); err != nil {
		return "", err
	}
	return hypervisor.Name{Repo: "00000000", Run: hex.EncodeToString(r[:]), Kind: "snap"}.String(), nil
}

// validUUID reports whether s is a UUID as libvirt writes it.
func validUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		dash := i == 8 || i == 13 || i == 18 || i == 23
		hexa := c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
		if dash != (c == '-') || !dash && !hexa {
			return false
		}
	}
	return true
}

// formatUUID renders 16 bytes as a UUID.
func formatUUID(b []byte) string {
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
