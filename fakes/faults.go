package fakes

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
)

// ErrInjected is the cause of failures that the helpers below inject.
var ErrInjected = errors.New("injected fault")

// Fault is what happens to one call. The zero value is nothing. Its parts apply
// in the order of the fields, before the call takes effect, or with After once
// it has had its effect without an error.
type Fault struct {
	After bool
	Do    func()        // may not return: runtime.Goexit, or the end of the process
	Delay time.Duration // on Clock, or until the context ends
	Clock clock.Clock   // nil: clock.Real()
	Hang  bool          // until the context ends; fails at once where there is none
	Err   error         // the call returns it, and no result
	// Short makes a read or write move half of its bytes and then fail, with Err
	// or io.ErrUnexpectedEOF. Other calls ignore it.
	Short bool
}

// Injector decides what happens to a call. It is called concurrently, in the
// goroutine of the caller, without a lock held.
type Injector interface {
	Inject(c Call) Fault
}

// InjectorFunc makes a function an Injector.
type InjectorFunc func(Call) Fault

// Inject calls f.
func (f InjectorFunc) Inject(c Call) Fault { return f(c) }

// injection numbers the calls of one wrapper.
type injection struct {
	inject   Injector
	platform hypervisor.Platform
	n        atomic.Int64
}

// next numbers a call and asks what shall happen to it.
func (in *injection) next(c Call) (Call, Fault) {
	c.N = int(in.n.Add(1))
	return c, in.inject.Inject(c)
}

// call runs effect with what the injector wants around it. Results of effect
// are void when it returns an error.
func (in *injection) call(ctx context.Context, c Call, effect func() error) error {
	c, f := in.next(c)
	return in.around(ctx, c, f, effect)
}

func (in *injection) around(ctx context.Context, c Call, f Fault, effect func() error) error {
	if !f.After {
		if err := in.apply(ctx, c, f); err != nil {
			return err
		}
	}
	if err := effect(); err != nil {
		return err
	}
	if f.After {
		return in.apply(ctx, c, f)
	}
	return nil
}

func (in *injection) apply(ctx context.Context, c Call, f Fault) error {
	if f.Do != nil {
		f.Do()
	}
	if f.Delay > 0 {
		clk := f.Clock
		if clk == nil {
			clk = clock.Real()
		}
		if err := clock.Sleep(ctx, clk, f.Delay); err != nil {
			return in.wrap(c, err)
		}
	}
	if f.Hang {
		if ctx.Done() == nil {
			return in.wrap(c, ErrInjected)
		}
		<-ctx.Done()
		return in.wrap(c, ctx.Err())
	}
	if f.Err != nil && !f.Short {
		return in.wrap(c, f.Err)
	}
	return nil
}

// closing is call for Close of local things: like close(2) it gives back what it
// holds even when it reports an error.
func (in *injection) closing(ctx context.Context, c Call, effect func() error) (err error) {
	c, f := in.next(c)
	if !f.After {
		err = in.apply(ctx, c, f)
	}
	cerr := effect()
	if f.After {
		err = in.apply(ctx, c, f)
	}
	if err == nil {
		err = cerr
	}
	return err
}

// wrap makes an error one that a driver may return.
func (in *injection) wrap(c Call, err error) error {
	var e *hypervisor.Error
	if errors.As(err, &e) {
		return err
	}
	return &hypervisor.Error{Op: string(c.Op), Platform: in.platform, VM: c.VM, Disk: c.Disk, Err: err}
}

// transfer is call for reads and writes of n bytes, which can also be short.
// move moves the first k of them. dead is what a short transfer fails with.
func (in *injection) transfer(ctx context.Context, c Call, n int, move func(k int) (int, error)) (int, error) {
	c, f := in.next(c)
	if !f.Short {
		done := 0
		var soft error // io.EOF comes with bytes
		err := in.around(ctx, c, f, func() (err error) {
			done, err = move(n)
			if err == io.EOF { //nolint:errorlint // a wrapped one is no end of the disk
				soft, err = err, nil
			}
			return err
		})
		if err != nil && f.After {
			return 0, err
		}
		if err == nil {
			err = soft
		}
		return done, err
	}
	if err := in.apply(ctx, c, f); err != nil {
		return 0, err
	}
	done, err := move(n / 2)
	if err == nil || err == io.EOF { //nolint:errorlint // a wrapped one is no end of the disk
		if err = f.Err; err == nil {
			err = io.ErrUnexpectedEOF
		}
	}
	return done, in.wrap(c, err)
}

// Mode says when a call fails.
type Mode int

// Modes of failing. FailAfter leaves the caller without knowledge of the
// effect, as a lost answer does.
const (
	FailBefore Mode = iota
	FailAfter
)

// Rule is one line of a Script: the calls that Match gets the Fault, the first
// Times of them; zero means all.
type Rule struct {
	Match func(Call) bool
	Times int
	Fault Fault
}

// FailCall makes the call with number k fail with ErrInjected, once.
func FailCall(k int, m Mode) Rule {
	return Rule{Match: Number(k), Times: 1, Fault: Fault{Err: ErrInjected, After: m == FailAfter}}
}

// FailOp makes every call of an operation fail with ErrInjected.
func FailOp(op Op, m Mode) Rule {
	return Rule{Match: Any(op), Fault: Fault{Err: ErrInjected, After: m == FailAfter}}
}

// Number matches the call with number k.
func Number(k int) func(Call) bool { return func(c Call) bool { return c.N == k } }

// Any matches the calls of the given operations, of none: every call.
func Any(ops ...Op) func(Call) bool {
	return func(c Call) bool { return len(ops) == 0 || slices.Contains(ops, c.Op) }
}

// Script is an Injector that follows rules and keeps a trace. It is safe for
// concurrent use. Make one with NewScript.
type Script struct {
	mu    sync.Mutex
	rules []Rule
	used  []int
	trace []Call
	hits  int
}

var _ Injector = (*Script)(nil)

// NewScript returns a Script; the first rule that matches a call is applied.
// Without rules it counts.
func NewScript(rules ...Rule) *Script {
	return &Script{rules: rules, used: make([]int, len(rules))}
}

// Inject implements Injector.
func (s *Script) Inject(c Call) Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trace = append(s.trace, c)
	for i, r := range s.rules {
		if (r.Times > 0 && s.used[i] >= r.Times) || !r.Match(c) {
			continue
		}
		s.used[i]++
		s.hits++
		return r.Fault
	}
	return Fault{}
}

// Trace returns the calls so far, in the order of their numbers as far as they
// came one after another.
func (s *Script) Trace() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.trace)
}

// Count returns how many calls there were.
func (s *Script) Count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.trace)
}

// Hits returns how many calls got a fault.
func (s *Script) Hits() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hits
}
