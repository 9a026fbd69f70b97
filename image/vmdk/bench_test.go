package vmdk

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

func BenchmarkDecode(b *testing.B) {
	disk := sparseDisk(rand.New(rand.NewPCG(1, 1)), 64<<20)
	var out bytes.Buffer
	w, err := NewStreamWriter(&out, int64(len(disk)), nil)
	require.NoError(b, err)
	_, err = w.WriteAt(disk, 0)
	require.NoError(b, err)
	require.NoError(b, w.Commit())
	b.SetBytes(int64(len(disk)))
	for b.Loop() {
		d, err := NewDecoder(bytes.NewReader(out.Bytes()), nil)
		require.NoError(b, err)
		require.NoError(b, d.Decode(context.Background(), func(int64, []byte) error { return nil }))
	}
}

func BenchmarkEncode(b *testing.B) {
	disk := sparseDisk(rand.New(rand.NewPCG(1, 1)), 32<<20)
	b.SetBytes(int64(len(disk)))
	for b.Loop() {
		w, err := NewStreamWriter(io.Discard, int64(len(disk)), nil)
		require.NoError(b, err)
		_, err = w.WriteAt(disk, 0)
		require.NoError(b, err)
		require.NoError(b, w.Commit())
	}
}
