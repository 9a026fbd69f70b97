package nbd_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"sync/atomic"
	"testing"

	"github.com/holdfast-backup/holdfast/nbd"
)

// be concatenates values in network byte order; strings and bytes stand for themselves.
func be(values ...any) []byte {
	var b bytes.Buffer
	for _, v := range values {
		switch v := v.(type) {
		case string:
			b.WriteString(v)
		case []byte:
			b.Write(v)
		default:
			if err := binary.Write(&b, binary.BigEndian, v); err != nil {
				panic(err)
			}
		}
	}
	return b.Bytes()
}

// Building blocks of the wire, written down here once more so that the tests do not share the code
// under test.
func greeting(flags uint16) []byte { return be("NBDMAGIC", "IHAVEOPT", flags) }

func optReply(opt, typ uint32, data ...any) []byte {
	d := be(data...)
	return be(uint64(0x3e889045565a9), opt, typ, uint32(len(d)), d)
}

func simpleReply(errno uint32, cookie uint64, data ...any) []byte {
	return be(uint32(0x67446698), errno, cookie, be(data...))
}

func chunk(flags, kind uint16, cookie uint64, data ...any) []byte {
	d := be(data...)
	return be(uint32(0x668e33ef), flags, kind, cookie, uint32(len(d)), d)
}

const (
	fakeSize  = 1 << 20
	flagsRO   = uint16(1 | 2)
	errUnsup  = uint32(1<<31 | 1)
	done      = uint16(1)
	kindNone  = uint16(0)
	kindData  = uint16(1)
	kindHole  = uint16(2)
	kindStat  = uint16(5)
	kindError = uint16(1<<15 | 1)
	kindErrAt = uint16(1<<15 | 2)
)

// fakeServer is a server that a test scripts.
type fakeServer struct {
	plain    bool
	size     uint64
	flags    uint16
	contexts []string // granted with IDs 10, 11, ...
	tls      *tls.Config
	// replies overrides the answer to an option; nil bytes close the connection.
	options map[uint32][]byte
	// serve runs the transmission phase.
	serve func(c net.Conn) error
}

// fakeRequest is a request header.
type fakeRequest struct {
	flags, cmd  uint16
	cookie, off uint64
	length      uint32
}

// next reads a request header.
func next(c io.Reader) (fakeRequest, error) {
	var b [28]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return fakeRequest{}, err
	}
	return fakeRequest{
		flags: binary.BigEndian.Uint16(b[4:]), cmd: binary.BigEndian.Uint16(b[6:]),
		cookie: binary.BigEndian.Uint64(b[8:]), off: binary.BigEndian.Uint64(b[16:]),
		length: binary.BigEndian.Uint32(b[24:]),
	}, nil
}

// handle plays the server on one connection.
func (f *fakeServer) handle(c net.Conn) error {
	defer func() { _ = c.Close() }()
	if _, err := c.Write(greeting(3)); err != nil {
		return err
	}
	var b [16]byte
	if _, err := io.ReadFull(c, b[:4]); err != nil {
		return err
	}
	for {
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return err
		}
		opt := binary.BigEndian.Uint32(b[8:])
		data := make([]byte, binary.BigEndian.Uint32(b[12:]))
		if _, err := io.ReadFull(c, data); err != nil {
			return err
		}
		reply, special := f.options[opt]
		if special && reply == nil {
			return nil
		}
		begin := false
		if !special {
			reply, begin = f.answer(opt)
		}
		if _, err := c.Write(reply); err != nil {
			return err
		}
		switch {
		case opt == 5 && f.tls != nil && !special:
			t := tls.Server(c, f.tls)
			if err := t.Handshake(); err != nil {
				return err
			}
			c = t
		case begin:
			if f.serve == nil {
				_, err := next(c)
				return err
			}
			return f.serve(c)
		}
	}
}

// answer is the normal answer to an option.
func (f *fakeServer) answer(opt uint32) (reply []byte, begin bool) {
	size, flags := f.size, f.flags
	if size == 0 {
		size = fakeSize
	}
	if flags == 0 {
		flags = flagsRO
	}
	switch {
	case opt == 1:
		return be(size, flags), true
	case opt == 5 && f.tls != nil, opt == 8 && !f.plain:
		return optReply(opt, 1), false
	case opt == 10:
		for i, name := range f.contexts {
			reply = append(reply, optReply(opt, 4, uint32(10+i), name)...)
		}
		return append(reply, optReply(opt, 1)...), false
	case opt == 7:
		return append(optReply(opt, 3, uint16(0), size, flags), optReply(opt, 1)...), true
	case opt == 2:
		return optReply(opt, 1), false
	}
	return optReply(opt, errUnsup), false
}

// config returns a client configuration whose connections reach the given servers one after another;
// the last one serves all further connections. dials counts.
func fakeConfig(t testing.TB, dials *atomic.Int32, servers ...*fakeServer) nbd.Config {
	t.Helper()
	return nbd.Config{
		Network: "fake", Address: "fake:1",
		Dialer: func(context.Context, string, string) (net.Conn, error) {
			i := int(dials.Add(1)) - 1
			a, b := net.Pipe()
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				_ = servers[min(i, len(servers)-1)].handle(b)
			}()
			t.Cleanup(func() {
				_ = a.Close()
				<-ended
			})
			return a, nil
		},
	}
}
