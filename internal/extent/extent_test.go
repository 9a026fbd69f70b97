package extent_test

import (
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/extent"
)

type rng = extent.Range

// seed returns the seed of this run, taken from HOLDFAST_SEED for a replay, and prints it.
func seed(t *testing.T) uint64 {
	t.Helper()
	s := rand.Uint64()
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		var err error
		s, err = strconv.ParseUint(v, 10, 64)
		require.NoError(t, err)
	}
	t.Logf("HOLDFAST_SEED=%d", s)
	return s
}

const modelSize = 300

// model is the truth: one bool per byte.
type model [modelSize]bool

func modelOf(rs []rng) (m model) {
	for _, r := range rs {
		for i := r.Off; i < r.End(); i++ {
			m[i] = true
		}
	}
	return m
}

// ranges returns the canonical list by looking at every byte.
func (m *model) ranges() (out []rng) {
	for i, v := range m {
		if !v {
			continue
		}
		if i > 0 && m[i-1] {
			out[len(out)-1].Len++
		} else {
			out = append(out, rng{Off: int64(i), Len: 1})
		}
	}
	return out
}

func randomRanges(r *rand.Rand) (out []rng) {
	for range r.IntN(12) {
		off := r.Int64N(modelSize)
		out = append(out, rng{off, r.Int64N(min(modelSize-off, 40) + 1)})
	}
	return out
}

// split cuts canonical ranges into touching pieces: still well formed, no longer canonical.
func split(r *rand.Rand, in []rng) (out []rng) {
	for _, x := range in {
		for x.Len > 0 {
			n := 1 + r.Int64N(x.Len)
			out = append(out, rng{x.Off, n})
			x.Off, x.Len = x.Off+n, x.Len-n
		}
	}
	return out
}

// differ runs every operation on two lists and compares with the bitmap model.
func differ(t require.TestingT, r *rand.Rand, rawA, rawB []rng, block int64) {
	a, err := extent.Normalise(rawA)
	require.NoError(t, err)
	b, err := extent.Normalise(rawB)
	require.NoError(t, err)
	ma, mb := modelOf(rawA), modelOf(rawB)
	require.Equal(t, ma.ranges(), nonEmpty(a), "normalise %v", rawA)
	require.NoError(t, extent.Validate(a, modelSize))
	sa, sb := split(r, a), split(r, b)
	require.NoError(t, extent.Validate(sa, modelSize))

	byByte := func(f func(x, y bool) bool) []rng {
		var m model
		for i := range m {
			m[i] = f(ma[i], mb[i])
		}
		return m.ranges()
	}
	for _, c := range []struct {
		name string
		got  extent.Seq
		want []rng
	}{
		{"merge", extent.Merge(extent.Of(sa...)), ma.ranges()},
		{"union", extent.Union(extent.Of(sa...), extent.Of(sb...)), byByte(func(x, y bool) bool { return x || y })},
		{"intersect", extent.Intersect(extent.Of(sa...), extent.Of(sb...)), byByte(func(x, y bool) bool { return x && y })},
		{"subtract", extent.Subtract(extent.Of(sa...), extent.Of(sb...)), byByte(func(x, y bool) bool { return x && !y })},
		{"complement", extent.Complement(extent.Of(sa...), modelSize), byByte(func(x, _ bool) bool { return !x })},
		{"align", extent.Align(extent.Of(sa...), block, modelSize), touched(ma, block)},
	} {
		got, err := extent.Collect(c.got)
		require.NoError(t, err, c.name)
		require.Equal(t, c.want, got, "%s of %v and %v, block %d", c.name, sa, sb, block)
	}

	var want, got []int64
	for i := int64(0); i*block < modelSize; i++ {
		for k := i * block; k < min((i+1)*block, modelSize); k++ {
			if ma[k] {
				want = append(want, i)
				break
			}
		}
	}
	for i, err := range extent.Blocks(extent.Of(sa...), block, modelSize) {
		require.NoError(t, err)
		got = append(got, i)
	}
	require.Equal(t, want, got, "blocks of %v, size %d", sa, block)

	n := int64(0)
	for _, v := range ma {
		if v {
			n++
		}
	}
	total, err := extent.Total(extent.Of(sa...))
	require.NoError(t, err)
	require.Equal(t, n, total)
}

func nonEmpty(rs []rng) []rng {
	if len(rs) == 0 {
		return nil
	}
	return rs
}

// touched returns the canonical whole-block cover by looking at every byte.
func touched(m model, block int64) []rng {
	var out model
	for i, v := range m {
		if !v {
			continue
		}
		first := int64(i) - int64(i)%block
		for k := first; k < min(first+block, modelSize); k++ {
			out[k] = true
		}
	}
	return out.ranges()
}

func TestDifferential(t *testing.T) {
	r := rand.New(rand.NewPCG(seed(t), 1))
	for range 20000 {
		differ(t, r, randomRanges(r), randomRanges(r), 1+r.Int64N(2*modelSize))
	}
}

func FuzzAlgebra(f *testing.F) {
	f.Add([]byte{0, 10, 10, 5, 200, 30}, []byte{5, 10}, uint8(7))
	f.Add([]byte{}, []byte{255, 255, 0, 0}, uint8(1))
	f.Fuzz(func(t *testing.T, a, b []byte, block uint8) {
		parse := func(p []byte) (out []rng) {
			for ; len(p) >= 2 && len(out) < 64; p = p[2:] {
				out = append(out, rng{int64(p[0]), min(int64(p[1]), modelSize-int64(p[0]))})
			}
			return out
		}
		r := rand.New(rand.NewPCG(uint64(len(a)), uint64(len(b))))
		differ(t, r, parse(a), parse(b), int64(block)+1)
	})
}

func TestRefusals(t *testing.T) {
	const size = 100
	for _, c := range []struct {
		in   []rng
		want error
	}{
		{[]rng{{0, 0}}, extent.ErrEmpty},
		{[]rng{{-1, 5}}, extent.ErrNegative},
		{[]rng{{1, -5}}, extent.ErrNegative},
		{[]rng{{math.MaxInt64, 1}}, extent.ErrOverflow},
		{[]rng{{math.MaxInt64 - 4, 4}}, extent.ErrOutside}, // ends at the largest offset
		{[]rng{{10, math.MaxInt64}}, extent.ErrOverflow},
		{[]rng{{0, 10}, {9, 1}}, extent.ErrOrder},
		{[]rng{{20, 10}, {0, 10}}, extent.ErrOrder},
		{[]rng{{99, 2}}, extent.ErrOutside},
	} {
		var e *extent.Error
		err := extent.Validate(c.in, size)
		require.ErrorIs(t, err, c.want, "%v", c.in)
		require.ErrorAs(t, err, &e)
		require.Equal(t, c.in[len(c.in)-1], e.Range)

		for name, s := range map[string]extent.Seq{
			"check":      extent.Check(extent.Of(c.in...), size),
			"complement": extent.Complement(extent.Of(c.in...), size),
			"align":      extent.Align(extent.Of(c.in...), 8, size),
		} {
			_, err := extent.Collect(s)
			require.ErrorIs(t, err, c.want, "%s of %v", name, c.in)
		}
		err = nil
		for _, e := range extent.Blocks(extent.Of(c.in...), 8, size) {
			require.NoError(t, err, "nothing comes after an error")
			err = e
		}
		require.ErrorIs(t, err, c.want)

		if errors.Is(c.want, extent.ErrOutside) {
			continue // the operations below know no size
		}
		ok := extent.Of(rng{0, math.MaxInt64})
		for name, s := range map[string]extent.Seq{
			"union left":      extent.Union(extent.Of(c.in...), ok),
			"union right":     extent.Union(ok, extent.Of(c.in...)),
			"intersect left":  extent.Intersect(extent.Of(c.in...), ok),
			"intersect right": extent.Intersect(ok, extent.Of(c.in...)),
			"subtract left":   extent.Subtract(extent.Of(c.in...), extent.Of()),
			"subtract right":  extent.Subtract(ok, extent.Of(c.in...)),
		} {
			_, err := extent.Collect(s)
			require.ErrorIs(t, err, c.want, "%s of %v", name, c.in)
		}
		_, err = extent.Total(extent.Of(c.in...))
		require.ErrorIs(t, err, c.want)
	}
	_, err := extent.Normalise([]rng{{5, -1}})
	require.ErrorIs(t, err, extent.ErrNegative)
	_, err = extent.Collect(extent.Merge(extent.Of(rng{5, 1}, rng{4, 9})))
	require.ErrorIs(t, err, extent.ErrOrder)
	for _, err := range extent.Blocks(extent.Of(), 0, 5) {
		require.ErrorIs(t, err, extent.ErrBlockSize)
	}
	_, err = extent.Collect(extent.Align(extent.Of(), 1, -1))
	require.ErrorIs(t, err, extent.ErrBlockSize)
}

func TestMergeTakesOverlapAndEmpty(t *testing.T) {
	got, err := extent.Collect(extent.Merge(extent.Of(rng{0, 10}, rng{0, 3}, rng{2, 0}, rng{2, 9}, rng{20, 1})))
	require.NoError(t, err)
	require.Equal(t, []rng{{0, 11}, {20, 1}}, got)
}

func TestLargestOffsets(t *testing.T) {
	const huge = int64(math.MaxInt64)
	got, err := extent.Collect(extent.Align(extent.Of(rng{huge - 3, 2}), 1<<20, huge))
	require.NoError(t, err)
	require.Equal(t, []rng{{huge - huge%(1<<20), huge % (1 << 20)}}, got)
	total, err := extent.Total(extent.Of(rng{0, huge - 1}, rng{huge - 1, 1}))
	require.NoError(t, err)
	require.Equal(t, huge, total)
	var idx []int64
	for i, err := range extent.Blocks(extent.Of(rng{huge - 1, 1}), huge, huge) {
		require.NoError(t, err)
		idx = append(idx, i)
	}
	require.Equal(t, []int64{0}, idx)
}

// A source error must surface from every operation, as it is, and as the last pair.
func TestSourceErrorSurfaces(t *testing.T) {
	boom := errors.New("boom")
	bad := func(yield func(rng, error) bool) {
		if yield(rng{0, 1}, nil) && yield(rng{5, 1}, nil) {
			yield(rng{}, boom)
		}
	}
	good := extent.Of(rng{0, 50})
	for name, s := range map[string]extent.Seq{
		"check": extent.Check(bad, 100), "merge": extent.Merge(bad), "align": extent.Align(bad, 4, 100),
		"complement": extent.Complement(bad, 100),
		"union":      extent.Union(bad, good), "union2": extent.Union(good, bad),
		"intersect": extent.Intersect(bad, good), "intersect2": extent.Intersect(good, bad),
		"subtract": extent.Subtract(bad, good), "subtract2": extent.Subtract(good, bad),
	} {
		var last error
		for _, err := range s {
			require.NoError(t, last, "%s: nothing comes after an error", name)
			last = err
		}
		require.ErrorIs(t, last, boom, name)
	}
	_, err := extent.Total(bad)
	require.ErrorIs(t, err, boom)
}

// A consumer that stops early must stop the source too, at every point.
func TestEarlyStop(t *testing.T) {
	for stopAt := range 4 {
		open := 0
		src := func(yield func(rng, error) bool) {
			open++
			defer func() { open-- }()
			for i := int64(0); i < 100; i++ {
				if !yield(rng{i * 10, 5}, nil) {
					return
				}
			}
		}
		for name, s := range map[string]extent.Seq{
			"check": extent.Check(src, 1e6), "merge": extent.Merge(src), "align": extent.Align(src, 2, 1e6),
			"union": extent.Union(src, src), "intersect": extent.Intersect(src, src),
			"subtract": extent.Subtract(src, extent.Of(rng{2, 1}, rng{22, 1})),
		} {
			n := 0
			for range s {
				if n == stopAt {
					break
				}
				n++
			}
			require.Equal(t, stopAt, n, name)
			require.Zero(t, open, "%s left its source running", name)
		}
	}
}

func BenchmarkStreams(b *testing.B) {
	const n = 1 << 20
	src := func(shift int64) extent.Seq {
		return func(yield func(rng, error) bool) {
			for i := range int64(n) {
				if !yield(rng{i*65536 + shift, 32768}, nil) {
					return
				}
			}
		}
	}
	drain := func(b *testing.B, s extent.Seq) {
		for _, err := range s {
			if err != nil {
				b.Fatal(err)
			}
		}
	}
	per := func(b *testing.B) {
		b.ReportAllocs()
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/extent")
	}
	b.Run("blocks", func(b *testing.B) {
		for b.Loop() {
			for _, err := range extent.Blocks(src(0), 1<<20, n*65536) {
				if err != nil {
					b.Fatal(err)
				}
			}
		}
		per(b)
	})
	b.Run("union", func(b *testing.B) {
		for b.Loop() {
			drain(b, extent.Union(src(0), src(8192)))
		}
		per(b)
	})
	b.Run("subtract", func(b *testing.B) {
		for b.Loop() {
			drain(b, extent.Subtract(src(0), src(8192)))
		}
		per(b)
	})
}
