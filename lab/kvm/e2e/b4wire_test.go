//go:build linux

package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
)

// What libvirt's RPC protocol says about a message: its length with these seven
// words, program, version, procedure, type, serial, status; all big-endian. Source:
// src/rpc/virnetprotocol.x.
const (
	wireHead   = 28
	remoteProg = 0x20008086
	qemuProg   = 0x20008087
	typeCall   = 0
	typeReply  = 1
)

// procedure names a call on the wire, and says whether it changes anything.
type procedure struct {
	name    string
	changes bool
}

// procedures are those that the driver uses, but for the lookups before each call,
// which are no points of their own. Source: remote_protocol.x, qemu_protocol.x.
var procedures = map[[2]uint32]procedure{
	{qemuProg, 1}: {"monitor", true}, {qemuProg, 3}: {"agent", true},
	{remoteProg, 4}: {"version", false}, {remoteProg, 157}: {"lib-version", false}, {remoteProg, 59}: {"hostname", false},
	{remoteProg, 273}: {"domains", false}, {remoteProg, 23}: {"lookup-name", false}, {remoteProg, 14}: {"domain-xml", false},
	{remoteProg, 212}: {"state", false}, {remoteProg, 151}: {"persistent", false}, {remoteProg, 183}: {"managed-save", false},
	{remoteProg, 194}: {"block-info", false}, {remoteProg, 350}: {"define", true}, {remoteProg, 231}: {"undefine", true},
	{remoteProg, 196}: {"start", true}, {remoteProg, 234}: {"destroy", true}, {remoteProg, 258}: {"shutdown", true},
	{remoteProg, 28}: {"resume", true}, {remoteProg, 264}: {"set-metadata", true}, {remoteProg, 163}: {"job-info", false},
	{remoteProg, 298}: {"job-stats", false}, {remoteProg, 164}: {"abort-job", true}, {remoteProg, 238}: {"block-job", false},
	{remoteProg, 421}: {"backup-begin", true}, {remoteProg, 422}: {"backup-xml", false}, {remoteProg, 413}: {"checkpoints", false},
	{remoteProg, 412}: {"checkpoint-xml", false}, {remoteProg, 411}: {"checkpoint-create", true}, {remoteProg, 417}: {"checkpoint-delete", true},
	{remoteProg, 46}: {"network", false}, {remoteProg, 84}: {"pool", false}, {remoteProg, 88}: {"pool-xml", false},
	{remoteProg, 2}: {"close", false},
}

// moment is a point at which a process dies: before a call is sent, or when its
// answer has arrived and nobody has seen it.
type moment struct {
	Call  int // from 0
	After bool
	Stop  bool // it does not die but stands still, until it is told to go on
}

// wire watches connections to libvirtd, and ends the process at its moment.
type wire struct {
	kill *moment
	log  *os.File // gets a line per call

	mu    sync.Mutex
	calls int
	fatal map[uint32]bool // serials whose answer is deadly
}

func (w *wire) dial(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	t := &tap{Conn: c}
	t.out.seen, t.in.seen = w.call, w.answer
	return t, nil
}

// call looks at a message that is about to be sent.
func (w *wire) call(prog, proc, typ, serial uint32) {
	p, known := procedures[[2]uint32{prog, proc}]
	if typ != typeCall || !known {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	n := w.calls
	w.calls++
	if w.kill == nil {
		w.note("%s %t\n", p.name, p.changes)
		return
	}
	if n != w.kill.Call {
		return
	}
	w.note("%s\n", p.name)
	if !w.kill.After {
		w.kill.strike()
	}
	w.fatal[serial] = true
}

func (w *wire) note(format string, args ...any) {
	if _, err := fmt.Fprintf(w.log, format, args...); err != nil {
		panic(err)
	}
}

// answer looks at a message that has arrived.
func (w *wire) answer(_, _, typ, serial uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if typ == typeReply && w.fatal[serial] {
		delete(w.fatal, serial)
		w.kill.strike()
	}
}

// strike ends the process as a power cut would, or stops it as a host that hangs.
func (k *moment) strike() {
	if k.Stop {
		_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
		return
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

// tap is a connection whose messages are looked at.
type tap struct {
	net.Conn
	out, in framing
}

func (t *tap) Write(p []byte) (int, error) {
	t.out.feed(p)
	return t.Conn.Write(p)
}

func (t *tap) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	t.in.feed(p[:n])
	return n, err
}

// framing finds the messages of one direction. One goroutine at a time feeds it:
// both sides of a libvirt connection are serialised.
type framing struct {
	seen func(prog, proc, typ, serial uint32)

	mu   sync.Mutex
	head []byte // of the message that is going through
	left int    // bytes of its body
}

func (f *framing) feed(p []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(p) > 0 {
		if f.left > 0 {
			n := min(f.left, len(p))
			f.left -= n
			p = p[n:]
			continue
		}
		n := min(wireHead-len(f.head), len(p))
		f.head = append(f.head, p[:n]...)
		p = p[n:]
		if len(f.head) < wireHead {
			return
		}
		word := func(i int) uint32 { return binary.BigEndian.Uint32(f.head[4*i:]) }
		f.left = int(word(0)) - wireHead
		f.seen(word(1), word(3), word(4), word(5))
		f.head = f.head[:0]
	}
}
