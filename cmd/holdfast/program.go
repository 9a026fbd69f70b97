package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/term"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/repository"
)

// program is one invocation of the command and everything that it touches of the
// process around it, so that tests can run it without one.
type program struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	env            func(string) string
	terminal       func(any) bool // is a stream a terminal?
	prompt         func(what string) (string, error)
	signals        <-chan os.Signal
	ignoreSignals  func()
	exit           func(int) // of the process, at once
	executable     func() (string, error)
	connect        connector
	clock          clock.Clock
	newGuard       func(*program, guardConfig) backup.Guard

	json, events bool
	stateFlag    string

	mu    sync.Mutex // of what follows and of the streams
	worst int
	repoP *connect.Secret // asked for once
}

// connector opens what addresses name.
type connector interface {
	Hypervisor(ctx context.Context, cfg connect.HypervisorConfig) (hypervisor.Hypervisor, error)
	Repository(ctx context.Context, cfg connect.RepositoryConfig) (repository.Repository, error)
	Repair(ctx context.Context, cfg connect.RepositoryConfig, to string) (*connect.RepairReport, error)
}

// drivers is the connector of the real world.
type drivers struct{}

func (drivers) Hypervisor(ctx context.Context, cfg connect.HypervisorConfig) (hypervisor.Hypervisor, error) {
	return connect.Hypervisor(ctx, cfg)
}

func (drivers) Repository(ctx context.Context, cfg connect.RepositoryConfig) (repository.Repository, error) {
	return connect.Repository(ctx, cfg)
}

func (drivers) Repair(ctx context.Context, cfg connect.RepositoryConfig, to string) (*connect.RepairReport, error) {
	return connect.Repair(ctx, cfg, to)
}

// system is the program as the operating system started it.
func system() *program {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	return &program{
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr,
		env: os.Getenv, terminal: isTerminal, prompt: promptOnTerminal,
		signals: signals, ignoreSignals: ignoreSignals, exit: os.Exit, executable: os.Executable,
		connect: drivers{}, clock: clock.Real(), newGuard: newGuard,
	}
}

func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// errInterrupted is the cause of the context after the first signal.
var errInterrupted = errors.New("interrupted")

// errReported ends a command that has told its failure already.
var errReported = errors.New("reported")

// run runs one command and returns the exit code.
func (p *program) run(ctx context.Context, args []string) int {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan struct{})
	defer close(done)
	go p.watchSignals(cancel, done)

	root := p.root()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err != nil && !errors.Is(err, errReported) {
		p.fail(ctx, err)
	}
	return p.worst
}

// watchSignals cancels at the first signal, so that everything is cleaned up, and
// exits at the second.
func (p *program) watchSignals(cancel context.CancelCauseFunc, done <-chan struct{}) {
	for n := 0; ; n++ {
		select {
		case <-done:
			return
		case <-p.signals:
		}
		if n > 0 {
			p.exit(exitInterrupted)
			return
		}
		cancel(errInterrupted)
		p.note("interrupted: cleaning up; once more stops at once, and leaves the rest to holdfast recover")
	}
}

// fail reports an error that ends the command.
func (p *program) fail(ctx context.Context, err error) {
	pr := explain(ctx, err)
	p.ended(pr.exit())
	if p.json {
		p.emit(failure{Status: statusFailed, Error: pr})
	}
	p.complain(pr)
}

// ended remembers how a part of the command ended: the worst counts.
func (p *program) ended(code int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if severity(code) > severity(p.worst) {
		p.worst = code
	}
}

// lines splits a text for a person into lines that are not empty.
func lines(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' })
}

// promptOnTerminal asks for a secret on the terminal that the program runs in.
func promptOnTerminal(what string) (string, error) {
	if !isTerminal(os.Stdin) || !isTerminal(os.Stderr) {
		return "", errNoTerminal
	}
	fmt.Fprint(os.Stderr, what+": ")
	b, err := term.ReadPassword(int(os.Stdin.Fd()))
	fmt.Fprintln(os.Stderr)
	return string(b), err
}

var errNoTerminal = errors.New("no terminal to ask on")
