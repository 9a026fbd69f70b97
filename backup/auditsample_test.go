package backup

import (
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

// testSeed is the seed of a randomised test, printed for a replay.
func testSeed(t *testing.T) uint64 {
	t.Helper()
	s := rand.Uint64()
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		var err error
		s, err = strconv.ParseUint(v, 10, 64)
		require.NoError(t, err)
	}
	t.Logf("replay with HOLDFAST_SEED=%d go test ./backup -run '^%s$'", s, t.Name())
	return s
}

// LeastFound returns how many of n independent tries succeed at least, each with
// probability p, but for once in a billion.
func LeastFound(n int, p float64) int {
	below, q := 0.0, math.Log1p(-p)
	logs := float64(n) * q // of the probability of exactly k
	for k := range n {
		if below += math.Exp(logs); below > 1e-9 {
			return k
		}
		logs += math.Log(float64(n-k)/float64(k+1)) + math.Log(p) - q
	}
	return n
}

func TestLeastFound(t *testing.T) {
	require.Equal(t, 0, LeastFound(29, 0.5))
	require.Equal(t, 1, LeastFound(30, 0.5)) // 2^-30 is less than a billionth
	require.Equal(t, 0, LeastFound(2, 0.99))
	require.Equal(t, 2, LeastFound(2, 1-1e-11))
	require.InDelta(t, 277, LeastFound(1000, 0.37), 10)
}

// changes makes a set of which about share of the blocks were touched, in runs.
func changes(rnd *rand.Rand, size int64, blockSize int, share float64) *blockSet {
	s := newBlockSet(size, blockSize)
	blocks := repository.Blocks(size, blockSize)
	for i := int64(0); i < blocks; {
		n := min(1+rnd.Int64N(9), blocks-i)
		if rnd.Float64() < share {
			end := min((i+n)*int64(blockSize), size)
			off := i*int64(blockSize) + min(rnd.Int64N(int64(blockSize)), size-i*int64(blockSize)-1)
			s.add(hypervisor.Extent{Offset: off, Length: end - off, Zero: rnd.IntN(3) == 0})
		}
		i += n
	}
	s.flush()
	return s
}

// unchanged lists, leaf by leaf, what inherited computes word by word.
func unchanged(s *blockSet) (out []int64) {
	stored := map[int64]bool{}
	for i, _ := s.next(0); i >= 0; i, _ = s.next(i + 1) {
		stored[i] = true
	}
	for leaf := int64(0); leaf*repository.LeafSize < s.size; leaf++ {
		if !stored[leaf*repository.LeafSize/s.blockSize] {
			out = append(out, leaf)
		}
	}
	return out
}

// TestASampleHasUnchangedLeavesAlone: a sample has the leaves that the hypervisor
// calls unchanged and no others, as many as were asked for, each at most once, all
// of them if that is asked, and the same again for the same seed.
func TestASampleHasUnchangedLeavesAlone(t *testing.T) {
	rnd := rand.New(rand.NewPCG(testSeed(t), 1))
	for range 100 {
		blockSize := repository.LeafSize << rnd.IntN(6)
		size := 512 * (1 + rnd.Int64N(600<<20/512))
		set := changes(rnd, size, blockSize, rnd.Float64())
		all := unchanged(set)
		require.Equal(t, int64(len(all)), set.inheritedLeaves(), "size %d, blocks of %d", size, blockSize)
		for _, k := range []int64{0, 1, rnd.Int64N(int64(len(all)) + 2), int64(len(all)), int64(len(all)) + 5} {
			seed := rnd.Uint64()
			got := slices.Collect(set.sample(k, auditRandom(seed, "vda")))
			require.Len(t, got, int(min(k, int64(len(all)))))
			require.True(t, slices.IsSorted(got))
			for i, leaf := range got {
				_, ok := slices.BinarySearch(all, leaf)
				require.True(t, ok, "leaf %d of a disk of %d bytes in blocks of %d was stored anew", leaf, size, blockSize)
				require.True(t, i == 0 || got[i-1] < leaf, "leaf %d twice", leaf)
			}
			if k >= int64(len(all)) && len(all) > 0 {
				require.True(t, slices.Equal(all, got), "all leaves")
			}
			require.True(t, slices.Equal(got, slices.Collect(set.sample(k, auditRandom(seed, "vda")))), "the same seed")
		}
	}
}

// TestSamplesOfTwoSeedsAndDisksDiffer: nothing can hide by knowing an earlier
// sample.
func TestSamplesOfTwoSeedsAndDisksDiffer(t *testing.T) {
	set := newBlockSet(100<<30, repository.DefaultBlockSize)
	draw := func(seed uint64, disk hypervisor.DiskID) []int64 {
		return slices.Collect(set.sample(enoughLeaves, auditRandom(seed, disk)))
	}
	require.False(t, slices.Equal(draw(1, "vda"), draw(2, "vda")))
	require.False(t, slices.Equal(draw(1, "vda"), draw(1, "vdb")))
}

// TestEveryLeafIsDrawnAlike: over many samples each leaf comes up about as often
// as any other, the short last one and those beside changed blocks too.
func TestEveryLeafIsDrawnAlike(t *testing.T) {
	rnd := rand.New(rand.NewPCG(testSeed(t), 2))
	const size, k, rounds = 64<<20 - 512, 10, 20000
	set := changes(rnd, size, repository.DefaultBlockSize, 0.2)
	all := unchanged(set)
	count := map[int64]int{}
	for range rounds {
		for leaf := range set.sample(k, rnd) {
			count[leaf]++
		}
	}
	// Parts differ by one leaf in size, so a leaf's chance is within this of k/n.
	part := float64(len(all) / k)
	low, high := rounds/(part+1), rounds/part
	for _, leaf := range all {
		n := float64(count[leaf])
		require.Greater(t, n, low-6*math.Sqrt(low), "leaf %d was drawn %v times", leaf, n)
		require.Less(t, n, high+6*math.Sqrt(high), "leaf %d was drawn %v times", leaf, n)
	}
}

// TestDetection measures how often the default sample of a large disk has a wrong
// leaf in it, for lies that are scattered, lumped, or periodic: 99 % in a run when
// one leaf in a hundred is wrong; when it is one in a thousand, 37 % in a run and
// 99 % in ten.
func TestDetection(t *testing.T) {
	rnd := rand.New(rand.NewPCG(testSeed(t), 3))
	const size = 40<<30 + 3*512
	trials := 1000
	if os.Getenv("HOLDFAST_NIGHTLY") != "" {
		trials = 20000
	}
	k := AuditRate{}.leaves(size)
	require.Equal(t, int64(460), k)
	lies := map[string]func(all []int64, n int) map[int64]bool{
		"scattered": func(all []int64, n int) map[int64]bool {
			out := map[int64]bool{}
			for len(out) < n {
				out[all[rnd.IntN(len(all))]] = true
			}
			return out
		},
		"lumped": func(all []int64, n int) map[int64]bool {
			out := map[int64]bool{}
			for begin := rnd.IntN(len(all) - n); len(out) < n; begin++ {
				out[all[begin]] = true
			}
			return out
		},
		"periodic": func(all []int64, n int) map[int64]bool {
			out := map[int64]bool{}
			for i := range n {
				out[all[i*(len(all)/n)]] = true
			}
			return out
		},
	}
	for name, lie := range lies {
		for _, c := range []struct {
			share float64
			runs  int
			goal  float64
		}{{0.01, 1, 0.99}, {0.001, 1, 0.369}, {0.001, 10, 0.99}} {
			found := 0
			var set *blockSet
			var wrong map[int64]bool
			for i := range trials / c.runs {
				if i%500 == 0 {
					set = changes(rnd, size, repository.DefaultBlockSize, 0.05)
					all := unchanged(set)
					wrong = lie(all, int(math.Ceil(c.share*float64(len(all)))))
				}
				caught := false
				for range c.runs {
					for leaf := range set.sample(k, auditRandom(rnd.Uint64(), "vda")) {
						caught = caught || wrong[leaf]
					}
				}
				if caught {
					found++
				}
			}
			n := trials / c.runs
			t.Logf("%s, %.1f %% of unchanged leaves wrong: found in %d of %d times %d runs, goal %.1f %%", name, c.share*100, found, n, c.runs, c.goal*100)
			require.GreaterOrEqual(t, found, LeastFound(n, c.goal), "%s %v", name, c)
		}
	}
}

func TestAuditRates(t *testing.T) {
	for s, want := range map[string]AuditRate{
		"auto": {}, "off": {Off: true}, "all": {Share: 1}, "5%": {Share: 0.05}, "0.5%": {Share: 0.005}, "100%": {Share: 1}, " 5 % ": {Share: 0.05},
		"115MiB": {Bytes: 115 << 20}, "115M": {Bytes: 115 << 20}, "1 GiB": {Bytes: 1 << 30}, "2t": {Bytes: 2 << 40}, "256KiB": {Bytes: 256 << 10},
		"1000b": {Bytes: 1000}, "0": {Off: true}, "0%": {Off: true}, "0MiB": {Off: true}, "OFF": {Off: true},
	} {
		got, err := ParseAuditRate(s)
		require.NoError(t, err, s)
		require.Equal(t, want, got, s)
		again, err := ParseAuditRate(got.String())
		require.NoError(t, err, got.String())
		require.Equal(t, got, again, got.String())
	}
	for _, s := range []string{"", "5", "-5%", "101%", "NaN%", "inf%", "%", "MiB", "5MB/s", "5 apples", "-1MiB", "9999999999999TiB", "5%%", "1e3MiB", "on"} {
		_, err := ParseAuditRate(s)
		require.Error(t, err, s)
		require.Contains(t, err.Error(), auditForms, s)
	}
	for _, size := range []int64{0, 1, 512, 4 << 20, 5<<20 - 1, 5 << 20, 100<<20 + 512, 2300 << 20, 64 << 40} {
		n := AuditRate{}.leaves(size) * repository.LeafSize
		require.LessOrEqual(t, n, int64(115<<20), size)
		require.LessOrEqual(t, n, size/20, size)
		require.Greater(t, n+repository.LeafSize, min(115<<20, size/20), "size %d: no less than it may be", size)
		require.Equal(t, (size+repository.LeafSize-1)/repository.LeafSize, AuditRate{Share: 1}.leaves(size), size)
		require.Zero(t, AuditRate{Off: true}.leaves(size))
		if size > 0 {
			require.Positive(t, AuditRate{Share: 1e-9}.leaves(size), "what was asked for is done")
			require.Positive(t, AuditRate{Bytes: 1}.leaves(size))
		}
	}
	require.Equal(t, int64(4), AuditRate{Share: 0.5, Bytes: 1 << 20}.leaves(1<<30), "both limits hold")
	for _, a := range []AuditRate{{Share: -1}, {Share: 1.1}, {Share: math.NaN()}, {Bytes: -1}} {
		require.Error(t, a.check())
	}
}
