package journal

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// world is a directory with journals of all sorts: one of a dead run with an obligation and a torn
// tail, a damaged one, what a crash inside Create left, what one inside Salvage left, and a full
// history.
func world(t *testing.T) *crashFS {
	t.Helper()
	c := newCrashFS()
	opts := &Options{FS: c}
	for i := range keepDone {
		j, err := Create("d", fmt.Sprintf("done%03d", i), Header{}, opts)
		require.NoError(t, err)
		require.NoError(t, j.Close(true))
	}
	for _, run := range []string{"dead", "hurt"} {
		j, err := Create("d", run, Header{}, opts)
		require.NoError(t, err)
		for i := range 3 {
			_, err = j.Intend(Obligation{Kind: Snapshot, Object: fmt.Sprint("object-", i)})
			require.NoError(t, err)
		}
		require.ErrorIs(t, j.Close(true), ErrOpen)
	}
	put := func(name string, edit func(b []byte) []byte) {
		n := c.now["d/"+name]
		if n == nil {
			n = &inode{}
			c.now["d/"+name] = n
		}
		n.data = edit(n.data)
		n.synced = append([]byte{}, n.data...)
	}
	put("dead.journal", func(b []byte) []byte { return append(b, "torn"...) })
	put("hurt.journal", func(b []byte) []byte {
		b[strings.Index(string(b), "object-1")] ^= 0x40
		return b
	})
	put("unborn.journal", func([]byte) []byte { return []byte("hfj") })
	put("dead.salvage", func([]byte) []byte { return []byte("half") })
	require.NoError(t, c.SyncDir("d"))
	return c
}

// files gives the content of the files, as they are or as a power cut would leave them.
func (c *crashFS) files() map[string]string {
	out := map[string]string{}
	for name, n := range c.now {
		out[name] = string(n.data)
	}
	return out
}

// operations are all that touch the file system. prepare runs without faults; the function that it
// returns is the operation, and ends whatever ownership it began.
var operations = map[string]func(opts *Options) (func() error, error){
	"create": func(opts *Options) (func() error, error) {
		return func() error {
			j, err := Create("d", "new", Header{}, opts)
			opts.FS.(*faultFS).at = 0 // how it ends is another operation
			return leave(j, err)
		}, nil
	},
	"adopt": func(opts *Options) (func() error, error) {
		return func() error {
			j, err := Adopt("d", "dead", opts)
			return leave(j, err)
		}, nil
	},
	"salvage": func(opts *Options) (func() error, error) {
		return func() error { return Salvage("d", "hurt", opts) }, nil
	},
	"list": func(opts *Options) (func() error, error) {
		return func() error {
			entries, err := List("d", opts)
			if err == nil && len(entries) != 2 {
				err = fmt.Errorf("%d entries", len(entries))
			}
			for _, e := range entries {
				if e.Run != "hurt" || !errors.Is(e.Err, ErrDamaged) {
					err = errors.Join(err, e.Err)
				}
			}
			return err
		}, nil
	},
	"history": func(opts *Options) (func() error, error) {
		return func() error {
			entries, err := History("d", opts)
			for _, e := range entries {
				err = errors.Join(err, e.Err)
			}
			if err == nil && len(entries) != keepDone {
				err = fmt.Errorf("%d entries", len(entries))
			}
			return err
		}, nil
	},
	"close and keep": func(opts *Options) (func() error, error) {
		j, err := Create("d", "new", Header{}, opts)
		return func() error { return j.Close(true) }, err
	},
	"close and remove": func(opts *Options) (func() error, error) {
		j, err := Create("d", "new", Header{}, opts)
		return func() error { return j.Close(false) }, err
	},
	"close with an obligation": func(opts *Options) (func() error, error) {
		j, err := Adopt("d", "dead", opts)
		if err == nil {
			err = j.Note("", "not durable yet")
		}
		return func() error { return only(j.Close(true), ErrOpen) }, err
	},
	"records": func(opts *Options) (func() error, error) {
		j, err := Create("d", "new", Header{}, opts)
		return func() error {
			id, err := j.Intend(Obligation{Kind: Thaw})
			err = errors.Join(err, j.Note("", "one"), j.Stage("transfer", "", true))
			if id != "" {
				err = errors.Join(err, j.Confirm(id, "handle"), j.Discharge(id))
			}
			return errors.Join(err, j.Close(true))
		}, err
	},
}

// leave closes a journal whose obligations stay, without an error of the file system.
func leave(j *Journal, err error) error {
	if err != nil {
		if j != nil {
			return errors.New("a journal with an error")
		}
		return err
	}
	if len(j.Open()) == 0 {
		return j.Close(true)
	}
	return only(j.Close(true), ErrOpen)
}

// only takes an error as none that is a condition and nothing else.
func only(err, condition error) error {
	if errors.Is(err, condition) && !errors.Is(err, errInjected) {
		return nil
	}
	return fmt.Errorf("not just %w: %w", condition, err)
}

// TestEveryFileOperationFails: whatever the file system refuses, before or after it has done it, is
// told; no file stays open and no lock is held; the next attempt succeeds, or says that the first
// one had come to its end. What an operation has done without an error is durable.
func TestEveryFileOperationFails(t *testing.T) {
	runs, start := 0, world(t)
	for name, prepare := range operations {
		for k, more := 0, true; more; k++ {
			for _, after := range []bool{false, true} {
				c := start.clone(true, 1<<20, nil)
				f := &faultFS{FS: c}
				opts := &Options{FS: f}
				op, err := prepare(opts)
				require.NoError(t, err, name)
				if k > 0 {
					f.at, f.after = f.ops+k, after
				}
				err = op()
				what := fmt.Sprintf("%s: operation %d (%s) fails, after its effect: %v", name, k, f.what, after)
				require.Zero(t, f.opened.Load(), "%s: something is open", what)
				require.Empty(t, c.dirLock, "%s: the lock is held", what)
				if f.what == "" {
					more = k == 0
					require.NoError(t, err, what)
					require.Equal(t, c.files(), c.clone(false, 0, nil).files(), "%s: something is not durable", what)
					continue
				}
				runs++
				require.ErrorIs(t, err, errInjected, what)
				comesBack(t, c, name, what)
			}
		}
	}
	require.Greater(t, runs, 300)
}

// comesBack does, without faults, what a next process does.
func comesBack(t *testing.T, c *crashFS, name, what string) {
	t.Helper()
	opts := &Options{FS: c}
	entries, err := List("d", opts)
	require.NoError(t, err, what)
	for _, e := range entries {
		require.False(t, e.Alive, "%s: %s is held", what, e.Run)
	}
	if err := Salvage("d", "hurt", opts); err != nil {
		require.NoError(t, err, what)
	}
	for run, open := range map[string]int{"dead": 3, "hurt": 2} {
		j, err := Adopt("d", run, opts)
		require.NoError(t, err, "%s: %s", what, run)
		require.Len(t, j.Open(), open, "%s: %s", what, run)
		require.ErrorIs(t, j.Close(true), ErrOpen, what)
	}
	switch name {
	case "create":
		require.NotContains(t, firstRuns(entries), "new", "%s: a failed Create leaves nothing", what)
	default:
		if j, err := Adopt("d", "new", opts); err == nil {
			for _, o := range j.Open() {
				require.NoError(t, j.Discharge(o.ID), what)
			}
			require.NoError(t, j.Close(false), what)
		} else {
			require.ErrorIs(t, err, ErrNotFound, what)
		}
	}
	j, err := Create("d", "next", Header{}, opts)
	require.NoError(t, err, what)
	require.NoError(t, j.Close(true), what)
	done, err := History("d", opts)
	require.NoError(t, err, what)
	require.Len(t, done, keepDone, what)
	for file := range c.now {
		require.False(t, strings.HasSuffix(file, tempSuffix) || strings.Contains(file, "unborn"), "%s: %s is left", what, file)
	}
}

func firstRuns(entries []Entry) (runs []string) {
	for _, e := range entries {
		if e.Err == nil && len(e.Open) == 0 && e.Finished.IsZero() && e.Adopted == 0 {
			runs = append(runs, e.Run)
		}
	}
	return runs
}

// TestWaitingRecordsAreWrittenByClose: a record that waits for the writer when Close comes is
// written by it; its writer would wait for ever.
func TestWaitingRecordsAreWrittenByClose(t *testing.T) {
	c := newCrashFS()
	j, err := Create("d", "r", Header{}, &Options{FS: c})
	require.NoError(t, err)
	_, err = j.Intend(Obligation{Kind: Thaw})
	require.NoError(t, err)
	j.mu.Lock()
	b, err := j.enqueue(record{Op: opNote, Text: "waits"}, false, nil)
	j.mu.Unlock()
	require.NoError(t, err)
	require.ErrorIs(t, j.Close(true), ErrOpen)
	select {
	case <-b.done:
		require.NoError(t, b.err)
	default:
		require.Fail(t, "nobody wrote the record")
	}
	list, err := List("d", &Options{FS: c})
	require.NoError(t, err)
	require.Len(t, list[0].Notes, 1)
}

// TestBrokenJournalRefusesWhatWaits: records behind the one that broke the journal are not written.
func TestBrokenJournalRefusesWhatWaits(t *testing.T) {
	c := newCrashFS()
	j, err := Create("d", "r", Header{}, &Options{FS: c})
	require.NoError(t, err)
	j.mu.Lock()
	b, err := j.enqueue(record{Op: opNote, Text: "waits"}, false, nil)
	j.failed = errInjected
	j.mu.Unlock()
	require.NoError(t, err)
	size := len(c.now["d/r.journal"].data)
	j.flush()
	require.ErrorIs(t, b.err, ErrBroken)
	require.ErrorIs(t, b.err, errInjected)
	require.ErrorIs(t, j.Note("", "later"), ErrBroken)
	require.Len(t, c.now["d/r.journal"].data, size)
	require.ErrorIs(t, j.Close(true), errInjected)
}

// TestTimesThatCannotBeWritten: JSON has no years beyond 9999. Such a record is refused, not
// written empty.
func TestTimesThatCannotBeWritten(t *testing.T) {
	c := world(t)
	opts := &Options{FS: c, Now: func() time.Time { return time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC) }}
	before := c.files()
	require.ErrorContains(t, Salvage("d", "hurt", opts), "year")
	require.Equal(t, before["d/hurt.journal"], c.files()["d/hurt.journal"])
	_, err := Create("d", "r", Header{}, opts)
	require.ErrorContains(t, err, "year")
	j, err := Create("d", "r", Header{}, &Options{FS: c})
	require.NoError(t, err)
	_, err = j.Intend(Obligation{Kind: Thaw, Deadline: time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC)})
	require.ErrorContains(t, err, "year")
	require.NoError(t, j.Note("", "still usable"))
	j.opts = opts
	require.ErrorContains(t, j.Close(false), "year")
}

// TestFailedWriteIsCutBack: what a failed write left in the file is not read after a later, shorter
// one.
func TestFailedWriteIsCutBack(t *testing.T) {
	c := newCrashFS()
	f := &faultFS{FS: c}
	j, err := Create("d", "r", Header{}, &Options{FS: f})
	require.NoError(t, err)
	size := len(c.now["d/r.journal"].data)
	f.at, f.after = f.ops+1, true
	require.ErrorIs(t, j.Note("", strings.Repeat("long ", 100)), errInjected)
	require.Equal(t, "WriteAt", f.what)
	require.Len(t, c.now["d/r.journal"].data, size)
	require.NoError(t, j.Close(false))
}

// renames is told of every renaming before it happens.
type renames struct {
	FS
	f func(from, to string)
}

func (r renames) Rename(from, to string) error { r.f(from, to); return r.FS.Rename(from, to) }

// TestSalvageKeepsTheDamagedFileFirst: names may become durable in any order, so that the copy of
// the damaged file has to be before the new journal takes its place.
func TestSalvageKeepsTheDamagedFileFirst(t *testing.T) {
	c, asked := world(t), false
	damaged := c.files()["d/hurt.journal"]
	require.NoError(t, Salvage("d", "hurt", &Options{FS: renames{c, func(string, string) {
		asked = true
		require.Contains(t, c.durable, "d/hurt.damaged")
		require.Equal(t, damaged, string(c.durable["d/hurt.damaged"].synced))
		require.Contains(t, c.durable, "d/hurt.salvage")
		require.Equal(t, c.now["d/hurt.salvage"].data, c.durable["d/hurt.salvage"].synced)
	}}}))
	require.True(t, asked)
}

// TestUnreadableRecordsAreTold: a record that is only half understood, or a head that is another
// one, is an error with its number.
func TestUnreadableRecordsAreTold(t *testing.T) {
	const head = `{"op":"head","version":1,"head":{"run":"r"}}`
	for _, payloads := range [][]string{{`{"op":"hello"}`}, {head, `{"op":"note","text":5}`}} {
		b := []byte(magic)
		for i, p := range payloads {
			b = appendFrame(b, frame{seq: uint64(i + 1), payload: []byte(p)})
		}
		c := newCrashFS()
		c.now["d/r.journal"] = &inode{data: b, synced: b}
		list, err := List("d", &Options{FS: c})
		require.NoError(t, err)
		require.ErrorIs(t, list[0].Err, ErrFormat)
		require.ErrorContains(t, list[0].Err, fmt.Sprintf("record %d", len(payloads)))
	}
}
