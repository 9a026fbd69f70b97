package main

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
)

// slowThaw is a hypervisor whose thaw is under way when something happens, and that
// obeys its context.
type slowThaw struct {
	hypervisor.Hypervisor
	meanwhile func()
}

func (h slowThaw) Thaw(ctx context.Context, _ hypervisor.VMID) error {
	h.meanwhile()
	return ctx.Err()
}

// TestThawIsNotBrokenOff: the parent takes over while the guard is just thawing. The
// attempt is not broken off, for then nobody would know whether the guest is thawed.
func TestThawIsNotBrokenOff(t *testing.T) {
	heard, stop := context.WithCancel(t.Context())
	g := &thawer{p: &program{clock: clock.Real()}, vm: "vm-1", hv: slowThaw{meanwhile: stop}}
	require.Equal(t, guardThawed, g.thaw(heard, 0))
}
