package hypervisor

import (
	"errors"
	"strings"
)

// Conditions that callers match with errors.Is. Besides these, drivers return
// errors.ErrUnsupported and errors of the context.
var (
	ErrNotFound        = errors.New("not found")
	ErrExists          = errors.New("already exists")
	ErrAmbiguous       = errors.New("ambiguous")
	ErrAuth            = errors.New("not authorised")
	ErrBusy            = errors.New("busy")
	ErrNoSpace         = errors.New("no space left")
	ErrQuiesce         = errors.New("guest could not be quiesced")
	ErrQuiesceTimeout  = errors.New("guest did not quiesce in time")
	ErrBaselineInvalid = errors.New("baseline is not valid")
	ErrUnavailable     = errors.New("hypervisor is not available")
	// ErrNotOurs refuses to touch an object that Holdfast did not create.
	ErrNotOurs = errors.New("not created by Holdfast")
	// ErrThawPending comes with another error: the guest was told to freeze and
	// was not seen thawed, so an obligation to thaw it stays open.
	ErrThawPending = errors.New("guest may still be frozen")
)

// Error is what drivers return: what was done, on what, why it failed, and what
// a person can do about it.
type Error struct {
	Op       string // method or step: "CreateSnapshot"
	Platform Platform
	VM       VMID
	Disk     DiskID
	Hint     string // the next step, empty if there is none
	Err      error
}

// Error names the operation and its object, then the cause, then the hint.
func (e *Error) Error() string {
	var b strings.Builder
	if e.Platform != "" {
		b.WriteString(string(e.Platform) + ": ")
	}
	b.WriteString(e.Op)
	if e.VM != "" {
		b.WriteString(" " + string(e.VM))
	}
	if e.Disk != "" {
		b.WriteString(" disk " + string(e.Disk))
	}
	if e.Err != nil {
		b.WriteString(": " + e.Err.Error())
	}
	if e.Hint != "" {
		b.WriteString(" (" + e.Hint + ")")
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Hint returns the first hint in the chain of err, or "".
func Hint(err error) string {
	var e *Error
	for errors.As(err, &e) {
		if e.Hint != "" {
			return e.Hint
		}
		err = e.Err
	}
	return ""
}

// BaselineError says why a baseline cannot be used. It matches
// ErrBaselineInvalid.
type BaselineError struct {
	Reason Reason // ReasonTrackingLost, ReasonBaselineMissing, ...
	Err    error  // the platform's words, may be nil
}

// Error names the reason and the platform's words.
func (e *BaselineError) Error() string {
	s := ErrBaselineInvalid.Error() + ": " + string(e.Reason)
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Is makes the error match ErrBaselineInvalid.
func (e *BaselineError) Is(target error) bool { return target == ErrBaselineInvalid }

// Unwrap returns the platform's error.
func (e *BaselineError) Unwrap() error { return e.Err }

// BaselineReason returns the reason in the chain of err; ReasonTrackingLost when
// err matches ErrBaselineInvalid without one, "" when it does not match.
func BaselineReason(err error) Reason {
	var e *BaselineError
	if errors.As(err, &e) {
		return e.Reason
	}
	if errors.Is(err, ErrBaselineInvalid) {
		return ReasonTrackingLost
	}
	return ""
}
