package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

func TestCycle(t *testing.T) {
	r := newRig(t, fakes.Options{})
	vm := r.addVM(fakes.VMConfig{Name: "web1", Guest: fakes.Guest{Agent: true}, NVRAM: []byte("variables")})

	o := r.ok("vms", "--from", testURL, "--json")
	var v vmDoc
	r.decode(o, &v)
	require.Equal(t, "web1", v.VM)
	require.Len(t, v.Disks, 2)

	var plan planDoc
	r.decode(r.ok("plan", "--from", testURL, "--repo", r.repo(), "web1", "--json"), &plan)
	require.Empty(t, plan.Parent)
	require.Equal(t, planDisk{ID: "vda", Mode: "full", Reason: "first", Size: 5<<20 + 3*512, Backing: "file"}, plan.Disks[0])

	truth1 := r.truth(vm, "vda")
	first := r.backup("web1")
	require.Equal(t, statusSuccess, first.Status)
	require.Equal(t, "filesystem", first.Consistency)
	require.NotEmpty(t, first.Point)

	r.scribble(vm, "vda", 1) // the last sector alone
	truth2 := r.truth(vm, "vda")
	second := r.backup("web1")
	require.Equal(t, first.Point, second.Parent)
	require.Equal(t, "incremental", second.Disks[0].Mode)
	require.Equal(t, "changed-blocks", second.Disks[0].Reason)
	require.Equal(t, int64(3*512), second.Disks[0].ReadBytes, "the short last block alone")
	require.Zero(t, second.Disks[1].ReadBytes)

	o = r.ok("points", "--repo", r.repo(), "--json", "--vm", "web1")
	require.Len(t, lines(o.stdout), 2)
	require.Contains(t, lines(o.stdout)[1], second.Point)
	require.Contains(t, r.ok("points", "--repo", r.repo()).stdout, second.Point)

	dir := filepath.Join(r.dir, "out")
	var res restoreDoc
	r.decode(r.ok("restore", "--json", "--repo", r.repo(), "--point", first.Point, "--to", "file:"+dir+"?format=raw"), &res)
	require.Equal(t, statusSuccess, res.Status)
	require.Equal(t, filepath.Join(dir, "vda.raw"), res.Disks[0].Path)
	require.True(t, res.Disks[0].Verified)
	r.sameAsFile(filepath.Join(dir, "vda.raw"), truth1)
	r.sameAsFile(filepath.Join(dir, "vdb.raw"), r.truth(vm, "vdb"))

	r.decode(r.ok("restore", "--json", "--repo", r.repo(), "--point", "latest", "--vm", "web1", "--to", testURL, "--name", "web2", "--map", "net:default=default", "--power-on"), &res)
	require.Equal(t, "web2", res.NewVM.VM)
	got := r.truth(hypervisor.VMID(res.NewVM.ID), "vda")
	_, err := compare(got, got.Size(), truth2)
	require.NoError(t, err)

	for _, level := range []string{"records", "blobs", "data"} {
		var ver verifyDoc
		r.decode(r.ok("verify", "--json", "--repo", r.repo(), "--level", level), &ver)
		require.Equal(t, statusSound, ver.Status)
		require.Equal(t, level, ver.Level)
		require.Len(t, ver.Points, 2)
	}
	require.Contains(t, r.ok("verify", "--repo", r.repo(), "--point", first.Point).stdout, "sound: 1 restore point")

	var rel releaseDoc
	r.decode(r.ok("release", "--json", "--from", testURL, "web1"), &rel)
	require.Equal(t, 2, rel.Baselines)
	require.Contains(t, r.ok("release", "--from", testURL, "--repo", r.repo(), "web1").stdout, "nothing to drop")
	third := r.backup("web1")
	require.Equal(t, statusSuccess, third.Status)
	require.Equal(t, "full", third.Disks[0].Mode)
	require.Equal(t, "baseline-missing", third.Disks[0].Reason)
	require.Contains(t, r.ok("recover").stdout, "nothing was left behind")
	require.Empty(t, r.leftovers())
}

// The human output of a backup names what happened, and shows no control
// characters that a name smuggled in.
func TestBackupForAPerson(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.addVM(fakes.VMConfig{Name: "w\x1b[31meb"})
	o := r.ok("backup", "--from", testURL, "--repo", r.repo(), "w\x1b[31meb")
	require.Contains(t, o.stdout, "w?[31meb: success, restore point ")
	require.Contains(t, o.stdout, "crash-consistent")
	require.Contains(t, o.stdout, "no guest agent answers")
	require.Contains(t, o.stderr, "vda: full (first), 5.0 MiB")
	require.NotContains(t, o.stdout+o.stderr, "\x1b")
}

// Programs start writers at the exit event of the snapshot stage: it must be out
// before the transfer begins, and what is written then is not in the point.
func TestSnapshotEventComesAtOnce(t *testing.T) {
	r := newRig(t, fakes.Options{})
	vm := r.addVM(fakes.VMConfig{Name: "web1"})
	truth := r.truth(vm, "vda")
	var order []string
	r.onErr = func(line string) {
		var e event
		if json.Unmarshal([]byte(line), &e) != nil || e.Event != eventStage {
			return
		}
		order = append(order, e.Stage+" "+e.State)
		if e.Stage == "snapshot" && e.State == stateExit {
			for off := int64(0); off < 5<<20; off += 4096 {
				if err := r.world.GuestWrite(vm, "vda", off, []byte(strings.Repeat("new!", 1024))); err != nil {
					panic(err)
				}
			}
		}
	}
	o := r.ok("backup", "--events", "--json", "--from", testURL, "--repo", r.repo(), "web1")
	require.Equal(t, strings.Split("plan enter,plan exit,preflight enter,preflight exit,snapshot enter,snapshot exit,transfer enter,transfer exit,commit enter,commit exit,release enter,release exit", ","), order)
	require.Contains(t, o.stderr, `"event":"disk"`)
	require.Contains(t, o.stderr, `"event":"progress"`)
	r.onErr = nil
	dir := filepath.Join(r.dir, "out")
	r.ok("restore", "--repo", r.repo(), "--vm", "web1", "--point", "latest", "--to", "file:"+dir)
	r.sameAsFile(filepath.Join(dir, "vda.raw"), truth)
	_, err := os.Stat(filepath.Join(dir, "vm.json"))
	require.NoError(t, err)
}

func TestDemo(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.real = true
	var d demoDoc
	o := r.run("demo", "--json")
	require.Equal(t, exitOK, o.code, o.stderr)
	r.decode(o, &d)
	require.Equal(t, statusSuccess, d.Status)
	require.Len(t, d.Proven, 5)
	require.Empty(t, d.Dir)
}
