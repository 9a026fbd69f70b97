package kvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// startPaused starts a domain that is off, without running its CPUs, and notes
// that in the domain first, so that another process can undo it. stop destroys it
// again.
func (d *Driver) startPaused(ctx context.Context, m *machine, run string) (stop func(context.Context) error, err error) {
	switch {
	case m.saved:
		return nil, &hypervisor.Error{
			Op: "start paused", Platform: hypervisor.KVM, VM: m.ID,
			Hint: "start the VM, or remove its saved state",
			Err:  fmt.Errorf("the VM is suspended to disk, and starting it would use up the saved state: %w", errors.ErrUnsupported),
		}
	case m.Incomplete:
		return nil, fmt.Errorf("the VM is incomplete: %w", hypervisor.ErrBusy)
	}
	uuid, clean := m.UUID, m.reason == shutoffShutdown
	undo := func(ctx context.Context) error { return d.stopStarted(ctx, uuid, run, clean) }
	if err := d.editNotes(ctx, uuid, affectConfig, func(n *notes) { n.Started = &runNote{Run: run} }); err != nil {
		return nil, err
	}
	if err := d.conn.start(ctx, uuid, startPaused); err != nil {
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
		defer cancel()
		return nil, errors.Join(fmt.Errorf("start the VM paused: %w", err), undo(cctx))
	}
	return undo, nil
}

// stopStarted stops a domain that a run started and removes the note. A domain
// whose CPUs somebody has let run since then is in use: it is left alone.
func (d *Driver) stopStarted(ctx context.Context, uuid, run string, clean bool) error {
	state, _, err := d.conn.state(ctx, uuid)
	if errors.Is(err, hypervisor.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if state == statePaused {
		n, err := d.readNotes(ctx, uuid, 0)
		if err != nil {
			return err
		}
		if n.Started != nil && n.Started.Run == run {
			if err := d.stop1(ctx, uuid, clean); err != nil {
				return err
			}
		}
	}
	return d.editNotes(ctx, uuid, affectLive|affectConfig, func(n *notes) {
		if n.Started != nil && n.Started.Run == run {
			n.Started = nil
		}
	})
}

// endTime is how long QEMU may take to end by itself before it is destroyed.
const endTime = 10 * time.Second

// endCleanly are the monitor commands that end QEMU so that libvirt records a
// shutdown. A reset that is to end in a shutdown (QEMU 6.0 or later) leaves QEMU
// standing, libvirt being the one to end it once it has seen the event. After quit
// QEMU closes its monitor at once, with the end of the command line unread: what
// libvirt (9.0) has not yet read of the answer and the event is lost with it, and it
// may call the domain crashed.
var endCleanly = [][]string{
	{`{"execute":"set-action","arguments":{"reboot":"shutdown"}}`, `{"execute":"system_reset"}`},
	{`{"execute":"quit"}`},
}

// stop1 ends QEMU. A guest that had shut down cleanly is still one afterwards: the
// reason that libvirt keeps is the one of a shutdown, not of a destroyed domain, so
// that the next backup knows it too.
func (d *Driver) stop1(ctx context.Context, uuid string, clean bool) error {
	if clean && d.shutDown1(ctx, uuid) {
		return nil
	}
	err := d.conn.destroy(ctx, uuid)
	if virCode(err) == virOperationInvalid || errors.Is(err, hypervisor.ErrNotFound) {
		return nil // it does not run
	}
	return err
}

// shutDown1 reports whether QEMU ended after it was told to.
func (d *Driver) shutDown1(ctx context.Context, uuid string) bool {
	for _, commands := range endCleanly {
		var err error
		for _, c := range commands {
			if err == nil {
				_, err = d.conn.monitor(ctx, uuid, c)
			}
		}
		// The loss of an answer (a system error) is none of the command.
		if err == nil || virCode(err) == virSystemError {
			wctx, cancel := context.WithTimeout(ctx, endTime)
			defer cancel()
			return d.waitState(wctx, uuid, func(s int) bool { return !active(s) }) == nil
		}
	}
	return false
}

// pollPause is the pause between looks at a state that libvirt is bringing about.
const pollPause = 20 * time.Millisecond

// waitState waits until the state of a domain satisfies ok.
func (d *Driver) waitState(ctx context.Context, uuid string, ok func(state int) bool) error {
	for {
		state, _, err := d.conn.state(ctx, uuid)
		if err != nil {
			return err
		}
		if ok(state) {
			return nil
		}
		if err := d.cfg.Sleep(ctx, pollPause); err != nil {
			return err
		}
	}
}

// offlineLevel is the consistency of a domain that is off, by what ended it.
func offlineLevel(reason int) (hypervisor.Consistency, string) {
	switch reason {
	case shutoffShutdown:
		return hypervisor.ApplicationConsistent, ""
	case shutoffDestroyed:
		return hypervisor.CrashConsistent, "the VM is off because it was destroyed, not shut down"
	case shutoffCrashed, shutoffFailed:
		return hypervisor.CrashConsistent, "the VM is off because it crashed"
	case shutoffSnapshot:
		return hypervisor.CrashConsistent, "the VM was reverted to a snapshot"
	case shutoffMigrated:
		return hypervisor.CrashConsistent, "the VM was migrated away"
	}
	return hypervisor.CrashConsistent, "the VM is off and the daemon does not know how it was shut down"
}

// refToken is the opaque part of a SnapshotRef.
type refToken struct {
	Version  int                 `json:"v"`
	Started  bool                `json:"started,omitempty"` // the domain was off
	Clean    bool                `json:"clean,omitempty"`   // and had shut down cleanly
	Achieved hypervisor.Achieved `json:"achieved"`
	Since    []sinceToken        `json:"since,omitempty"`
}

// sinceToken remembers the verdict on one baseline.
type sinceToken struct {
	Baseline hypervisor.Baseline `json:"baseline"`
	Reason   hypervisor.Reason   `json:"reason,omitempty"` // empty: valid
	Detail   string              `json:"detail,omitempty"`
}

func (t refToken) encode() string {
	b, err := json.Marshal(t)
	if err != nil {
		return "" // cannot be: the type holds plain values
	}
	return string(b)
}
