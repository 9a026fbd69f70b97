package nbd

import "slices"

// maxGaps bounds the disjoint pieces that a server may send of one read before it closes the gaps.
const maxGaps = 4096

// span is a half-open range of offsets within one request.
type span struct{ from, to int64 }

// coverage records which bytes of a read have arrived. Chunks in ascending order cost no memory; others
// are kept as disjoint, sorted, merged spans.
type coverage struct {
	head  int64  // bytes 0..head have arrived
	later []span // beyond head
}

// add records from..to. It reports false when the range overlaps one that arrived before, or when the
// reply is in absurdly many pieces.
func (c *coverage) add(from, to int64) bool {
	if from < c.head {
		return false
	}
	if from == c.head && len(c.later) == 0 {
		c.head = to
		return true
	}
	i, found := slices.BinarySearchFunc(c.later, from, func(s span, from int64) int {
		switch {
		case s.from < from:
			return -1
		case s.from > from:
			return 1
		}
		return 0
	})
	if found || (i > 0 && c.later[i-1].to > from) || (i < len(c.later) && c.later[i].from < to) {
		return false
	}
	switch {
	case i > 0 && c.later[i-1].to == from && i < len(c.later) && c.later[i].from == to:
		c.later[i-1].to = c.later[i].to
		c.later = slices.Delete(c.later, i, i+1)
	case i > 0 && c.later[i-1].to == from:
		c.later[i-1].to = to
	case i < len(c.later) && c.later[i].from == to:
		c.later[i].from = from
	case len(c.later) == maxGaps:
		return false
	default:
		c.later = slices.Insert(c.later, i, span{from, to})
	}
	if c.later[0].from == c.head {
		c.head = c.later[0].to
		c.later = slices.Delete(c.later, 0, 1)
	}
	return true
}

// complete reports whether all of 0..length arrived.
func (c *coverage) complete(length int64) bool { return c.head == length && len(c.later) == 0 }
