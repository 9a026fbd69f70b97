package kvm

import (
	"errors"
	"fmt"
	"strings"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// Error numbers of libvirt (virErrorNumber) that the driver looks at.
const (
	virInternal           = 1
	virNoSupport          = 3
	virNoConnect          = 5
	virInvalidConn        = 6
	virInvalidArg         = 8
	virOperationFailed    = 9
	virDomExist           = 28
	virOperationDenied    = 29
	virSystemError        = 38
	virRPC                = 39
	virTLS                = 40
	virNoDomain           = 42
	virNoNetwork          = 43
	virAuthFailed         = 45
	virNoStoragePool      = 49
	virOperationInvalid   = 55
	virConfigUnsupported  = 67
	virOperationTimeout   = 68
	virArgUnsupported     = 74
	virAuthCancelled      = 79
	virNoMetadata         = 80
	virBlockCopyActive    = 83
	virUnsupported        = 84
	virAgentUnresponsive  = 86
	virResourceBusy       = 87
	virAccessDenied       = 88
	virAuthUnavailable    = 94
	virAgentUnsynced      = 97
	virNoCheckpoint       = 103
	virNoBackup           = 104
	virCheckpointBroken   = 109
	virAgentTimeout       = 112
	virAgentCommandFailed = 113
)

// virError is an error of the libvirt daemon, whichever leaf it came through. It
// matches the conditions of package hypervisor that its number stands for. The
// error domain is not kept: one of the leaves does not learn it.
type virError struct {
	code int
	msg  string
}

// Error gives libvirt's words and its number.
func (e *virError) Error() string { return fmt.Sprintf("%s (libvirt error %d)", e.msg, e.code) }

// Is maps libvirt's numbers to conditions of the contract. Some numbers mean
// several things; then libvirt's words decide.
func (e *virError) Is(target error) bool {
	switch target {
	case hypervisor.ErrNotFound:
		switch e.code {
		case virNoDomain, virNoNetwork, virNoStoragePool, virNoCheckpoint, virNoBackup, virNoMetadata:
			return true
		}
	case hypervisor.ErrExists:
		return e.code == virDomExist || (e.code == virOperationFailed && strings.Contains(e.msg, "already exists"))
	case hypervisor.ErrAuth:
		switch e.code {
		case virOperationDenied, virAuthFailed, virAuthCancelled, virAccessDenied, virAuthUnavailable:
			return true
		}
	case hypervisor.ErrUnavailable:
		switch e.code {
		case virNoConnect, virInvalidConn, virRPC, virTLS:
			return true
		}
	case hypervisor.ErrBusy:
		switch e.code {
		case virOperationTimeout, virBlockCopyActive, virResourceBusy:
			return true
		case virUnsupported, virInternal, virOperationInvalid, virOperationFailed:
			return strings.Contains(e.msg, "block job") || strings.Contains(e.msg, "blockjob") ||
				strings.Contains(e.msg, "another job") || strings.Contains(e.msg, "already running")
		}
	case hypervisor.ErrNoSpace:
		return strings.Contains(e.msg, "No space left on device")
	case errors.ErrUnsupported:
		return e.code == virNoSupport || e.code == virArgUnsupported
	}
	return false
}

// virCode returns libvirt's number for err, 0 if err is none of libvirt's.
func virCode(err error) int {
	var e *virError
	if errors.As(err, &e) {
		return e.code
	}
	return 0
}

// agentSilent reports whether err means that the guest agent did not answer, as
// opposed to an answer that is an error.
func agentSilent(err error) bool {
	switch virCode(err) {
	case virAgentUnresponsive, virAgentUnsynced, virAgentTimeout, virOperationTimeout:
		return true
	}
	return false
}

// unavailable marks an error of the connection itself.
func unavailable(err error) error { return fmt.Errorf("%w: %w", hypervisor.ErrUnavailable, err) }
