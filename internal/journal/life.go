package journal

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// Create makes the journal of a new run, <dir>/<run>.journal, and returns when its header is
// durable. dir is made if it is missing. A run of that name, alive, dead or done, is an ErrExist.
// head.Run is set to run.
func Create(dir, run string, head Header, opts *Options) (*Journal, error) {
	j, err := create(dir, run, head, opts)
	return j, opErr("create", run, err)
}

func create(dir, run string, head Header, opts *Options) (*Journal, error) {
	if err := checkRun(run); err != nil {
		return nil, err
	}
	head.Run = run
	head.Endpoint, head.Repository = withoutPassword(head.Endpoint), withoutPassword(head.Repository)
	head.VMs = slices.Clone(head.VMs)
	fsys := opts.fs()
	if err := fsys.MkdirAll(dir); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, run+liveSuffix)
	var j *Journal
	err := locked(fsys, dir, func() error {
		if err := sweep(fsys, dir); err != nil {
			return err
		}
		infos, err := fsys.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, i := range infos {
			if i.Name == run+liveSuffix || i.Name == run+doneSuffix {
				return ErrExist
			}
		}
		f, err := fsys.Create(path)
		if err != nil {
			return err
		}
		j = newJournal(opts, dir, run, f)
		return errors.Join(j.begin(head), fsys.SyncDir(dir))
	})
	if err == nil {
		return j, nil
	}
	if j != nil {
		// No obligation can be in it. What cannot be removed is swept by the next Create.
		err = errors.Join(err, j.file.Close(), fsys.Remove(path))
	}
	return nil, err
}

// begin takes the lock of a fresh file and writes its header.
func (j *Journal) begin(head Header) error {
	ok, err := j.file.TryLock()
	if err != nil {
		return err
	}
	if !ok {
		return ErrAlive
	}
	return j.put(record{Op: opHead, Version: formatVersion, Head: &head}, true, nil)
}

// sweep removes what a crash inside Create left: journals without a header that nobody holds.
// No obligation can be in them. The caller holds the directory lock.
func sweep(fsys FS, dir string) error {
	infos, err := fsys.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, i := range infos {
		if strings.HasSuffix(i.Name, tempSuffix) {
			if err := fsys.Remove(filepath.Join(dir, i.Name)); err != nil && !notExist(err) {
				return err
			}
			continue
		}
		if !strings.HasSuffix(i.Name, liveSuffix) || i.Size > 2*maxPayload {
			continue
		}
		if err := sweepFile(fsys, filepath.Join(dir, i.Name)); err != nil {
			return err
		}
	}
	return nil
}

func sweepFile(fsys FS, path string) error {
	f, err := fsys.Open(path)
	if err != nil {
		if notExist(err) {
			return nil
		}
		return err
	}
	dead, err := f.TryLock()
	if err != nil || !dead {
		return errors.Join(err, f.Close())
	}
	b, err := readAll(f)
	stillborn := err == nil && len(decode(b).frames) == 0
	err = errors.Join(err, f.Close())
	if err == nil && stillborn {
		err = fsys.Remove(path)
	}
	return err
}

// Adopt takes over the journal of a dead run, exclusively, so that its obligations can be undone
// and discharged. A live run is ErrAlive, an unknown one ErrNotFound, a damaged journal a
// *DamageError (see [Salvage]). A torn tail is cut off.
func Adopt(dir, run string, opts *Options) (*Journal, error) {
	var j *Journal
	err := checkRun(run)
	if err == nil {
		err = locked(opts.fs(), dir, func() (err error) {
			j, err = adopt(dir, run, opts)
			return err
		})
	}
	if err != nil && j != nil { // it is ours, but for the end of the lock
		err = errors.Join(err, j.file.Close())
	}
	if notExist(err) {
		err = fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	if err != nil {
		return nil, opErr("adopt", run, err)
	}
	return j, nil
}

// adopt does the work of Adopt under the directory lock.
func adopt(dir, run string, opts *Options) (_ *Journal, err error) {
	f, err := opts.fs().Open(filepath.Join(dir, run+liveSuffix))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	dead, err := f.TryLock()
	if err != nil {
		return nil, err
	}
	if !dead {
		return nil, ErrAlive
	}
	b, err := readAll(f)
	if err != nil {
		return nil, err
	}
	c := decode(b)
	if c.damage != nil {
		return nil, c.damage
	}
	if len(c.frames) == 0 {
		return nil, ErrNotFound
	}
	j := newJournal(opts, dir, run, f)
	j.st.replay(c.frames)
	if j.st.err != nil {
		return nil, j.st.err
	}
	// The dead owner may not have come to fsync what is read here, nor the name of the file. It is
	// done before anybody acts on it.
	if c.torn > 0 {
		if err := f.Truncate(c.end); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(f.Sync(), opts.fs().SyncDir(dir)); err != nil {
		return nil, err
	}
	j.off, j.size, j.nextID = c.end, c.end, j.st.lastID
	j.seq = uint64(len(c.frames))
	j.synced = j.seq
	if err := j.put(record{Op: opAdopt}, true, nil); err != nil {
		return nil, err
	}
	return j, nil
}

// Close ends the ownership of the journal. With no obligation open the file is renamed to
// <run>.done if keep is set (the newest 50 such files are kept) or removed. With obligations open
// the file stays, no longer held, for [Adopt], and the error is an ErrOpen; so it does after a
// failure of the journal, whose cause is returned. The second and later calls return what the
// first one did.
func (j *Journal) Close(keep bool) error {
	j.mu.Lock()
	first := !j.closed
	j.closed = true
	j.mu.Unlock()
	if !first {
		<-j.closing
		return j.closeErr
	}
	j.token <- struct{}{} // never given back: nothing touches the file after this
	j.flush()
	j.mu.Lock()
	open, failed := len(j.st.open), j.failed
	j.mu.Unlock()
	var err error
	switch {
	case failed != nil:
		err = errors.Join(failed, j.file.Close())
	case open > 0:
		err = errors.Join(ErrOpen, j.file.Sync(), j.file.Close())
	default:
		err = j.finish(keep)
	}
	j.closeErr = opErr("close", j.run, err)
	close(j.closing)
	return j.closeErr
}

// finish moves a journal without open obligations out of the way. The caller holds the token.
func (j *Journal) finish(keep bool) error {
	end := record{Op: opEnd, At: j.opts.now()}
	j.mu.Lock()
	b, err := j.enqueue(end, true, nil)
	j.mu.Unlock()
	if err == nil {
		j.flush()
		err = b.err
	}
	if err != nil {
		return errors.Join(err, j.file.Close())
	}
	fsys, held := j.opts.fs(), true
	err = locked(fsys, j.dir, func() error {
		// Closed first, because some systems do not rename an open file; the directory lock keeps
		// everybody else away in between.
		held = false
		if err := j.file.Close(); err != nil {
			return err
		}
		path := filepath.Join(j.dir, j.run)
		if !keep {
			return errors.Join(fsys.Remove(path+liveSuffix), fsys.SyncDir(j.dir))
		}
		if err := fsys.Rename(path+liveSuffix, path+doneSuffix); err != nil {
			return err
		}
		return errors.Join(prune(fsys, j.dir), fsys.SyncDir(j.dir))
	})
	if held { // the directory could not be locked
		err = errors.Join(err, j.file.Close())
	}
	return err
}

// prune removes all but the newest finished journals. The caller holds the directory lock.
func prune(fsys FS, dir string) error {
	infos, err := fsys.ReadDir(dir) // with an error there are none
	infos = slices.DeleteFunc(infos, func(i Info) bool { return !strings.HasSuffix(i.Name, doneSuffix) })
	slices.SortFunc(infos, newestFirst)
	for _, i := range infos[min(keepDone, len(infos)):] {
		if rm := fsys.Remove(filepath.Join(dir, i.Name)); rm != nil && !notExist(rm) {
			err = errors.Join(err, rm)
		}
	}
	return err
}

func newestFirst(a, b Info) int {
	if c := b.ModTime.Compare(a.ModTime); c != 0 {
		return c
	}
	return strings.Compare(b.Name, a.Name)
}
