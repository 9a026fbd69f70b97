package journal

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func clock() func() time.Time {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	return func() time.Time { now = now.Add(time.Second); return now }
}

func TestWholeLife(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state", "journal")
	opts := &Options{Now: clock()}
	start := time.Date(2026, 3, 1, 11, 0, 0, 0, time.UTC)
	j, err := Create(dir, "r-1", Header{
		Command: "backup", Host: "h1", PID: 42, VMs: []string{"web1", "db1"}, Start: start,
		Endpoint: "vsphere://admin:secret@vc.example/sdk", Repository: "s3://key:secret@bucket/p",
	}, opts)
	require.NoError(t, err)
	require.NoError(t, j.Stage("snapshot", "web1", true))
	deadline := start.Add(time.Minute)
	var ids []ID
	for _, k := range []Kind{LocalFile, Baseline, Snapshot, Snapshot, Thaw, ExportJob, Process, PowerOff, ScratchFile, IncompleteVM} {
		id, err := j.Intend(Obligation{
			Kind: k, Endpoint: "esx://root:secret@host", VM: "web1", Object: "holdfast-r-1", Deadline: deadline,
			Data: map[string]string{"moref": "vm-7"},
		})
		require.NoError(t, err)
		ids = append(ids, id)
	}
	require.NoError(t, j.Confirm(ids[2], `{"ref":"snapshot-9"}`))
	require.NoError(t, j.Discharge(ids[9]))
	require.NoError(t, j.Discharge(ids[9]), "discharge is idempotent")
	require.ErrorIs(t, j.Discharge("o99"), ErrUnknown)
	require.ErrorIs(t, j.Discharge("x"), ErrUnknown)
	require.ErrorIs(t, j.Confirm(ids[9], "h"), ErrUnknown)
	_, err = j.Intend(Obligation{Kind: "made-up"})
	require.ErrorIs(t, err, ErrKind)
	_, err = j.Intend(Obligation{Kind: Thaw, Object: strings.Repeat("x", maxPayload)})
	require.ErrorIs(t, err, ErrTooLarge)
	require.NoError(t, j.Stage("snapshot", "web1", false))
	require.NoError(t, j.Stage("transfer", "web1", true))
	require.NoError(t, j.Note("web1", "disk 1 is full again"))

	list, err := List(dir, opts)
	require.NoError(t, err)
	require.Len(t, list, 1)
	e := list[0]
	require.NoError(t, e.Err)
	require.True(t, e.Alive)
	require.Equal(t, Header{
		Run: "r-1", Command: "backup", Host: "h1", PID: 42, VMs: []string{"web1", "db1"}, Start: start,
		Endpoint: "vsphere://admin@vc.example/sdk", Repository: "s3://key@bucket/p",
	}, e.Header)
	require.Len(t, e.Stages, 2)
	require.True(t, e.Stages[0].Done)
	require.True(t, e.Stages[0].Left.After(e.Stages[0].Entered))
	require.False(t, e.Stages[1].Done)
	require.Equal(t, "disk 1 is full again", e.Notes[0].Text)
	var order []Kind
	for _, o := range e.Open {
		order = append(order, o.Kind)
	}
	require.Equal(t, []Kind{Thaw, ExportJob, PowerOff, Process, Snapshot, Snapshot, Baseline, ScratchFile, LocalFile}, order)
	require.Equal(t, []ID{ids[3], ids[2]}, []ID{e.Open[4].ID, e.Open[5].ID}, "the latest first")
	require.Equal(t, `{"ref":"snapshot-9"}`, e.Open[5].Handle)
	require.True(t, e.Open[5].Confirmed)
	require.False(t, e.Open[4].Confirmed)
	require.Equal(t, "esx://root@host", e.Open[0].Endpoint)
	require.True(t, deadline.Equal(e.Open[0].Deadline))
	require.Equal(t, map[string]string{"moref": "vm-7"}, e.Open[0].Data)
	raw, err := os.ReadFile(e.Path)
	require.NoError(t, err)
	require.NotContains(t, string(raw), "secret")

	_, err = Adopt(dir, "r-1", opts)
	require.ErrorIs(t, err, ErrAlive)
	require.ErrorIs(t, Salvage(dir, "r-1", opts), ErrAlive)
	_, err = Create(dir, "r-1", Header{}, opts)
	require.ErrorIs(t, err, ErrExist)
	require.ErrorIs(t, j.Close(true), ErrOpen)
	require.ErrorIs(t, j.Close(true), ErrOpen, "closing twice says the same")
	require.ErrorIs(t, j.Note("", "late"), ErrClosed)
	require.ErrorIs(t, j.Discharge(ids[0]), ErrClosed)

	list, err = List(dir, opts)
	require.NoError(t, err)
	require.False(t, list[0].Alive)
	j, err = Adopt(dir, "r-1", opts)
	require.NoError(t, err)
	require.Equal(t, e.Header, j.Header())
	_, err = Adopt(dir, "r-1", opts)
	require.ErrorIs(t, err, ErrAlive)
	for _, o := range j.Open() {
		require.NoError(t, j.Discharge(o.ID))
	}
	id, err := j.Intend(Obligation{Kind: LocalFile})
	require.NoError(t, err)
	require.NotContains(t, ids, id, "IDs are never given twice")
	require.NoError(t, j.Discharge(id))
	require.NoError(t, j.Close(true))
	require.NoError(t, j.Close(true))

	list, err = List(dir, opts)
	require.NoError(t, err)
	require.Empty(t, list)
	done, err := History(dir, opts)
	require.NoError(t, err)
	require.Len(t, done, 1)
	require.Equal(t, 1, done[0].Adopted)
	require.Empty(t, done[0].Open)
	require.False(t, done[0].Finished.IsZero())
	_, err = Adopt(dir, "r-1", opts)
	require.ErrorIs(t, err, ErrNotFound)
	_, err = Create(dir, "r-1", Header{}, opts)
	require.ErrorIs(t, err, ErrExist)

	j, err = Create(dir, "r-2", Header{}, nil)
	require.NoError(t, err)
	require.NoError(t, j.Close(false))
	names, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, names, 2, "the done journal and the lock")
}

func TestMissingDirectoryAndNames(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "none")
	list, err := List(dir, nil)
	require.NoError(t, err)
	require.Empty(t, list)
	require.NoDirExists(t, dir)
	_, err = Adopt(dir, "r", nil)
	require.ErrorIs(t, err, ErrNotFound)
	for _, run := range []string{"", ".", "..", "a/b", `a\b`, "-x", ".x", "a b", strings.Repeat("a", 101), "é"} {
		_, err := Create(dir, run, Header{}, nil)
		require.ErrorIs(t, err, ErrRunName, "%q", run)
		_, err = Adopt(dir, run, nil)
		require.ErrorIs(t, err, ErrRunName, "%q", run)
		require.ErrorIs(t, Salvage(dir, run, nil), ErrRunName, "%q", run)
	}
}

func TestHistoryIsPruned(t *testing.T) {
	c := newCrashFS()
	opts := &Options{FS: c}
	for i := range keepDone + 5 {
		j, err := Create("d", fmt.Sprintf("r%03d", i), Header{}, opts)
		require.NoError(t, err)
		require.NoError(t, j.Close(true))
	}
	done, err := History("d", opts)
	require.NoError(t, err)
	require.Len(t, done, keepDone)
	require.Equal(t, "r005", done[0].Run, "the oldest went")
}

// A kill leaves the journal dead and complete; while the owner lives nobody else gets it.
func TestKilledOwner(t *testing.T) {
	if dir := os.Getenv("HOLDFAST_TEST_JOURNAL_OWNER"); dir != "" {
		j, err := Create(dir, "victim", Header{}, nil)
		require.NoError(t, err)
		id, err := j.Intend(Obligation{Kind: Thaw, VM: "web1"})
		require.NoError(t, err)
		fmt.Printf("ready %s\n", id)
		_, _ = io.Copy(io.Discard, os.Stdin) // until killed
		return
	}
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledOwner$", "-test.v")
	cmd.Env = append(os.Environ(), "HOLDFAST_TEST_JOURNAL_OWNER="+dir)
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	ready := false
	for sc := bufio.NewScanner(stdout); !ready && sc.Scan(); {
		ready = strings.HasPrefix(sc.Text(), "ready")
	}
	require.True(t, ready)

	list, err := List(dir, nil)
	require.NoError(t, err)
	require.True(t, list[0].Alive)
	_, err = Adopt(dir, "victim", nil)
	require.ErrorIs(t, err, ErrAlive)
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())

	list, err = List(dir, nil)
	require.NoError(t, err)
	require.False(t, list[0].Alive)
	require.Len(t, list[0].Open, 1)
	j, err := Adopt(dir, "victim", nil)
	require.NoError(t, err)
	require.NoError(t, j.Discharge(j.Open()[0].ID))
	require.NoError(t, j.Close(false))
}

func TestDamageAndSalvage(t *testing.T) {
	build := func() *crashFS {
		c := newCrashFS()
		opts := &Options{FS: c}
		j, err := Create("d", "hurt", Header{Host: "h1"}, opts)
		require.NoError(t, err)
		for i := range 4 {
			_, err := j.Intend(Obligation{Kind: Snapshot, Object: fmt.Sprint("object-", i)})
			require.NoError(t, err)
		}
		require.ErrorIs(t, j.Close(true), ErrOpen)
		other, err := Create("d", "well", Header{}, opts)
		require.NoError(t, err)
		require.NoError(t, other.Close(false))
		n := c.now["d/hurt.journal"]
		at := strings.Index(string(n.data), "object-1")
		n.data[at] ^= 0x40
		n.synced = append([]byte{}, n.data...)
		return c
	}
	c := build()
	opts := &Options{FS: c}
	_, err := Adopt("d", "hurt", opts)
	require.ErrorIs(t, err, ErrDamaged)
	var damage *DamageError
	require.ErrorAs(t, err, &damage)
	require.Equal(t, uint64(3), damage.Seq)
	list, err := List("d", opts)
	require.NoError(t, err)
	require.ErrorIs(t, list[0].Err, ErrDamaged)
	require.Len(t, list[0].Open, 3, "what can be read is shown")

	for kill := 1; ; kill++ {
		c := build()
		c.killAt = c.ops + kill
		err := Salvage("d", "hurt", &Options{FS: c})
		for keep := range c.pendingBytes() + 1 {
			for _, late := range []bool{false, true} {
				list, lerr := List("d", &Options{FS: c.clone(late, keep, nil)})
				require.NoError(t, lerr)
				require.Len(t, list, 1, "killed at %d", kill)
				require.Len(t, list[0].Open, 3, "killed at %d", kill)
			}
		}
		if err != nil {
			require.ErrorIs(t, err, errDead)
			continue
		}
		opts := &Options{FS: c}
		c.killAt = 0
		list, err := List("d", opts)
		require.NoError(t, err)
		require.NoError(t, list[0].Err)
		require.Equal(t, "h1", list[0].Header.Host)
		require.Len(t, list[0].Notes, 1)
		require.Contains(t, c.now, "d/hurt.damaged")
		j, err := Adopt("d", "hurt", opts)
		require.NoError(t, err)
		require.Len(t, j.Open(), 3)
		break
	}
}

func TestHeaderLostIsSalvaged(t *testing.T) {
	c := newCrashFS()
	opts := &Options{FS: c}
	j, err := Create("d", "r", Header{}, opts)
	require.NoError(t, err)
	for range 2 {
		_, err = j.Intend(Obligation{Kind: Thaw})
		require.NoError(t, err)
	}
	require.ErrorIs(t, j.Close(false), ErrOpen)
	clear(c.now["d/r.journal"].data[:40])
	list, err := List("d", opts)
	require.NoError(t, err)
	require.ErrorIs(t, list[0].Err, ErrDamaged)
	require.Len(t, list[0].Open, 2)
	require.NoError(t, Salvage("d", "r", opts))
	j, err = Adopt("d", "r", opts)
	require.NoError(t, err)
	require.Len(t, j.Open(), 2)
}

func TestNewerRecordsAreRefusedNotHidden(t *testing.T) {
	c := newCrashFS()
	b := []byte(magic)
	for i, p := range []string{
		`{"op":"head","version":1,"head":{"run":"r"}}`,
		`{"op":"intend","obligation":{"id":"o1","kind":"teleport"}}`,
		`{"op":"intend","obligation":{"id":"o2","kind":"thaw"}}`,
	} {
		b = appendFrame(b, frame{seq: uint64(i + 1), synced: uint64(i), payload: []byte(p)})
	}
	c.now["d/r.journal"] = &inode{data: b, synced: b}
	list, err := List("d", &Options{FS: c})
	require.NoError(t, err)
	require.ErrorIs(t, list[0].Err, ErrFormat)
	require.Len(t, list[0].Open, 2)
	require.Equal(t, Thaw, list[0].Open[0].Kind)
	_, err = Adopt("d", "r", &Options{FS: c})
	require.ErrorIs(t, err, ErrKind)
}

func TestWithoutPassword(t *testing.T) {
	for in, want := range map[string]string{
		"qemu:///system":                 "qemu:///system",
		"./store":                        "./store",
		"/mnt/a@b:c":                     "/mnt/a@b:c",
		"vsphere://u:p@h/x?a=b":          "vsphere://u@h/x?a=b",
		"xen://user@host":                "xen://user@host",
		"sftp://u:p%zz@h/x":              "sftp://h/x",
		"s3://k:se/cr@et@bucket/prefix/": "s3://bucket/prefix/",
	} {
		require.Equal(t, want, withoutPassword(in))
	}
}

// A full journal refuses chatter and new obligations, but never the end of one.
func TestLimits(t *testing.T) {
	c := newCrashFS()
	j, err := Create("d", "r", Header{}, &Options{FS: c})
	require.NoError(t, err)
	id, err := j.Intend(Obligation{Kind: Thaw})
	require.NoError(t, err)
	j.size = maxChatter + 1
	require.ErrorIs(t, j.Note("", "x"), ErrFull)
	id2, err := j.Intend(Obligation{Kind: Thaw})
	require.NoError(t, err)
	j.size = maxIntend + 1
	_, err = j.Intend(Obligation{Kind: Thaw})
	require.ErrorIs(t, err, ErrFull)
	require.NoError(t, j.Discharge(id))
	j.size = maxIntend + 1
	require.NoError(t, j.Discharge(id2))
	require.NoError(t, j.Close(false))
}

// Records of a batch that was never acknowledged must not come back to life behind the records
// of a later owner, even when the bytes line up.
func TestStaleTailStaysDead(t *testing.T) {
	b := appendFrame([]byte(magic), frame{seq: 1, payload: []byte(`{"op":"head","version":1,"head":{"run":"r"}}`)})
	gap := len(appendFrame(nil, frame{payload: []byte(`{"op":"adopt"}`)}))
	b = append(b, make([]byte, gap)...)
	b = appendFrame(b, frame{seq: 3, synced: 1, payload: []byte(`{"op":"intend","obligation":{"id":"o1","kind":"thaw"}}`)})
	c := newCrashFS()
	c.now["d/r.journal"] = &inode{data: b, synced: b}
	j, err := Adopt("d", "r", &Options{FS: c})
	require.NoError(t, err)
	require.Empty(t, j.Open())
	list, err := List("d", &Options{FS: c})
	require.NoError(t, err)
	require.Empty(t, list[0].Open)
}
