package nbd_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

// readAll reads the whole export to nowhere with the given number of requests of 1 MiB in flight.
func readAll(c *nbd.Client, inflight int) error {
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make(chan error, inflight)
	for range inflight {
		wg.Go(func() {
			p := make([]byte, mib)
			for {
				off := next.Add(mib) - mib
				if off >= c.Size() {
					return
				}
				if _, err := c.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	return <-errs
}

// BenchmarkRead reads from our own server over one unix socket.
func BenchmarkRead(b *testing.B) {
	for _, size := range []int{4 << 10, 64 << 10, 1 << 20} {
		for _, inflight := range []int{1, 8} {
			b.Run(fmt.Sprintf("size=%d/inflight=%d", size, inflight), func(b *testing.B) {
				m := newMem(64 * mib)
				_, cfg := serveMem(b, readOnlyBackend{m})
				c := dial(b, cfg)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				var next atomic.Int64
				var wg sync.WaitGroup
				errs := make(chan error, inflight)
				b.ResetTimer()
				for range inflight {
					wg.Go(func() {
						p := make([]byte, size)
						for {
							i := next.Add(1) - 1
							if i >= int64(b.N) {
								return
							}
							if _, err := c.ReadAt(p, i*int64(size)%c.Size()); err != nil {
								errs <- err
								return
							}
						}
					})
				}
				wg.Wait()
				close(errs)
				require.NoError(b, <-errs)
			})
		}
	}
}

// BenchmarkAgainstNBDCopy reads an allocated image from qemu-nbd over one unix socket, alternately with
// this client and with nbdcopy, and reports the ratio of the best times (1 is as fast as nbdcopy).
func BenchmarkAgainstNBDCopy(b *testing.B) {
	needTools(b, "qemu-nbd", "nbdcopy")
	const size = 1 << 30
	path := filepath.Join(b.TempDir(), "disk.raw")
	f, err := os.Create(path)
	require.NoError(b, err)
	chunk := make([]byte, mib)
	fill(seeded(b), chunk)
	for range size / mib {
		_, err := f.Write(chunk)
		require.NoError(b, err)
	}
	require.NoError(b, f.Close())
	cfg := qemuNBD(b, path, "raw", "--read-only", "--cache=writeback")
	cfg.Inflight = 8
	c := dial(b, cfg)
	ours, theirs := time.Hour, time.Hour
	b.SetBytes(size)
	b.ResetTimer()
	for range b.N {
		for range 3 {
			start := time.Now()
			require.NoError(b, readAll(c, 8))
			ours = min(ours, time.Since(start))
			b.StopTimer()
			start = time.Now()
			run(b, "nbdcopy", "--connections=1", cfg.URL(), "null:")
			theirs = min(theirs, time.Since(start))
			b.StartTimer()
		}
	}
	b.ReportMetric(float64(size)/mib/ours.Seconds(), "ours-MiB/s")
	b.ReportMetric(float64(size)/mib/theirs.Seconds(), "nbdcopy-MiB/s")
	b.ReportMetric(float64(theirs)/float64(ours), "ratio")
}
