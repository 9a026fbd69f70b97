package fakes_test

import (
	"context"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

// contract lists the interfaces of package hypervisor with the prefix of their
// operations. TestFaultsKnowEveryInterface compares it with the source.
var contract = map[string]struct {
	prefix string
	t      reflect.Type
}{
	"Hypervisor": {"", reflect.TypeFor[hypervisor.Hypervisor]()},
	"Target":     {"", reflect.TypeFor[hypervisor.Target]()},
	"Thawer":     {"", reflect.TypeFor[hypervisor.Thawer]()},
	"Snapshot":   {"Snapshot.", reflect.TypeFor[hypervisor.Snapshot]()},
	"Streamer":   {"Snapshot.", reflect.TypeFor[hypervisor.Streamer]()},
	"DiskReader": {"DiskReader.", reflect.TypeFor[hypervisor.DiskReader]()},
	"HoleReader": {"DiskReader.", reflect.TypeFor[hypervisor.HoleReader]()},
	"DiskWriter": {"DiskWriter.", reflect.TypeFor[hypervisor.DiskWriter]()},
}

// accessors do no I/O and are not calls.
var accessors = []string{"Info", "Snapshot.Ref", "Snapshot.VM", "Snapshot.Consistency", "DiskReader.Size"}

func TestFaultsKnowEveryInterface(t *testing.T) {
	notTests := func(f fs.FileInfo) bool { return !strings.HasSuffix(f.Name(), "_test.go") }
	pkgs, err := parser.ParseDir(token.NewFileSet(), "../hypervisor", notTests, 0)
	require.NoError(t, err)
	var found []string
	for _, f := range pkgs["hypervisor"].Files {
		ast.Inspect(f, func(n ast.Node) bool {
			if ts, ok := n.(*ast.TypeSpec); ok && ts.Name.IsExported() {
				if _, ok := ts.Type.(*ast.InterfaceType); ok {
					found = append(found, ts.Name.Name)
				}
			}
			return true
		})
	}
	require.NotEmpty(t, found)
	for _, name := range found {
		require.Contains(t, contract, name, "WithFaults must wrap it, and this test must know it")
	}
	require.Len(t, contract, len(found))
}

// Wrapped values are exactly as able as what they wrap.
func TestFaultsKeepOptionalInterfaces(t *testing.T) {
	full := fakes.NewHypervisor(fakes.Options{})
	type justTarget struct{ hypervisor.Target }
	type justThawer struct {
		hypervisor.Hypervisor
		hypervisor.Thawer
	}
	for name, h := range map[string]hypervisor.Hypervisor{
		"both": full, "target": justTarget{full}, "thawer": justThawer{full, full},
		"neither": struct{ hypervisor.Hypervisor }{full},
	} {
		_, wantTarget := h.(hypervisor.Target)
		_, wantThawer := h.(hypervisor.Thawer)
		wrapped := fakes.WithFaults(h, fakes.NewScript())
		_, target := wrapped.(hypervisor.Target)
		_, thawer := wrapped.(hypervisor.Thawer)
		require.Equal(t, wantTarget, target, name)
		require.Equal(t, wantThawer, thawer, name)
	}
}

// fullCycle uses every method of the contract once at least.
func fullCycle(ctx context.Context, h hypervisor.Hypervisor, id hypervisor.VMID) (err error) {
	defer func() { err = errors.Join(err, h.Close()) }()
	if vm, err := hypervisor.Find(ctx, h, "web1"); err != nil {
		return err
	} else if err := readAttachments(ctx, vm); err != nil {
		return err
	}
	if _, err := h.VM(ctx, id); err != nil {
		return err
	}
	base, err := snapshotCycle(ctx, h, id, nil)
	if err != nil {
		return err
	}
	if _, err := snapshotCycle(ctx, h, id, base); err != nil {
		return err
	}
	for b, err := range h.Baselines(ctx, id) {
		if err == nil {
			err = h.ForgetBaseline(ctx, b)
		}
		if err != nil {
			return err
		}
	}
	if err := hypervisor.Thaw(ctx, h, id); err != nil {
		return err
	}
	return targetCycle(ctx, h.(hypervisor.Target))
}

func readAttachments(ctx context.Context, vm *hypervisor.VM) error {
	for _, a := range vm.Attachments {
		r, err := a.Open(ctx)
		if err != nil {
			return err
		}
		_, err = io.ReadAll(r)
		if err := errors.Join(err, r.Close()); err != nil {
			return err
		}
	}
	return nil
}

// snapshotCycle makes, reads and releases a snapshot, and keeps the baseline of
// disk0.
func snapshotCycle(ctx context.Context, h hypervisor.Hypervisor, id hypervisor.VMID, since *hypervisor.Baseline) (b *hypervisor.Baseline, err error) {
	opts := &hypervisor.SnapshotOptions{Quiesce: hypervisor.FilesystemConsistent}
	if since != nil {
		opts.Since = append(opts.Since, *since)
	}
	created, err := h.CreateSnapshot(ctx, id, opts)
	if err != nil {
		return nil, err
	}
	var keep []hypervisor.DiskID
	defer func() { err = errors.Join(err, created.Release(ctx, keep)) }()
	s, err := h.OpenSnapshot(ctx, created.Ref())
	if err != nil {
		return nil, err
	}
	for _, err := range h.Snapshots(ctx, id) {
		if err != nil {
			return nil, err
		}
	}
	err = hypervisor.Read(ctx, s, "disk0", since, func(hypervisor.Extent, []byte) error { return nil })
	if err != nil {
		return nil, err
	}
	if h.Info().Capabilities.RandomRead {
		r, err := s.OpenDisk(ctx, "disk1")
		if err != nil {
			return nil, err
		}
		p := make([]byte, 512)
		_, rerr := r.ReadAt(p, r.Size()-512)
		_, _, herr := r.(hypervisor.HoleReader).ReadHole(p, 0)
		if err := errors.Join(notEOF(rerr), notEOF(herr), r.Close()); err != nil {
			return nil, err
		}
	}
	baseline, err := s.Baseline("disk0")
	if err != nil {
		return nil, err
	}
	keep = append(keep, "disk0")
	return &baseline, nil
}

func notEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func targetCycle(ctx context.Context, h hypervisor.Target) (err error) {
	vm, err := h.CreateVM(ctx, &hypervisor.VMSpec{
		Name: "copy", Owner: "holdfast-00000000-run1-vm", Disks: []hypervisor.DiskSpec{{ID: "disk0", Size: mib}},
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.DeleteVM(ctx, vm.ID)) }()
	w, err := h.OpenDiskWriter(ctx, vm.ID, "disk0")
	if err != nil {
		return err
	}
	_, err = w.WriteAt([]byte("x"), 0)
	err = errors.Join(err, w.WriteZeroes(512, 512))
	if err == nil {
		err = w.Commit()
	}
	if err := errors.Join(err, w.Close()); err != nil {
		return err
	}
	r, err := h.OpenDisk(ctx, vm.ID, "disk0")
	if err != nil {
		return err
	}
	if err := r.Close(); err != nil {
		return err
	}
	if err := h.FinishVM(ctx, vm.ID); err != nil {
		return err
	}
	return h.SetPower(ctx, vm.ID, hypervisor.PowerOn)
}

func cyclePlatform(sequential bool) (*fakes.World, hypervisor.VMID) {
	w, id := twoDisks(fakes.Options{Sequential: sequential})
	_ = w.GuestWrite(id, "disk0", 3*mib, []byte("some"))
	return w, id
}

func TestFaultsNumberEveryMethod(t *testing.T) {
	seen := map[string]bool{}
	for _, sequential := range []bool{false, true} {
		w, id := cyclePlatform(sequential)
		script := fakes.NewScript()
		require.NoError(t, fullCycle(context.Background(), fakes.WithFaults(w.Connect(), script), id))
		for i, c := range script.Trace() {
			require.Equal(t, i+1, c.N)
			seen[string(c.Op)] = true
		}
		require.Empty(t, w.Leftovers())
	}
	for name, c := range contract {
		for i := range c.t.NumMethod() {
			op := c.prefix + c.t.Method(i).Name
			if !slices.Contains(accessors, op) {
				require.True(t, seen[op], "%s of %s is not numbered", op, name)
			}
		}
	}
}

// Each call of a cycle fails once, before and after its effect: the error
// surfaces, and what is left can be found and removed by another process.
func TestFaultsSurface(t *testing.T) {
	ctx := context.Background()
	for _, sequential := range []bool{false, true} {
		w, id := cyclePlatform(sequential)
		count := fakes.NewScript()
		require.NoError(t, fullCycle(ctx, fakes.WithFaults(w.Connect(), count), id))
		require.Greater(t, count.Count(), 40)
		for k := 1; k <= count.Count(); k++ {
			for _, mode := range []fakes.Mode{fakes.FailBefore, fakes.FailAfter} {
				w, id := cyclePlatform(sequential)
				script := fakes.NewScript(fakes.FailCall(k, mode))
				err := fullCycle(ctx, fakes.WithFaults(w.Connect(), script), id)
				c := script.Trace()[k-1]
				if c.Op == fakes.OpCloseReader && err == nil {
					continue // hypervisor.Read has all bytes by then
				}
				if c.Op == fakes.OpOpenDisk && sequential && mode == fakes.FailAfter {
					continue // it has no effect to fail after
				}
				require.ErrorIs(t, err, fakes.ErrInjected, "call %d %s mode %d", k, c.Op, mode)
				require.Equal(t, 1, script.Hits())
				var e *hypervisor.Error
				require.ErrorAs(t, err, &e)
				removeAll(t, w)
				require.Empty(t, w.Leftovers(), "call %d %s mode %d", k, c.Op, mode)
			}
		}
	}
}

// removeAll is a recovery in small: it knows nothing of what was going on.
func removeAll(t *testing.T, w *fakes.World) {
	t.Helper()
	ctx := context.Background()
	h := w.Connect()
	for vm, err := range h.VMs(ctx, hypervisor.Query{}) {
		require.NoError(t, err)
		require.NoError(t, h.Thaw(ctx, vm.ID))
		for ref, err := range h.Snapshots(ctx, vm.ID) {
			require.NoError(t, err)
			s, err := h.OpenSnapshot(ctx, ref)
			require.NoError(t, err)
			require.NoError(t, s.Release(ctx, nil))
		}
		for b, err := range h.Baselines(ctx, vm.ID) {
			require.NoError(t, err)
			require.NoError(t, h.ForgetBaseline(ctx, b))
		}
		if vm.Owner != "" {
			require.NoError(t, h.DeleteVM(ctx, vm.ID))
		}
	}
}

func TestFaultHangsUntilCancelled(t *testing.T) {
	w, id := twoDisks(fakes.Options{})
	ctx, cancel := context.WithCancel(context.Background())
	h := fakes.WithFaults(w.Connect(), fakes.NewScript(fakes.Rule{
		Match: fakes.Any(fakes.OpReadAt), Fault: fakes.Fault{Hang: true, Do: cancel},
	}))
	s, err := h.CreateSnapshot(ctx, id, nil)
	require.NoError(t, err)
	r, err := s.OpenDisk(ctx, "disk0")
	require.NoError(t, err)
	_, err = r.ReadAt(make([]byte, 1), 0)
	require.ErrorIs(t, err, context.Canceled)
	require.NoError(t, s.Release(context.WithoutCancel(ctx), nil))
}

func TestFaultDelaysOnTheClock(t *testing.T) {
	ctx := context.Background()
	clk := fakes.NewClock(time.Unix(0, 0))
	w, id := twoDisks(fakes.Options{})
	h := fakes.WithFaults(w.Connect(), fakes.NewScript(fakes.Rule{
		Match: fakes.Any(fakes.OpVM), Fault: fakes.Fault{Delay: time.Hour, Clock: clk},
	}))
	done := make(chan error, 1)
	go func() {
		_, err := h.VM(ctx, id)
		done <- err
	}()
	require.NoError(t, clk.WaitTimers(ctx, 1))
	require.Empty(t, done)
	clk.Advance(time.Hour)
	require.NoError(t, <-done)
}

func TestFaultShortRead(t *testing.T) {
	ctx := context.Background()
	w, id := twoDisks(fakes.Options{})
	require.NoError(t, w.GuestWrite(id, "disk0", 0, []byte("12345678")))
	h := fakes.WithFaults(w.Connect(), fakes.NewScript(fakes.Rule{
		Match: fakes.Any(fakes.OpReadAt), Fault: fakes.Fault{Short: true},
	}))
	s, err := h.CreateSnapshot(ctx, id, nil)
	require.NoError(t, err)
	r, err := s.OpenDisk(ctx, "disk0")
	require.NoError(t, err)
	p := make([]byte, 8)
	n, err := r.ReadAt(p, 0)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.Equal(t, "1234", string(p[:n]))
	require.NoError(t, s.Release(ctx, nil))
}
