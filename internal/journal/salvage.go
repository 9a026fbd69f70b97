package journal

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
)

// Salvage makes an adoptable journal of what can still be read of a damaged one. The damaged file
// is kept, byte by byte, as <run>.damaged. The new journal holds every readable record and a
// note about the damage. Obligations whose record is lost are not in it: they must be looked for
// on the hypervisor by name. A sound journal is left as it is. A live run is ErrAlive.
func Salvage(dir, run string, opts *Options) error {
	err := checkRun(run)
	if err == nil {
		err = locked(opts.fs(), dir, func() error { return salvage(dir, run, opts) })
	}
	if notExist(err) {
		err = fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return opErr("salvage", run, err)
}

func salvage(dir, run string, opts *Options) error {
	fsys, base := opts.fs(), filepath.Join(dir, run)
	f, err := fsys.Open(base + liveSuffix)
	if err != nil {
		return err
	}
	dead, err := f.TryLock()
	if err == nil && !dead {
		err = ErrAlive
	}
	var b []byte
	if err == nil {
		b, err = readAll(f)
	}
	// Released here already: the directory lock keeps everybody else away, and some systems do
	// not replace an open file.
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	c := decode(b)
	if c.damage == nil {
		return nil
	}
	if err := writeFile(fsys, base+damagedSuffix, b); err != nil {
		return err
	}
	fresh, err := reframe(c, run, opts)
	if err != nil {
		return err
	}
	if err := writeFile(fsys, base+tempSuffix, fresh); err != nil {
		return err
	}
	// The copy of the damaged file must be there before the original goes.
	if err := fsys.SyncDir(dir); err != nil {
		return err
	}
	if err := fsys.Rename(base+tempSuffix, base+liveSuffix); err != nil {
		return err
	}
	return fsys.SyncDir(dir)
}

// reframe numbers the readable records anew.
func reframe(c contents, run string, opts *Options) ([]byte, error) {
	head, herr := json.Marshal(record{Op: opHead, Version: formatVersion, Head: &Header{
		Run: run, Command: "unknown: the header was lost",
	}})
	note, nerr := json.Marshal(record{Op: opNote, At: opts.now(), Text: fmt.Sprintf(
		"salvaged: %v; the file is kept as %s", c.damage, run+damagedSuffix)})
	var payloads [][]byte
	st := newState()
	st.replay(c.frames)
	if !st.born {
		payloads = append(payloads, head)
	}
	for _, f := range c.frames {
		payloads = append(payloads, f.payload)
	}
	buf := []byte(magic)
	for i, p := range append(payloads, note) {
		buf = appendFrame(buf, frame{seq: uint64(i + 1), payload: p})
	}
	return buf, errors.Join(herr, nerr)
}

// writeFile writes a new file, replacing an old one, and returns when its content is durable.
func writeFile(fsys FS, path string, b []byte) error {
	if err := fsys.Remove(path); err != nil && !notExist(err) {
		return err
	}
	f, err := fsys.Create(path)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, 0)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}
