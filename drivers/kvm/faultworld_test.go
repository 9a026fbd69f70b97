package kvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

const (
	run1 = "holdfast-c0ffee00-run1-snap"
	run2 = "holdfast-c0ffee00-run2-snap"
)

// faultWorld is a daemon, its files and a driver, for one run of one operation.
type faultWorld struct {
	t     *testing.T
	ctx   context.Context
	f     *fakeConn
	conn  *faultConn
	files *faultFiles
	d     *Driver
	dir   string // of images
	bad   []string
	base  []hypervisor.Baseline // of run1
	ref   hypervisor.SnapshotRef
	state int // of the domain before the operation
	kept  bool
	open  int // attachments that are open
}

func newFaultWorld(t *testing.T, setUp func(*faultWorld)) *faultWorld {
	t.Helper()
	w := &faultWorld{t: t, ctx: t.Context(), f: newFakeConn(fakeDomain), dir: t.TempDir()}
	w.f.agentReply = goodAgent()
	w.f.pools = map[string]string{"pool": w.dir}
	w.conn = &faultConn{fakeConn: w.f, f: &faults{}}
	w.files = &faultFiles{f: w.conn.f}
	w.reconnect()
	if setUp != nil {
		setUp(w)
	}
	w.state = w.f.state0
	return w
}

// reconnect makes a new driver, as another process would.
func (w *faultWorld) reconnect() {
	w.t.Helper()
	ep, err := parseURI("qemu:///system")
	require.NoError(w.t, err)
	scratch := w.t.TempDir()
	if w.d != nil {
		require.NoError(w.t, w.d.Close())
		scratch = w.d.cfg.ScratchDir
	}
	cfg, err := Config{
		URI: ep.raw, ScratchDir: scratch, StorageDir: w.dir, ScratchMinFree: 1, ScratchReserve: 1, SocketDir: "/tmp",
		Clock: func() time.Time { return time.Unix(1700000000, 0) }, Sleep: w.conn.f.sleep,
	}.withDefaults()
	require.NoError(w.t, err)
	w.d, err = newDriver(w.ctx, cfg, ep, w.conn)
	require.NoError(w.t, err)
	w.d.files = w.files
}

func (w *faultWorld) wrong(format string, args ...any) {
	w.bad = append(w.bad, fmt.Sprintf(format, args...))
}

// leftovers tells what of ours is there and should not be.
func (w *faultWorld) leftovers() (out []string) {
	w.f.mu.Lock()
	defer w.f.mu.Unlock()
	note := func(is bool, format string, args ...any) {
		if is {
			out = append(out, fmt.Sprintf(format, args...))
		}
	}
	note(w.f.job != "", "a job")
	for name := range w.f.cps {
		note(name != run1 && (name != run2 || !w.kept), "checkpoint %s", name)
	}
	for flags, m := range w.f.meta {
		for _, what := range []string{"<started", "<freeze", "<snapshot"} {
			note(!w.f.gone && strings.Contains(m, what) && (flags == affectConfig || active(w.f.state0)), "note %s in %d", what, flags)
		}
	}
	for _, dir := range []string{w.dir, w.d.cfg.ScratchDir} {
		entries, err := os.ReadDir(dir)
		note(err != nil, "%v", err)
		for _, e := range entries {
			note(w.f.gone || dir != w.dir, "file %s", e.Name())
		}
	}
	status, err := w.f.agentReply("guest-fsfreeze-status")
	note(err != nil || !strings.Contains(status, "thawed"), "guest is frozen")
	note(!w.f.gone && w.state == stateShutoff && active(w.f.state0) && w.f.meta[affectConfig] == "", "the domain runs")
	note(!w.f.gone && strings.Contains(w.f.meta[affectConfig], "incomplete="), "an incomplete domain")
	note(w.open != 0, "%d attachments are open", w.open)
	note(w.files.opened.Load() != 0, "%d files are open", w.files.opened.Load())
	return out
}

// recover does what "holdfast recover" does: nothing is known but what is found.
func (w *faultWorld) recover() {
	w.t.Helper()
	w.reconnect()
	if w.f.gone {
		return
	}
	require.NoError(w.t, w.d.Thaw(w.ctx, vmID))
	var refs []hypervisor.SnapshotRef
	for ref, err := range w.d.Snapshots(w.ctx, vmID) {
		require.NoError(w.t, err)
		refs = append(refs, ref)
	}
	for _, ref := range refs {
		s, err := w.d.OpenSnapshot(w.ctx, ref)
		require.NoError(w.t, err)
		require.NoError(w.t, s.Release(w.ctx, nil))
	}
	var list []hypervisor.Baseline
	for b, err := range w.d.Baselines(w.ctx, vmID) {
		require.NoError(w.t, err)
		list = append(list, b)
	}
	for _, b := range list {
		if b.Name != run1 && !w.kept {
			require.NoError(w.t, w.d.ForgetBaseline(w.ctx, b))
		}
	}
	vms := map[hypervisor.VMID]bool{}
	for vm, err := range w.d.VMs(w.ctx, hypervisor.Query{Owner: "holdfast-"}) {
		require.NoError(w.t, err)
		vms[vm.ID] = vm.Incomplete
	}
	for id, incomplete := range vms {
		if incomplete {
			require.NoError(w.t, w.d.DeleteVM(w.ctx, id))
		}
	}
}

// backup makes a snapshot, looks at it and releases it.
func (w *faultWorld) backup(ctx context.Context, opts hypervisor.SnapshotOptions, keep ...hypervisor.DiskID) error {
	opts.Name = run2
	s, err := w.d.CreateSnapshot(ctx, vmID, &opts)
	if err != nil {
		return err
	}
	w.kept = len(keep) > 0
	if got := s.Consistency(); got.Level < opts.MinConsistency || got.ThawPending {
		w.wrong("consistency %+v", got)
	}
	return w.release(ctx, s, keep)
}

// release releases a snapshot; when that fails, once more.
func (w *faultWorld) release(ctx context.Context, s hypervisor.Snapshot, keep []hypervisor.DiskID) error {
	err := s.Release(ctx, keep)
	if err != nil {
		if again := s.Release(w.ctx, keep); again != nil {
			w.wrong("the second Release: %v", again)
		}
	}
	return err
}

// keepsBaselines makes run1 and keeps the baselines of both disks.
func keepsBaselines(w *faultWorld) {
	s, err := w.d.CreateSnapshot(w.ctx, vmID, &hypervisor.SnapshotOptions{Name: run1})
	require.NoError(w.t, err)
	for _, disk := range []hypervisor.DiskID{"vda", "vdb"} {
		b, err := s.Baseline(disk)
		require.NoError(w.t, err)
		w.base = append(w.base, b)
	}
	require.NoError(w.t, s.Release(w.ctx, []hypervisor.DiskID{"vda", "vdb"}))
}

func off(reason int) func(*faultWorld) {
	return func(w *faultWorld) { w.f.state0, w.f.reason = stateShutoff, reason }
}

// collect drains an iterator.
func collect[T any](seq func(func(T, error) bool)) (out []T, err error) {
	for v, e := range seq {
		if e != nil {
			return out, e
		}
		out = append(out, v)
	}
	return out, nil
}

// expect is an error unless the lengths are equal.
func expect(what string, got, want int) error {
	if got != want {
		return fmt.Errorf("%d %s, not %d", got, what, want)
	}
	return nil
}

// settles runs one operation in a world in which the k-th call fails. It returns what
// failed, "" when the operation made fewer calls.
func settles(t *testing.T, op *faultOp, k int, h how) string {
	t.Helper()
	w := newFaultWorld(t, op.setUp)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w.conn.f.arm(k, h, cancel)
	err := op.run(ctx, w)
	what := w.conn.f.disarm()
	where := fmt.Sprintf("%s: call %d (%s) %s: %v", op.name, k, what, h, err)
	require.Empty(t, w.bad, where)
	if what == "" {
		require.NoError(t, err, where)
		if !op.partial {
			require.Empty(t, w.leftovers(), where)
		}
	} else {
		want := errPlanted
		if h == canceled {
			want = context.Canceled
		}
		if err != nil || !op.tolerates(what, h) {
			require.ErrorIs(t, err, want, where)
		}
		if (h != after || op.undone) && !op.partial && !strings.HasPrefix(what, "stop: ") {
			require.Empty(t, w.leftovers(), "%s: left behind", where)
		}
	}
	require.NoError(t, w.d.Close(), where)
	require.Zero(t, w.conn.f.unfinished(ctx, w.ctx), "%s: contexts are not ended", where)
	require.Equal(t, 1, w.conn.closed, where)
	require.Zero(t, w.files.opened.Load(), "%s: open files", where)
	if what == "" {
		return ""
	}
	w.conn.closed = 0
	w.recover()
	if !op.partial {
		require.Empty(t, w.leftovers(), "%s: after recovery", where)
	}
	if err := op.run(w.ctx, w); err != nil && !op.once {
		require.NoError(t, err, "%s: the second attempt", where)
	}
	require.Empty(t, w.bad, where)
	require.NoError(t, w.d.Close())
	return what
}

// tolerates reports whether a failed call may leave the operation a success.
func (op *faultOp) tolerates(what string, h how) bool {
	for prefix := range op.tolerated {
		if strings.HasPrefix(what, prefix) {
			return true
		}
	}
	return h == canceled && strings.Contains(what, onFile) // may be too late to be seen
}

var errUnexpected = errors.New("unexpected")
