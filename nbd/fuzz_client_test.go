package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/nbd"
)

// playback is a connection whose peer says something fixed: first at once, then the rest only after a
// number of requests were sent, then the end of the stream.
type playback struct {
	mu       sync.Mutex
	cond     *sync.Cond
	first    []byte
	rest     []byte
	requests int // still to be seen before rest is said
	closed   bool
}

func newPlayback(first, rest []byte, requests int) *playback {
	p := &playback{first: first, rest: rest, requests: requests}
	p.cond = sync.NewCond(&p.mu)
	return p
}

func (p *playback) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.first) > 0 {
		n := copy(b, p.first)
		p.first = p.first[n:]
		return n, nil
	}
	for p.requests > 0 && !p.closed {
		p.cond.Wait()
	}
	if p.closed {
		return 0, net.ErrClosed
	}
	if len(p.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

func (p *playback) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return 0, net.ErrClosed
	}
	if len(b) >= 28 && binary.BigEndian.Uint32(b) == 0x25609513 {
		p.requests--
		p.cond.Broadcast()
	}
	return len(b), nil
}

func (p *playback) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.cond.Broadcast()
	return nil
}

func (p *playback) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (p *playback) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (p *playback) SetDeadline(time.Time) error      { return nil }
func (p *playback) SetReadDeadline(time.Time) error  { return nil }
func (p *playback) SetWriteDeadline(time.Time) error { return nil }

func playbackConfig(p *playback) nbd.Config {
	return nbd.Config{
		Network: "fake", Address: "x",
		Dialer: func(context.Context, string, string) (net.Conn, error) { return p, nil },
	}
}

// accepted is a handshake that ends well.
func accepted(structured bool, contexts ...string) []byte {
	b := greeting(3)
	if structured {
		b = append(b, optReply(8, 1)...)
	} else {
		b = append(b, optReply(8, errUnsup)...)
	}
	if len(contexts) > 0 {
		for i, name := range contexts {
			b = append(b, optReply(10, 4, uint32(10+i), name)...)
		}
		b = append(b, optReply(10, 1)...)
	}
	b = append(b, optReply(7, 3, uint16(0), uint64(fakeSize), flagsRO)...)
	return append(b, optReply(7, 1)...)
}

// FuzzClientHandshake feeds the client a handshake.
func FuzzClientHandshake(f *testing.F) {
	f.Add(accepted(true, nbd.ContextBaseAllocation, "x:y"))
	f.Add(accepted(false))
	f.Add(be(greeting(0), uint64(fakeSize), flagsRO, make([]byte, 124)))
	f.Add(be(greeting(1), optReply(8, errUnsup), optReply(7, errUnsup, "old"), uint64(fakeSize), flagsRO, make([]byte, 124)))
	f.Add(be(greeting(3), optReply(8, 1), optReply(10, 4, uint32(1), "x:y"), optReply(10, 1),
		optReply(7, 3, uint16(3), uint32(512), uint32(4096), uint32(1<<20)),
		optReply(7, 3, uint16(0), uint64(fakeSize), uint16(0x58f)), optReply(7, 3, uint16(2), "text"), optReply(7, 1)))
	f.Add(be(greeting(3), optReply(3, 2, uint32(3), "vda", "text"), optReply(3, 1)))
	f.Add(be(greeting(3), optReply(8, 1), optReply(9, 4, uint32(0), "x:y"), optReply(9, 1),
		optReply(6, 3, uint16(0), uint64(fakeSize), flagsRO), optReply(6, 1)))
	f.Fuzz(func(t *testing.T, b []byte) {
		ctx := context.Background()
		cfg := playbackConfig(newPlayback(b, nil, 0))
		cfg.MetaContexts = []string{"x:y"}
		if c, err := nbd.Dial(ctx, cfg); err == nil {
			if c.Size() < 0 || c.BlockSizes().Minimum < 1 || c.BlockSizes().Maximum < c.BlockSizes().Minimum {
				t.Fatalf("accepted size %d, blocks %+v", c.Size(), c.BlockSizes())
			}
			_ = c.Close()
		}
		_, _ = nbd.List(ctx, playbackConfig(newPlayback(b, nil, 0)))
		_, _ = nbd.Describe(ctx, playbackConfig(newPlayback(b, nil, 0)))
	})
}

// fuzzRead reads with the given replies and checks what can be checked: a read that succeeds has
// replaced every byte.
func fuzzRead(t *testing.T, structured bool, b []byte) {
	t.Helper()
	p := newPlayback(accepted(structured), b, 1)
	c, err := nbd.Dial(context.Background(), playbackConfig(p))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	buf := bytes.Repeat([]byte{0x5a}, 64)
	n, info, err := c.ReadAtInfo(context.Background(), buf, 100)
	if err != nil {
		var req *nbd.RequestError
		if !errors.As(err, &req) && !errors.Is(err, nbd.ErrConnectionLost) {
			t.Fatalf("untyped error %v", err)
		}
		return
	}
	if n != len(buf) || info.HoleBytes > 64 || info.Hole != (info.HoleBytes == 64) {
		t.Fatalf("read %d, %+v", n, info)
	}
	if info.Hole && !bytes.Equal(buf, make([]byte, 64)) {
		t.Fatal("a hole that is not zero")
	}
	if !bytes.Contains(b, []byte{0x5a}) && bytes.Contains(buf, []byte{0x5a}) {
		t.Fatal("a byte was left out")
	}
}

// FuzzClientStructured feeds the client structured replies to a read.
func FuzzClientStructured(f *testing.F) {
	data := bytes.Repeat([]byte{1}, 64)
	f.Add(chunk(done, kindData, 1, uint64(100), data))
	f.Add(be(chunk(0, kindHole, 1, uint64(132), uint32(32)), chunk(done, kindData, 1, uint64(100), data[:32])))
	f.Add(be(chunk(0, kindData, 1, uint64(110), data[:10]), chunk(0, kindData, 1, uint64(100), data[:10]),
		chunk(0, kindHole, 1, uint64(120), uint32(44)), chunk(done, kindNone, 1)))
	f.Add(chunk(done, kindError, 1, uint32(5), uint16(3), "bad"))
	f.Add(be(chunk(0, kindErrAt, 1, uint32(5), uint16(3), "bad", uint64(120)), chunk(done, kindNone, 1)))
	f.Add(simpleReply(5, 1))
	f.Fuzz(func(t *testing.T, b []byte) { fuzzRead(t, true, b) })
}

// FuzzClientPlain feeds the client plain replies to a read.
func FuzzClientPlain(f *testing.F) {
	f.Add(simpleReply(0, 1, bytes.Repeat([]byte{1}, 64)))
	f.Add(simpleReply(28, 1))
	f.Add(simpleReply(0, 2))
	f.Fuzz(func(t *testing.T, b []byte) { fuzzRead(t, false, b) })
}

// FuzzBlockStatus feeds the client block status replies; cookies count from 1.
func FuzzBlockStatus(f *testing.F) {
	f.Add(be(chunk(0, kindStat, 1, uint32(10), uint32(400), uint32(1), uint32(700), uint32(0)),
		chunk(done, kindStat, 1, uint32(11), uint32(2000), uint32(3))))
	f.Add(be(chunk(0, kindStat, 1, uint32(11), uint32(10), uint32(1)), chunk(done, kindStat, 1, uint32(10), uint32(999), uint32(3)),
		chunk(0, kindStat, 2, uint32(11), uint32(990), uint32(1)), chunk(done, kindStat, 2, uint32(10), uint32(1), uint32(3))))
	f.Add(chunk(done, kindError, 1, uint32(22), uint16(0)))
	f.Fuzz(func(t *testing.T, b []byte) {
		names := []string{ctxA, ctxB}
		cfg := playbackConfig(newPlayback(accepted(true, names...), b, 1))
		cfg.RequiredContexts = names
		c, err := nbd.Dial(context.Background(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		pos, last, failed := int64(100), []uint32(nil), false
		for e, err := range c.BlockStatusMulti(context.Background(), names, 100, 1000) {
			if failed {
				t.Fatal("the walk went on after an error")
			}
			if failed = err != nil; failed {
				continue
			}
			if e.Offset != pos || e.Length <= 0 || e.Offset+e.Length > 1100 || len(e.Flags) != 2 {
				t.Fatalf("extent %+v at %d", e, pos)
			}
			if last != nil && last[0] == e.Flags[0] && last[1] == e.Flags[1] {
				t.Fatalf("neighbours not merged: %+v", e)
			}
			pos, last = pos+e.Length, e.Flags
		}
		if !failed && pos != 1100 {
			t.Fatalf("walk ended at %d without an error", pos)
		}
	})
}

// FuzzURL checks that what is accepted can be written and read again with the same meaning.
func FuzzURL(f *testing.F) {
	for _, s := range []string{
		"nbd://h:1/x", "nbds://[::1]/a%2Fb?tls-hostname=n", "nbd+unix:///x?socket=/s", "nbds+unix:///?socket=%00s&tls-hostname=h",
		"nbd://[fe80::1%25eth0]/x", "nbd:", "nbd:///%25", "nbd://h//x",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := nbd.ParseURL(s)
		if err != nil {
			return
		}
		b, err := nbd.ParseURL(a.URL())
		if err != nil {
			t.Fatalf("%q -> %q: %v", s, a.URL(), err)
		}
		if a.Network != b.Network || a.Address != b.Address || a.Export != b.Export || a.RequireTLS != b.RequireTLS ||
			(a.TLS != nil && a.TLS.ServerName != b.TLS.ServerName) {
			t.Fatalf("%q -> %+v -> %q -> %+v", s, a, a.URL(), b)
		}
	})
}
