package nbd

// Magic numbers of the protocol.
const (
	magicInit       uint64 = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     uint64 = 0x49484156454f5054 // "IHAVEOPT"
	magicOldstyle   uint64 = 0x0000420281861253
	magicOptReply   uint64 = 0x0003e889045565a9
	magicRequest    uint32 = 0x25609513
	magicSimple     uint32 = 0x67446698
	magicStructured uint32 = 0x668e33ef
)

// Handshake flags of server and client; both sides use the same bits.
const (
	hsFixedNewstyle uint16 = 1 << 0
	hsNoZeroes      uint16 = 1 << 1
)

// Options.
const (
	optExportName      uint32 = 1
	optAbort           uint32 = 2
	optList            uint32 = 3
	optStartTLS        uint32 = 5
	optInfo            uint32 = 6
	optGo              uint32 = 7
	optStructuredReply uint32 = 8
	optListMetaContext uint32 = 9
	optSetMetaContext  uint32 = 10
)

// Option replies.
const (
	repAck         uint32 = 1
	repServer      uint32 = 2
	repInfo        uint32 = 3
	repMetaContext uint32 = 4

	repErrBit           uint32 = 1 << 31
	repErrUnsup                = repErrBit | 1
	repErrPolicy               = repErrBit | 2
	repErrInvalid              = repErrBit | 3
	repErrPlatform             = repErrBit | 4
	repErrTLSReqd              = repErrBit | 5
	repErrUnknown              = repErrBit | 6
	repErrShutdown             = repErrBit | 7
	repErrBlockSizeReqd        = repErrBit | 8
	repErrTooBig               = repErrBit | 9
)

// Information types of INFO and GO.
const (
	infoExport      uint16 = 0
	infoName        uint16 = 1
	infoDescription uint16 = 2
	infoBlockSize   uint16 = 3
)

// Commands.
const (
	cmdRead        uint16 = 0
	cmdWrite       uint16 = 1
	cmdDisc        uint16 = 2
	cmdFlush       uint16 = 3
	cmdTrim        uint16 = 4
	cmdCache       uint16 = 5
	cmdWriteZeroes uint16 = 6
	cmdBlockStatus uint16 = 7
)

// Command flags that callers do not set themselves; the others are [CommandFlags].
const (
	cmdFlagDF     uint16 = 1 << 2
	cmdFlagReqOne uint16 = 1 << 3
)

// Structured reply chunks.
const (
	chunkFlagDone uint16 = 1 << 0

	chunkNone        uint16 = 0
	chunkOffsetData  uint16 = 1
	chunkOffsetHole  uint16 = 2
	chunkBlockStatus uint16 = 5
	chunkErrorBit    uint16 = 1 << 15
	chunkError              = chunkErrorBit | 1
	chunkErrorOffset        = chunkErrorBit | 2
)

// Limits, some from the protocol document, some our own.
const (
	requestSize    = 28
	simpleSize     = 16
	structuredSize = 20

	maxString       = 4096     // strings of the protocol
	maxPayload      = 32 << 20 // largest read or write either side must accept
	maxControlChunk = 32 << 20 // largest chunk that is not read data
	maxMinBlock     = 64 << 10 // largest minimum block size the protocol permits
	maxOptionReply  = 64 << 10 // data of one option reply, as a client
	maxOptionData   = 128 << 10
	maxEffect       = 1 << 30    // one trim or write-zeroes request; stays clear of 31-bit limits
	maxStatusStep   = 0xffff0000 // one block status request: below 2^32, a multiple of 64 KiB
	defaultPort     = "10809"
)

// commandName names a command for errors.
func commandName(cmd uint16) string {
	switch cmd {
	case cmdRead:
		return "read"
	case cmdWrite:
		return "write"
	case cmdDisc:
		return "disconnect"
	case cmdFlush:
		return "flush"
	case cmdTrim:
		return "trim"
	case cmdCache:
		return "cache"
	case cmdWriteZeroes:
		return "write-zeroes"
	case cmdBlockStatus:
		return "block-status"
	}
	return "command"
}

// optionName names an option for errors.
func optionName(opt uint32) string {
	switch opt {
	case optExportName:
		return "EXPORT_NAME"
	case optAbort:
		return "ABORT"
	case optList:
		return "LIST"
	case optStartTLS:
		return "STARTTLS"
	case optInfo:
		return "INFO"
	case optGo:
		return "GO"
	case optStructuredReply:
		return "STRUCTURED_REPLY"
	case optListMetaContext:
		return "LIST_META_CONTEXT"
	case optSetMetaContext:
		return "SET_META_CONTEXT"
	}
	return "unknown option"
}
