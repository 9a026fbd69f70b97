package campaign_test

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/internal/invariant"
	"github.com/holdfast-backup/holdfast/internal/tally"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/restore"
)

// simulation is a life of several VMs, backed up by several hosts into one repository:
// jobs run at the same time, guests write, clocks jump, calls fail and processes die.
// One seed decides all of it.
type simulation struct {
	*env
	sched *scheduler
	hosts []*host
	procs []*simulated
	calm  bool // nothing fails, nobody dies and no clock jumps

	still map[hypervisor.VMID]int // snapshots of it that are just being taken

	trace  io.Writer
	sum    uint64
	n      int // decisions
	jobs   map[string]int
	faults int
	kills  int
	jumps  int
}

const (
	maxDecisions = 60_000
	atOnce       = 3 // jobs
)

func newSimulation(seed uint64, dir string, trace io.Writer) *simulation {
	rnd := rand.New(rand.NewPCG(seed, 23))
	o := fakes.Options{NoBaselines: rnd.IntN(8) == 0, NoTracking: rnd.IntN(12) == 0, Sequential: rnd.IntN(8) == 0, OneSnapshot: rnd.IntN(6) == 0}
	m := &simulation{
		env: newEnv(seed, dir, o), sched: &scheduler{woken: make(chan struct{}, 1)},
		still: map[hypervisor.VMID]int{}, trace: trace, sum: 14695981039346656037, jobs: map[string]int{},
	}
	m.rnd, m.shared, m.calm = rnd, true, rnd.IntN(4) == 0
	for range 2 + rnd.IntN(3) {
		vm := fakes.VMConfig{Disks: []fakes.DiskConfig{{ID: "vda", Size: sizeA}}}
		if rnd.IntN(2) == 0 {
			vm.Disks = append(vm.Disks, fakes.DiskConfig{ID: "vdb", Size: sizeB + 512})
		}
		if rnd.IntN(2) == 0 {
			vm.Guest = fakes.Guest{Agent: true, Family: "linux"}
		}
		m.addVM(vm)
	}
	for k := range 2 + rnd.IntN(2) {
		m.hosts = append(m.hosts, newHost(fmt.Sprintf("host%d", k+1), rnd))
	}
	m.store.SetHook(storage)
	return m
}

// say adds to the trace, of which the sum is kept.
func (m *simulation) say(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	h := fnv.New64a()
	_, _ = fmt.Fprintf(h, "%x %s", m.sum, line) // never fails
	m.sum = h.Sum64()
	if m.trace != nil {
		_, _ = fmt.Fprintf(m.trace, "%6d %s\n", m.n, line)
	}
}

// alive tells whether the holder of a lease is a process that lives.
func (m *simulation) alive(holder string) bool {
	for _, p := range m.procs {
		if p.holder == holder {
			return !p.isDead() && !p.over()
		}
	}
	return false
}

// begin starts a process that does a job.
func (m *simulation) begin(what string, do func(context.Context, *simulated) error) {
	h := m.hosts[m.rnd.IntN(len(m.hosts))]
	p := &simulated{s: m.sched, name: fmt.Sprintf("%s/p%d", h.name, len(m.procs)+1)}
	p.process = &process{
		e: m.env, in: &injector{kill: func() {}}, disk: h.disk, fs: h.disk.Process(nil), rand: m.chacha(), clock: h.clock,
		holder: p.name, takeover: func(other string) bool { return !m.alive(other) },
	}
	p.hv = fakes.WithFaults(m.world.Connect(), p)
	m.procs = append(m.procs, p)
	m.jobs[what]++
	m.say("%s begins %s", p.name, what)
	ctx := context.WithValue(context.Background(), simulatedKey{}, p)
	go func() {
		var err error
		p.repo, err = m.store.Open(ctx, fakes.RepositoryOptions{Seed: 1, Clock: h.clock.Now})
		if err == nil {
			err = do(ctx, p)
		}
		p.mu.Lock()
		p.ended, p.err = true, err
		p.mu.Unlock()
		m.sched.wake()
	}()
}

// start begins some job.
func (m *simulation) start() {
	vm := m.vms[m.rnd.IntN(len(m.vms))]
	seed := m.rnd.Uint64()
	switch n := m.rnd.IntN(20); {
	case n < 11:
		m.begin("backup of "+string(vm), func(ctx context.Context, p *simulated) error { return m.backup(ctx, p, vm, seed) })
	case n < 14:
		ids := m.old()
		m.begin("prune", func(ctx context.Context, p *simulated) error { return prune(ctx, p.process, ids) })
	case n < 16:
		m.begin("recover", func(ctx context.Context, p *simulated) error { return p.recover(ctx) })
	case n < 18:
		m.begin("restore", func(ctx context.Context, p *simulated) error { return m.restore(ctx, p, seed) })
	default:
		m.begin("verify", func(ctx context.Context, p *simulated) error { return verify(ctx, p.process, nil) })
	}
}

func (m *simulation) backup(ctx context.Context, p *simulated, vm hypervisor.VMID, seed uint64) error {
	taking := false
	take := func(on bool) {
		if on == taking {
			return
		}
		taking = on
		m.mu.Lock()
		defer m.mu.Unlock()
		if on {
			m.still[vm]++
		} else {
			m.still[vm]--
		}
	}
	defer take(false)
	res, err := p.backup(ctx, vm, func(o *backup.Options) {
		o.Full, o.Audit, o.AuditSeed = seed%8 == 0, backup.AuditRate{Share: float64(seed%3) / 2}, 1
		truth := o.Events.Stage
		o.Events.Stage = func(ev backup.StageEvent) {
			if ev.Stage == backup.StageSnapshot {
				take(!ev.Done)
			}
			truth(ev)
		}
	})
	if errors.Is(err, repository.ErrOutcomeUnknown) {
		// It says that it does not know; then it may be there.
		m.mu.Lock()
		defer m.mu.Unlock()
		m.claims = slices.DeleteFunc(m.claims, func(c invariant.Claim) bool { return c.Run == res.Run })
	}
	return err
}

func (m *simulation) restore(ctx context.Context, p *simulated, seed uint64) error {
	m.mu.Lock()
	var ids []repository.PointID
	for _, id := range m.points {
		if !m.doomed[id] {
			ids = append(ids, id)
		}
	}
	m.mu.Unlock()
	if len(ids) == 0 {
		return nil
	}
	id := ids[seed%uint64(len(ids))]
	err := p.toVM(ctx, id, &restore.VMOptions{Name: fmt.Sprintf("copy-%d", seed)})
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil && m.doomed[id] && !errors.Is(err, errViolation) {
		return nil // somebody deleted it meanwhile
	}
	return err
}

// old chooses points to delete: never more than half.
func (m *simulation) old() (ids []repository.PointID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range m.points[:len(m.points)/2] {
		if !m.doomed[id] {
			ids = append(ids, id)
		}
	}
	return ids
}

// writable are VMs of which no snapshot is just being taken: what a snapshot must hold
// is known only if nobody writes then.
func (m *simulation) writable() (out []hypervisor.VMID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, vm := range m.vms {
		if m.still[vm] == 0 && !m.world.Frozen(vm) {
			out = append(out, vm)
		}
	}
	return out
}

// active are the processes whose jobs have not ended.
func (m *simulation) active() (out []*simulated) {
	for _, p := range m.procs {
		if !p.over() {
			out = append(out, p)
		}
	}
	return out
}

// run lets so many jobs happen, and everything else.
func (m *simulation) run(jobs int) error {
	for ; ; m.n++ {
		synctest.Wait()
		active := m.active()
		switch r := m.rnd.IntN(1000); {
		case len(active) == 0 && jobs == 0:
			return m.honest()
		case m.n > maxDecisions:
			return violation("I4: no end after %d decisions", m.n)
		case jobs > 0 && len(active) < atOnce && (r < 40 || len(active) == 0):
			jobs--
			m.start()
		case r < 60:
			if vms := m.writable(); len(vms) > 0 {
				vm := vms[m.rnd.IntN(len(vms))]
				m.say("%s writes", vm)
				m.scribble(vm)
			}
		case r < 66 && !m.calm:
			m.jump()
		case r < 68 && !m.calm && len(active) > 0:
			p := active[m.rnd.IntN(len(active))]
			m.say("%s is killed", p.name)
			m.kills++
			m.sched.killed(p)
		default:
			m.step()
		}
	}
}

// jump lets time pass, or sets a clock.
func (m *simulation) jump() {
	m.jumps++
	by := []time.Duration{time.Second, time.Minute, 4 * time.Minute, 11 * time.Minute, 3 * time.Hour, 30 * time.Hour}[m.rnd.IntN(6)]
	if m.rnd.IntN(3) > 0 {
		m.say("%s pass", by)
		_ = clock.Sleep(context.Background(), clock.Real(), by) // its end is all that happens
		return
	}
	h := m.hosts[m.rnd.IntN(len(m.hosts))]
	if m.rnd.IntN(2) == 0 {
		by = -by
	}
	m.say("the clock of %s is set %s wrong", h.name, by)
	h.clock.set(by)
}

// step lets one call happen; if there is none, time passes until there is.
func (m *simulation) step() {
	calls := m.sched.calls()
	if len(calls) == 0 {
		select {
		case <-m.sched.woken: // time passes until then
		case <-time.After(time.Minute):
		}
		return
	}
	x := calls[m.rnd.IntN(len(calls))]
	how := mode("")
	if !m.calm && m.rnd.IntN(150) == 0 {
		how = []mode{failBefore, failAfter, killBefore, killAfter}[m.rnd.IntN(4)]
		m.faults++
	}
	m.say("%s: %s", x.key, how)
	select {
	case <-m.sched.woken:
	default:
	}
	m.sched.tell(x, how)
}

// honest says whether a job failed that had no reason to.
func (m *simulation) honest() error {
	for _, p := range m.procs {
		err := p.err
		switch {
		case errors.Is(err, errViolation):
			return fmt.Errorf("%s: %w", p.name, err)
		case err == nil, !m.calm:
		case errors.Is(err, repository.ErrLocked), errors.Is(err, hypervisor.ErrBusy), errors.Is(err, repository.ErrNotFound):
			// another job was at it
		default:
			return violation("%s fails without a fault: %w", p.name, err)
		}
	}
	return nil
}

// end recovers every host, makes a clean backup of each VM, and asks for the promise.
func (m *simulation) end() error {
	m.shared = false
	_ = clock.Sleep(context.Background(), clock.Real(), time.Hour) // leases end
	m.store.SetHook(nil)
	for range 2 {
		for _, h := range m.hosts {
			m.env.disk = h.disk
			if err := m.plain().recover(context.Background()); err != nil {
				return violation("recover of %s: %w", h.name, err)
			}
		}
		for _, vm := range m.vms {
			m.scribble(vm)
			if _, err := m.plain().backup(context.Background(), vm, nil); err != nil {
				return violation("the next backup: %w", err)
			}
		}
		if err := m.check(); err != nil {
			return err
		}
	}
	return nil
}

// simulate runs one seed.
func simulate(t *testing.T, seed uint64, trace io.Writer) (m *simulation, err error) {
	dir := t.TempDir()
	err = bubble(t, func() error {
		m = newSimulation(seed, dir, trace)
		if err := m.run(6 + m.rnd.IntN(15)); err != nil {
			return err
		}
		return m.end()
	})
	return m, err
}

// TestSimulation lives many lives. HOLDFAST_SIM_SEED is one that is told in full;
// HOLDFAST_SIM how many there are.
func TestSimulation(t *testing.T) {
	if s := os.Getenv("HOLDFAST_SIM_SEED"); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		var trace strings.Builder
		m, err := simulate(t, seed, &trace)
		t.Logf("%s\ntrace %x, %d decisions, jobs %v", trace.String(), m.sum, m.n, m.jobs)
		require.NoError(t, err)
		return
	}
	count := uint64(60)
	if s := os.Getenv("HOLDFAST_SIM"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		count = n
	}
	first := uint64(1)
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		first = n
	}
	index, of := tally.Shard(t)
	t.Logf("seeds from %d on, HOLDFAST_SEED sets another first one", first)
	var mu sync.Mutex
	var all simulation
	worlds, again, violations := 0, 0, 0
	all.jobs = map[string]int{}
	t.Run("each", func(t *testing.T) {
		const workers = 4
		for w := range uint64(workers) {
			t.Run(fmt.Sprint(w), func(t *testing.T) {
				t.Parallel()
				for n := uint64(index)*workers + w; n < count; n += uint64(of) * workers {
					seed := first + n
					m, err := simulate(t, seed, nil)
					twice := n%100 < 3
					if err == nil && twice {
						o, oerr := simulate(t, seed, nil)
						if err = oerr; err == nil && o.sum != m.sum {
							err = violation("seed %d is not the same life again: trace %x and %x", seed, m.sum, o.sum)
						}
					}
					mu.Lock()
					worlds++
					if twice {
						again++
					}
					if err != nil {
						violations++
						t.Errorf("seed %d: %v\nreplay with: HOLDFAST_SIM_SEED=%d go test -count=1 -v -run '^TestSimulation$' ./internal/campaign", seed, err, seed)
					}
					stop := violations >= 20
					if m != nil {
						all.n += m.n
						all.faults += m.faults
						all.kills += m.kills
						all.jumps += m.jumps
						for what, n := range m.jobs {
							all.jobs[strings.Fields(what)[0]] += n
						}
					}
					mu.Unlock()
					if stop {
						return
					}
				}
			})
		}
	})
	t.Logf("%d lives, %d of them twice, %d decisions, %d faults, %d kills, %d jumps, jobs %v, %d violations",
		worlds, again, all.n, all.faults, all.kills, all.jumps, all.jobs, violations)
	if t.Failed() {
		return
	}
	require.Positive(t, again)
	require.Positive(t, all.faults)
	require.Positive(t, all.kills)
	require.Len(t, all.jobs, 5)
	tally.Record(t, tally.Campaign{
		Name:    "simulation",
		About:   "Several hosts back up, restore, prune, verify and recover at the same time while guests write, clocks jump, calls fail and processes die: one seed decides all, and is the same life again.",
		Command: fmt.Sprintf("HOLDFAST_SIM=%d HOLDFAST_SEED=%d go test -timeout 120m -run '^TestSimulation$' ./internal/campaign", count, first),
		Seed:    first, Violations: int64(violations),
		Counts: []tally.Count{
			{Name: "lives", Value: int64(worlds)},
			{Name: "lived twice", Value: int64(again)},
			{Name: "decisions", Value: int64(all.n)},
			{Name: "faults", Value: int64(all.faults)},
			{Name: "kills", Value: int64(all.kills)},
			{Name: "jumps of clocks", Value: int64(all.jumps)},
		},
	})
}
