package fakes

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
)

const opCreate = "CreateSnapshot"

// CreateSnapshot implements hypervisor.Hypervisor.
func (h *Hypervisor) CreateSnapshot(ctx context.Context, id hypervisor.VMID, opts *hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
	o := hypervisor.SnapshotOptions{}
	if opts != nil {
		o = *opts
	}
	w := h.world
	if o.Name == "" {
		o.Name = w.anonymousName()
	}
	if err := h.begin(ctx, Call{Op: OpCreateSnapshot, VM: id, Name: o.Name}); err != nil {
		return nil, err
	}
	if !hypervisor.IsOurs(o.Name) {
		return nil, fail(opCreate, id, "", fmt.Errorf("%q is not an owner name: %w", o.Name, hypervisor.ErrNotOurs))
	}
	c := &creation{h: h, w: w, id: id, opts: o}
	s, err := c.run(ctx)
	if err != nil {
		var e *hypervisor.Error
		if !errors.As(err, &e) {
			err = fail(opCreate, id, "", err)
		}
		return nil, err
	}
	return h.attach(s), nil
}

func (w *World) anonymousName() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return hypervisor.Name{Repo: "00000000", Run: fmt.Sprintf("%016x", w.rnd.Uint64()), Kind: "snap"}.String()
}

// creation is one CreateSnapshot on its way.
type creation struct {
	h    *Hypervisor
	w    *World
	id   hypervisor.VMID
	opts hypervisor.SnapshotOptions

	snap     *snapState
	achieved hypervisor.Achieved
	froze    bool
	frozenAt time.Time
	deadline time.Time
}

func (c *creation) step(op Op, disk hypervisor.DiskID) {
	c.w.report(Call{Op: op, VM: c.id, Disk: disk, Name: c.opts.Name})
}

func (c *creation) run(ctx context.Context) (*snapState, error) {
	if err := c.reserve(); err != nil {
		return nil, err
	}
	defer c.unreserve()
	err := c.quiesce(ctx)
	if err == nil {
		err = c.take(ctx)
	}
	if terr := c.thaw(); terr != nil {
		if err != nil {
			err = errors.Join(err, terr)
		}
		c.achieved.ThawPending = true
	}
	if err == nil {
		err = ctx.Err()
	}
	if err == nil && c.achieved.Level < c.opts.MinConsistency {
		err = fmt.Errorf("%w: %s", hypervisor.ErrQuiesceTimeout, c.achieved.Reason)
	}
	if err != nil {
		if c.achieved.ThawPending && !errors.Is(err, hypervisor.ErrThawPending) {
			err = errors.Join(err, hypervisor.ErrThawPending)
		}
		c.undo()
		return nil, err
	}
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	c.snap.achieved = c.achieved
	return c.snap, nil
}

// reserve takes the name, so that two snapshots of one name cannot be made.
func (c *creation) reserve() error {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	v, _, err := c.w.find(c.id, "")
	if err != nil {
		return err
	}
	if v.snaps[c.opts.Name] != nil || v.anchors[c.opts.Name] != nil {
		return fmt.Errorf("snapshot %s: %w", c.opts.Name, hypervisor.ErrExists)
	}
	if v.unready {
		return hinted(opCreate, c.id, "", fmt.Errorf("the VM is incomplete: %w", hypervisor.ErrBusy), "finish or delete it")
	}
	for name := range v.snaps {
		if c.w.opts.OneSnapshot && hypervisor.IsOurs(name) {
			return hinted(opCreate, c.id, "", fmt.Errorf("snapshot %s exists: %w", name, hypervisor.ErrBusy), "release it first")
		}
	}
	c.snap = &snapState{name: c.opts.Name, token: c.opts.Name + "@" + string(c.id), def: c.w.definition(v)}
	c.snap.disks = map[hypervisor.DiskID]*frozenDisk{}
	v.snaps[c.opts.Name] = c.snap
	return nil
}

// unreserve gives the name back when nothing was made, also when the goroutine
// ends in a hook: the platform knows nothing of a reservation.
func (c *creation) unreserve() {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	if v := c.w.vms[c.id]; v != nil && !c.snap.taken && v.snaps[c.opts.Name] == c.snap {
		delete(v.snaps, c.opts.Name)
	}
}

// undo leaves nothing.
func (c *creation) undo() {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	c.snap.gone.Store(true)
	if v := c.w.vms[c.id]; v != nil && v.snaps[c.opts.Name] == c.snap {
		delete(v.snaps, c.opts.Name)
		delete(v.anchors, c.opts.Name)
	}
}

// quiesce freezes the guest as far as it is asked and possible. It returns an
// error when the minimum cannot be reached any more.
func (c *creation) quiesce(ctx context.Context) error {
	c.achieved.Means = "none"
	c.achieved.AcrossDisks = !c.w.opts.NonAtomicDisks
	want := max(c.opts.Quiesce, c.opts.MinConsistency)
	if want == hypervisor.CrashConsistent {
		return nil
	}
	c.w.mu.Lock()
	v, _, err := c.w.find(c.id, "")
	if err != nil {
		c.w.mu.Unlock()
		return err
	}
	why, off, level := v.agentWhy(&c.w.opts), v.power == hypervisor.PoweredOff, v.guest.Level
	c.w.mu.Unlock()
	if off && !c.w.opts.NoQuiesce {
		c.achieved.Means, c.achieved.Level = "offline", want
		return nil
	}
	if why != "" {
		return c.degrade(hypervisor.ErrQuiesce, why)
	}
	if level == hypervisor.CrashConsistent {
		level = hypervisor.FilesystemConsistent
	}
	if level < c.opts.MinConsistency {
		return fmt.Errorf("%w: the guest agent reaches %s only", hypervisor.ErrQuiesce, level)
	}
	return c.freeze(ctx, min(level, want), want)
}

// freeze issues the freeze and waits for the guest, no longer than allowed.
func (c *creation) freeze(ctx context.Context, level, want hypervisor.Consistency) error {
	c.step(StepFreeze, "")
	timeout := c.opts.QuiesceTimeout
	if timeout <= 0 {
		timeout = hypervisor.DefaultQuiesceTimeout
	}
	c.frozenAt = c.w.clock.Now()
	c.deadline = c.frozenAt.Add(timeout)
	g, err := c.w.freeze(c.id)
	if errors.Is(err, errFreeze) {
		return c.degrade(hypervisor.ErrQuiesce, err.Error())
	}
	if err != nil {
		return err
	}
	c.froze = true
	wait := g.FreezeTime
	if g.Freeze == FreezeHangs || wait > timeout {
		wait = timeout
	}
	if err := clock.Sleep(ctx, c.w.clock, wait); err != nil {
		return err
	}
	if g.Freeze == FreezeHangs || !c.w.clock.Now().Before(c.deadline) {
		if err := c.thaw(); err != nil {
			c.achieved.ThawPending = true
		}
		return c.degrade(hypervisor.ErrQuiesceTimeout, fmt.Sprintf("the guest did not freeze within %s", timeout))
	}
	if g.OnFreeze != nil {
		g.OnFreeze()
	}
	c.achieved.Level, c.achieved.Means = level, "fake guest agent"
	if level < want {
		c.achieved.Reason = fmt.Sprintf("the guest agent reaches %s only", level)
	}
	return nil
}

// degrade goes on without a quiesced guest where that is allowed.
func (c *creation) degrade(cond error, why string) error {
	c.achieved.Level, c.achieved.Means, c.achieved.Reason = hypervisor.CrashConsistent, "none", why
	if c.opts.MinConsistency > hypervisor.CrashConsistent {
		return fmt.Errorf("%w: %s", cond, why)
	}
	return nil
}

// thaw ends a freeze on nobody's context, once, and measures it.
func (c *creation) thaw() error {
	if !c.froze {
		return nil
	}
	c.froze = false
	c.step(StepThaw, "")
	err := c.w.thaw(c.id)
	c.achieved.Frozen = c.w.clock.Now().Sub(c.frozenAt)
	return err
}

// take freezes the disks. The guest may be frozen meanwhile.
func (c *creation) take(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	wait := c.w.opts.SnapshotTime
	if c.froze {
		if left := c.deadline.Sub(c.w.clock.Now()); wait > left {
			if err := clock.Sleep(ctx, c.w.clock, left); err != nil {
				return err
			}
			if err := c.thaw(); err != nil {
				c.achieved.ThawPending = true
			}
			if err := c.degrade(hypervisor.ErrQuiesceTimeout, "the snapshot took longer than the guest may stay frozen"); err != nil {
				return err
			}
			wait -= left
		}
	}
	if err := clock.Sleep(ctx, c.w.clock, wait); err != nil {
		return err
	}
	if !c.w.opts.NonAtomicDisks {
		c.step(StepFreezeDisk, "")
		c.w.mu.Lock()
		defer c.w.mu.Unlock()
		v, _, err := c.w.find(c.id, "")
		if err != nil {
			return err
		}
		c.snap.def = c.w.definition(v)
		c.snap.taken = true
		for _, d := range v.disks {
			c.takeDisk(v, d)
		}
		return nil
	}
	for _, d := range c.snap.def.Disks {
		c.step(StepFreezeDisk, d.ID)
		err := c.w.edit(c.id, d.ID, func(v *vmState, d *diskState) { c.takeDisk(v, d) })
		if err != nil {
			return err
		}
	}
	return nil
}

// reasonExcluded is given to disks that the caller left out; it is the word of
// package backup for that.
const reasonExcluded hypervisor.Reason = "rule-user"

// takeDisk freezes one disk, if it is to be part of the snapshot. The lock is
// held.
func (c *creation) takeDisk(v *vmState, d *diskState) {
	c.snap.taken = true
	def := c.snap.def.Disk(d.cfg.ID)
	if def == nil || !def.Snapshottable {
		return
	}
	if slices.Contains(c.opts.ExcludeDisks, d.cfg.ID) {
		def.Snapshottable, def.Tracking, def.Reason = false, hypervisor.TrackingNone, reasonExcluded
		return
	}
	f := &frozenDisk{img: d.img.freeze(), changes: map[hypervisor.Baseline]changeSet{}}
	def.Size, def.Content = d.img.size, d.content
	c.snap.disks[d.cfg.ID] = f
	if def.Tracking == hypervisor.TrackingNone {
		for _, b := range c.opts.Since {
			if b.Disk == d.cfg.ID {
				f.changes[b] = changeSet{err: &hypervisor.BaselineError{Reason: hypervisor.ReasonNeverTracked}}
			}
		}
		return
	}
	for _, b := range c.opts.Since {
		if b.Disk == d.cfg.ID {
			f.changes[b] = c.w.changesSince(v, d, b)
		}
	}
	a := anchor{content: d.content, epoch: d.track.epoch, gen: d.track.cut(), size: d.img.size}
	f.baseline = hypervisor.Baseline{
		Platform: hypervisor.Fake, VM: c.id, Disk: d.cfg.ID, Name: c.opts.Name, Token: a.token(),
	}
	if c.w.opts.NoBaselines {
		return
	}
	set := v.anchors[c.opts.Name]
	if set == nil {
		set = &anchorSet{disks: map[hypervisor.DiskID]hypervisor.Baseline{}, pending: true}
		v.anchors[c.opts.Name] = set
	}
	set.disks[d.cfg.ID] = f.baseline
}

// changesSince answers for one baseline at this instant. The lock is held.
func (w *World) changesSince(v *vmState, d *diskState, b hypervisor.Baseline) changeSet {
	invalid := func(why hypervisor.Reason, err error) changeSet {
		return changeSet{err: &hypervisor.BaselineError{Reason: why, Err: err}}
	}
	a, err := parseAnchor(b.Token)
	switch {
	case err != nil:
		return invalid(hypervisor.ReasonBaselineMissing, err)
	case b.Platform != hypervisor.Fake || b.VM != v.id:
		return invalid(hypervisor.ReasonBaselineMissing, errors.New("it is of another VM"))
	case a.content != d.content:
		return invalid(hypervisor.ReasonDiskReplaced, nil)
	case a.size != d.img.size:
		return invalid(hypervisor.ReasonDiskResized, fmt.Errorf("from %d to %d bytes", a.size, d.img.size))
	case a.epoch < d.track.epoch:
		return invalid(d.track.lost, nil)
	case a.epoch > d.track.epoch || a.gen >= d.track.gen || a.gen < 1:
		return invalid(hypervisor.ReasonBaselineMissing, errors.New("it was never given out"))
	}
	if !w.opts.NoBaselines {
		if set := v.anchors[b.Name]; set == nil || set.disks[d.cfg.ID] != b {
			return invalid(hypervisor.ReasonBaselineMissing, fmt.Errorf("nothing is kept for %s", b.Name))
		}
	}
	return changeSet{extents: d.track.since(a.gen, d.img.size)}
}
