package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/image/qcow2"
	"github.com/holdfast-backup/holdfast/image/raw"
	"github.com/holdfast-backup/holdfast/internal/journal"
	"github.com/holdfast-backup/holdfast/internal/manifest"
	"github.com/holdfast-backup/holdfast/repository"
)

// Format is a format of disk image files.
type Format string

// Formats.
const (
	Raw   Format = "raw"
	QCOW2 Format = "qcow2"
)

// ParseFormat checks a format's name; empty means Raw.
func ParseFormat(s string) (Format, error) {
	switch f := Format(s); f {
	case "":
		return Raw, nil
	case Raw, QCOW2:
		return f, nil
	}
	return "", fmt.Errorf("%q is not a format that disks can be restored in: use raw or qcow2: %w", s, errors.ErrUnsupported)
}

// DescriptionFile is the name of the file beside restored disks that describes
// the VM: the document of the restore point.
const DescriptionFile = "vm.json"

// partial ends the names of files that are not complete, as those of the image
// packages do.
const partial = raw.PartialSuffix

// newImage makes an image file that gets its name at Commit.
func newImage(f Format, path string, size int64) (hypervisor.DiskWriter, error) {
	if f == QCOW2 {
		return qcow2.Create(path, size)
	}
	return raw.Create(path, size)
}

// ToFiles restores the disks of a point as image files DIR/<disk>.<format>, with
// the VM's description, native configuration and attachments beside them. dir is
// made if it is not there. A file that exists is refused before anything is
// written. Files get their names when they are complete and durable; on any
// error those of this restore are removed.
func ToFiles(ctx context.Context, repo repository.Repository, point repository.PointID, dir string, format Format, opts *Options) (*Result, error) {
	o := opts.withDefaults()
	if _, err := ParseFormat(string(format)); err != nil {
		return nil, err
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	reader, err := repo.Open(ctx, point)
	if err != nil {
		return nil, fmt.Errorf("restore point %s: %w", point, err)
	}
	defer reader.Close() //nolint:errcheck // a reader has nothing to lose
	j, err := begin(reader, &o, "restore to files")
	if err != nil {
		return nil, err
	}
	f := &toFiles{job: j, dir: abs, format: format}
	if format == "" {
		f.format = Raw
	}
	err = f.run(ctx)
	j.res.Finished = o.Clock.Now()
	if j.j != nil {
		if cerr := j.j.Close(true); !errors.Is(cerr, journal.ErrOpen) {
			err = errors.Join(err, cerr)
		}
	}
	return j.res, err
}

type toFiles struct {
	*job
	dir    string
	format Format
	made   []made
}

// made is a file of this restore that is not final yet.
type made struct {
	path      string // without the ending for partial files
	discharge func() error
}

func (f *toFiles) run(ctx context.Context) (err error) {
	if err := f.stage("preflight", func() error { return f.preflight(ctx) }); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.undo())
		}
	}()
	if err := f.stage("create", f.create); err != nil {
		return err
	}
	if err := f.stage("transfer", func() error { return f.transfer(ctx) }); err != nil {
		return err
	}
	return f.stage("finish", f.finish)
}

// names returns the paths of all files that the restore makes.
func (f *toFiles) names() []string {
	var out []string
	for _, d := range f.disks {
		out = append(out, f.path(d))
	}
	out = append(out, filepath.Join(f.dir, DescriptionFile))
	for _, x := range f.reader.Point().Files {
		out = append(out, filepath.Join(f.dir, x.Name))
	}
	return out
}

func (f *toFiles) path(d *manifest.Disk) string {
	return filepath.Join(f.dir, string(d.ID)+"."+string(f.format))
}

// preflight refuses files that exist, and a file system without the room.
func (f *toFiles) preflight(ctx context.Context) error {
	seen := map[string]bool{}
	for _, p := range f.names() {
		if seen[p] {
			return fmt.Errorf("two parts of point %s would be the file %s", f.res.Point, p)
		}
		seen[p] = true
		for _, q := range []string{p, p + partial} {
			if _, err := os.Lstat(q); err == nil {
				return &hypervisor.Error{Op: "restore", Hint: "name an empty directory", Err: fmt.Errorf("file %s: %w", q, hypervisor.ErrExists)}
			} else if !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	var need int64
	for _, d := range f.disks {
		r, err := f.reader.Disk(ctx, string(d.ID))
		if err != nil {
			return err
		}
		for e, err := range r.Extents(ctx) {
			if err != nil {
				return errors.Join(err, r.Close())
			}
			need += e.Length
		}
		if err := r.Close(); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(f.dir, 0o755); err != nil {
		return err
	}
	free, err := freeBytes(f.dir)
	if errors.Is(err, errors.ErrUnsupported) {
		f.o.Events.notice("free space of " + f.dir + " is not known on this system")
		return nil
	}
	if err == nil && free < need {
		err = &hypervisor.Error{Op: "restore", Hint: "free some, or name another directory", Err: fmt.Errorf("%s has %d bytes free and the disks hold %d bytes of data: %w", f.dir, free, need, hypervisor.ErrNoSpace)}
	}
	return err
}

// create records every file before it is there.
func (f *toFiles) create() error {
	for _, p := range f.names() {
		discharge, err := f.intend(journal.Obligation{Kind: journal.LocalFile, Object: p + partial})
		if err != nil {
			return err
		}
		f.made = append(f.made, made{p, discharge})
	}
	return nil
}

func (f *toFiles) transfer(ctx context.Context) error {
	f.res.Disks = make([]DiskResult, len(f.disks))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxDisks)
	for i, d := range f.disks {
		g.Go(func() (err error) {
			res := &f.res.Disks[i]
			res.ID, res.Path = d.ID, f.path(d)
			w, err := newImage(f.format, f.path(d), d.Size)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, w.Close()) }()
			if err := f.copyDisk(gctx, d.ID, w, res); err != nil {
				return err
			}
			return w.Commit()
		})
	}
	g.Go(func() error { return f.small(gctx) })
	return g.Wait()
}

// small writes the files beside the disks.
func (f *toFiles) small(ctx context.Context) error {
	text, err := json.MarshalIndent(f.man, "", "  ")
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(f.dir, DescriptionFile)+partial, text); err != nil {
		return err
	}
	for _, x := range f.reader.Point().Files {
		r, err := f.reader.File(ctx, x.Name)
		if err != nil {
			return err
		}
		data, err := io.ReadAll(io.LimitReader(r, repository.MaxFile+1))
		if err = errors.Join(err, r.Close()); err != nil {
			return err
		}
		if int64(len(data)) != x.Size {
			return fmt.Errorf("file %s of point %s has %d bytes and the record says %d: %w", x.Name, f.res.Point, len(data), x.Size, repository.ErrDamaged)
		}
		if err := writeFile(filepath.Join(f.dir, x.Name)+partial, data); err != nil {
			return err
		}
	}
	return nil
}

// writeFile makes a file durable; only its owner may read it, since
// configurations can hold secrets.
func writeFile(path string, data []byte) (err error) {
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if _, err := w.Write(data); err != nil {
		return err
	}
	return w.Sync()
}

// finish gives the small files their names; the disks have theirs.
func (f *toFiles) finish() error {
	for _, m := range f.made[len(f.disks):] {
		if err := os.Rename(m.path+partial, m.path); err != nil {
			return err
		}
	}
	if err := syncDir(f.dir); err != nil {
		return err
	}
	for _, m := range f.made {
		if err := m.discharge(); err != nil {
			return err
		}
	}
	for _, m := range f.made[len(f.disks):] {
		f.res.Files = append(f.res.Files, m.path)
	}
	f.made = nil
	return nil
}

// undo removes what this restore made, finished or not.
func (f *toFiles) undo() error {
	var errs []error
	for _, m := range f.made {
		gone := true
		for _, p := range []string{m.path, m.path + partial} {
			if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, fmt.Errorf("cleanup: %w", err))
				gone = false
			}
		}
		if gone {
			errs = append(errs, m.discharge())
		}
	}
	return errors.Join(errs...)
}
