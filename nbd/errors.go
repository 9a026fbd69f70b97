package nbd

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
)

// Conditions to match with errors.Is.
var (
	// ErrProtocol means that the peer broke the protocol; the connection was closed.
	ErrProtocol = errors.New("nbd: protocol violation by the peer")
	// ErrConnectionLost means that a connection ended with requests outstanding or none left to use. The
	// outcome of a write is then unknown.
	ErrConnectionLost = errors.New("nbd: connection lost")
	// ErrClosed means that the client or server was closed by its owner.
	ErrClosed = errors.New("nbd: closed")
	// ErrTLSRefused means that TLS is required by the configuration and the server did not offer it.
	ErrTLSRefused = errors.New("nbd: TLS is required but the server refused it")
	// ErrTLSRequired means that the server insists on TLS and none was configured.
	ErrTLSRequired = errors.New("nbd: the server requires TLS")
	// ErrUnknownExport means that the server has no export of that name.
	ErrUnknownExport = errors.New("nbd: unknown export")
	// ErrContextNotGranted means that a metadata context is required or used and was not granted.
	ErrContextNotGranted = errors.New("nbd: metadata context not granted")
	// ErrExportChanged means that a further connection reached a different export.
	ErrExportChanged = errors.New("nbd: export changed between connections")
	// ErrUnaligned means that a request breaks the minimum block size of the export.
	ErrUnaligned = errors.New("nbd: request not aligned to the minimum block size")
	// ErrOutOfRange means that a request is negative or passes the end of the export.
	ErrOutOfRange = errors.New("nbd: request outside the export")
	// ErrReadOnly means that a change of a read-only export was asked.
	ErrReadOnly = errors.New("nbd: export is read-only")
)

// Errno is an error number of the protocol. Its values are fixed and do not depend on the operating
// system. Errno is an error: match it with errors.Is(err, nbd.EIO).
type Errno uint32

// Error numbers of the protocol.
const (
	EPERM     Errno = 1   // operation not permitted; matches fs.ErrPermission
	EIO       Errno = 5   // input/output error
	ENOMEM    Errno = 12  // cannot allocate memory
	EINVAL    Errno = 22  // invalid argument; matches fs.ErrInvalid
	ENOSPC    Errno = 28  // no space left on device
	EOVERFLOW Errno = 75  // value too large
	ENOTSUP   Errno = 95  // operation not supported; matches errors.ErrUnsupported
	ESHUTDOWN Errno = 108 // server is shutting down
)

// Error names the error number.
func (e Errno) Error() string {
	switch e {
	case EPERM:
		return "operation not permitted"
	case EIO:
		return "input/output error"
	case ENOMEM:
		return "cannot allocate memory"
	case EINVAL:
		return "invalid argument"
	case ENOSPC:
		return "no space left on device"
	case EOVERFLOW:
		return "value too large"
	case ENOTSUP:
		return "operation not supported"
	case ESHUTDOWN:
		return "server is shutting down"
	}
	return fmt.Sprintf("error %d", uint32(e))
}

// Is matches the portable conditions of the standard library.
func (e Errno) Is(target error) bool {
	switch e {
	case EPERM:
		return target == fs.ErrPermission
	case EINVAL:
		return target == fs.ErrInvalid
	case ENOTSUP:
		return target == errors.ErrUnsupported
	}
	return false
}

// RequestError is a failure that the server reported for one request. The connection stays usable.
type RequestError struct {
	// Op is the command, for example "read".
	Op string
	// Offset and Length are the range of the request, in bytes.
	Offset, Length int64
	// At is the offset at which the server met the error, or -1.
	At int64
	// Errno is the protocol's error number; errors.Is finds it.
	Errno Errno
	// Message is the server's text, possibly empty.
	Message string
}

// Error describes the failed request.
func (e *RequestError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "nbd: %s of %d bytes at %d: %v", e.Op, e.Length, e.Offset, e.Errno)
	if e.At >= 0 {
		fmt.Fprintf(&b, " at offset %d", e.At)
	}
	if e.Message != "" {
		fmt.Fprintf(&b, ": %q", e.Message)
	}
	return b.String()
}

// Unwrap returns the Errno.
func (e *RequestError) Unwrap() error { return e.Errno }

// ProtocolError tells how the peer broke the protocol. It matches [ErrProtocol].
type ProtocolError struct {
	// Phase is "handshake" or "transmission".
	Phase string
	// Detail says what was wrong.
	Detail string
}

// Error describes the violation.
func (e *ProtocolError) Error() string { return "nbd: " + e.Phase + ": " + e.Detail }

// Is matches ErrProtocol.
func (e *ProtocolError) Is(target error) bool { return target == ErrProtocol }

// OptionError is a server's refusal of an option during the handshake. It matches [ErrUnknownExport],
// [ErrTLSRequired], ESHUTDOWN, [errors.ErrUnsupported] or [fs.ErrPermission] where that fits.
type OptionError struct {
	// Option names the option, for example "GO".
	Option string
	// Code is the reply type of the protocol, for example 0x80000006.
	Code uint32
	// Message is the server's text, possibly empty.
	Message string
}

// Error describes the refusal.
func (e *OptionError) Error() string {
	what := fmt.Sprintf("error %#x", e.Code)
	switch e.Code {
	case repErrUnsup:
		what = "not supported"
	case repErrPolicy:
		what = "forbidden by policy"
	case repErrInvalid:
		what = "invalid"
	case repErrPlatform:
		what = "not supported on this platform"
	case repErrTLSReqd:
		what = "TLS required"
	case repErrUnknown:
		what = "unknown export"
	case repErrShutdown:
		what = "server is shutting down"
	case repErrBlockSizeReqd:
		what = "block sizes must be negotiated"
	case repErrTooBig:
		what = "too big"
	}
	if e.Message != "" {
		return fmt.Sprintf("nbd: option %s: %s: %q", e.Option, what, e.Message)
	}
	return fmt.Sprintf("nbd: option %s: %s", e.Option, what)
}

// Is matches the conditions that the reply code stands for.
func (e *OptionError) Is(target error) bool {
	switch e.Code {
	case repErrUnsup, repErrPlatform:
		return target == errors.ErrUnsupported
	case repErrPolicy:
		return target == fs.ErrPermission
	case repErrTLSReqd:
		return target == ErrTLSRequired
	case repErrUnknown:
		return target == ErrUnknownExport
	case repErrShutdown:
		return target == ESHUTDOWN
	}
	return false
}

// ContextError lists metadata contexts that are required and were not granted. It matches
// [ErrContextNotGranted].
type ContextError struct {
	// Export is the name of the export.
	Export string
	// Missing are the names that were not granted.
	Missing []string
	// Err is the server's refusal when it gave one; servers drop unknown names without a word.
	Err error
}

// Error lists the missing contexts.
func (e *ContextError) Error() string {
	s := fmt.Sprintf("nbd: export %q: metadata contexts not granted: %q", e.Export, e.Missing)
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Is matches ErrContextNotGranted.
func (e *ContextError) Is(target error) bool { return target == ErrContextNotGranted }

// Unwrap returns the server's refusal, if any.
func (e *ContextError) Unwrap() error { return e.Err }

// ExportChangedError tells what differs between two connections to what should be one export. It
// matches [ErrExportChanged].
type ExportChangedError struct {
	// Export is the name of the export.
	Export string
	// Field is "size", "flags", "block sizes", "contexts", "structured replies" or "TLS".
	Field string
	// Old and New are the values on the first and on the new connection.
	Old, New string
}

// Error describes the difference.
func (e *ExportChangedError) Error() string {
	return fmt.Sprintf("nbd: export %q changed between connections: %s was %s, is %s", e.Export, e.Field, e.Old, e.New)
}

// Is matches ErrExportChanged.
func (e *ExportChangedError) Is(target error) bool { return target == ErrExportChanged }

// handshakef makes a ProtocolError of the handshake.
func handshakef(format string, args ...any) error {
	return &ProtocolError{Phase: "handshake", Detail: fmt.Sprintf(format, args...)}
}

// transmissionf makes a ProtocolError of the transmission phase.
func transmissionf(format string, args ...any) error {
	return &ProtocolError{Phase: "transmission", Detail: fmt.Sprintf(format, args...)}
}
