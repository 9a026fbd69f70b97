package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

// TestHostileReplies sends every kind of bad reply to a read of 4096 bytes at 8192 and demands that the
// client notices, closes the connection and says why.
func TestHostileReplies(t *testing.T) {
	data := bytes.Repeat([]byte{0xaa}, 4096)
	at := uint64(8192)
	rows := map[string]struct {
		plain bool
		reply func(cookie uint64) []byte
	}{
		"bad magic":             {false, func(c uint64) []byte { return be(uint32(1), uint32(0), c) }},
		"old request magic":     {true, func(c uint64) []byte { return be(uint32(0x96744668), uint32(0), c) }},
		"unknown cookie":        {false, func(c uint64) []byte { return chunk(done, kindData, c+1, at, data) }},
		"unknown cookie, plain": {true, func(c uint64) []byte { return simpleReply(0, c+1, data) }},
		"unknown cookie, error": {true, func(c uint64) []byte { return simpleReply(5, ^c) }},
		"structured unasked":    {true, func(c uint64) []byte { return chunk(done, kindData, c, at, data) }},
		"plain unasked":         {false, func(c uint64) []byte { return simpleReply(0, c, data) }},
		"short":                 {false, func(c uint64) []byte { return chunk(done, kindData, c, at, data[1:]) }},
		"short at the front":    {false, func(c uint64) []byte { return chunk(done, kindData, c, at+1, data[1:]) }},
		"nothing":               {false, func(c uint64) []byte { return chunk(done, kindNone, c) }},
		"oversized":             {false, func(c uint64) []byte { return chunk(done, kindData, c, at, data, byte(1)) }},
		"enormous":              {false, func(c uint64) []byte { return be(uint32(0x668e33ef), done, kindData, c, uint32(math.MaxUint32), at) }},
		"no data":               {false, func(c uint64) []byte { return chunk(0, kindData, c, at) }},
		"tiny chunk":            {false, func(c uint64) []byte { return chunk(0, kindData, c, uint32(1)) }},
		"before the start":      {false, func(c uint64) []byte { return chunk(done, kindData, c, at-1, data) }},
		"far before the start":  {false, func(c uint64) []byte { return chunk(done, kindData, c, uint64(0), data) }},
		"negative offset":       {false, func(c uint64) []byte { return chunk(done, kindData, c, uint64(math.MaxUint64)-4095, data) }},
		"wrapping offset":       {false, func(c uint64) []byte { return chunk(done, kindData, c, uint64(1<<63)+at, data) }},
		"past the end":          {false, func(c uint64) []byte { return chunk(done, kindData, c, at+1, data) }},
		"overlap":               {false, func(c uint64) []byte { return be(chunk(0, kindData, c, at, data), chunk(done, kindData, c, at, data)) }},
		"overlap of a byte": {false, func(c uint64) []byte {
			return be(chunk(0, kindData, c, at, data[:10]), chunk(done, kindData, c, at+9, data[9:]))
		}},
		"overlap with a hole": {false, func(c uint64) []byte {
			return be(chunk(0, kindHole, c, at, uint32(10)), chunk(done, kindData, c, at, data))
		}},
		"overlap out of order": {false, func(c uint64) []byte {
			return be(chunk(0, kindData, c, at+100, data[:100]), chunk(done, kindData, c, at, data[:101]))
		}},
		"hole in the data": {false, func(c uint64) []byte {
			return be(chunk(0, kindData, c, at, data[:10]), chunk(done, kindData, c, at+11, data[11:]))
		}},
		"empty hole":             {false, func(c uint64) []byte { return chunk(done, kindHole, c, at, uint32(0)) }},
		"hole too long":          {false, func(c uint64) []byte { return chunk(done, kindHole, c, at, uint32(4097)) }},
		"hole enormous":          {false, func(c uint64) []byte { return chunk(done, kindHole, c, at, uint32(math.MaxUint32)) }},
		"hole before the start":  {false, func(c uint64) []byte { return chunk(done, kindHole, c, at-1, uint32(4096)) }},
		"hole of bad length":     {false, func(c uint64) []byte { return chunk(done, kindHole, c, at, uint32(4096), byte(0)) }},
		"status for a read":      {false, func(c uint64) []byte { return chunk(done, kindStat, c, uint32(10), uint32(4096), uint32(0)) }},
		"unknown chunk":          {false, func(c uint64) []byte { return chunk(done, 77, c) }},
		"none without done":      {false, func(c uint64) []byte { return chunk(0, kindNone, c) }},
		"none with data":         {false, func(c uint64) []byte { return chunk(done, kindNone, c, byte(0)) }},
		"error without an error": {false, func(c uint64) []byte { return chunk(done, kindError, c, uint32(0), uint16(0)) }},
		"error too short":        {false, func(c uint64) []byte { return chunk(done, kindError, c, uint32(5)) }},
		"error text too long":    {false, func(c uint64) []byte { return chunk(done, kindError, c, uint32(5), uint16(5), "four") }},
		"error text over 4096": {false, func(c uint64) []byte {
			return chunk(done, kindError, c, uint32(5), uint16(4097), strings.Repeat("x", 4097))
		}},
		"error chunk enormous": {false, func(c uint64) []byte {
			return be(uint32(0x668e33ef), done, kindError, c, uint32(32<<20+1), uint32(5), uint16(0))
		}},
		"error offset too short":  {false, func(c uint64) []byte { return chunk(done, kindErrAt, c, uint32(5), uint16(0), uint32(0)) }},
		"error offset outside":    {false, func(c uint64) []byte { return chunk(done, kindErrAt, c, uint32(5), uint16(0), at-1) }},
		"reply after the request": {false, func(c uint64) []byte { return be(chunk(done, kindData, c, at, data), chunk(done, kindNone, c)) }},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			var dials atomic.Int32
			cfg := fakeConfig(t, &dials, &fakeServer{plain: row.plain, serve: func(c net.Conn) error {
				r, err := next(c)
				if err != nil {
					return err
				}
				if _, err := c.Write(row.reply(r.cookie)); err != nil {
					return err
				}
				_, err = io.Copy(io.Discard, c) // until the client hangs up
				return err
			}})
			c := dial(t, cfg)
			_, err := c.ReadAt(make([]byte, 4096), 8192)
			if name == "reply after the request" && err == nil {
				_, err = c.ReadAt(make([]byte, 4096), 8192) // its reply never comes: the connection is cut
			}
			require.ErrorIs(t, err, nbd.ErrProtocol)
			require.ErrorIs(t, err, nbd.ErrConnectionLost)
			require.Zero(t, c.Connections())
			_, err = c.ReadAt(make([]byte, 1), 0)
			require.ErrorIs(t, err, nbd.ErrConnectionLost)
		})
	}
}

// TestUnusualRepliesAreAccepted covers what is rare and permitted.
func TestUnusualRepliesAreAccepted(t *testing.T) {
	want := make([]byte, 4096)
	fill(seeded(t), want)
	at := uint64(8192)
	rows := map[string]func(cookie uint64) []byte{
		"one chunk": func(c uint64) []byte { return chunk(done, kindData, c, at, want) },
		"backwards": func(c uint64) []byte {
			return be(chunk(0, kindData, c, at+3000, want[3000:]), chunk(0, kindData, c, at+1000, want[1000:3000]),
				chunk(0, kindData, c, at, want[:1000]), chunk(done, kindNone, c))
		},
		"inside out": func(c uint64) []byte {
			return be(chunk(0, kindData, c, at+1000, want[1000:2000]), chunk(0, kindData, c, at+3000, want[3000:]),
				chunk(0, kindData, c, at+2000, want[2000:3000]), chunk(done, kindData, c, at, want[:1000]))
		},
		"unknown flags": func(c uint64) []byte { return chunk(done|0x80, kindData, c, at, want) },
		"byte by byte": func(c uint64) []byte {
			var b bytes.Buffer
			for i := range want {
				b.Write(chunk(0, kindData, c, at+uint64(i), want[i]))
			}
			b.Write(chunk(done, kindNone, c))
			return b.Bytes()
		},
	}
	for name, reply := range rows {
		t.Run(name, func(t *testing.T) {
			var dials atomic.Int32
			c := dial(t, fakeConfig(t, &dials, &fakeServer{serve: func(c net.Conn) error {
				r, err := next(c)
				if err == nil {
					_, err = c.Write(reply(r.cookie))
				}
				_, _ = next(c)
				return err
			}}))
			p := make([]byte, 4096)
			_, err := c.ReadAt(p, int64(at))
			require.NoError(t, err)
			requireSame(t, want, p, "reply")
		})
	}
}

// TestErrorChunks checks that an error anywhere in a reply fails the read, and only when the reply ends.
func TestErrorChunks(t *testing.T) {
	data := make([]byte, 4096)
	var dials atomic.Int32
	c := dial(t, fakeConfig(t, &dials, &fakeServer{serve: func(c net.Conn) error {
		for i := 0; ; i++ {
			r, err := next(c)
			if err != nil {
				return err
			}
			var reply []byte
			switch i {
			case 0:
				reply = be(chunk(0, kindErrAt, r.cookie, uint32(5), uint16(3), "bad", r.off+7),
					chunk(0, kindData, r.cookie, r.off, data), chunk(done, kindNone, r.cookie))
			case 1:
				reply = chunk(done, 1<<15|99, r.cookie, uint32(28), uint16(2), "no", "extra fields")
			case 2:
				reply = simpleReply(22, r.cookie) // tolerated: it is unambiguous
			case 3:
				reply = chunk(done, kindError, r.cookie, uint32(1234), uint16(0))
			default:
				reply = chunk(done, kindHole, r.cookie, r.off, uint32(4096))
			}
			if _, err := c.Write(reply); err != nil {
				return err
			}
		}
	}}))
	p := make([]byte, 4096)
	_, err := c.ReadAt(p, 0)
	var req *nbd.RequestError
	require.ErrorAs(t, err, &req)
	require.Equal(t, &nbd.RequestError{Op: "read", Length: 4096, At: 7, Errno: nbd.EIO, Message: "bad"}, req)
	_, err = c.ReadAt(p, 0)
	require.ErrorIs(t, err, nbd.ENOSPC)
	_, err = c.ReadAt(p, 0)
	require.ErrorIs(t, err, nbd.EINVAL)
	_, err = c.ReadAt(p, 0)
	require.ErrorIs(t, err, nbd.Errno(1234))
	_, err = c.ReadAt(p, 0)
	require.NoError(t, err)
}

// TestInterleavedReplies answers two requests with their chunks mixed and in reverse order.
func TestInterleavedReplies(t *testing.T) {
	var dials atomic.Int32
	c := dial(t, fakeConfig(t, &dials, &fakeServer{serve: func(c net.Conn) error {
		a, err := next(c)
		if err != nil {
			return err
		}
		b, err := next(c)
		if err != nil {
			return err
		}
		part := func(r fakeRequest, from, to int) []byte {
			p := make([]byte, to-from)
			for i := range p {
				p[i] = byte(r.off>>12) + 1
			}
			return be(r.off+uint64(from), p)
		}
		_, err = c.Write(be(
			chunk(0, kindData, b.cookie, part(b, 0, 100)), chunk(0, kindData, a.cookie, part(a, 2000, 4096)),
			chunk(done, kindData, b.cookie, part(b, 100, 4096)), chunk(done, kindData, a.cookie, part(a, 0, 2000))))
		_, _ = next(c)
		return err
	}}))
	results := make(chan error, 2)
	for i := range 2 {
		go func() {
			p := make([]byte, 4096)
			_, err := c.ReadAt(p, int64(i)<<12)
			if err == nil && !bytes.Equal(p, bytes.Repeat([]byte{byte(i) + 1}, 4096)) {
				err = errors.New("bytes of the wrong request")
			}
			results <- err
		}()
	}
	require.NoError(t, <-results)
	require.NoError(t, <-results)
}

// TestHostileHandshake demands an error, not a hang or a crash, for bad answers to options.
func TestHostileHandshake(t *testing.T) {
	export := optReply(7, 3, uint16(0), uint64(fakeSize), flagsRO)
	ack := optReply(7, 1)
	rows := map[string]map[uint32][]byte{
		"no export information": {7: ack},
		"short information":     {7: be(optReply(7, 3, uint16(0), uint64(1)), ack)},
		"one byte":              {7: be(optReply(7, 3, byte(0)), ack)},
		"size over 63 bits":     {7: be(optReply(7, 3, uint16(0), uint64(1<<63), flagsRO), ack)},
		"block size 0":          {7: be(export, optReply(7, 3, uint16(3), uint32(0), uint32(4096), uint32(1<<20)), ack)},
		"block size 3":          {7: be(export, optReply(7, 3, uint16(3), uint32(3), uint32(4096), uint32(1<<20)), ack)},
		"block size 128K":       {7: be(export, optReply(7, 3, uint16(3), uint32(1<<17), uint32(1<<17), uint32(1<<20)), ack)},
		"maximum below minimum": {7: be(export, optReply(7, 3, uint16(3), uint32(4096), uint32(4096), uint32(512)), ack)},
		"wrong option":          {7: optReply(6, 1)},
		"wrong magic":           {7: be(uint64(1), uint32(7), uint32(1), uint32(0))},
		"endless information":   {7: bytes.Repeat(export, 1000)},
		"huge reply":            {7: be(uint64(0x3e889045565a9), uint32(7), uint32(3), uint32(math.MaxUint32))},
		"unknown reply":         {7: be(export, optReply(7, 99), ack)},
		"server entry":          {7: optReply(7, 2, uint32(0))},
		"context granted twice": {10: be(optReply(10, 4, uint32(1), "base:allocation"), optReply(10, 4, uint32(1), "x:y"), optReply(10, 1))},
		"same name twice":       {10: be(optReply(10, 4, uint32(1), "base:allocation"), optReply(10, 4, uint32(2), "base:allocation"), optReply(10, 1))},
		"empty context":         {10: be(optReply(10, 4, uint32(1)), optReply(10, 1))},
		"endless contexts":      {10: manyContexts(5000)},
		"structured with info":  {8: optReply(8, 3, uint16(0))},
	}
	for name, options := range rows {
		t.Run(name, func(t *testing.T) {
			var dials atomic.Int32
			cfg := fakeConfig(t, &dials, &fakeServer{options: options})
			cfg.MetaContexts = []string{nbd.ContextBaseAllocation}
			_, err := nbd.Dial(context.Background(), cfg)
			require.ErrorIs(t, err, nbd.ErrProtocol)
		})
	}
	refusals := map[string]struct {
		options map[uint32][]byte
		want    error
	}{
		"unknown export":   {map[uint32][]byte{7: optReply(7, 1<<31|6, "no such thing")}, nbd.ErrUnknownExport},
		"TLS":              {map[uint32][]byte{8: optReply(8, 1<<31|5)}, nbd.ErrTLSRequired},
		"shutdown":         {map[uint32][]byte{7: optReply(7, 1<<31|7)}, nbd.ESHUTDOWN},
		"hang-up":          {map[uint32][]byte{7: nil}, nbd.ErrConnectionLost},
		"old way, hang-up": {map[uint32][]byte{7: optReply(7, errUnsup), 1: nil}, nbd.ErrConnectionLost},
	}
	for name, row := range refusals {
		t.Run(name, func(t *testing.T) {
			var dials atomic.Int32
			_, err := nbd.Dial(context.Background(), fakeConfig(t, &dials, &fakeServer{options: row.options}))
			require.ErrorIs(t, err, row.want)
		})
	}
}

// manyContexts grants n contexts with different IDs and names.
func manyContexts(n int) []byte {
	var b bytes.Buffer
	for i := range n {
		b.Write(optReply(10, 4, uint32(i), fmt.Sprintf("x-test:%d", i)))
	}
	return b.Bytes()
}

func TestFallBackToExportName(t *testing.T) {
	var dials atomic.Int32
	c := dial(t, fakeConfig(t, &dials, &fakeServer{
		options: map[uint32][]byte{7: optReply(7, errUnsup)},
		serve: func(c net.Conn) error {
			r, err := next(c)
			if err == nil {
				_, err = c.Write(chunk(done, kindHole, r.cookie, r.off, r.length))
			}
			_, _ = next(c)
			return err
		},
	}))
	require.EqualValues(t, fakeSize, c.Size())
	require.False(t, c.BlockSizes().Advertised)
	_, err := c.ReadAt(make([]byte, 10), 3)
	require.NoError(t, err)
}

// TestMemoryIsBounded claims huge chunks and delivers nothing: nothing may be allocated for the claim.
func TestMemoryIsBounded(t *testing.T) {
	claims := []func(r fakeRequest) []byte{
		func(r fakeRequest) []byte {
			return be(uint32(0x668e33ef), done, kindStat, r.cookie, uint32(32<<20-4), uint32(10))
		},
		func(r fakeRequest) []byte { return be(uint32(0x668e33ef), done, kindError, r.cookie, uint32(32<<20)) },
	}
	for _, claim := range claims {
		var dials atomic.Int32
		hold := make(chan struct{})
		cfg := fakeConfig(t, &dials, &fakeServer{contexts: []string{nbd.ContextBaseAllocation}, serve: func(c net.Conn) error {
			defer close(hold)
			r, err := next(c)
			if err == nil {
				_, err = c.Write(claim(r))
			}
			return err
		}})
		cfg.RequiredContexts = []string{nbd.ContextBaseAllocation}
		c := dial(t, cfg)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for _, err := range statusOf(c) {
			require.Error(t, err)
		}
		<-hold
		runtime.ReadMemStats(&after)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(mib))
	}
}

func statusOf(c *nbd.Client) func(func(nbd.Extent, error) bool) {
	return c.BlockStatus(context.Background(), nbd.ContextBaseAllocation, 0, c.Size())
}
