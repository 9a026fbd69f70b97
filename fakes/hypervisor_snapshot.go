package fakes

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// snapState is a snapshot on the platform. Its fields are guarded by World.mu;
// what a frozenDisk holds never changes.
type snapState struct {
	name, token string
	def         *hypervisor.VM
	disks       map[hypervisor.DiskID]*frozenDisk
	achieved    hypervisor.Achieved
	taken       bool // it is on the platform; before that its name is reserved
	gone        atomic.Bool
}

// frozenDisk is a disk at the instant of a snapshot.
type frozenDisk struct {
	img      *image
	changes  map[hypervisor.Baseline]changeSet
	baseline hypervisor.Baseline // zero: not tracked
}

type changeSet struct {
	extents []hypervisor.Extent
	err     error
}

// snapshot is a connection's view of a snapState.
type snapshot struct {
	h  *Hypervisor
	s  *snapState
	vm hypervisor.VMID
}

// streamSnapshot is a snapshot of a platform with a sequential transport.
type streamSnapshot struct{ *snapshot }

var (
	_ hypervisor.Snapshot = (*snapshot)(nil)
	_ hypervisor.Streamer = streamSnapshot{}
)

// attach makes the view that fits the platform.
func (h *Hypervisor) attach(s *snapState) hypervisor.Snapshot {
	v := &snapshot{h: h, s: s, vm: s.def.ID}
	if h.world.opts.Sequential {
		return streamSnapshot{v}
	}
	return v
}

// OpenSnapshot implements hypervisor.Hypervisor.
func (h *Hypervisor) OpenSnapshot(ctx context.Context, ref hypervisor.SnapshotRef) (hypervisor.Snapshot, error) {
	if err := h.begin(ctx, Call{Op: OpOpenSnapshot, VM: ref.VM, Name: ref.Name}); err != nil {
		return nil, err
	}
	w := h.world
	w.mu.Lock()
	defer w.mu.Unlock()
	v, _, err := w.find(ref.VM, "")
	if err != nil {
		return nil, fail("OpenSnapshot", ref.VM, "", err)
	}
	s := v.snaps[ref.Name]
	switch {
	case ref.Platform != hypervisor.Fake || s == nil || !s.taken || s.token != ref.Token:
		return nil, fail("OpenSnapshot", ref.VM, "", fmt.Errorf("snapshot %s: %w", ref.Name, hypervisor.ErrNotFound))
	case !hypervisor.IsOurs(s.name):
		return nil, fail("OpenSnapshot", ref.VM, "", fmt.Errorf("snapshot %s: %w", ref.Name, hypervisor.ErrNotOurs))
	}
	return h.attach(s), nil
}

// Snapshots implements hypervisor.Hypervisor.
func (h *Hypervisor) Snapshots(ctx context.Context, id hypervisor.VMID) iter.Seq2[hypervisor.SnapshotRef, error] {
	return func(yield func(hypervisor.SnapshotRef, error) bool) {
		refs, err := h.snapshotRefs(ctx, id)
		if err != nil {
			yield(hypervisor.SnapshotRef{}, err)
			return
		}
		for _, ref := range refs {
			if err := ctx.Err(); err != nil {
				yield(hypervisor.SnapshotRef{}, fail("Snapshots", id, "", err))
				return
			}
			if !yield(ref, nil) {
				return
			}
		}
	}
}

func (h *Hypervisor) snapshotRefs(ctx context.Context, id hypervisor.VMID) ([]hypervisor.SnapshotRef, error) {
	if err := h.begin(ctx, Call{Op: OpSnapshots, VM: id}); err != nil {
		return nil, err
	}
	w := h.world
	w.mu.Lock()
	defer w.mu.Unlock()
	v, _, err := w.find(id, "")
	if err != nil {
		return nil, fail("Snapshots", id, "", err)
	}
	var refs []hypervisor.SnapshotRef
	for _, name := range slices.Sorted(maps.Keys(v.snaps)) {
		if s := v.snaps[name]; hypervisor.IsOurs(name) && s.taken {
			refs = append(refs, hypervisor.SnapshotRef{Platform: hypervisor.Fake, VM: id, Name: name, Token: s.token})
		}
	}
	return refs, nil
}

// Baselines implements hypervisor.Hypervisor.
func (h *Hypervisor) Baselines(ctx context.Context, id hypervisor.VMID) iter.Seq2[hypervisor.Baseline, error] {
	return func(yield func(hypervisor.Baseline, error) bool) {
		list, err := h.baselineList(ctx, id)
		if err != nil {
			yield(hypervisor.Baseline{}, err)
			return
		}
		for _, b := range list {
			if err := ctx.Err(); err != nil {
				yield(hypervisor.Baseline{}, fail("Baselines", id, "", err))
				return
			}
			if !yield(b, nil) {
				return
			}
		}
	}
}

func (h *Hypervisor) baselineList(ctx context.Context, id hypervisor.VMID) ([]hypervisor.Baseline, error) {
	if err := h.begin(ctx, Call{Op: OpBaselines, VM: id}); err != nil {
		return nil, err
	}
	w := h.world
	w.mu.Lock()
	defer w.mu.Unlock()
	v, _, err := w.find(id, "")
	if err != nil {
		return nil, fail("Baselines", id, "", err)
	}
	return v.baselines(), nil
}

// baselines lists what is kept and not part of an unreleased snapshot.
func (v *vmState) baselines() []hypervisor.Baseline {
	var list []hypervisor.Baseline
	for _, set := range v.anchors {
		if !set.pending {
			list = slices.AppendSeq(list, maps.Values(set.disks))
		}
	}
	slices.SortFunc(list, func(a, b hypervisor.Baseline) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return strings.Compare(string(a.Disk), string(b.Disk))
	})
	return list
}

// ForgetBaseline implements hypervisor.Hypervisor.
func (h *Hypervisor) ForgetBaseline(ctx context.Context, b hypervisor.Baseline) error {
	if err := h.begin(ctx, Call{Op: OpForgetBaseline, VM: b.VM, Disk: b.Disk, Name: b.Name}); err != nil {
		return err
	}
	if !hypervisor.IsOurs(b.Name) {
		return fail("ForgetBaseline", b.VM, b.Disk, fmt.Errorf("%q: %w", b.Name, hypervisor.ErrNotOurs))
	}
	w := h.world
	w.mu.Lock()
	defer w.mu.Unlock()
	v := w.vms[b.VM]
	if v == nil {
		return nil
	}
	set := v.anchors[b.Name]
	if set == nil || set.disks[b.Disk] != b {
		return nil
	}
	delete(set.disks, b.Disk)
	if len(set.disks) == 0 {
		delete(v.anchors, b.Name)
	}
	return nil
}

// Ref implements hypervisor.Snapshot.
func (s *snapshot) Ref() hypervisor.SnapshotRef {
	return hypervisor.SnapshotRef{Platform: hypervisor.Fake, VM: s.vm, Name: s.s.name, Token: s.s.token}
}

// VM implements hypervisor.Snapshot.
func (s *snapshot) VM() *hypervisor.VM {
	s.h.world.mu.Lock()
	defer s.h.world.mu.Unlock()
	return cloneVM(s.s.def)
}

func cloneVM(vm *hypervisor.VM) *hypervisor.VM {
	c := *vm
	c.Disks = slices.Clone(vm.Disks)
	c.NICs = slices.Clone(vm.NICs)
	c.Tags = maps.Clone(vm.Tags)
	c.Hardware.Boot = slices.Clone(vm.Hardware.Boot)
	c.Native.Data = slices.Clone(vm.Native.Data)
	c.Attachments = slices.Clone(vm.Attachments)
	return &c
}

// Consistency implements hypervisor.Snapshot.
func (s *snapshot) Consistency() hypervisor.Achieved {
	s.h.world.mu.Lock()
	defer s.h.world.mu.Unlock()
	return s.s.achieved
}

// begin reports a call on the snapshot and refuses it when the snapshot is gone.
func (s *snapshot) begin(ctx context.Context, op Op, disk hypervisor.DiskID) error {
	if err := s.h.begin(ctx, Call{Op: op, VM: s.vm, Disk: disk, Name: s.s.name}); err != nil {
		return err
	}
	if s.s.gone.Load() {
		return fail(string(op), s.vm, disk, fmt.Errorf("snapshot %s: %w", s.s.name, hypervisor.ErrNotFound))
	}
	return nil
}

// frozen returns a disk that is part of the snapshot.
func (s *snapshot) frozen(op Op, disk hypervisor.DiskID) (*frozenDisk, error) {
	s.h.world.mu.Lock()
	defer s.h.world.mu.Unlock()
	if f := s.s.disks[disk]; f != nil {
		return f, nil
	}
	why := "no such disk"
	if d := s.s.def.Disk(disk); d != nil {
		why = "not part of the snapshot: " + string(d.Reason)
	}
	return nil, fail(string(op), s.vm, disk, fmt.Errorf("%s: %w", why, hypervisor.ErrNotFound))
}

// Baseline implements hypervisor.Snapshot.
func (s *snapshot) Baseline(disk hypervisor.DiskID) (hypervisor.Baseline, error) {
	if err := s.begin(context.Background(), OpBaseline, disk); err != nil {
		return hypervisor.Baseline{}, err
	}
	f, err := s.frozen(OpBaseline, disk)
	if err == nil && f.baseline != (hypervisor.Baseline{}) {
		return f.baseline, nil
	}
	if d := s.VM().Disk(disk); d != nil {
		err = fail(string(OpBaseline), s.vm, disk, &hypervisor.BaselineError{Reason: d.Reason})
	}
	return hypervisor.Baseline{}, err
}

// Release implements hypervisor.Snapshot.
func (s *snapshot) Release(ctx context.Context, keep []hypervisor.DiskID) error {
	if err := s.h.begin(ctx, Call{Op: OpRelease, VM: s.vm, Name: s.s.name}); err != nil {
		return err
	}
	w := s.h.world
	w.mu.Lock()
	defer w.mu.Unlock()
	if s.s.gone.Swap(true) {
		return nil
	}
	for x := range w.open {
		if x.snap == s.s {
			w.drop(x)
		}
	}
	v := w.vms[s.vm]
	if v == nil || v.snaps[s.s.name] != s.s {
		return nil
	}
	delete(v.snaps, s.s.name)
	set := v.anchors[s.s.name]
	if set == nil {
		return nil
	}
	set.pending = false
	maps.DeleteFunc(set.disks, func(d hypervisor.DiskID, _ hypervisor.Baseline) bool { return !slices.Contains(keep, d) })
	if len(set.disks) == 0 {
		delete(v.anchors, s.s.name)
	}
	return nil
}
