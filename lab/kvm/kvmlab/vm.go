package kvmlab

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// VM is one virtual machine of a [Lab].
type VM struct {
	// Name is the domain's name; it begins with the lab's prefix.
	Name string

	lab  *Lab
	t    testing.TB
	spec Spec

	mu    sync.Mutex
	disks []*vmDisk
	xml   string // the definition as of the last change by the lab

	writes sync.Mutex // one guest write at a time: its answer is read from a log
	guest  sync.Mutex // one command on the control port at a time
	cons   *console
}

// VM makes a virtual machine and brings it to the state that spec asks for. It is
// removed when the lab's test ends.
func (l *Lab) VM(t testing.TB, spec Spec) *VM {
	t.Helper()
	if spec.UEFI {
		if _, err := os.Stat(ovmfCode); err != nil {
			Missing(t, "kvm", ovmfCode+" (package ovmf)")
		}
	}
	if spec.Name == "" {
		l.mu.Lock()
		l.next++
		spec.Name = "vm" + strconv.Itoa(l.next)
		l.mu.Unlock()
	}
	if spec.Guest != nil {
		g := *spec.Guest
		g.prepare(t)
		spec.Guest = &g
		if len(spec.Disks) > 0 {
			spec.Disks = append([]Disk(nil), spec.Disks...)
			spec.Disks[0].Ext4 = spec.Disks[0].From == ""
		}
	}
	v := &VM{Name: l.Name(spec.Name), lab: l, t: t, spec: spec}
	for _, d := range spec.Disks {
		v.disks = append(v.disks, l.newDisk(t, d, v.diskBase(), v.freeTarget(busOf(d))))
	}
	v.xml = spec.domainXML(v.Name, v.disks)
	if spec.Transient {
		if spec.Power == Off {
			t.Fatalf("lab: a transient machine cannot be off")
		}
		args := []string{"create", v.xmlFile(v.xml)}
		if spec.Power == Paused {
			args = append(args, "--paused")
		}
		l.must(t, args...)
	} else {
		l.must(t, "define", v.xmlFile(v.xml))
		v.remember() // with the uuid and the MAC addresses that libvirt chose
		v.start(spec.Power)
	}
	return v
}

func (v *VM) xmlFile(text string) string {
	v.t.Helper()
	file := filepath.Join(v.lab.Dir, strings.TrimPrefix(v.Name, v.lab.prefix)+".xml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		v.t.Fatalf("lab: %v", err)
	}
	return file
}

// remember keeps the persistent definition for Redefine.
func (v *VM) remember() {
	v.t.Helper()
	if v.spec.Transient {
		return
	}
	text := v.lab.must(v.t, "dumpxml", v.Name, "--inactive", "--security-info")
	v.mu.Lock()
	v.xml = text
	v.mu.Unlock()
}

// Lab returns the machine's lab.
func (v *VM) Lab() *Lab { return v.lab }

// UUID returns the domain's UUID.
func (v *VM) UUID() string {
	v.t.Helper()
	return v.lab.must(v.t, "domuuid", v.Name)
}

// XML returns the domain's current definition: the live one while it is active.
func (v *VM) XML() string {
	v.t.Helper()
	return v.lab.must(v.t, "dumpxml", v.Name)
}

// State returns libvirt's word for the state: "running", "paused", "shut off" ...
func (v *VM) State() string {
	v.t.Helper()
	return v.lab.must(v.t, "domstate", v.Name)
}

// Active reports whether the domain has a QEMU process, running or paused.
func (v *VM) Active() bool {
	v.t.Helper()
	switch v.State() {
	case "shut off", "crashed":
		return false
	}
	return true
}

func (v *VM) start(p Power) {
	v.t.Helper()
	switch p {
	case Off:
		return
	case Paused:
		v.lab.must(v.t, "start", v.Name, "--paused")
	case Running:
		v.lab.must(v.t, "start", v.Name)
	}
	if v.spec.Guest != nil {
		v.watchConsole()
	}
}

// Start starts an inactive domain: Paused or Running.
func (v *VM) Start(p Power) {
	v.t.Helper()
	v.start(p)
}

// Resume lets the virtual CPUs of a paused domain run.
func (v *VM) Resume() { v.t.Helper(); v.lab.must(v.t, "resume", v.Name) }

// Suspend pauses the virtual CPUs.
func (v *VM) Suspend() { v.t.Helper(); v.lab.must(v.t, "suspend", v.Name) }

// Destroy ends the QEMU process by libvirt's hand; bitmaps are saved to the images.
func (v *VM) Destroy() {
	v.t.Helper()
	v.lab.must(v.t, "destroy", v.Name)
}

// KillQEMU ends the QEMU process with SIGKILL, as a crash would, and waits until
// libvirt has noticed.
func (v *VM) KillQEMU() {
	v.t.Helper()
	pids := qemuPIDs(v.Name + ",")
	if len(pids) != 1 {
		v.t.Fatalf("lab: %s has %d QEMU processes, want 1", v.Name, len(pids))
	}
	p, err := os.FindProcess(pids[0])
	if err == nil {
		err = p.Kill()
	}
	if err != nil {
		v.t.Fatalf("lab: kill QEMU of %s: %v", v.Name, err)
	}
	err = poll(30*time.Second, 50*time.Millisecond, func() (bool, error) {
		if v.spec.Transient {
			names, err := v.lab.Domains(v.Name)
			return len(names) == 0, err
		}
		st, err := v.lab.Virsh("domstate", v.Name)
		return st == "shut off" || st == "crashed", err
	})
	if err != nil {
		v.t.Fatalf("lab: %s after SIGKILL: %v", v.Name, err)
	}
}

// Undefine destroys the domain if it is active and removes its definition with its
// checkpoint and snapshot metadata. Disks and NVRAM stay.
func (v *VM) Undefine() {
	v.t.Helper()
	if v.Active() {
		v.Destroy()
	}
	args := []string{"undefine", v.Name, "--checkpoints-metadata", "--snapshots-metadata"}
	if v.spec.UEFI {
		args = append(args, "--keep-nvram")
	}
	v.lab.must(v.t, args...)
}

// Redefine defines the domain again as it was, with the same UUID and disks, and
// leaves it off.
func (v *VM) Redefine() {
	v.t.Helper()
	v.mu.Lock()
	text := v.xml
	v.mu.Unlock()
	v.lab.must(v.t, "define", v.xmlFile(text))
}

// whileOff runs f with the domain destroyed, and starts it again in its old state.
func (v *VM) whileOff(f func()) {
	v.t.Helper()
	state := v.State()
	if state != "shut off" {
		v.Destroy()
	}
	f()
	v.remember()
	switch state {
	case "running":
		v.start(Running)
	case "paused":
		v.start(Paused)
	}
}

// NVRAM returns the path of the domain's NVRAM file, empty without UEFI.
func (v *VM) NVRAM() string {
	v.t.Helper()
	var d struct {
		NVRAM string `xml:"os>nvram"`
	}
	if err := xml.Unmarshal([]byte(v.XML()), &d); err != nil {
		v.t.Fatalf("lab: definition of %s: %v", v.Name, err)
	}
	return strings.TrimSpace(d.NVRAM)
}

// Source returns the file or device that holds the disk's newest layer now: an
// external snapshot changes it.
func (v *VM) Source(target string) string {
	v.t.Helper()
	src, _, err := v.trySource(target)
	if err != nil {
		v.t.Fatalf("lab: %v", err)
	}
	return src
}

func (v *VM) trySource(target string) (path, format string, err error) {
	text, err := v.lab.Virsh("dumpxml", v.Name)
	if err != nil {
		// Undefined: what the lab made.
		d, derr := v.disk(target)
		if derr != nil {
			return "", "", errors.Join(derr, err)
		}
		return d.source(), d.spec.Format.driver(), nil
	}
	var dom struct {
		Disks []struct {
			Driver struct {
				Type string `xml:"type,attr"`
			} `xml:"driver"`
			Source struct {
				File string `xml:"file,attr"`
				Dev  string `xml:"dev,attr"`
			} `xml:"source"`
			Target struct {
				Dev string `xml:"dev,attr"`
			} `xml:"target"`
		} `xml:"devices>disk"`
	}
	if err := xml.Unmarshal([]byte(text), &dom); err != nil {
		return "", "", fmt.Errorf("definition of %s: %w", v.Name, err)
	}
	for _, d := range dom.Disks {
		if d.Target.Dev == target {
			return d.Source.File + d.Source.Dev, d.Driver.Type, nil
		}
	}
	return "", "", fmt.Errorf("%s has no disk %s", v.Name, target)
}

// TryQMP sends one command to the QEMU monitor and returns the "return" member of
// its answer. args may be nil.
func (v *VM) TryQMP(command string, args any) (json.RawMessage, error) {
	msg := map[string]any{"execute": command}
	if args != nil {
		msg["arguments"] = args
	}
	req, err := json.Marshal(msg)
	if err != nil {
		return nil, err
	}
	out, err := v.lab.Virsh("qemu-monitor-command", v.Name, string(req))
	if err != nil {
		return nil, err
	}
	var ans struct {
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Class string `json:"class"`
			Desc  string `json:"desc"`
		} `json:"error"`
	}
	if err := json.Unmarshal([]byte(out), &ans); err != nil {
		return nil, fmt.Errorf("%s of %s: %w", command, v.Name, err)
	}
	if ans.Error != nil {
		return nil, fmt.Errorf("%s of %s: %s: %s", command, v.Name, ans.Error.Class, ans.Error.Desc)
	}
	return ans.Return, nil
}
