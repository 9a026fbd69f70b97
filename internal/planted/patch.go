// Package planted asks whether the tests find bugs: it changes the module's
// sources by the go command's -overlay, so that no file is touched, and looks at
// what the tests then say. Patches in testdata are bugs of the past and bugs that
// others have had; a [Site] is an error check or a cleanup that can be left out.
package planted

import (
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"
)

// Patch is a bug as a small change of the sources, and how it has to be found.
type Patch struct {
	Name   string // of the file, without its ending
	Title  string // what is wrong, in one line
	Origin string // where the bug comes from
	Pkg    string // package of the test, "./backup"
	Test   string // the test that has to fail, with its subtest after slashes, if any
	// Symptom is found in the output of the test when it fails by this bug, and not
	// by just any.
	Symptom *regexp.Regexp
	Edits   []Edit
}

// Edit replaces one place of one file.
type Edit struct {
	File string // from the module's root, with slashes
	Old  string // whole lines, found exactly once
	New  string
}

// Conditions of patches that cannot be used.
var (
	ErrFormat = errors.New("not a patch of a planted bug")
	ErrStale  = errors.New("the patch does not fit the sources any more")
)

// Parse reads a patch: a title, header lines, an empty line, and hunks. A hunk
// begins with "@@ FILE" and has the lines of a unified diff without their numbers:
//
//	Only the first extent is used.
//	Origin: T10
//	Test: ./backup TestFullThenIncrementalsAreBitExact
//	Symptom: byte \d+ is
//
//	@@ backup/transfer.go
//	 	set.add(e)
//	+	break
func Parse(name, text string) (*Patch, error) {
	bad := func(format string, args ...any) (*Patch, error) {
		return nil, fmt.Errorf("%s: %w: %s", name, ErrFormat, fmt.Sprintf(format, args...))
	}
	head, body, ok := strings.Cut(text, "\n\n")
	if !ok {
		return bad("no empty line ends its header")
	}
	title, head, _ := strings.Cut(head, "\n")
	p := &Patch{Name: name, Title: title}
	for line := range strings.Lines(head) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		switch key {
		case "Origin":
			p.Origin = value
		case "Test":
			p.Pkg, p.Test, _ = strings.Cut(value, " ")
		case "Symptom":
			var err error
			if p.Symptom, err = regexp.Compile(value); err != nil {
				return bad("symptom: %v", err)
			}
		default:
			return bad("header line %q", line)
		}
	}
	if p.Title == "" || p.Origin == "" || p.Test == "" || p.Symptom == nil || !strings.HasPrefix(p.Pkg, "./") {
		return bad("it needs a title, Origin, Test and Symptom")
	}
	var err error
	if p.Edits, err = parseHunks(body); err != nil {
		return bad("%v", err)
	}
	return p, nil
}

func parseHunks(body string) (edits []Edit, err error) {
	for line := range strings.Lines(body) {
		if file, ok := strings.CutPrefix(line, "@@ "); ok {
			edits = append(edits, Edit{File: strings.TrimSpace(file)})
			continue
		}
		if len(edits) == 0 {
			return nil, fmt.Errorf("line %q before the first hunk", line)
		}
		e := &edits[len(edits)-1]
		switch line[0] {
		case ' ':
			e.Old += line[1:]
			e.New += line[1:]
		case '\n':
			e.Old += line
			e.New += line
		case '-':
			e.Old += line[1:]
		case '+':
			e.New += line[1:]
		default:
			return nil, fmt.Errorf("line %q", line)
		}
	}
	if len(edits) == 0 {
		return nil, errors.New("it changes nothing")
	}
	for _, e := range edits {
		if e.Old == e.New || !fs.ValidPath(e.File) || strings.HasSuffix(e.File, "_test.go") {
			return nil, fmt.Errorf("hunk of %q changes nothing that is shipped", e.File)
		}
	}
	return edits, nil
}

// Load reads all patches of a folder, in order of their names.
func Load(folder fs.FS) ([]*Patch, error) {
	names, err := fs.Glob(folder, "*.patch")
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	var out []*Patch
	for _, name := range names {
		text, err := fs.ReadFile(folder, name)
		if err != nil {
			return nil, err
		}
		p, err := Parse(strings.TrimSuffix(name, ".patch"), string(text))
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// Apply returns the new text of every file that the patch changes. Each hunk must
// fit at exactly one place, else the error is an ErrStale.
func (p *Patch) Apply(module fs.FS) (map[string][]byte, error) {
	out := map[string][]byte{}
	for i, e := range p.Edits {
		text, ok := out[e.File]
		if !ok {
			var err error
			if text, err = fs.ReadFile(module, e.File); err != nil {
				return nil, fmt.Errorf("%s: %w: %w", p.Name, ErrStale, err)
			}
		}
		// A hunk is of whole lines: it follows the beginning of the file or of a line.
		old, all := "\n"+e.Old, "\n"+string(text)
		if n := strings.Count(all, old); n != 1 {
			return nil, fmt.Errorf("%s: %w: hunk %d fits at %d places of %s", p.Name, ErrStale, i+1, n, e.File)
		}
		out[e.File] = []byte(strings.Replace(all, old, "\n"+e.New, 1)[1:])
	}
	return out, nil
}
