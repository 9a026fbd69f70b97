package kvm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"iter"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/nbd"
)

// served is a disk as QEMU serves it: the first 64 KiB of the first half are data that changed,
// the second half is zeros that changed.
type served struct {
	size   int64
	broken atomic.Bool // reads and questions fail
}

var errBroken = errors.New("broken")

func (s *served) Size() int64 { return s.size }

func (s *served) ReadAt(p []byte, _ int64) (int, error) {
	if s.broken.Load() {
		return 0, errBroken
	}
	for i := range p {
		p[i] = 7
	}
	return len(p), nil
}

func (s *served) MetaContexts() []string { return []string{nbd.ContextBaseAllocation, dirtyContext} }

func (s *served) Extents(_ context.Context, name string, _, _ int64) iter.Seq2[nbd.Extent, error] {
	return func(yield func(nbd.Extent, error) bool) {
		if s.broken.Load() {
			yield(nbd.Extent{}, errBroken)
			return
		}
		flag := nbd.StateDirty
		if name == nbd.ContextBaseAllocation {
			flag = nbd.StateZero
		} else if !yield(nbd.Extent{Offset: 0, Length: 64 << 10, Flags: flag}, nil) {
			return
		}
		yield(nbd.Extent{Offset: s.size / 2, Length: s.size / 2, Flags: flag}, nil)
	}
}

// reading is a snapshot whose disk vda is served, and how many connections there are.
type reading struct {
	*snapshot
	w     *faultWorld
	disk  *served
	conns atomic.Int64
}

func newReading(t *testing.T, size int64) *reading {
	t.Helper()
	r := &reading{w: newFaultWorld(t, keepsBaselines), disk: &served{size: size}}
	r.w.d.cfg.SocketDir = shortDir(t)
	s, err := r.w.d.CreateSnapshot(t.Context(), vmID, &hypervisor.SnapshotOptions{Name: run2, Since: r.w.base})
	require.NoError(t, err)
	r.snapshot = s.(*snapshot)
	srv, err := nbd.NewServer(nbd.ServerConfig{
		Exports:      nbd.ExportMap{"vda": {Backend: r.disk, ReadOnly: true}},
		OnDisconnect: func(net.Addr, string, error) { r.conns.Add(-1) },
	})
	require.NoError(t, err)
	l, err := net.Listen("unix", r.socket)
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(context.Background(), counted{l, &r.conns}) }()
	t.Cleanup(func() {
		require.NoError(t, r.w.d.Close())
		require.NoError(t, srv.Close())
		<-done
	})
	return r
}

// shortDir is a directory whose name leaves room for a socket's.
func shortDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if len(filepath.Join(dir, socketName(run2, testUUID))) > maxSocketPath {
		t.Skip("the path of a socket would be too long")
	}
	return dir
}

type counted struct {
	net.Listener
	n *atomic.Int64
}

func (l counted) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.n.Add(1)
	}
	return c, err
}

// left waits until n connections are left.
func (r *reading) left(t *testing.T, n int64) {
	t.Helper()
	require.Eventually(t, func() bool { return r.conns.Load() == n }, 5*time.Second, time.Millisecond, "connections of the driver stay open")
}

// all reads all extents.
func (r *reading) all(ctx context.Context, since *hypervisor.Baseline) ([]hypervisor.Extent, error) {
	return collect(r.Extents(ctx, "vda", since))
}

func TestReadsEndWithTheirCause(t *testing.T) {
	const size = 1 << 20
	r := newReading(t, size)
	since := r.w.base[0]
	full, err := r.all(t.Context(), nil)
	require.NoError(t, err)
	require.Equal(t, []hypervisor.Extent{{Offset: 0, Length: size / 2}}, full)
	changed, err := r.all(t.Context(), &since)
	require.NoError(t, err)
	require.Equal(t, []hypervisor.Extent{{Offset: 0, Length: 64 << 10}, {Offset: size / 2, Length: size / 2, Zero: true}}, changed)
	r.left(t, 0)
	for range r.Extents(t.Context(), "vda", nil) {
		break
	}
	r.left(t, 0)

	for disk, want := range map[hypervisor.DiskID]error{"vdx": hypervisor.ErrNotFound, "sda": errors.ErrUnsupported} {
		_, err := collect(r.Extents(t.Context(), disk, nil))
		require.ErrorIs(t, err, want)
		_, err = r.OpenDisk(t.Context(), disk)
		require.ErrorIs(t, err, want)
		_, err = r.Baseline(disk)
		require.Error(t, err)
	}
	_, err = r.OpenDisk(t.Context(), "vdb")
	require.Error(t, err, "it is not served")
	_, err = collect(r.Extents(t.Context(), "vdb", nil))
	require.Error(t, err)
	other := r.w.base[1]
	_, err = r.all(t.Context(), &other)
	require.Equal(t, hypervisor.ReasonBaselineMissing, hypervisor.BaselineReason(err), "a baseline of another disk")

	disk, err := r.OpenDisk(t.Context(), "vda")
	require.NoError(t, err)
	require.Equal(t, int64(size), disk.Size())
	b := make([]byte, 4096)
	n, err := disk.ReadAt(b, 0)
	require.NoError(t, err)
	require.Equal(t, bytes.Repeat([]byte{7}, n), b)
	_, hole, err := disk.(hypervisor.HoleReader).ReadHole(b, size/2)
	require.NoError(t, err)
	require.True(t, hole)
	_, err = disk.ReadAt(b, size)
	require.Equal(t, io.EOF, err, "bare")
	r.disk.broken.Store(true)
	_, err = disk.ReadAt(b, 0)
	require.Error(t, err)
	require.NotErrorIs(t, err, hypervisor.ErrUnavailable, "the job still runs")
	_, err = r.all(t.Context(), nil)
	require.Error(t, err)
	r.disk.broken.Store(false)
	require.NoError(t, disk.Close())
	r.left(t, 0)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	disk, err = r.OpenDisk(ctx, "vda")
	require.NoError(t, err)
	seen := 0
	for _, err := range r.Extents(ctx, "vda", &since) {
		if seen++; err != nil {
			require.ErrorIs(t, err, context.Canceled)
			break
		}
		cancel()
	}
	require.Equal(t, 2, seen, "an abandoned listing does not end like a complete one")
	_, err = disk.ReadAt(b, 0)
	require.ErrorIs(t, err, context.Canceled)
	require.NoError(t, disk.Close())

	// The last extent is followed by a look at the job.
	for e, err := range r.Extents(t.Context(), "vda", &since) {
		if e.Zero {
			r.setCause(errBroken)
		} else if e.Length == 0 {
			require.ErrorIs(t, err, errBroken)
			seen = 99
		}
	}
	require.Equal(t, 99, seen)
	_, err = r.OpenDisk(t.Context(), "vda")
	require.ErrorIs(t, err, errBroken)
	_, err = r.all(t.Context(), nil)
	require.ErrorIs(t, err, errBroken)
	require.NoError(t, r.Release(t.Context(), nil))
	require.NoError(t, r.Release(t.Context(), nil), "again")
	r.left(t, 0)
}

func TestReleaseClosesReaders(t *testing.T) {
	r := newReading(t, 1<<20)
	disk, err := r.OpenDisk(t.Context(), "vda")
	require.NoError(t, err)
	r.left(t, 1)
	require.NoError(t, r.Release(t.Context(), nil))
	r.left(t, 0)
	_, err = disk.ReadAt(make([]byte, 1), 0)
	require.ErrorIs(t, err, hypervisor.ErrNotFound)
	_, err = r.OpenDisk(t.Context(), "vda")
	require.ErrorIs(t, err, hypervisor.ErrNotFound)
	require.Zero(t, r.w.conn.f.unfinished(t.Context()), "the guard has ended")
}

func TestExportOfAnotherSizeIsRefused(t *testing.T) {
	r := newReading(t, 2<<20)
	_, err := r.OpenDisk(t.Context(), "vda")
	require.ErrorIs(t, err, hypervisor.ErrBusy)
	r.left(t, 0)
	require.NoError(t, r.Release(t.Context(), nil))
}

// TestLossOfTheJobIsTheCause: what fails because the job is gone says so.
func TestLossOfTheJobIsTheCause(t *testing.T) {
	for name, c := range map[string]struct {
		lose func(*faultWorld)
		want error
	}{
		"job":    {func(w *faultWorld) { w.f.job = "" }, hypervisor.ErrUnavailable},
		"domain": {func(w *faultWorld) { w.f.gone = true }, hypervisor.ErrUnavailable},
	} {
		r := newReading(t, 1<<20)
		disk, err := r.OpenDisk(t.Context(), "vda")
		require.NoError(t, err)
		r.disk.broken.Store(true)
		r.w.f.mu.Lock()
		c.lose(r.w)
		r.w.f.mu.Unlock()
		_, err = disk.ReadAt(make([]byte, 512), 0)
		require.ErrorIs(t, err, c.want, name)
		require.ErrorIs(t, r.usable(), c.want)
		require.NoError(t, disk.Close())
		require.NoError(t, r.Release(t.Context(), nil), name)
		require.Zero(t, r.w.conn.f.unfinished(t.Context()), "%s: contexts are not ended", name)
	}
	// No answer is no proof.
	w := newFaultWorld(t, nil)
	s, err := w.d.CreateSnapshot(t.Context(), vmID, &hypervisor.SnapshotOptions{Name: run2})
	require.NoError(t, err)
	w.f.fail = func(context.Context, string) error { return errBroken }
	require.False(t, s.(*snapshot).lost(t.Context()))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.True(t, s.(*snapshot).lost(ctx), "nobody waits any more")
	w.f.fail = nil
	require.NoError(t, s.(*snapshot).usable())
	require.NoError(t, s.Release(t.Context(), nil))
	require.NoError(t, w.d.Close())
}

// fullFiles has no space left, or does not know.
type fullFiles struct {
	hostFiles
	free int64
	err  error
}

func (f fullFiles) space(string) (int64, int64, error) { return f.free, 1 << 30, f.err }

// TestGuardGivesUp: without scratch space, or not knowing of it, the job is aborted with the cause.
func TestGuardGivesUp(t *testing.T) {
	for name, f := range map[string]fullFiles{
		"full": {free: 0, err: nil}, "unknown": {err: errBroken},
	} {
		w := newFaultWorld(t, nil)
		s, err := w.d.CreateSnapshot(t.Context(), vmID, &hypervisor.SnapshotOptions{Name: run2})
		require.NoError(t, err)
		snap := s.(*snapshot)
		f.hostFiles = w.files
		w.d.files = f
		snap.guard(t.Context())
		want := f.err
		if want == nil {
			want = hypervisor.ErrNoSpace
		}
		require.ErrorIs(t, snap.usable(), want, name)
		require.Empty(t, w.f.job, name)
		w.d.files = w.files
		require.NoError(t, s.Release(t.Context(), nil))
		require.Empty(t, w.leftovers())
		_, err = w.d.CreateSnapshot(t.Context(), vmID, nil)
		require.NoError(t, err)
		w.d.files = f
		require.ErrorIs(t, w.d.checkScratch(1), want, name)
		w.d.files = w.files
		require.NoError(t, w.d.Close())
		require.Zero(t, w.conn.f.unfinished(t.Context()))
	}
}

// TestWriterRefusesWhatIsOutside: nothing is written outside a disk, after its end or after
// the end of the context; what is not committed is emptied.
func TestWriterRefusesWhatIsOutside(t *testing.T) {
	for _, disk := range []hypervisor.DiskID{"vda", "vdb"} {
		w := newFaultWorld(t, incompleteVM)
		ctx, cancel := context.WithCancel(t.Context())
		dw, err := w.d.OpenDiskWriter(ctx, vmID, disk)
		require.NoError(t, err)
		for _, at := range [][2]int64{{-1, 1}, {1 << 20, 1}, {0, 1<<20 + 1}} {
			_, err := dw.WriteAt(make([]byte, at[1]), at[0])
			require.ErrorContains(t, err, "outside the disk")
			require.ErrorContains(t, dw.WriteZeroes(at[0], at[1]), "outside the disk")
		}
		require.NoError(t, dw.WriteZeroes(0, 0))
		_, err = dw.WriteAt([]byte("data"), 0)
		require.NoError(t, err)
		cancel()
		_, err = dw.WriteAt([]byte("data"), 4096)
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorIs(t, dw.WriteZeroes(4096, 4096), context.Canceled)
		require.ErrorIs(t, dw.Commit(), context.Canceled)
		require.NoError(t, dw.Close())
		require.NoError(t, dw.Close())
		_, err = dw.WriteAt([]byte("data"), 8192)
		require.ErrorIs(t, err, errWriterClosed)
		r, err := w.d.OpenDisk(t.Context(), vmID, disk)
		require.NoError(t, err)
		require.Equal(t, int64(1<<20), r.Size())
		b := make([]byte, 4)
		_, err = r.ReadAt(b, 0)
		require.NoError(t, err)
		require.Equal(t, make([]byte, 4), b, "it was not committed")
		_, err = r.ReadAt(b, 1<<20)
		require.Equal(t, io.EOF, err, "bare")
		require.NoError(t, r.Close())
		ctx, cancel = context.WithCancel(t.Context())
		r, err = w.d.OpenDisk(ctx, vmID, disk)
		require.NoError(t, err)
		cancel()
		_, err = r.ReadAt(b, 0)
		require.ErrorIs(t, err, context.Canceled)
		require.NoError(t, r.Close())
		require.Zero(t, w.files.opened.Load())
		require.NoError(t, w.d.DeleteVM(t.Context(), vmID))
		require.NoError(t, w.d.Close())
	}
}

// TestDamagedReferencesAreRefused: a reference that is not ours attaches to nothing.
func TestDamagedReferencesAreRefused(t *testing.T) {
	w := newFaultWorld(t, nil)
	s, err := w.d.CreateSnapshot(t.Context(), vmID, &hypervisor.SnapshotOptions{Name: run2})
	require.NoError(t, err)
	for _, token := range []string{"{", `{"v":2}`, ""} {
		ref := s.Ref()
		ref.Token = token
		_, err := w.d.OpenSnapshot(t.Context(), ref)
		require.ErrorIs(t, err, hypervisor.ErrNotFound, "%q", token)
	}
	var token refToken
	require.NoError(t, json.Unmarshal([]byte(s.Ref().Token), &token))
	require.Equal(t, 1, token.Version)
	require.NoError(t, s.Release(t.Context(), nil))
	require.NoError(t, w.d.Close())
}

// cancelFiles ends a context when the run's mark is made.
type cancelFiles struct {
	hostFiles
	cancel context.CancelFunc
}

func (f cancelFiles) open(path string, flag int) (hostFile, error) {
	f.cancel()
	return f.hostFiles.open(path, flag)
}

// TestNoJobAfterTheCallerGaveUp: what would only have to be undone is not begun.
func TestNoJobAfterTheCallerGaveUp(t *testing.T) {
	w := newFaultWorld(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w.d.files = cancelFiles{w.files, cancel}
	_, err := w.d.CreateSnapshot(ctx, vmID, nil)
	require.ErrorIs(t, err, context.Canceled)
	require.Zero(t, w.f.called("backupBegin"))
	require.Empty(t, w.leftovers())
	require.NoError(t, w.d.Close())
}

// TestLostLevelThawsFirst: a guest whose freeze failed does not wait, frozen, for the snapshot.
func TestLostLevelThawsFirst(t *testing.T) {
	w := newFaultWorld(t, nil)
	good := goodAgent()
	w.f.agentReply = func(command string) (string, error) {
		answer, err := good(command)
		if err == nil && strings.Contains(command, "fsfreeze-freeze") {
			return "", vir(virInternal, "unable to execute QEMU agent command: it fails, and the guest is frozen")
		}
		return answer, err
	}
	thawed := false
	w.f.begin = func(*backupJob, string) error {
		thawed = w.f.called(`agent {"execute":"guest-fsfreeze-thaw"`) > 0
		return nil
	}
	s, err := w.d.CreateSnapshot(t.Context(), vmID, &hypervisor.SnapshotOptions{Quiesce: hypervisor.FilesystemConsistent})
	require.NoError(t, err)
	require.True(t, thawed)
	require.NoError(t, s.Release(t.Context(), nil))
	require.NoError(t, w.d.Close())
}

// TestAttachmentsAreOpenedOrSayWhy: by whoever still wants them, and where they are.
func TestAttachmentsAreOpenedOrSayWhy(t *testing.T) {
	w := newFaultWorld(t, nil)
	path := filepath.Join(w.dir, "vars")
	_, err := w.d.opener(path)(t.Context())
	require.ErrorIs(t, err, fs.ErrNotExist)
	f, err := w.d.files.open(path, os.O_WRONLY|os.O_CREATE)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	r, err := w.d.opener(path)(t.Context())
	require.NoError(t, err)
	require.NoError(t, r.Close())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = w.d.opener(path)(ctx)
	require.ErrorIs(t, err, context.Canceled)
	require.Zero(t, w.files.opened.Load())
	require.NoError(t, w.d.Close())
}
