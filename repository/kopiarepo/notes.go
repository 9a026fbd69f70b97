package kopiarepo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/repository"
)

const notesDir = "notes"

// noteHeader tells the newer of two forms of a note, after a crash between them.
type noteHeader struct {
	Generation int64 `json:"generation"`
}

// noteFile makes a file name out of a note's name: slashes become underscores,
// which names do not have.
func noteFile(name string) string { return notesDir + "/n-" + strings.ReplaceAll(name, "/", "_") }

func noteName(file string) (string, bool) {
	rest, ok := strings.CutPrefix(file, "n-")
	name := strings.ReplaceAll(rest, "_", "/")
	return name, ok && notePattern.MatchString(name)
}

func newerNote(a, b *candidate) *candidate {
	var ha, hb noteHeader
	_, _ = json.Unmarshal(a.header, &ha), json.Unmarshal(b.header, &hb) // authenticated: they parse
	if hb.Generation > ha.Generation {
		return b
	}
	return a
}

func (r *Repository) getNote(ctx context.Context, name string) (*candidate, error) {
	return r.own.get(ctx, typeNote, noteFile(name), newerNote)
}

// PutNote stores a small named value.
func (r *Repository) PutNote(ctx context.Context, name string, value []byte) error {
	if err := r.check(ctx); err != nil {
		return err
	}
	if !notePattern.MatchString(name) {
		return fmt.Errorf("note name %q is not valid", name)
	}
	if len(value) > repository.MaxNote {
		return fmt.Errorf("note %s has %d bytes, at most %d are possible", name, len(value), repository.MaxNote)
	}
	r.notes.Lock()
	defer r.notes.Unlock()
	h := noteHeader{Generation: 1}
	old, err := r.getNote(ctx, name)
	switch {
	case err == nil:
		_ = json.Unmarshal(old.header, &h) // authenticated: it parses
		h.Generation++
	case ctx.Err() != nil:
		return err
	}
	if _, err := r.own.put(ctx, typeNote, noteFile(name), h, value); err != nil {
		return fmt.Errorf("note %s: %w", name, err)
	}
	return r.dir.sync(ctx)
}

// Notes lists notes whose names begin with prefix, sorted by name.
func (r *Repository) Notes(ctx context.Context, prefix string) iter.Seq2[repository.Note, error] {
	return func(yield func(repository.Note, error) bool) {
		if err := r.check(ctx); err != nil {
			yield(repository.Note{}, err)
			return
		}
		names, err := r.noteNames(ctx)
		if err != nil {
			yield(repository.Note{}, fmt.Errorf("list notes: %w", err))
			return
		}
		var bad []error
		for _, name := range names {
			if !strings.HasPrefix(name, prefix) {
				continue
			}
			c, err := r.getNote(ctx, name)
			if errors.Is(err, errAbsent) {
				continue
			}
			if err != nil {
				if ctx.Err() != nil {
					yield(repository.Note{}, ctx.Err())
					return
				}
				bad = append(bad, fmt.Errorf("note %s: %w", name, err))
				continue
			}
			if !yield(repository.Note{Name: name, Value: c.body}, nil) {
				return
			}
		}
		if err := errors.Join(bad...); err != nil {
			yield(repository.Note{}, err)
		}
	}
}

func (r *Repository) noteNames(ctx context.Context) ([]string, error) {
	var names []string
	for _, prefix := range []string{primary, mirror} {
		entries, err := r.dir.list(ctx, prefix+notesDir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if name, ok := noteName(e.Name()); ok {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// DeleteNote removes a note.
func (r *Repository) DeleteNote(ctx context.Context, name string) error {
	if err := r.check(ctx); err != nil {
		return err
	}
	if !notePattern.MatchString(name) {
		return fmt.Errorf("note name %q is not valid", name)
	}
	r.notes.Lock()
	defer r.notes.Unlock()
	if err := r.own.remove(ctx, noteFile(name)); err != nil {
		return fmt.Errorf("note %s: %w", name, err)
	}
	return r.dir.sync(ctx)
}
