package planted

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/clock"
)

// Tester runs tests of a module with some of its sources changed. Its methods may
// be called concurrently; no file of the module is written.
type Tester struct {
	Root    string        // of the module
	Go      string        // the go command; empty: "go"
	Seed    string        // HOLDFAST_SEED of randomised tests, so that a result can be repeated
	Timeout time.Duration // of one test binary; zero: a minute
	Clock   clock.Clock   // nil: the real one
}

// Outcome is what a run of tests said.
type Outcome int

// Outcomes. NoTest: no test had the name. Broken: it did not compile.
const (
	Passed Outcome = iota
	Failed
	Broken
	NoTest
)

// Report is the end of a run of tests.
type Report struct {
	Outcome Outcome
	Output  string
	Took    time.Duration
}

// Run runs the tests of a stage, with the given files, named from the module's root,
// in place of those of the module. It fails fast. An error means that the go command
// could not be run.
func (t *Tester) Run(ctx context.Context, files map[string][]byte, stage Stage) (*Report, error) {
	args := []string{"test", "-vet=off", "-failfast", "-timeout", t.timeout().String(), "-run", stage.Run}
	if len(files) > 0 {
		dir, err := os.MkdirTemp("", "planted")
		if err != nil {
			return nil, err
		}
		defer os.RemoveAll(dir) //nolint:errcheck // a temporary folder
		overlay, err := t.overlay(dir, files)
		if err != nil {
			return nil, err
		}
		args = append(args, "-count=1", "-overlay", overlay)
	}
	name := strings.Fields(t.Go)
	if len(name) == 0 {
		name = []string{"go"}
	}
	args = append(append(name[1:len(name):len(name)], args...), stage.Pkgs...)
	cmd := exec.CommandContext(ctx, name[0], args...)
	cmd.Dir = t.Root
	cmd.Env = append(append(os.Environ(), "HOLDFAST_SEED="+t.Seed), stage.Env...)
	cmd.WaitDelay = 10 * time.Second
	c := t.Clock
	if c == nil {
		c = clock.Real()
	}
	start := c.Now()
	out, err := cmd.CombinedOutput()
	r := &Report{Output: string(out), Took: c.Now().Sub(start)}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err == nil && strings.Contains(r.Output, "no tests to run"):
		r.Outcome = NoTest
	case err == nil:
		r.Outcome = Passed
	case !errors.As(err, &exit):
		return nil, fmt.Errorf("%s: %w", strings.Join(name, " "), err)
	case broken.MatchString(r.Output) || !failed.MatchString(r.Output):
		r.Outcome = Broken
	default:
		r.Outcome = Failed
	}
	return r, nil
}

var (
	broken = regexp.MustCompile(`(?m)^FAIL\t\S+ \[(build|setup) failed\]`)
	failed = regexp.MustCompile(`(?m)^FAIL\t\S+\t`)
)

func (t *Tester) timeout() time.Duration {
	if t.Timeout > 0 {
		return t.Timeout
	}
	return time.Minute
}

// overlay writes the files and the list of what they replace.
func (t *Tester) overlay(dir string, files map[string][]byte) (string, error) {
	root, err := filepath.Abs(t.Root)
	if err != nil {
		return "", err
	}
	replace := map[string]string{}
	for name, text := range files {
		// The name stays the same: the system and the architecture can be in it.
		at := filepath.Join(dir, fmt.Sprint(len(replace)), filepath.Base(name))
		if err := os.MkdirAll(filepath.Dir(at), 0o700); err != nil {
			return "", err
		}
		if err := os.WriteFile(at, text, 0o600); err != nil {
			return "", err
		}
		replace[filepath.Join(root, filepath.FromSlash(name))] = at
	}
	list, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "overlay.json")
	return path, os.WriteFile(path, list, 0o600)
}

// pattern makes a -run pattern that matches one test.
func pattern(test string) string {
	parts := strings.Split(strings.ReplaceAll(test, " ", "_"), "/")
	for i, p := range parts {
		parts[i] = "^" + regexp.QuoteMeta(p) + "$"
	}
	return strings.Join(parts, "/")
}
