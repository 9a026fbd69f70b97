package hypervisortest

import (
	"context"
	"io"
	"regexp"
	"slices"
	"strings"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

var infoChecks = []check{
	{"info/filled", func(e *env) {
		i := e.hv.Info()
		require.NotEmpty(e, i.Platform)
		require.NotEmpty(e, i.Product)
		require.NotEmpty(e, i.Endpoint)
		require.GreaterOrEqual(e, i.Capabilities.MaxConsistency, hypervisor.CrashConsistent)
		require.LessOrEqual(e, i.Capabilities.MaxConsistency, hypervisor.ApplicationConsistent)
		require.NotRegexp(e, `://[^/@]*:[^/@]*@`, i.Endpoint, "a password in the endpoint")
	}},
	{"info/stable", func(e *env) {
		first := e.hv.Info()
		_, err := e.hv.VM(e.ctx, e.h.VM)
		require.NoError(e, err)
		require.Equal(e, first, e.hv.Info())
	}},
	{"info/baselines-need-tracking", func(e *env) {
		require.False(e, e.caps.Baselines && !e.caps.ChangeTracking)
	}},
}

var uuidRE = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

var macRE = regexp.MustCompile(`^[0-9a-f]{2}(:[0-9a-f]{2}){5}$`)

var vmChecks = []check{
	{"vms/lists-the-vm", func(e *env) {
		all := e.list(hypervisor.Query{})
		require.Contains(e, all, e.h.VM)
		if e.h.OtherVM != "" {
			require.Contains(e, all, e.h.OtherVM)
		}
	}},
	{"vms/no-duplicates", func(e *env) {
		ids := e.list(hypervisor.Query{})
		slices.Sort(ids)
		require.Len(e, slices.Compact(slices.Clone(ids)), len(ids))
	}},
	{"vms/by-name", func(e *env) {
		require.Contains(e, e.list(hypervisor.Query{Name: e.vm.Name}), e.h.VM)
		require.NotContains(e, e.list(hypervisor.Query{Name: e.vm.Name + "-not"}), e.h.VM)
		require.NotContains(e, e.list(hypervisor.Query{Name: e.vm.Name[:len(e.vm.Name)-1]}), e.h.VM, "names match as a whole")
	}},
	{"vms/by-uuid-of-any-case", func(e *env) {
		require.Equal(e, []hypervisor.VMID{e.h.VM}, e.list(hypervisor.Query{UUID: strings.ToUpper(e.vm.UUID)}))
	}},
	{"vms/all-conditions-count", func(e *env) {
		require.Empty(e, e.list(hypervisor.Query{Name: e.vm.Name, UUID: "00000000-0000-4000-8000-000000000000"}))
	}},
	{"vms/no-match-is-no-error", func(e *env) {
		require.Empty(e, e.list(hypervisor.Query{Name: "holdfast-suite-no-such-vm"}))
	}},
	{"vms/by-owner-leaves-others-out", func(e *env) {
		require.NotContains(e, e.list(hypervisor.Query{Owner: "holdfast-"}), e.h.VM, "the harness's VM is foreign")
	}},
	{"vms/can-be-left-early", func(e *env) {
		for range e.hv.VMs(e.ctx, hypervisor.Query{}) {
			break
		}
		require.Contains(e, e.list(hypervisor.Query{}), e.h.VM)
	}},
	{"vm/filled", checkDefinition},
	{"vm/disks-filled", func(e *env) { checkDisks(e, e.vm, e.caps) }},
	{"vm/not-found", func(e *env) {
		_, err := e.hv.VM(e.ctx, "holdfast-suite-no-such-vm")
		e.fails(err, hypervisor.ErrNotFound)
	}},
	{"vm/caller-owns-the-result", func(e *env) {
		a, err := e.hv.VM(e.ctx, e.h.VM)
		require.NoError(e, err)
		want := *e.vm
		a.Name, a.Disks[0].Size, a.Disks[0].ID = "changed", -1, "changed"
		for i := range a.Native.Data {
			a.Native.Data[i] = 0
		}
		b, err := e.hv.VM(e.ctx, e.h.VM)
		require.NoError(e, err)
		require.Equal(e, want.Name, b.Name)
		require.Equal(e, want.Disks, b.Disks)
		require.Equal(e, want.Native, b.Native)
	}},
	{"vm/attachments-read-twice", func(e *env) {
		e.need(len(e.vm.Attachments) > 0, "a VM with attachments")
		seen := map[string]bool{}
		for _, a := range e.vm.Attachments {
			require.True(e, hypervisor.ValidDiskID(hypervisor.DiskID(a.Name)), "attachment name %q", a.Name)
			require.False(e, seen[a.Name], "attachment name %q twice", a.Name)
			seen[a.Name] = true
			require.NotEmpty(e, a.Kind)
			first := e.attachment(a)
			if a.Size >= 0 {
				require.Len(e, first, int(a.Size))
			}
			e.same(first, e.attachment(a), "attachment read again")
		}
	}},
	{"vm/found-by-name-uuid-and-id", func(e *env) {
		for _, s := range []string{e.vm.Name, e.vm.UUID, string(e.h.VM)} {
			vm, err := hypervisor.Find(e.ctx, e.hv, s)
			require.NoError(e, err, s)
			require.Equal(e, e.h.VM, vm.ID)
		}
		_, err := hypervisor.Find(e.ctx, e.hv, "holdfast-suite-no-such-vm")
		e.fails(err, hypervisor.ErrNotFound)
	}},
}

func (e *env) list(q hypervisor.Query) []hypervisor.VMID {
	e.Helper()
	var ids []hypervisor.VMID
	for vm, err := range e.hv.VMs(e.ctx, q) {
		require.NoError(e, err)
		require.NotNil(e, vm)
		ids = append(ids, vm.ID)
	}
	return ids
}

func (e *env) attachment(a hypervisor.Attachment) []byte {
	e.Helper()
	r, err := a.Open(e.ctx)
	require.NoError(e, err)
	p, err := io.ReadAll(r)
	require.NoError(e, err)
	require.NoError(e, r.Close())
	return p
}

func checkDefinition(e *env) {
	vm := e.vm
	require.Equal(e, e.h.VM, vm.ID)
	require.Regexp(e, uuidRE, vm.UUID, "lower case, with dashes")
	require.NotEmpty(e, vm.Name)
	require.Contains(e, []hypervisor.PowerState{
		hypervisor.PoweredOn, hypervisor.PoweredOff, hypervisor.Paused, hypervisor.Suspended,
	}, vm.Power)
	require.Positive(e, vm.Hardware.CPUs)
	require.Positive(e, vm.Hardware.MemoryBytes)
	require.Contains(e, []hypervisor.Firmware{hypervisor.BIOS, hypervisor.UEFI}, vm.Hardware.Firmware)
	require.NotEmpty(e, vm.Hardware.Arch)
	require.NotEmpty(e, vm.Native.Format)
	require.NotEmpty(e, vm.Native.Data)
	require.Empty(e, vm.Owner, "the harness's VM is foreign")
	require.False(e, vm.Incomplete)
	for _, n := range vm.NICs {
		require.NotEmpty(e, n.ID)
		require.Regexp(e, macRE, n.MAC, "lower case, colons")
	}
	if !vm.Guest.Agent {
		require.NotEmpty(e, vm.Guest.AgentWhy, "no agent, and no word why")
	}
}

var (
	backings = []hypervisor.Backing{
		hypervisor.File, hypervisor.BlockVolume, hypervisor.RDMVirtual, hypervisor.RDMPhysical,
		hypervisor.Passthrough, hypervisor.Network,
	}
	reasons = []hypervisor.Reason{
		hypervisor.ReasonCDROM, hypervisor.ReasonReadOnly, hypervisor.ReasonShared,
		hypervisor.ReasonIndependent, hypervisor.ReasonRDMPhysical, hypervisor.ReasonPassthrough,
		hypervisor.ReasonRefused, hypervisor.ReasonNeverTracked, hypervisor.ReasonTrackingLost,
		hypervisor.ReasonInconsistent, hypervisor.ReasonBaselineMissing, hypervisor.ReasonDiskResized,
		hypervisor.ReasonDiskReplaced, hypervisor.ReasonChainUnhealthy,
	}
)

func checkDisks(e *env, vm *hypervisor.VM, caps hypervisor.Capabilities) {
	e.Helper()
	ids, contents := map[hypervisor.DiskID]bool{}, map[string]bool{}
	for _, d := range vm.Disks {
		require.True(e, hypervisor.ValidDiskID(d.ID), "disk ID %q", d.ID)
		require.False(e, ids[d.ID], "disk ID %q twice", d.ID)
		ids[d.ID] = true
		require.Contains(e, backings, d.Backing, "disk %s", d.ID)
		require.Contains(e, []hypervisor.Tracking{hypervisor.TrackingNone, hypervisor.TrackingBlocks}, d.Tracking, "disk %s", d.ID)
		require.NotEmpty(e, d.Bus, "disk %s", d.ID)
		if d.Snapshottable {
			require.Positive(e, d.Size, "disk %s", d.ID)
			require.NotEmpty(e, d.Content, "disk %s", d.ID)
			require.False(e, contents[d.Content], "two disks with content %s", d.Content)
			contents[d.Content] = true
		}
		if !caps.ChangeTracking {
			require.Equal(e, hypervisor.TrackingNone, d.Tracking, "disk %s: the platform does not track", d.ID)
		}
		if !d.Snapshottable || d.Tracking == hypervisor.TrackingNone {
			require.NotEmpty(e, d.Reason, "disk %s is not fully protected, and no word why", d.ID)
			require.Contains(e, reasons, d.Reason, "disk %s: reason", d.ID)
		}
	}
}

// cancelled returns a context that has ended.
func (e *env) cancelled() context.Context {
	ctx, cancel := context.WithCancel(e.ctx)
	cancel()
	return ctx
}
