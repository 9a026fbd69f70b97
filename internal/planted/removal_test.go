package planted

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestRemoveOne(t *testing.T) {
	tester := calc(t)
	path := filepath.Join(tester.Root, "calc/calc.go")
	require.NoError(t, os.WriteFile(path, []byte(`// Package calc adds.
package calc

import "errors"

// Add adds.
func Add(a, b int) int {
	err := fits(a)
	if err != nil {
		return 0
	}
	if err := fits(b); err != nil || b == 2 {
		return 3
	}
	return a + b
}

func fits(n int) error {
	if n < 0 {
		return errors.New("negative")
	}
	return nil
}

type log struct{ n int }

func (l *log) sync() int { l.n++; return l.n }

// Sync is not tested.
func Sync() int {
	l := new(log)
	return l.sync()
}
`), 0o600))
	sites, err := Sites(os.DirFS(tester.Root), "calc")
	require.NoError(t, err)
	require.Len(t, sites, 3)
	suite := Suite{Pkg: "./calc", Stages: []Stage{{Run: "Loop", Pkgs: []string{"./calc"}}, {Run: ".", Pkgs: []string{"./calc"}}}}
	var got []Verdict
	for _, s := range sites {
		r, err := tester.Remove(t.Context(), Drawn{s, suite})
		require.NoError(t, err)
		got = append(got, r.Verdict)
		if r.Verdict == Killed {
			require.Equal(t, "TestAdd/one_two", r.By)
		}
	}
	require.Equal(t, []Verdict{Survived, Survived, None}, got, "1 and 2 make 3 either way")
	require.NoError(t, os.WriteFile(path, []byte("package calc\n\nfunc Add(a, b int) int {\n\tvar err error\n\tif err == nil || a == 0 {\n\t\treturn a + b\n\t}\n\treturn 0\n}\n"), 0o600))
	sites, err = Sites(os.DirFS(tester.Root), "calc")
	require.NoError(t, err)
	require.Len(t, sites, 1)
	suite.Stages[0].Run = "None"
	_, err = tester.Remove(t.Context(), Drawn{sites[0], suite})
	require.ErrorIs(t, err, ErrNoTest)
}

func TestRemovalKilled(t *testing.T) {
	tester := calc(t)
	require.NoError(t, os.WriteFile(filepath.Join(tester.Root, "calc/calc.go"), []byte(
		"package calc\n\nimport \"errors\"\n\nfunc Add(a, b int) int {\n\terr := errors.New(\"x\")\n\tif err != nil {\n\t\treturn a + b\n\t}\n\treturn 0\n}\n"), 0o600))
	sites, err := Sites(os.DirFS(tester.Root), "calc")
	require.NoError(t, err)
	r, err := tester.Remove(t.Context(), Drawn{sites[0], Suite{Stages: []Stage{{Run: "Add", Pkgs: []string{"./calc"}}}}})
	require.NoError(t, err)
	require.Equal(t, Killed, r.Verdict)
	require.Equal(t, "TestAdd/one_two", r.By)
}

func TestResultsAreResumed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "results")
	got, err := ReadRemovals(path)
	require.NoError(t, err)
	require.Empty(t, got)
	a, b := Removal{Key: "a", Verdict: Killed, By: "TestX"}, Removal{Key: "b", Verdict: Survived}
	require.NoError(t, AppendRemoval(path, a))
	require.NoError(t, AppendRemoval(path, b))
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	require.NoError(t, err)
	_, err = f.WriteString(`{"key":"c","ver`)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	got, err = ReadRemovals(path)
	require.NoError(t, err)
	require.Equal(t, map[string]Removal{"a": a, "b": b}, got)
}

func TestReasons(t *testing.T) {
	text, err := os.ReadFile("testdata/survivors.txt")
	require.NoError(t, err)
	reasons, err := ReadReasons(string(text))
	require.NoError(t, err)
	keys := map[string]bool{}
	for _, s := range Suites() {
		sites, err := Sites(os.DirFS(root), s.Pkg[2:])
		require.NoError(t, err)
		for _, site := range sites {
			keys[site.Key()] = true
		}
	}
	for key := range reasons {
		require.True(t, keys[key], "%s: there is no such place any more", key)
	}
	_, err = ReadReasons("# text\n\na b: c => because\nno reason\n")
	require.ErrorIs(t, err, ErrFormat)
}

// TestDraw: the same seed draws the same, and packages take turns.
func TestDraw(t *testing.T) {
	a, err := Draw(os.DirFS(root), Suites(), 5, 7)
	require.NoError(t, err)
	b, err := Draw(os.DirFS(root), Suites(), 5, 7)
	require.NoError(t, err)
	other, err := Draw(os.DirFS(root), Suites(), 5, 8)
	require.NoError(t, err)
	require.Len(t, a, 25)
	same := 0
	for i := range a {
		require.Equal(t, a[i].Key(), b[i].Key())
		require.Equal(t, Suites()[i%5].Pkg, a[i].Suite.Pkg)
		if a[i].Key() == other[i].Key() {
			same++
		}
	}
	require.Less(t, same, 10)
}
