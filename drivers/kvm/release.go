package kvm

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// Release ends the job and removes its files, keeps or deletes the new
// checkpoint, and stops a domain that was started for the job. What failed is
// tried again by the next Release.
func (s *snapshot) Release(ctx context.Context, keep []hypervisor.DiskID) error {
	if err := s.lock.acquire(ctx); err != nil {
		return s.fail("Release", "", err)
	}
	defer s.lock.release()
	if s.end() {
		return nil
	}
	err := s.d.dismantle(ctx, s.uuid, s.name, keep)
	if s.started && (err == nil || ctx.Err() == nil) {
		err = errors.Join(err, s.d.stopStarted(ctx, s.uuid, s.name, s.clean))
	}
	if err != nil {
		return fail("Release", s.vm.ID, "", hypervisor.Hint(err), err)
	}
	s.mu.Lock()
	s.released = true
	s.mu.Unlock()
	return nil
}

// end stops the guard and closes the readers: QEMU's NBD server must not be
// stopped under connected clients. It reports whether the snapshot was released
// already.
func (s *snapshot) end() bool {
	s.mu.Lock()
	if s.released {
		s.mu.Unlock()
		return true
	}
	if s.cause == nil {
		s.cause = fmt.Errorf("the snapshot was released: %w", hypervisor.ErrNotFound)
	}
	readers := s.readers
	s.readers = nil
	stop := s.stop
	s.mu.Unlock()
	if stop != nil {
		stop()
	}
	for r := range readers {
		_ = r.client.Close()
	}
	return false
}

// dismantle ends the job of a run, removes its files, and decides about its
// checkpoint: disks in keep keep their baseline. It is idempotent.
func (d *Driver) dismantle(ctx context.Context, uuid, name string, keep []hypervisor.DiskID) error {
	gone, err := d.endJob(ctx, uuid, name)
	if err != nil {
		return err
	}
	err = d.removeFiles(name, uuid)
	if gone {
		return err
	}
	err = errors.Join(err, d.editNotes(ctx, uuid, affectLive, func(n *notes) {
		if n.Snapshot != nil && n.Snapshot.Run == name {
			n.Snapshot = nil
		}
	}))
	ferr := d.forget(ctx, uuid, name, func(disk string) bool { return !slices.Contains(keep, hypervisor.DiskID(disk)) })
	if errors.Is(ferr, hypervisor.ErrNotFound) && ctx.Err() == nil {
		ferr = nil // no disk is tracked, or it is deleted already
	}
	if err = errors.Join(err, ferr); err != nil {
		return err
	}
	// A process that was killed may have left its call to begin the job with
	// libvirt, which had not come to it when this began to look.
	j, err := d.job(ctx, uuid)
	switch {
	case errors.Is(err, hypervisor.ErrNotFound):
		return nil
	case err != nil:
		return err
	case j != nil && j.owner(uuid) == name:
		return d.dismantle(ctx, uuid, name, keep)
	}
	return nil
}

// endJob aborts the backup job of a run and waits until it is gone. Aborting is
// the normal end of a job in pull mode. domainGone: there is no such domain.
func (d *Driver) endJob(ctx context.Context, uuid, name string) (domainGone bool, err error) {
	aborted := false
	for {
		j, err := d.job(ctx, uuid)
		switch {
		case errors.Is(err, hypervisor.ErrNotFound):
			return true, nil
		case err != nil:
			return false, err
		case j == nil || j.owner(uuid) != name:
			return false, nil
		}
		if !aborted {
			err := d.conn.abortJob(ctx, uuid)
			if err != nil && virCode(err) != virOperationInvalid {
				return false, err
			}
			aborted = true
		}
		if err := d.cfg.Sleep(ctx, pollPause); err != nil {
			return false, err
		}
	}
}

// Snapshots lists unreleased snapshots of any process: jobs of ours, domains that
// are still started for one, and scratch files whose job is gone.
func (d *Driver) Snapshots(ctx context.Context, id hypervisor.VMID) iter.Seq2[hypervisor.SnapshotRef, error] {
	return func(yield func(hypervisor.SnapshotRef, error) bool) {
		m, err := d.inventory(ctx, string(id), false)
		var names []string
		if err == nil {
			names, err = d.unreleased(ctx, m)
		}
		if err != nil {
			yield(hypervisor.SnapshotRef{}, fail("Snapshots", id, "", "", err))
			return
		}
		for _, name := range names {
			t := refToken{
				Version: 1, Started: m.notes.Started != nil && m.notes.Started.Run == name,
				Achieved: hypervisor.Achieved{AcrossDisks: true, Means: "unknown", Reason: "found, not created, by this process"},
			}
			ref := hypervisor.SnapshotRef{Platform: hypervisor.KVM, VM: m.ID, Name: name, Token: t.encode()}
			if n := m.notes.Snapshot; n != nil && n.Run == name {
				ref.Token = n.Token // complete: the snapshot can be resumed
			}
			if !yield(ref, nil) {
				return
			}
		}
	}
}

// unreleased returns the owner names of what runs have left on a domain.
func (d *Driver) unreleased(ctx context.Context, m *machine) ([]string, error) {
	if !d.ep.local {
		return nil, nil
	}
	var names []string
	add := func(name string) {
		if hypervisor.IsOurs(name) && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	if m.active() {
		name, err := d.pendingName(ctx, m.UUID)
		if err != nil {
			return nil, err
		}
		add(name)
	}
	if n := m.notes.Started; n != nil {
		add(n.Run)
	}
	files, err := d.leftovers(m.UUID)
	if err != nil {
		return nil, err
	}
	for _, name := range files {
		add(name)
	}
	return names, nil
}
