package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

// guardConfig says what a guard has to connect to.
type guardConfig struct {
	from     connect.HypervisorConfig
	stateDir string
}

// guardProcess is backup.Guard by a child process. It is safe for concurrent use.
type guardProcess struct {
	p   *program
	cfg guardConfig
}

func newGuard(p *program, cfg guardConfig) backup.Guard { return &guardProcess{p: p, cfg: cfg} }

const (
	// guardGrace is added to the deadline of the guard: the driver, which knows
	// when the freeze really began, comes first.
	guardGrace = 500 * time.Millisecond
	// guardStart is how long a guard may take to be armed, guardStop to end.
	guardStart = 30 * time.Second
	guardStop  = guardGiveUp + 5*time.Second
)

// errGuardThawed says that the guard did its work although this process lived.
var errGuardThawed = errors.New("the guard thawed the guest at its deadline: the consistency that was reached is not sure")

// Arm starts the child and returns when it is ready to thaw.
func (g *guardProcess) Arm(ctx context.Context, vm hypervisor.VMID, deadline time.Duration) (disarm func() error, err error) {
	exe, err := g.p.executable()
	if err != nil {
		return nil, err
	}
	endpoint, err := connect.Endpoint(g.cfg.from)
	if err != nil {
		return nil, err
	}
	args := []string{"guard", "--from", endpoint, "--vm", string(vm), "--deadline", (deadline + guardGrace).String(), "--state-dir", g.cfg.stateDir}
	for _, a := range [][2]string{{"--ca-file", g.cfg.from.CAFile}, {"--thumbprint", g.cfg.from.Thumbprint}} {
		if a[1] != "" {
			args = append(args, a[0], a[1])
		}
	}
	// The child outlives ctx on purpose: it is there for the case that this
	// process does not end well.
	cmd := exec.Command(exe, args...) //nolint:noctx // see above
	cmd.Env = withoutSecrets(cmd.Environ())
	detach(cmd)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(err, in.Close())
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &guardChild{p: g.p, cmd: cmd, in: in, words: make(chan string, 4)}
	go c.listen(out)
	if err := c.hello(ctx, g.cfg.from); err != nil {
		return nil, errors.Join(err, c.kill())
	}
	if err := c.armed(ctx); err != nil {
		return nil, errors.Join(err, c.kill())
	}
	return c.disarm, nil
}

// withoutSecrets takes the passwords out of an environment.
func withoutSecrets(env []string) []string {
	out := env[:0]
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		if !strings.HasPrefix(name, "HOLDFAST_") || !strings.HasSuffix(name, "PASSWORD") {
			out = append(out, e)
		}
	}
	return out
}

// guardChild is a running guard.
type guardChild struct {
	p     *program
	cmd   *exec.Cmd
	in    io.WriteCloser
	words chan string // lines that it said; closed at the end of its output
}

func (c *guardChild) listen(out io.Reader) {
	defer close(c.words)
	s := bufio.NewScanner(out)
	for s.Scan() {
		select {
		case c.words <- s.Text():
		default: // it says three lines at most
		}
	}
}

func (c *guardChild) hello(ctx context.Context, from connect.HypervisorConfig) error {
	var h guardHello
	if from.Password != nil && needsPassword(from.URL) {
		pw, err := from.Password(ctx)
		if err != nil {
			return err
		}
		h.Password = pw
	}
	b, err := h.encode()
	if err != nil {
		return err
	}
	_, err = c.in.Write(append(b, '\n'))
	return err
}

// needsPassword reports whether Holdfast itself logs in to what url names; libvirt
// has its own ways.
func needsPassword(url string) bool { return !strings.HasPrefix(url, "qemu") }

func (c *guardChild) armed(ctx context.Context) error {
	timer := c.p.clock.NewTimer(guardStart)
	defer timer.Stop()
	select {
	case w, ok := <-c.words:
		switch {
		case !ok:
			return errors.New("the guard ended at once")
		case w == guardArmed:
			return nil
		}
		return errors.New(strings.TrimPrefix(w, guardError))
	case <-timer.C():
		return fmt.Errorf("the guard was not ready after %s", guardStart)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// disarm tells the guard that the guest runs, and waits for its end.
func (c *guardChild) disarm() error {
	_, werr := io.WriteString(c.in, guardDone+"\n")
	werr = errors.Join(werr, c.in.Close())
	timer := c.p.clock.NewTimer(guardStop)
	defer timer.Stop()
	last := ""
	for {
		select {
		case w, ok := <-c.words:
			if ok {
				last = w
				continue
			}
		case <-timer.C():
			return errors.Join(fmt.Errorf("the guard did not end"), c.kill())
		}
		break
	}
	err := c.cmd.Wait()
	switch {
	case last == guardThawed:
		return errGuardThawed
	case strings.HasPrefix(last, guardFailed):
		return fmt.Errorf("the deadline passed and the guest could not be thawed: %s", strings.TrimPrefix(last, guardFailed))
	case last != guardIdle:
		return errors.Join(errors.New("the guard died"), err, werr)
	}
	return err
}

// kill ends a guard that is of no use.
func (c *guardChild) kill() error {
	_ = c.in.Close()
	if err := c.cmd.Process.Kill(); err != nil {
		return err
	}
	for range c.words { // to the end of its output
	}
	_ = c.cmd.Wait() // killed: its state is no news
	return nil
}

// guardWatch remembers whether the guard had to act.
type guardWatch struct {
	backup.Guard
	thawed bool
}

// Arm implements backup.Guard.
func (w *guardWatch) Arm(ctx context.Context, vm hypervisor.VMID, deadline time.Duration) (func() error, error) {
	disarm, err := w.Guard.Arm(ctx, vm, deadline)
	if err != nil {
		return nil, &hintedError{hint: "--no-guard backs up without a guard: should this process be killed, only holdfast recover thaws the guest", err: err}
	}
	return func() error {
		err := disarm()
		w.thawed = w.thawed || errors.Is(err, errGuardThawed)
		return err
	}, nil
}
