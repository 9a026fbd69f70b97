package kvm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

const (
	// thawTimeout bounds the first attempts to thaw, thawRetry is the pause
	// between attempts, thawPatience how long they go on in the background.
	thawTimeout  = 4 * time.Second
	thawRetry    = 500 * time.Millisecond
	thawPatience = 10 * time.Minute
	// thawMargin is how long before the deadline the thaw is issued.
	thawMargin = time.Second
)

// frozen is a guest that was told to freeze. Whatever happens, it is thawed
// before the deadline, which counts from the moment the freeze was issued.
type frozen struct {
	d     *Driver
	uuid  string
	run   string
	start time.Time
	// budget is the longest time that the guest may be frozen.
	budget time.Duration

	stopTimer context.CancelFunc
	once      sync.Once
	done      chan struct{} // closed when the thaw was attempted
	thawErr   error         // set before done is closed: the guest was not seen thawed
	took      time.Duration // from issuing the freeze to being thawed
}

// freeze tells the guest to freeze its file systems. The guest counts as frozen
// from then on, also when an error is returned with it: the caller must thaw it.
// A nil *frozen means that nothing was sent.
func (d *Driver) freeze(ctx context.Context, uuid, run string, budget time.Duration) (*frozen, error) {
	// The note comes first: whoever finds it knows that the guest may be frozen.
	err := d.editNotes(ctx, uuid, affectLive, func(n *notes) { n.Freeze = &runNote{Run: run} })
	if err != nil {
		return nil, err
	}
	f := &frozen{d: d, uuid: uuid, run: run, start: d.cfg.Clock(), budget: budget, done: make(chan struct{})}
	tctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	f.stopTimer = cancel
	go func() {
		if d.cfg.Sleep(tctx, max(budget-thawMargin, budget/2)) == nil {
			_ = f.thaw() // its outcome is kept in f, where the snapshot asks for it
		}
	}()
	// Not only the guest's file systems have to be frozen within the budget, also
	// the snapshot has to be made.
	fctx, cancel := context.WithTimeout(ctx, budget*5/8)
	defer cancel()
	var count int
	if err := d.agentCall(fctx, uuid, "guest-fsfreeze-freeze", &count); err != nil {
		if ctx.Err() == nil && (errors.Is(err, context.DeadlineExceeded) || agentSilent(err)) {
			return f, fmt.Errorf("%w: no answer within %s: %w", hypervisor.ErrQuiesceTimeout, budget*5/8, err)
		}
		return f, fmt.Errorf("%w: %w", hypervisor.ErrQuiesce, err)
	}
	if count == 0 {
		return f, fmt.Errorf("%w: the guest has no file system that can be frozen", hypervisor.ErrQuiesce)
	}
	return f, nil
}

// still returns nil if the guest says that it is frozen: proof that it has been
// since the freeze, also where guests thaw by themselves.
func (f *frozen) still(ctx context.Context) error {
	select {
	case <-f.done:
		return errors.New("it was thawed by the deadline")
	default:
	}
	left := f.budget - f.d.cfg.Clock().Sub(f.start)
	if left < thawMargin {
		return errors.New("the deadline has come")
	}
	ctx, cancel := context.WithTimeout(ctx, left-thawMargin/2)
	defer cancel()
	var status string
	if err := f.d.agentCall(ctx, f.uuid, "guest-fsfreeze-status", &status); err != nil {
		return err
	}
	if status != "frozen" {
		return fmt.Errorf("its file systems are %q", status)
	}
	return nil
}

// thaw thaws the guest and waits until it was seen thawed or the attempts are
// over; it is safe to call from several goroutines. After a failure attempts go
// on in the background.
func (f *frozen) thaw() error {
	f.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), thawTimeout)
		defer cancel()
		f.thawErr = f.d.thawUntil(ctx, f.uuid)
		f.took = f.d.cfg.Clock().Sub(f.start)
		f.stopTimer()
		if f.thawErr != nil {
			f.d.background(func(ctx context.Context) {
				ctx, cancel := context.WithTimeout(ctx, thawPatience)
				defer cancel()
				if f.d.thawUntil(ctx, f.uuid) == nil {
					f.d.cfg.Logger.WarnContext(ctx, "guest thawed late", "vm", f.uuid)
				}
			})
		}
		close(f.done)
	})
	<-f.done
	return f.thawErr
}

// thawUntil tries until the guest says that it is thawed, or ctx ends.
func (d *Driver) thawUntil(ctx context.Context, uuid string) error {
	for {
		err := d.thawOnce(ctx, uuid)
		if err == nil {
			return nil
		}
		if serr := d.cfg.Sleep(ctx, thawRetry); serr != nil {
			return fmt.Errorf("%w: %w", hypervisor.ErrThawPending, err)
		}
	}
}

// thawOnce thaws, and believes only the guest's own word that it is thawed. A
// domain that does not run is thawed.
func (d *Driver) thawOnce(ctx context.Context, uuid string) error {
	state, _, err := d.conn.state(ctx, uuid)
	if errors.Is(err, hypervisor.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if !active(state) {
		return nil
	}
	actx, cancel := context.WithTimeout(ctx, thawTimeout)
	defer cancel()
	if err := d.agentCall(actx, uuid, "guest-fsfreeze-thaw", nil); err != nil && !answered(err) {
		return err
	}
	var status string
	if err := d.agentCall(actx, uuid, "guest-fsfreeze-status", &status); err != nil {
		return err
	}
	if status != "thawed" {
		return fmt.Errorf("the guest says that its file systems are %q", status)
	}
	return d.editNotes(ctx, uuid, affectLive, func(n *notes) { n.Freeze = nil })
}

// Thaw thaws the guest of a domain if a run of Holdfast may have frozen it. A nil
// error means that the guest was seen thawed, is not running, has no agent
// channel, or was not told to freeze and has no agent that answers.
func (d *Driver) Thaw(ctx context.Context, id hypervisor.VMID) error {
	m, err := d.inventory(ctx, string(id), false)
	if errors.Is(err, hypervisor.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fail("Thaw", id, "", "", err)
	}
	present, state := agentChannel(m.dom)
	if !m.active() || !present || m.notes.Freeze == nil && state != "connected" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*thawTimeout)
	defer cancel()
	if err := d.thawUntil(ctx, m.UUID); err != nil {
		return fail("Thaw", id, "", "see that qemu-guest-agent runs in the guest, or restart the guest", err)
	}
	return nil
}
