package nbd

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"
)

// longAgo is a deadline that has passed: setting it interrupts reads and writes at once.
var longAgo = time.Unix(1, 0)

// session is the result of a handshake on one connection.
type session struct {
	structured bool
	secure     bool
	info       ExportInfo
	contexts   map[uint32]string // granted metadata contexts by ID
}

// same checks that a further connection leads to the same export as s.
func (s *session) same(other *session) error {
	differ := func(field string, a, b any) error {
		return &ExportChangedError{Export: s.info.Name, Field: field, Old: fmt.Sprint(a), New: fmt.Sprint(b)}
	}
	a, b := slices.Sorted(slices.Values(s.info.Contexts)), slices.Sorted(slices.Values(other.info.Contexts))
	switch {
	case s.info.Size != other.info.Size:
		return differ("size", s.info.Size, other.info.Size)
	case s.info.Flags != other.info.Flags:
		return differ("flags", s.info.Flags, other.info.Flags)
	case s.info.BlockSizes != other.info.BlockSizes:
		return differ("block sizes", s.info.BlockSizes, other.info.BlockSizes)
	case !slices.Equal(a, b):
		return differ("contexts", a, b)
	case s.structured != other.structured:
		return differ("structured replies", s.structured, other.structured)
	case s.secure != other.secure:
		return differ("TLS", s.secure, other.secure)
	}
	return nil
}

// negotiator drives the client side of a handshake. It reads exactly the bytes of each message and
// never more, so that nothing sent in clear can be taken for something sent under TLS.
type negotiator struct {
	nc       net.Conn
	cfg      *Config
	fixed    bool // server does fixed newstyle
	noZeroes bool
	sess     session
}

// guarded runs f with nc interrupted when ctx ends, and names ctx as the cause in that case.
func guarded(ctx context.Context, nc net.Conn, f func() error) error {
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(longAgo) })
	err := f()
	if !stop() && ctx.Err() != nil {
		return errors.Join(context.Cause(ctx), err)
	}
	return err
}

// open dials, and greets the server up to and including STARTTLS.
func open(ctx context.Context, cfg *Config) (*negotiator, error) {
	nc, err := cfg.Dialer(ctx, cfg.Network, cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("nbd: connect: %w", err)
	}
	n := &negotiator{nc: nc, cfg: cfg}
	err = guarded(ctx, nc, func() error {
		if err := n.greet(); err != nil {
			return err
		}
		return n.startTLS(ctx)
	})
	if err != nil {
		_ = nc.Close()
		return nil, err
	}
	return n, nil
}

// greet exchanges the handshake flags.
func (n *negotiator) greet() error {
	var b [18]byte
	if err := n.read(b[:16]); err != nil {
		return err
	}
	if got := binary.BigEndian.Uint64(b[:]); got != magicInit {
		return handshakef("not an NBD server: magic %#x", got)
	}
	switch got := binary.BigEndian.Uint64(b[8:]); got {
	case magicOption:
	case magicOldstyle:
		return handshakef("oldstyle negotiation is not supported")
	default:
		return handshakef("bad option magic %#x", got)
	}
	if err := n.read(b[16:18]); err != nil {
		return err
	}
	flags := binary.BigEndian.Uint16(b[16:])
	n.fixed = flags&hsFixedNewstyle != 0
	n.noZeroes = flags&hsNoZeroes != 0
	var reply [4]byte
	binary.BigEndian.PutUint32(reply[:], uint32(flags&(hsFixedNewstyle|hsNoZeroes)))
	return n.write(reply[:])
}

// startTLS upgrades the connection when the configuration asks for it.
func (n *negotiator) startTLS(ctx context.Context) error {
	if n.cfg.TLS == nil {
		return nil
	}
	refused := func(err error) error {
		if n.cfg.RequireTLS {
			return errors.Join(ErrTLSRefused, err)
		}
		return nil
	}
	if !n.fixed {
		return refused(nil)
	}
	err := n.simpleOption(optStartTLS, nil)
	var opt *OptionError
	if errors.As(err, &opt) {
		return refused(err)
	}
	if err != nil {
		return err
	}
	tc := tls.Client(n.nc, n.cfg.TLS)
	if err := tc.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("nbd: TLS handshake: %w", err)
	}
	n.nc = tc
	n.sess.secure = true
	return nil
}

// enter selects the export and starts the transmission phase.
func (n *negotiator) enter() error {
	n.sess.info = ExportInfo{Name: n.cfg.Export, BlockSizes: defaultBlockSizes()}
	required := n.cfg.RequiredContexts
	if !n.fixed {
		if len(required) > 0 {
			return &ContextError{Export: n.cfg.Export, Missing: required}
		}
		return n.exportName()
	}
	if err := n.structuredReplies(); err != nil {
		return err
	}
	if err := n.setContexts(); err != nil {
		return err
	}
	err := n.infoOrGo(optGo, []uint16{infoBlockSize})
	var opt *OptionError
	if errors.As(err, &opt) && opt.Code == repErrUnsup {
		n.sess.info.BlockSizes = defaultBlockSizes()
		return n.exportName()
	}
	return err
}

// structuredReplies asks for structured replies; a refusal leaves plain ones.
func (n *negotiator) structuredReplies() error {
	err := n.simpleOption(optStructuredReply, nil)
	var opt *OptionError
	switch {
	case err == nil:
		n.sess.structured = true
	case errors.As(err, &opt) && opt.Code != repErrTLSReqd && opt.Code != repErrShutdown:
	default:
		return err
	}
	return nil
}

// setContexts selects the metadata contexts and checks that the required ones were granted.
func (n *negotiator) setContexts() error {
	names := n.cfg.wantedContexts()
	if len(names) == 0 {
		return nil
	}
	var refusal error
	if n.sess.structured {
		err := n.metaContexts(optSetMetaContext, names)
		var opt *OptionError
		switch {
		case errors.As(err, &opt) && opt.Code != repErrTLSReqd && opt.Code != repErrShutdown:
			refusal = err
			n.sess.contexts, n.sess.info.Contexts = nil, nil
		case err != nil:
			return err
		}
	}
	var missing []string
	for _, name := range n.cfg.RequiredContexts {
		if !slices.Contains(n.sess.info.Contexts, name) && !slices.Contains(missing, name) {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		if errors.Is(refusal, ErrUnknownExport) {
			return refusal
		}
		return &ContextError{Export: n.cfg.Export, Missing: missing, Err: refusal}
	}
	return nil
}

// metaContexts sends SET_META_CONTEXT or LIST_META_CONTEXT and collects the answer.
func (n *negotiator) metaContexts(opt uint32, queries []string) error {
	data := appendString(nil, n.cfg.Export)
	data = binary.BigEndian.AppendUint32(data, uint32(len(queries)))
	for _, q := range queries {
		data = appendString(data, q)
	}
	if err := n.option(opt, data); err != nil {
		return err
	}
	const most = 4096
	ids := make(map[uint32]string)
	var names []string
	for {
		typ, data, err := n.reply(opt)
		if err != nil {
			return err
		}
		switch typ {
		case repAck:
			n.sess.contexts, n.sess.info.Contexts = ids, names
			return nil
		case repMetaContext:
		default:
			return handshakef("reply %#x to %s", typ, optionName(opt))
		}
		if len(data) < 5 || len(data) > 4+maxString {
			return handshakef("metadata context of %d bytes", len(data))
		}
		id, name := binary.BigEndian.Uint32(data), string(data[4:])
		if len(names) == most {
			return handshakef("more than %d metadata contexts", most)
		}
		if opt == optSetMetaContext {
			if _, dup := ids[id]; dup || slices.Contains(names, name) {
				return handshakef("metadata context %d %q granted twice", id, name)
			}
			ids[id] = name
		}
		names = append(names, name)
	}
}

// infoOrGo sends INFO or GO and fills in the export's information.
func (n *negotiator) infoOrGo(opt uint32, want []uint16) error {
	data := appendString(nil, n.cfg.Export)
	data = binary.BigEndian.AppendUint16(data, uint16(len(want)))
	for _, w := range want {
		data = binary.BigEndian.AppendUint16(data, w)
	}
	if err := n.option(opt, data); err != nil {
		return err
	}
	info, known := &n.sess.info, false
	for range 256 {
		typ, data, err := n.reply(opt)
		if err != nil {
			return err
		}
		if typ == repAck {
			if !known {
				return handshakef("%s accepted without the size of the export", optionName(opt))
			}
			return nil
		}
		if typ != repInfo || len(data) < 2 {
			return handshakef("reply %#x of %d bytes to %s", typ, len(data), optionName(opt))
		}
		kind, body := binary.BigEndian.Uint16(data), data[2:]
		switch kind {
		case infoExport:
			if err := info.setExport(body); err != nil {
				return err
			}
			known = true
		case infoBlockSize:
			if err := info.setBlockSizes(body); err != nil {
				return err
			}
		case infoDescription:
			info.Description = string(body[:min(len(body), maxString)])
		}
	}
	return handshakef("endless answer to %s", optionName(opt))
}

// exportName uses the oldest way into the transmission phase, which cannot report an error.
func (n *negotiator) exportName() error {
	if err := n.option(optExportName, []byte(n.cfg.Export)); err != nil {
		return err
	}
	var b [134]byte
	size := len(b)
	if n.noZeroes {
		size = 10
	}
	if err := n.read(b[:size]); err != nil {
		return err
	}
	return n.sess.info.setExport(b[:10])
}

// setExport decodes size and flags.
func (e *ExportInfo) setExport(b []byte) error {
	if len(b) != 10 {
		return handshakef("export information of %d bytes, want 10", len(b))
	}
	size := binary.BigEndian.Uint64(b)
	if size > 1<<63-1 {
		return handshakef("export size %d does not fit 63 bits", size)
	}
	e.Size = int64(size)
	e.Flags = Flags(binary.BigEndian.Uint16(b[8:]))
	return nil
}

// setBlockSizes decodes and checks the size constraints.
func (e *ExportInfo) setBlockSizes(b []byte) error {
	if len(b) != 12 {
		return handshakef("block sizes of %d bytes, want 12", len(b))
	}
	s := BlockSizes{
		Minimum:    int64(binary.BigEndian.Uint32(b)),
		Preferred:  int64(binary.BigEndian.Uint32(b[4:])),
		Maximum:    int64(binary.BigEndian.Uint32(b[8:])),
		Advertised: true,
	}
	if s.Minimum < 1 || s.Minimum > maxMinBlock || s.Minimum&(s.Minimum-1) != 0 {
		return handshakef("minimum block size %d", s.Minimum)
	}
	if s.Preferred < s.Minimum || s.Preferred&(s.Preferred-1) != 0 {
		return handshakef("preferred block size %d", s.Preferred)
	}
	if s.Maximum < s.Minimum {
		return handshakef("maximum block size %d", s.Maximum)
	}
	e.BlockSizes = s
	return nil
}

// abort ends the handshake in the orderly way, which must not take long, and closes the connection.
func (n *negotiator) abort() {
	cut := time.AfterFunc(goodbyeTimeout, func() { _ = rawConn(n.nc).Close() })
	defer cut.Stop()
	if n.fixed && n.option(optAbort, nil) == nil {
		_, _, _ = n.reply(optAbort) // servers may close without an answer
	}
	_ = n.nc.Close()
}

// simpleOption sends an option whose only success is an ACK.
func (n *negotiator) simpleOption(opt uint32, data []byte) error {
	if err := n.option(opt, data); err != nil {
		return err
	}
	typ, _, err := n.reply(opt)
	if err != nil {
		return err
	}
	if typ != repAck {
		return handshakef("reply %#x to %s", typ, optionName(opt))
	}
	return nil
}

// option sends one option.
func (n *negotiator) option(opt uint32, data []byte) error {
	b := make([]byte, 0, 16+len(data))
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return n.write(append(b, data...))
}

// reply reads one reply to opt. An error reply comes back as *OptionError.
func (n *negotiator) reply(opt uint32) (typ uint32, data []byte, err error) {
	var h [20]byte
	if err := n.read(h[:]); err != nil {
		return 0, nil, err
	}
	if got := binary.BigEndian.Uint64(h[:]); got != magicOptReply {
		return 0, nil, handshakef("bad reply magic %#x", got)
	}
	if got := binary.BigEndian.Uint32(h[8:]); got != opt {
		return 0, nil, handshakef("reply to option %d, want %d", got, opt)
	}
	typ = binary.BigEndian.Uint32(h[12:])
	size := binary.BigEndian.Uint32(h[16:])
	if size > maxOptionReply {
		return 0, nil, handshakef("option reply of %d bytes", size)
	}
	data = make([]byte, size)
	if err := n.read(data); err != nil {
		return 0, nil, err
	}
	if typ&repErrBit != 0 {
		msg := string(data[:min(len(data), maxString)])
		return 0, nil, &OptionError{Option: optionName(opt), Code: typ, Message: msg}
	}
	return typ, data, nil
}

func (n *negotiator) read(p []byte) error {
	if _, err := io.ReadFull(n.nc, p); err != nil {
		return fmt.Errorf("nbd: handshake: %w: %w", ErrConnectionLost, err)
	}
	return nil
}

func (n *negotiator) write(p []byte) error {
	if _, err := n.nc.Write(p); err != nil {
		if n.sess.secure {
			// With TLS 1.3 a server refuses a certificate after the handshake and hangs up. Why, stands in
			// what it sent before.
			var alert *net.OpError
			if _, rerr := n.nc.Read(make([]byte, 1)); errors.As(rerr, &alert) && alert.Op == "remote error" {
				err = alert
			}
		}
		return fmt.Errorf("nbd: handshake: %w: %w", ErrConnectionLost, err)
	}
	return nil
}

// appendString appends a string with its 32-bit length.
func appendString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}
