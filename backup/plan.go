package backup

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/manifest"
	"github.com/holdfast-backup/holdfast/repository"
)

// Plan is what a backup would do. A disk planned as incremental turns into a
// full one when the hypervisor no longer knows its baseline at the snapshot.
type Plan struct {
	VM     VMRef
	Chain  string
	Parent repository.PointID // newest restore point, empty if there is none
	Disks  []DiskPlan
	Agent  bool // a guest agent that can quiesce answers
	Notes  []string

	parent *repository.Point
	man    *manifest.Manifest // of parent
	broken error              // why parent cannot be inherited from
	// lies are the disks whose change tracking was caught after parent, and how;
	// stale are notes about such findings that nobody needs any more; oldest is
	// the sequence number of the chain's oldest point.
	lies   map[hypervisor.DiskID]string
	stale  []string
	oldest int64
}

// DiskPlan is what a backup would do about one disk.
type DiskPlan struct {
	ID      hypervisor.DiskID
	Mode    Mode
	Reason  Reason
	Detail  string
	Size    int64 // bytes
	Backing hypervisor.Backing

	blockSize int
	since     *hypervisor.Baseline // for an incremental
}

// Unprotected lists the disks that the plan leaves without protection.
func (p *Plan) Unprotected() []DiskPlan {
	return slices.DeleteFunc(slices.Clone(p.Disks), func(d DiskPlan) bool { return d.Mode != Unprotected })
}

// MakePlan says what a backup of the VM into repo would do now, and why. repo
// may be nil: everything is then a first backup.
func MakePlan(ctx context.Context, hv hypervisor.Hypervisor, repo repository.Repository, id hypervisor.VMID, opts *Options) (*Plan, error) {
	o := opts.withDefaults()
	if err := o.check(); err != nil {
		return nil, err
	}
	vm, err := hv.VM(ctx, id)
	if err != nil {
		return nil, err
	}
	return makePlan(ctx, hv, repo, vm, &o)
}

func makePlan(ctx context.Context, hv hypervisor.Hypervisor, repo repository.Repository, vm *hypervisor.VM, o *Options) (*Plan, error) {
	p := &Plan{
		VM:    VMRef{ID: vm.ID, UUID: vm.UUID, Name: vm.Name},
		Chain: manifest.Chain(hv.Info().Platform, vm),
		Agent: vm.Guest.Agent,
	}
	for _, id := range o.ExcludeDisks {
		if vm.Disk(id) == nil {
			return nil, &hypervisor.Error{Op: "plan", VM: vm.ID, Disk: id, Hint: "see the disks with: holdfast plan", Err: fmt.Errorf("disk to exclude: %w", hypervisor.ErrNotFound)}
		}
	}
	if repo != nil {
		var err error
		if p.parent, err = newest(ctx, repo, p); err != nil {
			return nil, err
		}
	}
	if p.parent != nil {
		man, err := manifest.Parse(p.parent)
		if err != nil {
			p.Notes = append(p.Notes, "earlier point cannot be used as a base: "+err.Error())
		} else {
			p.man, p.Parent = man, p.parent.ID
		}
	}
	if repo != nil {
		if err := p.distrust(ctx, repo); err != nil {
			return nil, err
		}
	}
	kept := map[string]bool{}
	if p.man != nil && hv.Info().Capabilities.Baselines {
		for b, err := range hv.Baselines(ctx, vm.ID) {
			if err != nil {
				return nil, err
			}
			kept[b.Name+"/"+string(b.Disk)] = true
		}
	}
	p.fill(vm, o)
	for i := range p.Disks {
		d := &p.Disks[i]
		if d.Mode == Incremental && hv.Info().Capabilities.Baselines && !kept[d.since.Name+"/"+string(d.ID)] {
			// The platform may still be able to bring it back from the token, so
			// this is a note and not yet a decision.
			d.Detail = "the baseline is not listed on the hypervisor; the disk is read in full unless it can be brought back"
		}
	}
	return p, nil
}

// fill decides about every disk of vm.
func (p *Plan) fill(vm *hypervisor.VM, o *Options) {
	p.Disks = p.Disks[:0]
	for i := range vm.Disks {
		d := planDisk(&vm.Disks[i], p.parent, p.man, o)
		if d.Mode == Incremental && p.broken != nil {
			d.Mode, d.Reason, d.Detail, d.since = Full, hypervisor.ReasonChainUnhealthy, p.broken.Error(), nil
		}
		if why, lied := p.lies[d.ID]; d.Mode == Incremental && lied {
			d.Mode, d.Reason, d.Detail, d.since = Full, ReasonAuditMismatch, why, nil
		}
		p.Disks = append(p.Disks, d)
	}
}

// newest returns the newest committed point of the chain, nil if there is none,
// and notes in p which one is the oldest.
func newest(ctx context.Context, repo repository.Repository, p *Plan) (*repository.Point, error) {
	var found *repository.Point
	p.oldest = math.MaxInt64
	for pt, err := range repo.Points(ctx, repository.Query{Chain: p.Chain}) {
		if err != nil {
			return nil, fmt.Errorf("list restore points of %s: %w", p.VM.Name, err)
		}
		p.oldest = min(p.oldest, pt.Sequence)
		if pt.State != repository.Committed {
			p.Notes = append(p.Notes, fmt.Sprintf("restore point %s is %s: %s", pt.ID, pt.State, pt.Detail))
			continue
		}
		if found == nil || pt.Sequence > found.Sequence {
			found = pt
		}
	}
	return found, nil
}

func planDisk(d *hypervisor.Disk, parent *repository.Point, man *manifest.Manifest, o *Options) DiskPlan {
	p := DiskPlan{ID: d.ID, Size: d.Size, Backing: d.Backing, Detail: d.Detail, blockSize: o.BlockSize}
	full := func(r Reason) DiskPlan {
		p.Mode, p.Reason = Full, r
		return p
	}
	if slices.Contains(o.ExcludeDisks, d.ID) {
		p.Mode, p.Reason, p.Detail = Excluded, ReasonUser, "excluded by request"
		return p
	}
	if !d.Snapshottable {
		p.Mode, p.Reason = exclusion(d.Reason)
		return p
	}
	if man == nil {
		return full(ReasonFirst)
	}
	old, stored := man.Disk(d.ID), parent.Disk(string(d.ID))
	if old == nil || !old.Mode.Stored() || stored == nil {
		return full(ReasonDiskAdded)
	}
	p.blockSize = stored.BlockSize // one size for the life of a chain, so that blocks are found again
	switch {
	case o.Full:
		return full(ReasonRequested)
	case old.Content != d.Content:
		return full(hypervisor.ReasonDiskReplaced)
	case old.Size != d.Size:
		return full(hypervisor.ReasonDiskResized)
	case old.Audit.Lied():
		p.Detail = fmt.Sprintf("the change tracking lied to the run before, which found %d wrong leaves", old.Audit.Wrong)
		return full(ReasonAuditMismatch)
	case d.Tracking == hypervisor.TrackingNone || d.Tracking == "":
		if d.Reason != "" {
			return full(d.Reason)
		}
		return full(hypervisor.ReasonNeverTracked)
	case old.Baseline == nil:
		return full(hypervisor.ReasonNeverTracked)
	}
	p.Mode, p.Reason, p.since = Incremental, ReasonChanged, old.Baseline
	return p
}
