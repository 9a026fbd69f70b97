package main

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
)

func TestArmAndDisarm(t *testing.T) {
	p := newProc(t)
	prog := &program{executable: os.Executable, clock: clock.Real()}
	state, err := prog.withEnv(t).stateDir()
	require.NoError(t, err)
	g := newGuard(prog, guardConfig{from: connect.HypervisorConfig{URL: procURL}, stateDir: state})

	disarm, err := g.Arm(t.Context(), "vm-1", time.Hour)
	require.NoError(t, err)
	require.NoError(t, disarm())

	require.NoError(t, os.WriteFile(p.frozen, nil, 0o600))
	disarm, err = g.Arm(t.Context(), "vm-1", time.Millisecond)
	require.NoError(t, err)
	p.soon("the guard thaws", 5*time.Second, func() bool { return !p.exists(p.frozen) })
	require.ErrorIs(t, disarm(), errGuardThawed)

	_, err = g.Arm(t.Context(), "vm-99", time.Hour)
	require.ErrorContains(t, err, "vm-99")
	prog.executable = func() (string, error) { return "/bin/true", nil }
	_, err = g.Arm(t.Context(), "vm-1", time.Hour)
	require.Error(t, err)
}

func (p *program) withEnv(t *testing.T) *program {
	t.Helper()
	p.env = os.Getenv
	return p
}

// scriptedGuard tells what a guard would.
type scriptedGuard struct{ arm, disarm error }

func (g scriptedGuard) Arm(context.Context, hypervisor.VMID, time.Duration) (func() error, error) {
	if g.arm != nil {
		return nil, g.arm
	}
	return func() error { return g.disarm }, nil
}

func TestGuardInABackup(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.addVM(fakes.VMConfig{Name: "web1", Guest: fakes.Guest{Agent: true}})
	g := scriptedGuard{}
	r.guard = func(*program, guardConfig) backup.Guard { return g }
	require.Equal(t, statusSuccess, r.backup("web1").Status)

	g.disarm = errGuardThawed
	d := r.backup("web1")
	require.Equal(t, statusDegraded, d.Status, "a freeze that the guard ended cannot be plain success")
	require.Equal(t, []string{errGuardThawed.Error()}, d.Degraded)

	g.arm = errTest
	p := r.fails(exitFailed, "failed", "backup", "--from", testURL, "--repo", r.repo(), "web1")
	require.Contains(t, p.Hint, "--no-guard")
	require.Empty(t, r.leftovers())
	require.Equal(t, statusSuccess, r.backup("--no-guard", "web1").Status)
	require.Equal(t, statusSuccess, r.backup("--consistency", "crash", "web1").Status)
}

func TestSecondSignalExitsAtOnce(t *testing.T) {
	r := newRig(t, fakes.Options{})
	exited := make(chan int, 1)
	p := &program{stderr: &lineWriter{}, signals: r.signals, exit: func(c int) { exited <- c }, clock: clock.Real()}
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan struct{})
	defer close(done)
	go p.watchSignals(cancel, done)
	r.signals <- os.Interrupt
	<-ctx.Done()
	require.ErrorIs(t, context.Cause(ctx), errInterrupted)
	r.signals <- os.Interrupt
	require.Equal(t, exitInterrupted, <-exited)
}
