package kopiarepo

import (
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io/fs"

	"github.com/holdfast-backup/holdfast/repository"
)

func newSum() hash.Hash { return sha256.New() }

func isAbsent(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// ownFiles checks our own files and their copies. As long as one form of a file
// is good, no point is affected.
func (v *verifier) ownFiles(ctx context.Context) error {
	for _, f := range []func(context.Context) error{
		v.slots, v.shards, v.format, v.lists, v.noteFiles, v.inventoryFiles,
	} {
		if err := f(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (v *verifier) count(n int64) {
	v.mu.Lock()
	v.report.Blobs += n
	v.mu.Unlock()
}

// exact reports a file that does not hold exactly these bytes.
func (v *verifier) exact(ctx context.Context, name, want string) error {
	v.count(1)
	b, err := v.r.dir.get(ctx, name, maxSlot)
	if err == nil && string(b) == want {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	d := repository.Damage{Object: name, Problem: "digest", Detail: "it does not hold what it should", Repairable: true}
	if err != nil {
		d.Problem, d.Detail = problemOf(err), err.Error()
	}
	v.found(d)
	return nil
}

func problemOf(err error) string {
	switch {
	case isAbsent(err):
		return "missing"
	case errors.Is(err, errForged):
		return "digest"
	}
	return "unreadable"
}

func (v *verifier) slots(ctx context.Context) error {
	for _, name := range slotNames {
		if err := v.exact(ctx, name, string(v.r.slot)); err != nil {
			return err
		}
	}
	return nil
}

func (v *verifier) shards(ctx context.Context) error { return v.exact(ctx, shardsFile, shardsText) }

// pair checks a file and its copy. optional: neither need be there.
func (v *verifier) pair(ctx context.Context, t fileType, name string, optional bool) error {
	cs, err := v.r.own.candidates(ctx, t, name)
	if err != nil {
		return err
	}
	if optional && cs[0].absent && cs[1].absent {
		return nil
	}
	v.count(2)
	for i := range cs {
		if cs[i].err != nil {
			d := repository.Damage{
				Object: cs[i].prefix + name, Problem: problemOf(cs[i].err), Detail: cs[i].err.Error(),
				Repairable: cs[1-i].err == nil,
			}
			if t == typeNote && cs[i].absent && d.Repairable {
				// Nobody can tell which.
				d.Detail = "its other form is good: this one was lost, or a process ended between the two"
			}
			v.found(d)
		}
	}
	return nil
}

func (v *verifier) format(ctx context.Context) error {
	return v.pair(ctx, typeFormat, formatName, false)
}

// lists checks the lists of packs, which can be found out anew.
func (v *verifier) lists(ctx context.Context) error {
	for _, e := range v.points {
		v.count(2) // its record and the copy, which were read before
		if err := v.pair(ctx, typePacks, packsDir+"/"+string(e.ID), false); err != nil {
			return err
		}
	}
	return v.pair(ctx, typePacks, quarantineName, true)
}

// noteFiles checks notes. The copy of a note is written first: it alone may be
// there after a crash, and the note itself after a crash of a deletion.
func (v *verifier) noteFiles(ctx context.Context) error {
	if !v.all {
		return nil
	}
	names, err := v.r.noteNames(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := v.pair(ctx, typeNote, noteFile(name), true); err != nil {
			return err
		}
	}
	return nil
}

// inventoryFiles checks the entries of the inventory's log that count.
func (v *verifier) inventoryFiles(ctx context.Context) error {
	if err := v.pair(ctx, typeAnchor, inventoryHead, false); err != nil {
		return err
	}
	l, err := v.r.own.listNumbered(ctx, inventoryDir)
	if err != nil {
		return err
	}
	v.r.inv.mu.Lock()
	base, head := v.r.inv.base, v.r.inv.head
	v.r.inv.mu.Unlock()
	for n := max(base, 1); n <= head; n++ {
		cs, err := v.r.own.readNumbered(ctx, typeInventory, inventoryDir, n, l)
		if err != nil {
			return err
		}
		v.count(2)
		good := map[string]bool{}
		for i := range cs {
			if cs[i].err == nil {
				good[cs[i].prefix] = true
			}
		}
		for _, prefix := range []string{primary, mirror} {
			if good[prefix] {
				continue
			}
			v.found(repository.Damage{
				Object: prefix + inventoryDir + "/" + number(n), Problem: missingOr(l, prefix, n), Detail: "entry of the inventory",
				Repairable: len(good) > 0,
			})
		}
	}
	return nil
}

func missingOr(l *numbered, prefix string, n int64) string {
	there := l.primary[n]
	if prefix == mirror {
		there = len(l.mirror[n]) > 0
	}
	if there {
		return "digest"
	}
	return "missing"
}
