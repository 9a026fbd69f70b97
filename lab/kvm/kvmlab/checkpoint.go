package kvmlab

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Checkpoints returns the names of the domain's libvirt checkpoints.
func (v *VM) Checkpoints() []string {
	v.t.Helper()
	names, err := v.lab.checkpoints(v.Name)
	if err != nil {
		v.t.Fatalf("lab: %v", err)
	}
	return names
}

func (l *Lab) checkpoints(domain string) ([]string, error) {
	out, err := l.Virsh("checkpoint-list", domain, "--name")
	if err != nil {
		return nil, err
	}
	return strings.Fields(out), nil
}

// ForeignCheckpoint makes a checkpoint as another product would, on the given
// disks; other disks are left out. The domain must be active.
func (v *VM) ForeignCheckpoint(name string, disks ...string) {
	v.t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "<domaincheckpoint><name>%s</name><disks>", escape(name))
	v.mu.Lock()
	for _, d := range v.disks {
		kind := "no"
		if slices.Contains(disks, d.target) {
			kind = "bitmap"
		}
		fmt.Fprintf(&b, "<disk name='%s' checkpoint='%s'/>", d.target, kind)
	}
	v.mu.Unlock()
	b.WriteString("</disks></domaincheckpoint>")
	v.lab.must(v.t, "checkpoint-create", v.Name, v.xmlFile(b.String()))
}

// DeleteCheckpoint deletes a checkpoint and its bitmaps.
func (v *VM) DeleteCheckpoint(name string) {
	v.t.Helper()
	v.lab.must(v.t, "checkpoint-delete", v.Name, name)
}

// ExternalSnapshot makes an external disk-only snapshot of the given disks (all if
// none is given): each goes on in an overlay in the lab's directory. The snapshot's
// metadata stays in libvirt unless the test removes it.
func (v *VM) ExternalSnapshot(name string, disks ...string) {
	v.t.Helper()
	args := []string{"snapshot-create-as", v.Name, name, "--disk-only", "--atomic"}
	v.mu.Lock()
	for _, d := range v.disks {
		if len(disks) > 0 && !slices.Contains(disks, d.target) || d.device != "disk" || d.spec.ReadOnly {
			args = append(args, "--diskspec", d.target+",snapshot=no")
			continue
		}
		file := filepath.Join(v.lab.Dir, strings.TrimPrefix(v.Name, v.lab.prefix)+"-"+d.target+"."+name)
		args = append(args, "--diskspec", d.target+",snapshot=external,file="+file)
	}
	v.mu.Unlock()
	v.lab.must(v.t, args...)
	v.remember()
}

// Snapshots returns the names of the domain's libvirt snapshots.
func (v *VM) Snapshots() []string {
	v.t.Helper()
	return strings.Fields(v.lab.must(v.t, "snapshot-list", v.Name, "--name"))
}

// JobActive reports whether a domain job (a backup, for example) is active.
func (v *VM) JobActive() bool {
	v.t.Helper()
	active, err := v.lab.jobActive(v.Name)
	if err != nil {
		v.t.Fatalf("lab: %v", err)
	}
	return active
}

// WaitJob waits until JobActive is as wanted, for at most d.
func (v *VM) WaitJob(active bool, d time.Duration) {
	v.t.Helper()
	err := poll(d, 50*time.Millisecond, func() (bool, error) {
		now, err := v.lab.jobActive(v.Name)
		return now == active, err
	})
	if err != nil {
		v.t.Fatalf("lab: waiting for job active=%v of %s: %v", active, v.Name, err)
	}
}

func (l *Lab) jobActive(domain string) (bool, error) {
	state, err := l.Virsh("domstate", domain)
	if err != nil {
		return false, err
	}
	if state == "shut off" || state == "crashed" {
		return false, nil
	}
	out, err := l.Virsh("domjobinfo", domain)
	if err != nil {
		return false, err
	}
	for _, line := range strings.Split(out, "\n") {
		if kind, ok := strings.CutPrefix(line, "Job type:"); ok {
			return strings.TrimSpace(kind) != "None", nil
		}
	}
	return false, fmt.Errorf("domjobinfo %s: no job type in %q", domain, out)
}

// BlockJobs returns the ids of QEMU's block jobs, those of a backup included.
func (v *VM) BlockJobs() []string {
	v.t.Helper()
	raw, err := v.TryQMP("query-block-jobs", nil)
	var jobs []struct {
		Device string `json:"device"`
	}
	if err == nil {
		err = json.Unmarshal(raw, &jobs)
	}
	if err != nil {
		v.t.Fatalf("lab: %v", err)
	}
	ids := []string{}
	for _, j := range jobs {
		ids = append(ids, j.Device)
	}
	return ids
}

// Bitmaps returns the names of the dirty bitmaps of a disk's newest layer: QEMU's
// while the domain is active, those in the image file otherwise.
func (v *VM) Bitmaps(disk string) []string {
	v.t.Helper()
	src, format, err := v.trySource(disk)
	if err != nil {
		v.t.Fatalf("lab: %v", err)
	}
	var names []string
	if v.Active() {
		names, err = v.liveBitmaps(src, format)
	} else {
		names, err = ImageBitmaps(src)
	}
	if err != nil {
		v.t.Fatalf("lab: bitmaps of %s: %v", disk, err)
	}
	return names
}

// blockNode is the part of QEMU's description of a block node that the lab reads.
type blockNode struct {
	Name    string `json:"node-name"`
	File    string `json:"file"`
	Driver  string `json:"drv"`
	Bitmaps []struct {
		Name string `json:"name"`
	} `json:"dirty-bitmaps"`
}

// formatNode returns the node of an active domain that reads the format of src.
func (v *VM) formatNode(src, format string) (blockNode, error) {
	raw, err := v.TryQMP("query-named-block-nodes", map[string]any{"flat": true})
	if err != nil {
		return blockNode{}, err
	}
	var nodes []blockNode
	if err := json.Unmarshal(raw, &nodes); err != nil {
		return blockNode{}, err
	}
	for _, n := range nodes {
		if n.File == src && n.Driver == format {
			return n, nil
		}
	}
	return blockNode{}, fmt.Errorf("%s: no %s node over %s", v.Name, format, src)
}

// FormatNode returns QEMU's name of the node that reads the newest layer of a disk
// of an active domain, for commands to the monitor.
func (v *VM) FormatNode(disk string) (string, error) {
	src, format, err := v.trySource(disk)
	if err != nil {
		return "", err
	}
	n, err := v.formatNode(src, format)
	return n.Name, err
}

func (v *VM) liveBitmaps(src, format string) ([]string, error) {
	n, err := v.formatNode(src, format)
	if err != nil {
		return nil, err
	}
	names := []string{}
	for _, b := range n.Bitmaps {
		// Those without a name belong to block jobs.
		if b.Name != "" {
			names = append(names, b.Name)
		}
	}
	return names, nil
}

// ImageBitmaps returns the names of the persistent bitmaps in a qcow2 image.
func ImageBitmaps(image string) ([]string, error) {
	out, err := tool("qemu-img", "info", "-U", "-f", "qcow2", "--output=json", image)
	if err != nil {
		return nil, err
	}
	var info struct {
		Specific struct {
			Data struct {
				Bitmaps []struct {
					Name string `json:"name"`
				} `json:"bitmaps"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		return nil, err
	}
	names := []string{}
	for _, b := range info.Specific.Data.Bitmaps {
		names = append(names, b.Name)
	}
	return names, nil
}
