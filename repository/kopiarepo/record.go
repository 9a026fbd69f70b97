package kopiarepo

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/repository"
)

// A chain's records are a numbered log under records/<chain>. An entry is either
// a point or the deletion of one. Each names the entry before it by digest.

const (
	recordsDir = "records"
	anchorsDir = "anchors"
	packsDir   = "packs"

	kindPoint   = "point"
	kindDeleted = "deleted"
)

// recordRef names an entry of a chain's log, with enough of it to tell what is
// missing when the entry is.
type recordRef struct {
	Log     int64              `json:"log"`
	Sum     sum                `json:"sum"`
	Kind    string             `json:"kind"`
	ID      repository.PointID `json:"id"` // the point, or the point that was deleted
	Seq     int64              `json:"seq,omitempty"`
	Name    string             `json:"name,omitempty"` // in encrypted places only
	Run     string             `json:"run,omitempty"`  // likewise
	Created time.Time          `json:"created,omitzero"`
}

// recordHeader is the part of a record that is not encrypted.
type recordHeader struct {
	Kind   string             `json:"kind"`
	Chain  string             `json:"chain"`
	Log    int64              `json:"log"`    // number of this entry
	ID     repository.PointID `json:"id"`     // of the point, or of the deleted point
	Seq    int64              `json:"seq"`    // of the point, or of the deleted point
	Points int64              `json:"points"` // points of the chain so far, deleted ones included
	Lock   string             `json:"lock,omitempty"`
	Epoch  int64              `json:"epoch"`
	Prev   *recordRef         `json:"prev,omitempty"`
}

// recordBody is the encrypted part of a point's record.
type recordBody struct {
	Name      string             `json:"name"`
	Run       string             `json:"run"`
	Parent    repository.PointID `json:"parent,omitempty"`
	ParentSum sum                `json:"parent_sum,omitzero"`
	Created   time.Time          `json:"created"`
	Committed time.Time          `json:"committed"`
	Labels    map[string]string  `json:"labels,omitempty"`
	Meta      json.RawMessage    `json:"meta,omitempty"`
	Disks     []diskBody         `json:"disks"`
	Files     []fileBody         `json:"files,omitempty"`
	Snapshot  string             `json:"snapshot"` // kopia's manifest
	Root      string             `json:"root"`     // kopia's object of the snapshot's root
	Packs     sum                `json:"packs"`    // list of packs as committed
	PackCount int                `json:"pack_count"`
	PackBytes int64              `json:"pack_bytes"`
	Inventory int64              `json:"inventory"` // newest entry of the inventory at commit
	InvSum    sum                `json:"inventory_sum"`
}

type diskBody struct {
	ID        string               `json:"id"`
	Size      int64                `json:"size"`
	BlockSize int                  `json:"block_size"`
	Root      repository.Digest    `json:"root"`
	Stats     repository.DiskStats `json:"stats"`
}

type fileBody struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
}

// tombstone is the encrypted part of a deletion.
type tombstone struct {
	Target recordRef `json:"target"`
	At     time.Time `json:"at"`
}

// entry is one trusted entry of a chain's log.
type entry struct {
	recordHeader
	sum  sum
	body recordBody // of a point
	gone tombstone  // of a deletion
}

func (e *entry) ref() recordRef {
	return recordRef{
		Log: e.Log, Sum: e.sum, Kind: e.Kind, ID: e.ID, Seq: e.Seq,
		Name: e.body.Name, Run: e.body.Run, Created: e.body.Created,
	}
}

// public is the part of a reference that may stand in a header.
func (r recordRef) public() *recordRef {
	r.Name, r.Run, r.Created = "", "", time.Time{}
	return &r
}

func parseRecord(chain string, n int64, c *candidate) (*entry, error) {
	e := &entry{sum: c.sum}
	if err := json.Unmarshal(c.header, &e.recordHeader); err != nil {
		return nil, fmt.Errorf("%w: %w", errForged, err)
	}
	if e.Chain != chain || e.Log != n {
		return nil, fmt.Errorf("%w: it is entry %d of chain %s", errForged, e.Log, e.Chain)
	}
	var err error
	switch e.Kind {
	case kindPoint:
		var b []byte
		if b, err = inflate(c.body, maxOwnFile); err == nil {
			err = json.Unmarshal(b, &e.body)
		}
	case kindDeleted:
		err = json.Unmarshal(c.body, &e.gone)
	default:
		err = fmt.Errorf("it is of unknown kind %q", e.Kind)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errForged, err)
	}
	return e, nil
}

// point is the record as callers see it.
func (e *entry) point() *repository.Point {
	p := &repository.Point{
		ID: e.ID, Chain: e.Chain, Name: e.body.Name, Run: e.body.Run, Sequence: e.Seq, Parent: e.body.Parent,
		Epoch: e.Epoch, Created: e.body.Created, Labels: maps.Clone(e.body.Labels), Meta: slices.Clone(e.body.Meta),
		State: repository.Committed,
	}
	for _, d := range e.body.Disks {
		p.Disks = append(p.Disks, repository.Disk{ID: d.ID, Size: d.Size, BlockSize: d.BlockSize, Root: d.Root, Stats: d.Stats})
	}
	for _, f := range e.body.Files {
		p.Files = append(p.Files, repository.File{Name: f.Name, Size: f.Size})
	}
	return p
}

// anchor remembers the head of a chain and what is live in it.
type anchor struct {
	Head   recordRef   `json:"head"`
	Points int64       `json:"points"`
	Live   []recordRef `json:"live"`
}
