package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/cmd/holdfast/internal/connect"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/repository"
)

// rig is a place to run the command in: a simulated hypervisor at fake:test, and
// repositories in memory at any directory, unless real is set.
type rig struct {
	t       *testing.T
	rnd     *rand.Rand
	world   *fakes.World
	wrap    func(hypervisor.Hypervisor) hypervisor.Hypervisor
	login   func(ctx context.Context, cfg connect.HypervisorConfig) error
	real    bool // repositories are real ones
	dirs    bool // the directories of repositories in memory exist
	dir     string
	env     map[string]string
	signals chan os.Signal
	prompts []string // answers
	guard   func(*program, guardConfig) backup.Guard
	onErr   func(line string) // called for each line on stderr, as it is written

	mu     sync.Mutex
	stores map[string]*fakes.Store
}

const testURL = "fake:test"

func newRig(t *testing.T, o fakes.Options) *rig {
	seed := rand.Uint64()
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		var err error
		seed, err = strconv.ParseUint(v, 10, 64)
		require.NoError(t, err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("replay with HOLDFAST_SEED=%d go test ./cmd/holdfast -run '^%s$'", seed, t.Name())
		}
	})
	o.Seed = seed
	dir := t.TempDir()
	return &rig{
		t: t, rnd: rand.New(rand.NewPCG(seed, 1)), world: fakes.NewWorld(o), dir: dir,
		env:     map[string]string{"HOLDFAST_STATE_DIR": filepath.Join(dir, "state"), "HOLDFAST_REPO_PASSWORD": "correct horse"},
		signals: make(chan os.Signal, 2), stores: map[string]*fakes.Store{},
	}
}

// addVM makes a VM with two small disks that hold something.
func (r *rig) addVM(cfg fakes.VMConfig) hypervisor.VMID {
	if cfg.Disks == nil {
		cfg.Disks = []fakes.DiskConfig{{ID: "vda", Size: 5<<20 + 3*512}, {ID: "vdb", Size: 3<<20 - 512}}
	}
	id := r.world.AddVM(cfg)
	for _, d := range cfg.Disks {
		if d.Backing == "" && d.Refuse == "" && !d.Attrs.ReadOnly {
			r.scribble(id, d.ID, 8)
		}
	}
	return id
}

// scribble writes at n random places of a disk, and into its last sector.
func (r *rig) scribble(vm hypervisor.VMID, disk hypervisor.DiskID, n int) {
	size := r.truth(vm, disk).Size()
	for i := range n {
		off := r.rnd.Int64N(size/512) * 512
		if i == 0 {
			off = size - 512
		}
		p := make([]byte, min(4096, size-off))
		for i := range p {
			p[i] = byte(r.rnd.Uint32())
		}
		require.NoError(r.t, r.world.GuestWrite(vm, disk, off, p))
	}
}

func (r *rig) truth(vm hypervisor.VMID, disk hypervisor.DiskID) *fakes.DiskBytes {
	b, err := r.world.Bytes(vm, disk)
	require.NoError(r.t, err)
	return b
}

func (r *rig) repo() string { return filepath.Join(r.dir, "store") }

// Hypervisor implements connector.
func (r *rig) Hypervisor(ctx context.Context, cfg connect.HypervisorConfig) (hypervisor.Hypervisor, error) {
	if cfg.URL != testURL {
		return connect.Hypervisor(ctx, cfg)
	}
	if r.login != nil {
		if err := r.login(ctx, cfg); err != nil {
			return nil, err
		}
	}
	var hv hypervisor.Hypervisor = r.world.Connect()
	if r.wrap != nil {
		hv = r.wrap(hv)
	}
	return hv, nil
}

// Repository implements connector.
func (r *rig) Repository(ctx context.Context, cfg connect.RepositoryConfig) (repository.Repository, error) {
	if r.real {
		return connect.Repository(ctx, cfg)
	}
	if r.dirs {
		if err := os.MkdirAll(cfg.Location, 0o700); err != nil {
			return nil, err
		}
	}
	r.mu.Lock()
	s := r.stores[cfg.Location]
	if s == nil && cfg.Create {
		s = fakes.NewStore()
		r.stores[cfg.Location] = s
	}
	r.mu.Unlock()
	if s == nil {
		return nil, fmt.Errorf("%s: %w", cfg.Location, repository.ErrNotRepository)
	}
	return s.Open(ctx, fakes.RepositoryOptions{})
}

// Repair implements connector.
func (r *rig) Repair(ctx context.Context, cfg connect.RepositoryConfig, to string) (*connect.RepairReport, error) {
	return connect.Repair(ctx, cfg, to)
}

// store is the memory repository of r.repo().
func (r *rig) store() *fakes.Store {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.stores[r.repo()]
	require.NotNil(r.t, s)
	return s
}

// outcome is what an invocation left.
type outcome struct {
	code           int
	stdout, stderr string
}

// run runs the command as a shell would.
func (r *rig) run(args ...string) outcome {
	r.t.Helper()
	var out bytes.Buffer
	errs := &lineWriter{each: r.onErr}
	p := &program{
		stdin: strings.NewReader(""), stdout: &out, stderr: errs,
		env: func(k string) string { return r.env[k] }, terminal: func(any) bool { return false },
		prompt: func(string) (string, error) {
			if len(r.prompts) == 0 {
				return "", errNoTerminal
			}
			s := r.prompts[0]
			r.prompts = r.prompts[1:]
			return s, nil
		},
		signals: r.signals, ignoreSignals: func() {}, exit: func(int) {}, executable: os.Executable,
		connect: r, clock: clock.Real(), newGuard: r.guard,
	}
	code := p.run(context.Background(), args)
	o := outcome{code: code, stdout: out.String(), stderr: errs.buf.String()}
	r.checkOutput(args, o)
	return o
}

// ok runs the command and wants success.
func (r *rig) ok(args ...string) outcome {
	r.t.Helper()
	o := r.run(args...)
	require.Equal(r.t, exitOK, o.code, "%v\n%s%s", args, o.stdout, o.stderr)
	return o
}

// fails runs the command with --json and wants a code on exit and in the document.
func (r *rig) fails(exit int, code string, args ...string) *problem {
	r.t.Helper()
	o := r.run(append(args, "--json")...)
	require.Equal(r.t, exit, o.code, "%v\n%s%s", args, o.stdout, o.stderr)
	require.Contains(r.t, o.stderr, "error: ")
	var d struct {
		Status string   `json:"status"`
		Error  *problem `json:"error"`
	}
	r.decode(o, &d)
	require.Equal(r.t, statusFailed, d.Status)
	require.NotNil(r.t, d.Error)
	require.Equal(r.t, code, d.Error.Code, d.Error.Message)
	require.NotContains(r.t, d.Error.Message, "\n")
	require.NotContains(r.t, d.Error.Message, "0x", "the inside of a value")
	require.NotContains(r.t, d.Error.Message, "goroutine")
	return d.Error
}

// decode reads the only line of stdout.
func (r *rig) decode(o outcome, into any) {
	r.t.Helper()
	list := lines(o.stdout)
	require.Len(r.t, list, 1, "%s%s", o.stdout, o.stderr)
	require.NoError(r.t, json.Unmarshal([]byte(list[0]), into))
}

func (r *rig) backup(args ...string) backupDoc {
	r.t.Helper()
	var d backupDoc
	r.decode(r.run(append([]string{"backup", "--json", "--from", testURL, "--repo", r.repo()}, args...)...), &d)
	return d
}

// checkOutput holds what was printed against the published schemas.
func (r *rig) checkOutput(args []string, o outcome) {
	r.t.Helper()
	has := func(flag string) bool {
		for _, a := range args {
			if a == flag {
				return true
			}
		}
		return false
	}
	if has("--json") && len(args) > 0 && !has("--help") {
		for _, line := range lines(o.stdout) {
			err := validate(args[0], line)
			if err != nil && validate("error", line) == nil {
				err = nil
			}
			require.NoError(r.t, err, "holdfast %v: %s", args, line)
		}
	}
	if has("--events") {
		for _, line := range lines(o.stderr) {
			require.NoError(r.t, validate("event", line), line)
		}
	}
}

var schemaDir = filepath.Join("..", "..", "docs", "json")

// validate checks a line of JSON against docs/json/NAME.schema.json.
func validate(name, line string) error {
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	s, err := c.Compile(filepath.Join(schemaDir, name+".schema.json"))
	if err != nil {
		return err
	}
	v, err := jsonschema.UnmarshalJSON(strings.NewReader(line))
	if err != nil {
		return err
	}
	return s.Validate(v)
}

// lineWriter keeps what is written, and hands complete lines to each at once.
type lineWriter struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	each func(string)
}

func (w *lineWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	w.buf.Write(p)
	w.mu.Unlock()
	if w.each != nil {
		for _, l := range lines(string(p)) {
			w.each(l)
		}
	}
	return len(p), nil
}

// sameAsFile compares a file with the truth.
func (r *rig) sameAsFile(name string, want truth) {
	r.t.Helper()
	n, err := compareFile(name, want)
	require.NoError(r.t, err)
	require.Equal(r.t, want.Size(), n)
}

// leftovers lists what is on the hypervisor and is no baseline.
func (r *rig) leftovers() []string {
	var out []string
	for _, l := range r.world.Leftovers() {
		if !l.Baseline {
			out = append(out, l.ID)
		}
	}
	return out
}

var _ io.Writer = (*lineWriter)(nil)

var errTest = errors.New("the test said so")
