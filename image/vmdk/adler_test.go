package vmdk

import (
	"bytes"
	"hash/adler32"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestAdler32(t *testing.T) {
	r := rand.New(rand.NewPCG(seed(t), 0))
	for n := range 200 {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		require.Equal(t, adler32.Checksum(p), sum32(p), "%d bytes", n)
	}
	for _, n := range []int{5551, 5552, 5553, 65536, 2 << 20} {
		p := bytes.Repeat([]byte{255}, n)
		require.Equal(t, adler32.Checksum(p), sum32(p), "%d bytes", n)
	}
}
