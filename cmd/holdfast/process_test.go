package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

// The tests in this file need the command as a process of its own: the test
// binary is it when testProgram is set. Its hypervisor is a simulated one whose
// guest is frozen while the file testFrozen exists, so that several processes see
// the same guest.
const (
	testProgram = "HOLDFAST_TEST_PROGRAM"
	testFrozen  = "HOLDFAST_TEST_FROZEN"
	testHang    = "HOLDFAST_TEST_HANG" // freeze: for ever in the freeze; read: until interrupted

	procURL = "fake:process"
	procVM  = "web1"
)

func TestMain(m *testing.M) {
	if os.Getenv(testProgram) != "" {
		p := system()
		p.connect = procConnector{}
		os.Exit(p.run(context.Background(), os.Args[1:]))
	}
	os.Exit(m.Run())
}

type procConnector struct{ drivers }

func (procConnector) Hypervisor(context.Context, connect.HypervisorConfig) (hypervisor.Hypervisor, error) {
	frozen, hang := os.Getenv(testFrozen), os.Getenv(testHang)
	w := fakes.NewWorld(fakes.Options{Seed: 7})
	id := w.AddVM(fakes.VMConfig{
		Name: procVM, Disks: []fakes.DiskConfig{{ID: "vda", Size: 3<<20 + 512}},
		Guest: fakes.Guest{
			Agent: true,
			OnFreeze: func() {
				if err := os.WriteFile(frozen, nil, 0o600); err != nil {
					panic(err)
				}
				if hang == "freeze" {
					select {}
				}
			},
			OnThaw: func() { _ = os.Remove(frozen) },
		},
	})
	if err := w.GuestWrite(id, "vda", 0, []byte("something")); err != nil {
		return nil, err
	}
	var hv hypervisor.Hypervisor = fileGuest{w.Connect(), frozen}
	if hang == "read" {
		hv = slowReads{hv}
	}
	return hv, nil
}

// fileGuest thaws what another process froze.
type fileGuest struct {
	*fakes.Hypervisor
	frozen string
}

func (f fileGuest) Thaw(ctx context.Context, id hypervisor.VMID) error {
	if err := os.Remove(f.frozen); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return f.Hypervisor.Thaw(ctx, id)
}

// proc is the command as a process.
type proc struct {
	t      *testing.T
	dir    string
	frozen string
}

func newProc(t *testing.T) *proc {
	if runtime.GOOS != "linux" {
		skip(t, "linux", "processes are looked at in /proc")
	}
	dir := t.TempDir()
	p := &proc{t: t, dir: dir, frozen: filepath.Join(dir, "frozen")}
	t.Setenv(testProgram, "1")
	t.Setenv(testFrozen, p.frozen)
	t.Setenv("HOLDFAST_STATE_DIR", filepath.Join(dir, "state"))
	t.Setenv("HOLDFAST_REPO_PASSWORD", "correct horse")
	t.Setenv("HOLDFAST_PASSWORD", "battery staple")
	return p
}

func (p *proc) command(args ...string) *exec.Cmd {
	exe, err := os.Executable()
	require.NoError(p.t, err)
	return exec.CommandContext(p.t.Context(), exe, args...)
}

func (p *proc) exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// soon waits for something that another process does.
func (p *proc) soon(what string, within time.Duration, cond func() bool) {
	p.t.Helper()
	require.Eventually(p.t, cond, within, 5*time.Millisecond, what)
}

func (p *proc) backupArgs() []string {
	return []string{"backup", "--json", "--events", "--from", procURL, "--repo", filepath.Join(p.dir, "store"), "--quiesce-timeout", "20s", procVM}
}

// guardOf finds the guard among the descendants of a process. Any thread may have
// started it.
func (p *proc) guardOf(pid int) int {
	tasks, err := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/task")
	require.NoError(p.t, err)
	for _, task := range tasks {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/task/" + task.Name() + "/children")
		if err != nil {
			continue
		}
		for _, f := range strings.Fields(string(b)) {
			cmd, err := os.ReadFile("/proc/" + f + "/cmdline")
			if err == nil && strings.Contains(string(cmd), "\x00guard\x00") {
				n, err := strconv.Atoi(f)
				require.NoError(p.t, err)
				return n
			}
		}
	}
	return 0
}

// The process that froze a guest is killed in the freeze window: the guard thaws
// at once, whatever else is done to it, and recover closes the rest.
func TestGuardThawsWhenItsParentIsKilled(t *testing.T) {
	p := newProc(t)
	t.Setenv(testHang, "freeze")
	cmd := p.command(p.backupArgs()...)
	require.NoError(t, cmd.Start())
	p.soon("the guest freezes", 30*time.Second, func() bool { return p.exists(p.frozen) })
	guard := p.guardOf(cmd.Process.Pid)
	require.NotZero(t, guard, "there is no guard in the freeze window")

	for _, file := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(guard) + "/" + file)
		require.NoError(t, err)
		require.NotEmpty(t, b)
		require.NotContains(t, string(b), "correct horse", file)
		require.NotContains(t, string(b), "battery staple", file)
	}
	g, err := os.FindProcess(guard)
	require.NoError(t, err)
	require.NoError(t, g.Signal(os.Interrupt)) // Ctrl-C is not for the guard
	require.True(t, p.exists(p.frozen))

	killed := time.Now()
	require.NoError(t, cmd.Process.Kill())
	p.soon("the guard thaws", 5*time.Second, func() bool { return !p.exists(p.frozen) })
	require.Less(t, time.Since(killed), 2*time.Second)
	require.Error(t, cmd.Wait())
	p.soon("the guard ends", 10*time.Second, func() bool { return !p.exists("/proc/"+strconv.Itoa(guard)) || p.zombie(guard) })

	t.Setenv(testHang, "")
	out, err := p.command("recover", "--json").Output()
	require.NoError(t, err, string(out))
	require.Contains(t, string(out), `"kind":"thaw"`)
	require.NotContains(t, string(out), `"state":"open"`)
	for _, l := range lines(string(out)) {
		require.NoError(t, validate("recover", l), l)
	}
	out, err = p.command(p.backupArgs()...).Output()
	require.NoError(t, err, string(out))
	require.Contains(t, string(out), `"status":"success"`)
}

// zombie reports whether a process has ended and waits for its parent, which in a
// container may be nobody.
func (p *proc) zombie(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && strings.Contains(string(b), ") Z ")
}

func TestInterruptedProcessCleansUp(t *testing.T) {
	p := newProc(t)
	t.Setenv(testHang, "read")
	cmd := p.command(p.backupArgs()...)
	stderr, err := cmd.StderrPipe()
	require.NoError(t, err)
	var out strings.Builder
	cmd.Stdout = &out
	require.NoError(t, cmd.Start())
	for s := bufio.NewScanner(stderr); s.Scan(); {
		var e event
		require.NoError(t, json.Unmarshal(s.Bytes(), &e), s.Text())
		if e.Stage == "transfer" && e.State == stateEnter {
			require.NoError(t, cmd.Process.Signal(os.Interrupt))
		}
	}
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Wait(), &exit)
	require.Equal(t, exitInterrupted, exit.ExitCode())
	require.Contains(t, out.String(), `"code":"interrupted"`)
	require.False(t, p.exists(p.frozen))
	o, err := p.command("recover").Output()
	require.NoError(t, err)
	require.Contains(t, string(o), "nothing was left behind")
}

// guardTalk is a guard that the test is the parent of.
type guardTalk struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func (p *proc) guard(deadline string, more ...string) *guardTalk {
	g := &guardTalk{t: p.t, cmd: p.command(append([]string{"guard", "--from", procURL, "--vm", "vm-1", "--deadline", deadline}, more...)...)}
	var err error
	g.in, err = g.cmd.StdinPipe()
	require.NoError(p.t, err)
	out, err := g.cmd.StdoutPipe()
	require.NoError(p.t, err)
	g.out = bufio.NewReader(out)
	require.NoError(p.t, g.cmd.Start())
	_, err = io.WriteString(g.in, "{}\n")
	require.NoError(p.t, err)
	return g
}

func (g *guardTalk) hears(want string) {
	g.t.Helper()
	line, err := g.out.ReadString('\n')
	require.NoError(g.t, err)
	require.Equal(g.t, want+"\n", line)
}

func TestGuardDisarmed(t *testing.T) {
	p := newProc(t)
	require.NoError(t, os.WriteFile(p.frozen, nil, 0o600))
	g := p.guard("1h")
	g.hears(guardArmed)
	_, err := io.WriteString(g.in, guardDone+"\n")
	require.NoError(t, err)
	g.hears(guardIdle)
	require.NoError(t, g.cmd.Wait())
	require.True(t, p.exists(p.frozen), "a guard that was disarmed thawed")
}

func TestGuardDeadline(t *testing.T) {
	p := newProc(t)
	require.NoError(t, os.WriteFile(p.frozen, nil, 0o600))
	g := p.guard("50ms")
	g.hears(guardArmed)
	p.soon("the guard thaws", 5*time.Second, func() bool { return !p.exists(p.frozen) })
	_, err := io.WriteString(g.in, guardDone+"\n")
	require.NoError(t, err)
	g.hears(guardThawed)
	require.NoError(t, g.cmd.Wait())
}

func TestGuardPipeCloses(t *testing.T) {
	p := newProc(t)
	require.NoError(t, os.WriteFile(p.frozen, nil, 0o600))
	g := p.guard("1h")
	g.hears(guardArmed)
	require.NoError(t, g.in.Close())
	p.soon("the guard thaws", 5*time.Second, func() bool { return !p.exists(p.frozen) })
	g.hears(guardThawed)
	require.NoError(t, g.cmd.Wait())
}

func TestGuardCannotBeArmed(t *testing.T) {
	p := newProc(t)
	g := p.guard("1h", "--vm", "vm-99")
	line, err := g.out.ReadString('\n')
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(line, guardError), line)
	require.Contains(t, line, "vm-99")
	require.Error(t, g.cmd.Wait())

	// A guard of an earlier run is still there: a second one would thaw each
	// other's freezes.
	first := p.guard("1h")
	first.hears(guardArmed)
	second := p.guard("1h")
	line, err = second.out.ReadString('\n')
	require.NoError(t, err)
	require.Contains(t, line, "guard of an earlier run")
	require.Error(t, second.cmd.Wait())
	_, err = io.WriteString(first.in, guardDone+"\n")
	require.NoError(t, err)
	require.NoError(t, first.cmd.Wait())
}
