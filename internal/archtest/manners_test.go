package archtest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const maxLines = 800

// source is a parsed file of the module.
type source struct {
	path  string // from the module's root, with slashes
	lines int
	file  *ast.File
	set   *token.FileSet
}

func (s *source) test() bool { return strings.HasSuffix(s.path, "_test.go") }

// testCode reports whether the file is a test or in a package of test helpers.
func (s *source) testCode() bool {
	dir := filepath.ToSlash(filepath.Dir(s.path))
	return s.test() || strings.HasSuffix(dir, "test") || strings.HasPrefix(dir, "lab/")
}

func (s *source) at(pos token.Pos) string {
	return fmt.Sprintf("%s:%d", s.path, s.set.Position(pos).Line)
}

var generated = regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)

func parse(path string, text []byte) (*source, error) {
	s := &source{path: path, set: token.NewFileSet(), lines: strings.Count(string(text), "\n")}
	var err error
	s.file, err = parser.ParseFile(s.set, path, text, parser.ParseComments)
	return s, err
}

// sources parses all files of the module, whatever their build tags. Nested
// modules and folders that the go command ignores are left out.
func sources(t *testing.T) (out []*source) {
	t.Helper()
	root := moduleRoot(t)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if path == root {
				return nil
			}
			if name == "testdata" || name == "vendor" || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") {
				return fs.SkipDir
			}
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if generated.Match(text) {
			return nil
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		s, err := parse(filepath.ToSlash(rel), text)
		if err != nil {
			return err
		}
		out = append(out, s)
		return nil
	})
	require.NoError(t, err)
	require.Greater(t, len(out), 30)
	return out
}

// manner is a check of files.
type manner struct {
	name  string
	check func(all []*source) []string
}

var manners = []manner{
	{"one package comment per package", packageComments},
	{"no file over 800 lines", longFiles},
	{"no time.Sleep in tests", sleeps},
	{"exported symbols are documented", undocumented},
	{"libraries do not print, exit or register", ownership},
}

func TestManners(t *testing.T) {
	all := sources(t)
	for _, m := range manners {
		t.Run(strings.ReplaceAll(m.name, " ", "-"), func(t *testing.T) {
			for _, v := range m.check(all) {
				t.Error(v)
			}
		})
	}
}

func packageComments(all []*source) (out []string) {
	comments := map[string][]string{}
	for _, s := range all {
		if s.test() {
			continue
		}
		dir := filepath.Dir(s.path)
		if _, ok := comments[dir]; !ok {
			comments[dir] = nil
		}
		if s.file.Doc != nil {
			comments[dir] = append(comments[dir], s.path)
			if text := s.file.Doc.Text(); s.file.Name.Name != "main" && !strings.HasPrefix(text, "Package "+s.file.Name.Name+" ") {
				out = append(out, fmt.Sprintf("%s: the comment does not begin with %q", s.path, "Package "+s.file.Name.Name))
			}
		}
	}
	for dir, files := range comments {
		if len(files) != 1 {
			out = append(out, fmt.Sprintf("%s has %d package comments %v", dir, len(files), files))
		}
	}
	slices.Sort(out)
	return out
}

func longFiles(all []*source) (out []string) {
	for _, s := range all {
		if s.lines > maxLines {
			out = append(out, fmt.Sprintf("%s has %d lines", s.path, s.lines))
		}
	}
	return out
}

// imported returns the name by which a file knows a package; "" if it does not.
func (s *source) imported(path string) string {
	for _, i := range s.file.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil || p != path {
			continue
		}
		if i.Name != nil {
			return i.Name.Name
		}
		return path[strings.LastIndexByte(path, '/')+1:]
	}
	return ""
}

// uses returns the places where a file uses one of the names of a package.
func (s *source) uses(pkg string, names func(name string) bool) (out []string) {
	local := s.imported(pkg)
	if local == "" {
		return nil
	}
	ast.Inspect(s.file, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok || !names(sel.Sel.Name) {
			return true
		}
		if x, ok := sel.X.(*ast.Ident); ok && x.Name == local {
			out = append(out, fmt.Sprintf("%s: %s.%s", s.at(sel.Pos()), pkg, sel.Sel.Name))
		}
		return true
	})
	return out
}

func sleeps(all []*source) (out []string) {
	for _, s := range all {
		if s.testCode() {
			out = append(out, s.uses("time", func(n string) bool { return n == "Sleep" })...)
		}
	}
	return out
}

// ownership keeps libraries from doing what belongs to the process.
func ownership(all []*source) (out []string) {
	for _, s := range all {
		if s.testCode() || s.file.Name.Name == "main" || strings.HasPrefix(s.path, "cmd/") || strings.HasPrefix(s.path, "bench/") {
			continue
		}
		out = append(out, s.uses("os", func(n string) bool { return n == "Exit" || n == "Setenv" || n == "Unsetenv" })...)
		out = append(out, s.uses("os/signal", func(string) bool { return true })...)
		out = append(out, s.uses("fmt", func(n string) bool { return strings.HasPrefix(n, "Print") })...)
		out = append(out, s.uses("log", func(string) bool { return true })...)
		out = append(out, s.uses("time", func(n string) bool { return n == "Sleep" })...)
		for _, d := range s.file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == "init" {
				out = append(out, fmt.Sprintf("%s: func init", s.at(f.Pos())))
			}
		}
	}
	return out
}

func undocumented(all []*source) (out []string) {
	for _, s := range all {
		if s.test() || s.file.Name.Name == "main" {
			continue
		}
		for _, d := range s.file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Doc == nil && d.Name.IsExported() && (d.Recv == nil || ast.IsExported(receiver(d))) {
					out = append(out, fmt.Sprintf("%s: %s has no comment", s.at(d.Pos()), d.Name.Name))
				}
			case *ast.GenDecl:
				out = append(out, s.undocumentedSpecs(d)...)
			}
		}
	}
	return out
}

// receiver returns the name of the type that a method is of.
func receiver(d *ast.FuncDecl) string {
	x := d.Recv.List[0].Type
	for {
		switch t := x.(type) {
		case *ast.StarExpr:
			x = t.X
		case *ast.IndexExpr:
			x = t.X
		case *ast.IndexListExpr:
			x = t.X
		case *ast.Ident:
			return t.Name
		default:
			return ""
		}
	}
}

func (s *source) undocumentedSpecs(d *ast.GenDecl) (out []string) {
	for _, spec := range d.Specs {
		var names []*ast.Ident
		doc := d.Doc
		switch spec := spec.(type) {
		case *ast.TypeSpec:
			names = []*ast.Ident{spec.Name}
			if spec.Doc != nil {
				doc = spec.Doc
			}
		case *ast.ValueSpec: // one comment for a group is enough
			names = spec.Names
			if spec.Doc != nil || spec.Comment != nil {
				doc = &ast.CommentGroup{}
			}
		}
		for _, n := range names {
			if doc == nil && n.IsExported() {
				out = append(out, fmt.Sprintf("%s: %s has no comment", s.at(n.Pos()), n.Name))
			}
		}
	}
	return out
}

func TestNoReplaceInGoMod(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(moduleRoot(t), "go.mod"))
	require.NoError(t, err)
	require.Empty(t, replaces(string(text)), "a replace does not reach those who import the module")
	require.Len(t, replaces("module x\nreplace a => b\n"), 1)
	require.Len(t, replaces("replace (\n\ta => b\n\tc => d\n)\n"), 2)
	require.Empty(t, replaces("require a v1.0.0 // replace a => b\n"))
}

// replaces returns the lines of a go.mod that replace something.
func replaces(text string) (out []string) {
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "//")
		if strings.Contains(line, "=>") {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return out
}

// TestMannersBite plants an offence for each check.
func TestMannersBite(t *testing.T) {
	mk := func(path, text string) *source {
		s, err := parse(path, []byte(text))
		require.NoError(t, err)
		return s
	}
	good := mk("p/a.go", "// Package p is.\npackage p\n\n// F does.\nfunc F() {}\n\n// A and B.\nconst (\n\tA = 1\n\tB = 2\n)\n\ntype t struct{}\n\nfunc (t) M() {}\n")
	for _, m := range manners {
		require.Empty(t, m.check([]*source{good}), m.name)
	}
	bad := map[string][]*source{
		"one package comment per package":          {good, mk("p/b.go", "// Package p again.\npackage p\n")},
		"no file over 800 lines":                   {mk("p/a.go", "package p\n"+strings.Repeat("\n", maxLines))},
		"no time.Sleep in tests":                   {mk("p/a_test.go", "package p\n\nimport clock \"time\"\n\nfunc f() { clock.Sleep(1) }\n")},
		"exported symbols are documented":          {mk("p/a.go", "package p\n\nfunc F() {}\n\ntype T[K any] struct{}\n\nfunc (*T[K]) M() {}\n\nvar V = 1\n")},
		"libraries do not print, exit or register": {mk("p/a.go", "package p\n\nimport \"log\"\n\nfunc init() { log.Println() }\n")},
	}
	want := map[string]int{"exported symbols are documented": 4, "libraries do not print, exit or register": 2}
	for _, m := range manners {
		require.Len(t, m.check(bad[m.name]), max(1, want[m.name]), m.name)
	}
	require.Len(t, packageComments([]*source{mk("p/a.go", "package p\n")}), 1, "none at all")
	require.Len(t, packageComments([]*source{mk("p/a.go", "// Some words.\npackage p\n")}), 1, "the wrong words")
}
