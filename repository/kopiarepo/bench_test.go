//go:build unix

package kopiarepo_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// benchImage is 256 MiB, half of it random, half like text; no MiB repeats.
func benchImage(blockSize int) *image {
	rnd := rand.New(rand.NewPCG(1, 2))
	words := make([][]byte, 4096)
	for i := range words {
		words[i] = make([]byte, 3+rnd.IntN(8))
		for j := range words[i] {
			words[i][j] = byte('a' + rnd.IntN(26))
		}
	}
	m := newImage(256*mib, blockSize)
	src := rand.NewChaCha8([32]byte{7})
	for i := range m.count() {
		b := make([]byte, blockSize)
		if i%2 == 0 {
			_, _ = src.Read(b)
		} else {
			for p := 0; p < len(b); {
				p += copy(b[p:], words[rnd.IntN(len(words))])
				if p < len(b) {
					b[p] = ' '
					p++
				}
			}
		}
		m.blocks[i] = b
	}
	return m
}

// BenchmarkFull stores 256 MiB as a full point, digests included.
func BenchmarkFull(b *testing.B) {
	for _, compressor := range []string{"s2-default", "zstd-fastest"} {
		for _, blockSize := range []int{256 << 10, mib} {
			b.Run(fmt.Sprintf("%s/%dK", compressor, blockSize>>10), func(b *testing.B) {
				m := benchImage(blockSize)
				b.SetBytes(m.size)
				var stored int64
				var cpu time.Duration
				for b.Loop() {
					b.StopTimer()
					cfg := config(b.TempDir())
					cfg.Compressor = compressor
					r := create(b, cfg)
					b.StartTimer()
					from := cpuTime()
					_, err := backup(context.Background(), r, map[string]*image{"d": m}, backupOptions{chain: "vm", run: "r", workers: 4})
					require.NoError(b, err)
					b.StopTimer()
					cpu += cpuTime() - from
					stored = usage(b, cfg.Dir)
					b.StartTimer()
				}
				b.ReportMetric(cpu.Seconds()/float64(b.N), "cpu-s/op")
				b.ReportMetric(float64(stored)/(1<<20), "MiB-stored")
			})
		}
	}
}

// BenchmarkIncremental stores 16 changed MiB in a disk of 8 TiB, and nothing in a
// disk of 4 GiB.
func BenchmarkIncremental(b *testing.B) {
	ctx := context.Background()
	for _, size := range []int64{4 * gib, 8192 * gib} {
		b.Run(fmt.Sprintf("%dGiB", size/gib), func(b *testing.B) {
			r := create(b, config(b.TempDir()))
			rnd := rand.New(rand.NewPCG(3, 4))
			m := newImage(size, mib)
			for range 64 {
				m.fill(rnd, rnd.Int64N(m.count()))
			}
			proof, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{chain: "vm", run: "r0"})
			require.NoError(b, err)
			parent := proof.Point().ID
			n := 0
			for b.Loop() {
				b.StopTimer()
				var changed []int64
				for range 16 {
					i := rnd.Int64N(m.count())
					m.fill(rnd, i)
					changed = append(changed, i)
				}
				n++
				b.StartTimer()
				proof, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{
					chain: "vm", run: fmt.Sprintf("r%d", n), parent: parent, changed: map[string][]int64{"d": dedupe(changed)},
				})
				require.NoError(b, err)
				parent = proof.Point().ID
			}
		})
	}
}

// BenchmarkUnchanged is the cost of an incremental point of which nothing changed.
func BenchmarkUnchanged(b *testing.B) {
	ctx := context.Background()
	r := create(b, config(b.TempDir()))
	m := newImage(4*gib, mib)
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 64 {
		m.fill(rnd, rnd.Int64N(m.count()))
	}
	proof, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{chain: "vm", run: "r"})
	require.NoError(b, err)
	n := 0
	for b.Loop() {
		n++
		_, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{chain: "vm", run: fmt.Sprintf("r%d", n), parent: proof.Point().ID})
		require.NoError(b, err)
	}
}

// BenchmarkRestore reads a point by blocks, in parallel, comparing digests.
func BenchmarkRestore(b *testing.B) {
	ctx := context.Background()
	for _, compressor := range []string{"s2-default", "zstd-fastest"} {
		b.Run(compressor, func(b *testing.B) {
			cfg := config(b.TempDir())
			cfg.Compressor = compressor
			r := create(b, cfg)
			m := benchImage(mib)
			proof, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{chain: "vm", run: "r", workers: 4})
			require.NoError(b, err)
			rd, err := r.Open(ctx, proof.Point().ID)
			require.NoError(b, err)
			d, err := rd.Disk(ctx, "d")
			require.NoError(b, err)
			h := digest.New(rd.DigestKey())
			b.SetBytes(m.size)
			from := cpuTime()
			defer func() { b.ReportMetric((cpuTime()-from).Seconds()/float64(b.N), "cpu-s/op") }()
			for b.Loop() {
				require.NoError(b, readAll(ctx, d, h, 4))
			}
		})
	}
}

func readAll(ctx context.Context, d repository.DiskReader, h *digest.Hasher, workers int) error {
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, workers)
	for k := range workers {
		wg.Go(func() {
			buf := make([]byte, d.BlockSize())
			for {
				i := next.Add(1) - 1
				if i >= repository.Blocks(d.Size(), d.BlockSize()) {
					return
				}
				b, err := d.ReadBlock(ctx, i, buf)
				if err == nil {
					for j, l := range h.Leaves(nil, b.Data) {
						if l != b.Leaves[j] {
							err = fmt.Errorf("block %d: wrong digest", i)
						}
					}
				}
				if err != nil {
					errs[k] = err
					return
				}
			}
		})
	}
	wg.Wait()
	return joined(errs...)
}

// BenchmarkSparse stores 4 GiB in 4,096 places of a disk of 8 TiB; run it alone
// for its peak memory.
func BenchmarkSparse(b *testing.B) {
	ctx := context.Background()
	const places = 4096
	for b.Loop() {
		r := create(b, config(b.TempDir()))
		w, err := r.Begin(ctx, &repository.PointSpec{Chain: "vm", Run: "r"})
		require.NoError(b, err)
		h := digest.New(w.DigestKey())
		m := newImage(8192*gib, mib)
		d, err := w.Disk(ctx, repository.DiskSpec{ID: "d", Size: m.size, BlockSize: m.bs})
		require.NoError(b, err)
		src := rand.NewChaCha8([32]byte{5})
		data := make([]byte, m.bs)
		for k := range int64(places) {
			_, _ = src.Read(data)
			i := k * (m.count() / places)
			require.NoError(b, d.WriteBlock(ctx, repository.Block{Index: i, Data: data, Leaves: h.Leaves(nil, data)}))
			require.NoError(b, d.Advance(ctx, i))
		}
		require.NoError(b, d.Close(ctx))
		proof, err := w.Commit(ctx, &repository.CommitInfo{})
		require.NoError(b, err)
		n := int64(0)
		rd, err := r.Open(ctx, proof.Point().ID)
		require.NoError(b, err)
		dr, err := rd.Disk(ctx, "d")
		require.NoError(b, err)
		for e, err := range dr.Extents(ctx) {
			require.NoError(b, err)
			n += e.Length
		}
		require.Equal(b, int64(places)*int64(m.bs), n)
	}
	b.ReportMetric(peakMemory(b), "MiB-peak")
}

// peakMemory is the peak of this process's resident memory in MiB.
func peakMemory(b *testing.B) float64 {
	var u syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return float64(u.Maxrss) / 1024
}

// cpuTime is the CPU time of this process.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
