package campaign_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/internal/invariant"
	"github.com/holdfast-backup/holdfast/internal/journal"
	"github.com/holdfast-backup/holdfast/internal/journal/journaltest"
	"github.com/holdfast-backup/holdfast/internal/tally"
	"github.com/holdfast-backup/holdfast/repository"
)

// moment is what there was at some time: storage, the disk of the journals, and what
// was made on the hypervisor.
type moment struct {
	stored int // operations of the store's log
	disk   *journaltest.Disk
	left   []fakes.Leftover
	acked  int // points
	doomed map[repository.PointID]bool
}

// tape keeps a moment before each call of a run.
type tape struct {
	e *env

	mu      sync.Mutex
	moments []moment
	begun   map[int64]int // by storage operation: the length of the log then
}

func (p *tape) watch(op *fakes.StoreOp) {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := moment{acked: len(p.e.points), doomed: maps.Clone(p.e.doomed)}
	for {
		// Both are looked at while nothing changes on the hypervisor.
		m.left = p.e.world.Leftovers()
		m.disk, m.stored = p.e.disk.Clone(), len(p.e.store.Log())
		if slices.Equal(m.left, p.e.world.Leftovers()) {
			break
		}
	}
	if op != nil {
		p.begun[op.Seq] = m.stored
	}
	p.moments = append(p.moments, m)
}

// crash is what a crash leaves of a run.
type crash struct {
	what  string
	at    moment
	torn  bool
	store func() *fakes.Store
	disk  *journaltest.Disk
}

// maxFlight bounds the operations under way of which every part is tried.
const maxFlight = 6

// crashes yields what is left when every process dies at a moment, and of the
// operations that were under way any part has happened; when content is put and its
// end is missing; and when the power fails, what was not synced.
func (p *tape) crashes(yield func(crash) bool) {
	store, log := p.e.store, p.e.store.Log()
	var before moment
	for i, m := range p.moments {
		cut := m.disk.Clone()
		cut.PowerCut()
		if !yield(crash{fmt.Sprintf("%d power cut", i), m, false, func() *fakes.Store { return store.ReplayTo(m.stored) }, cut}) {
			return
		}
		if i > 0 && m.stored == before.stored {
			if !yield(crash{fmt.Sprintf("%d kill", i), m, false, func() *fakes.Store { return store.ReplayTo(m.stored) }, m.disk}) {
				return
			}
			continue
		}
		before = m
		var flight []int
		for k := m.stored; k < len(log) && len(flight) < maxFlight; k++ {
			if b, ok := p.begun[log[k].Seq]; ok && b <= m.stored {
				flight = append(flight, k)
			}
		}
		for part := range 1 << len(flight) {
			var also []int
			for b, k := range flight {
				if part>>b&1 == 1 {
					also = append(also, k)
				}
			}
			if !yield(crash{
				fmt.Sprintf("%d kill, operations %v happened", i, also), m, false,
				func() *fakes.Store { return store.ReplayWith(m.stored, also...) }, m.disk,
			}) {
				return
			}
		}
		if m.stored == len(log) || log[m.stored].Kind != fakes.StorePut || !tears(class(log[m.stored].Name)) {
			continue
		}
		size := log[m.stored].Size
		for _, keep := range []int64{0, 1, size / 3, size / 2, size - 1} {
			if !yield(crash{
				fmt.Sprintf("%d kill, %d bytes of %s", i, keep, class(log[m.stored].Name)), m, true,
				func() *fakes.Store { return store.ReplayTorn(m.stored+1, keep) }, m.disk,
			}) {
				return
			}
		}
	}
}

// record lives through a story with a tape.
func (s *story) record(seed uint64, dir string) (*tape, error) {
	e := newEnv(seed, dir, s.o)
	defer func() { must(os.RemoveAll(e.out())) }()
	e.flight = maxFlight
	s.begin(e)
	e.store.Record()
	p := &tape{e: e, begun: map[int64]int{}}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	in := &injector{cancel: cancel, watch: p.watch, latency: callTime}
	proc, err := e.start(ctx, in)
	must(err)
	if err := (shot{story: s}).honest(in, s.act(ctx, proc)); err != nil {
		return nil, err
	}
	e.store.SetHook(nil)
	p.watch(nil)
	return p, nil
}

// survives looks at what a crash left: every acknowledged point is there bit for bit,
// what else is there is whole, and of all that was made on the hypervisor a journal
// knows. With on, the repository goes on.
func (p *tape) survives(ctx context.Context, c crash, on bool) error {
	repo, err := c.store().Open(ctx, fakes.RepositoryOptions{Seed: 1})
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	w := invariant.World{Repo: repo, Truth: p.e.truth}
	for _, id := range p.e.points[:c.at.acked] {
		if !c.at.doomed[id] {
			w.Claims = append(w.Claims, invariant.Claim{Point: id})
		}
	}
	if err := invariant.Check(ctx, w); err != nil {
		return err
	}
	if err := p.known(ctx, c, repo); err != nil || !on {
		return err
	}
	lock, err := repo.Lock(ctx, repository.LockMaintenance, repository.LockOptions{Takeover: func(string) bool { return true }})
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	if _, err := repo.Maintain(ctx, lock, &repository.MaintainOptions{Full: true}); err != nil {
		return fmt.Errorf("maintenance: %w", err)
	}
	rep, err := repo.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	for _, d := range rep.Damages {
		if !c.torn || len(d.Points) > 0 { // half a blob that nobody uses may lie about
			return fmt.Errorf("verify: %+v", d)
		}
	}
	return invariant.Check(ctx, w)
}

// known says whether journals or notes hold an obligation for whatever is there.
func (p *tape) known(ctx context.Context, c crash, repo repository.Repository) error {
	list, err := journal.List(backup.JournalDir(stateDir), &journal.Options{FS: c.disk.Process(nil)})
	if err != nil {
		return fmt.Errorf("list of journals: %w", err)
	}
	var open strings.Builder
	for _, j := range list {
		for _, o := range j.Open {
			fmt.Fprintf(&open, "%s %s %s\n", o.Kind, o.VM, o.Object)
		}
	}
	for n, err := range repo.Notes(ctx, "") {
		if err != nil {
			return fmt.Errorf("notes: %w", err)
		}
		open.Write(n.Value)
	}
	for _, l := range c.at.left {
		switch l.Kind {
		case fakes.LeftSnapshot, fakes.LeftIncomplete:
			if !strings.Contains(open.String(), l.Name) {
				return fmt.Errorf("no journal knows of %s; they know of\n%s", l.ID, open.String())
			}
		case fakes.LeftFrozen:
			if !strings.Contains(open.String(), string(journal.Thaw)+" "+string(l.VM)) {
				return fmt.Errorf("no journal knows of %s; they know of\n%s", l.ID, open.String())
			}
		}
	}
	return nil
}

// TestCrashPoints opens what every crash in every story would leave. HOLDFAST_FAULTS=all
// looks at 100,000 and more, in stories that HOLDFAST_SEED tells apart;
// HOLDFAST_CRASH repeats one.
func TestCrashPoints(t *testing.T) {
	all, only := os.Getenv("HOLDFAST_FAULTS") == "all", os.Getenv("HOLDFAST_CRASH")
	index, of := tally.Shard(t)
	want := 100_000 / of
	first := uint64(1) // by day always the same
	if all {
		first = rand.Uint64() >> 1
	}
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		first = n
	}
	t.Logf("HOLDFAST_SEED=%d", first)
	var mu sync.Mutex
	tried, violations := 0, 0
	for round := 0; round == 0 || all && tried < want; round++ {
		seed := first + uint64(round*of+index)
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) {
			for i := range stories {
				s := &stories[i]
				if only != "" && !strings.HasPrefix(only, s.name+"|") {
					continue
				}
				t.Run(s.name, func(t *testing.T) {
					t.Parallel()
					var p *tape
					err := bubble(t, func() (err error) {
						p, err = s.record(seed, t.TempDir())
						return err
					})
					require.NoError(t, err)
					p.crashes(func(c crash) bool {
						name := s.name + "|" + c.what
						h := hashOf(name) ^ seed
						if only != "" && only != name || only == "" && !all && h%40 != 0 {
							return true
						}
						err := p.survives(context.Background(), c, h/64%8 == 0)
						mu.Lock()
						defer mu.Unlock()
						if tried++; err != nil {
							violations++
							t.Errorf("%s: %v\nreplay with: HOLDFAST_CRASH='%s' HOLDFAST_SEED=%d go test -count=1 -v -run '^TestCrashPoints$' ./internal/campaign",
								name, err, name, seed)
						}
						return violations < 20
					})
				})
			}
		})
		if violations > 0 || only != "" {
			break
		}
	}
	t.Logf("%d crash points, %d violations", tried, violations)
	if only != "" {
		require.Equal(t, 1, tried, "HOLDFAST_CRASH=%s is not a crash of this campaign", only)
		return
	}
	if violations == 0 {
		require.Greater(t, tried, 200)
	}
	if all {
		tally.Record(t, tally.Campaign{
			Name:    "crash-points",
			About:   "Each story is cut off at each moment: any part of the operations under way has happened, content is torn, what was not synced is lost; what is left is opened and compared, and of whatever stands on the hypervisor a journal must know.",
			Command: "HOLDFAST_FAULTS=all go test -timeout 90m -run '^TestCrashPoints$' ./internal/campaign",
			Seed:    first, Violations: int64(violations),
			Counts: []tally.Count{{Name: "crash points", Value: int64(tried)}, {Name: "stories", Value: int64(len(stories))}},
		})
	}
}
