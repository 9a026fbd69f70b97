package extent

import (
	"iter"
	"math"
)

// Check passes s through unchanged, also where ranges touch, until a range is not well formed or
// reaches beyond size: then it yields an *Error and ends.
func Check(s Seq, size int64) Seq {
	return func(yield func(Range, error) bool) {
		var end int64
		for r, err := range s {
			if err == nil {
				err = check(r, end, size)
			}
			if err != nil {
				yield(Range{}, err)
				return
			}
			if !yield(r, nil) {
				return
			}
			end = r.End()
		}
	}
}

// Merge yields the canonical form of s: ranges that overlap or touch become one. Unlike the other
// streams s may overlap itself and hold empty ranges; only its offsets must not descend.
func Merge(s Seq) Seq {
	return func(yield func(Range, error) bool) {
		e := joiner{yield: yield}
		var last int64
		for r, err := range s {
			if err == nil && (r.Len != 0 || r.Off < 0) {
				err = check(r, last, math.MaxInt64)
			}
			if err != nil {
				yield(Range{}, err)
				return
			}
			if r.Len == 0 {
				continue
			}
			if !e.add(r) {
				return
			}
			last = r.Off
		}
		e.flush()
	}
}

// Union yields the bytes that are in a or in b.
func Union(a, b Seq) Seq {
	return combine(a, b, func(x, y *cursor, e *joiner) bool {
		for x.ok || y.ok {
			c := x
			if !x.ok || (y.ok && y.cur.Off < x.cur.Off) {
				c = y
			}
			if !e.add(c.cur) {
				return false
			}
			c.advance()
		}
		return true
	})
}

// Intersect yields the bytes that are both in a and in b. It does not read further than it must:
// what follows the end of the shorter stream is not validated.
func Intersect(a, b Seq) Seq {
	return combine(a, b, func(x, y *cursor, e *joiner) bool {
		for x.ok && y.ok {
			off, end := max(x.cur.Off, y.cur.Off), min(x.cur.End(), y.cur.End())
			if off < end && !e.add(Range{off, end - off}) {
				return false
			}
			if x.cur.End() <= y.cur.End() {
				x.advance()
			} else {
				y.advance()
			}
		}
		return true
	})
}

// Subtract yields the bytes that are in a and not in b. What follows the end of a in b is not
// validated.
func Subtract(a, b Seq) Seq {
	return combine(a, b, func(x, y *cursor, e *joiner) bool {
		for x.ok {
			for y.ok && y.cur.End() <= x.cur.Off {
				y.advance()
			}
			if y.err != nil {
				return true
			}
			if !y.ok || y.cur.Off >= x.cur.End() {
				if !e.add(x.cur) {
					return false
				}
				x.advance()
				continue
			}
			if y.cur.Off > x.cur.Off && !e.add(Range{x.cur.Off, y.cur.Off - x.cur.Off}) {
				return false
			}
			if y.cur.End() >= x.cur.End() {
				x.advance()
			} else {
				x.cur = Range{y.cur.End(), x.cur.End() - y.cur.End()}
			}
		}
		return true
	})
}

// Complement yields the bytes of a disk of size bytes that are not in s.
func Complement(s Seq, size int64) Seq {
	if size <= 0 {
		return Subtract(Of(), s)
	}
	return Subtract(Of(Range{0, size}), Check(s, size))
}

// combine runs op over validated cursors of a and b and reports the first error of either.
func combine(a, b Seq, op func(x, y *cursor, e *joiner) bool) Seq {
	return func(yield func(Range, error) bool) {
		x, y := pull(a), pull(b)
		defer x.stop()
		defer y.stop()
		e := joiner{yield: yield}
		x.advance()
		y.advance()
		if x.err == nil && y.err == nil && !op(x, y, &e) {
			return
		}
		if x.err != nil {
			yield(Range{}, x.err)
			return
		}
		if y.err != nil {
			yield(Range{}, y.err)
			return
		}
		e.flush()
	}
}

// cursor is one well-formed stream, pulled.
type cursor struct {
	next func() (Range, error, bool)
	stop func()
	cur  Range // the current range, shortened from the left by Subtract
	end  int64 // end of the current range as it came
	ok   bool  // cur is valid
	err  error
}

func pull(s Seq) *cursor {
	c := &cursor{}
	c.next, c.stop = iter.Pull2(s)
	return c
}

func (c *cursor) advance() {
	r, err, ok := c.next()
	if ok && err == nil {
		err = check(r, c.end, math.MaxInt64)
	}
	if !ok || err != nil {
		c.ok, c.err = false, err
		return
	}
	c.cur, c.end, c.ok = r, r.End(), true
}

// joiner yields ranges of ascending offset as canonical ones, one behind.
type joiner struct {
	yield func(Range, error) bool
	cur   Range
	has   bool
}

func (j *joiner) add(r Range) bool {
	if j.has && r.Off <= j.cur.End() {
		j.cur.Len = max(j.cur.End(), r.End()) - j.cur.Off
		return true
	}
	if j.has && !j.yield(j.cur, nil) {
		j.has = false
		return false
	}
	j.cur, j.has = r, true
	return true
}

func (j *joiner) flush() {
	if j.has {
		j.yield(j.cur, nil)
	}
}
