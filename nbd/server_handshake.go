package nbd

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

const (
	maxOptions  = 4096 // options of one handshake
	maxSelected = 256  // metadata contexts of one connection
)

// errAborted ends a handshake that the client ended in the orderly way.
var errAborted = errors.New("nbd: client aborted the handshake")

// serverHandshake is the state of the option phase. Like the client's it reads no byte ahead, so nothing
// sent before TLS can leak into what follows.
type serverHandshake struct {
	sc         *serverConn
	fixed      bool
	noZeroes   bool
	secure     bool
	structured bool
	selected   []string // metadata contexts
	selectedOf string   // the export they were selected for
}

// handshake runs until the client has opened an export.
func (sc *serverConn) handshake(ctx context.Context) error {
	h := &serverHandshake{sc: sc}
	hello := binary.BigEndian.AppendUint64(nil, magicInit)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, hsFixedNewstyle|hsNoZeroes)
	if _, err := sc.nc.Write(hello); err != nil {
		return err
	}
	var b [16]byte
	if _, err := io.ReadFull(sc.nc, b[:4]); err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^uint32(hsFixedNewstyle|hsNoZeroes) != 0 {
		return handshakef("client flags %#x", flags)
	}
	h.fixed = flags&uint32(hsFixedNewstyle) != 0
	h.noZeroes = flags&uint32(hsNoZeroes) != 0
	for range maxOptions {
		if _, err := io.ReadFull(sc.nc, b[:]); err != nil {
			return err
		}
		if got := binary.BigEndian.Uint64(b[:]); got != magicOption {
			return handshakef("bad option magic %#x", got)
		}
		opt, size := binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:])
		if size > maxOptionData {
			return handshakef("option %d with %d bytes", opt, size)
		}
		data := make([]byte, size)
		if _, err := io.ReadFull(sc.nc, data); err != nil {
			return err
		}
		done, err := h.option(ctx, opt, data)
		if done || err != nil {
			return err
		}
	}
	return handshakef("more than %d options", maxOptions)
}

// option handles one option; done means that the transmission phase begins.
func (h *serverHandshake) option(ctx context.Context, opt uint32, data []byte) (done bool, err error) {
	needTLS := h.sc.srv.cfg.RequireTLS && !h.secure
	switch {
	case opt == optExportName:
		if needTLS {
			return false, handshakef("EXPORT_NAME without TLS")
		}
		return true, h.exportName(ctx, string(data))
	case !h.fixed:
		return false, handshakef("option %d from a client that is not fixed newstyle", opt)
	case opt == optAbort:
		_ = h.reply(opt, repAck, nil)
		return false, errAborted
	case opt == optStartTLS:
		return false, h.startTLS(ctx, data)
	case needTLS:
		return false, h.reply(opt, repErrTLSReqd, nil)
	}
	switch opt {
	case optList:
		return false, h.list(ctx, data)
	case optInfo, optGo:
		return h.infoOrGo(ctx, opt, data)
	case optStructuredReply:
		if h.sc.srv.cfg.NoStructuredReplies {
			return false, h.reply(opt, repErrUnsup, nil)
		}
		if len(data) != 0 {
			return false, h.reply(opt, repErrInvalid, nil)
		}
		h.structured = true
		return false, h.reply(opt, repAck, nil)
	case optListMetaContext, optSetMetaContext:
		return false, h.metaContexts(ctx, opt, data)
	}
	return false, h.reply(opt, repErrUnsup, nil)
}

// startTLS upgrades the connection and forgets what was negotiated in clear.
func (h *serverHandshake) startTLS(ctx context.Context, data []byte) error {
	cfg := h.sc.srv.cfg.TLS
	switch {
	case cfg == nil:
		return h.reply(optStartTLS, repErrUnsup, nil)
	case h.secure || len(data) != 0:
		return h.reply(optStartTLS, repErrInvalid, nil)
	}
	if err := h.reply(optStartTLS, repAck, nil); err != nil {
		return err
	}
	tc := tls.Server(h.sc.raw, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("nbd: TLS handshake: %w", err)
	}
	h.sc.nc = tc
	h.secure, h.structured = true, false
	h.selected, h.selectedOf = nil, ""
	return nil
}

// list answers LIST.
func (h *serverHandshake) list(ctx context.Context, data []byte) error {
	if len(data) != 0 {
		return h.reply(optList, repErrInvalid, nil)
	}
	names, err := h.sc.srv.cfg.Exports.ListExports(ctx)
	if err != nil {
		return h.reply(optList, repErrPolicy, nil)
	}
	for _, name := range names {
		if err := h.reply(optList, repServer, appendString(nil, name)); err != nil {
			return err
		}
	}
	return h.reply(optList, repAck, nil)
}

// exportName enters the transmission phase the old way.
func (h *serverHandshake) exportName(ctx context.Context, name string) error {
	e, err := h.open(ctx, name)
	if err != nil {
		return fmt.Errorf("nbd: EXPORT_NAME: %w", err)
	}
	if e.BlockSizes.Minimum > 1 {
		return handshakef("EXPORT_NAME of an export that needs its block sizes respected")
	}
	h.sc.enter(h, name, e)
	b := binary.BigEndian.AppendUint64(nil, uint64(h.sc.size))
	b = binary.BigEndian.AppendUint16(b, uint16(e.flags(h.structured)))
	if !h.noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	_, err = h.sc.nc.Write(b)
	return err
}

// infoOrGo answers INFO and GO.
func (h *serverHandshake) infoOrGo(ctx context.Context, opt uint32, data []byte) (done bool, err error) {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(binary.BigEndian.Uint16(rest)) {
		return false, h.reply(opt, repErrInvalid, nil)
	}
	asked := make(map[uint16]bool)
	for rest = rest[2:]; len(rest) > 0; rest = rest[2:] {
		asked[binary.BigEndian.Uint16(rest)] = true
	}
	e, err := h.open(ctx, name)
	if err != nil {
		return false, h.refuse(opt, err)
	}
	size := e.Backend.Size()
	if size < 0 {
		return false, h.reply(opt, repErrPolicy, nil)
	}
	info := binary.BigEndian.AppendUint16(nil, infoExport)
	info = binary.BigEndian.AppendUint64(info, uint64(size))
	info = binary.BigEndian.AppendUint16(info, uint16(e.flags(h.structured)))
	if err := h.reply(opt, repInfo, info); err != nil {
		return false, err
	}
	if asked[infoBlockSize] || e.BlockSizes.Minimum > 1 {
		s := e.sizes(h.sc.srv.cfg.MaxRequest)
		info = binary.BigEndian.AppendUint16(nil, infoBlockSize)
		info = binary.BigEndian.AppendUint32(info, uint32(s.Minimum))
		info = binary.BigEndian.AppendUint32(info, uint32(s.Preferred))
		info = binary.BigEndian.AppendUint32(info, uint32(s.Maximum))
		if err := h.reply(opt, repInfo, info); err != nil {
			return false, err
		}
	}
	for _, text := range []struct {
		kind  uint16
		value string
	}{{infoName, name}, {infoDescription, e.Description}} {
		if !asked[text.kind] || (text.kind == infoDescription && text.value == "") {
			continue
		}
		info = append(binary.BigEndian.AppendUint16(nil, text.kind), text.value...)
		if err := h.reply(opt, repInfo, info); err != nil {
			return false, err
		}
	}
	if opt == optInfo {
		return false, h.reply(opt, repAck, nil)
	}
	if e.BlockSizes.Minimum > 1 && !asked[infoBlockSize] {
		return false, h.reply(opt, repErrBlockSizeReqd, nil)
	}
	h.sc.enter(h, name, e)
	h.sc.size = size
	return true, h.reply(opt, repAck, nil)
}

// metaContexts answers LIST_META_CONTEXT and SET_META_CONTEXT. Names that are not offered are dropped
// without a word, as other servers do.
func (h *serverHandshake) metaContexts(ctx context.Context, opt uint32, data []byte) error {
	if opt == optSetMetaContext {
		h.selected, h.selectedOf = nil, ""
	}
	name, queries, ok := cutQueries(data)
	if !ok || !h.structured {
		return h.reply(opt, repErrInvalid, nil)
	}
	e, err := h.open(ctx, name)
	if err != nil {
		return h.refuse(opt, err)
	}
	var offered, match []string
	if p, ok := e.Backend.(StatusProvider); ok {
		offered = p.MetaContexts()
	}
	for _, c := range offered {
		hit := opt == optListMetaContext && len(queries) == 0
		for _, q := range queries {
			wild := opt == optListMetaContext && strings.HasSuffix(q, ":") && strings.HasPrefix(c, q)
			hit = hit || c == q || wild
		}
		if hit && !slices.Contains(match, c) {
			match = append(match, c)
		}
	}
	if len(match) > maxSelected {
		return h.reply(opt, repErrTooBig, nil)
	}
	for i, c := range match {
		id := uint32(0)
		if opt == optSetMetaContext {
			id = contextID(i)
		}
		if err := h.reply(opt, repMetaContext, append(binary.BigEndian.AppendUint32(nil, id), c...)); err != nil {
			return err
		}
	}
	if opt == optSetMetaContext {
		h.selected, h.selectedOf = match, name
	}
	return h.reply(opt, repAck, nil)
}

// contextID numbers selected contexts; not from 0, so that mixing up number and position shows.
func contextID(i int) uint32 { return uint32(i) + 1 }

// open finds an export.
func (h *serverHandshake) open(ctx context.Context, name string) (*Export, error) {
	e, err := h.sc.srv.cfg.Exports.OpenExport(ctx, name)
	if err != nil {
		return nil, err
	}
	if e == nil {
		return nil, ErrUnknownExport
	}
	return e, e.check()
}

// refuse answers with the error of open.
func (h *serverHandshake) refuse(opt uint32, err error) error {
	if errors.Is(err, ErrUnknownExport) {
		return h.reply(opt, repErrUnknown, nil)
	}
	return h.reply(opt, repErrPolicy, nil)
}

// reply sends one option reply.
func (h *serverHandshake) reply(opt, typ uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, 20+len(data)), magicOptReply)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, typ)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := h.sc.nc.Write(append(b, data...))
	return err
}

// cutString takes a string with its 32-bit length off the front of b.
func cutString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(b)
	if b = b[4:]; uint64(n) > uint64(len(b)) || n > maxString {
		return "", nil, false
	}
	return string(b[:n]), b[n:], true
}

// cutQueries decodes the data of the metadata context options.
func cutQueries(b []byte) (export string, queries []string, ok bool) {
	export, b, ok = cutString(b)
	if !ok || len(b) < 4 {
		return "", nil, false
	}
	count := binary.BigEndian.Uint32(b)
	for b = b[4:]; count > 0; count-- {
		var q string
		if q, b, ok = cutString(b); !ok {
			return "", nil, false
		}
		queries = append(queries, q)
	}
	return export, queries, len(b) == 0
}
