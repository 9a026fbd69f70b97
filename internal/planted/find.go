package planted

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sync/errgroup"
)

// Conditions of a planted bug that was not found as it should be.
var (
	ErrNotCompiled = errors.New("does not compile")
	ErrNoTest      = errors.New("the named test does not exist")
	ErrSurvived    = errors.New("the named test passes all the same")
	ErrSymptom     = errors.New("the named test fails, and not by the symptom of this bug")
	ErrBaseline    = errors.New("the named tests fail without any bug")
)

// Finding is what became of one patch.
type Finding struct {
	Patch *Patch
	Match string // the line of the output that shows the symptom
	Took  float64
	Err   error // nil: found by its test, with its symptom

	Output string // of the test
}

// Find plants a bug and looks whether its test finds it.
func (t *Tester) Find(ctx context.Context, p *Patch) Finding {
	f := Finding{Patch: p}
	files, err := p.Apply(os.DirFS(t.Root))
	if err != nil {
		f.Err = err
		return f
	}
	r, err := t.Run(ctx, files, Stage{Run: pattern(p.Test), Pkgs: []string{p.Pkg}})
	if err != nil {
		f.Err = fmt.Errorf("%s: %w", p.Name, err)
		return f
	}
	f.Took, f.Output = r.Took.Seconds(), r.Output
	loc := p.Symptom.FindStringIndex(r.Output)
	switch {
	case r.Outcome == Broken:
		err = ErrNotCompiled
	case r.Outcome == NoTest:
		err = ErrNoTest
	case r.Outcome == Passed:
		err = ErrSurvived
	case loc == nil:
		err = ErrSymptom
	}
	if err != nil {
		f.Err = fmt.Errorf("%s: %w", p.Name, err)
		return f
	}
	f.Match = lineAt(r.Output, loc[0])
	return f
}

// lineAt returns the line around a place.
func lineAt(text string, at int) string {
	begin := strings.LastIndexByte(text[:at], '\n') + 1
	line, _, _ := strings.Cut(text[begin:], "\n")
	return strings.TrimSpace(line)
}

// FindAll plants the bugs one by one, some at a time, package by package. done, if
// not nil, is told of each, one at a time. The findings are in the order of the
// patches.
func (t *Tester) FindAll(ctx context.Context, patches []*Patch, atOnce int, done func(Finding)) []Finding {
	out := make([]Finding, len(patches))
	told := make(chan Finding)
	var g errgroup.Group
	g.SetLimit(max(1, atOnce))
	go func() {
		defer close(told)
		for i, p := range patches {
			g.Go(func() error {
				out[i] = t.Find(ctx, p)
				told <- out[i]
				return nil
			})
		}
		_ = g.Wait() // each finding holds its own error
	}()
	for f := range told {
		if done != nil {
			done(f)
		}
	}
	return out
}

// Sound runs the named tests without any bug: a test that fails anyway proves
// nothing. Results may come from the go command's cache.
func (t *Tester) Sound(ctx context.Context, patches []*Patch) error {
	plain := map[string][]string{} // package: tests
	var errs []error
	run := func(pkg, pattern string) {
		r, err := t.Run(ctx, nil, Stage{Run: pattern, Pkgs: []string{pkg}})
		if err == nil && r.Outcome != Passed {
			err = fmt.Errorf("%s %s: %w\n%s", pkg, pattern, ErrBaseline, r.Output)
		}
		errs = append(errs, err)
	}
	seen := map[string]bool{}
	for _, p := range patches {
		switch key := p.Pkg + " " + p.Test; {
		case seen[key]:
		case strings.Contains(p.Test, "/"):
			seen[key] = true
			run(p.Pkg, pattern(p.Test))
		default:
			seen[key] = true
			plain[p.Pkg] = append(plain[p.Pkg], p.Test)
		}
	}
	for pkg, tests := range plain {
		run(pkg, "^("+strings.Join(tests, "|")+")$")
	}
	return errors.Join(errs...)
}
