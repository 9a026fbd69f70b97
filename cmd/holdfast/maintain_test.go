package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
)

func TestPrune(t *testing.T) {
	r := newRig(t, fakes.Options{})
	vm := r.addVM(fakes.VMConfig{Name: "web1"})
	r.addVM(fakes.VMConfig{Name: "web2"})
	var points []string
	for range 4 {
		r.scribble(vm, "vda", 2)
		points = append(points, r.backup("web1").Point)
	}
	other := r.backup("web2").Point
	require.Equal(t, exitUsage, r.run("prune", "--repo", r.repo()).code)
	require.Equal(t, exitUsage, r.run("prune", "--repo", r.repo(), "--keep-last", "-1").code)

	var d pruneDoc
	r.decode(r.ok("prune", "--json", "--repo", r.repo(), "--keep-last", "2", "--dry-run"), &d)
	require.True(t, d.DryRun)
	require.Equal(t, []string{points[0], points[1]}, []string{d.Removed[0].Point, d.Removed[1].Point})
	require.Len(t, lines(r.ok("points", "--repo", r.repo(), "--json").stdout), 5, "a dry run removed something")

	r.decode(r.ok("prune", "--json", "--repo", r.repo(), "--keep-last", "1", "--vm", "web1"), &d)
	require.Len(t, d.Removed, 3)
	require.Len(t, d.Kept, 1)
	require.NotNil(t, d.Maintenance)
	o := r.ok("points", "--repo", r.repo(), "--json")
	require.Len(t, lines(o.stdout), 2)
	require.Contains(t, o.stdout, points[3])
	require.Contains(t, o.stdout, other)
	r.ok("verify", "--repo", r.repo(), "--level", "data")
	require.Contains(t, r.ok("prune", "--repo", r.repo(), "--keep-daily", "7").stdout, "2 restore points kept, removed 0 restore points")
	r.fails(exitFailed, "not-found", "prune", "--repo", r.repo(), "--keep-daily", "7", "--vm", "nobody")
	// The next backup stands on what was kept.
	require.Equal(t, points[3], r.backup("web1").Parent)
}

// A real repository that lost what it has copies of verifies with a hint at
// repair, and repair brings it back.
func TestRepair(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.real = true
	vm := r.addVM(fakes.VMConfig{Name: "web1"})
	truth := r.truth(vm, "vda")
	d := r.backup("web1")
	require.Equal(t, statusSuccess, d.Status)
	require.NoError(t, os.Remove(filepath.Join(r.repo(), "kopia.repository.f")))

	o := r.run("verify", "--repo", r.repo())
	require.Equal(t, exitFailed, o.code, o.stdout+o.stderr)
	require.Contains(t, o.stdout, "a copy exists: holdfast repair")
	to := filepath.Join(r.dir, "repaired")
	var rep repairDoc
	r.decode(r.ok("repair", "--json", "--repo", r.repo(), "--to", to), &rep)
	require.Equal(t, statusSound, rep.Status)
	require.NotEmpty(t, rep.Restored)
	require.Equal(t, []string{d.Point}, rep.Verify.Points)
	r.fails(exitFailed, "exists", "repair", "--repo", r.repo(), "--to", to)

	out := filepath.Join(r.dir, "out")
	r.ok("restore", "--repo", to, "--point", d.Point, "--to", "file:"+out)
	r.sameAsFile(filepath.Join(out, "vda.raw"), truth)
}
