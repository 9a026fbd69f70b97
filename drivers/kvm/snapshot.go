package kvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// snapshot is a running backup job.
type snapshot struct {
	d        *Driver
	vm       *hypervisor.VM
	uuid     string
	name     string
	socket   string
	achieved hypervisor.Achieved
	disks    map[hypervisor.DiskID]string // in the snapshot; the checkpoint it is read against, "" for none
	since    sinceSet
	cp       *checkpoint // of this instant; nil if no disk is tracked
	started  bool        // the domain was off and was started for the job
	clean    bool        // it had shut down cleanly

	lock semaphore // held by Release

	mu       sync.Mutex
	released bool
	cause    error                // why the job was given up
	readers  map[*reader]struct{} // open ones
	stop     context.CancelFunc
}

var _ hypervisor.Snapshot = (*snapshot)(nil)

func (s *snapshot) Ref() hypervisor.SnapshotRef {
	t := refToken{Version: 1, Started: s.started, Clean: s.clean, Achieved: s.achieved}
	for b, err := range s.since {
		st := sinceToken{Baseline: b}
		if err != nil {
			st.Reason, st.Detail = hypervisor.BaselineReason(err), err.Error()
		}
		t.Since = append(t.Since, st)
	}
	slices.SortFunc(t.Since, func(a, b sinceToken) int {
		return strings.Compare(string(a.Baseline.Disk)+"/"+a.Baseline.Name, string(b.Baseline.Disk)+"/"+b.Baseline.Name)
	})
	return hypervisor.SnapshotRef{Platform: hypervisor.KVM, VM: hypervisor.VMID(s.uuid), Name: s.name, Token: t.encode()}
}

// VM returns a copy: the caller may change it.
func (s *snapshot) VM() *hypervisor.VM {
	vm := *s.vm
	vm.Disks, vm.NICs, vm.Attachments = slices.Clone(vm.Disks), slices.Clone(vm.NICs), slices.Clone(vm.Attachments)
	vm.Tags, vm.Native.Data = maps.Clone(vm.Tags), slices.Clone(vm.Native.Data)
	vm.Hardware.Boot = slices.Clone(vm.Hardware.Boot)
	return &vm
}

func (s *snapshot) Consistency() hypervisor.Achieved { return s.achieved }

// Baseline returns the baseline that the new checkpoint is for a disk.
func (s *snapshot) Baseline(disk hypervisor.DiskID) (hypervisor.Baseline, error) {
	def := s.vm.Disk(disk)
	switch {
	case def == nil:
		return hypervisor.Baseline{}, s.fail("Baseline", disk, hypervisor.ErrNotFound)
	case s.cp == nil || !slices.Contains(s.cp.tracked(), string(disk)):
		reason := def.Reason
		if reason == "" {
			reason = hypervisor.ReasonNeverTracked
		}
		return hypervisor.Baseline{}, s.fail("Baseline", disk, &hypervisor.BaselineError{Reason: reason})
	}
	b, err := baselineOf(s.vm.ID, s.cp, string(disk))
	return b, s.fail("Baseline", disk, err)
}

func (s *snapshot) fail(op string, disk hypervisor.DiskID, err error) error {
	return fail(op, s.vm.ID, disk, "", err)
}

// included checks that a disk is part of the snapshot and can be read.
func (s *snapshot) included(disk hypervisor.DiskID) error {
	def := s.vm.Disk(disk)
	if def == nil {
		return hypervisor.ErrNotFound
	}
	if _, ok := s.disks[disk]; !ok {
		return fmt.Errorf("the disk is not part of the snapshot (%s): %w", def.Reason, errors.ErrUnsupported)
	}
	return s.usable()
}

// usable tells why nothing can be read any more.
func (s *snapshot) usable() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause != nil {
		return s.cause
	}
	if s.released {
		return fmt.Errorf("the snapshot was released: %w", hypervisor.ErrNotFound)
	}
	return nil
}

// OpenSnapshot attaches to the job, or to what is left of it: scratch files
// without a job, or a domain that is still started.
func (d *Driver) OpenSnapshot(ctx context.Context, ref hypervisor.SnapshotRef) (hypervisor.Snapshot, error) {
	s, err := d.attach(ctx, ref)
	if err != nil {
		return nil, fail("OpenSnapshot", ref.VM, "", "", err)
	}
	s.watch()
	return s, nil
}

func (d *Driver) attach(ctx context.Context, ref hypervisor.SnapshotRef) (*snapshot, error) {
	if ref.Platform != hypervisor.KVM || !hypervisor.IsOurs(ref.Name) {
		return nil, fmt.Errorf("%q is not a snapshot of this platform: %w", ref.Name, hypervisor.ErrNotFound)
	}
	if !d.ep.local {
		return nil, d.remoteOnly("OpenSnapshot", ref.VM)
	}
	m, err := d.inventory(ctx, string(ref.VM), false)
	if err != nil {
		return nil, err
	}
	found, err := d.unreleased(ctx, m)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(found, ref.Name) {
		return nil, fmt.Errorf("snapshot %s: %w", ref.Name, hypervisor.ErrNotFound)
	}
	var t refToken
	if err := json.Unmarshal([]byte(ref.Token), &t); err != nil || t.Version != 1 {
		return nil, fmt.Errorf("token of snapshot %s is not ours: %w", ref.Name, hypervisor.ErrNotFound)
	}
	s := &snapshot{
		d: d, vm: m.VM, uuid: m.UUID, name: ref.Name, achieved: t.Achieved, clean: t.Clean,
		started: m.notes.Started != nil && m.notes.Started.Run == ref.Name || t.Started,
		disks:   map[hypervisor.DiskID]string{}, since: sinceSet{}, lock: newSemaphore(),
	}
	if s.started {
		s.vm.Power = hypervisor.PoweredOff
	}
	j, err := d.job(ctx, m.UUID)
	if err != nil {
		return nil, err
	}
	if j == nil || j.owner(m.UUID) != ref.Name {
		s.cause = fmt.Errorf("the backup job has ended, only its remains are here: %w", hypervisor.ErrNotFound)
		return s, nil
	}
	if j.Server != nil {
		s.socket = j.Server.Socket
	}
	for _, b := range j.Disks {
		if b.Backup == "no" {
			continue
		}
		base := b.Incremental
		if b.ExportBitmap != exportBitmap || b.ExportName != b.Name {
			base = ""
		}
		s.disks[hypervisor.DiskID(b.Name)] = base
	}
	for i := range s.vm.Disks {
		disk := &s.vm.Disks[i]
		if _, in := s.disks[disk.ID]; !in && disk.Snapshottable {
			disk.Snapshottable, disk.Tracking = false, hypervisor.TrackingNone
			disk.Reason, disk.Detail = reasonExcluded, "not part of the snapshot"
		}
	}
	for _, st := range t.Since {
		var verdict error
		if st.Reason != "" {
			verdict = &hypervisor.BaselineError{Reason: st.Reason, Err: errors.New(st.Detail)}
		}
		s.since[st.Baseline] = verdict
	}
	s.cp, err = d.checkpoint(ctx, m.UUID, ref.Name)
	if errors.Is(err, hypervisor.ErrNotFound) {
		err = nil
	}
	return s, err
}
