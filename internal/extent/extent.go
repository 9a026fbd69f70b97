// Package extent is the algebra of byte ranges: what a disk holds, what changed, what is left.
//
// A list or stream of ranges is well formed when every range is non-empty, starts at or after
// zero, ends at or before [math.MaxInt64], and begins at or after the end of the range before it.
// It is canonical when, in addition, no two ranges touch. Everything in this package that yields
// ranges yields canonical ones.
//
// Streams are [Seq] values. They follow the rule of the hypervisor contract: an error comes last
// and voids everything yielded before it. The stream functions hold a constant amount of memory,
// so a disk with ten million extents costs what a disk with one costs; only [Collect] and
// [Normalise] hold a whole list. A stream made from single-use streams is single-use.
//
// All functions are pure and may be called concurrently.
package extent

import (
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
)

// Range is Len bytes from byte offset Off. The zero value is the empty range at 0.
type Range struct {
	Off int64 // first byte
	Len int64 // number of bytes
}

// End returns the offset of the first byte after r. It is meaningful only for a range that
// passes validation; for others it may overflow.
func (r Range) End() int64 { return r.Off + r.Len }

// String formats r as [offset,+length).
func (r Range) String() string { return fmt.Sprintf("[%d,+%d)", r.Off, r.Len) }

// Seq is a stream of ranges. A non-nil error is the last pair of the stream; its range is void.
type Seq = iter.Seq2[Range, error]

// Conditions that an *Error wraps.
var (
	ErrEmpty     = errors.New("empty range")
	ErrNegative  = errors.New("negative offset or length")
	ErrOverflow  = errors.New("end of range exceeds the largest offset")
	ErrOrder     = errors.New("range begins before the end of its predecessor")
	ErrOutside   = errors.New("range reaches outside the disk")
	ErrBlockSize = errors.New("block size or disk size is not usable")
)

// Error says which range was refused and why.
type Error struct {
	Range Range // the refused range
	Limit int64 // the offset it violates: end of the predecessor or size of the disk, else 0
	Err   error // one of the Err variables of this package
}

// Error implements error.
func (e *Error) Error() string {
	if errors.Is(e.Err, ErrOrder) || errors.Is(e.Err, ErrOutside) {
		return fmt.Sprintf("extent %v: %v (%d)", e.Range, e.Err, e.Limit)
	}
	return fmt.Sprintf("extent %v: %v", e.Range, e.Err)
}

// Unwrap returns the condition.
func (e *Error) Unwrap() error { return e.Err }

// check refuses a range that is not well formed after a predecessor that ended at prevEnd,
// or that reaches beyond size.
func check(r Range, prevEnd, size int64) error {
	switch {
	case r.Off < 0 || r.Len < 0:
		return &Error{Range: r, Err: ErrNegative}
	case r.Len == 0:
		return &Error{Range: r, Err: ErrEmpty}
	case r.Off > math.MaxInt64-r.Len:
		return &Error{Range: r, Err: ErrOverflow}
	case r.Off < prevEnd:
		return &Error{Range: r, Limit: prevEnd, Err: ErrOrder}
	case r.End() > size:
		return &Error{Range: r, Limit: size, Err: ErrOutside}
	}
	return nil
}

// Validate returns an *Error for the first range that breaks the well-formedness of ranges or
// that reaches beyond size, and nil when there is none. Ranges that touch are allowed.
func Validate(ranges []Range, size int64) error {
	var end int64
	for _, r := range ranges {
		if err := check(r, end, size); err != nil {
			return err
		}
		end = r.End()
	}
	return nil
}

// Normalise returns the canonical list that covers the same bytes as ranges, which may come in
// any order, overlap and be empty. A negative or overflowing range is an *Error. The argument is
// not changed.
func Normalise(ranges []Range) ([]Range, error) {
	out := make([]Range, 0, len(ranges))
	for _, r := range ranges {
		if r.Off >= 0 && r.Len == 0 {
			continue
		}
		if err := check(r, 0, math.MaxInt64); err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b Range) int {
		switch {
		case a.Off < b.Off:
			return -1
		case a.Off > b.Off:
			return 1
		}
		return 0
	})
	n := 0
	for _, r := range out {
		if n > 0 && r.Off <= out[n-1].End() {
			out[n-1].Len = max(out[n-1].End(), r.End()) - out[n-1].Off
			continue
		}
		out[n] = r
		n++
	}
	return out[:n], nil
}

// Of returns the stream of ranges, in the order given. It does not validate and may be consumed
// more than once. The slice is not copied.
func Of(ranges ...Range) Seq {
	return func(yield func(Range, error) bool) {
		for _, r := range ranges {
			if !yield(r, nil) {
				return
			}
		}
	}
}

// Collect returns all ranges of s, or the error of s and nothing. It holds them all in memory.
func Collect(s Seq) ([]Range, error) {
	var out []Range
	for r, err := range s {
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// Total returns the number of bytes that s covers. A stream that is not well formed is an *Error;
// the error of s is returned as it is.
func Total(s Seq) (int64, error) {
	var total int64
	for r, err := range Check(s, math.MaxInt64) {
		if err != nil {
			return 0, err
		}
		total += r.Len // disjoint ranges below MaxInt64 cannot overflow the sum
	}
	return total, nil
}
