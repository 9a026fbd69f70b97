package planted

import (
	"fmt"
	"go/ast"
	"go/build"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Kind is what a site is.
type Kind string

// Kinds of sites.
const (
	Check   Kind = "check"   // of an error: it is not looked at
	Cleanup Kind = "cleanup" // a call that gives something back or takes something back
)

// Site is an error check or a cleanup in the sources, and what it is to be replaced
// by so that it is as if it were not there.
type Site struct {
	File string // from the module's root, with slashes
	Line int
	Func string
	Kind Kind
	Text string // its first line
	// Same is the number of the site among those of the same text in the function.
	Same int

	from, to int // bytes
	new      string
}

// Key names a site independently of what is changed around it.
func (s *Site) Key() string {
	key := fmt.Sprintf("%s %s: %s", s.File, s.Func, s.Text)
	if s.Same > 0 {
		key += fmt.Sprintf(" #%d", s.Same+1)
	}
	return key
}

// Remove returns the text of the site's file without it.
func (s *Site) Remove(module fs.FS) (map[string][]byte, error) {
	text, err := fs.ReadFile(module, s.File)
	if err != nil {
		return nil, err
	}
	if s.to > len(text) {
		return nil, fmt.Errorf("%s: %w", s.Key(), ErrStale)
	}
	return map[string][]byte{s.File: []byte(string(text[:s.from]) + s.new + string(text[s.to:]))}, nil
}

// Sites finds the error checks and the cleanups of a package's sources, without its
// tests, in order of file and line. Files that are not part of the build on this system
// have none: no test can tell what is missing in them.
func Sites(module fs.FS, dir string) ([]*Site, error) {
	names, err := fs.Glob(module, path.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	build := build.Default
	build.JoinPath = path.Join
	build.OpenFile = func(name string) (io.ReadCloser, error) { return module.Open(name) }
	var out []*Site
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		if built, err := build.MatchFile(dir, path.Base(name)); err != nil {
			return nil, err
		} else if !built {
			continue
		}
		text, err := fs.ReadFile(module, name)
		if err != nil {
			return nil, err
		}
		sites, err := sitesOf(name, text)
		if err != nil {
			return nil, err
		}
		out = append(out, sites...)
	}
	return out, nil
}

func sitesOf(name string, text []byte) ([]*Site, error) {
	set := token.NewFileSet()
	f, err := parser.ParseFile(set, name, text, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	w := &finder{set: set, text: string(text), file: name}
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Body != nil {
			w.fn, w.seen = funcName(fn), map[string]int{}
			ast.Inspect(fn.Body, w.visit)
		}
	}
	slices.SortFunc(w.out, func(a, b *Site) int { return a.from - b.from })
	return w.out, nil
}

func funcName(fn *ast.FuncDecl) string {
	if fn.Recv == nil {
		return fn.Name.Name
	}
	t := fn.Recv.List[0].Type
	if star, ok := t.(*ast.StarExpr); ok {
		t = star.X
	}
	if id, ok := t.(*ast.Ident); ok {
		return id.Name + "." + fn.Name.Name
	}
	return fn.Name.Name
}

// finder walks through one file.
type finder struct {
	set  *token.FileSet
	text string
	file string
	fn   string
	seen map[string]int // texts of the function
	out  []*Site
}

func (w *finder) source(from, to token.Pos) string {
	return w.text[w.set.Position(from).Offset:w.set.Position(to).Offset]
}

// add notes a site. What is replaced lies within what is shown.
func (w *finder) add(kind Kind, shown, replaced ast.Node, format string) {
	src := w.source(replaced.Pos(), replaced.End())
	text, _, _ := strings.Cut(w.source(shown.Pos(), shown.End()), "\n")
	text = strings.TrimSuffix(strings.TrimSpace(text), " {")
	at := w.set.Position(replaced.Pos())
	w.out = append(w.out, &Site{
		File: w.file, Line: at.Line, Func: w.fn, Kind: kind, Text: text, Same: w.seen[text],
		from: at.Offset, to: w.set.Position(replaced.End()).Offset, new: fmt.Sprintf(format, src),
	})
	w.seen[text]++
}

func (w *finder) visit(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.IfStmt:
		switch compared(n.Cond) {
		case token.NEQ:
			w.add(Check, n, n.Cond, "false && (%s)")
		case token.EQL:
			w.add(Check, n, n.Cond, "true || (%s)")
		}
	case *ast.CaseClause:
		for _, e := range n.List {
			if compared(e) == token.NEQ {
				w.add(Check, n, e, "false && (%s)")
			}
		}
	case *ast.DeferStmt:
		if !trivial(n.Call) {
			w.add(Cleanup, n, n, "if false { %s }")
		}
		if _, ok := n.Call.Fun.(*ast.FuncLit); !ok {
			return false
		}
	case *ast.ExprStmt:
		if call, ok := n.X.(*ast.CallExpr); ok && cleans(call) {
			w.add(Cleanup, n, n, "if false { %s }")
			return false
		}
	case *ast.AssignStmt:
		if id, ok := n.Lhs[0].(*ast.Ident); ok && len(n.Lhs) == 1 && id.Name == "_" {
			if call, ok := n.Rhs[0].(*ast.CallExpr); ok && cleans(call) {
				w.add(Cleanup, n, n, "if false { %s }")
				return false
			}
		}
	case *ast.CallExpr:
		// A cleanup whose error is used. If it returns something else, this does
		// not compile, and the site is none.
		if cleans(n) {
			w.add(Cleanup, n, n, "func() error { if false { return %s }; return nil }()")
			return false
		}
	}
	return true
}

// compared returns how a condition compares an error with nil: "!=" if it holds for
// errors, "==" if it holds only without one, else an illegal token.
func compared(cond ast.Expr) token.Token {
	switch e := cond.(type) {
	case *ast.ParenExpr:
		return compared(e.X)
	case *ast.BinaryExpr:
		switch e.Op {
		case token.NEQ, token.EQL:
			if isErr(e.X) && isNil(e.Y) {
				return e.Op
			}
		case token.LAND, token.LOR:
			if op := compared(e.X); op != token.ILLEGAL {
				return op
			}
			return compared(e.Y)
		}
	}
	return token.ILLEGAL
}

func isNil(e ast.Expr) bool {
	id, ok := e.(*ast.Ident)
	return ok && id.Name == "nil"
}

// isErr goes by the name: err, rerr, thawErr, c.err, x.Err, ctx.Err().
func isErr(e ast.Expr) bool {
	switch e := e.(type) {
	case *ast.Ident:
		return strings.HasSuffix(strings.ToLower(e.Name), "err")
	case *ast.SelectorExpr:
		return isErr(e.Sel)
	case *ast.CallExpr:
		return isErr(e.Fun)
	}
	return false
}

// verbs begin the names of functions that clean up.
var verbs = []string{
	"close", "release", "remove", "abort", "delete", "undo", "cancel", "stop", "thaw", "forget", "discharge", "sync", "flush",
	"truncate", "end", "drop", "destroy", "unwind", "sweep", "giveback", "free", "disarm", "discard", "dismantle", "cleanup",
}

// trivial are calls whose absence every test would notice by hanging.
func trivial(call *ast.CallExpr) bool {
	switch called(call) {
	case "Unlock", "RUnlock", "Done", "close", "recover":
		return true
	}
	return false
}

// cleans reports whether a call gives something back, by its name. The built-in
// functions of such names do not count.
func cleans(call *ast.CallExpr) bool {
	name := called(call)
	if _, plain := call.Fun.(*ast.Ident); plain && (name == "close" || name == "delete") {
		return false
	}
	lower := strings.ToLower(name)
	return !strings.HasSuffix(lower, "func") && slices.ContainsFunc(verbs, func(v string) bool { return strings.HasPrefix(lower, v) })
}

func called(call *ast.CallExpr) string {
	switch f := call.Fun.(type) {
	case *ast.Ident:
		return f.Name
	case *ast.SelectorExpr:
		return f.Sel.Name
	}
	return ""
}
