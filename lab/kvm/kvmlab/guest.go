package kvmlab

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

const (
	// EnvGuest names the variable with the directory of a tiny guest that
	// lab/kvm/guest/build has made; unset, the script is run.
	EnvGuest = "HOLDFAST_LAB_GUEST"

	controlPort = "holdfast.control"
	bootTimeout = 3 * time.Minute
)

// Guest configures the tiny guest: a Linux of a few megabytes with a real
// qemu-ga, built by lab/kvm/guest/build. It mounts /dev/vda at /mnt, and listens on
// a control port of its own, so that a test can stop the agent and go on talking.
type Guest struct {
	// HookSleep makes the agent's freeze hook sleep before the freeze.
	HookSleep time.Duration
	// HookFails makes the freeze hook exit with an error.
	HookFails bool
	// Writer starts a program that appends to /mnt/log every 10 ms and syncs every
	// 200 lines.
	Writer bool
	// NoAgent leaves the agent off.
	NoAgent bool
	// KVM uses hardware virtualisation. The default, emulation, works everywhere.
	KVM bool

	kernel, initrd string
}

// prepare builds the guest, or finds the one already built.
func (g *Guest) prepare(t testing.TB) {
	t.Helper()
	dir := os.Getenv(EnvGuest)
	if dir == "" {
		root, err := moduleRoot()
		if err != nil {
			t.Fatalf("lab: %v", err)
		}
		out, err := tool("bash", filepath.Join(root, "lab", "kvm", "guest", "build"))
		if err != nil {
			Missing(t, "kvm", fmt.Sprintf("the tiny guest (%v)", err))
		}
		lines := strings.Split(out, "\n")
		dir = lines[len(lines)-1]
	}
	g.kernel, g.initrd = filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initrd")
	for _, f := range []string{g.kernel, g.initrd} {
		if _, err := os.Stat(f); err != nil {
			Missing(t, "kvm", f)
		}
	}
}

// moduleRoot finds the directory of go.mod at or above the test's directory.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "lab", "kvm", "guest", "build")); err == nil {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", fmt.Errorf("lab/kvm/guest/build is not at or above the working directory; set %s", EnvGuest)
		}
		dir = up
	}
}

func (g *Guest) cmdline() string {
	words := []string{"console=ttyS0", "rdinit=/init", "panic=-1", "quiet"}
	if g.HookSleep > 0 {
		words = append(words, "hf.hook_sleep="+strconv.FormatFloat(g.HookSleep.Seconds(), 'f', -1, 64))
	}
	if g.HookFails {
		words = append(words, "hf.hook_fail=1")
	}
	if g.Writer {
		words = append(words, "hf.writer=1")
	}
	if g.NoAgent {
		words = append(words, "hf.agent=0")
	}
	return strings.Join(words, " ")
}

// WaitGuest waits until the guest has booted and its control port answers, and, if
// it runs one, until the agent answers libvirt. It returns how long that took.
func (v *VM) WaitGuest() time.Duration {
	v.t.Helper()
	d, err := v.lab.WaitGuest(v.Name, v.spec.Guest == nil || !v.spec.Guest.NoAgent)
	if err != nil {
		v.t.Fatalf("lab: %v; console:\n%s", err, v.Console())
	}
	return d
}

// WaitGuest is VM.WaitGuest for a domain that the lab did not make, a restored one
// for example. agent says whether an agent is expected.
func (l *Lab) WaitGuest(domain string, agent bool) (time.Duration, error) {
	start := time.Now()
	var last error
	err := poll(bootTimeout, 200*time.Millisecond, func() (bool, error) {
		state, err := l.Virsh("domstate", domain)
		if err != nil || state != "running" {
			return false, fmt.Errorf("%s is %q: %w", domain, state, errors.Join(err, errGuest))
		}
		if _, last = l.guestSh(domain, "true", 2*time.Second); last != nil {
			return false, nil
		}
		if agent {
			_, last = l.agent(domain, "guest-ping", nil, 5)
		}
		return last == nil, nil
	})
	if err != nil {
		return 0, fmt.Errorf("guest of %s did not come up: %w", domain, errors.Join(err, last))
	}
	return time.Since(start), nil
}

var errGuest = errors.New("tiny guest")

// TryAgent sends a command to the guest agent and returns the "return" member of
// its answer; an agent that does not answer is given up after 5 s.
func (v *VM) TryAgent(command string, args any) (json.RawMessage, error) {
	return v.lab.agent(v.Name, command, args, 5)
}

func (l *Lab) agent(domain, command string, args any, seconds int) (json.RawMessage, error) {
	msg := map[string]any{"execute": command}
	if args != nil {
		msg["arguments"] = args
	}
	req, err := json.Marshal(msg)
	if err != nil {
		return nil, err
	}
	out, err := l.Virsh("qemu-agent-command", domain, "--timeout", strconv.Itoa(seconds), string(req))
	if err != nil {
		return nil, err
	}
	var ans struct {
		Return json.RawMessage `json:"return"`
	}
	if err := json.Unmarshal([]byte(out), &ans); err != nil {
		return nil, fmt.Errorf("%s of %s: %w", command, domain, err)
	}
	return ans.Return, nil
}

// TryFrozen asks the agent whether the guest's file systems are frozen. Without an
// agent it returns an error.
func (v *VM) TryFrozen() (bool, error) {
	raw, err := v.TryAgent("guest-fsfreeze-status", nil)
	if err != nil {
		return false, err
	}
	var status string
	if err := json.Unmarshal(raw, &status); err != nil {
		return false, err
	}
	return status == "frozen", nil
}

// TryBlocked finds out without the agent whether the guest's file system is frozen:
// a file made on it does not come to be within two seconds. If it is not frozen,
// the probe has written to the disk.
func (v *VM) TryBlocked() (bool, error) {
	out, err := v.TrySh(`rm -f /run/probe; (touch /mnt/.probe && rm /mnt/.probe && touch /run/probe) >/dev/null 2>&1 &
for i in 0 1 2 3 4 5 6 7 8 9; do [ -e /run/probe ] && break; usleep 200000; done
[ -e /run/probe ] && echo free || echo blocked`)
	return strings.TrimSpace(out) == "blocked", err
}

// TrySh runs a shell command in the guest over the control port, and returns its
// combined output. It does not need the agent. A command that touches /mnt while
// the guest is frozen blocks the port until the thaw.
func (v *VM) TrySh(command string) (string, error) {
	v.guest.Lock()
	defer v.guest.Unlock()
	return v.lab.guestSh(v.Name, command, 30*time.Second)
}

// Sh is TrySh for the test's goroutine.
func (v *VM) Sh(command string) string {
	v.t.Helper()
	out, err := v.TrySh(command)
	if err != nil {
		v.t.Fatalf("lab: in the guest of %s: %s: %v; console:\n%s", v.Name, command, err, v.Console())
	}
	return out
}

// GuestSh is Sh for a domain that the lab did not make, a restored one for example.
func (l *Lab) GuestSh(domain, command string) (string, error) {
	return l.guestSh(domain, command, 30*time.Second)
}

// StopAgent stops the agent's process with SIGSTOP: it is there and does not answer.
func (v *VM) StopAgent() { v.t.Helper(); v.Sh("kill -STOP $(cat /run/ga.pid)") }

// ContinueAgent undoes StopAgent.
func (v *VM) ContinueAgent() { v.t.Helper(); v.Sh("kill -CONT $(cat /run/ga.pid)") }

// KillAgent ends the agent.
func (v *VM) KillAgent() { v.t.Helper(); v.Sh("kill -9 $(cat /run/ga.pid); rm -f /run/ga.pid") }

// StartAgent starts the agent again after KillAgent.
func (v *VM) StartAgent() { v.t.Helper(); v.Sh("/bin/start-agent") }

// SetHookSleep changes how long the freeze hook sleeps from now on.
func (v *VM) SetHookSleep(d time.Duration) {
	v.t.Helper()
	v.Sh("echo " + strconv.FormatFloat(d.Seconds(), 'f', -1, 64) + " > /run/hook_sleep")
}

// StartWriter starts the program that appends to /mnt/log.
func (v *VM) StartWriter() { v.t.Helper(); v.Sh("/bin/start-writer") }

// StopWriter stops the writer and syncs: the log is on the disk when it returns.
func (v *VM) StopWriter() { v.t.Helper(); v.Sh("/bin/stop-writer") }

// HookCall is one call of the freeze hook.
type HookCall struct {
	// What is "freeze" or "thaw".
	What string
	// At is the guest's uptime.
	At time.Duration
}

// HookCalls returns the calls of the agent's freeze hook since boot, in order.
func (v *VM) HookCalls() []HookCall {
	v.t.Helper()
	var calls []HookCall
	for _, line := range strings.Split(strings.TrimSpace(v.Sh("cat /run/hook.log 2>/dev/null || true")), "\n") {
		f := strings.Fields(line)
		if len(f) != 2 {
			continue
		}
		sec, err := strconv.ParseFloat(f[1], 64)
		if err != nil {
			v.t.Fatalf("lab: hook log line %q: %v", line, err)
		}
		calls = append(calls, HookCall{What: f[0], At: time.Duration(sec * float64(time.Second))})
	}
	return calls
}

// BootLog returns the size in bytes and the SHA-256 (hexadecimal) that /mnt/log had
// when the guest mounted it, before any writer started: in a restored guest, what
// the backup holds. The size is 0 and the digest empty if there was no log.
func (l *Lab) BootLog(domain string) (size int64, sha256 string, err error) {
	out, err := l.guestSh(domain, "cat /run/boot.log 2>/dev/null || true", 10*time.Second)
	if err != nil {
		return 0, "", err
	}
	f := strings.Fields(out)
	if len(f) < 2 {
		return 0, "", nil
	}
	size, err = strconv.ParseInt(f[0], 10, 64)
	return size, f[1], err
}

// LogInImage reads /log out of the ext4 file system in a raw image.
func LogInImage(rawImage string) ([]byte, error) {
	out, err := exec.Command("debugfs", "-R", "cat /log", rawImage).Output()
	if err != nil {
		return nil, fmt.Errorf("debugfs %s: %w", rawImage, err)
	}
	return out, nil
}

// NeedsRecovery reports whether the ext4 file system in a raw image wants its
// journal replayed: yes after a crash-consistent copy of a mounted one, no after a
// freeze.
func NeedsRecovery(rawImage string) (bool, error) {
	out, err := tool("dumpe2fs", "-h", rawImage)
	if err != nil {
		return false, err
	}
	if !strings.Contains(out, "has_journal") {
		return false, fmt.Errorf("dumpe2fs %s: no journal in %q", rawImage, out)
	}
	return strings.Contains(out, "needs_recovery"), nil
}
