// Package invariant checks the promise after anything has happened: committed
// points are bit-exact, nothing of ours is left on the hypervisor but declared
// baselines, nobody is frozen, and results are honest. Every suite uses it, from
// the fakes to the lab.
package invariant

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/internal/manifest"
	"github.com/holdfast-backup/holdfast/repository"
)

// Truth is what a disk of a point must hold.
type Truth interface {
	io.ReaderAt
	Size() int64
}

// Claim is what a run said about itself.
type Claim struct {
	Run   string
	Point repository.PointID // empty: the run failed
}

// World is what is checked. Fields that are nil are not.
type World struct {
	Repo       repository.Repository
	Hypervisor hypervisor.Hypervisor
	VMs        []hypervisor.VMID
	Truth      map[repository.PointID]map[hypervisor.DiskID]Truth
	Claims     []Claim
	// Frozen tells whether a guest is frozen; Leftovers is a census of whatever
	// the contract cannot see: sockets, scratch files, readers.
	Frozen    func(context.Context, hypervisor.VMID) (bool, error)
	Leftovers func(context.Context) ([]string, error)
}

// Check returns every violation, joined; nil if there is none.
func Check(ctx context.Context, w World) error {
	var errs []error
	bad := func(inv, format string, args ...any) { errs = append(errs, fmt.Errorf(inv+": "+format, args...)) }
	points := map[repository.PointID]*repository.Point{}
	newest := map[string]*repository.Point{}
	if w.Repo != nil {
		for p, err := range w.Repo.Points(ctx, repository.Query{}) {
			if err != nil {
				bad("I1", "listing of points: %w", err)
				break
			}
			if p.State != repository.Committed {
				bad("I1", "point %s is %s: %s", p.ID, p.State, p.Detail)
				continue
			}
			points[p.ID] = p
			if n := newest[p.Chain]; n == nil || p.Sequence > n.Sequence {
				newest[p.Chain] = p
			}
		}
		for id := range points {
			if err := exact(ctx, w.Repo, id, w.Truth[id]); err != nil {
				bad("I1", "%w", err)
			}
		}
	}
	for _, c := range w.Claims {
		if c.Point != "" && points[c.Point] == nil {
			bad("I5", "run %s reported point %s, which does not exist", c.Run, c.Point)
		}
		if c.Point == "" {
			for _, p := range points {
				if p.Run == c.Run {
					bad("I5", "run %s reported failure, and its point %s exists", c.Run, p.ID)
				}
			}
		}
	}
	if w.Hypervisor != nil {
		if err := nothingLeft(ctx, w, newest); err != nil {
			bad("I2", "%w", err)
		}
	}
	if w.Leftovers != nil {
		left, err := w.Leftovers(ctx)
		if err != nil {
			bad("I2", "census: %w", err)
		}
		for _, l := range left {
			bad("I2", "left over: %s", l)
		}
	}
	for _, vm := range w.VMs {
		if w.Frozen == nil {
			break
		}
		frozen, err := w.Frozen(ctx, vm)
		if err != nil {
			bad("I3", "state of guest %s: %w", vm, err)
		} else if frozen {
			bad("I3", "guest %s is frozen", vm)
		}
	}
	return errors.Join(errs...)
}

// exact reads all disks of a point, compares them with their truth, and with
// their digest trees.
func exact(ctx context.Context, repo repository.Repository, id repository.PointID, truth map[hypervisor.DiskID]Truth) error {
	r, err := repo.Open(ctx, id)
	if err != nil {
		return fmt.Errorf("open point %s: %w", id, err)
	}
	defer r.Close() //nolint:errcheck // a reader has nothing to lose
	for disk := range truth {
		if r.Point().Disk(string(disk)) == nil {
			return fmt.Errorf("point %s lost disk %s", id, disk)
		}
	}
	for _, d := range r.Point().Disks {
		if err := exactDisk(ctx, r, d, truth[hypervisor.DiskID(d.ID)]); err != nil {
			return fmt.Errorf("point %s disk %s: %w", id, d.ID, err)
		}
	}
	return nil
}

func exactDisk(ctx context.Context, r repository.Reader, rec repository.Disk, truth Truth) error {
	d, err := r.Disk(ctx, rec.ID)
	if err != nil {
		return err
	}
	defer d.Close() //nolint:errcheck // a reader has nothing to lose
	if truth != nil && truth.Size() != rec.Size {
		return fmt.Errorf("size is %d and should be %d", rec.Size, truth.Size())
	}
	hash := digest.New(r.DigestKey())
	tree := hash.Tree(rec.Size)
	buf, want := make([]byte, rec.BlockSize), make([]byte, rec.BlockSize)
	for i := range repository.Blocks(rec.Size, rec.BlockSize) {
		n, off := repository.BlockLen(rec.Size, rec.BlockSize, i), i*int64(rec.BlockSize)
		b, err := d.ReadBlock(ctx, i, buf)
		if err != nil {
			return fmt.Errorf("block at %d: %w", off, err)
		}
		data := b.Data
		if data == nil {
			data = buf[:n]
			clear(data)
		}
		tree.Put(off, hash.Leaves(nil, data))
		if truth == nil {
			continue
		}
		if m, err := truth.ReadAt(want[:n], off); m < n {
			return fmt.Errorf("truth at %d: %w", off, err)
		}
		if !bytes.Equal(data, want[:n]) {
			k := 0
			for data[k] == want[k] {
				k++
			}
			return fmt.Errorf("byte %d is %#x and should be %#x", off+int64(k), data[k], want[k])
		}
	}
	if got := tree.Sum(); got != rec.Root {
		return fmt.Errorf("content has root %s and the record says %s", got, rec.Root)
	}
	return nil
}

// nothingLeft looks for snapshots, undeclared baselines and unfinished VMs.
func nothingLeft(ctx context.Context, w World, newest map[string]*repository.Point) error {
	var errs []error
	declared := map[string]bool{}
	if w.Repo != nil {
		for _, p := range newest {
			m, err := manifest.Parse(p)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			for _, d := range m.Disks {
				if d.Baseline != nil {
					declared[d.Baseline.Name+"/"+string(d.ID)] = true
				}
			}
		}
	}
	for _, vm := range w.VMs {
		for ref, err := range w.Hypervisor.Snapshots(ctx, vm) {
			if err != nil {
				errs = append(errs, err)
			} else {
				errs = append(errs, fmt.Errorf("snapshot %s of VM %s", ref.Name, vm))
			}
		}
		if !w.Hypervisor.Info().Capabilities.Baselines {
			continue
		}
		for b, err := range w.Hypervisor.Baselines(ctx, vm) {
			if err != nil {
				errs = append(errs, err)
			} else if !declared[b.Name+"/"+string(b.Disk)] {
				errs = append(errs, fmt.Errorf("baseline %s of VM %s disk %s, which no newest point stands on", b.Name, vm, b.Disk))
			}
		}
	}
	for vm, err := range w.Hypervisor.VMs(ctx, hypervisor.Query{Owner: "holdfast-"}) {
		if err != nil {
			errs = append(errs, err)
		} else if vm.Incomplete {
			errs = append(errs, fmt.Errorf("unfinished VM %s", vm.Name))
		}
	}
	return errors.Join(errs...)
}
