package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/secret/secrettest"
)

const (
	canaryRepo  = `canary repo +/"& 31c9`
	canaryNew   = `canary new +/"& 77aa`
	canaryHyper = `canary hyper +/"& e04d`
	canaryWrong = `canary wrong +/"& 5d5d`
	canaryURL   = "canary-url-8c1f"
)

func canaries() []secrettest.Canary {
	return []secrettest.Canary{
		secrettest.New("the password of the repository", canaryRepo), secrettest.New("its new password", canaryNew),
		secrettest.New("the password of the hypervisor", canaryHyper), secrettest.New("a wrong password", canaryWrong),
		secrettest.New("a password in a URL", canaryURL),
	}
}

// canaryRig runs commands and looks at all that they write.
type canaryRig struct {
	*rig
	temp string
	runs int
}

func nightly() bool { return os.Getenv("HOLDFAST_NIGHTLY") != "" }

// runAll runs a command with plain output, with JSON and with events; by day with
// one of these, in turn.
func (c *canaryRig) runAll(code int, args ...string) {
	c.t.Helper()
	kinds := [][]string{nil, {"--json"}, {"--json", "--events"}}
	if !nightly() {
		kinds = kinds[c.runs%3:][:1] // each in its turn
	}
	for _, more := range kinds {
		o := c.run(append(args, more...)...)
		c.runs++
		if code >= 0 && (more == nil || len(kinds) == 1) {
			require.Equal(c.t, code, o.code, "%v: %s%s", args, o.stdout, o.stderr)
		}
		require.Empty(c.t, secrettest.Search(fmt.Sprintf("%v, stdout", args), []byte(o.stdout), canaries()...))
		require.Empty(c.t, secrettest.Search(fmt.Sprintf("%v, stderr", args), []byte(o.stderr), canaries()...))
	}
}

// passwordFiles writes each password to a file outside of what is searched.
func passwordFiles(t *testing.T) (repo, next, hyper, wrong string) {
	dir := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(file, []byte(text+"\n"), 0o600))
		return file
	}
	return write("repo", canaryRepo), write("new", canaryNew), write("hyper", canaryHyper), write("wrong", canaryWrong)
}

// TestCanariesThroughEveryCommand gives every command its secrets, by files and by
// variables, lets it succeed and fail, and searches all that it printed, the state
// directory with the journal, temporary files and every file of the repositories.
func TestCanariesThroughEveryCommand(t *testing.T) {
	type given struct{ repo, hyper bool } // by file; else by variable
	ways := []given{{true, false}}
	if nightly() {
		ways = []given{{true, true}, {false, false}}
	}
	for _, by := range ways {
		t.Run(fmt.Sprintf("files %v", by), func(t *testing.T) {
			temp := t.TempDir()
			t.Setenv("TMPDIR", temp)
			c := &canaryRig{rig: newRig(t, fakes.Options{}), temp: temp}
			c.real = true
			vm := c.addVM(fakes.VMConfig{Name: "web1"})
			logins, refuse := 0, false
			c.login = func(ctx context.Context, cfg connect.HypervisorConfig) error {
				pw, err := cfg.Password(ctx)
				if err != nil {
					return err
				}
				if pw.Reveal() != canaryHyper {
					return fmt.Errorf("not the canary, %d bytes", len(pw.Reveal()))
				}
				logins++
				if refuse {
					return &hypervisor.Error{Op: "Open", Err: fmt.Errorf("%w: password %v %+v %q in %+v", hypervisor.ErrAuth, pw, pw, pw, cfg)}
				}
				return nil
			}
			fRepo, fNew, fHyper, fWrong := passwordFiles(t)
			delete(c.env, "HOLDFAST_REPO_PASSWORD")
			var repo, from, change []string
			if by.repo {
				repo, change = []string{"--repo-password-file", fRepo}, []string{"--new-password-file", fNew}
			} else {
				c.env["HOLDFAST_REPO_PASSWORD"], c.env[newPasswordVariable] = canaryRepo, canaryNew
			}
			if by.hyper {
				from = []string{"--password-file", fHyper}
			} else {
				c.env["HOLDFAST_PASSWORD"] = canaryHyper
			}
			cmd := func(name string, lists ...[]string) []string {
				out := []string{name}
				for _, l := range lists {
					out = append(out, l...)
				}
				return out
			}
			store := append([]string{"--repo", c.repo()}, repo...)
			source := append([]string{"--from", testURL}, from...)

			c.runAll(exitOK, cmd("vms", source)...)
			c.runAll(exitOK, cmd("plan", source, []string{"web1"})...)
			c.runAll(exitOK, cmd("backup", source, store, []string{"web1"})...)
			c.scribble(vm, "vda", 2)
			c.runAll(exitOK, cmd("backup", source, store, []string{"web1"})...)
			c.runAll(exitOK, cmd("points", store)...)
			c.runAll(exitOK, cmd("verify", store, []string{"--level", "data"})...)
			var d backupDoc
			c.decode(c.run(cmd("backup", source, store, []string{"web1", "--json"})...), &d)
			c.runAll(-1, cmd("restore", store, []string{"--point", d.Point, "--to", "file:" + filepath.Join(c.dir, "out")})...)
			c.runAll(-1, cmd("restore", store, from, []string{"--point", d.Point, "--to", testURL, "--name", "web2"})...)
			c.runAll(exitOK, cmd("prune", store, []string{"--keep-last", "2"})...)
			c.runAll(exitOK, cmd("recover", store)...)
			c.runAll(-1, cmd("repair", store, []string{"--to", filepath.Join(c.dir, "repaired")})...)
			c.runAll(-1, cmd("release", source, []string{"web1"})...)
			c.runAll(exitOK, "version")
			if nightly() {
				c.runAll(exitOK, "demo")
			}

			refuse = true
			for _, args := range [][]string{cmd("vms", source), cmd("backup", source, store, []string{"web1"}), cmd("release", source, []string{"web1"})} {
				c.runAll(exitFailed, args...)
			}
			require.GreaterOrEqual(t, logins, 6, "the password of the hypervisor was used")
			for _, url := range []string{"vsphere://admin:" + canaryURL + "@vc", "qemu+ssh://u:" + canaryURL + "@h/system", "qemu+ssh://u:" + canaryURL + "@h:port/system"} {
				c.runAll(exitUsage, "vms", "--from", url)
				c.runAll(exitUsage, cmd("restore", store, []string{"--point", d.Point, "--to", url})...)
			}
			for _, args := range [][]string{cmd("points"), cmd("verify"), cmd("repair", []string{"--to", filepath.Join(c.dir, "never")})} {
				c.runAll(exitFailed, append(args, "--repo", c.repo(), "--repo-password-file", fWrong)...)
			}
			c.runAll(exitUsage, "points", "--repo", "sftp://u:"+canaryURL+"@host/x", "--repo-password-file", fRepo)

			c.runAll(exitOK, cmd("password", store, change)...) // the second time it is done already
			c.runAll(exitFailed, cmd("points", store)...)

			for _, dir := range []string{c.dir, temp} {
				found, err := secrettest.Tree(dir, canaries()...)
				require.NoError(t, err)
				require.Empty(t, found)
			}
			require.GreaterOrEqual(t, c.runs, 25)

			// The search bites: a journal with the password in it.
			leak := filepath.Join(c.env["HOLDFAST_STATE_DIR"], "leak")
			require.NoError(t, os.WriteFile(leak, []byte(`{"endpoint":"x://u:canary%20hyper%20+%2F%22&%20e04d@h"}`), 0o600))
			found, err := secrettest.Tree(c.dir, canaries()...)
			require.NoError(t, err)
			require.NotEmpty(t, found)
		})
	}
}

// TestCanariesInProcesses runs the command as a process, with a guard, and looks at
// the arguments of all processes and at the environments of children, again and
// again while they live. The secret is where it was given, and nowhere else.
func TestCanariesInProcesses(t *testing.T) {
	for _, byFile := range []bool{true, false} {
		t.Run(fmt.Sprintf("files %v", byFile), func(t *testing.T) {
			p := newProc(t)
			temp := t.TempDir()
			t.Setenv("TMPDIR", temp)
			args := p.backupArgs()
			fRepo, _, fHyper, _ := passwordFiles(t)
			if byFile {
				t.Setenv("HOLDFAST_REPO_PASSWORD", "")
				t.Setenv("HOLDFAST_PASSWORD", "")
				args = append(args, "--repo-password-file", fRepo, "--password-file", fHyper)
			} else {
				t.Setenv("HOLDFAST_REPO_PASSWORD", canaryRepo)
				t.Setenv("HOLDFAST_PASSWORD", canaryHyper)
			}
			t.Setenv(newPasswordVariable, canaryNew) // set for another command: no child needs it
			t.Setenv(testHang, "freeze")
			cmd := p.command(args...)
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			require.NoError(t, cmd.Start())
			var mu sync.Mutex // the condition is called from other goroutines
			var meanwhile []string
			p.soon("the guest freezes", 60*time.Second, func() bool {
				mu.Lock()
				defer mu.Unlock()
				found, _ := secrettest.Processes(cmd.Process.Pid, canaries()...)
				meanwhile = append(meanwhile, found...)
				if found, err := secrettest.Tree(temp, canaries()...); err != nil {
					meanwhile = append(meanwhile, err.Error())
				} else {
					meanwhile = append(meanwhile, found...)
				}
				return p.exists(p.frozen)
			})
			mu.Lock()
			require.Empty(t, meanwhile)
			mu.Unlock()
			found, seen := secrettest.Processes(cmd.Process.Pid, canaries()...)
			require.Empty(t, found)
			require.GreaterOrEqual(t, seen, 2, "the command and its guard")
			if byFile {
				env, err := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/environ")
				require.NoError(t, err)
				require.Empty(t, secrettest.Search("its environment", env, canaries()[0], canaries()[2]))
			}
			require.NoError(t, cmd.Process.Kill())
			require.Error(t, cmd.Wait())
			p.soon("the guard thaws", 10*time.Second, func() bool { return !p.exists(p.frozen) })
			for what, b := range map[string][]byte{"stdout": stdout.Bytes(), "stderr": stderr.Bytes()} {
				require.Empty(t, secrettest.Search(what, b, canaries()...))
			}
			for _, dir := range []string{p.dir, temp} { // the journal, a half repository, what was not cleaned away
				found, err := secrettest.Tree(dir, canaries()...)
				require.NoError(t, err)
				require.Empty(t, found)
			}
			plantInChild(t, p)
		})
	}
}

// plantInChild shows that the search finds a secret that a child inherits.
func plantInChild(t *testing.T, p *proc) {
	t.Helper()
	t.Setenv("HOLDFAST_PASSWORD", canaryHyper)
	exe, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(exe, "guard", "--from", procURL, "--vm", "vm-1", "--deadline", "1h") // with its parent's environment
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	p.soon("a child with the password in its environment is found", 10*time.Second, func() bool {
		found, _ := secrettest.Processes(os.Getpid(), canaries()...)
		return len(found) > 0
	})
	require.NoError(t, in.Close())
	_ = cmd.Wait() // it was told nothing, and says so
}
