package backup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/journal"
	"github.com/holdfast-backup/holdfast/internal/manifest"
	"github.com/holdfast-backup/holdfast/repository"
)

// maxDisks is how many disks of a VM are read at once.
const maxDisks = 8

// snapshot freezes the VM. Its obligations are durable before it begins.
func (r *run) snapshot(ctx context.Context) error {
	asked := r.o.Quiesce.level()
	kinds := []journal.Kind{journal.Snapshot, journal.Baseline}
	if asked > hypervisor.CrashConsistent {
		kinds = append([]journal.Kind{journal.Thaw}, kinds...)
	}
	if err := r.book.intend(ctx, r.plan.Chain, kinds...); err != nil {
		return err
	}
	opts := &hypervisor.SnapshotOptions{
		Name: r.name, Quiesce: asked, MinConsistency: r.o.MinConsistency,
		QuiesceTimeout: r.o.QuiesceTimeout, VSS: r.o.VSS,
	}
	for _, d := range r.plan.Disks {
		switch {
		case d.Mode == Excluded && d.Reason == ReasonUser:
			opts.ExcludeDisks = append(opts.ExcludeDisks, d.ID)
		case d.since != nil:
			opts.Since = append(opts.Since, *d.since)
		}
	}
	disarm := func() error { return nil }
	if asked > hypervisor.CrashConsistent && r.o.Guard != nil {
		var err error
		if disarm, err = r.o.Guard.Arm(ctx, r.vm.ID, r.o.QuiesceTimeout); err != nil {
			return fmt.Errorf("arm the thaw guard: %w", err)
		}
	}
	snap, err := r.hv.CreateSnapshot(ctx, r.vm.ID, opts)
	pending := errors.Is(err, hypervisor.ErrThawPending) || errors.Is(err, hypervisor.ErrUnavailable)
	if err == nil {
		r.snap = snap
		pending = snap.Consistency().ThawPending
	}
	if !pending {
		err = errors.Join(err, r.book.discharge(journal.Thaw))
	}
	if derr := disarm(); derr != nil {
		r.o.Events.notice(r.vm.Name, "thaw guard: "+derr.Error())
	}
	if err != nil {
		return err
	}
	if err := r.book.confirm(journal.Snapshot, snap.Ref()); err != nil {
		return err
	}
	r.achieved(snap.Consistency())
	r.vm = snap.VM()
	r.plan.fill(r.vm, r.o) // disks may have come or gone since the plan
	return ctx.Err()
}

func (r *run) achieved(a hypervisor.Achieved) {
	r.res.Consistency = a
	if a.ThawPending {
		r.res.degrade("the guest was told to freeze and was not seen thawed: run holdfast recover")
	}
	if r.o.Quiesce != QuiesceAuto && a.Level < r.o.Quiesce.level() {
		r.res.degrade(fmt.Sprintf("%s consistency was asked for and %s was reached: %s", r.o.Quiesce, a.Level, a.Reason))
	}
	if !a.AcrossDisks && len(r.plan.Disks) > 1 && r.o.Quiesce > QuiesceCrash {
		r.res.degrade("the disks do not share one instant")
	}
}

// transfer stores every disk that can be stored, and what else the VM has.
func (r *run) transfer(ctx context.Context) error {
	m := newMover(r.snap, r.writer, r.o.InFlight, r.o.Events)
	m.parent = r.parent
	m.auditor = auditor{rate: r.o.Audit, seed: r.res.AuditSeed, lied: r.lied}
	r.res.Disks = make([]DiskResult, len(r.plan.Disks))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxDisks)
	for i := range r.plan.Disks {
		plan, res := &r.plan.Disks[i], &r.res.Disks[i]
		*res = DiskResult{ID: plan.ID, Size: plan.Size}
		if !plan.Mode.Stored() {
			m.decided(plan, res)
			if plan.Mode == Unprotected {
				r.res.degrade(fmt.Sprintf("disk %s is not protected: %s", plan.ID, plan.Reason))
			}
			continue
		}
		g.Go(func() error { return m.disk(gctx, plan, res) })
	}
	g.Go(func() error { return r.files(gctx) })
	if err := g.Wait(); err != nil {
		return err
	}
	r.auditVerdicts()
	return nil
}

// files stores the native configuration and the attachments.
func (r *run) files(ctx context.Context) error {
	if n := r.vm.Native; n.Format != "" {
		if err := r.writer.File(ctx, manifest.NativeFile, newReader(n.Data)); err != nil {
			return err
		}
	}
	for _, a := range r.vm.Attachments {
		if err := r.attachment(ctx, a); err != nil {
			return fmt.Errorf("%s of VM %s: %w", a.Name, r.vm.Name, err)
		}
	}
	return nil
}

func (r *run) attachment(ctx context.Context, a hypervisor.Attachment) error {
	if a.Size > repository.MaxFile {
		return fmt.Errorf("%d bytes are more than a point takes, %d", a.Size, repository.MaxFile)
	}
	f, err := a.Open(ctx)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read
	c := &counter{r: f}
	if err := r.writer.File(ctx, manifest.AttachmentPrefix+a.Name, c); err != nil {
		return err
	}
	if a.Size >= 0 && c.n != a.Size {
		return fmt.Errorf("%d of %d bytes: %w", c.n, a.Size, io.ErrUnexpectedEOF)
	}
	return nil
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// commit makes the point visible. From here on nothing fails the run.
func (r *run) commit(ctx context.Context) error {
	r.anchor()
	meta, err := json.Marshal(r.manifest())
	if err != nil {
		return err
	}
	proof, err := r.writer.Commit(ctx, &repository.CommitInfo{
		Created: r.res.Started,
		Meta:    meta,
		Labels: map[string]string{
			manifest.LabelPlatform:    string(r.hv.Info().Platform),
			manifest.LabelConsistency: r.res.Consistency.Level.String(),
			manifest.LabelUUID:        r.vm.UUID,
			manifest.LabelStatus:      string(r.statusBeforeProof()),
		},
	})
	if err != nil {
		r.unknown = errors.Is(err, repository.ErrOutcomeUnknown)
		return err
	}
	r.committed, r.res.proof = true, proof
	pt := proof.Point()
	for i := range r.res.Disks {
		if d := pt.Disk(string(r.res.Disks[i].ID)); d != nil {
			r.res.Disks[i].Root = d.Root
			r.res.Disks[i].Stats = d.Stats
		}
	}
	return nil
}

// anchor collects the baselines that the point will stand on. A disk without one
// is read in full the next time.
func (r *run) anchor() {
	r.baselines = map[hypervisor.DiskID]hypervisor.Baseline{}
	for _, d := range r.res.Disks {
		if !d.Mode.Stored() || d.Audit.Lied() {
			continue // nothing stands on a tracking that lied
		}
		b, err := r.snap.Baseline(d.ID)
		switch {
		case err == nil:
			r.baselines[d.ID] = b
		case !errors.Is(err, hypervisor.ErrBaselineInvalid):
			r.o.Events.notice(r.vm.Name, fmt.Sprintf("disk %s will be read in full the next time: %v", d.ID, err))
		}
	}
}

func (r *run) statusBeforeProof() Status {
	if len(r.res.Degraded) > 0 {
		return Degraded
	}
	return Success
}

func (r *run) manifest() *manifest.Manifest {
	info, vm := r.hv.Info(), r.vm
	m := &manifest.Manifest{
		Version: manifest.Version,
		Source:  manifest.Source{Platform: info.Platform, Endpoint: r.o.Endpoint, Product: info.Product, Version: info.Version},
		VM: manifest.VM{
			ID: vm.ID, UUID: vm.UUID, Name: vm.Name, Host: vm.Host, Power: vm.Power,
			Hardware: vm.Hardware, Tags: vm.Tags, Guest: vm.Guest,
		},
		Consistency: manifest.Consistency{
			Asked: r.o.Quiesce.String(), Minimum: r.o.MinConsistency, Level: r.res.Consistency.Level,
			Means: r.res.Consistency.Means, Across: r.res.Consistency.AcrossDisks, Memory: r.res.Consistency.Memory,
			Frozen: r.res.Consistency.Frozen, Reason: r.res.Consistency.Reason,
		},
		NICs:     vm.NICs,
		Native:   vm.Native.Format,
		Degraded: r.res.Degraded,
	}
	for _, a := range vm.Attachments {
		m.Attachments = append(m.Attachments, manifest.Attachment{Name: a.Name, Kind: a.Kind, Size: a.Size, File: manifest.AttachmentPrefix + a.Name})
	}
	for i := range r.res.Disks {
		res, d := &r.res.Disks[i], vm.Disk(r.res.Disks[i].ID)
		md := manifest.Disk{
			ID: d.ID, Mode: res.Mode, Reason: res.Reason, Detail: res.Detail, Size: d.Size, Content: d.Content,
			Backing: d.Backing, Attrs: d.Attrs, Bus: d.Bus, Slot: d.Slot, Storage: d.Storage, Format: d.Format,
			ReadBytes: res.ReadBytes,
		}
		if b, ok := r.baselines[d.ID]; ok {
			md.Baseline = &b
		}
		md.Audit = res.audited(r.res.AuditSeed)
		m.Disks = append(m.Disks, md)
	}
	return m
}
