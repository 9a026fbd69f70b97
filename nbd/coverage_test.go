package nbd

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

// checkCoverage feeds pairs of bytes as pieces of a read of 256 bytes and compares with a plain array.
func checkCoverage(t *testing.T, pieces []byte) {
	t.Helper()
	var c coverage
	var seen [256]bool
	for len(pieces) >= 2 {
		from := int64(pieces[0])
		to := min(from+1+int64(pieces[1]), 256)
		pieces = pieces[2:]
		free := true
		for i := from; i < to; i++ {
			free = free && !seen[i]
		}
		require.Equal(t, free, c.add(from, to), "%d..%d onto %+v", from, to, c)
		if !free {
			continue
		}
		for i := from; i < to; i++ {
			seen[i] = true
		}
	}
	all := true
	for _, s := range seen {
		all = all && s
	}
	require.Equal(t, all, c.complete(256), "%+v", c)
}

func TestCoverage(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		pieces := make([]byte, 2*r.IntN(200))
		for i := range pieces {
			pieces[i] = byte(r.Uint32())
			if i%2 == 1 {
				pieces[i] %= 8
			}
		}
		checkCoverage(t, pieces)
	}
	// A whole read in random order of its bytes.
	var c coverage
	for _, i := range r.Perm(3000) {
		require.True(t, c.add(int64(i), int64(i)+1))
	}
	require.True(t, c.complete(3000))
	// Absurdly many pieces are refused instead of remembered.
	c = coverage{}
	n := 0
	for i := int64(1); c.add(2*i, 2*i+1); i++ {
		n++
	}
	require.Equal(t, maxGaps, n)
}

func FuzzCoverage(f *testing.F) {
	f.Add([]byte{0, 9, 10, 9, 30, 255, 20, 9})
	f.Add([]byte{5, 0, 3, 0, 4, 0, 0, 2})
	f.Fuzz(checkCoverage)
}

func TestBackoff(t *testing.T) {
	require.NoError(t, backoff(context.Background(), 1), "no wait before the first retry")
	require.NoError(t, backoff(context.Background(), 2))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for _, attempt := range []int{1, 2, 3, 100} {
		require.ErrorIs(t, backoff(ctx, attempt), context.Canceled)
	}
}
