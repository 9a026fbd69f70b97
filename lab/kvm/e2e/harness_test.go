//go:build linux

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

// build makes the command once for all tests.
var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "holdfast-e2e")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "holdfast")
	cmd := exec.Command("go", "build", "-o", bin, "github.com/holdfast-backup/holdfast/cmd/holdfast")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return bin, nil
})

func TestMain(m *testing.M) {
	if text := os.Getenv(envOrder); text != "" {
		os.Exit(obey(text))
	}
	code := m.Run()
	if bin, err := build(); err == nil && os.Getenv(kvmlab.EnvURL) != "" {
		_ = os.RemoveAll(filepath.Dir(bin))
	}
	os.Exit(code)
}

// rig is a lab, a repository, a state directory and the command.
type rig struct {
	t     *testing.T
	lab   *kvmlab.Lab
	seed  uint64
	rnd   *rand.Rand
	bin   string
	repo  string
	state string
	env   []string
}

func newRig(t *testing.T) *rig {
	lab := kvmlab.Connect(t)
	bin, err := build()
	require.NoError(t, err)
	seed := rand.Uint64()
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		seed, err = strconv.ParseUint(v, 10, 64)
		require.NoError(t, err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("replay with HOLDFAST_SEED=%d go test ./lab/kvm/e2e -run '^%s$'", seed, t.Name())
		}
	})
	r := &rig{
		t: t, lab: lab, bin: bin, seed: seed, rnd: rand.New(rand.NewPCG(seed, 2)),
		repo: filepath.Join(lab.Dir, "repo"), state: filepath.Join(lab.Dir, "state"),
	}
	r.env = append(os.Environ(), "HOLDFAST_REPO_PASSWORD="+password, "HOLDFAST_STATE_DIR="+r.state, "HOME="+lab.Dir)
	return r
}

// outcome is what a run of the command left.
type outcome struct {
	code   int
	stdout []byte
	stderr []byte
	events []event
}

func (o *outcome) String() string {
	return fmt.Sprintf("exit %d\nstdout: %s\nstderr: %s", o.code, o.stdout, o.stderr)
}

// event is a line of --events.
type event struct {
	Event string `json:"event"`
	VM    string `json:"vm"`
	Stage string `json:"stage"`
	State string `json:"state"`
	Disk  string `json:"disk"`
	Done  int64  `json:"done"`
	Size  int64  `json:"size"`
	Text  string `json:"text"`
}

// backupLine is a line of backup --json.
type backupLine struct {
	VM          string  `json:"vm"`
	Point       string  `json:"point"`
	Status      string  `json:"status"`
	Consistency string  `json:"consistency"`
	FrozenMS    float64 `json:"frozen_ms"`
	Disks       []struct {
		ID          string `json:"id"`
		Mode        string `json:"mode"`
		Reason      string `json:"reason"`
		Size        int64  `json:"size"`
		ReadBytes   int64  `json:"read_bytes"`
		Audited     int64  `json:"audited_bytes"`
		StoredBytes int64  `json:"stored_bytes"`
	} `json:"disks"`
	Degraded []string `json:"degraded"`
	Error    *struct {
		Code, Message, Hint string
	} `json:"error"`
}

func (b *backupLine) modes() map[string]string {
	out := map[string]string{}
	for _, d := range b.Disks {
		out[d.ID] = d.Mode + " " + d.Reason
	}
	return out
}

func (b *backupLine) read() (n int64) {
	for _, d := range b.Disks {
		n += d.ReadBytes
	}
	return n
}

func (b *backupLine) audited() (n int64) {
	for _, d := range b.Disks {
		n += d.Audited
	}
	return n
}

// proc is a running command.
type proc struct {
	cmd  *exec.Cmd
	out  bytes.Buffer
	done chan struct{}
	o    outcome
}

// start runs the command; on is called with each event, in order, while the
// command goes on.
func (r *rig) start(on func(p *proc, e event), args ...string) *proc {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	p := &proc{cmd: exec.CommandContext(ctx, r.bin, args...), done: make(chan struct{})}
	p.cmd.Env, p.cmd.Stdout = r.env, &p.out
	p.cmd.WaitDelay = 10 * time.Second
	stderr, err := p.cmd.StderrPipe()
	require.NoError(r.t, err)
	require.NoError(r.t, p.cmd.Start())
	go func() {
		defer close(p.done)
		defer cancel()
		var text bytes.Buffer
		s := bufio.NewScanner(stderr)
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			var e event
			if json.Unmarshal(s.Bytes(), &e) == nil && e.Event != "" {
				p.o.events = append(p.o.events, e)
				if on != nil {
					on(p, e)
				}
				if e.Event != "error" {
					continue
				}
			}
			text.Write(s.Bytes())
			text.WriteByte('\n')
		}
		_, _ = io.Copy(io.Discard, stderr)
		err := p.cmd.Wait()
		p.o.stdout, p.o.stderr = p.out.Bytes(), text.Bytes()
		p.o.code = p.cmd.ProcessState.ExitCode()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			p.o.stderr = fmt.Appendf(p.o.stderr, "%v", err)
		}
	}()
	return p
}

// kill ends the command as a power cut would.
func (p *proc) kill() { _ = p.cmd.Process.Signal(syscall.SIGKILL) }

func (p *proc) wait() *outcome {
	<-p.done
	return &p.o
}

// run runs the command to its end.
func (r *rig) run(args ...string) *outcome {
	r.t.Helper()
	return r.start(nil, args...).wait()
}

// must runs the command and wants exit code 0.
func (r *rig) must(args ...string) *outcome {
	r.t.Helper()
	o := r.run(args...)
	require.Zero(r.t, o.code, "holdfast %s: %s", strings.Join(args, " "), o)
	return o
}

func (r *rig) backupArgs(vm string, more ...string) []string {
	return append([]string{"backup", "--from", r.lab.URI, "--repo", r.repo, "--scratch-dir", r.scratch(), "--json", "--events", vm}, more...)
}

func (r *rig) scratch() string {
	dir := filepath.Join(r.lab.Dir, "scratch")
	require.NoError(r.t, os.MkdirAll(dir, 0o700))
	return dir
}

func line(t *testing.T, o *outcome) *backupLine {
	t.Helper()
	var l backupLine
	require.NoError(t, json.Unmarshal(bytes.TrimSpace(o.stdout), &l), "%s", o)
	return &l
}

// backup runs a backup that must succeed.
func (r *rig) backup(vm string, more ...string) *backupLine {
	r.t.Helper()
	o := r.must(r.backupArgs(vm, more...)...)
	l := line(r.t, o)
	require.Equal(r.t, "success", l.Status, "%s", o)
	return l
}

// same restores a point to files and compares every disk with its truth, a raw
// file.
func (r *rig) same(point string, truth map[string]string) {
	r.t.Helper()
	dir, err := os.MkdirTemp(r.lab.Dir, "out")
	require.NoError(r.t, err)
	r.must("restore", "--repo", r.repo, "--point", point, "--to", "file:"+dir+"?format=raw")
	for disk, want := range truth {
		sameFile(r.t, want, filepath.Join(dir, disk+".raw"))
	}
	require.NoError(r.t, os.RemoveAll(dir))
}

// equal restores a point to files and says whether one disk is its truth.
func (r *rig) equal(point, disk, truth string) bool {
	r.t.Helper()
	dir, err := os.MkdirTemp(r.lab.Dir, "out")
	require.NoError(r.t, err)
	r.must("restore", "--repo", r.repo, "--point", point, "--to", "file:"+dir+"?format=raw")
	off, err := kvmlab.FirstDifference(truth, filepath.Join(dir, disk+".raw"))
	require.NoError(r.t, err)
	require.NoError(r.t, os.RemoveAll(dir))
	return off < 0
}

func sameFile(t *testing.T, want, got string) {
	t.Helper()
	off, err := kvmlab.FirstDifference(want, got)
	require.NoError(t, err)
	require.Equal(t, int64(-1), off, "%s differs from the truth %s at this byte", got, want)
}

// jsonLines decodes one object per line.
func jsonLines(t *testing.T, b []byte) (out []map[string]any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(b))
	for {
		var m map[string]any
		err := d.Decode(&m)
		if errors.Is(err, io.EOF) {
			return out
		}
		require.NoError(t, err, "%s", b)
		out = append(out, m)
	}
}

func sha256hex(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}
