package kopiarepo_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
)

var errInjected = errors.New("injected")

// fault fails storage operation k, counted from when it is armed, before or after
// its effect; crash lets nothing through from then on.
type fault struct {
	armed        atomic.Bool
	n            atomic.Int64
	k            int64
	after, crash bool
	err          error
	hit          atomic.Bool
	kind         atomic.Value
}

func (f *fault) hook(_ context.Context, op kopiarepo.StorageOp) (func(error) error, error) {
	if !f.armed.Load() {
		return nil, nil
	}
	n := f.n.Add(1)
	if n < f.k || n > f.k && !f.crash {
		return nil, nil
	}
	if n == f.k {
		f.hit.Store(true)
		f.kind.Store(fmt.Sprintf("%s %s", op.Kind, op.Name))
		if f.after {
			return func(err error) error { return errors.Join(err, f.err) }, nil
		}
	}
	return nil, f.err
}

// TestEveryStorageOperationMayFail fails each storage operation of one incremental
// backup, before and after its effect, and crashes there. Afterwards, in another
// process, the point is there and complete, or absent, and the parent is intact.
func TestEveryStorageOperationMayFail(t *testing.T) {
	ctx := context.Background()
	rnd := seed(t)
	base := t.TempDir() + "/base"
	m := newImage(40*mib+123, mib)
	for range 12 {
		m.fill(rnd, rnd.Int64N(m.count()))
	}
	r := create(t, config(base))
	proof, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{chain: "vm", run: "r1"})
	require.NoError(t, err)
	parent := proof.Point().ID
	require.NoError(t, r.Close())
	next := m.clone()
	next.fill(rnd, 3)
	next.zero(7)

	outcomes := map[string]int{}
	step := int64(13) // a sample; HOLDFAST_FAULTS=all tries every operation
	if os.Getenv("HOLDFAST_FAULTS") == "all" {
		step = 1
	}
	for _, mode := range []struct {
		name         string
		after, crash bool
	}{{"before", false, false}, {"after", true, false}, {"crash", false, true}, {"crash after", true, true}} {
		for k := 1 + rnd.Int64N(step); ; k += step {
			dir := copyTree(t, base)
			f := &fault{k: k, after: mode.after, crash: mode.crash, err: errInjected}
			committed, err := attempt(ctx, dir, f, next, parent)
			if !f.hit.Load() {
				require.NoError(t, err)
				t.Logf("%s: %d operations", mode.name, k-1)
				break
			}
			what := fmt.Sprintf("%s %d, %v", mode.name, k, f.kind.Load())
			outcome := settle(ctx, t, dir, what, committed, err, map[string]*image{"d": m}, map[string]*image{"d": next}, parent)
			outcomes[mode.name+": "+outcome]++
			require.NoError(t, os.RemoveAll(dir))
		}
	}
	t.Log(outcomes)
}

// attempt makes one incremental backup with a fault.
func attempt(ctx context.Context, dir string, f *fault, m *image, parent repository.PointID) (bool, error) {
	cfg := config(dir)
	cfg.StorageHook = f.hook
	r, err := kopiarepo.Open(ctx, cfg)
	if err != nil {
		return false, err
	}
	defer r.Close()
	if err := warm(ctx, r, parent); err != nil {
		return false, err
	}
	f.armed.Store(true)
	_, err = backup(ctx, r, map[string]*image{"d": m}, backupOptions{
		chain: "vm", run: "r2", parent: parent, changed: map[string][]int64{"d": {3, 7}},
	})
	return err == nil, err
}

// warm opens the storage engine.
func warm(ctx context.Context, r repository.Repository, id repository.PointID) error {
	rd, err := r.Open(ctx, id)
	if err != nil {
		return err
	}
	return rd.Close()
}

// settle checks what a later process finds.
func settle(ctx context.Context, t *testing.T, dir, what string, committed bool, err error,
	before, after map[string]*image, parent repository.PointID,
) string {
	t.Helper()
	r, oerr := kopiarepo.Open(ctx, config(dir))
	require.NoError(t, oerr, what)
	defer func() { require.NoError(t, r.Close()) }()
	require.NoError(t, compare(ctx, r, parent, before), what)
	list := points(t, r, repository.Query{Run: "r2"})
	outcome := "absent"
	switch {
	case len(list) == 1:
		require.Equal(t, repository.Committed, list[0].State, what)
		require.NoError(t, compare(ctx, r, list[0].ID, after), what)
		outcome = "complete"
		require.True(t, committed || errors.Is(err, repository.ErrOutcomeUnknown),
			"%s: the point exists, but the commit said %v", what, err)
	case committed:
		require.Fail(t, "a committed point is not there", what)
	}
	rep, verr := r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyRecords})
	require.NoError(t, verr, what)
	require.Empty(t, rep.Damages, "%s: a crash is not damage", what)
	if outcome == "absent" {
		_, err := backup(ctx, r, after, backupOptions{
			chain: "vm", run: "r2", parent: parent, changed: map[string][]int64{"d": {3, 7}},
		})
		require.NoError(t, err, "%s: the next run", what)
	}
	return outcome
}

func TestFullDiskAndReadOnlyAreTold(t *testing.T) {
	ctx := context.Background()
	rnd := seed(t)
	base := t.TempDir() + "/base"
	require.NoError(t, create(t, config(base)).Close())
	m := newImage(10*mib, mib)
	for i := range m.count() {
		m.fill(rnd, i)
	}
	for _, c := range []struct {
		err  error
		want error
	}{{syscall.ENOSPC, repository.ErrNoSpace}, {syscall.EROFS, repository.ErrReadOnly}, {syscall.EACCES, repository.ErrReadOnly}} {
		cfg := config(copyTree(t, base))
		var armed atomic.Bool
		cfg.StorageHook = func(_ context.Context, op kopiarepo.StorageOp) (func(error) error, error) {
			if armed.Load() && op.Kind.Writes() && op.Kind != kopiarepo.OpSync {
				return nil, c.err
			}
			return nil, nil
		}
		r := open(t, cfg)
		armed.Store(true)
		_, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{chain: "vm", run: "r1"})
		require.ErrorIs(t, err, c.want)
		require.Empty(t, points(t, r, repository.Query{}))
		require.ErrorIs(t, r.PutNote(ctx, "n", nil), c.want)
		_, err = r.Lock(ctx, "l", repository.LockOptions{})
		require.ErrorIs(t, err, c.want)
		armed.Store(false)
		_, err = backup(ctx, r, map[string]*image{"d": m}, backupOptions{chain: "vm", run: "r1"})
		require.NoError(t, err, "once there is room")
	}
}
