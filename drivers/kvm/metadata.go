package kvm

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// Where Holdfast's notes stand in the metadata of a domain.
const (
	metadataURI = "https://holdfast-backup.github.io/ns/domain/1"
	metadataKey = "holdfast"
)

// notes are what Holdfast keeps in a domain's metadata.
type notes struct {
	// libvirt adds the namespace and its prefix, and refuses one of ours.
	XMLName xml.Name `xml:"domain"`

	// Created is set in domains that a restore made.
	Created *createdNote `xml:"created"`
	// Started says that a run started this domain, paused, because it was off.
	Started *runNote `xml:"started"`
	// Freeze says that a run told the guest to freeze; it is in the live
	// definition alone.
	Freeze *runNote `xml:"freeze"`
	// Snapshot is the reference to the unreleased snapshot; it is in the live
	// definition alone.
	Snapshot *snapshotNote `xml:"snapshot"`
	// Forgotten lists disks of checkpoints whose baseline nobody needs any more,
	// although the checkpoint must stay for other disks.
	Forgotten []forgottenNote `xml:"forgotten"`
}

type runNote struct {
	Run string `xml:"run,attr"`
}

type snapshotNote struct {
	Run   string `xml:"run,attr"`
	Token string `xml:"token,attr"`
}

type createdNote struct {
	Owner      string     `xml:"owner,attr"`
	Incomplete string     `xml:"incomplete,attr,omitempty"`
	Files      []fileNote `xml:"file"`
}

// fileNote is a file that belongs to a created domain.
type fileNote struct {
	Path string `xml:"path,attr"`
	// Disk is the slot, Format and Size (bytes) are those of its image; empty for
	// files that are no disk. Alias is the ID that the disk had where it came
	// from, if libvirt does not take that for a slot.
	Disk   string `xml:"disk,attr,omitempty"`
	Alias  string `xml:"alias,attr,omitempty"`
	Format string `xml:"format,attr,omitempty"`
	Size   int64  `xml:"size,attr,omitempty"`
}

type forgottenNote struct {
	Checkpoint string `xml:"checkpoint,attr"`
	Disk       string `xml:"disk,attr"`
}

func (n *notes) empty() bool {
	return n.Created == nil && n.Started == nil && n.Freeze == nil && n.Snapshot == nil && len(n.Forgotten) == 0
}

// forget notes that a disk's baseline is not needed.
func (n *notes) forget(checkpoint, disk string) {
	f := forgottenNote{checkpoint, disk}
	if !slices.Contains(n.Forgotten, f) {
		n.Forgotten = append(n.Forgotten, f)
	}
}

// forgot reports whether a disk's baseline is noted as not needed.
func (n *notes) forgot(checkpoint, disk string) bool {
	return slices.Contains(n.Forgotten, forgottenNote{checkpoint, disk})
}

// drop removes what is noted of checkpoints that do not exist.
func (n *notes) drop(gone func(checkpoint string) bool) {
	n.Forgotten = slices.DeleteFunc(n.Forgotten, func(f forgottenNote) bool { return gone(f.Checkpoint) })
}

// notesOf takes the notes out of a definition; none are empty notes.
func notesOf(dom *libvirtxml.Domain) (*notes, error) {
	n := new(notes)
	if dom.Metadata == nil {
		return n, nil
	}
	dec := xml.NewDecoder(strings.NewReader(dom.Metadata.XML))
	for {
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return nil, fmt.Errorf("domain metadata: %w", err)
		}
		start, ok := tok.(xml.StartElement)
		if !ok {
			continue
		}
		if start.Name.Space != metadataURI || start.Name.Local != "domain" {
			if err := dec.Skip(); err != nil {
				return nil, fmt.Errorf("domain metadata: %w", err)
			}
			continue
		}
		if err := dec.DecodeElement(n, &start); err != nil {
			return nil, fmt.Errorf("notes in the domain metadata: %w", err)
		}
		return n, nil
	}
}

// editNotes changes the notes of a domain in the live definition, the stored one,
// or both, as far as they exist. flags are affectLive and affectConfig.
func (d *Driver) editNotes(ctx context.Context, uuid string, flags uint32, edit func(*notes)) error {
	if err := d.meta.acquire(ctx); err != nil {
		return err
	}
	defer d.meta.release()
	state, _, err := d.conn.state(ctx, uuid)
	if err != nil {
		return err
	}
	persistent, err := d.conn.persistent(ctx, uuid)
	if err != nil {
		return err
	}
	if flags&affectLive != 0 && active(state) {
		if err := d.editOne(ctx, uuid, 0, affectLive, edit); err != nil {
			return err
		}
	}
	if flags&affectConfig != 0 && persistent {
		return d.editOne(ctx, uuid, xmlInactive, affectConfig, edit)
	}
	return nil
}

func (d *Driver) editOne(ctx context.Context, uuid string, xmlFlags, flags uint32, edit func(*notes)) error {
	n, err := d.readNotes(ctx, uuid, xmlFlags)
	if err != nil {
		return err
	}
	before, err := n.render()
	if err != nil {
		return err
	}
	edit(n)
	after, err := n.render()
	if err != nil || after == before {
		return err
	}
	return d.conn.setMetadata(ctx, uuid, after, flags)
}

// readNotes reads the notes of a domain; xmlInactive reads the stored ones.
func (d *Driver) readNotes(ctx context.Context, uuid string, xmlFlags uint32) (*notes, error) {
	text, err := d.conn.domainXML(ctx, uuid, xmlFlags)
	if err != nil {
		return nil, err
	}
	dom, err := parseDomain(text)
	if err != nil {
		return nil, err
	}
	return notesOf(dom)
}

// render gives the element for libvirt; empty notes are no element.
func (n *notes) render() (string, error) {
	if n.empty() {
		return "", nil
	}
	b, err := xml.Marshal(n)
	return string(b), err
}

// ours refuses a domain that Holdfast did not make.
func (n *notes) ours() error {
	if n.Created == nil || !hypervisor.IsOurs(n.Created.Owner) {
		return hypervisor.ErrNotOurs
	}
	return nil
}

// active reports whether a domain in this state has a QEMU process.
func active(state int) bool { return state != stateShutoff && state != stateCrashed }
