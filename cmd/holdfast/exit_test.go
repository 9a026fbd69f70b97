package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

func TestUsage(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.addVM(fakes.VMConfig{Name: "web1"})
	for _, args := range [][]string{
		{"backupp"},
		{"backup"},
		{"backup", "web1"},
		{"backup", "--from", testURL, "web1"},
		{"backup", "--from", testURL, "--repo", r.repo()},
		{"backup", "--nonsense"},
		{"backup", "--from", testURL, "--repo", r.repo(), "--consistency", "total", "web1"},
		{"backup", "--from", testURL, "--repo", r.repo(), "--consistency", "crash", "--min-consistency", "filesystem", "web1"},
		{"backup", "--from", testURL, "--repo", r.repo(), "--quiesce-timeout", "-1s", "web1"},
		{"backup", "--from", testURL, "--repo", r.repo(), "--block-size", "3M", "web1"},
		{"backup", "--from", "vsphere://host", "--repo", r.repo(), "web1"},
		{"backup", "--from", "qemu+tls://user:secret@host/system", "--repo", r.repo(), "web1"},
		{"backup", "--from", testURL, "--repo", "s3://bucket/prefix", "web1"},
		{"vms"},
		{"vms", "--from", "xen://root@host"},
		{"vms", "--from", "hyperv:"},
		{"vms", "--from", "/not/a/url"},
		{"vms", "--from", testURL, "web1"},
		{"plan", "--from", testURL},
		{"points"},
		{"restore", "--repo", r.repo()},
		{"restore", "--repo", r.repo(), "--point", "x", "--to", "file:"},
		{"restore", "--repo", r.repo(), "--point", "x", "--to", "file:out?format=vmdk"},
		{"restore", "--repo", r.repo(), "--point", "x", "--to", "file:out", "--name", "n"},
		{"restore", "--repo", r.repo(), "--point", "x", "--to", testURL, "--map", "disk:a"},
		{"restore", "--repo", r.repo(), "--point", "x", "--to", testURL, "--identity", "other"},
		{"verify", "--repo", r.repo(), "--level", "deep"},
		{"release", "--from", testURL},
		{"guard"},
	} {
		o := r.run(args...)
		require.Equal(t, exitUsage, o.code, "%v\n%s%s", args, o.stdout, o.stderr)
		require.True(t, strings.HasPrefix(o.stderr, "error: "), o.stderr)
		require.Empty(t, o.stdout)
		require.NotContains(t, o.stderr, "secret")
	}
	require.Empty(t, r.stores, "wrong usage made a repository")
	o := r.run("vms", "--from", "vsphere://host")
	require.Contains(t, o.stderr, "VMware vSphere is not supported yet")
	require.Contains(t, o.stderr, "hint: qemu:///system")
	require.Contains(t, r.run("bakcup").stderr, "hint: did you mean: holdfast backup")
}

func TestSecrets(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.addVM(fakes.VMConfig{Name: "web1"})
	delete(r.env, "HOLDFAST_REPO_PASSWORD")
	args := []string{"backup", "--from", testURL, "--repo", r.repo(), "web1"}
	o := r.run(args...)
	require.Equal(t, exitUsage, o.code)
	require.Contains(t, o.stderr, "--repo-password-file")
	r.prompts = []string{"one", "two"}
	require.Contains(t, r.run(args...).stderr, "not the same")
	r.prompts = []string{"one", "one"}
	r.ok(args...)
	r.prompts = []string{"one"}
	r.ok("points", "--repo", r.repo())
}

func TestDegraded(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.addVM(fakes.VMConfig{Name: "quiet"})
	r.addVM(fakes.VMConfig{Name: "odd", Disks: []fakes.DiskConfig{{ID: "vda", Size: 1 << 20}, {ID: "lun", Size: 1 << 20, Backing: hypervisor.Passthrough}}})
	base := []string{"backup", "--json", "--from", testURL, "--repo", r.repo()}

	o := r.run(append(base, "--consistency", "filesystem", "quiet")...)
	require.Equal(t, exitDegraded, o.code, o.stderr)
	require.Contains(t, o.stdout, `"status":"degraded"`)

	p := r.fails(exitFailed, "quiesce", "backup", "--from", testURL, "--repo", r.repo(), "--min-consistency", "filesystem", "quiet")
	require.NotEmpty(t, p.Hint)

	o = r.run(append(base, "odd")...)
	require.Equal(t, exitDegraded, o.code)
	require.Contains(t, o.stdout, `"id":"lun","mode":"unprotected","reason":"passthrough"`)
	o = r.run(append(base, "--exclude", "lun", "odd")...)
	require.Equal(t, exitOK, o.code)
	require.Contains(t, o.stdout, `"id":"lun","mode":"excluded","reason":"rule-user"`)
	r.fails(exitFailed, "failed", "backup", "--from", testURL, "--repo", r.repo(), "--fail-unprotected", "odd")
	r.fails(exitFailed, "not-found", "backup", "--from", testURL, "--repo", r.repo(), "--exclude", "vdz", "quiet")

	// Of several the worst counts, and each has its line.
	o = r.run(append(base, "odd", "nobody", "quiet")...)
	require.Equal(t, exitFailed, o.code)
	require.Len(t, lines(o.stdout), 3)
	require.Empty(t, r.leftovers())
}

func TestDamageIsFound(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.addVM(fakes.VMConfig{Name: "web1"})
	d := r.backup("web1")
	name := r.store().Names("blocks/")[0]
	_, err := r.store().Damage(name, fakes.BlobFlip)
	require.NoError(t, err)
	o := r.run("verify", "--json", "--repo", r.repo())
	require.Equal(t, exitFailed, o.code)
	require.Contains(t, o.stdout, `"status":"damaged"`)
	require.Contains(t, o.stdout, `"damaged_points":["`+d.Point+`"]`)
	require.Contains(t, r.run("verify", "--repo", r.repo()).stdout, "restore point "+d.Point+" cannot be restored in full")
}

func TestExplain(t *testing.T) {
	ctx := context.Background()
	inner := &hypervisor.Error{Op: "CreateVM", Hint: "choose another name", Err: hypervisor.ErrExists}
	p := explain(ctx, errors.Join(fmt.Errorf("restore: %w", inner), errors.New("second")))
	require.Equal(t, &problem{Code: "exists", Message: "restore: CreateVM: already exists; second", Hint: "choose another name"}, p)
	p = explain(ctx, fmt.Errorf("x: %w", repository.ErrPassword))
	require.Equal(t, "password", p.Code)
	require.NotEmpty(t, p.Hint)
	require.Equal(t, exitUsage, explain(ctx, usage("h", errTest)).exit())
	stopped, cancel := context.WithCancelCause(ctx)
	cancel(errInterrupted)
	require.Equal(t, exitInterrupted, explain(stopped, fmt.Errorf("read: %w", context.Canceled)).exit())
}

// Every code that the command can give is in the schemas.
func TestCodesArePublished(t *testing.T) {
	codes := []string{codeUsage, codeInterrupted, codeFailed}
	for _, k := range kinds {
		codes = append(codes, k.code)
	}
	for _, c := range codes {
		require.NoError(t, validate("error", `{"status":"failed","error":{"code":"`+c+`","message":"m"}}`), c)
	}
	require.Error(t, validate("error", `{"status":"failed","error":{"code":"other","message":"m"}}`))
}
