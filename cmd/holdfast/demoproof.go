package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/restore"
)

// restoreVM brings a point back as a new machine beside the old one.
func (d *demo) restoreVM(ctx context.Context, point repository.PointID) error {
	begin := d.p.clock.Now()
	w := d.p.passing()
	name := demoName + "-restored"
	res, err := restore.ToVM(ctx, d.repo, point, d.site.hv, &restore.VMOptions{Name: name}, &restore.Options{Events: restoreEvents(d.p, w, name), Clock: d.p.clock})
	w.end()
	if err != nil {
		return fmt.Errorf("restore as a new machine: %w", err)
	}
	var total int64
	for _, id := range demoDisks() {
		r, err := d.site.hv.OpenDisk(ctx, res.VM.ID, id)
		if err != nil {
			return err
		}
		n, err := compare(r, r.Size(), d.truth[point][id])
		if err = errors.Join(err, r.Close()); err != nil {
			return fmt.Errorf("disk %s of the restored machine: %w", id, err)
		}
		total += n
	}
	if err := d.compareNVRAM(ctx, res.VM); err != nil {
		return err
	}
	d.step(demoStep{
		Step: "restore as a VM", Detail: fmt.Sprintf("%s, new UUID and MAC address; %s compared with the truth: identical", name, bytesText(total)),
		DiskBytes: total, DurationMS: d.since(begin),
	})
	d.proved("the newest point came back as a new machine, identical in all of its %d bytes, UEFI variables too", total)
	return nil
}

func (d *demo) compareNVRAM(ctx context.Context, vm *hypervisor.VM) error {
	for _, a := range vm.Attachments {
		if a.Kind != "nvram" {
			continue
		}
		r, err := a.Open(ctx)
		if err != nil {
			return err
		}
		got, err := io.ReadAll(r)
		if err = errors.Join(err, r.Close()); err != nil {
			return err
		}
		if !bytes.Equal(got, d.site.nvram) {
			return fmt.Errorf("the UEFI variables of the restored machine are not those of the original")
		}
		return nil
	}
	return fmt.Errorf("the restored machine has no UEFI variables")
}

// restoreFiles brings a point back as raw files, and compares them.
func (d *demo) restoreFiles(ctx context.Context, point repository.PointID) error {
	begin := d.p.clock.Now()
	dir := filepath.Join(d.dir, "restored", string(point))
	w := d.p.passing()
	_, err := restore.ToFiles(ctx, d.repo, point, dir, restore.Raw, &restore.Options{Events: restoreEvents(d.p, w, demoName), Clock: d.p.clock})
	w.end()
	if err != nil {
		return fmt.Errorf("restore to files: %w", err)
	}
	var total int64
	for _, id := range demoDisks() {
		n, err := compareFile(filepath.Join(dir, string(id)+".raw"), d.truth[point][id])
		if err != nil {
			return err
		}
		total += n
	}
	d.step(demoStep{
		Step: "restore to files", Detail: fmt.Sprintf("point %s; %s compared with the truth: identical", point, bytesText(total)), DiskBytes: total, DurationMS: d.since(begin),
	})
	d.proved("point %s came back as raw files, identical in all of its %d bytes", point, total)
	return nil
}

func compareFile(name string, want truth) (n int64, err error) {
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	n, err = compare(f, st.Size(), want)
	if err != nil {
		return n, fmt.Errorf("%s: %w", name, err)
	}
	return n, nil
}

// compare reads two disks in full and names the first difference.
func compare(got io.ReaderAt, size int64, want truth) (int64, error) {
	if want == nil {
		return 0, errors.New("the truth about the disk is not known")
	}
	if size != want.Size() {
		return 0, fmt.Errorf("%d bytes instead of %d", size, want.Size())
	}
	a, b := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(a)) {
		n := min(int64(len(a)), size-off)
		if _, err := io.ReadFull(io.NewSectionReader(got, off, n), a[:n]); err != nil {
			return off, err
		}
		if _, err := io.ReadFull(io.NewSectionReader(want, off, n), b[:n]); err != nil {
			return off, err
		}
		if i := firstDifference(a[:n], b[:n]); i >= 0 {
			return off, fmt.Errorf("byte %d is %#02x instead of %#02x", off+int64(i), a[i], b[i])
		}
	}
	return size, nil
}

// firstDifference returns the first index at which two slices of one length
// differ, -1 if they do not.
func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// verify checks the whole repository down to every block, and that nothing was
// left on the hypervisor.
// want is what the check has to say.
func (d *demo) verify(ctx context.Context, want string) error {
	begin := d.p.clock.Now()
	v, err := d.p.check(ctx, d.repo, nil, "data", d.p.passing())
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	switch {
	case v.Status == statusDamaged:
		return fmt.Errorf("verify found damage in %d places: %w", len(v.Damages), repository.ErrDamaged)
	case v.Status != want:
		return fmt.Errorf("verify says %s, and %s was expected", v.Status, want)
	}
	if len(v.Points) != len(d.truth) {
		return fmt.Errorf("verify saw %d restore points of %d", len(v.Points), len(d.truth))
	}
	d.step(demoStep{
		Step: "verify", Detail: fmt.Sprintf("%s and %s, down to every block: %s", plural(len(v.Points), "point", "points"), plural(int(v.Blobs), "stored object", "stored objects"), v.Status),
		ReadBytes: v.Bytes, DurationMS: d.since(begin),
	})
	if d.onDisk, err = dirSize(filepath.Join(d.dir, "repository")); err != nil {
		return err
	}
	d.proved("every stored object and every block of every point agrees with its digest")
	for _, l := range d.site.world.Leftovers() {
		if !l.Baseline {
			return fmt.Errorf("something was left on the hypervisor: %s", l.ID)
		}
	}
	if d.site.world.Frozen(d.site.vm) {
		return fmt.Errorf("the guest was left frozen")
	}
	d.proved("nothing is left on the hypervisor but the baseline of the next incremental, and the guest runs")
	return nil
}

// summary says what came out of it.
func (d *demo) summary(f *demoFlags) {
	p := d.p
	var disk, read, stored int64
	t := &table{indent: "  ", right: map[int]bool{1: true, 2: true, 3: true, 4: true}}
	t.add("", "disks", "read", "of disks", "stored")
	for _, s := range d.doc.Steps {
		if s.Backup {
			t.add(s.Step, bytesText(s.DiskBytes), bytesText(s.ReadBytes), share(s.ReadBytes, s.DiskBytes), bytesText(s.Stored))
			disk, read, stored = disk+s.DiskBytes, read+s.ReadBytes, stored+s.Stored
		}
	}
	t.add("together", bytesText(disk), bytesText(read), share(read, disk), bytesText(stored))
	p.say("")
	t.print(p.say)
	p.say("\n  %s that would be %s as plain copies take %s in the repository: %.0f times less.",
		plural(len(d.truth), "restore point", "restore points"), bytesText(disk), bytesText(d.onDisk), float64(disk)/float64(max(1, d.onDisk)))
	p.say("\nProven, while the guest kept writing during each backup:")
	for _, s := range d.doc.Proven {
		p.say("  * %s", s)
	}
	if f.keep {
		p.say("\nThe repository and the restored files are in %s", d.doc.Dir)
	}
	p.say("\nAll of it took %s. Your own machines: holdfast vms --from qemu:///system", durationText(p.clock.Now().Sub(d.start)))
}

// dirSize adds up the sizes of the files below dir.
func dirSize(dir string) (n int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		i, err := e.Info()
		if err == nil {
			n += i.Size()
		}
		return err
	})
	return n, err
}
