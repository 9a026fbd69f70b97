package connect

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"

	"github.com/holdfast-backup/holdfast/drivers/kvm"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

// HypervisorConfig says which hypervisor to connect to.
type HypervisorConfig struct {
	// URL is qemu:///system and its like, or an endpoint that Endpoint returned.
	URL string
	// Password is asked for by platforms that need one; may be nil.
	Password func(ctx context.Context) (Secret, error)
	// ScratchDir is where the hypervisor keeps old content of blocks that guests
	// overwrite during a backup; empty: the driver's default.
	ScratchDir string
	// CAFile and Thumbprint say which TLS certificate to trust.
	CAFile, Thumbprint string

	Logger *slog.Logger // may be nil
}

// scratchParam carries ScratchDir in an endpoint, so that a process that recovers
// looks where the interrupted one worked.
const scratchParam = "holdfast_scratch_dir"

// supported is what an error about a URL says of the ones that work.
const supported = "qemu:///system, qemu:///session and qemu+ssh://HOST/system (KVM) are supported"

// Endpoint returns the text that finds the same hypervisor again, for journals
// and restore points. It holds no secret.
func Endpoint(cfg HypervisorConfig) (string, error) {
	u, err := parse(cfg.URL)
	if err != nil {
		return "", err
	}
	if cfg.ScratchDir != "" {
		q := u.Query()
		q.Set(scratchParam, cfg.ScratchDir)
		u.RawQuery = q.Encode()
	}
	return u.String(), nil
}

// parse reads a hypervisor URL and refuses passwords in it.
func parse(s string) (*url.URL, error) {
	if s == "" {
		return nil, refuse("give --from a URL, for example qemu:///system", errors.New("no hypervisor was named"))
	}
	u, err := url.Parse(s)
	if err != nil {
		var ue *url.Error
		switch {
		case strings.Contains(s, "@"):
			err = errors.New("it cannot be parsed") // its text, or the reason, may hold a part of a password
		case errors.As(err, &ue):
			err = ue.Err
		}
		return nil, refuse(supported, fmt.Errorf("the hypervisor URL cannot be read: %w", err))
	}
	if u.Scheme == "" {
		return nil, refuse(supported, fmt.Errorf("%q is not a hypervisor URL", u.Redacted()))
	}
	if strings.Contains(u.Opaque, "@") { // user:password@host reads as a scheme and this
		return nil, refuse(supported, errors.New("the hypervisor URL has no // after its scheme"))
	}
	if u.User != nil {
		if _, set := u.User.Password(); set {
			return nil, refuse("use --password-file or HOLDFAST_PASSWORD", fmt.Errorf("the hypervisor URL %s holds a password: everybody can read the arguments of a process", u.Redacted()))
		}
	}
	return u, nil
}

// ErrUsage marks an address that no driver could ever understand.
var ErrUsage = errors.New("wrong address")

// usageError keeps the text of an error and makes it match ErrUsage.
type usageError struct{ error }

func (e usageError) Unwrap() error        { return e.error }
func (e usageError) Is(target error) bool { return target == ErrUsage }

func refuse(hint string, err error) error {
	return &hypervisor.Error{Op: "connect", Hint: hint, Err: usageError{err}}
}

// Hypervisor connects to the hypervisor at a URL. The caller closes it.
func Hypervisor(ctx context.Context, cfg HypervisorConfig) (hypervisor.Hypervisor, error) {
	u, err := parse(cfg.URL)
	if err != nil {
		return nil, err
	}
	family, _, _ := strings.Cut(u.Scheme, "+")
	switch family {
	case "qemu":
		return openKVM(ctx, u, cfg)
	case "vsphere":
		return nil, notYet(u, "VMware vSphere")
	case "xen":
		return nil, notYet(u, "XenServer and XCP-ng")
	case "hyperv":
		return nil, notYet(u, "Hyper-V")
	case "fake":
		return nil, refuse("try it with: holdfast demo", fmt.Errorf("%s: the simulated hypervisor lives inside the demo alone: %w", u.Scheme, errors.ErrUnsupported))
	}
	return nil, refuse(supported, fmt.Errorf("%q is not a kind of hypervisor that Holdfast knows: %w", u.Scheme, errors.ErrUnsupported))
}

func notYet(u *url.URL, what string) error {
	return refuse(supported, fmt.Errorf("%s: %s is not supported yet: %w", u.Redacted(), what, errors.ErrUnsupported))
}

func openKVM(ctx context.Context, u *url.URL, cfg HypervisorConfig) (hypervisor.Hypervisor, error) {
	if cfg.CAFile != "" || cfg.Thumbprint != "" {
		return nil, refuse("libvirt takes its certificates from its own directories, or from pkipath=DIR in the URL", fmt.Errorf("--ca-file and --thumbprint do not apply to %s: %w", u.Redacted(), errors.ErrUnsupported))
	}
	q := u.Query()
	scratch := cfg.ScratchDir
	if q.Has(scratchParam) {
		if scratch == "" {
			scratch = q.Get(scratchParam)
		}
		q.Del(scratchParam)
		u.RawQuery = q.Encode()
	}
	d, err := kvm.Open(ctx, kvm.Config{URI: u.String(), ScratchDir: scratch, Logger: cfg.Logger})
	if err != nil {
		return nil, err
	}
	return d, nil
}
