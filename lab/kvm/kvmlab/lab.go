package kvmlab

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	// EnvURL names the variable that holds the libvirt URL of the lab.
	EnvURL = "HOLDFAST_LAB_KVM"
	// EnvRequire names the variable that lists, with commas, the classes of
	// things ("tools", "kvm") whose absence fails a test instead of skipping it.
	EnvRequire = "HOLDFAST_REQUIRE"

	callTimeout = 60 * time.Second
	toolTimeout = 5 * time.Minute
)

// Missing skips the test because what is missing, naming it. It fails the test
// instead when HOLDFAST_REQUIRE lists the class.
func Missing(t testing.TB, class, what string) {
	t.Helper()
	if slices.Contains(strings.Split(os.Getenv(EnvRequire), ","), class) {
		t.Fatalf("%s is missing, and %s requires %q", what, EnvRequire, class)
	}
	t.Skipf("%s is missing", what)
}

// NeedTool returns the path of a program, and skips the test (class "tools") when
// it is not installed.
func NeedTool(t testing.TB, name string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		Missing(t, "tools", name)
	}
	return p
}

// Lab is a connection to one libvirtd for one test. Its methods may be called
// from several goroutines unless they say otherwise.
type Lab struct {
	// URI is the libvirt connection URL.
	URI string
	// Dir is the test's own directory, short enough for socket paths below it.
	// It is removed at the end.
	Dir string

	t      testing.TB
	prefix string

	mu    sync.Mutex
	next  int
	loops []string
}

// Connect returns the lab that HOLDFAST_LAB_KVM names. Without the variable the
// test is skipped, or failed if HOLDFAST_REQUIRE contains "kvm". Everything whose
// name begins with the lab's prefix is removed when the test ends.
func Connect(t testing.TB) *Lab {
	t.Helper()
	uri := os.Getenv(EnvURL)
	if uri == "" {
		Missing(t, "kvm", EnvURL+" (a libvirt URL, see lab/kvm/up)")
	}
	for _, tool := range []string{"virsh", "qemu-img", "qemu-io"} {
		if _, err := exec.LookPath(tool); err != nil {
			Missing(t, "kvm", tool)
		}
	}
	var r [3]byte
	if _, err := rand.Read(r[:]); err != nil {
		t.Fatalf("lab: random name: %v", err)
	}
	// Not t.TempDir: its path holds the test's name, and a socket path below it
	// must fit 107 bytes.
	dir, err := os.MkdirTemp("", fmt.Sprintf("hf-lab-%d-", os.Getpid()))
	if err != nil {
		t.Fatalf("lab: %v", err)
	}
	l := &Lab{
		URI: uri, Dir: dir, t: t,
		prefix: fmt.Sprintf("hf-lab-%d-%s-", os.Getpid(), hex.EncodeToString(r[:])),
	}
	t.Cleanup(l.cleanup)
	if out, err := l.Virsh("version"); err != nil {
		t.Fatalf("lab: no libvirtd answers at %s: %v\n%s", uri, err, out)
	}
	return l
}

// Prefix returns the prefix of every name that this lab makes, such as
// "hf-lab-4711-a1b2c3-".
func (l *Lab) Prefix() string { return l.prefix }

// Name returns a name with the lab's prefix. A domain that the program under test
// creates under such a name, a restored one for example, is cleaned up as well.
func (l *Lab) Name(suffix string) string { return l.prefix + suffix }

// must is Virsh for calls whose failure ends the test.
func (l *Lab) must(t testing.TB, args ...string) string {
	t.Helper()
	out, err := l.Virsh(args...)
	if err != nil {
		t.Fatalf("lab: %v", err)
	}
	return out
}

// Domains returns the names of all domains, active or not, that begin with prefix.
func (l *Lab) Domains(prefix string) ([]string, error) {
	out, err := l.Virsh("list", "--all", "--name")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, n := range strings.Fields(out) {
		if strings.HasPrefix(n, prefix) {
			names = append(names, n)
		}
	}
	return names, nil
}

// remove destroys and undefines one domain, with its checkpoint and snapshot
// metadata. An absent domain is no error.
func (l *Lab) remove(name string) error {
	if !strings.HasPrefix(name, l.prefix) {
		return fmt.Errorf("refusing to remove %q: not of this lab", name)
	}
	_, destroyErr := l.Virsh("destroy", name)
	_, undefineErr := l.Virsh("undefine", name, "--checkpoints-metadata", "--snapshots-metadata",
		"--managed-save", "--nvram")
	left, err := l.Domains(name)
	if err != nil {
		return err
	}
	if slices.Contains(left, name) {
		return errors.Join(fmt.Errorf("domain %s is still there", name), destroyErr, undefineErr)
	}
	return nil
}

func (l *Lab) cleanup() {
	names, err := l.Domains(l.prefix)
	if err != nil {
		l.t.Errorf("lab: cleanup: %v", err)
	}
	for _, n := range names {
		if err := l.remove(n); err != nil {
			l.t.Errorf("lab: cleanup: %v", err)
		}
	}
	for _, pid := range qemuPIDs(l.prefix) {
		// Only when libvirt has lost a process of ours.
		if p, err := os.FindProcess(pid); err == nil {
			_ = p.Kill()
		}
	}
	if nv, err := filepath.Glob("/var/lib/libvirt/qemu/nvram/" + l.prefix + "*"); err == nil {
		for _, f := range nv {
			_ = os.Remove(f)
		}
	}
	l.mu.Lock()
	loops := l.loops
	l.loops = nil
	l.mu.Unlock()
	for _, dev := range loops {
		if _, err := tool("losetup", "-d", dev); err != nil {
			l.t.Errorf("lab: cleanup: %v", err)
		}
	}
	if err := os.RemoveAll(l.Dir); err != nil {
		l.t.Errorf("lab: cleanup: %v", err)
	}
}

// tool runs a program to its end, for at most five minutes.
func tool(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), toolTimeout)
	defer cancel()
	return run(ctx, name, args...)
}

func run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "LIBVIRT_AUTOSTART=0")
	cmd.WaitDelay = 2 * time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	out := strings.TrimSpace(stdout.String())
	if err != nil {
		if ctx.Err() != nil {
			err = errors.Join(ctx.Err(), err)
		}
		return out, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}

// poll calls f every interval until it reports true or an error, or until d has
// passed; then it returns the error of the context.
func poll(d, interval time.Duration, f func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		ok, err := f()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// qemuPIDs returns the pids of QEMU processes whose guest name begins with prefix.
func qemuPIDs(prefix string) []int {
	var pids []int
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil
	}
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			continue // the process has ended
		}
		args := strings.Split(string(raw), "\x00")
		if !strings.Contains(filepath.Base(args[0]), "qemu-system") {
			continue
		}
		i := slices.Index(args, "-name")
		if i < 0 || i+1 >= len(args) || !strings.HasPrefix(args[i+1], "guest="+prefix) {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(f, "/proc/%d/cmdline", &pid); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}
