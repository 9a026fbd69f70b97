package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

// raw is a client that sends what it likes.
type raw struct {
	t    testing.TB
	conn net.Conn
}

func rawClient(t testing.TB, cfg nbd.Config) *raw { return rawClientFlags(t, cfg, 3) }

func rawClientFlags(t testing.TB, cfg nbd.Config, flags uint32) *raw {
	t.Helper()
	conn, err := net.Dial(cfg.Network, cfg.Address)
	require.NoError(t, err)
	require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
	t.Cleanup(func() { _ = conn.Close() })
	c := &raw{t, conn}
	require.Equal(t, greeting(3), c.read(18))
	c.send(be(flags))
	return c
}

func (c *raw) send(b []byte) {
	c.t.Helper()
	_, err := c.conn.Write(b)
	require.NoError(c.t, err)
}

func (c *raw) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(c.conn, b)
	require.NoError(c.t, err)
	return b
}

func (c *raw) option(opt uint32, data []byte) {
	c.t.Helper()
	c.send(be("IHAVEOPT", opt, uint32(len(data)), data))
}

// mustReply sends an option and checks the types of all replies; it returns the data of the last.
func (c *raw) mustReply(opt uint32, data []byte, types ...uint32) []byte {
	c.t.Helper()
	c.option(opt, data)
	var last []byte
	for _, want := range types {
		h := c.read(20)
		require.Equal(c.t, be(uint64(0x3e889045565a9), opt, want), h[:16], "option %d", opt)
		last = c.read(int(binary.BigEndian.Uint32(h[16:])))
	}
	return last
}

// mustEnd demands that the server closes the connection.
func (c *raw) mustEnd() {
	c.t.Helper()
	n, err := io.Copy(io.Discard, c.conn)
	require.Zero(c.t, n)
	if err != nil {
		require.NotErrorIs(c.t, err, context.DeadlineExceeded)
		var timeout net.Error
		require.False(c.t, errorsAsTimeout(err, &timeout), "hung: %v", err)
	}
}

func errorsAsTimeout(err error, target *net.Error) bool {
	return errors.As(err, target) && (*target).Timeout()
}

// command encodes a request.
func command(flags, cmd uint16, cookie, off uint64, length uint32) []byte {
	return be(uint32(0x25609513), flags, cmd, cookie, off, length)
}

// enter opens the default export with structured replies and base:allocation.
func (c *raw) enter() {
	c.t.Helper()
	c.mustReply(8, nil, 1)
	c.mustReply(10, be(uint32(0), uint32(1), uint32(15), nbd.ContextBaseAllocation), 4, 1)
	c.mustReply(7, be(uint32(0), uint16(1), uint16(3)), 3, 3, 1)
}

// refused reads an error chunk and returns its errno.
func (c *raw) refused(cookie uint64) uint32 {
	c.t.Helper()
	h := c.read(20)
	require.Equal(c.t, be(uint32(0x668e33ef), done, kindError, cookie), h[:16])
	return binary.BigEndian.Uint32(c.read(int(binary.BigEndian.Uint32(h[16:]))))
}

func TestHostileOptions(t *testing.T) {
	_, cfg := serveMem(t, newMem(mib))
	long := bytes.Repeat([]byte{'x'}, 5000)
	c := rawClient(t, cfg)
	invalid, unsup, unknown := uint32(1<<31|3), errUnsup, uint32(1<<31|6)
	c.mustReply(3, []byte{1}, invalid)
	c.mustReply(8, []byte{1}, invalid)
	c.mustReply(99, long, unsup)
	c.mustReply(4, nil, unsup)
	c.mustReply(5, nil, unsup)
	c.mustReply(7, nil, invalid)
	c.mustReply(7, be(uint32(math.MaxUint32), uint16(0)), invalid)
	c.mustReply(7, be(uint32(0), uint16(2), uint16(0)), invalid)
	c.mustReply(7, be(uint32(0), uint16(0), byte(0)), invalid)
	c.mustReply(7, be(uint32(len(long)), long, uint16(0)), invalid)
	c.mustReply(7, be(uint32(1), "x", uint16(0)), unknown)
	c.mustReply(6, be(uint32(1), "x", uint16(0)), unknown)
	c.mustReply(10, be(uint32(0), uint32(0)), invalid) // before structured replies
	c.mustReply(8, nil, 1)
	c.mustReply(10, nil, invalid)
	c.mustReply(10, be(uint32(0), uint32(math.MaxUint32)), invalid)
	c.mustReply(10, be(uint32(0), uint32(1), uint32(math.MaxUint32)), invalid)
	c.mustReply(10, be(uint32(0), uint32(0), byte(0)), invalid)
	c.mustReply(10, be(uint32(1), "x", uint32(0)), unknown)
	c.mustReply(10, be(uint32(0), uint32(2), uint32(5), "a:b:c", uint32(4), "qemu"), 1) // dropped silently
	c.mustReply(10, be(uint32(0), uint32(1), uint32(5), "base:"), 1)                    // no wildcard here
	c.mustReply(9, be(uint32(0), uint32(0)), 4, 4, 1)
	require.Equal(t, be(uint32(0), memDirty), firstOf(c, 9, be(uint32(0), uint32(1), uint32(18), "qemu:dirty-bitmap:")))
	c.mustReply(2, nil, 1)
	c.mustEnd()

	for _, bad := range [][]byte{
		be("IHAVEOPX", uint32(3), uint32(0)),
		be("IHAVEOPT", uint32(3), uint32(math.MaxUint32)),
		be("IHAVEOPT", uint32(7), uint32(200<<10)),
		be("IHAVEOPT", uint32(1), uint32(1), "x"), // an unknown export cannot be refused otherwise
	} {
		c := rawClient(t, cfg)
		c.send(bad)
		c.mustEnd()
	}
	rawClientFlags(t, cfg, 4).mustEnd()
	c = rawClientFlags(t, cfg, 2)
	c.option(3, nil)
	c.mustEnd()
	c = rawClientFlags(t, cfg, 0)
	c.option(1, nil)
	require.Equal(t, be(uint64(mib)), c.read(8))
	require.Equal(t, make([]byte, 124), c.read(126)[2:])
}

// firstOf sends an option that gets one reply with data and an ACK, and returns the data.
func firstOf(c *raw, opt uint32, data []byte) []byte {
	c.t.Helper()
	first := c.mustReply(opt, data, 4)
	c.read(20)
	return first
}

func TestHostileCommands(t *testing.T) {
	m := newRandomMem(t, mib)
	_, cfg := serveMem(t, m)
	c := rawClient(t, cfg)
	c.enter()
	einval, enospc := uint32(22), uint32(28)
	rows := []struct {
		request []byte
		errno   uint32
	}{
		{command(0, 0, 1, mib, 1), einval},
		{command(0, 0, 1, math.MaxUint64, 1), einval},
		{command(0, 0, 1, 1<<63, 4096), einval},
		{command(0, 0, 1, 0, math.MaxUint32), einval},
		{command(0, 0, 1, 0, 32<<20+1), einval},
		{command(0, 0, 1, mib-1, 2), einval},
		{command(0x20, 0, 1, 0, 512), einval},
		{command(8, 0, 1, 0, 512), einval},
		{be(command(0, 1, 1, mib-1, 2), "xx"), enospc},
		{be(command(2, 1, 1, 0, 2), "xx"), einval},
		{command(0, 4, 1, mib, 1), enospc},
		{command(0, 6, 1, 1, math.MaxUint32), enospc},
		{command(1<<15, 6, 1, 0, 1), einval},
		{command(0, 5, 1, 0, 512), einval},
		{command(0, 8, 1, 0, 0), einval},
		{command(0, 999, 1, 0, 0), einval},
		{command(0, 7, 1, 0, 0), einval},
		{command(0, 7, 1, mib, 1), einval},
		{command(0, 7, 1, 1, math.MaxUint32), einval},
	}
	for i, row := range rows {
		c.send(row.request)
		require.Equal(t, row.errno, c.refused(1), "row %d", i)
	}
	c.send(command(0, 0, 2, 0, 0))
	require.Equal(t, chunk(done, kindNone, 2), c.read(20), "reading nothing")
	c.send(command(0, 1, 3, 0, 0))
	require.Equal(t, simpleReply(0, 3), c.read(16), "writing nothing")
	c.send(command(8, 7, 4, 0, mib)) // one extent
	require.Equal(t, chunk(done, kindStat, 4, uint32(1), uint32(mib), uint32(0)), c.read(32))
	c.send(command(4, 0, 5, 0, 100)) // unfragmented
	require.Equal(t, chunk(done, kindData, 5, uint64(0), m.data[:100]), c.read(128))

	for _, bad := range [][]byte{
		be(uint32(1), make([]byte, 24)),
		command(0, 1, 1, 0, 32<<20+1), // a payload nobody should send
		command(0, 1, 1, 0, math.MaxUint32),
	} {
		c := rawClient(t, cfg)
		c.enter()
		c.send(bad)
		c.mustEnd()
	}
	c.send(command(0, 2, 6, 0, 0))
	c.mustEnd()
}

// TestServerMemoryIsBounded announces writes without sending their data, and asks for more replies than
// it reads, on many connections.
func TestServerMemoryIsBounded(t *testing.T) {
	m := newRandomMem(t, 32*mib)
	s, cfg := serve(t, nbd.ServerConfig{
		Exports:        nbd.ExportMap{"": {Backend: m}},
		MaxMemory:      2 * mib,
		MaxRequest:     mib,
		MaxConnections: 8,
	})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 4 {
		c := rawClient(t, cfg)
		c.enter()
		var b bytes.Buffer
		for i := range 500 {
			b.Write(command(0, 0, uint64(i), 0, mib))
		}
		c.send(b.Bytes())
		c.read(1000) // the server is at work
		c = rawClient(t, cfg)
		c.enter()
		c.send(command(0, 1, 1, 0, mib))
	}
	over, err := net.Dial(cfg.Network, cfg.Address)
	require.NoError(t, err)
	require.NoError(t, over.SetDeadline(time.Now().Add(patience)))
	_, err = over.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF, "more connections than permitted")
	require.Equal(t, 8, s.Connections())
	runtime.GC()
	runtime.ReadMemStats(&after)
	require.Less(t, int64(after.HeapAlloc)-int64(before.HeapAlloc), int64(4*4*mib))
	require.NoError(t, within(t, s.Close), "stuck connections do not stop Close")
}

func TestHandshakeTimeout(t *testing.T) {
	ended := make(chan error, 1)
	_, cfg := serve(t, nbd.ServerConfig{
		Exports:          nbd.ExportMap{"": {Backend: newMem(mib)}},
		HandshakeTimeout: 20 * time.Millisecond,
		OnDisconnect:     func(_ net.Addr, _ string, err error) { ended <- err },
	})
	rawClient(t, cfg).mustEnd()
	require.Error(t, <-ended)
}

func TestBlockSizesAreEnforced(t *testing.T) {
	_, cfg := serve(t, nbd.ServerConfig{Exports: nbd.ExportMap{"": {
		Backend: newMem(mib), BlockSizes: nbd.BlockSizes{Minimum: 512, Preferred: 512, Maximum: 8192},
	}}})
	c := rawClient(t, cfg)
	c.mustReply(7, be(uint32(0), uint16(0)), 3, 3, 1<<31|8) // block sizes must be asked for
	c.enter()
	for _, request := range [][]byte{
		command(0, 0, 1, 1, 512), command(0, 0, 1, 0, 511), command(0, 0, 1, 0, 8704),
		be(command(0, 1, 1, 0, 8704), make([]byte, 8704)), command(0, 7, 1, 100, 512),
	} {
		c.send(request)
		require.EqualValues(t, 22, c.refused(1))
	}
	c = rawClient(t, cfg)
	c.option(1, nil)
	c.mustEnd()
}
