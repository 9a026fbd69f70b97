package kvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// operations name the jobs of libvirt (virDomainJobOperation).
var operations = [...]string{
	"unknown", "start", "save", "restore", "incoming migration", "outgoing migration", "snapshot",
	"snapshot revert", "dump", "backup", "snapshot delete",
}

// checkIdle refuses at once, naming the cause, what libvirt would block for 30
// seconds or fail obscurely: a job of the domain, or a block job of one of its
// disks.
func (d *Driver) checkIdle(ctx context.Context, m *machine, disks []hypervisor.DiskID) error {
	if !m.active() {
		return nil
	}
	t, err := d.conn.jobType(ctx, m.UUID)
	if err != nil {
		return err
	}
	if t != jobNone && t < jobCompleted {
		return d.describeJob(ctx, m.UUID)
	}
	for _, id := range disks {
		kind, found, err := d.conn.blockJob(ctx, m.UUID, string(id))
		if err != nil {
			return err
		}
		if found {
			return fmt.Errorf("a block job (%s) runs on disk %s: %w", blockJobName(kind), id, hypervisor.ErrBusy)
		}
	}
	return nil
}

func (d *Driver) describeJob(ctx context.Context, uuid string) error {
	op, err := d.conn.jobOperation(ctx, uuid)
	if err != nil {
		return errors.Join(hypervisor.ErrBusy, err)
	}
	name := "unknown"
	if op >= 0 && op < len(operations) {
		name = operations[op]
	}
	if op == jobOperationBackup {
		if j, err := d.job(ctx, uuid); err == nil && j != nil {
			if owner := j.owner(uuid); owner != "" {
				return fmt.Errorf("backup %s is in progress: %w", owner, hypervisor.ErrBusy)
			}
		}
		name += " of another program"
	}
	return fmt.Errorf("a job of the domain is in progress: %s: %w", name, hypervisor.ErrBusy)
}

func blockJobName(kind int) string {
	names := [...]string{"unknown", "pull", "copy", "commit", "active commit", "backup"}
	if kind >= 0 && kind < len(names) {
		return names[kind]
	}
	return fmt.Sprint(kind)
}

// job returns the backup job of a domain, nil if there is none.
func (d *Driver) job(ctx context.Context, uuid string) (*backupJob, error) {
	text, err := d.conn.backupXML(ctx, uuid)
	switch code := virCode(err); {
	case code == virNoBackup, code == virOperationInvalid:
		return nil, nil //nolint:nilnil // no job is a regular answer
	case err != nil:
		return nil, err
	}
	return parseJob(text)
}

// checkScratch refuses a backup for which there is too little scratch space.
// sizes is the sum of the disks' sizes in bytes.
func (d *Driver) checkScratch(sizes int64) error {
	free, total, err := d.files.space(d.cfg.ScratchDir)
	if err != nil {
		return fmt.Errorf("scratch directory: %w", err)
	}
	need := d.cfg.ScratchMinFree
	if need == 0 {
		need = min(sizes, 1<<30) + d.reserve(total)
	}
	if free < need {
		return fmt.Errorf("scratch directory %s has %d bytes free, a backup needs %d: %w",
			d.cfg.ScratchDir, free, need, hypervisor.ErrNoSpace)
	}
	return nil
}

// reserve is how many bytes must stay free on a scratch file system of this size.
func (d *Driver) reserve(total int64) int64 {
	if d.cfg.ScratchReserve > 0 {
		return d.cfg.ScratchReserve
	}
	return min(max(total/20, 16<<20), 1<<30)
}

// guardPause is how long the guard may sleep while free bytes are left above the
// reserve: not longer than a fast disk needs to fill half of them.
func guardPause(headroom int64) time.Duration {
	const fastest = 2 << 30 // bytes per second
	return min(max(time.Duration(headroom/2)*time.Second/fastest, 5*time.Millisecond), 250*time.Millisecond)
}

// leftovers lists the owner names of scratch files of this domain.
func (d *Driver) leftovers(uuid string) ([]string, error) {
	entries, err := d.files.readDir(d.cfg.ScratchDir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		owner, id, _, ok := parseScratch(e.Name())
		if ok && id == uuid && !slices.Contains(names, owner) {
			names = append(names, owner)
		}
	}
	return names, nil
}

// markDisk stands in the name of a run's mark where scratch files have a disk. No
// target device of libvirt is called so.
const markDisk = "job"

// mark leaves a file that says that a job was begun. libvirt removes scratch files
// when the job ends, and QEMU leaves its socket: a process that is killed in
// between would leave a file that nobody can assign.
func (d *Driver) mark(owner, uuid string) error {
	f, err := d.files.open(filepath.Join(d.cfg.ScratchDir, scratchName(owner, uuid, markDisk)), os.O_WRONLY|os.O_CREATE)
	if err != nil {
		return fmt.Errorf("scratch directory: %w", err)
	}
	return f.Close()
}

// removeFiles removes the socket, the scratch files and, last, the mark of a run.
// Only regular files and sockets go, whatever somebody put there.
func (d *Driver) removeFiles(owner, uuid string) error {
	sock := filepath.Join(d.cfg.SocketDir, socketName(owner, uuid))
	if err := d.removeIf(sock, func(m fs.FileMode) bool { return m&fs.ModeSocket != 0 }); err != nil {
		return err
	}
	entries, err := d.files.readDir(d.cfg.ScratchDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if o, id, disk, ok := parseScratch(e.Name()); ok && o == owner && id == uuid && disk != markDisk && e.Type().IsRegular() {
			if err := d.removeFile(filepath.Join(d.cfg.ScratchDir, e.Name())); err != nil {
				return err
			}
		}
	}
	return d.removeFile(filepath.Join(d.cfg.ScratchDir, scratchName(owner, uuid, markDisk)))
}

// removeIf removes what is at path if it is of the right sort. Nothing need be there.
func (d *Driver) removeIf(path string, ok func(fs.FileMode) bool) error {
	fi, err := d.files.lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !ok(fi.Mode()):
		return nil
	}
	return d.removeFile(path)
}

func (d *Driver) removeFile(path string) error {
	if err := d.files.remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
