package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

type demoFlags struct {
	keep bool
	seed uint64
	lie  bool
}

func (p *program) demoCommand() *cobra.Command {
	var f demoFlags
	c := &cobra.Command{
		Use:   "demo",
		Short: "Run the whole cycle on a simulated hypervisor: nothing to install",
		Long: `Run the whole cycle on a simulated hypervisor: nothing to install.

The hypervisor and its virtual machine live in memory. Everything else is real:
the pipelines, the repository on disk with its encryption and deduplication, the
digests, and the comparison of every restored byte with the truth.

With --lying-tracker the hypervisor hides what the guest changes, and the demo
shows what that does, and how an audit finds it.`,
		Args: exactly(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return p.demo(cmd.Context(), &f) },
	}
	c.Flags().BoolVar(&f.keep, "keep", false, "keep the directory with the repository and the restored files")
	c.Flags().Uint64Var(&f.seed, "seed", 1, "`number` that decides what the guest writes")
	c.Flags().BoolVar(&f.lie, "lying-tracker", false, "show what happens when the hypervisor's change tracking lies")
	return c
}

// demoDoc is what the demo did and proved.
type demoDoc struct {
	Status string     `json:"status"`
	Steps  []demoStep `json:"steps"`
	Proven []string   `json:"proven"`
	Dir    string     `json:"dir,omitempty"` // with --keep
	Error  *problem   `json:"error,omitempty"`
}

// demoStep is one step; which numbers it has depends on what it is.
type demoStep struct {
	Step       string  `json:"step"`
	Backup     bool    `json:"backup"`
	Detail     string  `json:"detail"`
	DiskBytes  int64   `json:"disk_bytes,omitempty"`
	ReadBytes  int64   `json:"read_bytes,omitempty"`
	Audited    int64   `json:"audited_bytes,omitempty"`
	Stored     int64   `json:"stored_bytes,omitempty"`
	DurationMS float64 `json:"duration_ms"`
}

// demo is the state of a demonstration.
type demo struct {
	p    *program
	site *demoSite
	dir  string
	repo repository.Repository
	doc  demoDoc
	// truth is what the disks held at the instant of each point's snapshot.
	truth  map[repository.PointID]map[hypervisor.DiskID]truth
	start  time.Time
	onDisk int64 // bytes of the repository
}

func (p *program) demo(ctx context.Context, f *demoFlags) (err error) {
	dir, err := os.MkdirTemp("", "holdfast-demo-")
	if err != nil {
		return err
	}
	d := &demo{
		p: p, dir: dir, start: p.clock.Now(), truth: map[repository.PointID]map[hypervisor.DiskID]truth{},
		doc: demoDoc{Status: statusFailed, Steps: []demoStep{}, Proven: []string{}},
	}
	if f.lie {
		err = d.runLie(ctx, f)
	} else {
		err = d.run(ctx, f)
	}
	if d.repo != nil {
		err = errors.Join(err, d.repo.Close())
	}
	if f.keep {
		d.doc.Dir = dir
	} else {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	if err == nil {
		d.doc.Status = statusSuccess
	} else {
		d.doc.Error = explain(ctx, err)
		p.ended(d.doc.Error.exit())
	}
	switch {
	case p.json:
		p.emit(d.doc)
	case err != nil:
	case f.lie:
		d.lieSummary(f)
	default:
		d.summary(f)
	}
	if err != nil {
		p.complain(d.doc.Error)
		return errReported
	}
	return nil
}

func (d *demo) run(ctx context.Context, f *demoFlags) error {
	p := d.p
	p.say("Holdfast demo: a virtual machine is backed up, changes, is backed up again, and comes back.\n")
	if err := d.build(ctx, f.seed); err != nil {
		return err
	}
	full, err := d.backup(ctx, demoBackup{name: "full backup"})
	if err != nil {
		return err
	}
	if err := d.change(); err != nil {
		return err
	}
	incr, err := d.backup(ctx, demoBackup{name: "incremental", modes: expectModes{"system": backup.Incremental, "data": backup.Incremental}})
	if err != nil {
		return err
	}
	if err := d.site.loseTracking(); err != nil {
		return err
	}
	lost, err := d.backup(ctx, demoBackup{name: "tracking lost", modes: expectModes{"system": backup.Incremental, "data": backup.Full}})
	if err != nil {
		return err
	}
	if err := d.restoreVM(ctx, lost.Point()); err != nil {
		return err
	}
	for _, r := range []*backup.Result{full, incr} {
		if err := d.restoreFiles(ctx, r.Point()); err != nil {
			return err
		}
	}
	return d.verify(ctx, statusSound)
}

// build makes the virtual machine and the repository.
func (d *demo) build(ctx context.Context, seed uint64) error {
	begin := d.p.clock.Now()
	site, err := newDemoSite(d.p, seed)
	if err != nil {
		return err
	}
	d.site = site
	d.step(demoStep{
		Step: "the machine", Detail: site.describe(), DiskBytes: site.size(), DurationMS: d.since(begin),
	})
	begin = d.p.clock.Now()
	var pw [16]byte
	if _, err := rand.Read(pw[:]); err != nil {
		return err
	}
	where := filepath.Join(d.dir, "repository")
	d.repo, err = d.p.connect.Repository(ctx, connect.RepositoryConfig{Location: where, Password: connect.NewSecret(hex.EncodeToString(pw[:])), Create: true})
	if err != nil {
		return err
	}
	d.step(demoStep{
		Step: "the repository", Detail: fmt.Sprintf("%s, encrypted, in %s", d.repo.Info().Engine, where), DurationMS: d.since(begin),
	})
	return nil
}

// change is a day's work of the guest.
func (d *demo) change() error {
	begin := d.p.clock.Now()
	n, err := d.site.work()
	if err != nil {
		return err
	}
	d.step(demoStep{Step: "the guest works", Detail: fmt.Sprintf("%s written, zeroed or discarded, the last sector too", bytesText(n)), DurationMS: d.since(begin)})
	return nil
}

type expectModes map[hypervisor.DiskID]backup.Mode

// demoBackup is a backup of the demo and what must come of it.
type demoBackup struct {
	name   string
	modes  expectModes
	audit  backup.AuditRate
	seed   uint64 // of the audit
	mayLie bool   // it may find that the change tracking lies
}

// backup backs the machine up while its guest goes on writing.
func (d *demo) backup(ctx context.Context, b demoBackup) (*backup.Result, error) {
	name := b.name
	w := d.p.passing()
	events := backupEvents(d.p, w)
	stage := events.Stage
	writer := d.site.disturber()
	events.Stage = func(e backup.StageEvent) {
		stage(e)
		if e.Stage == backup.StageSnapshot && e.Done && e.Err == nil {
			writer.begin() // what is written from now on must not be in the point
		}
	}
	res, err := backup.Run(ctx, d.site.hv, d.repo, d.site.vm, &backup.Options{
		Events: events, StateDir: filepath.Join(d.dir, "state"), Endpoint: "fake:demo", Location: filepath.Join(d.dir, "repository"), Clock: d.p.clock,
		Audit: b.audit, AuditSeed: b.seed,
	})
	w.end()
	disturbed, werr := writer.end()
	if err := errors.Join(err, werr); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	caught := slices.ContainsFunc(res.Disks, func(x backup.DiskResult) bool { return x.Audit.Lied() })
	if res.Status() != backup.Success && !(b.mayLie && caught) {
		return nil, fmt.Errorf("%s is %s: %v", name, res.Status(), res.Degraded)
	}
	for _, x := range res.Disks {
		if m, ok := b.modes[x.ID]; ok && x.Mode != m {
			return nil, fmt.Errorf("%s: disk %s was read %s (%s), and %s was expected", name, x.ID, x.Mode, x.Reason, m)
		}
	}
	if disturbed == 0 {
		return nil, fmt.Errorf("%s: the guest did not get to write during the backup", name)
	}
	d.truth[res.Point()] = d.site.atFreeze()
	size, read, stored := res.Totals()
	detail := fmt.Sprintf("read %s of %s (%s), stored %s", bytesText(read), bytesText(size), share(read, size), bytesText(stored))
	if n := res.Audited(); n > 0 {
		detail += fmt.Sprintf(", audited %s", bytesText(n))
	}
	for _, x := range res.Disks {
		if x.Mode == backup.Full && x.Reason != backup.ReasonFirst {
			detail += fmt.Sprintf("; disk %s in full: %s", x.ID, x.Reason)
		}
	}
	d.step(demoStep{
		Step: name, Backup: true, Detail: detail, DiskBytes: size, ReadBytes: read, Audited: res.Audited(), Stored: stored, DurationMS: ms(res.Finished.Sub(res.Started)),
	})
	return res, nil
}

func (d *demo) since(t time.Time) float64 { return ms(d.p.clock.Now().Sub(t)) }

// step tells of a step that is done.
func (d *demo) step(s demoStep) {
	d.doc.Steps = append(d.doc.Steps, s)
	d.p.say("  %-16s  %8s  %s", s.Step, durationText(msDuration(s.DurationMS)), s.Detail)
}

func (d *demo) proved(format string, args ...any) {
	d.doc.Proven = append(d.doc.Proven, fmt.Sprintf(format, args...))
}
