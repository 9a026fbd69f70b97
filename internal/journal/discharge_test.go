package journal

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// TestFailedDischargeStaysOpen: an obligation whose discharge could not be written is
// still owed, and the journal stays for whoever settles it.
func TestFailedDischargeStaysOpen(t *testing.T) {
	c := newCrashFS()
	opts := &Options{FS: c}
	j, err := Create("d", "run1", Header{}, opts)
	require.NoError(t, err)
	id, err := j.Intend(Obligation{Kind: Thaw, VM: "web1"})
	require.NoError(t, err)
	once := true
	c.fault = func(int) (int, bool) {
		first := once
		once = false
		return 0, first
	}
	require.ErrorIs(t, j.Discharge(id), errInjected)
	require.Len(t, j.Open(), 1, "it is not discharged")
	require.ErrorIs(t, j.Close(true), ErrOpen)
	j, err = Adopt("d", "run1", opts)
	require.NoError(t, err)
	require.Len(t, j.Open(), 1)
	require.NoError(t, j.Discharge(id))
	require.NoError(t, j.Close(false))
}
