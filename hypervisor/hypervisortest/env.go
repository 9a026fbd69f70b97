package hypervisortest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// maxDisk bounds the disks that the suite is willing to hold in memory.
const maxDisk = 1 << 30

// env is what a check works with.
type env struct {
	T
	ctx    context.Context
	h      *Harness
	hv     hypervisor.Hypervisor
	caps   hypervisor.Capabilities
	sector int64
	hang   time.Duration // Harness.QuiesceTimeout
	seed   uint64
	rnd    *rand.Rand
	vm     *hypervisor.VM
	disks  []hypervisor.DiskID // snapshottable, and tracked if the platform tracks
	model  map[hypervisor.DiskID][]byte
	before []hypervisor.Baseline // baselines that were there at the start
	undo   []func()
	guest  bool // SetGuest was used
	names  int
}

func newEnv(ctx context.Context, t T, h *Harness) *env {
	t.Helper()
	e := &env{T: t, ctx: ctx, h: h, hv: h.Hypervisor, sector: h.Sector, model: map[hypervisor.DiskID][]byte{}}
	e.caps = h.Hypervisor.Info().Capabilities
	if e.sector <= 0 {
		e.sector = 512
	}
	if e.hang = h.QuiesceTimeout; e.hang <= 0 {
		e.hang = 2 * time.Second
	}
	e.seed = rand.Uint64()
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err, "HOLDFAST_SEED")
		e.seed = n
	}
	e.rnd = rand.New(rand.NewPCG(e.seed, 1))
	t.Logf("HOLDFAST_SEED=%d", e.seed)
	vm, err := e.hv.VM(ctx, h.VM)
	require.NoError(t, err)
	e.vm = vm
	odd := 0
	for _, d := range vm.Disks {
		if d.Snapshottable && (d.Tracking == hypervisor.TrackingBlocks || !e.caps.ChangeTracking) {
			require.LessOrEqual(t, d.Size, int64(maxDisk), "disk %s is too large for the suite", d.ID)
			e.disks = append(e.disks, d.ID)
			if d.Size%(1<<20) != 0 {
				odd++
			}
		}
	}
	require.GreaterOrEqual(t, odd, 2, "the harness needs two disks with sizes that are not multiples of 1 MiB")
	for b, err := range e.hv.Baselines(ctx, h.VM) {
		require.NoError(t, err)
		e.before = append(e.before, b)
	}
	return e
}

// later runs f at the end of the check, last one first.
func (e *env) later(f func()) { e.undo = append(e.undo, f) }

// finish undoes what the check made and then holds the driver to its promise
// that nothing else is there.
func (e *env) finish() {
	ctx := context.WithoutCancel(e.ctx)
	e.unwind()
	if e.guest {
		require.NoError(e, e.h.SetGuest(GuestWorks))
	}
	if e.Failed() {
		e.mopUp(ctx)
		return
	}
	for b, err := range e.hv.Baselines(ctx, e.h.VM) {
		require.NoError(e, err)
		if !slices.Contains(e.before, b) {
			require.NoError(e, e.hv.ForgetBaseline(ctx, b))
		}
	}
	require.Empty(e, e.snapshots(e.hv, e.h.VM), "snapshots at the end of the check")
	if e.h.Leftovers != nil {
		left, err := e.h.Leftovers()
		require.NoError(e, err)
		require.Empty(e, left, "left on the platform at the end of the check")
	}
	if e.h.Frozen != nil {
		frozen, err := e.h.Frozen()
		require.NoError(e, err)
		require.False(e, frozen, "the guest is frozen at the end of the check")
	}
}

// unwind runs all that later was given, also when one of them fails the check.
func (e *env) unwind() {
	if n := len(e.undo); n > 0 {
		f := e.undo[n-1]
		e.undo = e.undo[:n-1]
		defer e.unwind()
		f()
	}
}

// mopUp gives the checks that follow a chance; it judges nothing.
func (e *env) mopUp(ctx context.Context) {
	for ref, err := range e.hv.Snapshots(ctx, e.h.VM) {
		if err != nil {
			break
		}
		if s, err := e.hv.OpenSnapshot(ctx, ref); err == nil {
			_ = s.Release(ctx, nil) // the check has failed already
		}
	}
}

// need skips the check when something is not there.
func (e *env) need(have bool, what string) {
	e.Helper()
	if !have {
		e.Skipf("needs %s", what)
	}
}

// name returns an owner name that was not used before.
func (e *env) name(kind string) string {
	e.names++
	return hypervisor.Name{Repo: "c0ffee00", Run: fmt.Sprintf("%016xn%d", e.seed, e.names), Kind: kind}.String()
}

// fails requires that err is there, is typed as the contract says, and matches
// one of conds; none means any.
func (e *env) fails(err error, conds ...error) {
	e.Helper()
	require.Error(e, err)
	var typed *hypervisor.Error
	if !errors.As(err, &typed) && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		require.Failf(e, "error is not typed", "want *hypervisor.Error, got %T: %v", err, err)
	}
	for _, c := range conds {
		if errors.Is(err, c) {
			return
		}
	}
	if len(conds) > 0 {
		require.Failf(e, "wrong condition", "want one of %v, got: %v", conds, err)
	}
}

// snapshot makes one of the VM and releases it at the end of the check.
func (e *env) snapshot(opts *hypervisor.SnapshotOptions) hypervisor.Snapshot {
	e.Helper()
	s, err := e.hv.CreateSnapshot(e.ctx, e.h.VM, opts)
	require.NoError(e, err)
	require.NotNil(e, s)
	e.releaseLater(s)
	return s
}

func (e *env) releaseLater(s hypervisor.Snapshot) {
	e.later(func() {
		if err := s.Release(context.WithoutCancel(e.ctx), nil); err != nil {
			e.Errorf("release at the end of the check: %v", err)
		}
	})
}

func (e *env) release(s hypervisor.Snapshot, keep ...hypervisor.DiskID) {
	e.Helper()
	require.NoError(e, s.Release(e.ctx, keep))
}

// baseline makes a snapshot and releases it, and returns its baselines of all
// disks, which are kept.
func (e *env) baseline() map[hypervisor.DiskID]hypervisor.Baseline {
	e.Helper()
	s := e.snapshot(nil)
	out := e.baselinesOf(s)
	e.release(s, e.disks...)
	return out
}

func (e *env) baselinesOf(s hypervisor.Snapshot) map[hypervisor.DiskID]hypervisor.Baseline {
	e.Helper()
	out := map[hypervisor.DiskID]hypervisor.Baseline{}
	for _, d := range e.disks {
		b, err := s.Baseline(d)
		require.NoError(e, err)
		out[d] = b
	}
	return out
}

// snapshots collects what is listed for a VM.
func (e *env) snapshots(hv hypervisor.Hypervisor, vm hypervisor.VMID) []hypervisor.SnapshotRef {
	e.Helper()
	var refs []hypervisor.SnapshotRef
	for ref, err := range hv.Snapshots(context.WithoutCancel(e.ctx), vm) {
		require.NoError(e, err)
		refs = append(refs, ref)
	}
	return refs
}

// kept collects the listed baselines that were not there at the start.
func (e *env) kept() []hypervisor.Baseline {
	e.Helper()
	var list []hypervisor.Baseline
	for b, err := range e.hv.Baselines(e.ctx, e.h.VM) {
		require.NoError(e, err)
		if !slices.Contains(e.before, b) {
			list = append(list, b)
		}
	}
	return list
}

// reconnect opens another connection that is closed at the end of the check.
func (e *env) reconnect() hypervisor.Hypervisor {
	e.Helper()
	e.need(e.h.Reconnect != nil, "Harness.Reconnect")
	hv, err := e.h.Reconnect()
	require.NoError(e, err)
	e.later(func() { require.NoError(e, hv.Close()) })
	return hv
}

func (e *env) size(disk hypervisor.DiskID) int64 {
	e.Helper()
	d := e.vm.Disk(disk)
	require.NotNil(e, d)
	return d.Size
}

// content returns what the disk holds as far as the suite knows. The caller
// must not change it.
func (e *env) content(disk hypervisor.DiskID) []byte {
	e.Helper()
	if p, ok := e.model[disk]; ok {
		return p
	}
	p := make([]byte, e.size(disk))
	if e.h.Truth != nil {
		r, err := e.h.Truth(disk)
		require.NoError(e, err)
		n, err := r.ReadAt(p, 0)
		if !errors.Is(err, io.EOF) {
			require.NoError(e, err)
		}
		require.Equal(e, len(p), n, "bytes of the truth about disk %s", disk)
	} else {
		s := e.snapshot(nil)
		p = e.readAll(s, disk)
		e.release(s)
	}
	e.model[disk] = p
	return p
}

// frozen returns a copy of the content, to compare a snapshot with.
func (e *env) frozen(disk hypervisor.DiskID) []byte {
	e.Helper()
	return bytes.Clone(e.content(disk))
}

// write is a guest write.
func (e *env) write(disk hypervisor.DiskID, off int64, p []byte) {
	e.Helper()
	model := e.content(disk)
	require.NoError(e, e.h.GuestWrite(disk, p, off))
	copy(model[off:], p)
}

// clear is a guest discard or a guest write of zeros.
func (e *env) clear(op func(hypervisor.DiskID, int64, int64) error, disk hypervisor.DiskID, off, n int64) {
	e.Helper()
	model := e.content(disk)
	require.NoError(e, op(disk, off, n))
	if e.h.Truth == nil {
		clear(model[off : off+n])
		return
	}
	r, err := e.h.Truth(disk)
	require.NoError(e, err)
	if _, err := r.ReadAt(model[off:off+n], off); !errors.Is(err, io.EOF) {
		require.NoError(e, err)
	}
}

// random returns n bytes that do not occur by chance.
func (e *env) random(n int64) []byte {
	p := make([]byte, 0, n+8)
	for int64(len(p)) < n {
		p = binary.LittleEndian.AppendUint64(p, e.rnd.Uint64())
	}
	return p[:n:n]
}

// place returns a random range of whole sectors, of at most most bytes.
func (e *env) place(disk hypervisor.DiskID, most int64) (off, n int64) {
	sectors := e.size(disk) / e.sector
	count := 1 + e.rnd.Int64N(max(1, min(most/e.sector, sectors)))
	return e.rnd.Int64N(sectors-count+1) * e.sector, count * e.sector
}

// same fails at the first byte in which two contents differ.
func (e *env) same(want, got []byte, what string) {
	e.Helper()
	if bytes.Equal(want, got) {
		return
	}
	n := 0
	for n < min(len(want), len(got)) && want[n] == got[n] {
		n++
	}
	at := func(p []byte) string {
		if n < len(p) {
			return fmt.Sprintf("%#x", p[n])
		}
		return "nothing"
	}
	e.Errorf("%s: %d bytes wanted, %d got; first difference at %d: want %s, got %s (seed %d)",
		what, len(want), len(got), n, at(want), at(got), e.seed)
	e.FailNow()
}
