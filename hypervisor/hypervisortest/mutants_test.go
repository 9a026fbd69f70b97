package hypervisortest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

// mutant is the fake with a planted bug.
type mutant struct {
	name    string
	opts    fakes.Options
	plant   func(b *bent, w *fakes.World)
	harness func(h *Harness, w *fakes.World) // changes what the bug needs around it
}

// newHarness makes a new platform with the bug in each connection.
func (m *mutant) newHarness(T) *Harness {
	w := fakes.NewWorld(m.opts)
	id := w.AddVM(fakes.VMConfig{
		Name: "web1", Guest: fakes.Guest{Agent: true}, NVRAM: []byte("variables"),
		NICs: []hypervisor.NIC{{}},
		Disks: []fakes.DiskConfig{
			{Size: 320<<10 + 512},
			{Size: 704<<10 - 1536},
			{Size: 64 << 10, Untracked: true},
			{ID: "lun", Size: 1 << 20, Backing: hypervisor.RDMPhysical},
		},
	})
	other := w.AddVM(fakes.VMConfig{Name: "web2", Disks: []fakes.DiskConfig{{Size: 64 << 10}}})
	w.AddStorage("small", 1<<20)
	connect := func() hypervisor.Hypervisor {
		h := w.Connect()
		b := &bent{Target: h, Thawer: h}
		if m.plant != nil {
			m.plant(b, w)
		}
		return b
	}
	h := &Harness{
		Hypervisor: connect(), VM: id, OtherVM: other, SmallStorage: "small",
		Timeout: 5 * time.Second, QuiesceTimeout: 20 * time.Millisecond,
		GuestWrite: func(d hypervisor.DiskID, p []byte, off int64) error { return w.GuestWrite(id, d, off, p) },
		Discard:    func(d hypervisor.DiskID, off, n int64) error { return w.GuestDiscard(id, d, off, n) },
		Zero:       func(d hypervisor.DiskID, off, n int64) error { return w.GuestZero(id, d, off, n) },
		Truth:      func(d hypervisor.DiskID) (io.ReaderAt, error) { return w.Bytes(id, d) },
		Reconnect:  func() (hypervisor.Hypervisor, error) { return connect(), nil },
		Frozen:     func() (bool, error) { return w.Frozen(id), nil },
		SetGuest:   func(g GuestMode) error { return w.SetGuest(id, guests[g]) },
		AddForeignSnapshot: func() (check, remove func() error, err error) {
			check = func() error {
				if len(w.Foreign(id)) != 1 {
					return errors.New("the foreign snapshot is gone")
				}
				return nil
			}
			return check, func() error { return w.RemoveForeignSnapshot(id, "foreign") }, w.AddForeignSnapshot(id, "foreign")
		},
		Leftovers: func() (left []string, err error) {
			for _, l := range w.Leftovers() {
				if !l.Baseline {
					left = append(left, l.ID)
				}
			}
			return left, nil
		},
	}
	if m.harness != nil {
		m.harness(h, w)
	}
	return h
}

var guests = map[GuestMode]fakes.Guest{
	GuestWorks:  {Agent: true},
	GuestAbsent: {},
	GuestFails:  {Agent: true, Freeze: fakes.FreezeFails},
	GuestHangs:  {Agent: true, Freeze: fakes.FreezeHangs},
}

// Without a bug the suite finds none, in any of the platforms that mutants
// start from; and no check is skipped on all of them.
func TestNoMutant(t *testing.T) {
	ran := map[string]bool{}
	for _, opts := range []fakes.Options{
		{RandomWrite: true}, {Sequential: true}, {NoBaselines: true}, {NoTracking: true, NoQuiesce: true}, {NonAtomicDisks: true},
	} {
		m := mutant{opts: opts}
		for _, c := range checks() {
			r := record(c, m.newHarness)
			require.False(t, r.failed, "%s: %s", c.name, strings.Join(r.notes, "\n"))
			ran[c.name] = ran[c.name] || !r.skipped
		}
	}
	for _, c := range checks() {
		require.True(t, ran[c.name], "check %s never ran", c.name)
	}
	require.GreaterOrEqual(t, len(ran), 60)
}

func TestCheckNamesAreUnique(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range checks() {
		require.False(t, seen[c.name], c.name)
		seen[c.name] = true
	}
}

// Every planted bug is found by the suite. The table says by which check first;
// with HOLDFAST_MUTANTS=all, also by how many.
func TestMutants(t *testing.T) {
	all := slices.Concat(snapshotMutants, trackingMutants, readMutants, lifeMutants, targetMutants)
	require.GreaterOrEqual(t, len(all), 20)
	rows := make([]string, len(all))
	count := os.Getenv("HOLDFAST_MUTANTS") == "all"
	var wg sync.WaitGroup
	limit := make(chan struct{}, 8) // most of the time is waiting for guests that hang
	for i, m := range all {
		wg.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			var killers []string
			for _, c := range checks() {
				if !record(c, m.newHarness).failed {
					continue
				}
				if killers = append(killers, c.name); !count {
					break
				}
			}
			if len(killers) > 0 {
				rows[i] = fmt.Sprintf("%s\t%s\t%d", m.name, killers[0], len(killers))
			}
		})
	}
	wg.Wait()
	lines := []string{"MUTANT\tKILLED FIRST BY\tCHECKS"}
	for i, m := range all {
		row := rows[i]
		if row == "" {
			row = m.name + "\tSURVIVED\t0"
			t.Errorf("mutant survived: %s", m.name)
		}
		lines = append(lines, row)
	}
	var table strings.Builder
	tw := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	_, err := io.WriteString(tw, strings.Join(lines, "\n")+"\n")
	require.NoError(t, err)
	require.NoError(t, tw.Flush())
	t.Logf("%d mutants\n%s", len(all), table.String())
}
