package backup

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

// TestBlocksAreThoseTouched holds a block set against a list of sectors: a block is
// zeros only if zero extents cover all of it, and is read if anything else of it is
// touched.
func TestBlocksAreThoseTouched(t *testing.T) {
	s := rand.Uint64()
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		var err error
		s, err = strconv.ParseUint(v, 10, 64)
		require.NoError(t, err)
	}
	t.Logf("HOLDFAST_SEED=%d", s)
	const sector, blockSize = 512, repository.LeafSize
	for round := range uint64(300) {
		rnd := rand.New(rand.NewPCG(s, round))
		size := sector * (1 + rnd.Int64N(140*blockSize/sector))
		if rnd.IntN(4) == 0 {
			size = (size + blockSize - 1) / blockSize * blockSize
		}
		const none, data, zero = 0, 1, 2
		sectors := make([]byte, size/sector)
		set := newBlockSet(size, blockSize)
		for at := int64(0); at < int64(len(sectors)); {
			at += rnd.Int64N(3) / 2 * rnd.Int64N(3*blockSize/sector) // often none: extents touch
			n := 1 + rnd.Int64N(4*blockSize/sector)
			if rnd.IntN(3) == 0 { // up to the border of a block
				n = blockSize/sector - at%(blockSize/sector)
			}
			n = min(n, int64(len(sectors))-at)
			if n <= 0 {
				break
			}
			kind := byte(data + rnd.IntN(2))
			for i := at; i < at+n; i++ {
				sectors[i] = kind
			}
			set.add(hypervisor.Extent{Offset: at * sector, Length: n * sector, Zero: kind == zero})
			at += n
		}
		set.flush()
		next, isZero := set.next(0)
		for b := range repository.Blocks(size, blockSize) {
			var count [3]int
			from, to := b*blockSize/sector, min((b+1)*blockSize, size)/sector
			for _, kind := range sectors[from:to] {
				count[kind]++
			}
			wantZero := count[zero] == int(to-from)
			if count[none] == int(to-from) {
				require.NotEqual(t, b, next, "round %d: untouched block %d is stored", round, b)
				continue
			}
			require.Equal(t, b, next, "round %d: block %d is not stored", round, b)
			if isZero && !wantZero {
				require.Fail(t, "a block that is not all zeros is taken for zeros", "round %d, block %d", round, b)
			}
			require.Equal(t, wantZero, isZero, "round %d: block %d", round, b)
			next, isZero = set.next(b + 1)
		}
		require.Equal(t, int64(-1), next, "round %d", round)
	}
}
