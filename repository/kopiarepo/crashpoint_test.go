package kopiarepo_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/tally"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
)

// tape keeps what a kill before each changing storage operation would leave.
type tape struct {
	dir string

	mu      sync.Mutex
	on      bool
	moments []moment
	err     error
}

type moment struct {
	op    kopiarepo.StorageOp
	files files
}

// files is the content of a directory; those of one tape share what did not change.
type files map[string]*filed

type filed struct {
	data []byte
	info fs.FileInfo
}

func (p *tape) hook(_ context.Context, op kopiarepo.StorageOp) (func(error) error, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.on && op.Kind.Writes() {
		p.moments = append(p.moments, moment{op, p.look()})
	}
	return nil, nil
}

// count returns how many operations were begun.
func (p *tape) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.moments)
}

// look reads the directory, but for temporary files. The caller holds mu.
func (p *tape) look() files {
	var before files
	if n := len(p.moments); n > 0 {
		before = p.moments[n-1].files
	}
	now := files{}
	p.err = errors.Join(p.err, filepath.WalkDir(p.dir, func(path string, e fs.DirEntry, err error) error {
		if strings.Contains(path, ".tmp.") {
			return nil
		}
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(p.dir, path)
		if err != nil {
			return err
		}
		name := filepath.ToSlash(rel)
		if old := before[name]; old != nil && os.SameFile(old.info, info) && old.info.ModTime().Equal(info.ModTime()) {
			now[name] = old
			return nil
		}
		b, err := os.ReadFile(path)
		now[name] = &filed{b, info}
		return err
	}))
	return now
}

// lay writes files into a new directory.
func (f files) lay(dir string) error {
	for name, file := range f {
		path := filepath.Join(dir, filepath.FromSlash(name))
		err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, file.data, 0o600))
		if file.info != nil {
			err = errors.Join(err, os.Chtimes(path, file.info.ModTime(), file.info.ModTime()))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// crash is what is left of a repository at some moment.
type crash struct {
	what  string
	at    int // operations that have happened
	power bool
	files files
}

// crashes yields what may be left: by a kill before each operation or in the middle
// of it, and by a power cut, when of the names that are not durable any one may be
// lost, or a random part of them.
func (p *tape) crashes(rnd *rand.Rand, yield func(crash) bool) {
	end := moment{files: p.look()}
	all := append(slices.Clone(p.moments), end)
	synced := 0
	for i, m := range all {
		if !yield(crash{fmt.Sprintf("%d before %s %s", i, m.op.Kind, m.op.Name), i, false, m.files}) {
			return
		}
		if i+1 == len(all) {
			return
		}
		after := all[i+1].files
		if f := after[m.op.Name]; f != nil && (m.op.Kind == kopiarepo.OpPut || m.op.Kind == kopiarepo.OpCreate) {
			half := maps.Clone(m.files)
			half[m.op.Name+".tmp.0123456789abcdef"] = &filed{data: f.data[:len(f.data)/2]}
			if !yield(crash{fmt.Sprintf("%d in the middle of %s %s", i, m.op.Kind, m.op.Name), i, false, half}) {
				return
			}
		}
		if m.op.Kind == kopiarepo.OpSync {
			synced = i + 1
			continue
		}
		lose := func(which ...int) crash {
			left, names := maps.Clone(after), []string{}
			slices.Reverse(which)
			for _, j := range which {
				name := all[j].op.Name
				names = append(names, fmt.Sprintf("%d %s %s", j, all[j].op.Kind, name))
				if old := all[j].files[name]; old != nil {
					left[name] = old
				} else {
					delete(left, name)
				}
			}
			return crash{fmt.Sprintf("%d done, lost: %s", i, strings.Join(names, ", ")), i + 1, true, left}
		}
		unsure := i + 1
		if m.op.Kind == kopiarepo.OpCreate { // it makes its own name durable first, and then the others
			unsure = i
		}
		for j := synced; j < unsure; j++ {
			if !yield(lose(j)) {
				return
			}
		}
		var part []int
		for j := synced; j < unsure; j++ {
			if rnd.IntN(2) == 0 {
				part = append(part, j)
			}
		}
		if len(part) > 1 && !yield(lose(part...)) {
			return
		}
		if m.op.Kind == kopiarepo.OpCreate {
			synced = i + 1
		}
	}
}

// life is what happens to a repository while a tape runs.
type life struct {
	tape  tape
	clock *clock
	r     *kopiarepo.Repository
	rnd   *rand.Rand
	truth map[string]*image // by run
	acked []happened        // points that were acknowledged
	ended []happened        // points whose deletion was asked for
	now   map[string]*image // the state of each VM
	runs  int
}

type happened struct {
	id    repository.PointID
	chain string
	at    int // operations that were begun then
}

func (l *life) backup(ctx context.Context, chain string) error {
	m := l.now[chain].clone()
	changed := []int64{l.rnd.Int64N(m.count()), l.rnd.Int64N(m.count())}
	m.fill(l.rnd, changed[0])
	m.zero(changed[1])
	l.runs++
	o := backupOptions{
		chain: chain, run: fmt.Sprintf("r%d", l.runs), changed: map[string][]int64{"d": dedupe(changed)},
		files: map[string][]byte{"config": fmt.Appendf(nil, "run %d", l.runs)},
	}
	for _, a := range l.acked {
		if a.chain == chain && !slices.ContainsFunc(l.ended, func(e happened) bool { return e.id == a.id }) {
			o.parent = a.id
		}
	}
	l.truth[o.run], l.now[chain] = m, m
	proof, err := backup(ctx, l.r, map[string]*image{"d": m}, o)
	if err != nil {
		return err
	}
	l.acked = append(l.acked, happened{proof.Point().ID, chain, l.tape.count()})
	return nil
}

// prune deletes one of the points that were not yet, and maintains.
func (l *life) prune(ctx context.Context) (err error) {
	lock, err := l.r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{Holder: "test"})
	if err != nil {
		return err
	}
	if n := len(l.ended); n < len(l.acked) {
		id := l.acked[n].id
		l.ended = append(l.ended, happened{id, l.acked[n].chain, l.tape.count()})
		if err := l.r.Delete(ctx, id, lock); err != nil {
			return err
		}
	}
	_, err = l.r.Maintain(ctx, lock, &repository.MaintainOptions{Full: true})
	return errors.Join(err, lock.Release(ctx))
}

// live lives with a tape running.
func live(ctx context.Context, dir string, rnd *rand.Rand, steps int) (*life, error) {
	l := &life{tape: tape{dir: dir}, clock: newClock(), rnd: rnd, truth: map[string]*image{}, now: map[string]*image{}}
	for _, chain := range []string{"vm-0", "vm-1"} {
		m := newImage(5*repository.LeafSize+700, 2*repository.LeafSize)
		m.fill(rnd, 0)
		m.fill(rnd, 2)
		l.now[chain] = m
	}
	cfg := config(dir)
	cfg.Clock, cfg.Workers = l.clock.Now, 1
	cfg.StorageHook = l.tape.hook
	r, err := kopiarepo.Create(ctx, cfg)
	if err != nil {
		return nil, err
	}
	l.r = r
	l.tape.on = true
	for k := range steps {
		switch n := rnd.IntN(8); {
		case k < 2 || n < 3:
			err = l.backup(ctx, fmt.Sprintf("vm-%d", rnd.IntN(2)))
		case n == 3:
			err = r.PutNote(ctx, fmt.Sprintf("open/%d", rnd.IntN(2)), fmt.Appendf(nil, "note %d", k))
		case n == 4:
			l.clock.Advance(26 * time.Hour)
		default:
			err = l.prune(ctx)
		}
		if err != nil {
			return nil, fmt.Errorf("step %d: %w", k, err)
		}
	}
	l.tape.on = false
	return l, errors.Join(r.Close(), l.tape.err)
}

// survives opens what a crash has left: every acknowledged point is there bit for bit,
// what else is there is whole, and a crash is no damage. With on, life goes on.
func (l *life) survives(ctx context.Context, c crash, dir string, on bool) (err error) {
	if err := c.files.lay(dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	cfg := config(dir)
	cfg.Clock = func() time.Time { return l.clock.Now().Add(time.Minute) }
	r, err := kopiarepo.Open(ctx, cfg)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if err := l.holds(ctx, r, c); err != nil {
		return err
	}
	rep, err := r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyRecords})
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	for _, d := range rep.Damages {
		// A note has two forms, and one alone is found whatever the reason.
		if !d.Repairable || !c.power && !strings.Contains(d.Object, "/notes/") {
			return fmt.Errorf("a crash is called damage: %v", d)
		}
	}
	if !on {
		return nil
	}
	lock, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{Takeover: func(string) bool { return true }})
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	if _, err := r.Maintain(ctx, lock, &repository.MaintainOptions{Full: true}); err != nil {
		return fmt.Errorf("maintenance: %w", err)
	}
	if err := lock.Release(ctx); err != nil {
		return fmt.Errorf("release: %w", err)
	}
	m := l.now["vm-1"]
	proof, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{chain: "vm-2", run: "after"})
	if err != nil {
		return fmt.Errorf("the next backup: %w", err)
	}
	rep, err = r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	if err != nil || len(rep.Damaged()) > 0 {
		return fmt.Errorf("verify of all data: %w, %v", err, rep.Damages)
	}
	return errors.Join(compare(ctx, r, proof.Point().ID, map[string]*image{"d": m}), l.holds(ctx, r, c))
}

// holds compares every point with the truth.
func (l *life) holds(ctx context.Context, r repository.Repository, c crash) error {
	there := map[repository.PointID]bool{}
	for p, err := range r.Points(ctx, repository.Query{}) {
		switch {
		case err != nil:
			return fmt.Errorf("list: %w", err)
		case p.Run == "after":
			continue
		case p.State != repository.Committed:
			return fmt.Errorf("point %s of run %s is %s: %s", p.ID, p.Run, p.State, p.Detail)
		}
		there[p.ID] = true
		if err := compare(ctx, r, p.ID, map[string]*image{"d": l.truth[p.Run]}); err != nil {
			return fmt.Errorf("point %s of run %s: %w", p.ID, p.Run, err)
		}
	}
	doomed := func(a happened) bool {
		return slices.ContainsFunc(l.ended, func(e happened) bool { return e.id == a.id && e.at <= c.at })
	}
	for _, a := range l.acked {
		if a.at <= c.at && !there[a.id] && !doomed(a) {
			return fmt.Errorf("point %s was acknowledged, and is gone", a.id)
		}
	}
	return nil
}

// TestCrashPoints lives through backups, deletions, maintenance and jumps of the
// clock, and opens what every crash on the way would leave. HOLDFAST_FAULTS=all looks
// at 5,000 of them and more, in lives that HOLDFAST_SEED tells apart; HOLDFAST_CRASH
// repeats one.
func TestCrashPoints(t *testing.T) {
	ctx := context.Background()
	want, step, lives := 12, 40, 1
	all, only := os.Getenv("HOLDFAST_FAULTS") == "all", os.Getenv("HOLDFAST_CRASH")
	index, of := tally.Shard(t)
	if all {
		want, step, lives = 5000/of, 1, 1000
	}
	first := uint64(1) // by day always the same
	if all {
		first = rand.Uint64() >> 1
	}
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		first = n
	}
	if only != "" {
		lives, step = 1, 1
	}
	t.Logf("HOLDFAST_SEED=%d", first)
	tried, kinds := 0, map[string]int{}
	for k := range lives {
		if tried >= want {
			break
		}
		number := first + uint64(k*of+index)
		rnd := rand.New(rand.NewPCG(number, 17))
		dir := filepath.Join(t.TempDir(), "repo")
		l, err := live(ctx, dir, rnd, 12)
		require.NoError(t, err, "HOLDFAST_SEED=%d", number)
		require.Greater(t, l.tape.count(), 100)
		n := rnd.IntN(step)
		l.tape.crashes(rnd, func(c crash) bool {
			n++
			if only != "" && c.what != only || only == "" && n%step != 0 {
				return true
			}
			tried++
			kinds[fmt.Sprintf("power cut: %v", c.power)]++
			err := l.survives(ctx, c, filepath.Join(t.TempDir(), "left"), n/step%5 == 0 || only != "")
			if err != nil {
				t.Errorf("%s: %v\nreplay with: HOLDFAST_CRASH='%s' HOLDFAST_SEED=%d go test -count=1 -run '^TestCrashPoints$' ./repository/kopiarepo",
					c.what, err, c.what, number)
			}
			return !t.Failed() || all
		})
		require.NoError(t, os.RemoveAll(dir))
	}
	t.Log(tried, kinds)
	if only != "" {
		require.Equal(t, 1, tried, "HOLDFAST_CRASH=%s is not a crash of this life", only)
		return
	}
	require.GreaterOrEqual(t, tried, min(want, 5))
	if all && !t.Failed() {
		tally.Record(t, tally.Campaign{
			Name:    "crash-points-kopia",
			About:   "Lives of a repository are cut off before, within and after each storage operation, and by power cuts that lose names; what is left is opened and compared.",
			Command: "HOLDFAST_FAULTS=all go test -timeout 120m -run '^TestCrashPoints$' ./repository/kopiarepo",
			Seed:    first,
			Counts:  []tally.Count{{Name: "crash points", Value: int64(tried)}},
		})
	}
}
