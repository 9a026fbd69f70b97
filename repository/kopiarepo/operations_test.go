package kopiarepo_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/tally"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
)

// operation is something that callers ask of a repository. It prepares itself, arms
// the fault, and does it.
type operation struct {
	name string
	do   func(ctx context.Context, o *operated) error
	// holds checks, in another process, what a success promises.
	holds func(ctx context.Context, o *operated, r *kopiarepo.Repository) error
}

// operated is what an operation works on: two chains of two points, and a note.
type operated struct {
	dir   string
	cfg   kopiarepo.Config
	r     *kopiarepo.Repository
	fault *fault
	arm   func()
	ids   []repository.PointID
	truth []*image
}

func (o *operated) lock(ctx context.Context) (repository.Lock, error) {
	return o.r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{Holder: "test"})
}

var operations = []operation{
	{name: "list", do: func(ctx context.Context, o *operated) error {
		o.arm()
		return o.listed(ctx, o.r, len(o.ids))
	}},
	{name: "read", do: func(ctx context.Context, o *operated) error {
		o.arm()
		return compare(ctx, o.r, o.ids[1], map[string]*image{"d": o.truth[1]})
	}},
	{name: "read at", do: func(ctx context.Context, o *operated) error {
		o.arm()
		rd, err := o.r.Open(ctx, o.ids[0])
		if err != nil {
			return err
		}
		d, err := rd.Disk(ctx, "d")
		if err != nil {
			return errors.Join(err, rd.Close())
		}
		buf := make([]byte, 1000)
		if _, err := d.ReadAt(buf, 300); err != nil {
			return errors.Join(err, rd.Close())
		}
		if string(buf) != string(o.truth[0].at(0)[300:1300]) {
			return errors.New("wrong bytes")
		}
		return rd.Close()
	}},
	{name: "file", do: func(ctx context.Context, o *operated) error {
		o.arm()
		s := &shelf{points: o.ids}
		return s.compareFile(ctx, o.r, 0)
	}},
	{name: "put note", do: func(ctx context.Context, o *operated) error {
		o.arm()
		return o.r.PutNote(ctx, "open/other", []byte("value"))
	}, holds: func(ctx context.Context, _ *operated, r *kopiarepo.Repository) error {
		return noted(ctx, r, "open/other", "value")
	}},
	{name: "replace note", do: func(ctx context.Context, o *operated) error {
		o.arm()
		return o.r.PutNote(ctx, "open/run", []byte("other"))
	}, holds: func(ctx context.Context, _ *operated, r *kopiarepo.Repository) error {
		return noted(ctx, r, "open/run", "other")
	}},
	{name: "notes", do: func(ctx context.Context, o *operated) error {
		o.arm()
		return noted(ctx, o.r, "open/run", "thaw")
	}},
	{name: "delete note", do: func(ctx context.Context, o *operated) error {
		o.arm()
		return o.r.DeleteNote(ctx, "open/run")
	}, holds: func(ctx context.Context, _ *operated, r *kopiarepo.Repository) error {
		return noted(ctx, r, "open/run", "")
	}},
	{name: "lock", do: func(ctx context.Context, o *operated) error {
		o.arm()
		l, err := o.lock(ctx)
		if err != nil {
			return err
		}
		return errors.Join(l.Renew(ctx), l.Check(ctx))
	}, holds: func(ctx context.Context, _ *operated, r *kopiarepo.Repository) error {
		if _, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{}); !errors.Is(err, repository.ErrLocked) {
			return fmt.Errorf("the lease keeps nobody out: %w", err)
		}
		return nil
	}},
	{name: "release", do: func(ctx context.Context, o *operated) error {
		l, err := o.lock(ctx)
		if err != nil {
			return err
		}
		o.arm()
		return l.Release(ctx)
	}, holds: func(ctx context.Context, _ *operated, r *kopiarepo.Repository) error {
		_, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{})
		return err
	}},
	{name: "delete", do: func(ctx context.Context, o *operated) error {
		l, err := o.lock(ctx)
		if err != nil {
			return err
		}
		o.arm()
		return o.r.Delete(ctx, o.ids[0], l)
	}, holds: func(ctx context.Context, o *operated, r *kopiarepo.Repository) error {
		return o.listed(ctx, r, len(o.ids)-1)
	}},
	{name: "maintain", do: func(ctx context.Context, o *operated) error {
		l, err := o.lock(ctx)
		if err != nil {
			return err
		}
		if err := o.r.Delete(ctx, o.ids[0], l); err != nil {
			return err
		}
		o.arm()
		_, err = o.r.Maintain(ctx, l, &repository.MaintainOptions{Full: true})
		return err
	}, holds: func(ctx context.Context, o *operated, r *kopiarepo.Repository) error {
		return o.listed(ctx, r, len(o.ids)-1)
	}},
	{name: "verify", do: func(ctx context.Context, o *operated) error {
		o.arm()
		return verified(o.r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyBlobs}))
	}},
	{name: "verify data", do: func(ctx context.Context, o *operated) error {
		o.arm()
		return verified(o.r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData, Points: o.ids[:2]}))
	}},
	{name: "full backup", do: func(ctx context.Context, o *operated) error {
		o.arm()
		_, err := backup(ctx, o.r, map[string]*image{"d": o.truth[0]}, backupOptions{chain: "other", run: "new", files: map[string][]byte{"config": []byte("x")}})
		return err
	}, holds: func(ctx context.Context, o *operated, r *kopiarepo.Repository) error {
		return o.stored(ctx, r, o.truth[0])
	}},
	{name: "incremental backup", do: func(ctx context.Context, o *operated) error {
		l, err := o.r.Lock(ctx, "vm-0", repository.LockOptions{Holder: "test"})
		if err != nil {
			return err
		}
		o.arm()
		_, err = backup(ctx, o.r, map[string]*image{"d": o.truth[0]}, backupOptions{
			chain: "vm-0", run: "new", parent: o.ids[1], lock: l, changed: map[string][]int64{"d": {1}},
		})
		return err
	}, holds: func(ctx context.Context, o *operated, r *kopiarepo.Repository) error {
		return o.stored(ctx, r, o.truth[0])
	}},
	{name: "abort", do: func(ctx context.Context, o *operated) error {
		w, err := o.r.Begin(ctx, &repository.PointSpec{Chain: "other", Run: "new"})
		if err != nil {
			return err
		}
		o.arm()
		return w.Abort(ctx)
	}, holds: func(ctx context.Context, o *operated, r *kopiarepo.Repository) error {
		return o.listed(ctx, r, len(o.ids))
	}},
	{name: "open", do: func(ctx context.Context, o *operated) error {
		o.arm()
		r, err := kopiarepo.Open(ctx, o.cfg)
		if err != nil {
			return err
		}
		return errors.Join(o.listed(ctx, r, len(o.ids)), r.Close())
	}},
	{name: "repair", do: func(ctx context.Context, o *operated) error {
		o.arm()
		to := filepath.Join(filepath.Dir(o.dir), "repaired")
		rep, err := kopiarepo.Repair(ctx, o.cfg, to)
		if err == nil && len(rep.Damaged) > 0 {
			err = errInjected // it says so
		}
		return errors.Join(err, os.RemoveAll(to))
	}},
}

// listed says whether so many points are there, and all of them sound.
func (o *operated) listed(ctx context.Context, r *kopiarepo.Repository, want int) error {
	n := 0
	for p, err := range r.Points(ctx, repository.Query{}) {
		if err != nil {
			return err
		}
		if p.State != repository.Committed {
			return fmt.Errorf("point %s is %s: %s", p.ID, p.State, p.Detail)
		}
		n++
	}
	if n != want {
		return fmt.Errorf("%d points are listed, not %d", n, want)
	}
	return nil
}

// stored says whether the new point holds what it should.
func (o *operated) stored(ctx context.Context, r *kopiarepo.Repository, want *image) error {
	for p, err := range r.Points(ctx, repository.Query{Run: "new"}) {
		if err != nil {
			return err
		}
		return compare(ctx, r, p.ID, map[string]*image{"d": want})
	}
	return errors.New("the new point is not there")
}

// noted says whether a note has a value; empty: whether it is not there.
func noted(ctx context.Context, r *kopiarepo.Repository, name, want string) error {
	got := ""
	for n, err := range r.Notes(ctx, name) {
		if err != nil {
			return err
		}
		got = string(n.Value)
	}
	if got != want {
		return fmt.Errorf("note %s is %q, not %q", name, got, want)
	}
	return nil
}

// verified makes an error of a report that is not clean: a fault that is taken for
// damage is told, too.
func verified(rep *repository.VerifyReport, err error) error {
	if err == nil && len(rep.Damages) > 0 {
		return fmt.Errorf("%w: %v", errInjected, rep.Damages)
	}
	return err
}

// newOperated makes what operations work on.
func newOperated(ctx context.Context, t *testing.T) *operated {
	t.Helper()
	rnd := seed(t)
	o := &operated{dir: t.TempDir() + "/base"}
	r := create(t, config(o.dir))
	for c := range 2 {
		m := newImage(2*repository.LeafSize+700, repository.LeafSize)
		m.fill(rnd, 0)
		m.fill(rnd, 1)
		parent, changed := repository.PointID(""), []int64(nil)
		for k := range 2 {
			proof, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{
				chain: fmt.Sprintf("vm-%d", c), run: fmt.Sprintf("r%d", k), parent: parent, changed: map[string][]int64{"d": changed},
				files: map[string][]byte{"config": fmt.Appendf(nil, "config %d %d", c, k)},
			})
			require.NoError(t, err)
			parent = proof.Point().ID
			o.ids, o.truth = append(o.ids, parent), append(o.truth, m)
			m, changed = m.clone(), []int64{1}
			m.fill(rnd, 1)
		}
	}
	require.NoError(t, r.PutNote(ctx, "open/run", []byte("thaw")))
	require.NoError(t, r.Close())
	return o
}

// TestFaultsAreTold fails each storage operation of each operation, once and from then
// on: the caller hears of it, or what was promised holds for the next process; and the
// repository is sound. HOLDFAST_FAULTS=all tries all of them, the default is a sample.
func TestFaultsAreTold(t *testing.T) {
	ctx := context.Background()
	base := newOperated(ctx, t)
	stride := int64(97)
	if os.Getenv("HOLDFAST_FAULTS") == "all" {
		stride = 1
	}
	counts := make([]int, len(operations))
	t.Run("each", func(t *testing.T) {
		for i, op := range operations {
			t.Run(op.name, func(t *testing.T) {
				t.Parallel()
				rnd := seed(t)
				for _, crash := range []bool{false, true} {
					for k := 1 + rnd.Int64N(stride); ; k += stride {
						hit, err := operate(ctx, t, base, op, &fault{k: k, crash: crash, err: errInjected})
						require.NoError(t, err, "operation %d, and all after it: %v", k, crash)
						if !hit {
							require.Greater(t, k, int64(1))
							break
						}
						counts[i]++
					}
				}
			})
		}
	})
	total := 0
	for i, op := range operations {
		t.Logf("%-20s %d faults", op.name, counts[i])
		total += counts[i]
	}
	if stride == 1 && !t.Failed() {
		require.Greater(t, total, 500)
		tally.Record(t, tally.Campaign{
			Name:    "engine-faults",
			About:   "Each storage operation under each operation of the engine fails, once and from then on: the caller hears of it, or what it was promised holds.",
			Command: "HOLDFAST_FAULTS=all go test -run '^TestFaultsAreTold$' ./repository/kopiarepo",
			Counts:  []tally.Count{{Name: "faults", Value: int64(total)}},
		})
	}
}

// operate does an operation with a fault, and checks what is left of it.
func operate(ctx context.Context, t *testing.T, base *operated, op operation, f *fault) (hit bool, err error) {
	t.Helper()
	o := *base
	o.dir = copyTree(t, base.dir)
	defer func() { err = errors.Join(err, os.RemoveAll(filepath.Dir(o.dir))) }()
	o.cfg = config(o.dir)
	o.cfg.StorageHook, o.fault = f.hook, f
	if o.r, err = kopiarepo.Open(ctx, o.cfg); err != nil {
		return false, err
	}
	o.arm = func() { f.armed.Store(true) }
	told := op.do(ctx, &o)
	f.armed.Store(false)
	if err := o.r.Close(); err != nil && !errors.Is(err, errInjected) {
		return false, err
	}
	switch {
	case told != nil && (!f.hit.Load() || !strings.Contains(told.Error(), errInjected.Error())):
		return f.hit.Load(), fmt.Errorf("the cause is lost: %w", told)
	case told == nil && op.holds != nil:
		r, err := kopiarepo.Open(ctx, config(o.dir))
		if err != nil {
			return f.hit.Load(), err
		}
		if err := errors.Join(op.holds(ctx, &o, r), r.Close()); err != nil {
			return f.hit.Load(), fmt.Errorf("nobody heard of a fault at %v: %w", f.kind.Load(), err)
		}
	}
	r, err := kopiarepo.Open(ctx, config(o.dir))
	if err != nil {
		return f.hit.Load(), fmt.Errorf("the next process: %w", err)
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	for i, id := range o.ids {
		if i == 0 && (op.name == "delete" || op.name == "maintain") {
			continue
		}
		if err := compare(ctx, r, id, map[string]*image{"d": o.truth[i]}); err != nil {
			return f.hit.Load(), fmt.Errorf("point %d: %w", i, err)
		}
	}
	return f.hit.Load(), nil
}
