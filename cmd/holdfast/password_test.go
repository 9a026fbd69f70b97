package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
)

func TestPassword(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.real = true
	vm := r.addVM(fakes.VMConfig{Name: "web1"})
	point := r.backup("web1").Point
	file := func(text string) string {
		name := filepath.Join(t.TempDir(), "password")
		require.NoError(t, os.WriteFile(name, []byte(text+"\n"), 0o600))
		return name
	}
	next := file("new horse")

	require.Equal(t, exitUsage, r.run("password").code)
	require.Equal(t, exitUsage, r.run("password", "--repo", r.repo()).code, "no terminal to ask on")
	require.Equal(t, exitUsage, r.run("password", "--repo", r.repo(), "--new-password-file", file("")).code)
	r.prompts = []string{"one", "two"}
	require.Equal(t, exitUsage, r.run("password", "--repo", r.repo()).code, "two that differ")
	r.fails(exitFailed, "not-found", "password", "--repo", r.repo(), "--new-password-file", filepath.Join(r.dir, "no"))
	pr := r.fails(exitFailed, "password", "password", "--repo", r.repo(), "--repo-password-file", file("wrong"), "--new-password-file", next)
	require.NotContains(t, pr.Message, "wrong\n")
	r.ok("points", "--repo", r.repo())

	var d passwordDoc
	r.decode(r.ok("password", "--json", "--repo", r.repo(), "--new-password-file", next), &d)
	require.True(t, d.Changed)
	require.Empty(t, d.Mended)
	r.fails(exitFailed, "password", "points", "--repo", r.repo())
	// Once more, as after an interruption whose end nobody saw.
	r.decode(r.ok("password", "--json", "--repo", r.repo(), "--new-password-file", next), &d)
	require.False(t, d.Changed)

	r.env["HOLDFAST_REPO_PASSWORD"] = "new horse"
	require.Equal(t, point, r.backup("web1").Parent)
	if !nightly() {
		return
	}
	out := filepath.Join(r.dir, "out")
	r.ok("restore", "--repo", r.repo(), "--point", point, "--to", "file:"+out)
	r.sameAsFile(filepath.Join(out, "vda.raw"), r.truth(vm, "vda"))
	r.ok("verify", "--repo", r.repo(), "--level", "data")
	r.prompts = []string{"typed", "typed"}
	require.Contains(t, r.ok("password", "--repo", r.repo()).stdout, "the password is changed")
	r.env["HOLDFAST_REPO_PASSWORD"] = "typed"
	r.ok("points", "--repo", r.repo())
}

// A repository that cannot change its password says so.
func TestPasswordUnsupported(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.addVM(fakes.VMConfig{Name: "web1"})
	r.backup("web1")
	r.env[newPasswordVariable] = "new"
	r.fails(exitFailed, "unsupported", "password", "--repo", r.repo())
}
