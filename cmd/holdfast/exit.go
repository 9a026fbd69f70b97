package main

import (
	"context"
	"errors"
	"io/fs"
	"strings"
	"syscall"

	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/journal"
	"github.com/holdfast-backup/holdfast/repository"
)

// Exit codes of the command.
const (
	exitOK          = 0
	exitFailed      = 1 // failed, or damage was found
	exitUsage       = 2
	exitDegraded    = 3 // finished, and something that was promised is missing
	exitInterrupted = 130
)

// severity orders exit codes: of several the worst counts.
func severity(code int) int {
	switch code {
	case exitOK:
		return 0
	case exitDegraded:
		return 1
	case exitFailed:
		return 2
	case exitUsage:
		return 3
	}
	return 4
}

// usageError is a mistake in how the command was called.
type usageError struct {
	hint string
	err  error
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usage(hint string, err error) error { return &usageError{hint: hint, err: err} }

// hintedError gives an error the next step.
type hintedError struct {
	hint string
	err  error
}

func (e *hintedError) Error() string { return e.err.Error() }
func (e *hintedError) Unwrap() error { return e.err }

// problem is an error as people and programs get it.
type problem struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
}

func (p *problem) exit() int {
	switch p.Code {
	case codeUsage:
		return exitUsage
	case codeInterrupted:
		return exitInterrupted
	}
	return exitFailed
}

// Codes that do not come from a sentinel.
const (
	codeUsage       = "usage"
	codeInterrupted = "interrupted"
	codeFailed      = "failed"
)

// kinds maps conditions to codes and to what can be done about them, the more
// telling ones first.
var kinds = []struct {
	is   error
	code string
	hint string
}{
	{hypervisor.ErrThawPending, "thaw-pending", "run holdfast recover: the guest may still be frozen"},
	{repository.ErrOutcomeUnknown, "outcome-unknown", "see with holdfast points whether the restore point is there, then run holdfast recover"},
	{repository.ErrPassword, "password", "check --repo-password-file or HOLDFAST_REPO_PASSWORD: without the password nothing can be read"},
	{repository.ErrNotRepository, "not-a-repository", "check --repo; the first backup into an empty directory makes a repository"},
	{repository.ErrStale, "stale", "run the backup again; was the machine suspended?"},
	{repository.ErrDamaged, "damaged", "see what is affected with: holdfast verify --repo REPO"},
	{repository.ErrFenced, "fenced", "another process took over: run the command again"},
	{repository.ErrNoSpace, "repository-full", "free space on the repository's file system, or remove points with holdfast prune"},
	{syscall.ENOSPC, "no-space", "free space on the file system"},
	{hypervisor.ErrNoSpace, "no-space", ""},
	{repository.ErrReadOnly, "repository-read-only", "check the permissions of the repository and how its file system is mounted"},
	{syscall.EROFS, "read-only", "check how the file system is mounted"},
	{repository.ErrLocked, "locked", "wait for the other run; holdfast recover takes over from a dead one"},
	{hypervisor.ErrQuiesceTimeout, "quiesce-timeout", "a longer --quiesce-timeout, or a lower --min-consistency, may help"},
	{hypervisor.ErrQuiesce, "quiesce", "check the guest agent, or accept less with --min-consistency crash"},
	{hypervisor.ErrAuth, "auth", "check the user and the password"},
	{hypervisor.ErrAmbiguous, "ambiguous", ""},
	{hypervisor.ErrExists, "exists", ""},
	{repository.ErrExists, "exists", ""},
	{hypervisor.ErrNotOurs, "not-ours", ""},
	{hypervisor.ErrBusy, "busy", ""},
	{hypervisor.ErrUnavailable, "unavailable", "check that the hypervisor is running and can be reached"},
	{hypervisor.ErrBaselineInvalid, "baseline-invalid", ""},
	{hypervisor.ErrNotFound, "not-found", ""},
	{repository.ErrNotFound, "not-found", ""},
	{journal.ErrAlive, "busy", "the run is alive: wait for it"},
	{fs.ErrNotExist, "not-found", ""},
	{fs.ErrPermission, "permission", "run as a user who may read and write there"},
	{errors.ErrUnsupported, "unsupported", ""},
}

// explain turns an error into what people and programs get. It never fails and
// never shows the inside of a value.
func explain(ctx context.Context, err error) *problem {
	p := &problem{Code: codeFailed, Message: message(err), Hint: hint(err)}
	var u *usageError
	if errors.Is(context.Cause(ctx), errInterrupted) {
		p.Code, p.Hint = codeInterrupted, ""
		if !errors.Is(err, errInterrupted) {
			p.Message = "interrupted: " + p.Message
		}
		return p
	}
	if errors.As(err, &u) || errors.Is(err, connect.ErrUsage) {
		p.Code = codeUsage
		return p
	}
	for _, k := range kinds {
		if errors.Is(err, k.is) {
			p.Code = k.code
			if p.Hint == "" {
				p.Hint = k.hint
			}
			break
		}
	}
	return p
}

// hint finds the first hint in the tree of err.
func hint(err error) string {
	var u *usageError
	var h *hintedError
	var l *connect.LocationError
	switch {
	case errors.As(err, &u) && u.hint != "":
		return u.hint
	case errors.As(err, &h) && h.hint != "":
		return h.hint
	case errors.As(err, &l) && l.Hint != "":
		return l.Hint
	}
	for _, e := range hypervisorErrors(err) {
		if e.Hint != "" {
			return e.Hint
		}
	}
	return ""
}

// hypervisorErrors lists every *hypervisor.Error in the tree of err.
func hypervisorErrors(err error) []*hypervisor.Error {
	var out []*hypervisor.Error
	switch e := err.(type) { //nolint:errorlint // this walks the tree itself
	case nil:
		return nil
	case *hypervisor.Error:
		out = append(out, e)
		return append(out, hypervisorErrors(e.Err)...)
	case interface{ Unwrap() []error }:
		for _, sub := range e.Unwrap() {
			out = append(out, hypervisorErrors(sub)...)
		}
		return out
	case interface{ Unwrap() error }:
		return hypervisorErrors(e.Unwrap())
	}
	return out
}

// message is the text of err on one line, without the hints in it: they have a
// line of their own.
func message(err error) string {
	s := err.Error()
	for _, e := range hypervisorErrors(err) {
		if e.Hint != "" {
			s = strings.ReplaceAll(s, " ("+e.Hint+")", "")
		}
	}
	return strings.Join(lines(s), "; ")
}
