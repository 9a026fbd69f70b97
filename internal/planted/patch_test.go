package planted

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/require"
)

// root is the module's root, from here.
const root = "../.."

func load(t *testing.T) []*Patch {
	t.Helper()
	all, err := Load(os.DirFS("testdata"))
	require.NoError(t, err)
	return all
}

// TestEveryPatchFits: each patch fits the sources as they are, at one place, and
// leaves Go; its test is there. A patch that does not is to be brought up to date:
// what it plants has to stay findable.
func TestEveryPatchFits(t *testing.T) {
	all := load(t)
	require.GreaterOrEqual(t, len(all), 40)
	titles := map[string]string{}
	for _, p := range all {
		require.Empty(t, titles[p.Title], "%s has the title of another one", p.Name)
		titles[p.Title] = p.Name
		require.False(t, p.Symptom.MatchString(""), "%s: its symptom is found anywhere", p.Name)
		require.False(t, p.Symptom.MatchString("--- FAIL: x (0.00s)\nFAIL\nFAIL\tx\t0.01s"), "%s: its symptom is that of any failure", p.Name)
		files, err := p.Apply(os.DirFS(root))
		if err != nil {
			t.Error(err)
			continue
		}
		for name, text := range files {
			_, err := parser.ParseFile(token.NewFileSet(), name, text, parser.SkipObjectResolution)
			require.NoError(t, err, p.Name)
		}
		require.True(t, testExists(t, filepath.Join(root, p.Pkg), p.Test), "%s: no test %s in %s", p.Name, p.Test, p.Pkg)
	}
}

// testExists looks for the function of a test.
func testExists(t *testing.T, dir, test string) bool {
	t.Helper()
	name, _, _ := strings.Cut(test, "/")
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	require.NoError(t, err)
	for _, path := range files {
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == name {
				return true
			}
		}
	}
	return false
}

const good = `Adding subtracts.
Origin: R1
Test: ./calc TestAdd
Symptom: got -?\d+

@@ calc/calc.go
 func Add(a, b int) int {
-	return a + b
+	return a - b
`

func TestParse(t *testing.T) {
	p, err := Parse("x", good)
	require.NoError(t, err)
	require.Equal(t, "Adding subtracts.", p.Title)
	require.Equal(t, "./calc", p.Pkg)
	require.Equal(t, "TestAdd", p.Test)
	require.Equal(t, []Edit{{
		File: "calc/calc.go", Old: "func Add(a, b int) int {\n\treturn a + b\n", New: "func Add(a, b int) int {\n\treturn a - b\n",
	}}, p.Edits)
	for what, edit := range map[string][2]string{
		"no title":           {"Adding subtracts.\n", "\n"},
		"no origin":          {"Origin: R1\n", ""},
		"no test":            {" TestAdd", ""},
		"no symptom":         {"Symptom: got -?\\d+\n", ""},
		"a bad symptom":      {"-?\\d+", "("},
		"an unknown header":  {"Origin", "Author"},
		"no hunk":            {"@@ calc/calc.go\n", ""},
		"a bad line":         {"-\treturn", "?\treturn"},
		"no change":          {"+\treturn a - b", "+\treturn a + b"},
		"a test is changed":  {"calc/calc.go", "calc/calc_test.go"},
		"outside the module": {"calc/calc.go", "../calc.go"},
		"a package by name":  {"./calc", "calc"},
	} {
		bad := strings.Replace(good, edit[0], edit[1], 1)
		require.NotEqual(t, good, bad, what)
		_, err := Parse("x", bad)
		require.ErrorIs(t, err, ErrFormat, what)
	}
}

func TestApply(t *testing.T) {
	p, err := Parse("x", good)
	require.NoError(t, err)
	source := "package calc\n\nfunc Add(a, b int) int {\n\treturn a + b\n}\n"
	files, err := p.Apply(fstest.MapFS{"calc/calc.go": {Data: []byte(source)}})
	require.NoError(t, err)
	require.Equal(t, strings.Replace(source, "+", "-", 1), string(files["calc/calc.go"]))
	for what, text := range map[string]string{
		"moved on":            strings.Replace(source, "a + b", "b + a", 1),
		"twice":               source + strings.TrimPrefix(source, "package calc\n"),
		"in a longer line":    strings.Replace(source, "func Add", "/**/func Add", 1),
		"with other space":    strings.Replace(source, "\treturn", "return", 1),
		"not at all, anymore": "package calc\n",
	} {
		_, err := p.Apply(fstest.MapFS{"calc/calc.go": {Data: []byte(text)}})
		require.ErrorIs(t, err, ErrStale, what)
	}
	_, err = p.Apply(fstest.MapFS{})
	require.ErrorIs(t, err, ErrStale, "the file is gone")
}

// TestEditsOfOneFileAddUp: the second edit sees what the first one made.
func TestEditsOfOneFileAddUp(t *testing.T) {
	p := &Patch{Name: "x", Edits: []Edit{{File: "a.go", Old: "one\n", New: "two\n"}, {File: "a.go", Old: "two\n", New: "three\n"}}}
	files, err := p.Apply(fstest.MapFS{"a.go": {Data: []byte("one\n")}})
	require.NoError(t, err)
	require.Equal(t, map[string][]byte{"a.go": []byte("three\n")}, files)
}

func TestTable(t *testing.T) {
	p, err := Parse("x", good)
	require.NoError(t, err)
	page := Table([]Finding{{Patch: p, Match: "got `-1` | 3", Took: 1.25}, {Patch: p, Err: ErrSurvived}})
	require.Contains(t, page, "1 of 2 found, 1 s of work.")
	require.Contains(t, page, "| Adding subtracts. | R1 | calc TestAdd | `got '-1' \\| 3` | 1.2 |\n")
	require.Contains(t, page, "NOT FOUND: the named test passes all the same")
}
