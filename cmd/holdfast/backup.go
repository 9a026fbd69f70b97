package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

// selection says which disks to read, and how.
type selection struct {
	full    bool
	exclude []string
}

func (s *selection) add(c *cobra.Command) {
	c.Flags().BoolVar(&s.full, "full", false, "read every disk in full, whatever is known of changes")
	c.Flags().StringArrayVar(&s.exclude, "exclude", nil, "leave out this `disk`; may be given several times")
}

func (s *selection) apply(o *backup.Options) {
	o.Full = s.full
	for _, id := range s.exclude {
		o.ExcludeDisks = append(o.ExcludeDisks, hypervisor.DiskID(id))
	}
}

type backupFlags struct {
	from            hypervisorFlags
	repo            repositoryFlags
	what            selection
	failUnprotected bool
	consistency     string
	minConsistency  string
	quiesceTimeout  time.Duration
	noGuard         bool
	blockSize       byteSize
	audit           string
	auditSeed       uint64
}

func (p *program) backupCommand() *cobra.Command {
	var f backupFlags
	c := &cobra.Command{
		Use:   "backup --from URL --repo REPO VM...",
		Short: "Back up virtual machines while they run",
		Long: `Back up virtual machines while they run, one after another.

The first backup of a disk reads all that is allocated; later ones read what has
changed. When that cannot be known, the disk is read in full again, and the output
says why. The first backup into an empty directory makes the repository.

An incremental also reads a random sample of what the hypervisor calls unchanged,
and compares it with the last restore point. When the hypervisor is caught lying,
the disk is read in full at once and again by the next backup, the exit code is 3,
and holdfast points and holdfast verify name the points that may be wrong.`,
		Example: `  holdfast backup --from qemu:///system --repo ./store web1
  holdfast backup --from qemu:///system --repo ./store --consistency filesystem db1 db2`,
		Args: atLeastOne("the virtual machine"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := errors.Join(required(cmd, "from", f.from.url), required(cmd, "repo", f.repo.location)); err != nil {
				return err
			}
			return p.backup(cmd.Context(), &f, args)
		},
	}
	f.from.add(c, "from", fromHelp)
	f.repo.add(c, repoHelp)
	f.what.add(c)
	fs := c.Flags()
	fs.BoolVar(&f.failUnprotected, "fail-unprotected", false, "fail if a disk cannot be protected, instead of backing up the rest")
	fs.StringVar(&f.consistency, "consistency", "auto", "`level` to reach: auto, crash, filesystem or application")
	fs.StringVar(&f.minConsistency, "min-consistency", "crash", "`level` below which the backup fails: crash, filesystem or application")
	fs.DurationVar(&f.quiesceTimeout, "quiesce-timeout", hypervisor.DefaultQuiesceTimeout, "longest `time` that a guest may stay frozen")
	fs.BoolVar(&f.noGuard, "no-guard", false, "do not start the process that thaws a guest should this one die")
	f.blockSize = repository.DefaultBlockSize
	fs.StringVar(&f.audit, "audit", "auto", "how `much` of each disk to audit: a share such as 5%, a size such as 115MiB, all, off, or auto: at most 115 MiB and 5 %")
	fs.Uint64Var(&f.auditSeed, "audit-seed", 0, "`number` that decides what is audited, to repeat an audit; 0: a random one")
	fs.Var(&f.blockSize, "block-size", "`size` of blocks of disks that are new: 256K, 512K, 1M, 2M, 4M or 8M")
	return c
}

func (f *backupFlags) options(p *program) (*backup.Options, error) {
	q, err := backup.ParseQuiesce(f.consistency)
	if err != nil {
		return nil, usage("", fmt.Errorf("--consistency: %w", err))
	}
	level, err := hypervisor.ParseConsistency(f.minConsistency)
	if err != nil {
		return nil, usage("", fmt.Errorf("--min-consistency: %w", err))
	}
	if f.quiesceTimeout <= 0 {
		return nil, usage("", fmt.Errorf("--quiesce-timeout %s is not a time that a guest could freeze in", f.quiesceTimeout))
	}
	if q != backup.QuiesceAuto && level > hypervisor.Consistency(q-1) {
		return nil, usage("", fmt.Errorf("--min-consistency %s is more than --consistency %s asks for", level, q))
	}
	rate, err := backup.ParseAuditRate(f.audit)
	if err != nil {
		return nil, usage("", fmt.Errorf("--audit: %w", err))
	}
	o := &backup.Options{
		Audit: rate, AuditSeed: f.auditSeed,
		Quiesce: q, MinConsistency: level, QuiesceTimeout: f.quiesceTimeout,
		FailUnprotected: f.failUnprotected, BlockSize: int(f.blockSize), Clock: p.clock,
	}
	f.what.apply(o)
	if o.StateDir, err = p.stateDir(); err != nil {
		return nil, err
	}
	if o.Location, err = connect.Location(f.repo.location); err != nil {
		return nil, err
	}
	if o.Endpoint, err = connect.Endpoint(f.from.config(p)); err != nil {
		return nil, err
	}
	return o, nil
}

// backup backs up VMs one after another. Each has a document of its own, whatever
// happens to it.
func (p *program) backup(ctx context.Context, f *backupFlags, names []string) error {
	o, err := f.options(p)
	if err != nil {
		return p.allFailed(ctx, names, err)
	}
	hv, err := f.from.open(ctx, p)
	if err != nil {
		return p.allFailed(ctx, names, err)
	}
	defer p.closing(hv)
	// A name that is wrong must not make a repository.
	vms := make([]*hypervisor.VM, len(names))
	missing := make([]error, len(names))
	found := false
	for i, name := range names {
		vms[i], missing[i] = hypervisor.Find(ctx, hv, name)
		found = found || missing[i] == nil
	}
	var repo repository.Repository
	if found {
		if repo, err = f.repo.open(ctx, p, true); err != nil {
			return p.allFailed(ctx, names, err)
		}
		defer p.closing(repo)
	}
	for i, name := range names {
		switch {
		case context.Cause(ctx) != nil:
			p.backedUp(ctx, failedBackup(name), context.Cause(ctx))
		case missing[i] != nil:
			p.backedUp(ctx, failedBackup(name), missing[i])
		default:
			p.backupOne(ctx, f, hv, repo, vms[i], *o)
		}
	}
	return nil
}

func failedBackup(name string) backupDoc {
	return backupDoc{VM: name, Status: statusFailed, Disks: []backupDisk{}, Degraded: []string{}}
}

// allFailed reports the same error for each VM.
func (p *program) allFailed(ctx context.Context, names []string, err error) error {
	if !p.json {
		return err // once is enough for a person
	}
	for _, name := range names {
		d := failedBackup(name)
		d.Error = explain(ctx, err)
		p.ended(d.Error.exit())
		p.emit(d)
	}
	p.complain(explain(ctx, err))
	return errReported
}

func (p *program) backupOne(ctx context.Context, f *backupFlags, hv hypervisor.Hypervisor, repo repository.Repository, vm *hypervisor.VM, o backup.Options) {
	w := p.watcher()
	o.Events = backupEvents(p, w)
	var guard *guardWatch
	if _, can := hv.(hypervisor.Thawer); can && !f.noGuard && p.newGuard != nil {
		guard = &guardWatch{Guard: p.newGuard(p, guardConfig{from: f.from.config(p), stateDir: o.StateDir})}
		o.Guard = guard
	}
	res, err := backup.Run(ctx, hv, repo, vm.ID, &o)
	w.end()
	if guard != nil && guard.thawed && err == nil {
		// The freeze did not last until the snapshot was there, perhaps.
		res.Degraded = append(res.Degraded, errGuardThawed.Error())
	}
	if res.VM.Name == "" {
		res.VM.Name = vm.Name
	}
	p.backedUp(ctx, describeBackup(res), err)
}

// byteSize is a flag for a number of bytes with a unit.
type byteSize int64

// String implements pflag.Value.
func (b *byteSize) String() string {
	n := int64(*b)
	switch {
	case n > 0 && n%(1<<20) == 0:
		return fmt.Sprintf("%dM", n>>20)
	case n > 0 && n%(1<<10) == 0:
		return fmt.Sprintf("%dK", n>>10)
	}
	return fmt.Sprint(n)
}

// Type implements pflag.Value.
func (*byteSize) Type() string { return "size" }

// Set implements pflag.Value.
func (b *byteSize) Set(s string) error {
	digits, shift := s, 0
	switch {
	case strings.HasSuffix(s, "K"):
		digits, shift = s[:len(s)-1], 10
	case strings.HasSuffix(s, "M"):
		digits, shift = s[:len(s)-1], 20
	}
	n, err := strconv.ParseInt(digits, 10, 32)
	if err != nil || n<<shift > repository.MaxBlockSize || !repository.ValidBlockSize(int(n<<shift)) {
		return fmt.Errorf("%q is not a power of two from 256K to 8M", s)
	}
	*b = byteSize(n << shift)
	return nil
}
