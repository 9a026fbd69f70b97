package kvm

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// exportBitmap is the name under which the dirty bitmap of an incremental export
// is served; the NBD context is dirtyContext.
const (
	exportBitmap = "changed"
	dirtyContext = "qemu:dirty-bitmap:" + exportBitmap
)

// backupJob is libvirt's <domainbackup>.
type backupJob struct {
	XMLName     xml.Name      `xml:"domainbackup"`
	Mode        string        `xml:"mode,attr"`
	Incremental string        `xml:"incremental,omitempty"`
	Server      *backupServer `xml:"server"`
	Disks       []backupDisk  `xml:"disks>disk"`
}

type backupServer struct {
	Transport string `xml:"transport,attr"`
	Socket    string `xml:"socket,attr"`
}

type backupDisk struct {
	Name         string      `xml:"name,attr"`
	Backup       string      `xml:"backup,attr,omitempty"`
	Type         string      `xml:"type,attr,omitempty"`
	Mode         string      `xml:"backupmode,attr,omitempty"`
	Incremental  string      `xml:"incremental,attr,omitempty"`
	ExportName   string      `xml:"exportname,attr,omitempty"`
	ExportBitmap string      `xml:"exportbitmap,attr,omitempty"`
	Scratch      *scratchRef `xml:"scratch"`
}

type scratchRef struct {
	File string `xml:"file,attr"`
}

// owner returns the owner name of a job of ours, found in the names of its scratch
// files; empty for foreign jobs.
func (j *backupJob) owner(uuid string) string {
	name := ""
	for _, d := range j.Disks {
		if d.Backup == "no" {
			continue
		}
		if d.Scratch == nil {
			return ""
		}
		n, id, _, ok := parseScratch(path.Base(d.Scratch.File))
		if !ok || id != uuid || name != "" && n != name {
			return ""
		}
		name = n
	}
	return name
}

func parseJob(text string) (*backupJob, error) {
	j := new(backupJob)
	if err := xml.Unmarshal([]byte(text), j); err != nil {
		return nil, fmt.Errorf("backup XML: %w", err)
	}
	return j, nil
}

// scratchName is the file name of a scratch file: owner name, UUID of the domain
// and disk, so that it tells whose it is even when the job is gone.
func scratchName(owner, uuid, disk string) string {
	return owner + "." + uuid + "." + disk + scratchSuffix
}

const scratchSuffix = ".scratch"

// parseScratch takes the name of a scratch file apart.
func parseScratch(file string) (owner, uuid, disk string, ok bool) {
	rest, ok := strings.CutSuffix(file, scratchSuffix)
	if !ok {
		return "", "", "", false
	}
	owner, rest, ok = strings.Cut(rest, ".")
	if !ok || !hypervisor.IsOurs(owner) {
		return "", "", "", false
	}
	uuid, disk, ok = strings.Cut(rest, ".")
	return owner, uuid, disk, ok && validUUID(uuid) && disk != ""
}

// socketName is the file name of the NBD socket of a job: short, since a socket's
// path has 107 bytes at most, and derived, since names can be long.
func socketName(owner, uuid string) string {
	h := sha256.Sum256([]byte(owner + "/" + uuid))
	return "holdfast-" + hex.EncodeToString(h[:8]) + ".nbd"
}

// checkpoint is libvirt's <domaincheckpoint>, without the domain.
type checkpoint struct {
	XMLName     xml.Name         `xml:"domaincheckpoint"`
	Name        string           `xml:"name"`
	Description string           `xml:"description,omitempty"`
	Parent      *checkpointRef   `xml:"parent"`
	Created     int64            `xml:"creationTime,omitempty"`
	Disks       []checkpointDisk `xml:"disks>disk"`
}

type checkpointRef struct {
	Name string `xml:"name"`
}

type checkpointDisk struct {
	Name       string `xml:"name,attr"`
	Checkpoint string `xml:"checkpoint,attr"`
	Bitmap     string `xml:"bitmap,attr,omitempty"`
}

func parseCheckpoint(text string) (*checkpoint, error) {
	c := new(checkpoint)
	if err := xml.Unmarshal([]byte(text), c); err != nil {
		return nil, fmt.Errorf("checkpoint XML: %w", err)
	}
	return c, nil
}

// tracked lists the disks that the checkpoint has a bitmap of.
func (c *checkpoint) tracked() []string {
	var out []string
	for _, d := range c.Disks {
		if d.Checkpoint != "no" && d.Checkpoint != "none" {
			out = append(out, d.Name)
		}
	}
	slices.Sort(out)
	return out
}

// described is what a checkpoint's description says of each disk at its instant.
type described struct {
	Version int                      `json:"v"`
	Disks   map[string]describedDisk `json:"disks"`
}

type describedDisk struct {
	Content string `json:"content"`
	Size    int64  `json:"size"`
}

// description parses the description; a foreign one describes nothing.
func (c *checkpoint) description() described {
	var d described
	if err := json.Unmarshal([]byte(c.Description), &d); err != nil || d.Version != 1 {
		return described{}
	}
	return d
}

// token is the opaque part of a baseline: enough to define the checkpoint again
// where libvirt has lost it while the bitmaps live on in the images.
type token struct {
	Version int      `json:"v"`
	Created int64    `json:"created"` // seconds since 1970, as libvirt has it
	Disks   []string `json:"disks"`   // all that the checkpoint covers
	Content string   `json:"content"`
	Size    int64    `json:"size"` // bytes
	// All describes every disk, so that a checkpoint defined again is the same.
	All string `json:"all,omitempty"`
}

const maxToken = 1 << 16

// baselineOf makes the baseline of one disk of a checkpoint of ours.
func baselineOf(id hypervisor.VMID, c *checkpoint, disk string) (hypervisor.Baseline, error) {
	desc := c.description().Disks[disk]
	b, err := json.Marshal(token{
		Version: 1, Created: c.Created, Disks: c.tracked(),
		Content: desc.Content, Size: desc.Size, All: c.Description,
	})
	return hypervisor.Baseline{
		Platform: hypervisor.KVM, VM: id, Disk: hypervisor.DiskID(disk), Name: c.Name, Token: string(b),
	}, err
}

func parseToken(s string) (*token, error) {
	if len(s) > maxToken {
		return nil, fmt.Errorf("baseline token of %d bytes", len(s))
	}
	t := new(token)
	if err := json.Unmarshal([]byte(s), t); err != nil {
		return nil, fmt.Errorf("baseline token: %w", err)
	}
	if t.Version != 1 || t.Created <= 0 {
		return nil, fmt.Errorf("baseline token: version %d, created %d", t.Version, t.Created)
	}
	for _, d := range t.Disks {
		if !hypervisor.ValidDiskID(hypervisor.DiskID(d)) {
			return nil, fmt.Errorf("baseline token: disk %q", d)
		}
	}
	return t, nil
}

// marshalXML renders a document; the types above cannot fail to.
func marshalXML(v any) (string, error) {
	b, err := xml.Marshal(v)
	return string(b), err
}

func marshalJSON(v any) (string, error) {
	b, err := json.Marshal(v)
	return string(b), err
}
