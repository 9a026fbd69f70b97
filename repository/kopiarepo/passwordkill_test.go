package kopiarepo_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/tally"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
	"github.com/holdfast-backup/holdfast/secret"
)

// recorder keeps the state of a repository before each storage operation that
// changes something, as a kill there leaves it.
type recorder struct {
	t   *testing.T
	dir string

	mu     sync.Mutex
	on     bool
	states []recorded
}

type recorded struct {
	op   kopiarepo.StorageOp
	tree map[string]string
}

func (r *recorder) hook(_ context.Context, op kopiarepo.StorageOp) (func(error) error, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.on && op.Kind.Writes() {
		r.states = append(r.states, recorded{op, contents(r.t, r.dir)})
	}
	return nil, nil
}

// crashes returns the states that a kill or a power cut may leave: before each
// operation, and of names that were not yet synced any one lost.
func (r *recorder) crashes() map[string]map[string]string {
	out := map[string]map[string]string{}
	last := contents(r.t, r.dir)
	synced := 0 // index of the state after the newest sync
	for i, s := range r.states {
		out[fmt.Sprintf("%02d before %s %s", i, s.op.Kind, s.op.Name)] = s.tree
		after := last
		if i+1 < len(r.states) {
			after = r.states[i+1].tree
		}
		if s.op.Kind == kopiarepo.OpSync || s.op.Kind == kopiarepo.OpCreate {
			synced = i + 1
			continue
		}
		for j := synced; j < i; j++ { // the effect of j is lost, that of i is not
			lost := map[string]string{}
			for name, b := range after {
				lost[name] = b
			}
			name := r.states[j].op.Name
			if b, ok := r.states[j].tree[name]; ok {
				lost[name] = b
			} else {
				delete(lost, name)
			}
			out[fmt.Sprintf("%02d done, %02d %s %s lost", i, j, r.states[j].op.Kind, name)] = lost
		}
	}
	out["99 at the end"] = last
	return out
}

// lay writes a state into a new directory.
func lay(t *testing.T, tree map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "repo")
	for name, b := range tree {
		file := filepath.Join(dir, filepath.FromSlash(name))
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o700))
		require.NoError(t, os.WriteFile(file, []byte(b), 0o600))
	}
	return dir
}

// portion says which of the cases of a test are tried: all of this shard with
// HOLDFAST_FAULTS=all, else one of every n from a random one on, where n is few at
// night and many by day.
type portion struct {
	t                       *testing.T
	first, step             int
	index, of, tried, cases int
}

func newPortion(t *testing.T, few, many int) *portion {
	p := &portion{t: t, step: many}
	p.index, p.of = tally.Shard(t)
	switch {
	case os.Getenv("HOLDFAST_FAULTS") == "all":
		p.step = 1
	case os.Getenv("HOLDFAST_NIGHTLY") != "":
		p.step, p.of = few, 1
	default:
		p.of = 1
	}
	p.first = seed(t).IntN(p.step)
	return p
}

// next reports whether the next case is tried.
func (p *portion) next() bool {
	i := p.cases
	p.cases++
	if i%p.step != p.first || i/p.step%p.of != p.index%p.of {
		return false
	}
	p.tried++
	return true
}

// record tells what was tried, if that was all.
func (p *portion) record(name, what string) {
	p.t.Logf("%d of %d %s", p.tried, p.cases, what)
	if os.Getenv("HOLDFAST_FAULTS") == "all" && !p.t.Failed() {
		tally.Record(p.t, tally.Campaign{
			Name:    name,
			Command: "HOLDFAST_NIGHTLY=1 HOLDFAST_FAULTS=all go test -run '^" + p.t.Name() + "$' ./repository/kopiarepo",
			Counts:  []tally.Count{{Name: what, Value: int64(p.tried)}},
		})
	}
}

// TestPasswordChangeIsKilledAnywhere changes the password once and looks at every
// state on the way: the old password or the new one gives the bytes back, stock
// kopia opens with one of them, no password is called wrong that is not, and
// afterwards any of three ways makes all of it one password's again.
func TestPasswordChangeIsKilledAnywhere(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	m, id := small(t, dir)
	rec := &recorder{t: t, dir: dir}
	cfg := config(dir)
	cfg.StorageHook = rec.hook
	r := open(t, cfg)
	lock, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{})
	require.NoError(t, err)
	rec.on = true
	_, err = r.ChangePassword(ctx, lock, secret.New(newPassword))
	require.NoError(t, err)
	rec.on = false
	require.NoError(t, lock.Release(ctx))
	require.GreaterOrEqual(t, len(rec.states), 20, "changing operations")

	all := rec.crashes()
	p := newPortion(t, 1, 3)
	outcomes := map[string]int{}
	for i, what := range sortedNames(all) {
		if !p.next() {
			continue
		}
		dir := lay(t, all[what])
		was, is := works(t, what, dir, password, m, id), works(t, what, dir, newPassword, m, id)
		require.True(t, was || is, "%s: neither password works", what)
		stockWas, stockIs := kopiarepo.StockOpens(ctx, dir, secret.New(password)), kopiarepo.StockOpens(ctx, dir, secret.New(newPassword))
		require.True(t, stockWas != stockIs, "%s: stock kopia opens with the old password: %v, with the new one: %v", what, stockWas, stockIs)
		outcomes[fmt.Sprintf("old %v new %v", was, is)]++
		use, other := password, newPassword
		if is && (!was || i%2 == 0) {
			use, other = newPassword, password
		}
		mend(t, what, i, dir, use, other, m, id)
	}
	t.Log(outcomes)
	p.record("password-kills", "states that a kill or a power cut may leave")
}

// mend lets one of three ways make a repository whole.
func mend(t *testing.T, what string, way int, dir, use, other string, m *image, id repository.PointID) {
	t.Helper()
	ctx := context.Background()
	noticed := len(kopiarepo.FilesOpenedBy(ctx, dir, secret.New(other))) > 0
	r, err := kopiarepo.Open(ctx, with(config(dir), use))
	require.NoError(t, err, what)
	rep, err := r.Verify(ctx, nil)
	require.NoError(t, err, what)
	require.True(t, !noticed || len(rep.Damages) > 0, "%s: verify saw nothing", what)
	for _, d := range rep.Damages {
		require.True(t, d.Repairable, "%s: %v", what, d)
	}
	require.NoError(t, r.Close())
	switch way % 3 {
	case 0:
		_, err := changePassword(ctx, with(config(dir), use), use)
		require.NoError(t, err, what)
	case 1:
		to := filepath.Join(t.TempDir(), "repaired")
		rep, err := kopiarepo.Repair(ctx, with(config(dir), use), to)
		require.NoError(t, err, what)
		require.Empty(t, rep.Verify.Damages, what)
		dir = to
	default:
		r, err := kopiarepo.Open(ctx, with(config(dir), use))
		require.NoError(t, err, what)
		lock, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{Takeover: func(string) bool { return true }})
		require.NoError(t, err, what)
		_, err = r.Maintain(ctx, lock, &repository.MaintainOptions{Full: true})
		require.NoError(t, err, what)
		require.NoError(t, r.Close())
		if len(kopiarepo.FilesOpenedBy(ctx, dir, secret.New(other))) > 0 {
			// Maintenance leaves what lies in place; it is noticed, see above.
			_, err := changePassword(ctx, with(config(dir), use), use)
			require.NoError(t, err, what)
		}
	}
	whole(t, what+", mended", dir, use, other, m, id)
}

// TestPasswordChangeMeetsFaults fails single storage operations, before and after
// their effect, and from one on all of them.
func TestPasswordChangeMeetsFaults(t *testing.T) {
	ctx := context.Background()
	base := filepath.Join(t.TempDir(), "base")
	m, id := small(t, base)
	try := func(f *fault) (dir string, err error) {
		dir = copyTree(t, base)
		f.err = errInjected
		f.armed.Store(true)
		cfg := config(dir)
		cfg.StorageHook = f.hook
		_, err = changePassword(ctx, cfg, newPassword)
		return dir, err
	}
	none := &fault{k: math.MaxInt64}
	_, err := try(none)
	require.NoError(t, err)
	operations := none.n.Load()
	require.Greater(t, operations, int64(70))
	p := newPortion(t, 1, 86)
	outcomes := map[string]int{}
	for _, mode := range []struct {
		name         string
		after, crash bool
	}{{"before", false, false}, {"after", true, false}, {"crash", false, true}, {"crash after", true, true}} {
		for k := int64(1); k <= operations; k++ {
			if !p.next() {
				continue
			}
			f := &fault{k: k, after: mode.after, crash: mode.crash}
			dir, err := try(f)
			if !f.hit.Load() { // the number differs by one or two from run to run
				require.NoError(t, err)
				p.tried--
				continue
			}
			what := fmt.Sprintf("%s %d, %v: %v", mode.name, k, f.kind.Load(), err)
			was, is := works(t, what, dir, password, m, id), works(t, what, dir, newPassword, m, id)
			switch {
			case err == nil:
				require.True(t, is && !was, what)
				whole(t, what, dir, newPassword, password, m, id)
				outcomes[mode.name+": changed"]++
			case !errors.Is(err, repository.ErrOutcomeUnknown):
				require.True(t, was && !is, what)
				whole(t, what, dir, password, newPassword, m, id)
				outcomes[mode.name+": not changed"]++
			default:
				require.True(t, was || is, what)
				require.True(t, mode.crash, "%s: a single fault is undone or overcome", what)
				use, other := password, newPassword
				if !was {
					use, other = newPassword, password
				}
				mend(t, what, int(k), dir, use, other, m, id)
				outcomes[mode.name+": unknown"]++
			}
			require.NoError(t, os.RemoveAll(dir))
		}
	}
	t.Log(outcomes)
	p.record("password-faults", "storage operations that fail, or after which all fail")
}

const killEnv = "HOLDFAST_TEST_PASSWORD_KILL" // directory, then a colon and the operation

// TestPasswordChangeProcessIsKilled ends a real process by SIGKILL.
func TestPasswordChangeProcessIsKilled(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("windows: processes are killed by signals")
	}
	if v := os.Getenv(killEnv); v != "" {
		killedChange(t, v)
		return
	}
	base := filepath.Join(t.TempDir(), "base")
	m, id := small(t, base)
	rnd := seed(t)
	exe, err := os.Executable()
	require.NoError(t, err)
	times := 1
	if os.Getenv("HOLDFAST_NIGHTLY") != "" {
		times = 18
	}
	for range times {
		k := 2 + rnd.IntN(18)
		dir := copyTree(t, base)
		cmd := exec.Command(exe, "-test.run", "^TestPasswordChangeProcessIsKilled$")
		cmd.Env = append(os.Environ(), killEnv+"="+strconv.Itoa(k)+":"+dir)
		out, err := cmd.CombinedOutput()
		var ended *exec.ExitError
		require.ErrorAs(t, err, &ended, "%d: it was to be killed: %s", k, out)
		require.False(t, ended.Exited(), "%d: %s", k, out)
		what := fmt.Sprintf("killed at change %d", k)
		was, is := works(t, what, dir, password, m, id), works(t, what, dir, newPassword, m, id)
		require.True(t, was || is, what)
		use, other := password, newPassword
		if is {
			use, other = newPassword, password
		}
		mend(t, what, k, dir, use, other, m, id)
	}
}

// killedChange changes a password and kills its own process at operation k of
// those that change something.
func killedChange(t *testing.T, v string) {
	var k int
	var dir string
	_, err := fmt.Sscanf(v, "%d:%s", &k, &dir)
	require.NoError(t, err)
	self, err := os.FindProcess(os.Getpid())
	require.NoError(t, err)
	cfg := config(dir)
	n := 0
	var mu sync.Mutex
	cfg.StorageHook = func(_ context.Context, op kopiarepo.StorageOp) (func(error) error, error) {
		mu.Lock()
		defer mu.Unlock()
		if !op.Kind.Writes() {
			return nil, nil
		}
		if n++; n == k {
			if err := self.Kill(); err != nil {
				panic(err)
			}
			select {}
		}
		return nil, nil
	}
	_, err = changePassword(context.Background(), cfg, newPassword)
	require.NoError(t, err)
}
