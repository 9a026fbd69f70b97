package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// listed is a package as the go command lists it.
type listed struct {
	ImportPath string
	Imports    []string
	Deps       []string // direct or not
	Standard   bool
}

// graph is the packages of one configuration.
type graph struct {
	packages []listed        // of the module
	standard map[string]bool // of the standard library
}

// matches reports whether path, inside the module or not, is meant by pattern.
func matches(pattern, path string) bool {
	inside, ok := strings.CutPrefix(path, module+"/")
	if pattern == "..." {
		return ok || path == module
	}
	if base, tree := strings.CutSuffix(pattern, "/..."); tree {
		return ok && (inside == base || strings.HasPrefix(inside, base+"/"))
	}
	if strings.Contains(strings.Split(pattern, "/")[0], ".") { // of another module
		return path == pattern || strings.HasPrefix(path, pattern+"/")
	}
	return ok && inside == pattern
}

func matchesAny(patterns []string, path string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, path) })
}

// violations returns what in the graph breaks the rules.
func (g *graph) violations(rules []rule) (out []string) {
	for _, r := range rules {
		for _, p := range g.packages {
			if !matchesAny(r.of, p.ImportPath) || matchesAny(r.but, p.ImportPath) {
				continue
			}
			deps := p.Deps
			if r.direct {
				deps = p.Imports
			}
			for _, d := range deps {
				forbidden := matchesAny(r.never, d) || slices.Contains(r.never, "*") && !g.standard[d]
				if forbidden && !matchesAny(r.only, d) && d != p.ImportPath {
					out = append(out, fmt.Sprintf("%s depends on %s: %s", p.ImportPath, d, r.why))
				}
			}
		}
	}
	return append(out, g.severalDrivers()...)
}

func (g *graph) severalDrivers() (out []string) {
	for _, p := range g.packages {
		if matchesAny(oneDriver, p.ImportPath) {
			continue
		}
		linked := map[string]bool{}
		for _, d := range append(p.Deps, p.ImportPath) {
			if rest, ok := strings.CutPrefix(d, module+"/drivers/"); ok {
				linked[strings.Split(rest, "/")[0]] = true
			}
		}
		if len(linked) > 1 {
			out = append(out, fmt.Sprintf("%s links %d drivers: only the command does", p.ImportPath, len(linked)))
		}
	}
	return out
}

// missing returns packages that rules name, that are not planned, and that do not
// exist.
func (g *graph) missing(rules []rule) (out []string) {
	names := map[string]bool{}
	for _, r := range rules {
		for _, n := range join(r.of, r.but, r.never, r.only) {
			if n != "..." && n != "*" && !strings.Contains(strings.Split(n, "/")[0], ".") {
				names[n] = true
			}
		}
	}
	for n := range names {
		exists := slices.ContainsFunc(g.packages, func(p listed) bool { return matches(n, p.ImportPath) })
		if !exists && !planned[strings.TrimSuffix(n, "/...")] {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}

func moduleRoot(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	require.NoError(t, err)
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		up := filepath.Dir(dir)
		require.NotEqual(t, dir, up, "no go.mod above the working directory")
		dir = up
	}
}

// load lists the packages of the module and all that they depend on.
func load(t *testing.T, root string, env []string, args ...string) *graph {
	t.Helper()
	args = append([]string{"list", "-e", "-deps", "-json=ImportPath,Imports,Deps,Standard"}, args...)
	cmd := exec.CommandContext(t.Context(), "go", append(args, "./...")...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	raw, err := cmd.Output()
	require.NoError(t, err, "go list: %s", &stderr)
	g := &graph{standard: map[string]bool{"C": true, "unsafe": true}}
	for dec := json.NewDecoder(bytes.NewReader(raw)); ; {
		var p listed
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		switch {
		case p.Standard:
			g.standard[p.ImportPath] = true
		case p.ImportPath == module || strings.HasPrefix(p.ImportPath, module+"/"):
			g.packages = append(g.packages, p)
		}
	}
	require.Greater(t, len(g.packages), 10, "go list found too little: %s", &stderr)
	return g
}

func TestLayers(t *testing.T) {
	root := moduleRoot(t)
	for _, c := range []struct {
		name string
		env  []string
		args []string
	}{
		{name: "linux", env: []string{"GOOS=linux"}},
		{name: "windows", env: []string{"GOOS=windows", "CGO_ENABLED=0"}},
		{name: "libvirt_dlopen", env: []string{"GOOS=linux", "CGO_ENABLED=1"}, args: []string{"-tags=libvirt_dlopen"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			g := load(t, root, c.env, c.args...)
			for _, v := range g.violations(rules()) {
				t.Error(v)
			}
			for _, m := range g.missing(rules()) {
				t.Errorf("a rule names %s, which does not exist (packages to come are in planned)", m)
			}
		})
	}
}

// TestLayerRulesBite plants a forbidden dependency for each rule.
func TestLayerRulesBite(t *testing.T) {
	clean := &graph{standard: map[string]bool{"fmt": true}}
	for _, p := range []string{"hypervisor", "repository", "backup", "drivers/kvm", "cmd/holdfast"} {
		clean.packages = append(clean.packages, listed{ImportPath: module + "/" + p, Deps: []string{"fmt"}, Imports: []string{"fmt"}})
	}
	require.Empty(t, clean.violations(rules()))
	for i, r := range rules() {
		require.NotEmpty(t, r.why)
		of, dep := sample(r.of[0]), "github.com/some/thing"
		if r.of[0] == "..." {
			of = module + "/anything"
		}
		if r.never[0] != "*" {
			dep = sample(r.never[0])
		}
		bad := &graph{packages: []listed{{ImportPath: of, Deps: []string{"fmt", dep}, Imports: []string{dep}}}}
		bad.standard = clean.standard
		require.NotEmpty(t, bad.violations(rules()[i:i+1]), "rule %d: %s may depend on %s", i, of, dep)
	}
	two := &graph{packages: []listed{{ImportPath: module + "/drivers/kvm", Deps: []string{module + "/drivers/xen/sub"}}}}
	require.Len(t, two.severalDrivers(), 1)
	two.packages[0].ImportPath = module + "/cmd/holdfast"
	two.packages[0].Deps = []string{module + "/drivers/xen", module + "/drivers/kvm"}
	require.Empty(t, two.severalDrivers())
	require.Contains(t, clean.missing(rules()), "nbd", "a package that is gone is noticed")
	require.NotContains(t, clean.missing(rules()), "drivers/xen/...", "a planned one may be absent")
}

// sample returns a path that a pattern means.
func sample(pattern string) string {
	pattern = strings.TrimSuffix(pattern, "/...")
	if strings.Contains(strings.Split(pattern, "/")[0], ".") {
		return pattern + "/sub"
	}
	return module + "/" + pattern
}

func TestPatterns(t *testing.T) {
	for _, c := range []struct {
		pattern, path string
		want          bool
	}{
		{"repository", module + "/repository", true},
		{"repository", module + "/repository/kopiarepo", false},
		{"repository/...", module + "/repository/kopiarepo", true},
		{"repository/...", module + "/repository", true},
		{"repository/...", module + "/repositoryx", false},
		{"...", module + "/x", true},
		{"...", "github.com/kopia/kopia", false},
		{"github.com/kopia/kopia", "github.com/kopia/kopia/repo", true},
		{"github.com/kopia/kopia", "github.com/kopia/kopiax", false},
		{"libvirt.org/go/libvirt", "libvirt.org/go/libvirtxml", false},
	} {
		require.Equal(t, c.want, matches(c.pattern, c.path), "%s of %s", c.path, c.pattern)
	}
}
