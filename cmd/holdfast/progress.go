package main

import (
	"fmt"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// plainEvery is how often progress of a disk is printed where there are no bars.
const plainEvery = 10 * time.Second

// plainLines prints what happens line by line, for logs.
type plainLines struct {
	p     *program
	brief bool // notices alone: a program listens, or the outcome says it all
	limit limiter
}

func (l *plainLines) watch(e event) {
	if l.brief && e.Event != eventNotice {
		return
	}
	switch e.Event {
	case eventProgress:
		if l.limit.pass(e) {
			l.p.note(fmt.Sprintf("%s: %s: %s of %s", e.VM, e.Disk, share(*e.Done, *e.Size), bytesText(*e.Size)))
		}
	default:
		if s := plainText(e); s != "" {
			l.p.note(s)
		}
	}
}

func (l *plainLines) end() {}

// plainText is an event for a person; empty: nothing worth a line.
func plainText(e event) string {
	switch e.Event {
	case eventDisk:
		s := fmt.Sprintf("%s: %s: %s (%s), %s", e.VM, e.Disk, e.Mode, e.Reason, bytesText(*e.Size))
		if e.Detail != "" {
			s += ": " + e.Detail
		}
		return s
	case eventAudit:
		if *e.Wrong > 0 {
			return fmt.Sprintf("%s: %s: the change tracking LIED: %d of %d samples of what it called unchanged have changed", e.VM, e.Disk, *e.Wrong, *e.Leaves)
		}
	case eventNotice:
		return e.VM + ": " + e.Text
	}
	return ""
}

// bars draws a progress bar per disk on a terminal.
type bars struct {
	p    *program
	keep bool // bars stay on the screen when they are complete
	mu   sync.Mutex
	mpb  *mpb.Progress
	bars map[string]*bar
}

type bar struct {
	*mpb.Bar
	size int64
}

func newBars(p *program, keep bool) *bars {
	return &bars{p: p, keep: keep, mpb: mpb.New(mpb.WithOutput(p.stderr), mpb.WithWidth(78)), bars: map[string]*bar{}}
}

func (b *bars) watch(e event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch e.Event {
	case eventDisk:
		if e.Mode == "full" || e.Mode == "incremental" {
			b.bar(e).SetCurrent(0)
			return
		}
		b.print(plainText(e))
	case eventProgress:
		b.bar(e).SetCurrent(*e.Done)
	case eventNotice, eventAudit:
		if s := plainText(e); s != "" {
			b.print(s)
		}
	case eventStage:
		if e.Stage == "transfer" && e.State == stateExit {
			b.finish(e.Error == "")
		}
	}
}

// bar returns the bar of a disk, and draws it if it is not there yet.
func (b *bars) bar(e event) *bar {
	key := e.VM + "/" + e.Disk
	if x := b.bars[key]; x != nil {
		return x
	}
	label := e.VM + " " + e.Disk
	if e.Mode != "" {
		label += " " + e.Mode
	}
	x := &bar{size: *e.Size, Bar: b.mpb.New(*e.Size, mpb.BarStyle().Lbound("[").Filler("=").Tip(">").Padding(" ").Rbound("]"),
		mpb.PrependDecorators(decor.Name(printable(label), decor.WCSyncSpaceR)),
		mpb.AppendDecorators(
			decor.Percentage(decor.WC{W: 5}),
			decor.Name(" of "+bytesText(*e.Size), decor.WCSyncSpaceR),
			decor.OnComplete(decor.AverageETA(decor.ET_STYLE_GO, decor.WC{W: 6}), " done"),
		),
		mpb.BarOptional(mpb.BarRemoveOnComplete(), !b.keep),
	)}
	b.bars[key] = x
	return x
}

// finish fills the bars of work that is done, and drops those of work that failed.
func (b *bars) finish(ok bool) {
	for _, x := range b.bars {
		if ok {
			x.SetTotal(x.size, true)
		} else {
			x.Abort(true)
		}
	}
}

// print writes a line above the bars.
func (b *bars) print(s string) {
	if _, err := b.mpb.Write([]byte(printable(s) + "\n")); err != nil {
		b.p.note(s)
	}
}

// end draws the bars for the last time.
func (b *bars) end() {
	b.mu.Lock()
	b.finish(false) // those that are complete stay
	b.mu.Unlock()
	b.mpb.Wait()
}
