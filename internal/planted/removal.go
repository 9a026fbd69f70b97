package planted

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"strings"
)

// Suite is a package and the tests that its errors and leaks have to meet.
type Suite struct {
	Pkg string // "./backup"
	// Stages are run one after the other until one fails: the fastest first.
	Stages []Stage
}

// Stage is a run of tests.
type Stage struct {
	Run  string // pattern of names
	Pkgs []string
	Env  []string // "NAME=value", for tests that can do more
}

// Suites returns what removals are drawn from.
func Suites() []Suite {
	own := func(pkg, fast string, nearest ...string) Suite {
		s := Suite{Pkg: pkg}
		if fast != "" {
			s.Stages = append(s.Stages, Stage{Run: fast, Pkgs: []string{pkg}})
		}
		s.Stages = append(s.Stages, Stage{Run: ".", Pkgs: []string{pkg}})
		for _, n := range nearest {
			s.Stages = append(s.Stages, Stage{Run: ".", Pkgs: []string{n}})
		}
		return s
	}
	// The campaign meets pipelines first: there, nobody may overhear an error.
	campaign := func(s Suite) Suite {
		s.Stages = append([]Stage{{
			Run: "^TestEveryFault$", Pkgs: []string{"./internal/campaign"}, Env: []string{"HOLDFAST_FAULTS=errors"},
		}}, s.Stages...)
		return s
	}
	return []Suite{
		campaign(own("./backup", "", "./restore", "./cmd/holdfast")),
		campaign(own("./restore", "", "./cmd/holdfast")),
		own("./internal/journal", "", "./backup"),
		own("./repository/kopiarepo", "ComeBack|Agrees|Opening|FullDisk|Once|Lost|Forged|Repair|Long|ManyAtOnce", "./cmd/holdfast"),
		own("./drivers/kvm", "Every|Reads|Malformed|WhatIs|Writer|Guard|Loss|Image|Release|Forgotten"),
	}
}

// Draw returns n sites of each package, or all if there are not so many, shuffled by
// seed. The packages take turns.
func Draw(module fs.FS, suites []Suite, n int, seed uint64) ([]Drawn, error) {
	rnd := rand.New(rand.NewPCG(seed, 0))
	var lists [][]Drawn
	for _, s := range suites {
		sites, err := Sites(module, strings.TrimPrefix(s.Pkg, "./"))
		if err != nil {
			return nil, err
		}
		rnd.Shuffle(len(sites), func(i, j int) { sites[i], sites[j] = sites[j], sites[i] })
		var list []Drawn
		for _, site := range sites[:min(n, len(sites))] {
			list = append(list, Drawn{site, s})
		}
		lists = append(lists, list)
	}
	var out []Drawn
	for i := range n {
		for _, list := range lists {
			if i < len(list) {
				out = append(out, list[i])
			}
		}
	}
	return out, nil
}

// Drawn is a site that was drawn, and the tests it has to meet.
type Drawn struct {
	*Site
	Suite Suite
}

// Verdict is what became of a removal.
type Verdict string

// Verdicts. None: without it the package does not compile, so that it is no site.
const (
	Killed   Verdict = "killed"
	Survived Verdict = "survived"
	None     Verdict = "none"
)

// Removal is the result of one.
type Removal struct {
	Key     string  `json:"key"`
	Line    int     `json:"line"`
	Kind    Kind    `json:"kind"`
	Verdict Verdict `json:"verdict"`
	By      string  `json:"by,omitempty"` // the test that failed
	Seconds float64 `json:"seconds"`
}

// Remove takes one site away and runs the tests.
func (t *Tester) Remove(ctx context.Context, d Drawn) (Removal, error) {
	out := Removal{Key: d.Key(), Line: d.Line, Kind: d.Kind, Verdict: Survived}
	files, err := d.Site.Remove(os.DirFS(t.Root))
	if err != nil {
		return out, err
	}
	for _, stage := range d.Suite.Stages {
		r, err := t.Run(ctx, files, stage)
		if err != nil {
			return out, err
		}
		out.Seconds += r.Took.Seconds()
		switch r.Outcome {
		case Failed:
			out.Verdict, out.By = Killed, failing(r.Output)
			return out, nil
		case Broken:
			out.Verdict = None
			return out, nil
		case NoTest:
			return out, fmt.Errorf("%v %s: %w", stage.Pkgs, stage.Run, ErrNoTest)
		}
	}
	return out, nil
}

// failing names the test that failed, from the output of the go command.
func failing(output string) string {
	name := ""
	for line := range strings.Lines(output) {
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "--- FAIL: ")
		if ok {
			name, _, _ = strings.Cut(rest, " ") // the innermost one comes last
		} else if name == "" && (strings.HasPrefix(line, "panic: ") || strings.HasPrefix(line, "fatal error: ")) {
			return strings.TrimSpace(line)
		}
	}
	return name
}

// ReadRemovals reads results that were appended to a file, one JSON object a line. A
// line that was cut short is left out. There need not be such a file.
func ReadRemovals(path string) (map[string]Removal, error) {
	out := map[string]Removal{}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		var r Removal
		if json.Unmarshal(lines.Bytes(), &r) == nil {
			out[r.Key] = r
		}
	}
	return out, lines.Err()
}

// AppendRemoval adds a result to a file.
func AppendRemoval(path string, r Removal) (err error) {
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = f.Write(append(line, '\n'))
	return err
}

// ReadReasons reads why known survivors are right to survive: lines "key => reason".
// Empty lines and those that begin with # are left out.
func ReadReasons(text string) (map[string]string, error) {
	out := map[string]string{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		key, reason, ok := strings.Cut(line, " => ")
		if !ok || reason == "" {
			return nil, fmt.Errorf("%w: %q is no reason", ErrFormat, line)
		}
		out[key] = reason
	}
	return out, nil
}
