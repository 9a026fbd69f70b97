package sbom_test

import (
	"encoding/json"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/sbom"
)

func info() *debug.BuildInfo {
	return &debug.BuildInfo{
		GoVersion: "go1.26.8", Path: "example.org/m/cmd/p", Main: debug.Module{Path: "example.org/m", Version: "(devel)"},
		Deps: []*debug.Module{
			{Path: "example.org/b", Version: "v1.2.3+incompatible", Sum: "h1:abc="},
			{Path: "example.org/a", Version: "v0.0.0-20240812180835-9c6c0a310c6c", Sum: "h1:def="},
			{Path: "example.org/r", Version: "v1.0.0", Replace: &debug.Module{Path: "example.org/fork", Version: "v1.0.1", Sum: "h1:x="}},
		},
		Settings: []debug.BuildSetting{{Key: "-trimpath", Value: "true"}},
	}
}

const graph = "example.org/m example.org/a@v0.0.0-20240812180835-9c6c0a310c6c\nexample.org/m go@1.25.8\n" +
	"example.org/a@v0.0.0-20240812180835-9c6c0a310c6c example.org/b@v1.0.0\nexample.org/m example.org/r@v1.0.0\n" +
	"example.org/b@v1.0.0 example.org/not-linked@v1.0.0\n"

func TestDocument(t *testing.T) {
	d, err := sbom.New(info(), strings.NewReader(graph))
	require.NoError(t, err)
	b, err := json.Marshal(d)
	require.NoError(t, err)
	require.NoError(t, sbom.Check(b))
	again, err := sbom.New(info(), strings.NewReader(graph))
	require.NoError(t, err)
	require.Equal(t, d, again)
	var names []string
	for _, c := range d.Components {
		names = append(names, c.Purl)
	}
	require.Equal(t, []string{
		"pkg:golang/example.org/a@v0.0.0-20240812180835-9c6c0a310c6c", "pkg:golang/example.org/b@v1.2.3%2Bincompatible",
		"pkg:golang/example.org/fork@v1.0.1", "pkg:golang/std@1.26.8",
	}, names)
	needs := map[string][]string{}
	for _, dep := range d.Dependencies {
		needs[dep.Ref] = dep.Depends
	}
	require.Equal(t, []string{names[1]}, needs[names[0]], "whatever version the graph asks for, one is linked")
	require.Equal(t, []string{names[0], names[2], names[3]}, needs[d.Metadata.Component.Ref])

	flat, err := sbom.New(info(), nil)
	require.NoError(t, err)
	require.NotEqual(t, d.Serial, flat.Serial)
	for _, dep := range flat.Dependencies {
		if dep.Ref == flat.Metadata.Component.Ref {
			require.Len(t, dep.Depends, 4)
		}
	}
	_, err = sbom.New(&debug.BuildInfo{}, nil)
	require.Error(t, err)
	_, err = sbom.New(info(), strings.NewReader("oneword\n"))
	require.Error(t, err)
}

// TestCheckBites breaks a good document in each way that Check is there for.
func TestCheckBites(t *testing.T) {
	for name, spoil := range map[string]func(*sbom.Document){
		"format":      func(d *sbom.Document) { d.Format = "SPDX" },
		"serial":      func(d *sbom.Document) { d.Serial = "urn:uuid:1" },
		"program":     func(d *sbom.Document) { d.Metadata.Component.Type = "library" },
		"purl":        func(d *sbom.Document) { d.Components[0].Purl = "pkg:npm/x" },
		"version":     func(d *sbom.Document) { d.Components[0].Version = "" },
		"twice":       func(d *sbom.Document) { d.Components = append(d.Components, d.Components[0]) },
		"std":         func(d *sbom.Document) { d.Components = d.Components[:3] },
		"dangling":    func(d *sbom.Document) { d.Dependencies[0].Depends = []string{"pkg:golang/nowhere@v1"} },
		"undescribed": func(d *sbom.Document) { d.Dependencies = d.Dependencies[1:] },
		"empty":       func(d *sbom.Document) { d.Components = nil },
	} {
		d, err := sbom.New(info(), nil)
		require.NoError(t, err)
		spoil(d)
		b, err := json.Marshal(d)
		require.NoError(t, err)
		require.Error(t, sbom.Check(b), name)
	}
	require.Error(t, sbom.Check([]byte(`{"bomFormat":"CycloneDX","surprise":1}`)))
}
