package main

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

func TestUnknownAndAmbiguousVM(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.addVM(fakes.VMConfig{Name: "twin", UUID: "11111111-1111-4111-8111-111111111111"})
	r.addVM(fakes.VMConfig{Name: "twin", UUID: "22222222-2222-4222-8222-222222222222"})
	for _, cmd := range [][]string{{"backup", "--repo", r.repo()}, {"plan"}, {"release"}} {
		args := append(slices.Clone(cmd), "--from", testURL)
		p := r.fails(exitFailed, "not-found", append(args, "nobody")...)
		require.Contains(t, p.Message, `"nobody"`)
		require.Contains(t, p.Hint, "holdfast vms")
		p = r.fails(exitFailed, "ambiguous", append(args, "twin")...)
		require.Contains(t, p.Hint, "11111111-1111-4111-8111-111111111111 22222222-2222-4222-8222-222222222222")
	}
	require.Empty(t, r.stores, "a wrong name made a repository")
	require.Equal(t, statusSuccess, r.backup("22222222-2222-4222-8222-222222222222").Status)
}

func TestHypervisorUnreachable(t *testing.T) {
	r := newRig(t, fakes.Options{})
	url := "qemu+unix:///system?socket=" + filepath.Join(r.dir, "none")
	p := r.fails(exitFailed, "unavailable", "vms", "--from", url)
	require.Contains(t, p.Message, "none")
	require.NotEmpty(t, p.Hint)
	p = r.fails(exitFailed, "unavailable", "backup", "--from", url, "--repo", r.repo(), "web1")
	require.NotEmpty(t, p.Hint)
}

func TestRealRepositoryRefuses(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.real = true
	r.addVM(fakes.VMConfig{Name: "web1"})
	require.Equal(t, statusSuccess, r.backup("web1").Status)

	r.env["HOLDFAST_REPO_PASSWORD"] = "wrong"
	for _, cmd := range [][]string{
		{"backup", "--from", testURL, "web1"},
		{"points"},
		{"verify"},
		{"plan", "--from", testURL, "web1"},
		{"restore", "--point", "latest", "--vm", "web1", "--to", "file:" + filepath.Join(r.dir, "out")},
	} {
		p := r.fails(exitFailed, "password", append(cmd, "--repo", r.repo())...)
		require.NotContains(t, p.Message, "wrong horse")
	}
	r.env["HOLDFAST_REPO_PASSWORD"] = "correct horse"

	other := filepath.Join(r.dir, "other")
	require.NoError(t, os.MkdirAll(other, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(other, "letter.txt"), []byte("dear"), 0o600))
	for _, path := range []string{other, filepath.Join(other, "letter.txt")} {
		p := r.fails(exitFailed, "not-a-repository", "backup", "--from", testURL, "--repo", path, "web1")
		require.Contains(t, p.Message, path)
		r.fails(exitFailed, "not-a-repository", "points", "--repo", path)
	}
	r.fails(exitFailed, "not-a-repository", "points", "--repo", filepath.Join(r.dir, "missing"))
	entries, err := os.ReadDir(other)
	require.NoError(t, err)
	require.Len(t, entries, 1, "something was written into a directory that is no repository")
}

func TestPointsAndTargets(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.addVM(fakes.VMConfig{Name: "web1"})
	r.world.AddStorage("tiny", 1<<20)
	d := r.backup("web1")
	base := []string{"restore", "--repo", r.repo()}
	r.fails(exitFailed, "not-found", append(base, "--point", "20200101-000000-0123456789abcdef", "--to", testURL, "--name", "n")...)
	r.fails(exitFailed, "not-found", append(base, "--point", "latest", "--vm", "nobody", "--to", testURL, "--name", "n")...)
	r.fails(exitUsage, codeUsage, append(base, "--point", "latest", "--to", testURL)...)
	r.fails(exitFailed, "not-found", "verify", "--repo", r.repo(), "--point", "20200101-000000-0123456789abcdef")
	point := append(base, "--point", d.Point)
	p := r.fails(exitFailed, "exists", append(point, "--to", testURL)...)
	require.Contains(t, p.Message, "web1")
	r.fails(exitFailed, "exists", append(point, "--to", testURL, "--name", "n", "--identity", "keep")...)
	p = r.fails(exitFailed, "no-space", append(point, "--to", testURL, "--name", "n", "--storage", "tiny")...)
	require.Contains(t, p.Message, `"tiny"`)
	p = r.fails(exitFailed, "no-space", append(point, "--to", testURL, "--name", "n", "--map", "disk:vdb=tiny")...)
	require.Contains(t, p.Message, `"tiny"`)
	r.fails(exitFailed, "not-found", append(point, "--to", testURL, "--name", "n", "--map", "disk:vdz=tiny")...)
	r.fails(exitFailed, "not-found", append(point, "--to", testURL, "--name", "n", "--storage", "nowhere")...)

	out := filepath.Join(r.dir, "out")
	require.NoError(t, os.MkdirAll(out, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(out, "vda.raw"), nil, 0o600))
	r.fails(exitFailed, "exists", append(point, "--to", "file:"+out)...)
	require.Empty(t, r.leftovers())
	for vm, err := range r.world.Connect().VMs(context.Background(), hypervisor.Query{}) {
		require.NoError(t, err)
		require.Equal(t, "web1", vm.Name, "a restore that was refused left a machine")
	}
}

// mount mounts a small file system, or skips the test.
func mount(t *testing.T, dir, options string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(dir, 0o755))
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		skip(t, "root", "mounting a small file system needs root on Linux")
	}
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", options, "tmpfs", dir).CombinedOutput(); err != nil {
		skip(t, "root", "mount: "+string(out))
	}
	t.Cleanup(func() { require.NoError(t, exec.Command("umount", dir).Run()) })
}

// skip skips a test unless HOLDFAST_REQUIRE names the class of what is missing.
func skip(t *testing.T, class, why string) {
	t.Helper()
	if slices.Contains(strings.Split(os.Getenv("HOLDFAST_REQUIRE"), ","), class) {
		t.Fatal(why)
	}
	t.Skip(why)
}

func TestRepositoryFullAndReadOnly(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.real = true
	mount(t, r.repo(), "size=12m")
	vm := r.addVM(fakes.VMConfig{Name: "web1"})
	first := r.backup("web1")
	require.Equal(t, statusSuccess, first.Status, "%+v", first.Error)

	big, err := r.world.AddDisk(vm, fakes.DiskConfig{ID: "big", Size: 24 << 20})
	require.NoError(t, err)
	noise := make([]byte, 24<<20)
	for i := range noise {
		noise[i] = byte(r.rnd.Uint32())
	}
	require.NoError(t, r.world.GuestWrite(vm, big, 0, noise))
	p := r.fails(exitFailed, "repository-full", "backup", "--from", testURL, "--repo", r.repo(), "web1")
	require.Contains(t, p.Hint, "free space")
	require.Empty(t, r.leftovers())
	r.ok("verify", "--repo", r.repo(), "--point", first.Point)

	require.NoError(t, exec.Command("mount", "-o", "remount,ro", r.repo()).Run())
	p = r.fails(exitFailed, "repository-read-only", "backup", "--from", testURL, "--repo", r.repo(), "web1")
	require.NotEmpty(t, p.Hint)
	require.Empty(t, r.leftovers())
	dir := filepath.Join(r.dir, "out")
	r.ok("restore", "--repo", r.repo(), "--point", first.Point, "--to", "file:"+dir)
	require.NoError(t, exec.Command("mount", "-o", "remount,rw", r.repo()).Run())
}

// Ctrl-C in the transfer: what was begun is undone, the exit code says so, and
// machines that were not reached have a line too.
func TestInterrupt(t *testing.T) {
	r := newRig(t, fakes.Options{})
	r.addVM(fakes.VMConfig{Name: "web1", Guest: fakes.Guest{Agent: true}})
	r.addVM(fakes.VMConfig{Name: "web2"})
	r.onErr = func(line string) {
		var e event
		if json.Unmarshal([]byte(line), &e) == nil && e.Stage == "snapshot" && e.State == stateExit {
			r.signals <- os.Interrupt
			for len(r.signals) > 0 {
				runtime.Gosched()
			}
		}
	}
	// Reading waits until the signal has arrived.
	r.wrap = func(h hypervisor.Hypervisor) hypervisor.Hypervisor { return slowReads{h} }
	o := r.run("backup", "--json", "--events", "--from", testURL, "--repo", r.repo(), "web1", "web2")
	require.Equal(t, exitInterrupted, o.code, "%s%s", o.stdout, o.stderr)
	require.Len(t, lines(o.stdout), 2)
	for _, l := range lines(o.stdout) {
		require.Contains(t, l, `"status":"failed"`)
		require.Contains(t, l, `"code":"interrupted"`)
	}
	require.Empty(t, r.leftovers())
	r.onErr, r.wrap = nil, nil
	require.Contains(t, r.ok("recover").stdout, "nothing was left behind")
	require.Equal(t, statusSuccess, r.backup("web1").Status)
}

// slowReads makes disks open only when the context has ended.
type slowReads struct{ hypervisor.Hypervisor }

func (s slowReads) CreateSnapshot(ctx context.Context, id hypervisor.VMID, o *hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
	snap, err := s.Hypervisor.CreateSnapshot(ctx, id, o)
	if err != nil {
		return nil, err
	}
	return slowSnapshot{snap}, nil
}

type slowSnapshot struct{ hypervisor.Snapshot }

func (s slowSnapshot) OpenDisk(ctx context.Context, _ hypervisor.DiskID) (hypervisor.DiskReader, error) {
	<-ctx.Done()
	return nil, context.Cause(ctx)
}
