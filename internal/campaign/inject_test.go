package campaign_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/internal/journal/journaltest"
)

var errBroken = errors.New("broken on purpose")

// The seams at which a process meets the world.
const (
	seamHypervisor = "hypervisor"
	seamStorage    = "storage"
	seamJournal    = "journal"
)

// site is where calls of one kind are made. Those of a run are counted per site, so
// that the k-th is the same one in each run, whatever the order among goroutines.
type site struct {
	seam string
	op   string // kind of the call
	what string // VM and disk, or the class of a blob; of a target also "*": the first of any
}

// kind is the site without its object.
func (s site) kind() string { return s.seam + " " + s.op }

// target is one call.
type target struct {
	site
	n int // of the calls at the site, from 1
}

func (x target) String() string { return fmt.Sprintf("%s|%s|%s#%d", x.seam, x.op, x.what, x.n) }

// mode is a way to fail.
type mode string

const (
	failBefore mode = "before"      // once, without effect
	failAfter  mode = "after"       // once, the effect is there and the answer is lost
	persistent mode = "persistent"  // this call and all later ones of its kind
	short      mode = "short"       // half of the bytes, then an error
	hang       mode = "hang"        // until somebody gives up, a second later
	cancels    mode = "cancel"      // the user gives up as the call begins
	delay      mode = "delay"       // half a minute late
	killBefore mode = "kill-before" // the process is gone
	killAfter  mode = "kill-after"  // the process is gone when the call has had its effect
	torn       mode = "torn"        // killed in the middle of a write
	lost       mode = "lost"        // the power fails: what was not synced is lost
	stale      mode = "stale"       // a list misses the last change
)

// modes are the ways in which a call of the site can fail.
func (s site) modes() []mode {
	out := []mode{failBefore, failAfter, persistent, killBefore, killAfter}
	switch s.seam {
	case seamJournal:
		if s.op == string(journaltest.OpWrite) {
			out = append(out, short, torn)
		}
		return append(out, lost)
	case seamStorage:
		switch fakes.StoreOpKind(s.op) {
		case fakes.StorePut:
			// Storage that tears what decides is refused: only content may be cut short.
			if tears(s.what) {
				out = append(out, torn)
			}
		case fakes.StoreList:
			out = append(out, stale)
		}
	case seamHypervisor:
		switch fakes.Op(s.op) {
		case fakes.OpReadAt, fakes.OpReadHole, fakes.OpWriteAt, fakes.OpReadAttachment:
			out = append(out, short)
		}
	}
	return append(out, hang, cancels, delay)
}

// tears says whether storage may cut blobs of a class short.
func tears(what string) bool {
	return slices.Contains([]string{"blocks/", "maps/", "disks/", "files/"}, what)
}

// injector counts the calls of a process and lets one of them fail. The zero value
// counts.
type injector struct {
	target target
	mode   mode
	cancel context.CancelFunc // of the work of the process
	kill   func()             // ends the process

	// A second fault strikes so many calls after the first: which way, the roll
	// decides among those that the call has. Zero calls: there is none.
	then int
	roll uint64

	// latency is how long each call takes; a cancellation comes in the middle of it.
	latency time.Duration

	// watch sees every call before it is made, storage operations with what they are.
	watch func(*fakes.StoreOp)

	mu     sync.Mutex
	second mode      // of the second fault, once it has struck
	gave   time.Time // when the user gave up
	last   time.Time // when data began to move last, after that
	seen   map[site]int
	trace  []target
	hit    bool
	dead   bool
}

// next counts a call and returns the mode that strikes it, if any.
func (in *injector) next(s site) mode {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.dead {
		return killBefore
	}
	if in.seen == nil {
		in.seen = map[site]int{}
	}
	in.seen[s]++
	x := target{s, in.seen[s]}
	in.trace = append(in.trace, x)
	if !in.gave.IsZero() && s.moves() {
		in.last = clock.Real().Now()
	}
	if in.hit && in.then > 0 && x != in.target {
		if in.then--; in.then == 0 {
			ways := s.modes()
			in.second = ways[in.roll%uint64(len(ways))]
			return in.second
		}
	}
	switch {
	case in.mode == "":
		return ""
	case x == in.target, in.target.what == "*" && !in.hit && s.kind() == in.target.kind():
		in.hit = true
	case in.mode == persistent && in.hit && s.kind() == in.target.kind():
	default:
		return ""
	}
	return in.mode
}

func (in *injector) look(op *fakes.StoreOp) {
	if in.watch != nil {
		in.watch(op)
	}
}

// mark makes every later call fail.
func (in *injector) mark() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.dead = true
}

// die ends the process.
func (in *injector) die() {
	in.mark()
	in.kill()
}

// wasKilled tells whether the process is gone.
func (in *injector) wasKilled() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.dead
}

func (in *injector) wasHit() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.hit
}

const (
	patience = time.Second      // of the user before a call that hangs
	lateness = 30 * time.Second // of a call that is delayed
)

func (in *injector) giveUp() { time.AfterFunc(patience, in.cancelled) }

// cancelNow is the user giving up as a call begins, or in the middle of it.
func (in *injector) cancelNow() {
	if in.latency > 0 {
		time.AfterFunc(in.latency/2, in.cancelled)
		return
	}
	in.cancelled()
}

func (in *injector) cancelled() {
	in.mu.Lock()
	in.gave = clock.Real().Now()
	in.mu.Unlock()
	in.cancel()
}

// moves says whether a call moves the data of a disk, or begins to.
func (s site) moves() bool {
	switch s.seam {
	case seamHypervisor:
		return slices.Contains([]fakes.Op{
			fakes.OpCreateSnapshot, fakes.OpExtents, fakes.OpOpenDisk, fakes.OpReadAt, fakes.OpReadHole, fakes.OpStream,
			fakes.OpNextStream, fakes.OpCreateVM, fakes.OpOpenDiskWriter, fakes.OpWriteAt, fakes.OpWriteZeroes,
		}, fakes.Op(s.op))
	case seamStorage:
		return s.what == "blocks/" || s.what == "maps/" || s.what == "files/" || s.what == "disks/"
	}
	return false
}

// Inject implements fakes.Injector.
func (in *injector) Inject(c fakes.Call) fakes.Fault {
	in.look(nil)
	what := strings.Trim(string(c.VM)+" "+string(c.Disk), " ")
	switch in.next(site{seamHypervisor, string(c.Op), what}) {
	case failBefore, persistent:
		return fakes.Fault{Err: errBroken}
	case failAfter:
		return fakes.Fault{Err: errBroken, After: true}
	case short:
		return fakes.Fault{Err: errBroken, Short: true}
	case hang:
		return fakes.Fault{Do: in.giveUp, Hang: true}
	case cancels:
		return fakes.Fault{Do: in.cancelNow, Delay: in.latency, Clock: clock.Real()}
	case delay:
		return fakes.Fault{Delay: lateness, Clock: clock.Real()}
	case killBefore:
		return fakes.Fault{Do: in.die, Err: fakes.ErrKilled}
	case killAfter:
		return fakes.Fault{Do: in.die, Err: fakes.ErrKilled, After: true}
	}
	return fakes.Fault{Delay: in.latency, Clock: clock.Real()}
}

// class is the part of a blob's name that is the same in every run.
func class(name string) string {
	head, _, ok := strings.Cut(name, "/")
	if !ok {
		return name
	}
	return head + "/"
}

// storage is a fakes.StoreHook.
func (in *injector) storage(ctx context.Context, op fakes.StoreOp) fakes.StoreFault {
	in.look(&op)
	switch in.next(site{seamStorage, string(op.Kind), class(op.Name)}) {
	case failBefore, persistent:
		return fakes.StoreFault{Err: errBroken}
	case failAfter:
		return fakes.StoreFault{Err: errBroken, After: true}
	case hang:
		in.giveUp()
		return fakes.StoreFault{Hang: true}
	case cancels:
		in.cancelNow()
		_ = clock.Sleep(ctx, clock.Real(), in.latency)
	case delay:
		_ = clock.Sleep(ctx, clock.Real(), lateness) // its end is the operation's
	case killBefore:
		in.die()
		return fakes.StoreFault{Kill: true}
	case killAfter:
		in.die()
		return fakes.StoreFault{Kill: true, After: true}
	case torn:
		in.die()
		return fakes.StoreFault{Torn: true}
	case stale:
		return fakes.StoreFault{Stale: true}
	default:
		_ = clock.Sleep(ctx, clock.Real(), in.latency)
	}
	return fakes.StoreFault{}
}

// journal is a journaltest.Hook.
func (in *injector) journal(op journaltest.Op) journaltest.Fault {
	in.look(nil)
	what := strings.TrimPrefix(filepath.Ext(op.Name), ".")
	switch in.next(site{seamJournal, string(op.Kind), what}) {
	case failBefore, persistent:
		return journaltest.Fault{Err: errBroken}
	case failAfter:
		return journaltest.Fault{Err: errBroken, After: true}
	case short:
		return journaltest.Fault{Err: errBroken, Short: true}
	case killBefore, lost:
		in.die()
	case killAfter:
		in.mark()
		return journaltest.Fault{Kill: true, After: true}
	case torn:
		in.mark()
		return journaltest.Fault{Kill: true, Short: true}
	}
	return journaltest.Fault{}
}
