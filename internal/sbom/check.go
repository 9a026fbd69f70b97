package sbom

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
)

var (
	serialForm = regexp.MustCompile(`^urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-[1-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	purlForm   = regexp.MustCompile(`^pkg:golang/[A-Za-z0-9._~/-]+(@[A-Za-z0-9._~%-]+)?$`)
)

// Check holds a document against the rules of CycloneDX that concern it: what must
// be there, what must be unique, and that every reference leads somewhere. It
// returns all offences, joined.
func Check(document []byte) error {
	var d Document
	dec := json.NewDecoder(bytes.NewReader(document))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&d); err != nil {
		return fmt.Errorf("software bill of materials: %w", err)
	}
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if d.Format != "CycloneDX" || d.Spec != "1.5" || d.Version < 1 {
		wrong("it is %q %q, version %d", d.Format, d.Spec, d.Version)
	}
	if !serialForm.MatchString(d.Serial) {
		wrong("the serial number %q is no UUID", d.Serial)
	}
	if d.Metadata.Component.Type != "application" {
		wrong("the program is of type %q", d.Metadata.Component.Type)
	}
	if len(d.Components) < 2 {
		wrong("it has %d components", len(d.Components))
	}
	refs := map[string]bool{}
	standard := false
	for _, c := range append([]Component{d.Metadata.Component}, d.Components...) {
		if refs[c.Ref] {
			wrong("%s is there twice", c.Ref)
		}
		refs[c.Ref] = true
		standard = standard || c.Name == stdlib
		if c.Name == "" || !purlForm.MatchString(c.Purl) {
			wrong("component %q has the package URL %q", c.Name, c.Purl)
		}
		if c.Type == "library" && c.Version == "" {
			wrong("component %s has no version", c.Name)
		}
	}
	if !standard {
		wrong("the standard library is missing")
	}
	described := map[string]bool{}
	for _, dep := range d.Dependencies {
		if described[dep.Ref] {
			wrong("the dependencies of %s are there twice", dep.Ref)
		}
		described[dep.Ref] = true
		for _, to := range append([]string{dep.Ref}, dep.Depends...) {
			if !refs[to] {
				wrong("%s leads to %s, which is no component", dep.Ref, to)
			}
		}
	}
	for ref := range refs {
		if !described[ref] {
			wrong("the dependencies of %s are missing", ref)
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("software bill of materials: %w", errors.Join(errs...))
	}
	return nil
}
