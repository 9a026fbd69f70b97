package main

import (
	"os"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
)

// TestLyingTracker: a lie costs exit code 3, is told with what repeats the audit,
// makes the next backup a full, and is named by points and verify, whether the
// point knew of it or not.
func TestLyingTracker(t *testing.T) {
	r := newRig(t, fakes.Options{})
	vm := r.addVM(fakes.VMConfig{Name: "web1"})
	first := r.backup("web1")
	require.Equal(t, statusSuccess, first.Status)
	require.Zero(t, first.AuditedBytes)
	require.NoError(t, r.world.SetLying(vm, "vda", 1))
	r.scribble(vm, "vda", 1)
	trusting := r.backup("web1", "--audit", "off")
	require.Equal(t, statusSuccess, trusting.Status)
	require.Zero(t, trusting.AuditedBytes)
	require.Zero(t, trusting.AuditSeed)

	o := r.run("backup", "--json", "--events", "--from", testURL, "--repo", r.repo(), "--audit", "all", "--audit-seed", "77", "web1")
	require.Equal(t, exitDegraded, o.code, o.stderr)
	require.Contains(t, o.stderr, `"event":"audit"`)
	var caught backupDoc
	r.decode(o, &caught)
	require.Equal(t, "degraded", caught.Status)
	require.NotEmpty(t, caught.Degraded)
	require.Equal(t, uint64(77), caught.AuditSeed)
	d := caught.Disks[0]
	require.Equal(t, "full", d.Mode)
	require.Equal(t, "audit-mismatch", d.Reason)
	require.Equal(t, d.Size, d.AuditedBytes)
	require.Positive(t, d.ReadBytes)
	require.Equal(t, int64(1), d.Audit.Wrong)
	require.Equal(t, []string{trusting.Point}, d.Audit.Suspects)
	require.Equal(t, d.AuditedBytes+caught.Disks[1].AuditedBytes, caught.AuditedBytes)
	require.Zero(t, caught.Disks[1].ReadBytes)

	require.NoError(t, r.world.SetLying(vm, "vda", 0))
	next := r.backup("web1")
	require.Equal(t, statusSuccess, next.Status)
	require.Equal(t, "audit-mismatch", next.Disks[0].Reason)
	require.Equal(t, "incremental", next.Disks[1].Mode)

	text := r.ok("points", "--repo", r.repo()).stdout
	require.Contains(t, text, "SUSPECT: vda")
	named := map[string][]suspicionDoc{}
	for _, line := range lines(r.ok("points", "--json", "--repo", r.repo()).stdout) {
		var pt pointDoc
		r.decode(outcome{stdout: line}, &pt)
		named[pt.Point] = pt.LyingTracker
	}
	want := map[string][]suspicionDoc{
		first.Point: nil, next.Point: nil,
		trusting.Point: {{Point: trusting.Point, Disk: "vda", Run: caught.Run, Leaves: d.Audit.Leaves, Wrong: 1}},
		caught.Point:   {{Point: caught.Point, Disk: "vda", Exact: true, Run: caught.Run, Leaves: d.Audit.Leaves, Wrong: 1}},
	}
	require.Equal(t, want, named)

	for point, code := range map[string]int{"": exitDegraded, trusting.Point: exitDegraded, caught.Point: exitOK, first.Point: exitOK} {
		args := []string{"verify", "--repo", r.repo(), "--level", "records"}
		if point != "" {
			args = append(args, "--point", point)
		}
		require.Equal(t, code, r.run(args...).code, "point %q", point)
		o := r.run(append(args, "--json")...)
		require.Equal(t, code, o.code, "point %q", point)
		var v verifyDoc
		r.decode(o, &v)
		require.Equal(t, map[int]string{exitOK: statusSound, exitDegraded: statusSuspect}[code], v.Status)
		if point != "" {
			require.Equal(t, want[point], v.LyingTracker)
		} else {
			require.Len(t, v.LyingTracker, 2)
		}
	}
	require.Contains(t, r.run("verify", "--repo", r.repo(), "--level", "records").stdout, "SUSPECT")
}

// TestTheSeedOfAnAuditIsSaid: a person who sees a lie sees what repeats the audit.
func TestTheSeedOfAnAuditIsSaid(t *testing.T) {
	r := newRig(t, fakes.Options{})
	vm := r.addVM(fakes.VMConfig{Name: "web1"})
	r.backup("web1")
	require.NoError(t, r.world.SetLying(vm, "vda", 1))
	r.scribble(vm, "vda", 1)
	seed := r.rnd.Uint64() | 1
	o := r.run("backup", "--from", testURL, "--repo", r.repo(), "--audit", "100%", "--audit-seed", strconv.FormatUint(seed, 10), "web1")
	require.Equal(t, exitDegraded, o.code, o.stderr)
	require.Contains(t, o.stdout, "--audit-seed "+strconv.FormatUint(seed, 10))
	require.Contains(t, o.stdout, "audited")
}

func TestAuditFlagIsChecked(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.addVM(fakes.VMConfig{Name: "web1"})
	for _, bad := range []string{"5", "-1%", "101%", "a lot", "5 apples"} {
		o := r.run("backup", "--from", testURL, "--repo", r.repo(), "--audit="+bad, "web1")
		require.Equal(t, exitUsage, o.code, "%s: %s", bad, o.stderr)
		require.Contains(t, o.stderr, "--audit", bad)
	}
}

func TestDemoLyingTracker(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.real = os.Getenv("HOLDFAST_NIGHTLY") != "" // TestDemo has a real repository by day
	r.dirs = true
	var d demoDoc
	o := r.run("demo", "--json", "--lying-tracker")
	require.Equal(t, exitOK, o.code, o.stderr)
	r.decode(o, &d)
	require.Equal(t, statusSuccess, d.Status)
	require.Len(t, d.Proven, 7)
	named := 0
	for _, s := range d.Steps {
		if s.Step == "named" {
			named++
		}
	}
	require.GreaterOrEqual(t, named, 2)
}
