package planted

import (
	"go/parser"
	"go/token"
	"os"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/require"
)

func TestSites(t *testing.T) {
	const source = `package p

func (t *T) f() (err error) {
	if err := g(); err != nil {
		return err
	}
	if x, err := h(); x > 0 && err != nil && !errors.Is(err, y) {
		return err
	}
	if err == nil {
		err = g()
	}
	defer mu.Unlock()
	defer func() { err = errors.Join(err, w.Close()) }()
	defer cancel()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	}
	s.release(ctx)
	_ = os.Remove(name)
	if x != nil || a == nil {
		delete(m, k)
	}
	if err := g(); err != nil {
		return nil
	}
	return errors.Join(err, f.Sync())
}
`
	files := fstest.MapFS{
		"p/a.go": {Data: []byte(source)}, "p/a_test.go": {Data: []byte("not Go")}, "p/sub/b.go": {Data: []byte("not Go")},
		"p/b.go": {Data: []byte("//go:build never\n\n" + source)},
	}
	sites, err := Sites(files, "p")
	require.NoError(t, err)
	var got []string
	for _, s := range sites {
		out, err := s.Remove(files)
		require.NoError(t, err)
		_, err = parser.ParseFile(token.NewFileSet(), "a.go", out["p/a.go"], parser.SkipObjectResolution)
		require.NoError(t, err, s.Key())
		old, now := strings.Split(source, "\n"), strings.Split(string(out["p/a.go"]), "\n")
		for i := range old {
			if old[i] != now[i] {
				require.Equal(t, s.Line, i+1)
				got = append(got, string(s.Kind)+": "+s.Text+" -> "+strings.TrimSpace(now[i]))
			}
		}
	}
	require.Equal(t, []string{
		"check: if err := g(); err != nil -> if err := g(); false && (err != nil) {",
		"check: if x, err := h(); x > 0 && err != nil && !errors.Is(err, y) -> if x, err := h(); false && (x > 0 && err != nil && !errors.Is(err, y)) {",
		"check: if err == nil -> if true || (err == nil) {",
		"cleanup: defer func() { err = errors.Join(err, w.Close()) }() -> if false { defer func() { err = errors.Join(err, w.Close()) }() }",
		"cleanup: w.Close() -> defer func() { err = errors.Join(err, func() error { if false { return w.Close() }; return nil }()) }()",
		"cleanup: defer cancel() -> if false { defer cancel() }",
		"check: case ctx.Err() != nil: -> case false && (ctx.Err() != nil):",
		"cleanup: s.release(ctx) -> if false { s.release(ctx) }",
		"cleanup: _ = os.Remove(name) -> if false { _ = os.Remove(name) }",
		"check: if err := g(); err != nil -> if err := g(); false && (err != nil) {",
		"cleanup: f.Sync() -> return errors.Join(err, func() error { if false { return f.Sync() }; return nil }())",
	}, got)
	require.Equal(t, "p/a.go T.f: if err := g(); err != nil", sites[0].Key())
	require.Equal(t, "p/a.go T.f: if err := g(); err != nil #2", sites[9].Key())
}

// TestSitesOfTheModule: there is enough to draw from, and no two sites have one name.
func TestSitesOfTheModule(t *testing.T) {
	keys := map[string]bool{}
	for _, s := range Suites() {
		sites, err := Sites(os.DirFS(root), strings.TrimPrefix(s.Pkg, "./"))
		require.NoError(t, err)
		require.Greater(t, len(sites), 40, s.Pkg)
		t.Logf("%s: %d", s.Pkg, len(sites))
		for _, site := range sites {
			require.False(t, keys[site.Key()], site.Key())
			keys[site.Key()] = true
		}
	}
}
