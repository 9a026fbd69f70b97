package kopiarepo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kopia/kopia/repo/blob"

	"github.com/holdfast-backup/holdfast/repository"
)

// RepairReport tells what a repair did.
type RepairReport struct {
	Files    int64    // files of the new repository
	Bytes    int64    // their size
	Restored []string // files that came from a copy, because they themselves were damaged or missing
	Damaged  []string // files that were taken over damaged, because no copy of them is good
	Lost     []string // files of which nothing is left

	// Verify is the check of the new repository, with every blob read.
	Verify *repository.VerifyReport
}

// Repair brings back from copies what can be, into a new directory, which must not
// exist or be empty, and verifies it. The repository in cfg.Dir is only read.
func Repair(ctx context.Context, cfg Config, dest string) (*RepairReport, error) {
	r, err := Open(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("repair: %w", err)
	}
	defer func() { _ = r.Close() }()
	to, err := localDir(dest)
	if err != nil {
		return nil, fmt.Errorf("repair: %w", err)
	}
	switch kind, err := inspect(to); {
	case err != nil:
		return nil, fmt.Errorf("repair into %s: %w", to, err)
	case kind != dirEmpty:
		return nil, fmt.Errorf("repair into %s: %w: it %s", to, repository.ErrExists, kind)
	}
	chosen, err := r.choosePassword(ctx)
	if err != nil {
		return nil, fmt.Errorf("repair: %w", err)
	}
	p := &repairer{r: r, to: newDirStore(to, cfg.StorageHook), report: &RepairReport{}}
	gctx, done := r.store.guard(ctx)
	if err := done(p.run(gctx)); err != nil {
		return p.report, fmt.Errorf("repair into %s: %w", to, err)
	}
	fixed := cfg
	fixed.Dir = to
	n, err := Open(ctx, fixed)
	if err != nil {
		return p.report, fmt.Errorf("open the repaired repository: %w", err)
	}
	defer func() { _ = n.Close() }()
	if chosen != nil {
		n.store.pin(chosen)
		n.store.forgetSource()
		if err := n.protect(ctx); err != nil {
			return p.report, fmt.Errorf("inventory of the repaired repository: %w", err)
		}
	}
	p.report.Verify, err = n.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyBlobs})
	return p.report, err
}

type repairer struct {
	r      *Repository
	to     *dirStore
	report *RepairReport
	done   map[string]bool
}

func (p *repairer) run(ctx context.Context) error {
	p.done = map[string]bool{}
	if err := os.MkdirAll(p.to.root, 0o700); err != nil {
		return err
	}
	// The description comes last: until then the directory is no repository.
	for _, f := range []func(context.Context) error{p.blobs, p.chains, p.pairs, p.inventory, p.rest, p.fixed} {
		if err := f(ctx); err != nil {
			return err
		}
	}
	return p.to.sync(ctx)
}

// put writes one file of the new repository.
func (p *repairer) put(ctx context.Context, name string, data []byte, mtime time.Time) error {
	p.done[name] = true
	p.report.Files++
	p.report.Bytes += int64(len(data))
	return p.to.put(ctx, name, mtime, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
}

// blobs brings over every blob that the inventory knows, and its copies.
func (p *repairer) blobs(ctx context.Context) error {
	for _, e := range p.r.inv.all() {
		id := blob.ID(e.Name)
		files := []string{blobFile(id)}
		if critical(e.Name) {
			files = append(files, copiesOf(id)...)
		}
		var good, bad []byte
		var broken []string
		for _, file := range files {
			b, err := p.r.dir.get(ctx, file, maxSmallBlob)
			if err != nil && ctx.Err() != nil {
				return err
			}
			switch {
			case err == nil && sumOf(b) == e.Sum:
				good = b
				continue
			case err == nil && file == blobFile(id):
				bad = b
			}
			broken = append(broken, file)
		}
		if good == nil {
			// What is left of it may still serve some points.
			p.done[blobFile(id)] = true
			if bad == nil {
				p.report.Lost = append(p.report.Lost, blobFile(id))
				continue
			}
			p.report.Damaged = append(p.report.Damaged, blobFile(id))
			if err := p.put(ctx, blobFile(id), bad, time.Unix(e.Time, 0)); err != nil {
				return err
			}
			continue
		}
		p.report.Restored = append(p.report.Restored, broken...)
		for _, file := range files {
			if err := p.put(ctx, file, good, time.Unix(e.Time, 0)); err != nil {
				return err
			}
		}
	}
	return nil
}

// chains brings over the records that can be trusted, and their copies.
func (p *repairer) chains(ctx context.Context) error {
	all, err := p.r.allChains(ctx)
	if err != nil {
		return err
	}
	for _, c := range all {
		dir := recordDir(c.name)
		for n, want := range c.trusted {
			b, broken, err := p.find(ctx, want, append([]string{primary + dir + "/" + number(n)}, c.stored.mirror[n]...))
			if err != nil {
				return err
			}
			if b == nil {
				continue
			}
			name := primary + dir + "/" + number(n)
			for _, file := range broken {
				if file == name {
					p.report.Restored = append(p.report.Restored, file)
				}
			}
			if err := p.put(ctx, name, b, time.Time{}); err != nil {
				return err
			}
			if err := p.put(ctx, mirrorNumbered(dir, n, want), b, time.Time{}); err != nil {
				return err
			}
		}
	}
	return nil
}

// find returns the first file with the right digest, and those without it.
func (p *repairer) find(ctx context.Context, want sum, files []string) (good []byte, broken []string, err error) {
	for _, file := range files {
		b, err := p.r.dir.get(ctx, file, maxOwnFile)
		switch {
		case err != nil && ctx.Err() != nil:
			return nil, nil, err
		case err != nil || sumOf(b) != want:
			broken = append(broken, file)
		case good == nil:
			good = b
		}
	}
	return good, broken, nil
}

// pairs brings over files that have one copy: from whichever is authentic.
func (p *repairer) pairs(ctx context.Context) error {
	type file struct {
		t    fileType
		name string
	}
	files := []file{{typeAnchor, inventoryHead}, {typePacks, quarantineName}}
	for dir, t := range map[string]fileType{anchorsDir: typeAnchor, packsDir: typePacks, notesDir: typeNote} {
		seen := map[string]bool{}
		for _, prefix := range []string{primary, mirror} {
			entries, err := p.r.dir.list(ctx, prefix+dir)
			if err != nil {
				return err
			}
			for _, e := range entries {
				if !seen[e.Name()] {
					seen[e.Name()] = true
					files = append(files, file{t, dir + "/" + e.Name()})
				}
			}
		}
	}
	for _, f := range files {
		if err := p.pair(ctx, f.t, f.name); err != nil {
			return err
		}
	}
	return nil
}

func (p *repairer) pair(ctx context.Context, t fileType, name string) error {
	cs, err := p.r.own.candidates(ctx, t, name)
	if err != nil {
		return err
	}
	var good []byte
	for i := range cs {
		b, err := p.r.dir.get(ctx, cs[i].prefix+name, maxOwnFile)
		if cs[i].err == nil && err == nil && good == nil {
			good = b
		}
	}
	p.done[primary+name], p.done[mirror+name] = true, true
	if good == nil {
		if !cs[0].absent || !cs[1].absent {
			p.report.Lost = append(p.report.Lost, primary+name)
		}
		return nil
	}
	for i := range cs {
		if cs[i].err != nil {
			p.report.Restored = append(p.report.Restored, cs[i].prefix+name)
		}
		if err := p.put(ctx, cs[i].prefix+name, good, time.Time{}); err != nil {
			return err
		}
	}
	return nil
}

// inventory brings over the entries of the inventory's log.
func (p *repairer) inventory(ctx context.Context) error {
	l, err := p.r.own.listNumbered(ctx, inventoryDir)
	if err != nil {
		return err
	}
	for _, n := range l.numbers() {
		cs, err := p.r.own.readNumbered(ctx, typeInventory, inventoryDir, n, l)
		if err != nil {
			return err
		}
		name := primary + inventoryDir + "/" + number(n)
		for i := range cs {
			if cs[i].err != nil || cs[i].prefix != primary && !p.r.inv.holds(n) {
				continue
			}
			b, broken, err := p.find(ctx, cs[i].sum, append([]string{name}, l.mirror[n]...))
			if err != nil {
				return err
			}
			if len(broken) > 0 && cs[i].prefix != primary {
				p.report.Restored = append(p.report.Restored, name)
			}
			if err := p.put(ctx, name, b, time.Time{}); err != nil {
				return err
			}
			if err := p.put(ctx, mirrorNumbered(inventoryDir, n, cs[i].sum), b, time.Time{}); err != nil {
				return err
			}
			break
		}
	}
	return nil
}

// rest brings over what nothing vouches for: blobs that are not in the inventory,
// and leases. They are what they are.
func (p *repairer) rest(ctx context.Context) error {
	return filepath.WalkDir(p.r.dir.root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		rel, err := filepath.Rel(p.r.dir.root, path)
		if err != nil {
			return err
		}
		name := filepath.ToSlash(rel)
		ownFile := strings.HasPrefix(name, primary) || strings.HasPrefix(name, mirror)
		lease := strings.HasPrefix(name, primary+locksDir+"/")
		if p.done[name] || strings.Contains(name, tempInfix) || name == shardsFile || ownFile && !lease {
			return nil
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		b, err := p.r.dir.get(ctx, name, maxSmallBlob)
		if err != nil {
			p.report.Lost = append(p.report.Lost, name)
			return ctx.Err()
		}
		return p.put(ctx, name, b, info.ModTime())
	})
}

// fixed writes what is the same in every copy, the description last.
func (p *repairer) fixed(ctx context.Context) error {
	fixed := map[string][]byte{shardsFile: []byte(shardsText)}
	for _, name := range slotNames {
		fixed[name] = p.r.slot
	}
	for name, want := range fixed {
		b, err := p.r.dir.get(ctx, name, maxSlot)
		if err != nil && ctx.Err() != nil {
			return err
		}
		if err != nil || !bytes.Equal(b, want) {
			p.report.Restored = append(p.report.Restored, name)
		}
		if err := p.put(ctx, name, want, time.Time{}); err != nil {
			return err
		}
	}
	if err := p.to.sync(ctx); err != nil {
		return err
	}
	return errors.Join(p.pair(ctx, typeFormat, formatName), ctx.Err())
}
