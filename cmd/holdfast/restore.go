package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/restore"
)

type restoreFlags struct {
	repo     repositoryFlags
	point    pointFlags
	to       hypervisorFlags
	name     string
	identity string
	maps     []string
	storage  string
	format   string
	disks    []string
	powerOn  bool
}

func (p *program) restoreCommand() *cobra.Command {
	var f restoreFlags
	c := &cobra.Command{
		Use:   "restore --repo REPO --point ID --to URL",
		Short: "Bring a restore point back as a new virtual machine, or as files",
		Long: `Bring a restore point back as a new virtual machine, or as files.

Nothing that exists is touched: a name that is taken is refused. The new virtual
machine has new UUIDs and MAC addresses unless --identity keep is given. Every
byte is compared with the digests of the backup before the restore succeeds.`,
		Example: `  holdfast restore --repo ./store --point latest --vm web1 --to qemu:///system --name web1-copy
  holdfast restore --repo ./store --point ID --to "file:./disks?format=raw"`,
		Args: exactly(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := errors.Join(required(cmd, "repo", f.repo.location), required(cmd, "point", f.point.point), required(cmd, "to", f.to.url)); err != nil {
				return err
			}
			return p.restore(cmd.Context(), &f)
		},
	}
	f.repo.add(c, repoHelp)
	f.point.add(c)
	f.to.add(c, "to", "`URL` of the hypervisor, or file:DIR?format=raw, or file:DIR?format=qcow2")
	fs := c.Flags()
	fs.StringVar(&f.name, "name", "", "`name` of the new virtual machine (default: the old one)")
	fs.StringVar(&f.identity, "identity", "new", "keep or new: UUID and MAC addresses")
	fs.StringArrayVar(&f.maps, "map", nil, "disk:`SRC=STORAGE` or net:SRC=DST; may be given several times")
	fs.StringVar(&f.storage, "storage", "", "`storage` of disks that are not mapped")
	fs.StringVar(&f.format, "format", "", "`format` of the disks (default: raw for files, else the target's)")
	fs.StringArrayVar(&f.disks, "disk", nil, "restore only this `disk`; may be given several times")
	fs.BoolVar(&f.powerOn, "power-on", false, "start the new virtual machine")
	return c
}

// restoreDoc is the outcome of a restore.
type restoreDoc struct {
	VM         string        `json:"vm"`
	Point      string        `json:"point"`
	Run        string        `json:"run,omitempty"`
	Status     string        `json:"status"`
	Target     string        `json:"target"`
	NewVM      *restoredVM   `json:"new_vm,omitempty"`
	Disks      []restoreDisk `json:"disks"`
	Files      []string      `json:"files"`
	Missing    []missingDisk `json:"missing"`
	DurationMS float64       `json:"duration_ms"`
	Error      *problem      `json:"error,omitempty"`
}

type restoredVM struct {
	VM   string `json:"vm"`
	ID   string `json:"id"`
	UUID string `json:"uuid"`
}

type restoreDisk struct {
	ID       string `json:"id"`
	Path     string `json:"path,omitempty"`
	Size     int64  `json:"size"`
	Data     int64  `json:"data_bytes"`
	Verified bool   `json:"verified"`
}

type missingDisk struct {
	ID     string `json:"id"`
	Reason string `json:"reason"`
}

// fileTarget is what --to file:DIR?format=F names.
type fileTarget struct {
	dir    string
	format restore.Format
}

// files reads --to; nil: it is not for files.
func (f *restoreFlags) files() (*fileTarget, error) {
	rest, ok := strings.CutPrefix(f.to.url, "file:")
	if !ok {
		return nil, nil
	}
	path, query, _ := strings.Cut(rest, "?")
	if strings.HasPrefix(path, "//") {
		path = strings.TrimPrefix(path, "//localhost")
		if path = strings.TrimPrefix(path, "//"); !strings.HasPrefix(path, "/") {
			return nil, usage("write --to file:DIR", fmt.Errorf("--to %s names a host", f.to.url))
		}
	}
	if path == "" {
		return nil, usage("write --to file:DIR", errors.New("--to file: names no directory"))
	}
	q, err := url.ParseQuery(query)
	if err != nil {
		return nil, usage("write --to file:DIR?format=raw", fmt.Errorf("--to: %w", err))
	}
	for k := range q {
		if k != "format" {
			return nil, usage("write --to file:DIR?format=raw", fmt.Errorf("--to: %q is not known", k))
		}
	}
	text := q.Get("format")
	if text != "" && f.format != "" && text != f.format {
		return nil, usage("", fmt.Errorf("--format %s and --to with format %s do not agree", f.format, text))
	}
	if text == "" {
		text = f.format
	}
	format, err := restore.ParseFormat(text)
	if err != nil {
		return nil, usage("", err)
	}
	if f.name != "" || len(f.maps) > 0 || f.storage != "" || f.powerOn {
		return nil, usage("", errors.New("--name, --map, --storage and --power-on have no meaning for files"))
	}
	if path, err = filepath.Abs(path); err != nil {
		return nil, err
	}
	return &fileTarget{dir: path, format: format}, nil
}

// vmOptions reads what the new VM shall be.
func (f *restoreFlags) vmOptions() (*restore.VMOptions, error) {
	v := &restore.VMOptions{
		Name: f.name, Identity: hypervisor.Identity(f.identity), Format: f.format, PowerOn: f.powerOn,
		Placement: hypervisor.Placement{Storage: f.storage},
		Storage:   map[hypervisor.DiskID]string{}, Networks: map[string]string{},
	}
	if v.Identity != hypervisor.IdentityKeep && v.Identity != hypervisor.IdentityNew {
		return nil, usage("", fmt.Errorf("--identity %q is neither keep nor new", f.identity))
	}
	for _, m := range f.maps {
		kind, pair, _ := strings.Cut(m, ":")
		src, dst, ok := strings.Cut(pair, "=")
		if !ok || src == "" || dst == "" || kind != "disk" && kind != "net" {
			return nil, usage("write --map disk:vda=STORAGE, or --map net:OLD=NEW", fmt.Errorf("--map %q cannot be read", m))
		}
		if kind == "net" {
			v.Networks[src] = dst
		} else {
			v.Storage[hypervisor.DiskID(src)] = dst
		}
	}
	return v, nil
}

func (p *program) restore(ctx context.Context, f *restoreFlags) error {
	files, err := f.files()
	if err != nil {
		return err
	}
	vo, err := f.vmOptions()
	if err != nil {
		return err
	}
	d := restoreDoc{VM: f.point.vm, Point: f.point.point, Status: statusFailed, Target: f.to.url, Disks: []restoreDisk{}, Files: []string{}, Missing: []missingDisk{}}
	res, err := p.restoreTo(ctx, f, files, vo, &d)
	if err != nil {
		pr := explain(ctx, err)
		if pr.exit() == exitUsage {
			return err
		}
		d.Error = pr
		p.ended(pr.exit())
	} else {
		d.Status = statusSuccess
		if len(res.Missing) > 0 && len(f.disks) == 0 && p.lacking(res) {
			d.Status = statusDegraded
			p.ended(exitDegraded)
		}
	}
	if res != nil {
		d.fill(res)
	}
	switch {
	case p.json:
		p.emit(d)
	case err == nil:
		p.showRestore(d)
	}
	if err != nil {
		p.complain(d.Error)
		return errReported
	}
	return nil
}

// lacking reports whether a disk is missing that no rule left out.
func (*program) lacking(res *restore.Result) bool {
	for _, m := range res.Missing {
		switch m.Reason {
		case hypervisor.ReasonCDROM, hypervisor.ReasonReadOnly, "rule-user":
		default:
			return true
		}
	}
	return false
}

func (p *program) restoreTo(ctx context.Context, f *restoreFlags, files *fileTarget, vo *restore.VMOptions, d *restoreDoc) (*restore.Result, error) {
	o := &restore.Options{Clock: p.clock}
	var err error
	if o.StateDir, err = p.stateDir(); err != nil {
		return nil, err
	}
	if o.Location, err = connect.Location(f.repo.location); err != nil {
		return nil, err
	}
	for _, id := range f.disks {
		o.Disks = append(o.Disks, hypervisor.DiskID(id))
	}
	var target hypervisor.Target
	if files != nil {
		d.Target = "file:" + files.dir + "?format=" + string(files.format)
	} else {
		if o.Endpoint, err = connect.Endpoint(f.to.config(p)); err != nil {
			return nil, err
		}
		d.Target = o.Endpoint
		hv, err := f.to.open(ctx, p)
		if err != nil {
			return nil, err
		}
		defer p.closing(hv)
		var can bool
		if target, can = hv.(hypervisor.Target); !can {
			return nil, &hypervisor.Error{Op: "restore", Platform: hv.Info().Platform, Hint: "restore to files with --to file:DIR", Err: fmt.Errorf("%s cannot receive virtual machines: %w", hv.Info().Product, errors.ErrUnsupported)}
		}
	}
	repo, err := f.repo.open(ctx, p, false)
	if err != nil {
		return nil, err
	}
	defer p.closing(repo)
	pt, err := f.point.find(ctx, repo)
	if err != nil {
		return nil, err
	}
	d.VM, d.Point = pt.Name, string(pt.ID)
	return p.runRestore(ctx, repo, pt, files, target, vo, o)
}

func (p *program) runRestore(ctx context.Context, repo repository.Repository, pt *repository.Point, files *fileTarget, target hypervisor.Target, vo *restore.VMOptions, o *restore.Options) (*restore.Result, error) {
	w := p.watcher()
	defer w.end()
	o.Events = restoreEvents(p, w, pt.Name)
	if files != nil {
		return restore.ToFiles(ctx, repo, pt.ID, files.dir, files.format, o)
	}
	return restore.ToVM(ctx, repo, pt.ID, target, vo, o)
}

func (d *restoreDoc) fill(res *restore.Result) {
	d.Run, d.DurationMS = res.Run, max(0, ms(res.Finished.Sub(res.Started)))
	d.Files = append(d.Files, res.Files...)
	if vm := res.VM; vm != nil {
		d.NewVM = &restoredVM{VM: vm.Name, ID: string(vm.ID), UUID: vm.UUID}
	}
	for _, x := range res.Disks {
		if x.ID != "" {
			d.Disks = append(d.Disks, restoreDisk{ID: string(x.ID), Path: x.Path, Size: x.Size, Data: x.Data, Verified: x.Verified})
		}
	}
	for _, m := range res.Missing {
		d.Missing = append(d.Missing, missingDisk{ID: string(m.ID), Reason: string(m.Reason)})
	}
}

func (p *program) showRestore(d restoreDoc) {
	where := d.Target
	if d.NewVM != nil {
		where = fmt.Sprintf("new virtual machine %s (%s) at %s", d.NewVM.VM, d.NewVM.UUID, d.Target)
	}
	p.say("%s: restore point %s is back as %s", d.VM, d.Point, where)
	t := &table{indent: "  ", right: map[int]bool{1: true}}
	var data int64
	for _, x := range d.Disks {
		proof := "every byte proven"
		if !x.Verified {
			proof = "NOT proven"
		}
		data += x.Data
		t.add(x.ID, bytesText(x.Size), bytesText(x.Data)+" of data", proof, x.Path)
	}
	t.print(p.say)
	for _, m := range d.Missing {
		p.say("  %s is not in the restore point: %s", m.ID, m.Reason)
	}
	took := msDuration(d.DurationMS)
	p.say("  in %s %s", durationText(took), rateText(data, took))
}
