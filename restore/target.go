package restore

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/internal/journal"
	"github.com/holdfast-backup/holdfast/internal/manifest"
	"github.com/holdfast-backup/holdfast/repository"
)

// VMOptions say what the restored VM shall be. The zero value makes a copy with
// the old name, new UUIDs and new MAC addresses, on the target's default storage
// and the networks of the old names.
type VMOptions struct {
	Name      string              // empty: the old name
	Identity  hypervisor.Identity // empty: hypervisor.IdentityNew
	Placement hypervisor.Placement

	// Storage maps a disk to a storage of the target; Networks maps an old network
	// to one of the target. What is not named keeps its name, or the default.
	Storage  map[hypervisor.DiskID]string
	Networks map[string]string

	Format  string // of the disks, empty: the target's default
	PowerOn bool   // start it when it is complete
}

// maxDisks is how many disks of a VM are written at once.
const maxDisks = 4

// ToVM restores a point as a new VM. Nothing that exists is touched: a name that
// is taken, and with IdentityKeep a UUID or MAC address that is in use, are
// refused before anything is created. On any error the new VM is removed.
func ToVM(ctx context.Context, repo repository.Repository, point repository.PointID, target hypervisor.Target, vo *VMOptions, opts *Options) (*Result, error) {
	o := opts.withDefaults()
	var v VMOptions
	if vo != nil {
		v = *vo
	}
	reader, err := repo.Open(ctx, point)
	if err != nil {
		return nil, fmt.Errorf("restore point %s: %w", point, err)
	}
	defer reader.Close() //nolint:errcheck // a reader has nothing to lose
	j, err := begin(reader, &o, "restore")
	if err != nil {
		return nil, err
	}
	name := hypervisor.Name{Repo: repo.Info().Repo8(), Run: j.res.Run, Kind: "vm"}.String()
	t := &toVM{job: j, target: target, v: v, owner: name}
	err = t.run(ctx)
	j.res.Finished = o.Clock.Now()
	if j.j != nil {
		if cerr := j.j.Close(true); !errors.Is(cerr, journal.ErrOpen) {
			err = errors.Join(err, cerr)
		}
	}
	return j.res, err
}

type toVM struct {
	*job
	target hypervisor.Target
	v      VMOptions
	owner  string
	vm     *hypervisor.VM
}

func (t *toVM) run(ctx context.Context) (err error) {
	var spec *hypervisor.VMSpec
	if err := t.stage("plan", func() (err error) { spec, err = t.spec(ctx); return err }); err != nil {
		return err
	}
	if err := t.stage("preflight", func() error { return t.conflicts(ctx, spec) }); err != nil {
		return err
	}
	discharge, err := t.intend(journal.Obligation{Kind: journal.IncompleteVM, VM: spec.Name, Object: t.owner})
	if err != nil {
		return err
	}
	done := false
	defer func() {
		if !done {
			if uerr := t.undo(ctx); uerr != nil {
				err = errors.Join(err, fmt.Errorf("cleanup: unfinished VM %s stays, holdfast recover removes it: %w", spec.Name, uerr))
				return
			}
		}
		err = errors.Join(err, discharge())
	}()
	if err := t.stage("create", func() (err error) { t.vm, err = t.target.CreateVM(ctx, spec); return err }); err != nil {
		return err
	}
	if err := t.stage("transfer", func() error { return t.transfer(ctx) }); err != nil {
		return err
	}
	if err := t.stage("finish", func() error { return t.target.FinishVM(ctx, t.vm.ID) }); err != nil {
		return err
	}
	done = true
	if t.res.VM, err = t.target.VM(ctx, t.vm.ID); err != nil {
		return err
	}
	if t.v.PowerOn {
		return t.stage("start", func() error { return t.target.SetPower(ctx, t.vm.ID, hypervisor.PowerOn) })
	}
	return nil
}

// undo removes what was created, also when the answer to CreateVM was lost.
func (t *toVM) undo(ctx context.Context) error {
	ctx, cancel := clock.WithTimeout(context.WithoutCancel(ctx), t.o.Clock, t.o.CleanupTimeout)
	defer cancel()
	if t.vm != nil {
		return t.target.DeleteVM(ctx, t.vm.ID)
	}
	for vm, err := range t.target.VMs(ctx, hypervisor.Query{Owner: t.owner}) {
		if err != nil {
			return err
		}
		if vm.Owner == t.owner && vm.Incomplete {
			if err := t.target.DeleteVM(ctx, vm.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

// spec describes the VM to create.
func (t *toVM) spec(ctx context.Context) (*hypervisor.VMSpec, error) {
	m := t.man
	s := &hypervisor.VMSpec{
		Name: m.VM.Name, Owner: t.owner, Identity: t.v.Identity, UUID: m.VM.UUID,
		Hardware: m.VM.Hardware, Placement: t.v.Placement,
	}
	if t.v.Name != "" {
		s.Name = t.v.Name
	}
	if s.Identity == "" {
		s.Identity = hypervisor.IdentityNew
	}
	for id := range t.v.Storage {
		if m.Disk(id) == nil {
			return nil, &hypervisor.Error{Op: "restore", Disk: id, Err: fmt.Errorf("storage is mapped for a disk that point %s does not know: %w", t.res.Point, hypervisor.ErrNotFound)}
		}
	}
	for _, d := range t.disks {
		s.Disks = append(s.Disks, hypervisor.DiskSpec{
			ID: d.ID, Size: d.Size, Bus: d.Bus, Slot: d.Slot, Format: t.v.Format, Storage: t.v.Storage[d.ID],
		})
	}
	for _, n := range m.NICs {
		if to, ok := t.v.Networks[n.Network]; ok {
			n.Network = to
		}
		s.NICs = append(s.NICs, n)
	}
	if m.Native != "" && m.Source.Platform == t.target.Info().Platform {
		f, err := t.reader.File(ctx, manifest.NativeFile)
		if err != nil {
			return nil, err
		}
		defer f.Close() //nolint:errcheck // only read
		data, err := io.ReadAll(io.LimitReader(f, repository.MaxFile))
		if err != nil {
			return nil, err
		}
		s.Native = &hypervisor.NativeConfig{Format: m.Native, Data: data}
	}
	for _, a := range m.Attachments {
		s.Attachments = append(s.Attachments, hypervisor.Attachment{
			Name: a.Name, Kind: a.Kind, Size: a.Size,
			Open: func(ctx context.Context) (io.ReadCloser, error) { return t.reader.File(ctx, a.File) },
		})
	}
	return s, nil
}

// conflicts refuses what would collide with something that exists.
func (t *toVM) conflicts(ctx context.Context, spec *hypervisor.VMSpec) error {
	macs := map[string]bool{}
	if spec.Identity == hypervisor.IdentityKeep {
		for _, n := range spec.NICs {
			macs[n.MAC] = n.MAC != ""
		}
	}
	for vm, err := range t.target.VMs(ctx, hypervisor.Query{}) {
		if err != nil {
			return err
		}
		clash := ""
		switch {
		case vm.Name == spec.Name:
			clash = "name " + vm.Name
		case spec.Identity == hypervisor.IdentityKeep && vm.UUID == spec.UUID:
			clash = "UUID " + vm.UUID + " of " + vm.Name
		default:
			for _, n := range vm.NICs {
				if macs[n.MAC] {
					clash = "MAC address " + n.MAC + " of " + vm.Name
				}
			}
		}
		if clash != "" {
			hint := "give the copy another name"
			if vm.Name != spec.Name {
				hint = "restore with a new identity, or remove the original first"
			}
			return &hypervisor.Error{Op: "restore", VM: vm.ID, Hint: hint, Err: fmt.Errorf("%s is in use: %w", clash, hypervisor.ErrExists)}
		}
	}
	return nil
}

func (t *toVM) transfer(ctx context.Context) error {
	t.res.Disks = make([]DiskResult, len(t.disks))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxDisks)
	for i, d := range t.disks {
		g.Go(func() (err error) {
			res := &t.res.Disks[i]
			res.ID = d.ID
			w, err := t.target.OpenDiskWriter(ctx, t.vm.ID, d.ID)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, w.Close()) }()
			if err := t.copyDisk(ctx, d.ID, w, res); err != nil {
				return err
			}
			return w.Commit()
		})
	}
	return g.Wait()
}
