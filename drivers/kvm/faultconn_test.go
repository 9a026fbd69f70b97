package kvm

import (
	"context"
	"errors"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
)

var errPlanted = errors.New("planted")

// how a call fails.
type how int

const (
	before   how = iota // it has no effect
	after               // its answer is lost
	canceled            // the caller gives up as it begins
)

func (h how) String() string {
	return [...]string{"before its effect", "after its effect", "is canceled"}[h]
}

// faults makes the call number at fail, and keeps the contexts that it was given.
type faults struct {
	mu       sync.Mutex
	n, at    int // at 0: none
	how      how
	what     string // what failed
	cancel   context.CancelFunc
	contexts []context.Context
}

// arm lets the k-th call from now on fail.
func (f *faults) arm(k int, h how, cancel context.CancelFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n, f.at, f.how, f.cancel, f.what, f.contexts = 0, k, h, cancel, "", nil
}

// disarm ends the faults and returns what failed, "" if nothing did.
func (f *faults) disarm() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.at = 0
	return f.what
}

// unfinished counts contexts that were made for a call and that nobody has ended. roots
// are those of the caller.
func (f *faults) unfinished(roots ...context.Context) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, ctx := range f.contexts {
		theirs := slices.ContainsFunc(roots, func(r context.Context) bool { return r.Done() == ctx.Done() })
		if !theirs && ctx.Done() != nil && ctx.Err() == nil {
			n++
		}
	}
	return n
}

// onTheWay are functions of the driver that do not give up when a call fails. What they
// call is named after them.
var onTheWay = map[string]string{
	"(*Driver).thawUntil": "thaw", "(*Driver).shutDown1": "clean end", "(*snapshot).lost": "look", "(*Driver).stopStarted": "stop",
	"(*snapshot).guard": "guard", "(*Driver).attachments": "attachments", "(*Driver).roomForBitmaps": "room", "(*diskWriter).Close": "close",
}

// asks are calls without an effect: that their answer is lost is no other case.
var asks = regexp.MustCompile(`(domainXML|state|persistent|managedSave|capacity|checkpoints|checkpointXML|backupXML|jobType|jobOperation|` +
	`blockJob|lookupName|domains|versions|hostname|networkExists|poolXML|file (stat|lstat|readDir|space|Read|ReadAt|Seek))$`)

// way names the function on whose behalf a call is made.
func way() string {
	pcs := make([]uintptr, 32)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(3, pcs)])
	for {
		frame, more := frames.Next()
		for name, short := range onTheWay {
			if strings.HasSuffix(frame.Function, name) {
				return short + ": "
			}
		}
		if !more {
			return ""
		}
	}
}

// call does effect, or fails.
func call[T any](ctx context.Context, f *faults, name string, effect func() (T, error)) (T, error) {
	f.mu.Lock()
	f.n++
	f.contexts = append(f.contexts, ctx)
	hit := f.at > 0 && f.n == f.at
	if hit {
		f.what = way() + name
	}
	h, cancel := f.how, f.cancel
	f.mu.Unlock()
	var zero T
	switch {
	case !hit:
		return effect()
	case h == after:
		_, _ = effect() // its answer is lost
	case h == canceled:
		cancel()
		if ctx.Err() == nil { // a cleanup of its own time goes on
			return effect()
		}
		return zero, ctx.Err()
	}
	return zero, errPlanted
}

func do(ctx context.Context, f *faults, name string, effect func() error) error {
	_, err := call(ctx, f, name, func() (struct{}, error) { return struct{}{}, effect() })
	return err
}

// sleep ends at once for pauses between looks, and with its context where the driver
// waits for something that should not come.
func (f *faults) sleep(ctx context.Context, d time.Duration) error {
	f.mu.Lock()
	f.contexts = append(f.contexts, ctx)
	f.mu.Unlock()
	if d != pollPause && d != thawRetry {
		<-ctx.Done()
	}
	return ctx.Err()
}

// faultConn is a connection one of whose calls fails.
type faultConn struct {
	*fakeConn
	f      *faults
	closed int
}

type pair[A, B any] struct {
	a A
	b B
}

func two[A, B any](ctx context.Context, f *faults, name string, effect func() (A, B, error)) (A, B, error) {
	p, err := call(ctx, f, name, func() (pair[A, B], error) {
		a, b, err := effect()
		return pair[A, B]{a, b}, err
	})
	return p.a, p.b, err
}

func (c *faultConn) versions(ctx context.Context) (uint64, uint64, error) {
	return two(ctx, c.f, "versions", func() (uint64, uint64, error) { return c.fakeConn.versions(ctx) })
}

func (c *faultConn) hostname(ctx context.Context) (string, error) {
	return call(ctx, c.f, "hostname", func() (string, error) { return c.fakeConn.hostname(ctx) })
}

func (c *faultConn) domains(ctx context.Context) ([]string, error) {
	return call(ctx, c.f, "domains", func() ([]string, error) { return c.fakeConn.domains(ctx) })
}

func (c *faultConn) lookupName(ctx context.Context, name string) (string, error) {
	return call(ctx, c.f, "lookupName", func() (string, error) { return c.fakeConn.lookupName(ctx, name) })
}

func (c *faultConn) domainXML(ctx context.Context, uuid string, flags uint32) (string, error) {
	return call(ctx, c.f, "domainXML", func() (string, error) { return c.fakeConn.domainXML(ctx, uuid, flags) })
}

func (c *faultConn) state(ctx context.Context, uuid string) (int, int, error) {
	return two(ctx, c.f, "state", func() (int, int, error) { return c.fakeConn.state(ctx, uuid) })
}

func (c *faultConn) persistent(ctx context.Context, uuid string) (bool, error) {
	return call(ctx, c.f, "persistent", func() (bool, error) { return c.fakeConn.persistent(ctx, uuid) })
}

func (c *faultConn) managedSave(ctx context.Context, uuid string) (bool, error) {
	return call(ctx, c.f, "managedSave", func() (bool, error) { return c.fakeConn.managedSave(ctx, uuid) })
}

func (c *faultConn) capacity(ctx context.Context, uuid, disk string) (int64, error) {
	return call(ctx, c.f, "capacity", func() (int64, error) { return c.fakeConn.capacity(ctx, uuid, disk) })
}

func (c *faultConn) define(ctx context.Context, xml string) (string, error) {
	return call(ctx, c.f, "define", func() (string, error) { return c.fakeConn.define(ctx, xml) })
}

func (c *faultConn) undefine(ctx context.Context, uuid string, flags uint32) error {
	return do(ctx, c.f, "undefine", func() error { return c.fakeConn.undefine(ctx, uuid, flags) })
}

func (c *faultConn) start(ctx context.Context, uuid string, flags uint32) error {
	return do(ctx, c.f, "start", func() error { return c.fakeConn.start(ctx, uuid, flags) })
}

func (c *faultConn) destroy(ctx context.Context, uuid string) error {
	return do(ctx, c.f, "destroy", func() error { return c.fakeConn.destroy(ctx, uuid) })
}

func (c *faultConn) shutdown(ctx context.Context, uuid string) error {
	return do(ctx, c.f, "shutdown", func() error { return c.fakeConn.shutdown(ctx, uuid) })
}

func (c *faultConn) resume(ctx context.Context, uuid string) error {
	return do(ctx, c.f, "resume", func() error { return c.fakeConn.resume(ctx, uuid) })
}

func (c *faultConn) setMetadata(ctx context.Context, uuid, xml string, flags uint32) error {
	return do(ctx, c.f, "setMetadata", func() error { return c.fakeConn.setMetadata(ctx, uuid, xml, flags) })
}

func (c *faultConn) jobType(ctx context.Context, uuid string) (int, error) {
	return call(ctx, c.f, "jobType", func() (int, error) { return c.fakeConn.jobType(ctx, uuid) })
}

func (c *faultConn) jobOperation(ctx context.Context, uuid string) (int, error) {
	return call(ctx, c.f, "jobOperation", func() (int, error) { return c.fakeConn.jobOperation(ctx, uuid) })
}

func (c *faultConn) abortJob(ctx context.Context, uuid string) error {
	return do(ctx, c.f, "abortJob", func() error { return c.fakeConn.abortJob(ctx, uuid) })
}

func (c *faultConn) blockJob(ctx context.Context, uuid, disk string) (int, bool, error) {
	return two(ctx, c.f, "blockJob", func() (int, bool, error) { return c.fakeConn.blockJob(ctx, uuid, disk) })
}

func (c *faultConn) backupBegin(ctx context.Context, uuid, job, cp string, flags uint32) error {
	return do(ctx, c.f, "backupBegin", func() error { return c.fakeConn.backupBegin(ctx, uuid, job, cp, flags) })
}

func (c *faultConn) backupXML(ctx context.Context, uuid string) (string, error) {
	return call(ctx, c.f, "backupXML", func() (string, error) { return c.fakeConn.backupXML(ctx, uuid) })
}

func (c *faultConn) checkpoints(ctx context.Context, uuid string) ([]string, error) {
	return call(ctx, c.f, "checkpoints", func() ([]string, error) { return c.fakeConn.checkpoints(ctx, uuid) })
}

func (c *faultConn) checkpointXML(ctx context.Context, uuid, name string, flags uint32) (string, error) {
	return call(ctx, c.f, "checkpointXML", func() (string, error) { return c.fakeConn.checkpointXML(ctx, uuid, name, flags) })
}

func (c *faultConn) checkpointCreate(ctx context.Context, uuid, xml string, flags uint32) error {
	return do(ctx, c.f, "checkpointCreate", func() error { return c.fakeConn.checkpointCreate(ctx, uuid, xml, flags) })
}

func (c *faultConn) checkpointDelete(ctx context.Context, uuid, name string, flags uint32) error {
	return do(ctx, c.f, "checkpointDelete", func() error { return c.fakeConn.checkpointDelete(ctx, uuid, name, flags) })
}

func (c *faultConn) agent(ctx context.Context, uuid, command string, timeout int) (string, error) {
	return call(ctx, c.f, "agent "+command, func() (string, error) { return c.fakeConn.agent(ctx, uuid, command, timeout) })
}

func (c *faultConn) monitor(ctx context.Context, uuid, command string) (string, error) {
	return call(ctx, c.f, "monitor "+command, func() (string, error) { return c.fakeConn.monitor(ctx, uuid, command) })
}

func (c *faultConn) networkExists(ctx context.Context, name string) (bool, error) {
	return call(ctx, c.f, "networkExists", func() (bool, error) { return c.fakeConn.networkExists(ctx, name) })
}

func (c *faultConn) poolXML(ctx context.Context, name string) (string, error) {
	return call(ctx, c.f, "poolXML", func() (string, error) { return c.fakeConn.poolXML(ctx, name) })
}

func (c *faultConn) close() error {
	c.closed++
	return nil
}
