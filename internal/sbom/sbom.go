// Package sbom writes what a Go program is made of as a CycloneDX document, from
// what the linker noted in the program itself.
package sbom

import (
	"bufio"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"strings"
)

// Document is the part of CycloneDX 1.5 that a Go program needs.
type Document struct {
	Format       string       `json:"bomFormat"`
	Spec         string       `json:"specVersion"`
	Serial       string       `json:"serialNumber"`
	Version      int          `json:"version"`
	Metadata     Metadata     `json:"metadata"`
	Components   []Component  `json:"components"`
	Dependencies []Dependency `json:"dependencies"`
}

// Metadata names the program.
type Metadata struct {
	Component Component `json:"component"`
}

// Component is the program, a module linked into it, or Go's standard library.
type Component struct {
	Type       string     `json:"type"` // application or library
	Ref        string     `json:"bom-ref"`
	Name       string     `json:"name"`
	Version    string     `json:"version"`
	Purl       string     `json:"purl"`
	Properties []Property `json:"properties,omitempty"`
}

// Property is a name and a value.
type Property struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Dependency says which components one needs.
type Dependency struct {
	Ref     string   `json:"ref"`
	Depends []string `json:"dependsOn"`
}

const stdlib = "std"

// New describes a program by its build information. graph is the output of go mod
// graph, or nil: then every module hangs on the program. The same input gives the
// same document.
func New(info *debug.BuildInfo, graph io.Reader) (*Document, error) {
	if info.Main.Path == "" || info.GoVersion == "" {
		return nil, errors.New("the program does not say what it was built from")
	}
	d := &Document{Format: "CycloneDX", Spec: "1.5", Version: 1}
	d.Metadata.Component = component("application", info.Main.Path, info.Main.Version, "")
	d.Metadata.Component.Name = info.Path
	for _, s := range info.Settings {
		d.Metadata.Component.Properties = append(d.Metadata.Component.Properties, Property{"go:" + s.Key, s.Value})
	}
	refs := map[string]string{info.Main.Path: d.Metadata.Component.Ref}
	for _, m := range info.Deps {
		linked := m
		if m.Replace != nil {
			linked = m.Replace
		}
		c := component("library", linked.Path, linked.Version, linked.Sum)
		d.Components = append(d.Components, c)
		refs[m.Path] = c.Ref
	}
	goVersion := strings.TrimPrefix(info.GoVersion, "go")
	d.Components = append(d.Components, component("library", stdlib, goVersion, ""))
	slices.SortFunc(d.Components, func(a, b Component) int { return strings.Compare(a.Ref, b.Ref) })
	edges, err := edges(d, refs, info.Main.Path, graph)
	if err != nil {
		return nil, err
	}
	d.Dependencies = edges
	b, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	h := sha256.Sum256(b)
	h[6], h[8] = h[6]&0x0f|0x80, h[8]&0x3f|0x80 // version 8: of our own making
	d.Serial = fmt.Sprintf("urn:uuid:%x-%x-%x-%x-%x", h[:4], h[4:6], h[6:8], h[8:10], h[10:16])
	return d, nil
}

func component(kind, path, version, sum string) Component {
	purl := "pkg:golang/" + path
	if version != "" {
		purl += "@" + strings.NewReplacer("+", "%2B", "(", "%28", ")", "%29").Replace(version)
	}
	c := Component{Type: kind, Ref: purl, Name: path, Version: version, Purl: purl}
	if sum != "" {
		// Not a digest of one file: of a list of digests, as go.sum has it.
		c.Properties = []Property{{"go.sum", sum}}
	}
	return c
}

// edges reads the module graph, and keeps what connects components.
func edges(d *Document, refs map[string]string, main string, graph io.Reader) ([]Dependency, error) {
	needs := map[string]map[string]bool{}
	add := func(from, to string) {
		if needs[from] == nil {
			needs[from] = map[string]bool{}
		}
		if from != to && to != "" {
			needs[from][to] = true
		}
	}
	add(refs[main], "")
	for _, c := range d.Components {
		add(c.Ref, "")
		if graph == nil || c.Name == stdlib {
			add(refs[main], c.Ref)
		}
	}
	if graph != nil {
		s := bufio.NewScanner(graph)
		for s.Scan() {
			from, to, ok := strings.Cut(s.Text(), " ")
			if !ok {
				return nil, fmt.Errorf("module graph: %q is not two modules", s.Text())
			}
			fromPath, _, _ := strings.Cut(from, "@")
			toPath, _, _ := strings.Cut(to, "@")
			if refs[fromPath] != "" && refs[toPath] != "" {
				add(refs[fromPath], refs[toPath])
			}
		}
		if err := s.Err(); err != nil {
			return nil, fmt.Errorf("module graph: %w", err)
		}
	}
	var out []Dependency
	for from, set := range needs {
		dep := Dependency{Ref: from, Depends: []string{}}
		for to := range set {
			dep.Depends = append(dep.Depends, to)
		}
		slices.Sort(dep.Depends)
		out = append(out, dep)
	}
	slices.SortFunc(out, func(a, b Dependency) int { return strings.Compare(a.Ref, b.Ref) })
	return out, nil
}
