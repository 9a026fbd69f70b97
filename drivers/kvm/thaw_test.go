package kvm

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestThawIsSeenNotBelieved: an agent that obeys the thaw and reports a guest that is
// still frozen has not thawed it. The note that the guest may be frozen stays.
func TestThawIsSeenNotBelieved(t *testing.T) {
	f := newFakeConn(fakeDomain)
	stuck := true
	f.agentReply = func(command string) (string, error) {
		if strings.Contains(command, "fsfreeze-status") && stuck {
			return `{"return":"frozen"}`, nil
		}
		return goodAgent()(command)
	}
	d := fakeDriver(t, f)
	require.NoError(t, d.editNotes(t.Context(), testUUID, affectLive, func(n *notes) { n.Freeze = &runNote{Run: "r1"} }))
	require.ErrorContains(t, d.thawOnce(t.Context(), testUUID), "frozen")
	require.Contains(t, f.meta[affectLive], "freeze")
	stuck = false
	require.NoError(t, d.thawOnce(t.Context(), testUUID))
	require.NotContains(t, f.meta[affectLive], "freeze")
}
