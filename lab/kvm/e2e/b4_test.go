//go:build linux

package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/journal"
	"github.com/holdfast-backup/holdfast/internal/tally"
	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
	"github.com/holdfast-backup/holdfast/repository"
)

// matrix is a scenario of the crash matrix: an operation that is killed at every
// call to libvirt, before the call is sent and when its answer has arrived unseen.
// Between two calls lie the records of the journal, so that every cell of the
// matrix is among these moments: before the intent and after it, after the call
// whose answer is lost, after the confirmation, in the undoing and after it.
type matrix struct {
	*rig
	order order
	vms   []*kvmlab.VM

	prepare func()         // before each kill; may be nil
	cell    func() string  // what the journal and the world say after a kill
	heal    func()         // makes all good again, and proves it
	cells   map[string]int // kills by cell
	frozen  float64        // the longest freeze, in milliseconds
	max     time.Duration  // the longest that recover took
	calls   []procedure    // of an undisturbed run
	hits    map[procedure]int
}

func (r *rig) matrix(op string, vms ...*kvmlab.VM) *matrix {
	r.t.Helper()
	u, err := url.Parse(r.lab.URI)
	require.NoError(r.t, err)
	q := u.Query()
	q.Set("holdfast_scratch_dir", r.scratch())
	u.RawQuery = q.Encode()
	storage := filepath.Join(r.lab.Dir, "storage")
	require.NoError(r.t, os.MkdirAll(storage, 0o755))
	m := &matrix{rig: r, vms: vms, cells: map[string]int{}, hits: map[procedure]int{}, order: order{
		Op: op, URI: r.lab.URI, Scratch: r.scratch(), Storage: storage, Repo: r.repo, State: r.state,
		Endpoint: u.String(), Log: filepath.Join(r.lab.Dir, "calls"),
	}}
	if len(vms) > 0 {
		m.order.VM = hypervisor.VMID(vms[0].UUID())
	}
	return m
}

// child runs the order in a process of its own, to its end or to its death.
func (m *matrix) child(kill *moment) (died bool) {
	m.t.Helper()
	cmd, out := m.command(kill)
	err := cmd.Run()
	st, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	require.True(m.t, ok)
	if kill != nil && st.Signaled() && st.Signal() == syscall.SIGKILL {
		return true
	}
	require.NoError(m.t, err, "%s %v: %s", m.order.Op, kill, out)
	return false
}

// command makes the child; its output goes to out.
func (m *matrix) command(kill *moment) (cmd *exec.Cmd, out *bytes.Buffer) {
	m.t.Helper()
	o := m.order
	o.Kill = kill
	text, err := json.Marshal(o)
	require.NoError(m.t, err)
	cmd, out = exec.Command(os.Args[0]), new(bytes.Buffer)
	cmd.Env = append(slices.Clone(m.env), envOrder+"="+string(text))
	cmd.Stderr, cmd.Stdout = out, out
	return cmd, out
}

// listed reads the calls that the last child logged.
func (m *matrix) listed() (out []procedure) {
	m.t.Helper()
	b, err := os.ReadFile(m.order.Log)
	require.NoError(m.t, err)
	s := bufio.NewScanner(bytes.NewReader(b))
	for s.Scan() {
		name, changes, _ := strings.Cut(s.Text(), " ")
		out = append(out, procedure{name, changes == "true"})
	}
	return out
}

// moments lists where to kill, and how many kills to make: everywhere, or a few at
// calls that change something, on both sides. An answer that only tells something is
// as good as lost before the next call.
func (m *matrix) moments(rnd *rand.Rand) (out []moment, kills int) {
	for i, p := range m.calls {
		out = append(out, moment{Call: i})
		if p.changes {
			out = append(out, moment{Call: i, After: true})
		}
	}
	if os.Getenv("HOLDFAST_MATRIX") == "all" {
		return out, len(out)
	}
	out = slices.DeleteFunc(out, func(k moment) bool { return !m.calls[k.Call].changes })
	rnd.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out, min(3, len(out))
}

// run kills at every moment.
func (m *matrix) run() {
	m.t.Helper()
	if m.prepare != nil {
		m.prepare()
	}
	require.False(m.t, m.child(nil))
	m.calls = m.listed()
	m.heal()
	all, want := m.moments(m.rnd)
	kills, missed := 0, 0
	for _, k := range all {
		if kills == want {
			break
		}
		if m.prepare != nil {
			m.prepare()
		}
		if !m.child(&k) {
			missed++ // this run made fewer calls: it did not have to wait
			m.heal()
			continue
		}
		kills++
		at := m.listed()[0].name
		c := m.cell()
		m.cells[c]++
		m.t.Logf("killed at call %d of %d, %s, after: %t: %s", k.Call+1, len(m.calls), at, k.After, c)
		m.heal()
	}
	// How often a run polls differs, so the last calls of the listed one may be missing.
	require.LessOrEqual(m.t, missed, max(3, len(all)/10), "kills that did not hit")
	require.Positive(m.t, kills)
	m.t.Logf("%d kills, %d missed, recover took %v at most, frozen for %.0f ms at most", kills, missed, m.max, m.frozen)
	for _, c := range slices.Sorted(maps.Keys(m.cells)) {
		m.t.Logf("%4d  %s", m.cells[c], c)
	}
	m.report(kills)
}

func (m *matrix) report(kills int) {
	counts := []tally.Count{{Name: "kills", Value: int64(kills)}, {Name: "calls", Value: int64(len(m.calls))}}
	for _, c := range slices.Sorted(maps.Keys(m.cells)) {
		counts = append(counts, tally.Count{Name: c, Value: int64(m.cells[c])})
	}
	_, name, ok := strings.Cut(m.t.Name(), "/")
	if !ok {
		name = m.order.Op
	}
	tally.Record(m.t, tally.Campaign{
		Name: "kvm-matrix-" + name, Counts: counts, Seed: m.seed,
		About:   "Kills of a process at calls to libvirt, on a real libvirtd and QEMU; the cells are what the journal and the world said afterwards.",
		Command: fmt.Sprintf("HOLDFAST_REQUIRE=tools,kvm HOLDFAST_LAB_KVM=%s HOLDFAST_MATRIX=all HOLDFAST_SEED=%d go test -timeout 60m -run '^%s$' ./lab/kvm/e2e", m.lab.URI, m.seed, m.t.Name()),
	})
}

// owed names the obligations that dead runs have open, and the last stage.
func (m *matrix) owed() (open []string, stage string, release bool) {
	m.t.Helper()
	entries, err := journal.List(backup.JournalDir(m.state), nil)
	require.NoError(m.t, err)
	for _, e := range entries {
		require.False(m.t, e.Alive)
		for _, o := range e.Open {
			text := string(o.Kind) + " intended"
			if o.Confirmed {
				text = string(o.Kind) + " confirmed"
			}
			open = append(open, text)
		}
		if len(e.Stages) > 0 {
			last := e.Stages[len(e.Stages)-1]
			stage = last.Name
			if last.Done {
				stage += " done"
			}
		}
	}
	slices.Sort(open)
	return open, stage, strings.HasPrefix(stage, string(backup.StageRelease))
}

// backupCell says in which cell a killed backup is.
func (m *matrix) backupCell() string {
	open, stage, _ := m.owed()
	left, err := m.lab.Leftovers(m.vms, m.scratch())
	require.NoError(m.t, err)
	seen := map[string]bool{}
	for _, l := range left {
		seen[string(l.Kind)] = true
	}
	delete(seen, string(kvmlab.LeftCheckpoint)) // there is always the baseline
	there := slices.Sorted(maps.Keys(seen))
	return fmt.Sprintf("%s; owed: %s; there: %s", stage, list(open), list(there))
}

func list(s []string) string {
	if len(s) == 0 {
		return "nothing"
	}
	return strings.Join(s, ", ")
}

// recover runs recover until nothing is owed; a guest that was just told to freeze
// may need a moment.
func (m *matrix) recover() {
	m.t.Helper()
	begin := time.Now()
	m.recovered(m.vms[0])
	m.max = max(m.max, time.Since(begin))
}

// healBackup recovers and backs up again: incremental, bit for bit, nothing left.
func (m *matrix) healBackup(truth func() map[string]string, args ...string) func() {
	vm := m.vms[0]
	known := map[string]bool{}
	for _, p := range m.points() {
		known[p] = true
	}
	return func() {
		m.t.Helper()
		before := truth()
		m.recover()
		for _, p := range m.points() {
			if !known[p] && len(before) > 0 {
				m.same(p, before) // it was committed before the kill
			}
			known[p] = true
		}
		l := m.backup(vm.Name, args...)
		for disk, mode := range l.modes() {
			require.Equal(m.t, inc, mode, "disk %s after a kill", disk)
		}
		m.frozen = max(m.frozen, l.FrozenMS)
		known[l.Point] = true
		if len(before) > 0 {
			m.same(l.Point, before)
		}
		m.nothingLeft(m.vms...)
	}
}

// TestB4KillAtEveryCall is the crash matrix of a backup: 0 leftovers, 0 frozen
// guests, no committed point that differs, and no full read afterwards. The
// complete one is nightly (HOLDFAST_MATRIX=all).
func TestB4KillAtEveryCall(t *testing.T) {
	two := []kvmlab.Disk{
		{Size: 16*mib + 512, Data: []kvmlab.Range{{Len: 8 * mib}}, Seed: 1},
		{Size: 8*mib - 512, Data: []kvmlab.Range{{Len: 4 * mib}}, Seed: 2},
	}
	t.Run("paused", func(t *testing.T) {
		t.Parallel()
		r := newRig(t)
		m := r.matrix(opBackup, r.lab.VM(t, kvmlab.Spec{Name: "b4p", Disks: two}))
		m.backups(kvmlab.Paused)
		m.run()
	})
	t.Run("off", func(t *testing.T) {
		t.Parallel()
		r := newRig(t)
		vm := r.lab.VM(t, kvmlab.Spec{Name: "b4o", Power: kvmlab.Off, Disks: two})
		m := r.matrix(opBackup, vm)
		m.backups(kvmlab.Off)
		heal := m.heal
		m.heal = func() {
			heal()
			state, err := r.lab.Virsh("domstate", vm.Name)
			require.NoError(t, err)
			require.Equal(t, "shut off", strings.TrimSpace(state), "what was off is off")
		}
		m.run()
	})
	t.Run("guest", func(t *testing.T) {
		r := newRig(t)
		vm := r.guest(kvmlab.Guest{})
		m := r.matrix(opBackup, vm)
		m.order.Quiesce = backup.QuiesceFilesystem
		freezes, thaws := 0, 0
		m.prepare = func() { freezes, thaws = hookCalls(vm, "freeze"), hookCalls(vm, "thaw") }
		m.cell = func() string {
			c := m.backupCell()
			return fmt.Sprintf("%s; freezes: %d, thaws: %d", c, hookCalls(vm, "freeze")-freezes, hookCalls(vm, "thaw")-thaws)
		}
		m.backup(vm.Name, "--consistency", "filesystem")
		m.heal = m.healBackup(func() map[string]string { return nil }, "--consistency", "filesystem")
		m.run()
		require.Less(t, m.frozen, 10_000.0, "milliseconds frozen")
		m.must("verify", "--repo", m.repo)
	})
}

// backups makes the scenario a backup of a VM whose disks only the test writes.
func (m *matrix) backups(power kvmlab.Power) {
	vm := m.vms[0]
	m.backup(vm.Name)
	m.prepare = func() { m.scribble(vm, power, "vda", "vdb") }
	m.cell = m.backupCell
	m.heal = m.healBackup(func() map[string]string { return m.truth(vm, "vda", "vdb") })
}

// TestB4KilledRestore: a restore as a new VM that is killed leaves nothing after
// recover, and the next one succeeds.
func TestB4KilledRestore(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	vm := r.lab.VM(t, kvmlab.Spec{Name: "b4r", Disks: []kvmlab.Disk{{Size: 8*mib + 512, Data: []kvmlab.Range{{Len: 4 * mib}}, Seed: 1}}})
	truth := r.truth(vm, "vda")
	m := r.matrix(opRestore, vm)
	m.order.Point = repository.PointID(m.backup(vm.Name).Point)
	m.order.Name = r.lab.Name("copy")
	exists := func() bool {
		names, err := r.lab.Domains(r.lab.Prefix())
		require.NoError(t, err)
		return slices.Contains(names, m.order.Name)
	}
	m.cell = func() string {
		open, stage, _ := m.owed()
		return fmt.Sprintf("%s; owed: %s; VM there: %t", stage, list(open), exists())
	}
	m.heal = func() {
		t.Helper()
		owed, stage, _ := m.owed()
		m.max = max(m.max, m.timed(func() { m.must("recover", "--repo", m.repo) }))
		if exists() {
			// Its mark was taken away before the kill: it is complete, and stays.
			require.True(t, len(owed) == 0 || strings.HasPrefix(stage, "finish"), "an unfinished VM is removed by recover: %s, %s", stage, owed)
			sameFile(t, truth["vda"], m.rawOf(m.order.Name, "vda"))
			_, err := r.lab.Virsh("undefine", m.order.Name, "--nvram")
			require.NoError(t, err)
			require.NoError(t, os.RemoveAll(m.order.Storage))
			require.NoError(t, os.MkdirAll(m.order.Storage, 0o755))
		}
		files, err := os.ReadDir(m.order.Storage)
		require.NoError(t, err)
		require.Empty(t, files, "nothing of the VM is left")
		open, _, _ := m.owed()
		require.Empty(t, open)
		m.nothingLeft(vm)
	}
	m.run()
}

func (m *matrix) timed(f func()) time.Duration {
	begin := time.Now()
	f()
	return time.Since(begin)
}

// TestB4KilledRecover: recover itself is killed at every call, and the next one
// closes what is left.
func TestB4KilledRecover(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	vm := r.guest(kvmlab.Guest{})
	m := r.matrix(opRecover, vm)
	m.backup(vm.Name, "--consistency", "filesystem")
	// A backup that dies when the job has begun, while the guest is frozen.
	dead := r.matrix(opBackup, vm)
	dead.order.Quiesce = backup.QuiesceFilesystem
	require.False(t, dead.child(nil))
	begin := slices.Index(dead.listed(), procedure{"backup-begin", true})
	require.GreaterOrEqual(t, begin, 0)
	m.prepare = func() {
		t.Helper()
		require.True(t, dead.child(&moment{Call: begin, After: true}))
		frozen, err := vm.TryBlocked()
		require.NoError(t, err)
		require.True(t, frozen)
	}
	m.cell = m.backupCell
	m.heal = m.healBackup(func() map[string]string { return nil }, "--consistency", "filesystem")
	m.run()
	m.must("verify", "--repo", m.repo)
}
