package hypervisortest

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// T is the part of *testing.T that the suite uses.
type T interface {
	Helper()
	Name() string
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	FailNow()
	Failed() bool
	Skipf(format string, args ...any)
	Cleanup(f func())
}

// Harness is what a driver gives to the suite. The fields up to GuestWrite are
// required. The VM and its disks may be shared by all checks: each leaves them
// without snapshots and without new baselines, but with other content.
type Harness struct {
	// Hypervisor is an open connection. The suite does not close it, except in a
	// check that has Reconnect.
	Hypervisor hypervisor.Hypervisor

	// VM has at least two disks that snapshots include, and that are tracked if
	// the platform tracks changes at all. Two of them have sizes that are not
	// multiples of 1 MiB. Disks are read whole many times: keep them small.
	VM hypervisor.VMID

	// GuestWrite writes to a disk as the guest does. Offset and length are
	// multiples of Sector. It is called concurrently for different disks.
	GuestWrite func(disk hypervisor.DiskID, p []byte, off int64) error

	Sector  int64         // bytes; zero means 512
	Timeout time.Duration // for one check; zero means two minutes

	// Discard and Zero are guest operations on ranges, in whole sectors.
	Discard, Zero func(disk hypervisor.DiskID, off, n int64) error

	// Truth returns the content of a disk as it is now, by another way than the
	// driver's. Without it the suite believes the first full read.
	Truth func(disk hypervisor.DiskID) (io.ReaderAt, error)

	// Reconnect opens another connection, as a new process would. The suite
	// closes it.
	Reconnect func() (hypervisor.Hypervisor, error)

	// OtherVM is another VM with a tracked disk.
	OtherVM hypervisor.VMID

	// SetGuest makes the guest of VM behave; Frozen tells whether it is frozen.
	// The suite sets GuestWorks again at the end of a check.
	SetGuest func(GuestMode) error
	Frozen   func() (bool, error)

	// QuiesceTimeout is how long guests that do not freeze are waited for. It
	// must be enough for an agent to answer with an error; zero means 2 s.
	QuiesceTimeout time.Duration

	// AddForeignSnapshot makes a snapshot of VM that is not Holdfast's. check
	// says whether it is still there; remove removes it.
	AddForeignSnapshot func() (check func() error, remove func() error, err error)

	// Leftovers lists what Holdfast has left on the platform, apart from
	// baselines: snapshots, helper objects, incomplete VMs, open handles.
	Leftovers func() ([]string, error)

	// SmallStorage names a storage with less than 1 GiB of free space.
	SmallStorage string

	// EditSpec changes the VMSpecs that the suite makes for a Target, to what
	// the platform needs.
	EditSpec func(*hypervisor.VMSpec)
}

// GuestMode is how a guest answers to a freeze.
type GuestMode string

// Guest modes.
const (
	GuestWorks  GuestMode = "works"  // an agent answers and freezes the file systems
	GuestAbsent GuestMode = "absent" // there is no agent
	GuestFails  GuestMode = "fails"  // the agent reports an error
	GuestHangs  GuestMode = "hangs"  // the agent does not answer in time
)

// check is one subtest.
type check struct {
	name string
	run  func(e *env)
}

// checks lists all subtests, in order.
func checks() []check {
	var all []check
	for _, list := range [][]check{
		infoChecks, vmChecks, snapshotChecks, readChecks, extentChecks, changeChecks, baselineChecks,
		releaseChecks, contextChecks, closeChecks, quiesceChecks, diskChecks,
		targetChecks, targetWriteChecks, targetRefusalChecks,
	} {
		all = append(all, list...)
	}
	return all
}

// Run runs the suite. newHarness is called once for each check, with its T; it
// may give the same VM every time.
func Run(t *testing.T, newHarness func(T) *Harness) {
	for _, c := range checks() {
		t.Run(c.name, func(t *testing.T) { runCheck(t, c, newHarness) })
	}
}

func runCheck(t T, c check, newHarness func(T) *Harness) {
	h := newHarness(t)
	if h == nil || h.Hypervisor == nil || h.VM == "" || h.GuestWrite == nil {
		t.Errorf("the harness lacks Hypervisor, VM or GuestWrite")
		t.FailNow()
	}
	timeout := h.Timeout
	if timeout <= 0 {
		timeout = 2 * time.Minute
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	t.Cleanup(cancel)
	e := newEnv(ctx, t, h)
	t.Cleanup(e.finish)
	c.run(e)
}
