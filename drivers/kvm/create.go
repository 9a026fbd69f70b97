package kvm

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// maxSocketPath is how long the path of a unix socket may be.
const maxSocketPath = 107

// reasonExcluded is given to disks that the caller left out; it is the word of
// package backup for that.
const reasonExcluded hypervisor.Reason = "rule-user"

// CreateSnapshot starts a backup job that freezes the disks at one instant, and
// makes a checkpoint of the disks that are tracked. A domain that is off is
// started paused first.
func (d *Driver) CreateSnapshot(ctx context.Context, id hypervisor.VMID, opts *hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
	if !d.ep.local {
		return nil, d.remoteOnly("CreateSnapshot", id)
	}
	if opts == nil {
		opts = new(hypervisor.SnapshotOptions)
	}
	c := &creation{d: d, opts: opts}
	s, err := c.run(ctx, string(id))
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		s.watch()
		return s, nil
	}
	hint := hypervisor.Hint(err)
	uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	if uerr := c.undo(uctx); uerr != nil {
		err = errors.Join(err, fmt.Errorf("undo: %w", uerr))
	}
	return nil, fail("CreateSnapshot", id, "", hint, err)
}

// creation is a snapshot in the making.
type creation struct {
	d    *Driver
	opts *hypervisor.SnapshotOptions

	name  string
	m     *machine
	disks []hypervisor.DiskID // to be in the snapshot
	plan  *baselinePlan

	stop  func(context.Context) error // ends a domain that we started
	clean bool
	begun bool // the job may have been started
}

func (c *creation) run(ctx context.Context, uuid string) (*snapshot, error) {
	d := c.d
	var err error
	if c.name, err = ownName(c.opts.Name); err != nil {
		return nil, err
	}
	if n := len(filepath.Join(d.cfg.SocketDir, socketName(c.name, uuid))); n > maxSocketPath {
		return nil, fmt.Errorf("socket directory %s: the path of a socket would have %d bytes, %d are possible", d.cfg.SocketDir, n, maxSocketPath)
	}
	if c.m, err = d.inventory(ctx, uuid, false); err != nil {
		return nil, err
	}
	if err := c.choose(); err != nil {
		return nil, err
	}
	if err := c.preflight(ctx); err != nil {
		return nil, err
	}
	achieved := hypervisor.Achieved{AcrossDisks: true, Means: "none"}
	if !c.m.active() {
		achieved.Level, achieved.Reason = offlineLevel(c.m.reason)
		achieved.Means = "offline"
		if achieved.Level < c.opts.MinConsistency {
			return nil, fmt.Errorf("%w: %s", hypervisor.ErrQuiesce, achieved.Reason)
		}
		if achieved.Level >= c.opts.Quiesce {
			achieved.Reason = ""
		}
		c.clean = c.m.reason == shutoffShutdown
		if c.stop, err = d.startPaused(ctx, c.m, c.name); err != nil {
			return nil, err
		}
	}
	if c.plan, err = d.planBaselines(ctx, c.m, c.disks, c.opts.Since); err != nil {
		return nil, err
	}
	if c.m.active() {
		if err := c.quiesced(ctx, &achieved); err != nil {
			return nil, err
		}
	} else if err := c.begin(ctx); err != nil {
		return nil, err
	}
	return c.finish(ctx, achieved)
}

// choose picks the disks and marks those that the caller leaves out.
func (c *creation) choose() error {
	for i := range c.m.Disks {
		disk := &c.m.Disks[i]
		switch {
		case !disk.Snapshottable:
		case slices.Contains(c.opts.ExcludeDisks, disk.ID):
			disk.Snapshottable, disk.Tracking = false, hypervisor.TrackingNone
			disk.Reason, disk.Detail = reasonExcluded, "excluded by request"
		default:
			c.disks = append(c.disks, disk.ID)
		}
	}
	if len(c.disks) == 0 {
		return fmt.Errorf("the VM has no disk that a snapshot could include: %w", errors.ErrUnsupported)
	}
	return nil
}

func (c *creation) preflight(ctx context.Context) error {
	if err := c.d.checkIdle(ctx, c.m, c.disks); err != nil {
		return err
	}
	if n := c.m.notes.Started; n != nil && c.m.active() {
		return fmt.Errorf("the VM was started, paused, by %s, which has not ended it: %w", n.Run, hypervisor.ErrBusy)
	}
	names, err := c.d.conn.checkpoints(ctx, c.m.UUID)
	if err != nil {
		return err
	}
	if slices.Contains(names, c.name) {
		return fmt.Errorf("checkpoint %s: %w", c.name, hypervisor.ErrExists)
	}
	var sizes int64
	for _, id := range c.disks {
		sizes += c.m.Disk(id).Size
	}
	if err := c.d.checkScratch(sizes); err != nil {
		return &hypervisor.Error{
			Op: "scratch space", Platform: hypervisor.KVM, VM: c.m.ID,
			Hint: "make room in " + c.d.cfg.ScratchDir + ", or choose another scratch directory", Err: err,
		}
	}
	return nil
}

// quiesced freezes the guest as far as asked and possible, begins the job, and
// thaws.
func (c *creation) quiesced(ctx context.Context, got *hypervisor.Achieved) error {
	if c.opts.Quiesce == hypervisor.CrashConsistent && c.opts.MinConsistency == hypervisor.CrashConsistent {
		return c.begin(ctx)
	}
	d, g := c.d, c.m.Guest
	if !g.Agent {
		got.Reason = g.AgentWhy
		if c.opts.MinConsistency > hypervisor.CrashConsistent {
			return fmt.Errorf("%w: %s", hypervisor.ErrQuiesce, got.Reason)
		}
		return c.begin(ctx)
	}
	reach := hypervisor.FilesystemConsistent
	if g.Family == "" {
		ictx, cancel := context.WithTimeout(ctx, probeTimeout)
		if info, err := d.guestOS(ictx, c.m.UUID); err == nil {
			g.Family = info.family()
		}
		cancel()
	}
	if g.Family == "windows" {
		reach = hypervisor.ApplicationConsistent // the agent freezes through VSS
	}
	if reach < c.opts.MinConsistency {
		return fmt.Errorf("%w: hooks of applications in this guest are not visible, so that no more than %s consistency can be proven",
			hypervisor.ErrQuiesce, reach)
	}
	budget := c.opts.QuiesceTimeout
	if budget <= 0 {
		budget = hypervisor.DefaultQuiesceTimeout
	}
	f, ferr := d.freeze(ctx, c.m.UUID, c.name, budget)
	if f == nil {
		return ferr
	}
	level, why, err := c.underFreeze(ctx, f, ferr, reach)
	thawErr := f.thaw()
	got.Level, got.Frozen, got.ThawPending = level, f.took, thawErr != nil
	switch {
	case why != nil:
		got.Reason = why.Error()
	default:
		got.Means = "qemu-guest-agent fsfreeze"
		if level < c.opts.Quiesce {
			got.Reason = "hooks of applications in this guest are not visible"
		}
	}
	if err == nil && level < c.opts.MinConsistency {
		err = why
	}
	if err != nil {
		return errors.Join(err, thawErr)
	}
	return nil
}

// underFreeze begins the job while the guest is frozen, or after a freeze that
// failed with ferr. why says why the level is below reach.
func (c *creation) underFreeze(ctx context.Context, f *frozen, ferr error, reach hypervisor.Consistency) (level hypervisor.Consistency, why, err error) {
	if err := ctx.Err(); err != nil {
		return hypervisor.CrashConsistent, ferr, err
	}
	if ferr != nil {
		if c.opts.MinConsistency > hypervisor.CrashConsistent {
			return hypervisor.CrashConsistent, ferr, nil // below the minimum: no snapshot
		}
		// The level is lost: the guest need not wait for the snapshot. The caller
		// asks for the outcome.
		_ = f.thaw()
		return hypervisor.CrashConsistent, ferr, c.begin(ctx)
	}
	if err := c.begin(ctx); err != nil {
		return hypervisor.CrashConsistent, nil, err
	}
	if err := f.still(ctx); err != nil {
		why = fmt.Errorf("%w: the guest was not seen frozen after the snapshot was made: %w", hypervisor.ErrQuiesceTimeout, err)
		return hypervisor.CrashConsistent, why, nil
	}
	return reach, nil, nil
}

// begin starts the job. Baselines that libvirt finds unusable, and disks that it
// cannot track after all, cost only themselves.
func (c *creation) begin(ctx context.Context) error {
	c.begun = true
	if err := c.d.mark(c.name, c.m.UUID); err != nil {
		return err
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		job, cp, err := c.documents()
		if err != nil {
			return err
		}
		// The call is waited for even if the caller gives up: what it did must be
		// known to be undone.
		bctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), beginTimeout)
		err = c.d.conn.backupBegin(bctx, c.m.UUID, job, cp, 0)
		cancel()
		if err == nil {
			return nil
		}
		if !c.lessDemanding(err) {
			return beginError(err)
		}
		c.d.cfg.Logger.InfoContext(ctx, "backup job refused, trying with less", "vm", c.m.Name, "error", err)
	}
}

// beginError explains refusals whose libvirt number means many things.
func beginError(err error) error {
	switch {
	case diskRE.MatchString(err.Error()) && errors.Is(err, hypervisor.ErrBusy):
		return err
	case virCode(err) == virUnsupported:
		return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	}
	return err
}

// lessDemanding changes the plan so that it avoids what libvirt refused; false
// means that it cannot.
func (c *creation) lessDemanding(err error) bool {
	var based, tracked []string
	for _, id := range c.disks {
		if c.plan.base(string(id)) != "" {
			based = append(based, string(id))
		}
		if c.m.Disk(id).Tracking == hypervisor.TrackingBlocks {
			tracked = append(tracked, string(id))
		}
	}
	switch virCode(err) {
	case virNoCheckpoint, virCheckpointBroken:
		reason := hypervisor.ReasonInconsistent
		if virCode(err) == virNoCheckpoint {
			reason = hypervisor.ReasonBaselineMissing
		}
		if bad := diskInMessage(err, based); bad != "" {
			based = []string{bad}
		}
		for _, disk := range based {
			c.plan.invalidate(disk, reason, err)
		}
		return len(based) > 0
	case virConfigUnsupported, virInternal:
		bad := diskInMessage(err, tracked)
		if bad == "" && len(tracked) == 1 {
			bad = tracked[0]
		}
		if bad == "" || !untrackable(err) {
			return false
		}
		for c.plan.base(bad) != "" {
			c.plan.invalidate(bad, hypervisor.ReasonNeverTracked, err)
		}
		disk := c.m.Disk(hypervisor.DiskID(bad))
		disk.Tracking, disk.Reason, disk.Detail = hypervisor.TrackingNone, hypervisor.ReasonNeverTracked, err.Error()
		return true
	}
	return false
}

// untrackable reports whether libvirt or QEMU says that an image cannot hold a
// bitmap.
func untrackable(err error) bool {
	return strings.Contains(err.Error(), "checkpoint for disk") ||
		strings.Contains(err.Error(), "Cannot store dirty bitmaps") ||
		strings.Contains(err.Error(), "Can't make bitmap")
}

// documents renders the job and, unless no disk is tracked, the checkpoint. Every
// disk is named in both: libvirt's defaults would include those that fail.
func (c *creation) documents() (job, cp string, err error) {
	j := backupJob{Mode: "pull", Server: &backupServer{
		Transport: "unix", Socket: filepath.Join(c.d.cfg.SocketDir, socketName(c.name, c.m.UUID)),
	}}
	k := checkpoint{Name: c.name}
	desc := described{Version: 1, Disks: map[string]describedDisk{}}
	for i := range c.m.dom.Devices.Disks {
		slot := target(&c.m.dom.Devices.Disks[i])
		id := hypervisor.DiskID(slot)
		if !slices.Contains(c.disks, id) {
			j.Disks = append(j.Disks, backupDisk{Name: slot, Backup: "no"})
			k.Disks = append(k.Disks, checkpointDisk{Name: slot, Checkpoint: "no"})
			continue
		}
		b := backupDisk{
			Name: slot, Backup: "yes", Type: "file", Mode: "full", ExportName: slot,
			Scratch: &scratchRef{File: filepath.Join(c.d.cfg.ScratchDir, scratchName(c.name, c.m.UUID, slot))},
		}
		if base := c.plan.base(slot); base != "" {
			b.Mode, b.Incremental, b.ExportBitmap = "incremental", base, exportBitmap
		}
		j.Disks = append(j.Disks, b)
		disk, how := c.m.Disk(id), "no"
		if disk.Tracking == hypervisor.TrackingBlocks {
			how = "bitmap"
			desc.Disks[slot] = describedDisk{Content: disk.Content, Size: disk.Size}
		}
		k.Disks = append(k.Disks, checkpointDisk{Name: slot, Checkpoint: how})
	}
	if job, err = marshalXML(j); err != nil || len(desc.Disks) == 0 {
		return job, "", err
	}
	if k.Description, err = marshalJSON(desc); err != nil {
		return "", "", err
	}
	cp, err = marshalXML(k)
	return job, cp, err
}

// finish makes the snapshot of a job that runs.
func (c *creation) finish(ctx context.Context, achieved hypervisor.Achieved) (*snapshot, error) {
	d := c.d
	s := &snapshot{
		d: d, vm: c.m.VM, uuid: c.m.UUID, name: c.name, achieved: achieved,
		socket: filepath.Join(d.cfg.SocketDir, socketName(c.name, c.m.UUID)),
		disks:  map[hypervisor.DiskID]string{}, since: c.plan.verdicts, lock: newSemaphore(),
		started: c.stop != nil, clean: c.clean,
	}
	for _, id := range c.disks {
		s.disks[id] = c.plan.base(string(id))
	}
	cp, err := d.checkpoint(ctx, c.m.UUID, c.name)
	if err != nil && !errors.Is(err, hypervisor.ErrNotFound) {
		return nil, err
	}
	s.cp = cp
	note := &snapshotNote{Run: s.name, Token: s.Ref().Token}
	return s, d.editNotes(ctx, c.m.UUID, affectLive, func(n *notes) { n.Snapshot = note })
}

// undo removes whatever the creation has made.
func (c *creation) undo(ctx context.Context) error {
	if c.m == nil {
		return nil
	}
	var errs []error
	if c.begun {
		errs = append(errs, c.d.dismantle(ctx, c.m.UUID, c.name, nil))
	}
	if c.stop != nil {
		errs = append(errs, c.stop(ctx))
	}
	return errors.Join(errs...)
}
