package backup

import (
	"context"
	"errors"
	"fmt"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

func ofRepo(name, repo8 string) bool {
	n, err := hypervisor.ParseName(name)
	return err == nil && n.Repo == repo8
}

// releaseOrphans releases the snapshots that dead runs of this repository left on
// the VM. The run holds the VM's lease, so no other is alive. A run that had
// committed its point keeps its baselines: they are the base of this one.
func (r *run) releaseOrphans(ctx context.Context) error {
	repo8, newest := r.repo.Info().Repo8(), ""
	if r.plan.parent != nil {
		newest = hypervisor.Name{Repo: repo8, Run: r.plan.parent.Run, Kind: snapKind}.String()
	}
	return releaseWhere(ctx, r.hv, r.vm.ID, func(ref hypervisor.SnapshotRef) (release, keep bool) {
		if ref.Name == r.name || !ofRepo(ref.Name, repo8) {
			return false, false
		}
		r.o.Events.notice(r.vm.Name, "releasing the snapshot that an interrupted run left: "+ref.Name)
		return true, ref.Name == newest
	})
}

// releaseNamed releases a snapshot by its name, if it is there.
func releaseNamed(ctx context.Context, hv hypervisor.Hypervisor, vm hypervisor.VMID, name string, keep bool) error {
	return releaseWhere(ctx, hv, vm, func(ref hypervisor.SnapshotRef) (bool, bool) { return ref.Name == name, keep })
}

func releaseWhere(ctx context.Context, hv hypervisor.Hypervisor, vm hypervisor.VMID, match func(hypervisor.SnapshotRef) (release, keep bool)) error {
	type orphan struct {
		ref  hypervisor.SnapshotRef
		keep bool
	}
	var orphans []orphan
	for ref, err := range hv.Snapshots(ctx, vm) {
		if errors.Is(err, hypervisor.ErrNotFound) {
			return nil // the VM is gone, and its snapshots with it
		}
		if err != nil {
			return err
		}
		if release, keep := match(ref); release {
			orphans = append(orphans, orphan{ref, keep})
		}
	}
	for _, o := range orphans {
		snap, err := hv.OpenSnapshot(ctx, o.ref)
		if errors.Is(err, hypervisor.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		var keep []hypervisor.DiskID
		if o.keep {
			keep = allDisks(snap)
		}
		if err := snap.Release(ctx, keep); err != nil {
			return fmt.Errorf("snapshot %s: %w", o.ref.Name, err)
		}
	}
	return nil
}

// allDisks lists the disks of a snapshot. A snapshot that was opened again need not
// know its baselines any more, so all are kept, and reconcile forgets what no
// point stands on.
func allDisks(snap hypervisor.Snapshot) []hypervisor.DiskID {
	var out []hypervisor.DiskID
	for _, d := range snap.VM().Disks {
		out = append(out, d.ID)
	}
	return out
}

// fence fails when the lease under which something is removed was lost: whoever
// has it now may have declared what is to go.
type fence func(context.Context) error

// unfenced is for what is our own by its name, whoever has the lease.
func unfenced(context.Context) error { return nil }

// forgetBaselines removes the baselines of a VM that match, each behind the fence.
func forgetBaselines(ctx context.Context, hv hypervisor.Hypervisor, vm hypervisor.VMID, fence fence, match func(hypervisor.Baseline) bool) error {
	if !hv.Info().Capabilities.Baselines {
		return nil
	}
	var old []hypervisor.Baseline
	for b, err := range hv.Baselines(ctx, vm) {
		if errors.Is(err, hypervisor.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if match(b) {
			old = append(old, b)
		}
	}
	for _, b := range old {
		if err := fence(ctx); err != nil {
			return fmt.Errorf("baseline %s is left alone: %w", b.Name, err)
		}
		if err := hv.ForgetBaseline(ctx, b); err != nil && !errors.Is(err, hypervisor.ErrNotFound) {
			return err
		}
	}
	return nil
}

// forgetOthers removes all baselines of a repository but the declared ones: those
// that its newest point stands on.
func forgetOthers(ctx context.Context, hv hypervisor.Hypervisor, vm hypervisor.VMID, fence fence, repo8 string, declared map[hypervisor.DiskID]hypervisor.Baseline) error {
	return forgetBaselines(ctx, hv, vm, fence, func(b hypervisor.Baseline) bool {
		return ofRepo(b.Name, repo8) && declared[b.Disk].Name != b.Name
	})
}

// ReleaseBaselines drops what backups into a repository keep on the hypervisor
// for a VM; with an empty repo8, of every repository. The next backup of the VM
// reads everything. It returns how many baselines there were.
func ReleaseBaselines(ctx context.Context, hv hypervisor.Hypervisor, vm hypervisor.VMID, repo8 string) (int, error) {
	n := 0
	err := forgetBaselines(ctx, hv, vm, unfenced, func(b hypervisor.Baseline) bool {
		ours := hypervisor.IsOurs(b.Name) && (repo8 == "" || ofRepo(b.Name, repo8))
		if ours {
			n++
		}
		return ours
	})
	return n, err
}
