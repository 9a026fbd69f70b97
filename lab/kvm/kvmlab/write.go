package kvmlab

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// WriteOp is one guest write through the QEMU monitor.
type WriteOp struct {
	// Disk is a target name, such as "vda", of a virtio disk.
	Disk     string
	Off, Len int64
	// Kind is Data unless set.
	Kind WriteKind
	// Pattern fills the range, for Data.
	Pattern byte
}

// WriteKind says what a [WriteOp] does.
type WriteKind int

// Kinds of writes.
const (
	Data WriteKind = iota
	Zero
	Discard
	flush
)

// maxWrite bounds one monitor write; QEMU holds the whole buffer in memory.
const maxWrite = 64 << 20

// Write fills len bytes at off of a disk with pattern, as the guest would. It
// works on running and paused machines, during backup jobs too, and returns when
// QEMU has confirmed the write.
func (v *VM) Write(disk string, off, length int64, pattern byte) {
	v.t.Helper()
	v.mustWrite(WriteOp{Disk: disk, Off: off, Len: length, Pattern: pattern})
}

// WriteZero writes zeroes with the device's write-zeroes command.
func (v *VM) WriteZero(disk string, off, length int64) {
	v.t.Helper()
	v.mustWrite(WriteOp{Disk: disk, Off: off, Len: length, Kind: Zero})
}

// Discard trims a range. What it reads as afterwards is the image format's choice.
func (v *VM) Discard(disk string, off, length int64) {
	v.t.Helper()
	v.mustWrite(WriteOp{Disk: disk, Off: off, Len: length, Kind: Discard})
}

// Flush makes QEMU write its caches of the disk, metadata included, to the image.
func (v *VM) Flush(disk string) {
	v.t.Helper()
	v.mustWrite(WriteOp{Disk: disk, Kind: flush})
}

func (v *VM) mustWrite(op WriteOp) {
	v.t.Helper()
	if err := v.TryWrite(op); err != nil {
		v.t.Fatalf("lab: %v", err)
	}
}

// TryWrite does the writes in order, all in one call of virsh, and returns an
// error unless QEMU has confirmed every one of them. A machine does one TryWrite
// at a time; it may be called from any goroutine.
//
// The monitor's reply is empty, success or failure: QEMU prints the result to the
// domain's log, and that is where it is read from. The write bypasses the virtual
// device and so its error policy (werror).
func (v *VM) TryWrite(ops ...WriteOp) error {
	var script, want []string
	for _, op := range ops {
		cmds, expect, err := v.monitorCommands(op)
		if err != nil {
			return err
		}
		script = append(script, cmds...)
		want = append(want, expect...)
	}
	if len(script) == 0 {
		return nil
	}
	v.writes.Lock()
	defer v.writes.Unlock()
	log := filepath.Join("/var/log/libvirt/qemu", v.Name+".log")
	before, err := os.Stat(log)
	if err != nil {
		return fmt.Errorf("log of %s: %w", v.Name, err)
	}
	if _, err := v.lab.Virsh(strings.Join(script, "; ")); err != nil {
		return fmt.Errorf("guest write: %w", err)
	}
	return v.confirm(log, before.Size(), want)
}

// monitorCommands returns the virsh commands of one operation and the lines that
// QEMU must print for it.
func (v *VM) monitorCommands(op WriteOp) (cmds, want []string, err error) {
	d, err := v.disk(op.Disk)
	if err != nil {
		return nil, nil, err
	}
	if d.bus != "virtio" {
		return nil, nil, fmt.Errorf("%s: disk %s is not a virtio disk", v.Name, op.Disk)
	}
	// The alias of vdX is virtio-diskN with N from the letter.
	n := int(op.Disk[len("vd")] - 'a')
	hmp := func(format string, args ...any) {
		cmds = append(cmds, fmt.Sprintf(
			`qemu-monitor-command %s --hmp 'qemu-io -d /machine/peripheral/virtio-disk%d/virtio-backend "%s"'`,
			v.Name, n, fmt.Sprintf(format, args...)))
	}
	if op.Kind == flush {
		hmp("flush")
		return cmds, nil, nil
	}
	if op.Len <= 0 || op.Off < 0 {
		return nil, nil, fmt.Errorf("%s: write of %d bytes at %d", v.Name, op.Len, op.Off)
	}
	for off, end := op.Off, op.Off+op.Len; off < end; {
		size := min(end-off, maxWrite)
		word := "wrote"
		switch op.Kind {
		case Data:
			hmp("write -P 0x%02x %d %d", op.Pattern, off, size)
		case Zero:
			hmp("write -z %d %d", off, size)
		case Discard:
			hmp("discard %d %d", off, size)
			word = "discard"
		default:
			return nil, nil, fmt.Errorf("unknown kind of write %d", op.Kind)
		}
		want = append(want, fmt.Sprintf("%s %d/%d bytes at offset %d", word, size, size, off))
		off += size
	}
	return cmds, want, nil
}

// confirm waits until the log holds the lines, in order, from offset from on.
func (v *VM) confirm(log string, from int64, want []string) error {
	var seen string
	err := poll(5*time.Second, 20*time.Millisecond, func() (bool, error) {
		f, err := os.Open(log)
		if err != nil {
			return false, err
		}
		_, err = f.Seek(from, io.SeekStart)
		var raw []byte
		if err == nil {
			raw, err = io.ReadAll(io.LimitReader(f, 16<<20))
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return false, err
		}
		seen = string(raw)
		for _, line := range strings.Split(seen, "\n") {
			if strings.Contains(line, " failed: ") {
				return false, fmt.Errorf("%s: guest write: QEMU says %q", v.Name, line)
			}
		}
		rest := seen
		for _, w := range want {
			i := strings.Index(rest, w+"\n")
			if i < 0 {
				return false, nil
			}
			rest = rest[i+len(w):]
		}
		return true, nil
	})
	if err != nil {
		return fmt.Errorf("%s: guest write not confirmed: %w; log has %q", v.Name, err, tail(seen, 500))
	}
	return nil
}

func tail(s string, n int) string {
	if len(s) > n {
		return s[len(s)-n:]
	}
	return s
}
