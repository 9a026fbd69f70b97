// Package secrettest finds out whether a secret got to where it does not belong. A
// test uses secrets that occur nowhere else, canaries, and searches afterwards all
// that was written: output, errors, logs, files, arguments and environments of
// processes.
package secrettest

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Canary is a secret that is looked for, and the name to report it by.
type Canary struct {
	Name  string
	forms map[string][]byte
}

// New makes a canary. clear should have at least 12 bytes, so that no chance finds
// it, and bytes that encoders escape.
func New(name, clear string) Canary {
	c := Canary{Name: name, forms: map[string][]byte{
		"plain":          []byte(clear),
		"hex":            []byte(hex.EncodeToString([]byte(clear))),
		"HEX":            []byte(strings.ToUpper(hex.EncodeToString([]byte(clear)))),
		"URL query":      []byte(url.QueryEscape(clear)),
		"URL path":       []byte(url.PathEscape(clear)),
		"URL user":       []byte(url.UserPassword("", clear).String()[1:]),
		"Go string":      []byte(strings.Trim(strconv.Quote(clear), `"`)),
		"list of bytes":  []byte(strings.Trim(fmt.Sprint([]byte(clear)), "[]")),
		"UTF-16":         wide(clear),
		"space in bytes": []byte(strings.Trim(fmt.Sprintf("% x", clear), " ")),
	}}
	if b, err := json.Marshal(clear); err == nil {
		c.forms["JSON"] = bytes.Trim(b, `"`)
	}
	for shift := range 3 {
		c.forms["base64 at "+strconv.Itoa(shift)] = inner(base64.RawStdEncoding, clear, shift)
		c.forms["base64url at "+strconv.Itoa(shift)] = inner(base64.RawURLEncoding, clear, shift)
	}
	return c
}

// inner is what of an encoding does not depend on what stands before and after,
// when shift bytes stand before.
func inner(e *base64.Encoding, clear string, shift int) []byte {
	b := append(make([]byte, shift), clear...)
	from := (shift*8 + 5) / 6
	to := len(b) * 8 / 6
	return []byte(e.EncodeToString(b)[from:to])
}

func wide(s string) []byte {
	out := make([]byte, 0, 2*len(s))
	for i := range len(s) {
		out = append(out, s[i], 0)
	}
	return out
}

// Find returns the name of a form of the canary that is in data; "" if none is.
func (c Canary) Find(data []byte) string {
	for form, b := range c.forms {
		if bytes.Contains(data, b) {
			return form
		}
	}
	return ""
}

// Forms lists the names of the forms that Find knows.
func (c Canary) Forms() map[string][]byte {
	out := map[string][]byte{}
	for name, b := range c.forms {
		out[name] = slices.Clone(b)
	}
	return out
}

// Search looks for canaries in data and says what it found, with where in front.
func Search(where string, data []byte, canaries ...Canary) (found []string) {
	for _, c := range canaries {
		if form := c.Find(data); form != "" {
			found = append(found, fmt.Sprintf("%s: holds %s as %s", where, c.Name, form))
		}
	}
	return found
}

// Tree looks for canaries in the names and the content of all files under dir.
// Files that go away meanwhile are left out.
func Tree(dir string, canaries ...Canary) (found []string, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil
		}
		if err != nil {
			return err
		}
		found = append(found, Search("name of "+path, []byte(path), canaries...)...)
		if e.Type().IsRegular() {
			b, err := os.ReadFile(path)
			if os.IsNotExist(err) {
				return nil
			}
			if err != nil {
				return err
			}
			found = append(found, Search(path, b, canaries...)...)
		}
		return nil
	})
	return found, err
}

// Processes looks for canaries in the arguments of a process and of all that
// descend from it, and in the environments of the latter. It returns how many
// processes it saw. Where there is no /proc it sees none.
func Processes(pid int, canaries ...Canary) (found []string, seen int) {
	return process(pid, 0, canaries)
}

// environment tells where the environment of a process lies in memory.
func environment(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	_, rest, ok := strings.Cut(string(b), ") ") // the name before it may hold spaces
	if fields := strings.Fields(rest); err == nil && ok && len(fields) > 48 {
		return fields[47] // env_start, the 50th of all
	}
	return ""
}

// process looks at one process; parent is 0 for the first.
func process(pid, parent int, canaries []Canary) (found []string, seen int) {
	dir := "/proc/" + strconv.Itoa(pid)
	if at := environment(pid); parent != 0 && at != "" && at != "0" && at == environment(parent) {
		return nil, 0 // between fork and exec: what it shows is its parent
	}
	args, err := os.ReadFile(dir + "/cmdline")
	if err != nil || len(args) == 0 {
		return nil, 0 // it has ended
	}
	seen = 1
	found = Search(dir+"/cmdline", args, canaries...)
	if env, err := os.ReadFile(dir + "/environ"); err == nil && parent != 0 {
		found = append(found, Search(dir+"/environ", env, canaries...)...)
	}
	tasks, _ := os.ReadDir(dir + "/task")
	for _, task := range tasks {
		list, _ := os.ReadFile(dir + "/task/" + task.Name() + "/children")
		for f := range strings.FieldsSeq(string(list)) {
			n, err := strconv.Atoi(f)
			if err != nil {
				continue
			}
			more, also := process(n, pid, canaries)
			found, seen = append(found, more...), seen+also
		}
	}
	return found, seen
}
