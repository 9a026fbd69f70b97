package nbd_test

import (
	"bytes"
	"context"
	"net"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

// statusChunks answers each block status request with what reply makes of it.
func statusChunks(reply func(r fakeRequest) []byte) func(net.Conn) error {
	return func(c net.Conn) error {
		for {
			r, err := next(c)
			if err != nil {
				return err
			}
			if _, err := c.Write(reply(r)); err != nil {
				return err
			}
		}
	}
}

const (
	ctxA = "x-test:a"
	ctxB = "x-test:b"
)

func dialStatus(t *testing.T, size uint64, reply func(r fakeRequest) []byte) *nbd.Client {
	t.Helper()
	var dials atomic.Int32
	cfg := fakeConfig(t, &dials, &fakeServer{size: size, contexts: []string{ctxA, ctxB}, serve: statusChunks(reply)})
	cfg.RequiredContexts = []string{ctxA, ctxB}
	return dial(t, cfg)
}

// TestContextsProgressApart: the contexts of one reply reach differently far; each has its own cursor.
func TestContextsProgressApart(t *testing.T) {
	requests := 0
	c := dialStatus(t, 10<<30, func(r fakeRequest) []byte {
		requests++
		// a: one extent of at most 1 GiB, always alike. b: many short ones, up to 3 KiB further on, and
		// more than was asked at the end.
		a := chunk(0, kindStat, r.cookie, uint32(10), min(r.length, 1<<30), uint32(1))
		flags := uint32(r.off>>10) & 1
		b := chunk(done, kindStat, r.cookie, uint32(11),
			uint32(1024), flags, uint32(1024), flags, uint32(1024), 1-flags)
		return be(b[:4], uint16(0), b[6:], a[:4], done, a[6:])
	})
	var got []nbd.MultiExtent
	for e, err := range c.BlockStatusMulti(context.Background(), []string{ctxA, ctxB}, 1024, 10_000) {
		require.NoError(t, err)
		got = append(got, e)
	}
	pos := int64(1024)
	for _, e := range got {
		require.Equal(t, pos, e.Offset)
		require.EqualValues(t, 1, e.Flags[0])
		pos += e.Length
	}
	require.EqualValues(t, 11_024, pos)
	require.Equal(t, []uint32{1, 1}, got[0].Flags)
	require.EqualValues(t, 2048, got[0].Length)
	require.Equal(t, 4, requests)

	// Over the whole disk a alone: steps below 2^32, merged into one extent, clamped to the end.
	requests = 0
	var all []nbd.Extent
	for e, err := range c.BlockStatus(context.Background(), ctxA, 0, c.Size()) {
		require.NoError(t, err)
		all = append(all, e)
	}
	require.Equal(t, []nbd.Extent{{Length: 10 << 30, Flags: 1}}, all)
	require.Equal(t, 10, requests)
}

// TestExtentsPastTheRequest: the last extent may pass the request and even the export.
func TestExtentsPastTheRequest(t *testing.T) {
	c := dialStatus(t, mib, func(r fakeRequest) []byte {
		return be(chunk(0, kindStat, r.cookie, uint32(11), uint32(0xffffffff), uint32(0)),
			chunk(done, kindStat, r.cookie, uint32(10), uint32(512), uint32(1), uint32(0xffffffff), uint32(1),
				uint32(0xffffffff), uint32(2)))
	})
	var got []nbd.Extent
	for e, err := range c.BlockStatus(context.Background(), ctxA, 1000, mib-1000) {
		require.NoError(t, err)
		got = append(got, e)
	}
	require.Equal(t, []nbd.Extent{{Offset: 1000, Length: mib - 1000, Flags: 1}}, got)
}

// TestLargeStatusChunk: QEMU sends up to 131072 extents, 1 MiB and 4 bytes.
func TestLargeStatusChunk(t *testing.T) {
	const n = 131072
	c := dialStatus(t, n*512, func(r fakeRequest) []byte {
		var b bytes.Buffer
		b.Write(be(uint32(10)))
		for i := range n {
			b.Write(be(uint32(512), uint32(i&1)))
		}
		return be(chunk(0, kindStat, r.cookie, b.Bytes()), chunk(done, kindStat, r.cookie, uint32(11), r.length, uint32(0)))
	})
	count := 0
	for e, err := range c.BlockStatus(context.Background(), ctxA, 0, c.Size()) {
		require.NoError(t, err)
		require.Equal(t, nbd.Extent{Offset: int64(count) * 512, Length: 512, Flags: uint32(count & 1)}, e)
		count++
	}
	require.Equal(t, n, count)
}

func TestHostileStatus(t *testing.T) {
	good := func(r fakeRequest, id uint32) []byte {
		return chunk(0, kindStat, r.cookie, id, r.length, uint32(0))
	}
	end := func(r fakeRequest) []byte { return chunk(done, kindNone, r.cookie) }
	rows := map[string]func(r fakeRequest) []byte{
		"a context is missing": func(r fakeRequest) []byte { return be(good(r, 10), end(r)) },
		"a context twice":      func(r fakeRequest) []byte { return be(good(r, 10), good(r, 10), end(r)) },
		"unknown context":      func(r fakeRequest) []byte { return be(good(r, 10), good(r, 12), end(r)) },
		"no extents":           func(r fakeRequest) []byte { return be(good(r, 10), chunk(done, kindStat, r.cookie, uint32(11))) },
		"half an extent":       func(r fakeRequest) []byte { return chunk(0, kindStat, r.cookie, uint32(10), uint32(512)) },
		"extent of nothing":    func(r fakeRequest) []byte { return chunk(0, kindStat, r.cookie, uint32(10), uint32(0), uint32(0)) },
		"over 32 MiB":          func(r fakeRequest) []byte { return be(uint32(0x668e33ef), done, kindStat, r.cookie, uint32(32<<20+4)) },
		"plain":                func(r fakeRequest) []byte { return simpleReply(0, r.cookie) },
		"data":                 func(r fakeRequest) []byte { return chunk(done, kindData, r.cookie, r.off, byte(0)) },
		"nothing":              end,
		"extended, not offered": func(r fakeRequest) []byte {
			return chunk(done, 6, r.cookie, uint32(10), uint32(1), uint64(1), uint64(0))
		},
	}
	for name, reply := range rows {
		t.Run(name, func(t *testing.T) {
			c := dialStatus(t, mib, reply)
			n := 0
			for _, err := range c.BlockStatus(context.Background(), ctxA, 0, mib) {
				require.ErrorIs(t, err, nbd.ErrProtocol)
				n++
			}
			require.Equal(t, 1, n)
		})
	}
	t.Run("refused half-way", func(t *testing.T) {
		c := dialStatus(t, mib, func(r fakeRequest) []byte {
			if r.off > 0 {
				return chunk(done, kindError, r.cookie, uint32(5), uint16(0))
			}
			return be(chunk(0, kindStat, r.cookie, uint32(10), uint32(512), uint32(1)),
				chunk(done, kindStat, r.cookie, uint32(11), uint32(512), uint32(1)))
		})
		var got []nbd.Extent
		var failed error
		for e, err := range c.BlockStatus(context.Background(), ctxA, 0, mib) {
			if err != nil {
				require.NoError(t, failed)
				failed = err
				continue
			}
			got = append(got, e)
		}
		require.ErrorIs(t, failed, nbd.EIO)
		require.Equal(t, []nbd.Extent{{Length: 512, Flags: 1}}, got)
	})
	c := dialStatus(t, mib, func(fakeRequest) []byte { return nil })
	for _, r := range [][2]int64{{-1, 1}, {0, -1}, {0, mib + 1}, {mib, 1}, {1, 1<<63 - 1}} {
		for _, err := range c.BlockStatus(context.Background(), ctxA, r[0], r[1]) {
			require.ErrorIs(t, err, nbd.ErrOutOfRange)
		}
	}
	for range c.BlockStatus(context.Background(), ctxA, mib, 0) {
		t.Fatal("an extent of nothing")
	}
}
