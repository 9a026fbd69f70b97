package kopiarepo

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/holdfast-backup/holdfast/repository"
)

// clientAnchors is what this client remembers of the heads of chains, in a file
// outside of any repository. A nil file name remembers nothing.
type clientAnchors struct {
	file string
	mu   sync.Mutex
}

type clientFile struct {
	Repositories map[string]map[string]*anchor `json:"repositories"`
}

func (c *clientAnchors) read() (*clientFile, error) {
	f := &clientFile{Repositories: map[string]map[string]*anchor{}}
	if c.file == "" {
		return f, nil
	}
	b, err := os.ReadFile(c.file)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, f); err != nil {
		return nil, fmt.Errorf("%w: anchor file %s: %w", repository.ErrDamaged, c.file, err)
	}
	if f.Repositories == nil {
		f.Repositories = map[string]map[string]*anchor{}
	}
	return f, nil
}

func (c *clientAnchors) chains(repo string) ([]string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f, err := c.read()
	if err != nil {
		return nil, err
	}
	var out []string
	for name := range f.Repositories[repo] {
		out = append(out, name)
	}
	return out, nil
}

func (c *clientAnchors) anchor(repo, chain string) (*anchor, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f, err := c.read()
	if err != nil {
		return nil, err
	}
	return f.Repositories[repo][chain], nil
}

// remember moves the memory of a chain forward, never back.
func (c *clientAnchors) remember(repo, chain string, a *anchor) error {
	if c.file == "" {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	f, err := c.read()
	if err != nil {
		return err
	}
	chains := f.Repositories[repo]
	if chains == nil {
		chains = map[string]*anchor{}
		f.Repositories[repo] = chains
	}
	if old := chains[chain]; old != nil && old.Head.Log > a.Head.Log {
		return nil
	}
	chains[chain] = a
	b, err := json.MarshalIndent(f, "", " ")
	if err != nil {
		return err
	}
	d := newDirStore(filepath.Dir(c.file), nil)
	temp, err := d.writeTemp(filepath.Base(c.file), func(w io.Writer) error {
		_, err := w.Write(b)
		return err
	})
	if err == nil {
		err = os.Rename(temp, c.file)
	}
	return err
}
