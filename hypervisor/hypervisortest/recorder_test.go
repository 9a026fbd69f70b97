package hypervisortest

import (
	"fmt"
	"runtime"
	"strings"
	"sync"
	"time"
)

// recorder is a T that takes notes instead of failing a test.
type recorder struct {
	name string

	mu       sync.Mutex
	failed   bool
	skipped  bool
	notes    []string
	cleanups []func()
}

func (r *recorder) Helper()                   {}
func (r *recorder) Name() string              { return r.name }
func (r *recorder) Logf(string, ...any)       {}
func (r *recorder) FailNow()                  { r.fail(""); runtime.Goexit() }
func (r *recorder) Errorf(f string, a ...any) { r.fail(fmt.Sprintf(f, a...)) }

func (r *recorder) Skipf(string, ...any) {
	r.mu.Lock()
	r.skipped = true
	r.mu.Unlock()
	runtime.Goexit()
}

func (r *recorder) Failed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failed
}

func (r *recorder) Cleanup(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cleanups = append(r.cleanups, f)
}

func (r *recorder) fail(note string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = true
	if note = strings.TrimSpace(note); note != "" {
		r.notes = append(r.notes, note)
	}
}

// tooLong is after how long a check counts as hanging.
const tooLong = 20 * time.Second

// alone runs f in a goroutine that it may end, and notes a panic or a hang.
func (r *recorder) alone(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if p := recover(); p != nil {
				r.fail(fmt.Sprintf("panic: %v", p))
			}
		}()
		f()
	}()
	select {
	case <-done:
	case <-time.After(tooLong):
		r.fail("it hangs")
	}
}

// record runs one check to its end, cleanups included.
func record(c check, newHarness func(T) *Harness) *recorder {
	r := &recorder{name: c.name}
	r.alone(func() { runCheck(r, c, newHarness) })
	for {
		r.mu.Lock()
		n := len(r.cleanups)
		if n == 0 {
			r.mu.Unlock()
			return r
		}
		f := r.cleanups[n-1]
		r.cleanups = r.cleanups[:n-1]
		r.mu.Unlock()
		r.alone(f)
	}
}
