package fakes_test

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/hypervisor/hypervisortest"
)

// manyDisks is one disk of each kind that matters.
var manyDisks = []fakes.DiskConfig{
	{Size: 320<<10 + 512},
	{Size: mib + 200<<10 - 1536},
	{Size: 256 << 10, Untracked: true},
	{ID: "rdmv", Size: 128 << 10, Backing: hypervisor.RDMVirtual},
	{ID: "net", Size: 128 << 10, Backing: hypervisor.Network},
	{ID: "rdmp", Size: mib, Backing: hypervisor.RDMPhysical},
	{ID: "pass", Size: mib, Backing: hypervisor.Passthrough},
	{ID: "shared", Size: mib, Attrs: hypervisor.Attrs{Shared: true}},
	{ID: "indep", Size: mib, Attrs: hypervisor.Attrs{Independent: true}},
	{ID: "cd", Size: mib, Attrs: hypervisor.Attrs{Removable: true, ReadOnly: true}},
	{ID: "ro", Size: mib, Attrs: hypervisor.Attrs{ReadOnly: true}},
	{ID: "chain", Size: mib, Refuse: hypervisor.ReasonChainUnhealthy},
}

// fakeHarness gives the suite everything that it can ask for.
func fakeHarness(opts fakes.Options, wrap func(hypervisor.Hypervisor) hypervisor.Hypervisor) *hypervisortest.Harness {
	w := fakes.NewWorld(opts)
	id := w.AddVM(fakes.VMConfig{
		Name: "web1", Disks: manyDisks, NICs: []hypervisor.NIC{{Connected: true}, {}}, NVRAM: []byte("variables"),
		Guest: fakes.Guest{Agent: true}, Hardware: hypervisor.Hardware{Firmware: hypervisor.UEFI},
	})
	other := w.AddVM(fakes.VMConfig{Name: "web2", Disks: []fakes.DiskConfig{{Size: mib}}})
	w.AddStorage("small", mib)
	connect := func() hypervisor.Hypervisor { return wrap(w.Connect()) }
	return &hypervisortest.Harness{
		Hypervisor: connect(), VM: id, OtherVM: other, SmallStorage: "small", QuiesceTimeout: 30 * time.Millisecond,
		GuestWrite: func(d hypervisor.DiskID, p []byte, off int64) error { return w.GuestWrite(id, d, off, p) },
		Discard:    func(d hypervisor.DiskID, off, n int64) error { return w.GuestDiscard(id, d, off, n) },
		Zero:       func(d hypervisor.DiskID, off, n int64) error { return w.GuestZero(id, d, off, n) },
		Truth:      func(d hypervisor.DiskID) (io.ReaderAt, error) { return w.Bytes(id, d) },
		Reconnect:  func() (hypervisor.Hypervisor, error) { return connect(), nil },
		Frozen:     func() (bool, error) { return w.Frozen(id), nil },
		SetGuest: func(m hypervisortest.GuestMode) error {
			g := map[hypervisortest.GuestMode]fakes.Guest{
				hypervisortest.GuestWorks:  {Agent: true},
				hypervisortest.GuestAbsent: {},
				hypervisortest.GuestFails:  {Agent: true, Freeze: fakes.FreezeFails},
				hypervisortest.GuestHangs:  {Agent: true, Freeze: fakes.FreezeHangs},
			}[m]
			return w.SetGuest(id, g)
		},
		AddForeignSnapshot: func() (check, remove func() error, err error) {
			const name = "made by a person"
			check = func() error {
				if !slices.Contains(w.Foreign(id), name) {
					return errors.New("the foreign snapshot is gone")
				}
				return nil
			}
			return check, func() error { return w.RemoveForeignSnapshot(id, name) }, w.AddForeignSnapshot(id, name)
		},
		Leftovers: func() ([]string, error) {
			var left []string
			for _, l := range w.Leftovers() {
				if !l.Baseline {
					left = append(left, l.ID)
				}
			}
			return left, nil
		},
	}
}

func TestConformance(t *testing.T) {
	plain := func(h hypervisor.Hypervisor) hypervisor.Hypervisor { return h }
	faulty := func(h hypervisor.Hypervisor) hypervisor.Hypervisor { return fakes.WithFaults(h, fakes.NewScript()) }
	for name, opts := range map[string]fakes.Options{
		"default":                {},
		"random-write":           {RandomWrite: true},
		"nothing-kept":           {NoBaselines: true},
		"sequential":             {Sequential: true},
		"disks-one-by-one":       {NonAtomicDisks: true},
		"no-tracking":            {NoTracking: true},
		"no-quiesce":             {NoQuiesce: true},
		"one-snapshot-512-bytes": {OneSnapshot: true, Granularity: 512},
		"granularity-1-MiB":      {Granularity: mib},
		"granularity-odd":        {Granularity: 3 * 4096},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			hypervisortest.Run(t, func(hypervisortest.T) *hypervisortest.Harness { return fakeHarness(opts, plain) })
		})
	}
	for _, opts := range []fakes.Options{{RandomWrite: true}, {Sequential: true}} {
		t.Run(fmt.Sprintf("with-faults-sequential-%t", opts.Sequential), func(t *testing.T) {
			t.Parallel()
			hypervisortest.Run(t, func(hypervisortest.T) *hypervisortest.Harness { return fakeHarness(opts, faulty) })
		})
	}
}
