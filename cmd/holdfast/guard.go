package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
)

// The guard is a child of a backup that freezes a guest. It speaks over its
// standard streams:
//
//	parent -> guard: one line of JSON (guardHello), then "done", or the end of the
//	                 stream when the parent dies
//	guard -> parent: "armed", or "error: ..."; after "done": "idle", "thawed", or
//	                 "failed: ..."
//
// Once armed it thaws the guest when the stream ends or the deadline passes,
// whichever comes first.
const (
	guardArmed  = "armed"
	guardIdle   = "idle"
	guardThawed = "thawed"
	guardDone   = "done"
	guardError  = "error: "
	guardFailed = "failed: "
)

// guardHello is what the guard needs and nobody else may read.
type guardHello struct {
	Password connect.Secret // of the hypervisor
}

// pipedHello is guardHello on its way through the pipe.
type pipedHello struct {
	Password *string `json:"password,omitempty"`
}

func (h guardHello) encode() ([]byte, error) {
	var piped pipedHello
	if !h.Password.Empty() {
		clear := h.Password.Reveal()
		piped.Password = &clear
	}
	return json.Marshal(piped)
}

func (h *guardHello) decode(line []byte) error {
	var piped pipedHello
	if err := json.Unmarshal(line, &piped); err != nil {
		return errors.New("not a JSON object of a guard") // err may quote it
	}
	if piped.Password != nil {
		h.Password = connect.NewSecret(*piped.Password)
	}
	return nil
}

// Times of the guard.
const (
	guardThawTimeout = 5 * time.Second        // of one attempt
	guardRetry       = 250 * time.Millisecond // between attempts
	guardGiveUp      = 30 * time.Second       // after that recover has to do it
	// guardSettle is how long the guard goes on thawing after a success when its
	// parent is dead: a freeze that the parent had just sent may arrive late.
	guardSettle = time.Second
	// guardWait is how long a guard waits for the one of a dead run to finish, so
	// that the old one cannot thaw what the new run freezes.
	guardWait = 5 * time.Second
)

func (p *program) guardCommand() *cobra.Command {
	var from hypervisorFlags
	var vm string
	var deadline time.Duration
	c := &cobra.Command{
		Use:    "guard --from URL --vm ID --deadline DUR",
		Short:  "Thaw a guest when the pipe on stdin closes or the deadline passes",
		Hidden: true,
		Args:   exactly(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := errors.Join(required(cmd, "from", from.url), required(cmd, "vm", vm)); err != nil {
				return err
			}
			if deadline <= 0 {
				return usage("", fmt.Errorf("--deadline %s is not in the future", deadline))
			}
			return p.guard(cmd.Context(), &from, hypervisor.VMID(vm), deadline)
		},
	}
	from.add(c, "from", fromHelp)
	c.Flags().StringVar(&vm, "vm", "", "`ID` of the virtual machine")
	c.Flags().DurationVar(&deadline, "deadline", 0, "`time` after which the guest is thawed")
	return c
}

// guard is the child. What happens to its parent's terminal does not concern it.
func (p *program) guard(ctx context.Context, from *hypervisorFlags, vm hypervisor.VMID, deadline time.Duration) error {
	p.ignoreSignals()
	ctx = context.WithoutCancel(ctx)
	in := bufio.NewReader(p.stdin)
	g, err := p.armGuard(ctx, in, from, vm)
	if err != nil {
		p.write(p.stdout, []byte(guardError+message(err)+"\n"))
		p.ended(exitFailed)
		return errReported
	}
	defer g.close()
	timer := p.clock.NewTimer(deadline)
	defer timer.Stop()
	p.write(p.stdout, []byte(guardArmed+"\n"))

	heard, stop := context.WithCancel(ctx)
	word := ""
	go func() {
		defer stop()
		word, _ = in.ReadString('\n') // the end of the stream is a word too
	}()
	last := guardIdle
	select {
	case <-timer.C():
		last = g.thaw(heard, 0) // the parent hangs, and the guest must not
		<-heard.Done()
	case <-heard.Done():
	}
	if word != guardDone+"\n" {
		last = g.thaw(ctx, guardSettle) // the parent is dead
	}
	p.write(p.stdout, []byte(last+"\n"))
	return nil
}

// thawer thaws one guest and is patient about it.
type thawer struct {
	p    *program
	cfg  connect.HypervisorConfig
	vm   hypervisor.VMID
	hv   hypervisor.Hypervisor // nil: the connection is lost
	lock io.Closer
}

// armGuard makes everything ready that a thaw needs.
func (p *program) armGuard(ctx context.Context, in *bufio.Reader, from *hypervisorFlags, vm hypervisor.VMID) (*thawer, error) {
	line, err := in.ReadBytes('\n')
	if err != nil {
		return nil, fmt.Errorf("the parent of the guard said nothing: %w", err)
	}
	var hello guardHello
	if err := hello.decode(line); err != nil {
		return nil, fmt.Errorf("the parent of the guard said something else: %w", err)
	}
	g := &thawer{p: p, vm: vm, cfg: from.config(p)}
	g.cfg.Password = func(context.Context) (connect.Secret, error) { return hello.Password, nil }
	if g.lock, err = p.guardLock(ctx, from.url, vm); err != nil {
		return nil, err
	}
	if err := g.connect(ctx); err != nil {
		return nil, errors.Join(err, g.lock.Close())
	}
	if _, ok := g.hv.(hypervisor.Thawer); !ok {
		return nil, errors.Join(fmt.Errorf("guests of %s cannot be thawed: %w", g.hv.Info().Product, errors.ErrUnsupported), g.hv.Close(), g.lock.Close())
	}
	if _, err := g.hv.VM(ctx, vm); err != nil {
		return nil, errors.Join(err, g.hv.Close(), g.lock.Close())
	}
	return g, nil
}

// guardLock waits until no other guard of this host works on the VM.
func (p *program) guardLock(ctx context.Context, url string, vm hypervisor.VMID) (io.Closer, error) {
	state, err := p.stateDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(state, "guard")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	sum := sha256.Sum256([]byte(url + "\x00" + string(vm)))
	name := filepath.Join(dir, hex.EncodeToString(sum[:16])+".lock")
	end := p.clock.Now().Add(guardWait)
	for {
		f, err := tryLockFile(name)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, hypervisor.ErrBusy) {
			return nil, fmt.Errorf("state directory: %w", err)
		}
		if !p.clock.Now().Before(end) {
			return nil, fmt.Errorf("the guard of an earlier run is still thawing the guest: %w", err)
		}
		if err := clock.Sleep(ctx, p.clock, guardRetry/5); err != nil {
			return nil, err
		}
	}
}

func (g *thawer) connect(ctx context.Context) (err error) {
	ctx, cancel := clock.WithTimeout(ctx, g.p.clock, 2*guardThawTimeout)
	defer cancel()
	g.hv, err = g.p.connect.Hypervisor(ctx, g.cfg)
	return err
}

// thaw thaws until it was seen to work and settle has passed since. It returns
// what to tell the parent.
func (g *thawer) thaw(ctx context.Context, settle time.Duration) string {
	start := g.p.clock.Now()
	end := start.Add(guardGiveUp)
	for {
		// An attempt is not broken off: its outcome would be unknown.
		err := g.once(context.WithoutCancel(ctx))
		now := g.p.clock.Now()
		switch {
		case err == nil && now.Sub(start) >= settle:
			return guardThawed
		case err != nil && !now.Before(end):
			return guardFailed + message(err)
		}
		if clock.Sleep(ctx, g.p.clock, guardRetry) != nil {
			return guardFailed + message(errors.Join(err, errors.New("the parent took over")))
		}
	}
}

func (g *thawer) once(ctx context.Context) error {
	if g.hv == nil {
		if err := g.connect(ctx); err != nil {
			return err
		}
	}
	tctx, cancel := clock.WithTimeout(ctx, g.p.clock, guardThawTimeout)
	defer cancel()
	err := hypervisor.Thaw(tctx, g.hv, g.vm)
	if errors.Is(err, hypervisor.ErrNotFound) {
		return nil // there is no such guest any more
	}
	if errors.Is(err, hypervisor.ErrUnavailable) {
		_ = g.hv.Close() // it is lost: the next attempt connects anew
		g.hv = nil
	}
	return err
}

func (g *thawer) close() {
	if g.hv != nil {
		_ = g.hv.Close() // the process ends
	}
	_ = g.lock.Close()
}
