package journal

import (
	"cmp"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Entry is what a journal says about its run.
type Entry struct {
	Run      string
	Path     string
	Header   Header // zero but for Run when it cannot be read
	Alive    bool   // a process holds the journal
	Adopted  int    // how often a dead run was taken over
	Finished time.Time
	Stages   []Stage // in the order entered
	Notes    []Note
	Open     []OpenObligation // in undo order
	Torn     int64            // bytes of an unfinished record at the end, ignored

	// Err is a *DamageError, an ErrFormat or what reading failed with; nil for a sound journal.
	// With the first two the other fields hold all that could be understood: obligations may be
	// missing, and some listed as open may be discharged.
	Err error
}

// List returns the unfinished journals of dir, the earliest run first. A journal that cannot be
// read is an entry with Err, not an error of List; a missing directory has no journals. Dead
// runs with open obligations are the ones to [Adopt].
func List(dir string, opts *Options) ([]Entry, error) { return list(dir, liveSuffix, opts) }

// History returns the finished journals of dir that are kept, the earliest run first.
func History(dir string, opts *Options) ([]Entry, error) { return list(dir, doneSuffix, opts) }

func list(dir, suffix string, opts *Options) ([]Entry, error) {
	fsys := opts.fs()
	var out []Entry
	if _, err := fsys.ReadDir(dir); notExist(err) {
		return nil, nil
	} else if err != nil {
		return nil, opErr("list", dir, err)
	}
	err := locked(fsys, dir, func() error {
		infos, err := fsys.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, i := range infos {
			run, ok := strings.CutSuffix(i.Name, suffix)
			if !ok || checkRun(run) != nil {
				continue
			}
			if e, ok := load(fsys, filepath.Join(dir, i.Name), run); ok {
				out = append(out, e)
			}
		}
		return nil
	})
	if err != nil {
		return nil, opErr("list", dir, err)
	}
	slices.SortFunc(out, func(a, b Entry) int {
		return cmp.Or(a.Header.Start.Compare(b.Header.Start), strings.Compare(a.Run, b.Run))
	})
	return out, nil
}

// load reads one journal. It reports false for one that was never born: a crash inside Create
// left it and no obligation can be in it. The caller holds the directory lock.
func load(fsys FS, path, run string) (Entry, bool) {
	e := Entry{Run: run, Path: path, Header: Header{Run: run}}
	f, err := fsys.Open(path)
	if err != nil {
		e.Err = opErr("list", run, err)
		return e, !notExist(err)
	}
	free, err := f.TryLock()
	e.Alive = err == nil && !free
	b, rerr := readAll(f)
	if err := errors.Join(err, rerr, f.Close()); err != nil {
		e.Err = opErr("list", run, err)
		return e, true
	}
	c := decode(b)
	if len(c.frames) == 0 {
		return e, false
	}
	e.fill(c)
	return e, true
}

func (e *Entry) fill(c contents) {
	st := newState()
	st.replay(c.frames)
	if st.born {
		e.Header = st.head
	} else if st.err == nil {
		st.err = ErrFormat // no header: with damage it may be lost, which damage says
	}
	e.Stages, e.Notes, e.Open = st.stages, st.notes, st.undoOrder()
	e.Adopted, e.Finished, e.Torn = st.adopted, st.finished, c.torn
	switch {
	case c.damage != nil:
		e.Torn = 0
		e.Err = opErr("list", e.Run, c.damage)
	case st.err != nil:
		e.Err = opErr("list", e.Run, st.err)
	}
}

// readAll reads a journal file, up to the size that a journal can have.
func readAll(f File) ([]byte, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > maxFile {
		return nil, ErrFull
	}
	b := make([]byte, size)
	n, err := f.ReadAt(b, 0)
	if int64(n) == size {
		err = nil
	}
	return b[:n], err
}
