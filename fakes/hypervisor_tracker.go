package fakes

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// tracker knows for each granule of a disk in which generation it changed last.
// A generation begins with every snapshot, so one map answers for all of them.
type tracker struct {
	granularity int64
	gen         int64           // generation that writes belong to now
	changed     map[int64]int64 // granule -> generation of its last change
	epoch       int             // grows when the platform forgets what it knew
	lost        hypervisor.Reason
	lie         float64 // share of the changes that are dropped
}

func newTracker(granularity int64) *tracker {
	return &tracker{granularity: granularity, gen: 1, changed: map[int64]int64{}}
}

// mark notes a change. rnd gives numbers in [0,1) for a tracker that lies.
func (t *tracker) mark(off, n int64, rnd func() float64) {
	if n <= 0 {
		return
	}
	for g := off / t.granularity; g <= (off+n-1)/t.granularity; g++ {
		if t.lie > 0 && rnd() < t.lie {
			continue
		}
		t.changed[g] = t.gen
	}
}

// lose forgets everything, for a reason that baselines are then refused with.
func (t *tracker) lose(reason hypervisor.Reason) {
	t.epoch++
	t.lost = reason
	clear(t.changed)
}

// cut ends a generation and returns its number: changes after it are newer.
func (t *tracker) cut() int64 {
	t.gen++
	return t.gen - 1
}

// since returns what changed after generation gen, clipped to size.
func (t *tracker) since(gen, size int64) []hypervisor.Extent {
	var granules []int64
	for g, at := range t.changed {
		if at > gen && g*t.granularity < size {
			granules = append(granules, g)
		}
	}
	slices.Sort(granules)
	var out []hypervisor.Extent
	for _, g := range granules {
		end := min(size, (g+1)*t.granularity)
		out = appendExtent(out, hypervisor.Extent{Offset: g * t.granularity, Length: end - g*t.granularity})
	}
	return out
}

// anchor is what the token of a baseline says.
type anchor struct {
	content string
	epoch   int
	gen     int64
	size    int64
}

func (a anchor) token() string {
	return fmt.Sprintf("fake/%s/%d/%d/%d", a.content, a.epoch, a.gen, a.size)
}

func parseAnchor(token string) (anchor, error) {
	f := strings.Split(token, "/")
	if len(f) != 5 || f[0] != "fake" {
		return anchor{}, fmt.Errorf("%q is not a token of this platform", token)
	}
	epoch, err1 := strconv.Atoi(f[2])
	gen, err2 := strconv.ParseInt(f[3], 10, 64)
	size, err3 := strconv.ParseInt(f[4], 10, 64)
	for _, err := range []error{err1, err2, err3} {
		if err != nil {
			return anchor{}, fmt.Errorf("%q is not a token of this platform: %w", token, err)
		}
	}
	return anchor{content: f[1], epoch: epoch, gen: gen, size: size}, nil
}
