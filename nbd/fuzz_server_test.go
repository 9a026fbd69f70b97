package nbd_test

import (
	"bytes"
	"context"
	"testing"

	"github.com/holdfast-backup/holdfast/nbd"
)

func optionBytes(opt uint32, data ...any) []byte {
	d := be(data...)
	return be("IHAVEOPT", opt, uint32(len(d)), d)
}

// fuzzServer lets a server of a small disk talk with a client that says b.
func fuzzServer(t *testing.T, m *mem, b []byte) {
	t.Helper()
	s, err := nbd.NewServer(nbd.ServerConfig{
		Exports:   nbd.ExportMap{"": {Backend: m, MultiConn: true}, "ro": {Backend: readOnlyBackend{m}}},
		MaxMemory: 4 * mib, MaxInflight: 4, MaxRequest: mib,
	})
	if err != nil {
		t.Fatal(err)
	}
	_ = s.ServeConn(context.Background(), newPlayback(b, nil, 0))
	if s.Connections() != 0 {
		t.Fatal("a connection is left")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if len(m.data) != 1<<16 {
		t.Fatal("the disk changed its size")
	}
}

// FuzzServerHandshake feeds the server a handshake.
func FuzzServerHandshake(f *testing.F) {
	f.Add(be(uint32(3), optionBytes(8), optionBytes(9, uint32(0), uint32(0)),
		optionBytes(10, uint32(0), uint32(1), uint32(15), nbd.ContextBaseAllocation),
		optionBytes(6, uint32(2), "ro", uint16(2), uint16(3), uint16(1)), optionBytes(7, uint32(0), uint16(0)), command(0, 2, 0, 0, 0)))
	f.Add(be(uint32(1), optionBytes(1, "ro"), command(0, 0, 1, 0, 512)))
	f.Add(be(uint32(0), optionBytes(1)))
	f.Add(be(uint32(3), optionBytes(3), optionBytes(5), optionBytes(77, "x"), optionBytes(2)))
	f.Fuzz(func(t *testing.T, b []byte) { fuzzServer(t, newMem(1<<16), b) })
}

// FuzzServerCommands feeds the server requests; the first byte chooses structured or plain replies.
func FuzzServerCommands(f *testing.F) {
	f.Add(be(byte(1), command(0, 0, 1, 0, 512), command(4, 0, 2, 4096, 8192), command(0, 7, 3, 0, 1<<16),
		command(8, 7, 4, 100, 1000), be(command(1, 1, 5, 10, 4), "data"), command(0, 3, 6, 0, 0), command(0, 4, 7, 0, 4096),
		command(16, 6, 8, 0, 4096), command(0, 2, 0, 0, 0)))
	f.Add(be(byte(0), command(0, 0, 1, 0, 512), be(command(1, 1, 5, 10, 4), "data"), command(2, 6, 8, 0, 1<<16)))
	f.Add(be(byte(1), command(0, 1, 1, 0, 1<<25), command(0, 0, 1, 1<<63, 1<<31)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == 0 {
			return
		}
		hello := be(uint32(3))
		if b[0]&1 != 0 {
			hello = append(hello, optionBytes(8)...)
			hello = append(hello, optionBytes(10, uint32(0), uint32(2),
				uint32(15), nbd.ContextBaseAllocation, uint32(len(memDirty)), memDirty)...)
		}
		hello = append(hello, optionBytes(7, uint32(0), uint16(0))...)
		m := newMem(1 << 16)
		if _, err := m.WriteAt(bytes.Repeat([]byte{1}, memBlock), 8192); err != nil {
			t.Fatal(err)
		}
		fuzzServer(t, m, append(hello, b[1:]...))
	})
}
