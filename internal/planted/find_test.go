package planted

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// calc is a module with one package and its test.
func calc(t *testing.T) *Tester {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":       "module example.org/calc\n\ngo 1.25\n",
		"calc/calc.go": "// Package calc adds.\npackage calc\n\n// Add adds.\nfunc Add(a, b int) int {\n\treturn a + b\n}\n",
		"calc/calc_test.go": `package calc

import "testing"

func TestAdd(t *testing.T) {
	t.Run("one two", func(t *testing.T) {
		if got := Add(1, 2); got != 3 {
			t.Fatalf("got %d", got)
		}
	})
}

func TestLoop(t *testing.T) {
	for n := 0; n < 3; n = Add(n, 1) {
	}
}
`,
	} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	}
	return &Tester{Root: dir, Seed: "1", Timeout: 10 * time.Second}
}

// TestFind plants a bug that is found, and then everything that may go wrong with
// one: none of it passes for a bug that was found.
func TestFind(t *testing.T) {
	tester := calc(t)
	for what, c := range map[string]struct {
		old, new string
		err      error
		match    string
	}{
		"found":                    {"", "", nil, "calc_test.go:8: got -1"},
		"found by a subtest":       {"TestAdd", "TestAdd/one two", nil, "calc_test.go:8: got -1"},
		"survives":                 {"a - b", "b + a", ErrSurvived, ""},
		"does not compile":         {"a - b", "a - c", ErrNotCompiled, ""},
		"no such test":             {"TestAdd", "TestSub", ErrNoTest, ""},
		"no such subtest":          {"TestAdd", "TestAdd/three", ErrNoTest, ""},
		"no such package":          {"./calc", "./none", ErrNotCompiled, ""},
		"fails otherwise":          {"got -?\\d+", "got 7", ErrSymptom, ""},
		"does not fit":             {" func Add(a, b int) int {", " func Add(b, a int) int {", ErrStale, ""},
		"the symptom is a hang":    {"Symptom: got -?\\d+", "Symptom: TestLoop \\(", nil, "TestLoop ("},
		"hangs, and should not":    {"TestAdd", "TestLoop", ErrSymptom, ""},
		"no test in the pattern":   {"TestAdd", "Test", ErrNoTest, ""},
		"a file that is not there": {"@@ calc/calc.go", "@@ calc/gone.go", ErrStale, ""},
	} {
		t.Run(what, func(t *testing.T) {
			text := strings.Replace(good, c.old, c.new, 1)
			if strings.Contains(what, "hang") {
				text = strings.Replace(text, "TestAdd", "TestLoop", 1)
				text = strings.Replace(text, "a - b", "a", 1)
				tester := *tester
				tester.Timeout = time.Second
				f := tester.Find(t.Context(), parsed(t, text))
				require.ErrorIs(t, f.Err, c.err)
				require.Contains(t, f.Match, c.match)
				return
			}
			f := tester.Find(t.Context(), parsed(t, text))
			if c.err == nil {
				require.NoError(t, f.Err, f.Output)
				require.Equal(t, c.match, f.Match)
				require.Positive(t, f.Took)
				return
			}
			require.ErrorIs(t, f.Err, c.err, f.Output)
		})
	}
	text, err := os.ReadFile(filepath.Join(tester.Root, "calc/calc.go"))
	require.NoError(t, err)
	require.Contains(t, string(text), "a + b", "the sources are not touched")
}

func parsed(t *testing.T, text string) *Patch {
	t.Helper()
	p, err := Parse("x", text)
	require.NoError(t, err)
	return p
}

// TestSound: a test that fails without any bug proves nothing.
func TestSound(t *testing.T) {
	tester := calc(t)
	whole, sub := parsed(t, good), parsed(t, strings.Replace(good, "TestAdd", "TestAdd/one two", 1))
	require.NoError(t, tester.Sound(t.Context(), []*Patch{whole, sub, whole}))
	require.ErrorIs(t, tester.Sound(t.Context(), []*Patch{whole, parsed(t, strings.Replace(good, "TestAdd", "TestNone", 1)), sub, parsed(t, strings.Replace(good, "TestAdd", "TestAdd/none", 1))}), ErrBaseline)
	require.NoError(t, os.WriteFile(filepath.Join(tester.Root, "calc/calc.go"), []byte("package calc\n\nfunc Add(a, b int) int { return 0 }\n"), 0o600))
	require.ErrorIs(t, tester.Sound(t.Context(), []*Patch{whole}), ErrBaseline)
}

func TestFindAllTellsOfEach(t *testing.T) {
	tester := calc(t)
	patches := []*Patch{parsed(t, good), parsed(t, strings.Replace(good, "a - b", "b + a", 1)), parsed(t, good)}
	told := 0
	out := tester.FindAll(t.Context(), patches, 2, func(Finding) { told++ })
	require.Equal(t, 3, told)
	require.NoError(t, out[0].Err)
	require.ErrorIs(t, out[1].Err, ErrSurvived)
	require.NoError(t, out[2].Err)

	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("enough")
	cancel(stop)
	for _, f := range tester.FindAll(ctx, patches, 2, nil) {
		require.ErrorIs(t, f.Err, stop, "what was not tried was not found")
	}
}

// TestSample plants a few real bugs, of packages that compile soon. All of them are
// planted by "make planted".
func TestSample(t *testing.T) {
	if testing.Short() {
		t.Skip("it compiles packages")
	}
	tester := &Tester{Root: root, Seed: "2"}
	want := []string{"backup-one-page", "digest-last-leaf", "journal-no-sync", "retention-newest-deleted"}
	for _, p := range load(t) {
		if len(want) == 0 || p.Name != want[0] {
			continue
		}
		want = want[1:]
		t.Run(p.Name, func(t *testing.T) {
			f := tester.Find(t.Context(), p)
			require.NoError(t, f.Err, f.Output)
			t.Logf("%s: %s", p.Title, f.Match)
		})
	}
	require.Empty(t, want, "these are no patches any more")
}
