// Package tally keeps what campaigns counted: how many faults, prefixes, seeds were
// tried and how many of them broke the promise. docs/reliability.md is made of it.
package tally

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// Names of the environment variables. Folder is where records are written to, none
// if it is not set; Part is "i/n", the i-th of n parts of a campaign; Commit is what
// is tested: a test binary does not know.
const (
	Folder = "HOLDFAST_TALLY"
	Part   = "HOLDFAST_SHARD"
	Commit = "HOLDFAST_COMMIT"
)

// Count is one number that a campaign has counted. Those of the same name are added
// up over its shards.
type Count struct {
	Name  string `json:"name"`
	Value int64  `json:"value"`
}

// Campaign is what one run of a campaign, or of one shard of it, has counted.
type Campaign struct {
	// Name is lower case letters, digits and dashes; records of one name are shards
	// of one campaign.
	Name string `json:"name"`
	// About says in a sentence what is done how often.
	About string `json:"about,omitempty"`
	// Command repeats this run.
	Command string  `json:"command"`
	Seed    uint64  `json:"seed,omitempty"`
	Counts  []Count `json:"counts"`
	// Violations is how often the promise was broken.
	Violations int64 `json:"violations"`

	// Set by Record.
	Shard  string `json:"shard"`
	Commit string `json:"commit,omitempty"`
}

var valid = regexp.MustCompile(`^[a-z][a-z0-9-]*$`)

// Record logs what was counted and, if the folder is named, writes it there, in place
// of what the same shard of the same campaign wrote before. It fails the test if it
// cannot.
func Record(tb testing.TB, c Campaign) {
	tb.Helper()
	if !valid.MatchString(c.Name) || c.Command == "" || len(c.Counts) == 0 {
		tb.Fatalf("tally: a campaign needs a name, a command and counts: %+v", c)
	}
	index, of := Shard(tb)
	c.Shard = fmt.Sprintf("%d/%d", index+1, of)
	c.Commit = os.Getenv(Commit)
	for _, n := range c.Counts {
		tb.Logf("tally: %s %s: %d %s", c.Name, c.Shard, n.Value, n.Name)
	}
	tb.Logf("tally: %s %s: %d violations", c.Name, c.Shard, c.Violations)
	dir := os.Getenv(Folder)
	if dir == "" {
		return
	}
	if err := write(dir, c, fmt.Sprintf("%s.%d-of-%d.json", c.Name, index+1, of)); err != nil {
		tb.Fatalf("tally: %v", err)
	}
}

func write(dir string, c Campaign, name string) error {
	text, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name), append(text, '\n'), 0o644)
}

// Shard returns which part of how many is asked for, counted from 0; 0 of 1 if the
// environment says nothing. It fails the test if the environment cannot be read.
func Shard(tb testing.TB) (index, of int) {
	tb.Helper()
	index, of, err := parse(os.Getenv(Part))
	if err != nil {
		tb.Fatalf("%s: %v", Part, err)
	}
	return index, of
}

func parse(text string) (index, of int, err error) {
	if text == "" {
		return 0, 1, nil
	}
	var rest string
	if n, _ := fmt.Sscanf(text, "%d/%d%s", &index, &of, &rest); n != 2 || index < 1 || index > of {
		return 0, 0, fmt.Errorf("%q is not i/n, as 2/8", text)
	}
	return index - 1, of, nil
}

// Mine reports whether the shard that was asked for has to do the item of this key:
// each item is of exactly one shard, whatever the order.
func Mine(index, of int, key string) bool {
	sum := sha256.Sum256([]byte(key))
	n := uint64(sum[0])<<24 | uint64(sum[1])<<16 | uint64(sum[2])<<8 | uint64(sum[3])
	return n%uint64(of) == uint64(index)
}
