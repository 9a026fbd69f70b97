package hypervisor_test

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

func TestErrorKeepsItsChain(t *testing.T) {
	err := error(&hypervisor.Error{
		Op: "CreateSnapshot", Platform: hypervisor.KVM, VM: "web1", Disk: "vda", Hint: "install an agent",
		Err: fmt.Errorf("%w: %w", hypervisor.ErrQuiesce, io.ErrUnexpectedEOF),
	})
	require.EqualError(t, err, "kvm: CreateSnapshot web1 disk vda: guest could not be quiesced: unexpected EOF (install an agent)")
	require.ErrorIs(t, err, hypervisor.ErrQuiesce)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.EqualError(t, &hypervisor.Error{Op: "Close"}, "Close")
}

func TestHintIsTheFirstInTheChain(t *testing.T) {
	inner := &hypervisor.Error{Op: "b", Hint: "inner", Err: io.EOF}
	require.Equal(t, "inner", hypervisor.Hint(fmt.Errorf("x: %w", &hypervisor.Error{Op: "a", Err: inner})))
	require.Equal(t, "outer", hypervisor.Hint(&hypervisor.Error{Op: "a", Hint: "outer", Err: inner}))
	require.Empty(t, hypervisor.Hint(&hypervisor.Error{Op: "a"}))
	require.Empty(t, hypervisor.Hint(io.EOF))
	require.Empty(t, hypervisor.Hint(nil))
}

func TestBaselineReason(t *testing.T) {
	cause := errors.New("bitmap is inconsistent")
	err := fmt.Errorf("x: %w", &hypervisor.BaselineError{Reason: hypervisor.ReasonInconsistent, Err: cause})
	require.ErrorIs(t, err, hypervisor.ErrBaselineInvalid)
	require.ErrorIs(t, err, cause)
	require.Equal(t, hypervisor.ReasonInconsistent, hypervisor.BaselineReason(err))
	require.Equal(t, hypervisor.ReasonTrackingLost, hypervisor.BaselineReason(hypervisor.ErrBaselineInvalid))
	require.Empty(t, hypervisor.BaselineReason(io.EOF))
	require.Empty(t, hypervisor.BaselineReason(nil))
}
