package campaign_test

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/internal/journal/journaltest"
)

// scheduler lets every call of several processes wait until it is told to happen, and
// tells one at a time: what happens in which order, its owner decides.
type scheduler struct {
	mu     sync.Mutex
	parked []*parked
	woken  chan struct{} // something has happened that the owner waits for
}

// parked is a call that waits. key is the same in every run with the same seed.
type parked struct {
	of      *simulated
	key     string
	verdict chan mode
}

// simulated is one process of a simulation, which does one job.
type simulated struct {
	*process
	s    *scheduler
	name string

	mu    sync.Mutex
	dead  bool
	ended bool
	err   error
}

type simulatedKey struct{}

func (p *simulated) isDead() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dead
}

// over tells whether the job has ended.
func (p *simulated) over() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ended
}

func (p *simulated) kill() {
	p.mu.Lock()
	p.dead = true
	p.mu.Unlock()
	p.in.mark()
	p.fs.Kill()
}

// wake tells the owner to look again.
func (s *scheduler) wake() {
	select {
	case s.woken <- struct{}{}:
	default:
	}
}

// park waits for the verdict on a call.
func (s *scheduler) park(p *simulated, call string) mode {
	if p.isDead() {
		return killBefore
	}
	x := &parked{p, p.name + " " + call, make(chan mode, 1)}
	s.mu.Lock()
	s.parked = append(s.parked, x)
	s.mu.Unlock()
	s.wake()
	m := <-x.verdict
	if m == killBefore || m == killAfter {
		p.kill()
	}
	return m
}

// calls returns what waits, in an order that depends on nothing else.
func (s *scheduler) calls() []*parked {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := slices.Clone(s.parked)
	slices.SortStableFunc(out, func(a, b *parked) int { return cmp.Compare(a.key, b.key) })
	return out
}

// tell lets a call happen.
func (s *scheduler) tell(x *parked, m mode) {
	s.mu.Lock()
	s.parked = slices.DeleteFunc(s.parked, func(o *parked) bool { return o == x })
	s.mu.Unlock()
	x.verdict <- m
}

// killed ends a process: its calls do not happen.
func (s *scheduler) killed(p *simulated) {
	p.kill()
	for _, x := range s.calls() {
		if x.of == p {
			s.tell(x, killBefore)
		}
	}
}

// Inject implements fakes.Injector.
func (p *simulated) Inject(c fakes.Call) fakes.Fault {
	switch p.s.park(p, fmt.Sprintf("%s %s %s %s %d+%d", c.Op, c.VM, c.Disk, c.Name, c.Offset, c.Length)) {
	case failBefore:
		return fakes.Fault{Err: errBroken}
	case failAfter:
		return fakes.Fault{Err: errBroken, After: true}
	case killBefore:
		return fakes.Fault{Err: fakes.ErrKilled}
	case killAfter:
		return fakes.Fault{Err: fakes.ErrKilled, After: true}
	}
	return fakes.Fault{}
}

// storage is a fakes.StoreHook for all processes; the context tells which it is.
func storage(ctx context.Context, op fakes.StoreOp) fakes.StoreFault {
	p, _ := ctx.Value(simulatedKey{}).(*simulated)
	if p == nil {
		return fakes.StoreFault{}
	}
	switch p.s.park(p, fmt.Sprintf("%s %s %d", op.Kind, op.Name, op.Size)) {
	case failBefore:
		return fakes.StoreFault{Err: errBroken}
	case failAfter:
		return fakes.StoreFault{Err: errBroken, After: true}
	case killBefore:
		return fakes.StoreFault{Kill: true}
	case killAfter:
		return fakes.StoreFault{Kill: true, After: true}
	}
	return fakes.StoreFault{}
}

// skewed is a clock that is wrong by some time, and can be set.
type skewed struct {
	clock.Clock
	mu sync.Mutex
	by time.Duration
}

func (c *skewed) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.Clock.Now().Add(c.by)
}

func (c *skewed) set(by time.Duration) {
	c.mu.Lock()
	c.by = by
	c.mu.Unlock()
}

// host has a disk and a clock, which its processes share.
type host struct {
	name  string
	disk  *journaltest.Disk
	clock *skewed
}

func newHost(name string, rnd *rand.Rand) *host {
	return &host{name, journaltest.NewDisk(), &skewed{Clock: clock.Real(), by: time.Duration(rnd.IntN(60)) * time.Second}}
}
