// Package retention decides which restore points to keep: the newest ones, and
// the newest of each hour, day, week, month and year, as backup administrators
// know it from grandfather-father-son rotation. It is pure: it reads no clock and
// deletes nothing.
//
// # Rules
//
// Chains are planned one by one. The points of a chain are walked from the newest
// to the oldest, by Created, then by Sequence. Last keeps the first so many of
// them. Hourly keeps the newest point of each of the first so many calendar hours
// that have a point at all, and so do the others with days, ISO weeks (they begin
// on Monday), months and years, in the location given. Periods without a point do
// not count: a machine that was off for a month loses nothing. A point is kept if
// any rule keeps it, and rules do not know of each other, which is how restic
// counts. (Proxmox Backup Server lets a rule begin where the one before it ended,
// and so keeps more for the same numbers.)
//
// Three guards go beyond it. A point that is not Committed is never counted as
// kept in a period, since it cannot be restored, and never proposed for deletion,
// since its disappearance would hide the damage. A point from the future is kept
// and does not count either: a wrong clock must not push out good points. And the
// newest Committed point of a chain is always kept.
package retention

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/repository"
)

// Policy says how many points to keep by each rule. Zero switches a rule off; a
// Policy of zeros is refused. Numbers below zero are refused.
type Policy struct {
	Last    int // newest points, whatever their time
	Hourly  int // newest point of each hour
	Daily   int
	Weekly  int // ISO weeks
	Monthly int
	Yearly  int
}

// Reason says why a point is kept.
type Reason string

// Reasons to keep a point.
const (
	Last    Reason = "last"
	Hourly  Reason = "hourly"
	Daily   Reason = "daily"
	Weekly  Reason = "weekly"
	Monthly Reason = "monthly"
	Yearly  Reason = "yearly"

	Newest    Reason = "newest"    // the newest committed point of its chain
	Future    Reason = "future"    // created after now
	Untouched Reason = "untouched" // not committed: vanished or untrusted
)

// Decision is what the policy says of one point.
type Decision struct {
	Point   *repository.Point
	Keep    bool
	Reasons []Reason // why it is kept, in the order of the constants; empty if it is not
}

// ErrPolicy is what an unusable policy is refused with.
var ErrPolicy = errors.New("unusable retention policy")

// Validate returns an error that matches ErrPolicy if the policy keeps nothing or
// has a negative number.
func (p Policy) Validate() error {
	sum := 0
	for _, r := range p.rules() {
		if r.keep < 0 {
			return fmt.Errorf("%w: keep %d %s", ErrPolicy, r.keep, r.reason)
		}
		sum = max(sum, r.keep)
	}
	if sum == 0 {
		return fmt.Errorf("%w: it keeps nothing", ErrPolicy)
	}
	return nil
}

// period identifies a calendar period within its rule.
type period [4]int

type rule struct {
	reason Reason
	keep   int
	of     func(t time.Time) period // nil: each point is a period of its own
}

func (p Policy) rules() []rule {
	return []rule{
		{Last, p.Last, nil},
		{Hourly, p.Hourly, hour},
		{Daily, p.Daily, func(t time.Time) period { return period{t.Year(), t.YearDay()} }},
		{Weekly, p.Weekly, func(t time.Time) period { y, w := t.ISOWeek(); return period{y, w} }},
		{Monthly, p.Monthly, func(t time.Time) period { return period{t.Year(), int(t.Month())} }},
		{Yearly, p.Yearly, func(t time.Time) period { return period{t.Year()} }},
	}
}

// hour tells the two hours apart that have one name when clocks are set back.
func hour(t time.Time) period {
	_, offset := t.Zone()
	return period{t.Year(), t.YearDay(), t.Hour(), offset}
}

// Plan decides for each point, in the order given. now is the present; calendar
// periods are those of its location. Neither points nor what they point to is
// changed. The only error is one that matches ErrPolicy.
func Plan(points []*repository.Point, policy Policy, now time.Time) ([]Decision, error) {
	if err := policy.Validate(); err != nil {
		return nil, err
	}
	out := make([]Decision, len(points))
	chains := map[string][]*Decision{}
	for i, p := range points {
		out[i].Point = p
		chains[p.Chain] = append(chains[p.Chain], &out[i])
	}
	for _, chain := range chains {
		planChain(chain, policy, now)
	}
	for i := range out {
		out[i].Keep = len(out[i].Reasons) > 0
	}
	return out, nil
}

func planChain(chain []*Decision, policy Policy, now time.Time) {
	slices.SortStableFunc(chain, func(a, b *Decision) int {
		if c := b.Point.Created.Compare(a.Point.Created); c != 0 {
			return c
		}
		return cmp.Compare(b.Point.Sequence, a.Point.Sequence)
	})
	var count []*Decision // what the rules apply to, newest first
	for _, d := range chain {
		switch {
		case d.Point.State != repository.Committed:
			d.Reasons = append(d.Reasons, Untouched)
		case d.Point.Created.After(now):
			d.Reasons = append(d.Reasons, Future)
		default:
			count = append(count, d)
		}
	}
	for _, r := range policy.rules() {
		r.apply(count, now.Location())
	}
	// A future point is kept anyway, but its time is a lie: the newest one that
	// counts is kept as well.
	if len(count) > 0 {
		count[0].Reasons = append(count[0].Reasons, Newest)
	}
}

// apply marks what the rule keeps of points that are sorted from newest to oldest.
func (r rule) apply(sorted []*Decision, loc *time.Location) {
	var last period
	kept := 0
	for i, d := range sorted {
		if kept == r.keep {
			return
		}
		if r.of != nil {
			in := r.of(d.Point.Created.In(loc))
			if i > 0 && in == last {
				continue
			}
			last = in
		}
		d.Reasons = append(d.Reasons, r.reason)
		kept++
	}
}
