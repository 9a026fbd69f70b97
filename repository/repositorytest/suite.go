// Package repositorytest is the conformance suite of the repository contract. An
// engine runs it with one call, [Run], from a test of its own, and needs no
// further tests of what the contract says.
//
// The suite asks the engine for nothing but a [Harness]: an empty repository and a
// way to open it again. A clock that can be moved, and a way to damage what is
// stored, are optional and switch on the checks that need them. Where an engine is
// known to differ, it says so with a [Divergence].
//
// Checks draw random content; each prints its seed, and the environment variable
// HOLDFAST_SEED replays it.
package repositorytest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/repository"
)

// T is the part of *testing.T that checks use.
type T interface {
	Helper()
	Context() context.Context
	Cleanup(f func())
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	FailNow()
	Skip(args ...any)
}

// Harness gives one check an engine to work on.
type Harness struct {
	// Repository is open and empty. The suite closes it.
	Repository repository.Repository

	// Reopen opens the same storage once more, as another process would. The suite
	// closes what it gets. It must not return a value that shares state with others
	// except through the storage.
	Reopen func(ctx context.Context) (repository.Repository, error)

	// Advance moves the clock of all processes. nil: it cannot be moved, and checks
	// of expiry are skipped.
	Advance func(d time.Duration)

	// SafetyTime is how long Maintain spares what a committed point does not need.
	// If it is not zero, checks of Maintain need Advance.
	SafetyTime time.Duration

	// Objects lists the stored objects whose damage the engine promises to find;
	// Damage damages one behind its back and returns a function that takes the
	// damage back. nil: checks of damage are skipped. Damage is given ways that are
	// in Damages; an object to which a way cannot be done is an error that matches
	// errors.ErrUnsupported.
	Objects func() []string
	Damage  func(object string, how Damage) (undo func(), err error)

	// DamageSamples limits how many damages one check tries; zero: 60.
	DamageSamples int
}

// Damage is a way to damage a stored object.
type Damage string

// Ways to damage an object.
const (
	Flip     Damage = "flip"     // of one bit
	Truncate Damage = "truncate" // to about half
	Empty    Damage = "empty"
	Lost     Damage = "lost"
)

// Damages returns every way to damage an object.
func Damages() []Damage { return []Damage{Flip, Truncate, Empty, Lost} }

// Divergence is a check that an engine is known not to pass, and why.
type Divergence struct {
	Check  string
	Reason string
}

// Check is one check of the contract.
type Check struct {
	Name string
	Run  func(t T, h *Harness)
}

// Checks returns every check of the suite.
func Checks() []Check {
	return slices.Concat(
		lifecycleChecks(), writeChecks(), refusalChecks(), inheritChecks(), digestChecks(), readChecks(), pointChecks(),
		lockChecks(), fenceChecks(), noteChecks(), fileChecks(), verifyChecks(), damageChecks(), maintainChecks(),
		cancelChecks(), historyChecks(),
	)
}

// Run runs the suite as parallel subtests of t. newHarness is called once for each
// check, concurrently, and makes an empty repository; it may use t.Cleanup.
func Run(t *testing.T, newHarness func(t T) *Harness, known ...Divergence) {
	t.Helper()
	skip := map[string]string{}
	for _, d := range known {
		skip[d.Check] = d.Reason
	}
	for _, c := range Checks() {
		reason, diverges := skip[c.Name]
		delete(skip, c.Name)
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			if diverges {
				t.Skip("known divergence:", reason)
			}
			c.run(t, newHarness)
		})
	}
	for name := range skip {
		t.Errorf("a divergence is declared from check %q, which does not exist", name)
	}
}

func (c Check) run(t T, newHarness func(t T) *Harness) {
	h := newHarness(t)
	t.Cleanup(func() {
		if err := h.Repository.Close(); err != nil {
			t.Errorf("close the repository: %v", err)
		}
	})
	c.Run(t, h)
}

// ErrSkipped is what [Check.Try] returns when the harness cannot run the check.
var ErrSkipped = errors.New("check skipped")

// Try runs a check outside of package testing. It returns nil if the check passed,
// an error that matches ErrSkipped if it could not be run, or an error with what
// the check reported. A panic of the engine is a failure.
func (c Check) Try(ctx context.Context, newHarness func(t T) *Harness) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r := &recorder{ctx: ctx}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer r.cleanUp()
		defer r.recover()
		c.run(r, newHarness)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		return fmt.Errorf("%s: it hangs: %w", c.Name, context.Cause(ctx))
	}
	switch {
	case r.failed:
		return fmt.Errorf("%s: %s", c.Name, strings.Join(r.lines, "\n"))
	case r.skipped:
		return fmt.Errorf("%s: %w: %s", c.Name, ErrSkipped, strings.Join(r.lines, "\n"))
	}
	return nil
}

// recorder is a T that remembers.
type recorder struct {
	ctx context.Context

	mu       sync.Mutex
	lines    []string
	failed   bool
	skipped  bool
	cleanups []func()
}

func (r *recorder) Helper()                  {}
func (r *recorder) Context() context.Context { return r.ctx }

func (r *recorder) Cleanup(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cleanups = append(r.cleanups, f)
}

func (r *recorder) note(line string, failed, skipped bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, line)
	r.failed = r.failed || failed
	r.skipped = r.skipped || skipped
}

func (r *recorder) Logf(format string, args ...any) {
	r.note(fmt.Sprintf(format, args...), false, false)
}

func (r *recorder) Errorf(format string, args ...any) {
	r.note(fmt.Sprintf(format, args...), true, false)
}

func (r *recorder) FailNow() {
	r.note("", true, false)
	runtime.Goexit()
}

func (r *recorder) Skip(args ...any) {
	r.note(fmt.Sprint(args...), false, true)
	runtime.Goexit()
}

func (r *recorder) recover() {
	if v := recover(); v != nil {
		r.note(fmt.Sprintf("panic: %v", v), true, false)
	}
}

func (r *recorder) cleanUp() {
	for i := len(r.cleanups) - 1; i >= 0; i-- {
		r.cleanups[i]()
	}
}
