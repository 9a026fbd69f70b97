package backup

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/internal/journal"
	"github.com/holdfast-backup/holdfast/internal/lease"
	"github.com/holdfast-backup/holdfast/internal/manifest"
	"github.com/holdfast-backup/holdfast/repository"
)

// RecoverOptions say how Recover finds what interrupted runs used.
type RecoverOptions struct {
	// StateDir holds the journals of runs of this host.
	StateDir  string
	JournalFS journal.FS // as in Options
	// Connect opens the hypervisor of an endpoint that a run recorded.
	Connect func(ctx context.Context, endpoint string) (hypervisor.Hypervisor, error)
	// OpenRepository opens the repository of a location that a run recorded.
	OpenRepository func(ctx context.Context, location string) (repository.Repository, error)
	// Location, if set, is a repository whose notes are gone through too: they
	// hold the obligations of runs of other hosts.
	Location string

	Takeover func(holder string) bool // as in Options
	Clock    clock.Clock              // nil: the real one
}

// Recovered is what Recover did about one obligation.
type Recovered struct {
	Run    string
	Kind   string // what was owed: "thaw", "snapshot", ...
	VM     hypervisor.VMID
	Object string
	Err    error // nil: closed; else it stays open
}

// Recover closes what interrupted runs left open: guests are thawed first of
// all, then snapshots released, baselines that no restore point needs forgotten,
// unfinished VMs and files removed. Runs that are alive are left alone. What
// cannot be closed stays open and is reported with its error; the error that is
// returned beside the list means that the journals could not be read.
func Recover(ctx context.Context, o RecoverOptions) ([]Recovered, error) {
	if o.Clock == nil {
		o.Clock = clock.Real()
	}
	if o.Takeover == nil {
		o.Takeover = lease.Dead
	}
	rc := &recoverer{o: o, hvs: map[string]hypervisor.Hypervisor{}, repos: map[string]repository.Repository{}}
	defer rc.close()
	if err := rc.adopt(); err != nil {
		return rc.done, err
	}
	if err := rc.notes(ctx); err != nil {
		rc.done = append(rc.done, Recovered{Kind: "notes", Object: o.Location, Err: err})
	}
	rc.work(ctx)
	rc.settle(ctx)
	return rc.done, nil
}

// debt is an open obligation and where it is recorded.
type debt struct {
	journal.OpenObligation
	run      *debtor
	location string
}

// debtor is a run that owes something.
type debtor struct {
	run      string
	j        *journal.Journal // nil: known from the repository's note alone
	location string
	debts    int // still open
}

type recoverer struct {
	o     RecoverOptions
	hvs   map[string]hypervisor.Hypervisor
	repos map[string]repository.Repository
	runs  []*debtor
	debts []debt
	done  []Recovered
}

// adopt takes over the journals of dead runs.
func (rc *recoverer) adopt() error {
	entries, err := rc.journals()
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Alive {
			continue
		}
		if err := rc.take(e); err != nil {
			rc.done = append(rc.done, Recovered{Run: e.Run, Kind: "journal", Object: e.Path, Err: err})
		}
	}
	return nil
}

// journals lists the unfinished runs of this host.
func (rc *recoverer) journals() ([]journal.Entry, error) {
	if rc.o.StateDir == "" {
		return nil, nil
	}
	return journal.List(JournalDir(rc.o.StateDir), &journal.Options{Now: rc.o.Clock.Now, FS: rc.o.JournalFS})
}

// take takes over one journal, unless its run lives.
func (rc *recoverer) take(e journal.Entry) error {
	j, err := journal.Adopt(JournalDir(rc.o.StateDir), e.Run, &journal.Options{Now: rc.o.Clock.Now, FS: rc.o.JournalFS})
	if errors.Is(err, journal.ErrAlive) {
		return nil
	}
	if err != nil {
		return err
	}
	d := &debtor{run: e.Run, j: j, location: e.Header.Repository}
	rc.runs = append(rc.runs, d)
	for _, ob := range j.Open() {
		rc.debts = append(rc.debts, debt{OpenObligation: ob, run: d, location: e.Header.Repository})
		d.debts++
	}
	return nil
}

// notes adds what the repository knows of runs of other hosts.
func (rc *recoverer) notes(ctx context.Context) error {
	if rc.o.Location == "" {
		return nil
	}
	repo, err := rc.repo(ctx, rc.o.Location)
	if err != nil {
		return err
	}
	for n, err := range repo.Notes(ctx, notePrefix) {
		if err != nil {
			return err
		}
		run := strings.TrimPrefix(n.Name, notePrefix)
		if slices.ContainsFunc(rc.runs, func(d *debtor) bool { return d.run == run }) {
			continue
		}
		entries, err := rc.journals()
		if err != nil {
			return err
		}
		if i := slices.IndexFunc(entries, func(e journal.Entry) bool { return e.Run == run }); i >= 0 {
			// A run of this host: it lives, or died since the journals were listed.
			// The lock of a killed one can outlive it, in a child that it was starting.
			// Of one that cannot be read, which adopt has told of, the note is left.
			if entries[i].Alive || rc.take(entries[i]) == nil {
				continue
			}
		}
		var v note
		if err := json.Unmarshal(n.Value, &v); err != nil {
			return fmt.Errorf("note %s: %w", n.Name, err)
		}
		d := &debtor{run: run, location: rc.o.Location}
		rc.runs = append(rc.runs, d)
		kinds := []journal.Kind{journal.Snapshot, journal.Baseline}
		if v.Frozen {
			kinds = append(kinds, journal.Thaw)
		}
		for _, k := range kinds {
			rc.debts = append(rc.debts, debt{run: d, location: rc.o.Location, OpenObligation: journal.OpenObligation{Obligation: journal.Obligation{
				Kind: k, Endpoint: v.Endpoint, VM: string(v.VM), Object: v.Name, Data: map[string]string{"chain": v.Chain},
			}}})
			d.debts++
		}
	}
	return nil
}

// work closes the debts in the canonical order over all runs: every guest is
// thawed before anything else is done.
func (rc *recoverer) work(ctx context.Context) {
	slices.SortStableFunc(rc.debts, func(a, b debt) int { return cmp.Compare(a.Kind.Order(), b.Kind.Order()) })
	for _, d := range rc.debts {
		err := rc.pay(ctx, d)
		if err == nil && d.run.j != nil {
			err = d.run.j.Discharge(d.ID)
		}
		if err == nil {
			d.run.debts--
		}
		rc.done = append(rc.done, Recovered{Run: d.run.run, Kind: string(d.Kind), VM: hypervisor.VMID(d.VM), Object: d.Object, Err: err})
	}
}

func (rc *recoverer) pay(ctx context.Context, d debt) error {
	if d.Kind == journal.LocalFile {
		if err := os.Remove(d.Object); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	hv, err := rc.hypervisor(ctx, d.Endpoint)
	if err != nil {
		return err
	}
	vm := hypervisor.VMID(d.VM)
	switch d.Kind {
	case journal.Thaw:
		err := hypervisor.Thaw(ctx, hv, vm)
		if errors.Is(err, hypervisor.ErrNotFound) || errors.Is(err, errors.ErrUnsupported) {
			return nil // no VM, or none that can be frozen
		}
		return err
	case journal.Snapshot:
		return rc.leased(ctx, d, func(ctx context.Context, repo repository.Repository, _ fence) error {
			keep, err := committed(ctx, repo, d.run.run)
			if err != nil {
				return err
			}
			return releaseNamed(ctx, hv, vm, d.Object, keep)
		})
	case journal.Baseline:
		return rc.leased(ctx, d, func(ctx context.Context, repo repository.Repository, fence fence) error {
			return reconcile(ctx, hv, repo, vm, fence, d.Data["chain"])
		})
	case journal.IncompleteVM:
		return deleteIncomplete(ctx, hv, d.Object)
	}
	return fmt.Errorf("obligation of kind %s: %w", d.Kind, errors.ErrUnsupported)
}

// leased does something under the lease of the VM's chain.
func (rc *recoverer) leased(ctx context.Context, d debt, do func(context.Context, repository.Repository, fence) error) (err error) {
	repo, err := rc.repo(ctx, d.location)
	if err != nil {
		return err
	}
	work, l, err := lease.Take(ctx, repo, leaseName(d.Data["chain"]), lease.Options{
		Holder: lease.Holder("recover"), Takeover: rc.o.Takeover, Clock: rc.o.Clock,
	})
	if err != nil {
		return err
	}
	defer func() {
		rctx, cancel := clock.WithTimeout(context.WithoutCancel(ctx), rc.o.Clock, repository.DefaultTTL)
		defer cancel()
		err = errors.Join(err, l.Release(rctx))
	}()
	return do(work, repo, l.Check)
}

func committed(ctx context.Context, repo repository.Repository, run string) (bool, error) {
	for p, err := range repo.Points(ctx, repository.Query{Run: run}) {
		if err != nil {
			return false, err
		}
		if p.State == repository.Committed {
			return true, nil
		}
	}
	return false, nil
}

// reconcile forgets the baselines of a repository that its newest point of the
// chain does not stand on.
func reconcile(ctx context.Context, hv hypervisor.Hypervisor, repo repository.Repository, vm hypervisor.VMID, fence fence, chain string) error {
	p := &Plan{Chain: chain, VM: VMRef{ID: vm, Name: string(vm)}}
	pt, err := newest(ctx, repo, p)
	if err != nil {
		return err
	}
	declared := map[hypervisor.DiskID]hypervisor.Baseline{}
	if pt != nil {
		man, err := manifest.Parse(pt)
		if err != nil {
			return err
		}
		for _, d := range man.Disks {
			if d.Baseline != nil {
				declared[d.ID] = *d.Baseline
			}
		}
	}
	return forgetOthers(ctx, hv, vm, fence, repo.Info().Repo8(), declared)
}

// deleteIncomplete removes a VM that a restore began and did not finish.
func deleteIncomplete(ctx context.Context, hv hypervisor.Hypervisor, owner string) error {
	target, ok := hv.(hypervisor.Target)
	if !ok {
		return fmt.Errorf("remove unfinished VM %s: %w", owner, errors.ErrUnsupported)
	}
	for vm, err := range hv.VMs(ctx, hypervisor.Query{Owner: owner}) {
		if err != nil {
			return err
		}
		if vm.Owner != owner || !vm.Incomplete {
			continue // finished before the crash: it is the user's
		}
		if err := target.DeleteVM(ctx, vm.ID); err != nil {
			return err
		}
	}
	return nil
}

// settle closes the journals of runs that owe nothing any more.
func (rc *recoverer) settle(ctx context.Context) {
	for _, d := range rc.runs {
		var err error
		if d.debts == 0 && d.location != "" {
			var repo repository.Repository
			if repo, err = rc.repo(ctx, d.location); err == nil {
				err = repo.DeleteNote(ctx, notePrefix+d.run)
			}
		}
		if d.j != nil {
			if cerr := d.j.Close(true); !errors.Is(cerr, journal.ErrOpen) {
				err = errors.Join(err, cerr)
			}
		}
		if err != nil {
			rc.done = append(rc.done, Recovered{Run: d.run, Kind: "journal", Err: err})
		}
	}
}

func (rc *recoverer) hypervisor(ctx context.Context, endpoint string) (hypervisor.Hypervisor, error) {
	if h, ok := rc.hvs[endpoint]; ok {
		return h, nil
	}
	if rc.o.Connect == nil {
		return nil, fmt.Errorf("no way to connect to %s: %w", endpoint, errors.ErrUnsupported)
	}
	h, err := rc.o.Connect(ctx, endpoint)
	if err == nil {
		rc.hvs[endpoint] = h
	}
	return h, err
}

func (rc *recoverer) repo(ctx context.Context, location string) (repository.Repository, error) {
	if r, ok := rc.repos[location]; ok {
		return r, nil
	}
	if rc.o.OpenRepository == nil {
		return nil, fmt.Errorf("no way to open repository %s: %w", location, errors.ErrUnsupported)
	}
	r, err := rc.o.OpenRepository(ctx, location)
	if err == nil {
		rc.repos[location] = r
	}
	return r, err
}

func (rc *recoverer) close() {
	for _, h := range rc.hvs {
		_ = h.Close() // nothing is pending on it
	}
	for _, r := range rc.repos {
		_ = r.Close()
	}
}
