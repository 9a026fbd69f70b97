package repositorytest

import (
	"fmt"
	"slices"
	"strings"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

func noteChecks() []Check {
	return []Check{
		{"NotesPutReplaceDelete", checkNotes},
		{"NotesByPrefix", checkNotesPrefix},
		{"NotesLimits", checkNotesLimits},
		{"NotesConcurrent", checkNotesConcurrent},
	}
}

// notes lists notes as "name=value".
func (e *env) notes(r repository.Repository, prefix string) []string {
	e.Helper()
	out := []string{}
	for n, err := range r.Notes(e.ctx, prefix) {
		require.NoError(e, err)
		out = append(out, n.Name+"="+string(n.Value))
	}
	return out
}

func checkNotes(t T, h *Harness) {
	e := newEnv(t, h)
	value := []byte("first")
	require.NoError(t, e.repo.PutNote(e.ctx, "open/run-1", value))
	value[0] = 'X'
	require.Equal(t, []string{"open/run-1=first"}, e.notes(e.repo, ""), "the value is not retained")
	require.NoError(t, e.repo.PutNote(e.ctx, "open/run-1", []byte("second, longer")))
	require.NoError(t, e.repo.PutNote(e.ctx, "a", nil))
	r := e.reopen()
	require.Equal(t, []string{"a=", "open/run-1=second, longer"}, e.notes(r, ""))
	require.NoError(t, r.DeleteNote(e.ctx, "open/run-1"))
	require.NoError(t, r.DeleteNote(e.ctx, "open/run-1"))
	require.NoError(t, r.DeleteNote(e.ctx, "never.was"))
	require.Equal(t, []string{"a="}, e.notes(e.repo, ""))
	require.NoError(t, e.repo.PutNote(e.ctx, "open/run-1", []byte("third")))
	require.Equal(t, []string{"a=", "open/run-1=third"}, e.notes(r, ""))
	require.Empty(t, e.list(e.repo, repository.Query{}), "a note is no point")
}

func checkNotesPrefix(t T, h *Harness) {
	e := newEnv(t, h)
	names := []string{"b", "a/1", "a/10", "a/2", "a", "a.x", "a-x", "ab/1", "z/y/x"}
	for _, n := range names {
		require.NoError(t, e.repo.PutNote(e.ctx, n, []byte("v")))
	}
	slices.Sort(names)
	for _, prefix := range []string{"", "a", "a/", "a/1", "a.", "z/y", "none", "b"} {
		want := []string{}
		for _, n := range names {
			if strings.HasPrefix(n, prefix) {
				want = append(want, n+"=v")
			}
		}
		require.Equal(t, want, e.notes(e.repo, prefix), "prefix %q", prefix)
	}
	for range e.repo.Notes(e.ctx, "a/") {
		break
	}
}

func checkNotesLimits(t T, h *Harness) {
	e := newEnv(t, h)
	for _, name := range []string{"", "A", "a b", "a_b", "ä", strings.Repeat("x", 129), "a\x00"} {
		require.Error(t, e.repo.PutNote(e.ctx, name, []byte("v")), "name %q", name)
	}
	require.Error(t, e.repo.PutNote(e.ctx, "big", make([]byte, repository.MaxNote+1)))
	require.Empty(t, e.notes(e.repo, ""))
	value := make([]byte, repository.MaxNote)
	noise(e.rng, value)
	name := strings.Repeat("x", 124) + "0./-"
	require.NoError(t, e.repo.PutNote(e.ctx, name, value))
	n := 0
	for got, err := range e.reopen().Notes(e.ctx, "x") {
		require.NoError(t, err)
		require.Equal(t, name, got.Name)
		require.NoError(t, sameBytes(0, value, got.Value))
		n++
	}
	require.Equal(t, 1, n)
}

func checkNotesConcurrent(t T, h *Harness) {
	e := newEnv(t, h)
	const n = 6
	require.NoError(t, together(n, func(i int) error {
		for k := range 5 {
			if err := e.repo.PutNote(e.ctx, fmt.Sprintf("own/%d", i), fmt.Append(nil, k)); err != nil {
				return err
			}
			if err := e.repo.PutNote(e.ctx, "shared", fmt.Append(nil, i)); err != nil {
				return err
			}
			for _, err := range e.repo.Notes(e.ctx, "") {
				if err != nil {
					return err
				}
			}
		}
		return nil
	}))
	want := []string{}
	for i := range n {
		want = append(want, fmt.Sprintf("own/%d=4", i))
	}
	require.Equal(t, want, e.notes(e.reopen(), "own/"))
	require.Len(t, e.notes(e.repo, "shared"), 1)
}
