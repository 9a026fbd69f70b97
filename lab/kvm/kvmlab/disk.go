package kvmlab

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const (
	ovmfCode = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	ovmfVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"

	sector = 512
)

// vmDisk is a disk that the lab made.
type vmDisk struct {
	spec    Disk
	target  string
	bus     string
	device  string
	file    string // the image file, or the file behind loopDev
	loopDev string
}

func (d *vmDisk) source() string {
	if d.loopDev != "" {
		return d.loopDev
	}
	return d.file
}

// newDisk makes the image of a disk in the lab's directory. base names the file.
func (l *Lab) newDisk(t testing.TB, spec Disk, base, target string) *vmDisk {
	t.Helper()
	d := &vmDisk{spec: spec, target: target, bus: busOf(spec), device: spec.Device}
	if d.device == "" {
		d.device = "disk"
	}
	if spec.Size == 0 && (d.device == "cdrom" || d.device == "floppy") {
		return d
	}
	if spec.Size <= 0 || spec.Size%sector != 0 {
		t.Fatalf("lab: disk %s: size %d is not a positive multiple of %d", target, spec.Size, sector)
	}
	d.file = filepath.Join(l.Dir, base+"-"+target+"."+spec.Format.driver())
	raw := filepath.Join(l.Dir, base+"-"+target+".init")
	if err := fillRaw(raw, spec); err != nil {
		t.Fatalf("lab: disk %s: %v", target, err)
	}
	if err := d.fromRaw(l, raw); err != nil {
		t.Fatalf("lab: disk %s: %v", target, err)
	}
	return d
}

// fromRaw turns the raw file into the disk's image and removes it.
func (d *vmDisk) fromRaw(l *Lab, raw string) error {
	defer func() { _ = os.Remove(raw) }()
	switch d.spec.Format {
	case Raw:
		return os.Rename(raw, d.file)
	case LoopRaw:
		if err := os.Rename(raw, d.file); err != nil {
			return err
		}
		return l.attachLoop(d)
	case LoopQcow2:
		// Room for metadata and for bitmaps that come later.
		backing, err := os.Create(d.file)
		if err != nil {
			return err
		}
		err = errors.Join(backing.Truncate(d.spec.Size+d.spec.Size/8+(16<<20)), backing.Close())
		if err != nil {
			return err
		}
		if err := l.attachLoop(d); err != nil {
			return err
		}
		_, err = tool("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, d.loopDev)
		return err
	case Qcow2V2:
		_, err := tool("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", "-o", "compat=0.10", raw, d.file)
		return err
	default:
		_, err := tool("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, d.file)
		return err
	}
}

func (l *Lab) attachLoop(d *vmDisk) error {
	dev, err := tool("losetup", "--find", "--show", d.file)
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.loops = append(l.loops, dev)
	l.mu.Unlock()
	d.loopDev = dev
	return nil
}

// fillRaw writes the first content of a disk to a sparse raw file.
func fillRaw(path string, spec Disk) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := f.Truncate(spec.Size); err != nil {
		return errors.Join(err, f.Close())
	}
	for i, r := range spec.Data {
		if r.Off < 0 || r.Len < 0 || r.Off > spec.Size-r.Len {
			return errors.Join(fmt.Errorf("data range %+v is outside the disk", r), f.Close())
		}
		if err := writeRandom(f, r, spec.Seed+uint64(i)); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	if err := f.Close(); err != nil {
		return err
	}
	if spec.From != "" {
		if _, err := tool("qemu-img", "convert", "-q", "-n", "-f", "raw", "-O", "raw", spec.From, path); err != nil {
			return err
		}
	}
	if spec.Ext4 {
		// Nothing may be initialised in the background later: the truth would move.
		_, err := tool("mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", path)
		return err
	}
	return nil
}

func writeRandom(f *os.File, r Range, seed uint64) error {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	src := rand.NewChaCha8(key)
	buf := make([]byte, 1<<20)
	for done := int64(0); done < r.Len; {
		n := min(int64(len(buf)), r.Len-done)
		// ChaCha8.Read never fails.
		_, _ = src.Read(buf[:n])
		if _, err := f.WriteAt(buf[:n], r.Off+done); err != nil {
			return err
		}
		done += n
	}
	return nil
}

func busOf(d Disk) string {
	switch {
	case d.Bus != "":
		return d.Bus
	case d.Device == "cdrom":
		return "sata"
	case d.Device == "floppy":
		return "fdc"
	}
	return "virtio"
}

// targetName returns the n-th (from 0) device name on a bus: vda, sda, fda.
func targetName(bus string, n int) string {
	prefix := "sd"
	switch bus {
	case "virtio":
		prefix = "vd"
	case "fdc":
		prefix = "fd"
	}
	return prefix + string(rune('a'+n))
}

// disk returns the lab's record of the disk at target.
func (v *VM) disk(target string) (*vmDisk, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, d := range v.disks {
		if d.target == target {
			return d, nil
		}
	}
	return nil, fmt.Errorf("%s has no disk %s", v.Name, target)
}

func (v *VM) mustDisk(target string) *vmDisk {
	v.t.Helper()
	d, err := v.disk(target)
	if err != nil {
		v.t.Fatalf("lab: %v", err)
	}
	return d
}

// AttachDisk makes a disk and adds it: live and in the definition if the machine
// is active, in the definition otherwise. It returns the target name.
func (v *VM) AttachDisk(spec Disk) string {
	v.t.Helper()
	target := v.freeTarget(busOf(spec))
	d := v.lab.newDisk(v.t, spec, v.diskBase(), target)
	v.attach(d)
	return target
}

func (v *VM) attach(d *vmDisk) {
	v.t.Helper()
	file := filepath.Join(v.lab.Dir, "attach.xml")
	if err := os.WriteFile(file, []byte(d.xml()), 0o600); err != nil {
		v.t.Fatalf("lab: %v", err)
	}
	args := []string{"attach-device", v.Name, file}
	if v.Active() {
		args = append(args, "--live")
	}
	if !v.spec.Transient {
		args = append(args, "--config")
	}
	v.lab.must(v.t, args...)
	v.mu.Lock()
	v.disks = append(v.disks, d)
	v.mu.Unlock()
	v.remember()
}

// DetachDisk removes a disk from the definition and deletes nothing. Unplugging
// needs a guest that co-operates, so an active machine is destroyed first and
// started again in the state it had.
func (v *VM) DetachDisk(target string) {
	v.t.Helper()
	v.mustDisk(target)
	v.whileOff(func() {
		v.t.Helper()
		v.lab.must(v.t, "detach-disk", v.Name, target, "--config")
		v.forget(target)
	})
}

// ReplaceDisk puts another disk into the slot of an old one; the machine is
// destroyed meanwhile and started again in the state it had. The old image stays.
func (v *VM) ReplaceDisk(target string, spec Disk) {
	v.t.Helper()
	v.mustDisk(target)
	v.whileOff(func() {
		v.t.Helper()
		v.lab.must(v.t, "detach-disk", v.Name, target, "--config")
		v.forget(target)
		v.attach(v.lab.newDisk(v.t, spec, v.diskBase(), target))
	})
}

func (v *VM) forget(target string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for i, d := range v.disks {
		if d.target == target {
			v.disks = append(v.disks[:i:i], v.disks[i+1:]...)
			return
		}
	}
}

// Resize grows a disk to size bytes, online if the machine is active.
func (v *VM) Resize(target string, size int64) {
	v.t.Helper()
	d := v.mustDisk(target)
	if d.spec.Format.loop() {
		grown := size
		if d.spec.Format == LoopQcow2 {
			grown += size/8 + (16 << 20)
		}
		if err := os.Truncate(d.file, grown); err != nil {
			v.t.Fatalf("lab: %v", err)
		}
		v.tool("losetup", "-c", d.loopDev)
	}
	switch {
	case v.Active():
		v.lab.must(v.t, "blockresize", v.Name, target, "--size", strconv.FormatInt(size, 10)+"B")
	case d.spec.Format != LoopRaw:
		v.tool("qemu-img", "resize", "-q", "-f", d.spec.Format.driver(), v.Source(target), strconv.FormatInt(size, 10))
	}
	v.mu.Lock()
	d.spec.Size = size
	v.mu.Unlock()
}

func (v *VM) tool(name string, args ...string) string {
	v.t.Helper()
	out, err := tool(name, args...)
	if err != nil {
		v.t.Fatalf("lab: %v", err)
	}
	return out
}

func (v *VM) freeTarget(bus string) string {
	v.mu.Lock()
	defer v.mu.Unlock()
	used := map[string]bool{}
	for _, d := range v.disks {
		used[d.target] = true
	}
	for n := 0; ; n++ {
		if name := targetName(bus, n); !used[name] {
			return name
		}
	}
}

// diskBase returns a file name stem that no other image of the lab has.
func (v *VM) diskBase() string {
	v.lab.mu.Lock()
	defer v.lab.mu.Unlock()
	v.lab.next++
	return strings.TrimPrefix(v.Name, v.lab.prefix) + "-" + strconv.Itoa(v.lab.next)
}
