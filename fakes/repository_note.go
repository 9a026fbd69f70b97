package fakes

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/repository"
)

const prefixNote = "notes/"

type noteBlob struct {
	Value []byte `json:"value"`
}

func checkNoteName(name string) error {
	if !validName(name, 128, false, "./-") {
		return fmt.Errorf("note: bad name %q", name)
	}
	return nil
}

// PutNote implements repository.Repository.
func (r *Repository) PutNote(ctx context.Context, name string, value []byte) error {
	if err := r.begin(ctx); err != nil {
		return err
	}
	if err := checkNoteName(name); err != nil {
		return err
	}
	if len(value) > repository.MaxNote {
		return fmt.Errorf("note %s: %d bytes, at most %d", name, len(value), repository.MaxNote)
	}
	raw, err := r.seal(prefixNote+name, &noteBlob{value})
	if err != nil {
		return err
	}
	if err := r.conn.put(ctx, prefixNote+name, raw, nil); err != nil {
		return fmt.Errorf("put note %s: %w", name, err)
	}
	return nil
}

// Notes implements repository.Repository.
func (r *Repository) Notes(ctx context.Context, prefix string) iter.Seq2[repository.Note, error] {
	return func(yield func(repository.Note, error) bool) {
		if err := r.begin(ctx); err != nil {
			yield(repository.Note{}, err)
			return
		}
		entries, err := r.conn.list(ctx, prefixNote+prefix)
		if err != nil {
			yield(repository.Note{}, fmt.Errorf("list notes: %w", err))
			return
		}
		var bad []error
		for _, e := range entries {
			raw, err := r.conn.get(ctx, e.name)
			if errors.Is(err, errNoBlob) {
				continue // deleted since it was listed
			}
			var n noteBlob
			if err == nil {
				err = r.unseal(e.name, raw, &n)
			}
			if err != nil {
				bad = append(bad, fmt.Errorf("note %s: %w", strings.TrimPrefix(e.name, prefixNote), err))
				continue
			}
			note := repository.Note{Name: strings.TrimPrefix(e.name, prefixNote), Value: slices.Clone(n.Value)}
			if !yield(note, nil) {
				return
			}
		}
		if err := errors.Join(bad...); err != nil {
			yield(repository.Note{}, err)
		}
	}
}

// DeleteNote implements repository.Repository.
func (r *Repository) DeleteNote(ctx context.Context, name string) error {
	if err := r.begin(ctx); err != nil {
		return err
	}
	if err := checkNoteName(name); err != nil {
		return err
	}
	if err := r.conn.del(ctx, prefixNote+name, nil); err != nil {
		return fmt.Errorf("delete note %s: %w", name, err)
	}
	return nil
}
