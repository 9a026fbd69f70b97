package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
)

// backupDoc is the outcome of the backup of one VM.
type backupDoc struct {
	VM                string       `json:"vm"`
	ID                string       `json:"id,omitempty"`
	UUID              string       `json:"uuid,omitempty"`
	Run               string       `json:"run,omitempty"`
	Status            string       `json:"status"`
	Point             string       `json:"point"`
	Parent            string       `json:"parent"`
	Consistency       string       `json:"consistency"` // empty: no snapshot was made
	ConsistencyMeans  string       `json:"consistency_means,omitempty"`
	ConsistencyReason string       `json:"consistency_reason,omitempty"`
	FrozenMS          float64      `json:"frozen_ms"`
	Disks             []backupDisk `json:"disks"`
	Degraded          []string     `json:"degraded"`
	ReadBytes         int64        `json:"read_bytes"`
	AuditedBytes      int64        `json:"audited_bytes"`               // not in ReadBytes
	AuditSeed         uint64       `json:"audit_seed,omitempty,string"` // with it the same leaves are audited again
	StoredBytes       int64        `json:"stored_bytes"`
	DurationMS        float64      `json:"duration_ms"`
	Error             *problem     `json:"error,omitempty"`
}

type backupDisk struct {
	ID        string `json:"id"`
	Mode      string `json:"mode"`
	Reason    string `json:"reason"`
	Detail    string `json:"detail,omitempty"`
	Size      int64  `json:"size"`
	ReadBytes int64  `json:"read_bytes"`
	Stored    int64  `json:"stored_bytes"`

	AuditedBytes int64     `json:"audited_bytes"`
	Audit        *auditDoc `json:"audit,omitempty"` // nil: nothing was audited
}

// auditDoc is what the audit of a disk's change tracking found.
type auditDoc struct {
	Leaves   int64    `json:"leaves"`
	Wrong    int64    `json:"wrong"`
	Offsets  []int64  `json:"offsets,omitempty"`
	Suspects []string `json:"suspects,omitempty"`
	Error    string   `json:"error,omitempty"`
}

func describeAudit(a *backup.AuditResult) *auditDoc {
	if a.Leaves == 0 && a.Err == nil {
		return nil
	}
	d := &auditDoc{Leaves: a.Leaves, Wrong: a.Wrong, Offsets: a.Offsets, Suspects: texts(a.Suspects)}
	if a.Err != nil {
		d.Error = message(a.Err)
	}
	return d
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func msDuration(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }

func describeBackup(res *backup.Result) backupDoc {
	d := backupDoc{
		VM: res.VM.Name, ID: string(res.VM.ID), UUID: res.VM.UUID, Run: res.Run, Status: string(res.Status()),
		Point: string(res.Point()), Parent: string(res.Parent), Disks: []backupDisk{},
		Degraded: append([]string{}, res.Degraded...), DurationMS: ms(res.Finished.Sub(res.Started)),
	}
	if c := res.Consistency; c.Means != "" || c.Reason != "" || len(res.Disks) > 0 || res.Status() != backup.Failed {
		d.Consistency, d.ConsistencyMeans, d.ConsistencyReason, d.FrozenMS = c.Level.String(), c.Means, c.Reason, ms(c.Frozen)
	}
	for _, x := range res.Disks {
		if x.Mode == "" {
			continue // the run ended before it was decided
		}
		d.Disks = append(d.Disks, backupDisk{
			ID: string(x.ID), Mode: string(x.Mode), Reason: string(x.Reason), Detail: x.Detail,
			Size: x.Size, ReadBytes: x.ReadBytes, Stored: x.Stats.Stored,
			AuditedBytes: x.AuditedBytes, Audit: describeAudit(&x.Audit),
		})
	}
	if d.AuditedBytes = res.Audited(); d.AuditedBytes > 0 {
		d.AuditSeed = res.AuditSeed
	}
	_, d.ReadBytes, d.StoredBytes = res.Totals()
	return d
}

// backedUp reports the outcome of one VM.
func (p *program) backedUp(ctx context.Context, d backupDoc, err error) {
	if err != nil {
		d.Status, d.Error = statusFailed, explain(ctx, err)
		p.ended(d.Error.exit())
	} else if d.Status == statusDegraded {
		p.ended(exitDegraded)
	}
	if p.json {
		p.emit(d)
	} else if err == nil {
		p.showBackup(d)
	}
	if err != nil {
		pr := *d.Error
		pr.Message = d.VM + ": " + pr.Message
		p.complain(&pr)
	}
}

func (p *program) showBackup(d backupDoc) {
	how := d.Consistency + "-consistent"
	if d.ConsistencyMeans != "" && d.ConsistencyMeans != "none" {
		how += " (" + d.ConsistencyMeans + ")"
	}
	if d.FrozenMS > 0 {
		how += fmt.Sprintf(", frozen for %.0f ms", d.FrozenMS)
	}
	p.say("%s: %s, restore point %s, %s", d.VM, d.Status, d.Point, how)
	t := &table{indent: "  ", right: map[int]bool{3: true, 4: true, 5: true, 6: true}}
	var size int64
	for _, x := range d.Disks {
		if x.Mode == string(backup.Excluded) || x.Mode == string(backup.Unprotected) {
			t.add(x.ID, x.Mode, x.Reason, bytesText(x.Size))
			continue
		}
		size += x.Size
		row := []string{x.ID, x.Mode, x.Reason, bytesText(x.Size), "read " + bytesText(x.ReadBytes), "stored " + bytesText(x.Stored)}
		if x.AuditedBytes > 0 {
			row = append(row, "audited "+bytesText(x.AuditedBytes))
		}
		t.add(row...)
	}
	t.print(p.say)
	took := msDuration(d.DurationMS)
	line := fmt.Sprintf("  read %s of %s (%s), stored %s, in %s", bytesText(d.ReadBytes), bytesText(size), share(d.ReadBytes, size), bytesText(d.StoredBytes), durationText(took))
	if r := rateText(d.ReadBytes, took); r != "" {
		line += " (" + r + ")"
	}
	p.say("%s", line)
	if d.ConsistencyReason != "" {
		p.say("  consistency: %s", d.ConsistencyReason)
	}
	for _, why := range d.Degraded {
		p.say("  degraded: %s", why)
	}
	if slices.ContainsFunc(d.Disks, func(x backupDisk) bool { return x.Audit != nil && x.Audit.Wrong > 0 }) {
		p.say("  the samples were drawn by --audit-seed %d", d.AuditSeed)
	}
}
