package nbd

import "strings"

// Flags are the transmission flags a server sends for an export.
type Flags uint16

// Transmission flags of the protocol.
const (
	FlagHasFlags        Flags = 1 << 0  // always set
	FlagReadOnly        Flags = 1 << 1  // writes are refused
	FlagSendFlush       Flags = 1 << 2  // Flush is supported
	FlagSendFUA         Flags = 1 << 3  // CommandFUA is supported
	FlagRotational      Flags = 1 << 4  // the medium behaves like a rotating disk
	FlagSendTrim        Flags = 1 << 5  // Trim is supported
	FlagSendWriteZeroes Flags = 1 << 6  // WriteZeroes is supported
	FlagSendDF          Flags = 1 << 7  // unfragmented structured reads are supported
	FlagCanMultiConn    Flags = 1 << 8  // several connections see one coherent disk
	FlagSendResize      Flags = 1 << 9  // experimental resize extension
	FlagSendCache       Flags = 1 << 10 // prefetch command is known
	FlagSendFastZero    Flags = 1 << 11 // CommandFastZero is supported
)

// Has reports whether all bits of want are set.
func (f Flags) Has(want Flags) bool { return f&want == want }

// String lists the set flags, separated by "|".
func (f Flags) String() string {
	names := []string{
		"HAS_FLAGS", "READ_ONLY", "SEND_FLUSH", "SEND_FUA", "ROTATIONAL", "SEND_TRIM",
		"SEND_WRITE_ZEROES", "SEND_DF", "CAN_MULTI_CONN", "SEND_RESIZE", "SEND_CACHE", "SEND_FAST_ZERO",
	}
	var set []string
	for i, name := range names {
		if f&(1<<i) != 0 {
			set = append(set, name)
		}
	}
	return strings.Join(set, "|")
}

// CommandFlags modify a single write, trim or write-zeroes request.
type CommandFlags uint16

// Command flags that a caller may set.
const (
	// CommandFUA asks that the reply is sent only when the data is on stable storage.
	CommandFUA CommandFlags = 1 << 0
	// CommandNoHole asks write-zeroes to keep the range allocated.
	CommandNoHole CommandFlags = 1 << 1
	// CommandFastZero asks write-zeroes to fail with ENOTSUP when it is no faster than writing.
	CommandFastZero CommandFlags = 1 << 4
)

// State bits of the base:allocation metadata context.
const (
	// StateHole marks a range that is not allocated.
	StateHole uint32 = 1 << 0
	// StateZero marks a range that reads as zeroes.
	StateZero uint32 = 1 << 1
	// StateDirty is the only bit of the qemu:dirty-bitmap contexts: the range changed.
	StateDirty uint32 = 1 << 0
)

// ContextBaseAllocation is the only metadata context that the protocol itself defines.
const ContextBaseAllocation = "base:allocation"

// BlockSizes are the size constraints of an export, in bytes.
type BlockSizes struct {
	// Minimum is the alignment of offsets and lengths: a power of two up to 64 KiB.
	Minimum int64
	// Preferred is the alignment at which requests are efficient.
	Preferred int64
	// Maximum is the largest payload of one read or write.
	Maximum int64
	// Advertised is false when the server said nothing and the defaults of the protocol apply.
	Advertised bool
}

// defaultBlockSizes are the constraints when a server advertises none.
func defaultBlockSizes() BlockSizes {
	return BlockSizes{Minimum: 1, Preferred: 4096, Maximum: maxPayload}
}

// Extent is a byte range of an export with the status flags of one metadata context.
type Extent struct {
	// Offset and Length are in bytes.
	Offset, Length int64
	// Flags are defined by the metadata context, for example [StateHole] | [StateZero].
	Flags uint32
}

// MultiExtent is a byte range over which the flags of several metadata contexts do not change.
type MultiExtent struct {
	// Offset and Length are in bytes.
	Offset, Length int64
	// Flags holds one value per context, in the order in which the contexts were asked for. The slice
	// belongs to the receiver.
	Flags []uint32
}

// ExportInfo is what a server tells about an export.
type ExportInfo struct {
	// Name is the name of the export, Description the server's free text about it.
	Name, Description string
	// Size is in bytes.
	Size int64
	// Flags are the transmission flags.
	Flags Flags
	// BlockSizes are the constraints on requests.
	BlockSizes BlockSizes
	// Contexts are the metadata contexts: the granted ones of a [Client], the offered ones in [Describe].
	Contexts []string
}
