package kvmlab

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// LeftoverKind is a kind of thing that a backup product may leave behind.
type LeftoverKind string

// Kinds of leftovers.
const (
	// LeftCheckpoint is a libvirt checkpoint; declared baselines are among them.
	LeftCheckpoint LeftoverKind = "checkpoint"
	// LeftBitmap is a dirty bitmap of a disk that belongs to no checkpoint.
	LeftBitmap LeftoverKind = "bitmap"
	// LeftJob is an active domain job.
	LeftJob LeftoverKind = "job"
	// LeftFrozen is a guest whose file systems are frozen.
	LeftFrozen LeftoverKind = "frozen"
	// LeftSocket is a listening Unix socket or its file.
	LeftSocket LeftoverKind = "socket"
	// LeftFile is a file in one of the searched directories: scratch, for example.
	LeftFile LeftoverKind = "file"
	// LeftDomain is a domain with the lab's prefix that the lab did not make.
	LeftDomain LeftoverKind = "domain"
)

// Leftover is one thing found by a census.
type Leftover struct {
	Kind LeftoverKind
	// Domain is the domain it belongs to, empty for files and sockets.
	Domain string
	// ID is a checkpoint's name, "disk/bitmap", a path or a job's domain.
	ID string
}

// String returns "kind domain id".
func (l Leftover) String() string {
	return strings.TrimSpace(fmt.Sprintf("%s %s %s", l.Kind, l.Domain, l.ID))
}

// Leftovers counts what is there beyond what the lab made: of every machine in vms
// its checkpoints, bitmaps without checkpoint, active job and frozen state; domains
// with the lab's prefix that are not in vms; every file and socket below dirs; and
// sockets that somebody still listens on, below dirs or the lab's directory, even if
// their file is gone.
// The caller takes away what it declares: baselines, foreign checkpoints.
func (l *Lab) Leftovers(vms []*VM, dirs ...string) ([]Leftover, error) {
	var all []Leftover
	known := map[string]bool{}
	var errs []error
	for _, v := range vms {
		known[v.Name] = true
		found, err := v.leftovers()
		all = append(all, found...)
		errs = append(errs, err)
	}
	names, err := l.Domains(l.prefix)
	errs = append(errs, err)
	for _, n := range names {
		if !known[n] {
			all = append(all, Leftover{Kind: LeftDomain, Domain: n, ID: n})
		}
	}
	files, err := filesBelow(dirs)
	errs = append(errs, err)
	all = append(all, files...)
	sockets, err := l.sockets(dirs)
	errs = append(errs, err)
	all = append(all, sockets...)
	return all, errors.Join(errs...)
}

func (v *VM) leftovers() ([]Leftover, error) {
	var all []Leftover
	found, err := v.lab.Domains(v.Name)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	active, err := v.lab.jobActive(v.Name)
	if err != nil {
		return nil, err
	}
	if active {
		all = append(all, Leftover{LeftJob, v.Name, v.Name})
	}
	cps, err := v.lab.checkpoints(v.Name)
	if err != nil {
		return all, err
	}
	known := map[string]bool{}
	for _, c := range cps {
		known[c] = true
		all = append(all, Leftover{LeftCheckpoint, v.Name, c})
	}
	bitmaps, err := v.strayBitmaps(known)
	all = append(all, bitmaps...)
	if err != nil {
		return all, err
	}
	frozen, err := v.TryFrozen()
	if err == nil && frozen {
		all = append(all, Leftover{LeftFrozen, v.Name, v.Name})
	}
	if err != nil && v.spec.Guest != nil && !v.spec.Guest.NoAgent {
		return all, fmt.Errorf("frozen state of %s: %w", v.Name, err)
	}
	return all, nil
}

func (v *VM) strayBitmaps(checkpoints map[string]bool) ([]Leftover, error) {
	var all []Leftover
	state, err := v.lab.Virsh("domstate", v.Name)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	disks := append([]*vmDisk(nil), v.disks...)
	v.mu.Unlock()
	for _, d := range disks {
		src, format, err := v.trySource(d.target)
		if err != nil || src == "" || format != "qcow2" {
			continue // detached meanwhile, no medium, or a format without bitmaps
		}
		var names []string
		if state == "shut off" || state == "crashed" {
			names, err = ImageBitmaps(src)
		} else {
			names, err = v.liveBitmaps(src, format)
		}
		if err != nil {
			return all, err
		}
		for _, n := range names {
			if !checkpoints[n] {
				all = append(all, Leftover{LeftBitmap, v.Name, d.target + "/" + n})
			}
		}
	}
	return all, nil
}

func filesBelow(dirs []string) ([]Leftover, error) {
	var all []Leftover
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil
			case err != nil:
				return err
			case e.IsDir():
				return nil
			case e.Type()&fs.ModeSocket != 0:
				all = append(all, Leftover{LeftSocket, "", path})
			default:
				all = append(all, Leftover{LeftFile, "", path})
			}
			return nil
		})
		if err != nil {
			return all, err
		}
	}
	return all, nil
}

// sockets lists listening Unix sockets, which may outlive their file.
func (l *Lab) sockets(dirs []string) ([]Leftover, error) {
	raw, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return nil, err
	}
	var all []Leftover
	sc := bufio.NewScanner(bytes.NewReader(raw))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		// Num RefCount Protocol Flags Type St Inode Path; flag 0x10000 is listening.
		if len(f) < 8 || f[3] != "00010000" {
			continue
		}
		path := f[7]
		// Not by the product's name: another test's backup may run beside this one.
		if !below(path, dirs) && !below(path, []string{l.Dir}) {
			continue
		}
		if _, err := os.Lstat(path); err == nil && below(path, dirs) {
			continue // counted with its file
		}
		all = append(all, Leftover{LeftSocket, "", path})
	}
	return all, sc.Err()
}

func below(path string, dirs []string) bool {
	for _, d := range dirs {
		if strings.HasPrefix(path, filepath.Clean(d)+"/") {
			return true
		}
	}
	return false
}
