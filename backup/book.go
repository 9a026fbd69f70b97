package backup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/journal"
	"github.com/holdfast-backup/holdfast/repository"
)

// JournalDir is where the journals of runs lie in a state directory.
func JournalDir(stateDir string) string { return filepath.Join(stateDir, "journal") }

// notePrefix begins the names of the notes that hold open obligations.
const notePrefix = "obligations/"

// note is the copy of a run's obligations in the repository, so that another
// host can recover.
type note struct {
	Run      string          `json:"run"`
	Endpoint string          `json:"endpoint"`
	VM       hypervisor.VMID `json:"vm"`
	Name     string          `json:"name"` // owner name
	Chain    string          `json:"chain"`
	Frozen   bool            `json:"frozen,omitempty"` // the guest may be frozen
	Since    time.Time       `json:"since"`
}

// book keeps the obligations of a run: in the journal on this host, if there is
// a state directory, and in the repository.
type book struct {
	j    *journal.Journal // may be nil
	repo repository.Repository
	note note
	put  bool // the note is in the repository
	open map[journal.Kind]journal.ID
}

func openBook(r *run) (*book, error) {
	b := &book{
		repo: r.repo, open: map[journal.Kind]journal.ID{},
		note: note{Run: r.res.Run, Endpoint: r.o.Endpoint, VM: r.res.VM.ID, Name: r.name, Since: r.o.Clock.Now()},
	}
	if r.o.StateDir == "" {
		return b, nil
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	b.j, err = journal.Create(JournalDir(r.o.StateDir), r.res.Run, journal.Header{
		Command: "backup", Host: host, PID: os.Getpid(), Endpoint: r.o.Endpoint, Repository: r.o.Location,
		VMs: []string{string(r.res.VM.ID)}, Start: r.o.Clock.Now(),
	}, &journal.Options{Now: r.o.Clock.Now, FS: r.o.JournalFS})
	if err != nil {
		return nil, fmt.Errorf("state directory %s: %w", r.o.StateDir, err)
	}
	return b, nil
}

func (b *book) stage(s Stage, vm string, entered bool) error {
	if b.j == nil {
		return nil
	}
	return b.j.Stage(string(s), vm, entered)
}

// intend makes obligations durable, here and in the repository, before what they
// are about is done.
func (b *book) intend(ctx context.Context, chain string, kinds ...journal.Kind) error {
	b.note.Chain = chain
	for _, k := range kinds {
		if k == journal.Thaw {
			b.note.Frozen = true
		}
		if b.j == nil {
			b.open[k] = ""
			continue
		}
		id, err := b.j.Intend(journal.Obligation{
			Kind: k, Endpoint: b.note.Endpoint, VM: string(b.note.VM), Object: b.note.Name,
			Data: map[string]string{"chain": chain},
		})
		if err != nil {
			return err
		}
		b.open[k] = id
	}
	return b.save(ctx)
}

// save writes the note.
func (b *book) save(ctx context.Context) error {
	v, err := json.Marshal(b.note)
	if err != nil {
		return err
	}
	b.put = true // it may be there even when the call fails
	if err := b.repo.PutNote(ctx, notePrefix+b.note.Run, v); err != nil {
		return fmt.Errorf("write into the repository: %w", err)
	}
	return nil
}

// confirm records that the effect of an obligation is there.
func (b *book) confirm(k journal.Kind, handle any) error {
	if b.j == nil {
		return nil
	}
	v, err := json.Marshal(handle)
	if err != nil {
		return err
	}
	return b.j.Confirm(b.open[k], string(v))
}

// discharge closes an obligation. Closing one that is not open does nothing.
func (b *book) discharge(k journal.Kind) error {
	id, ok := b.open[k]
	if !ok {
		return nil
	}
	delete(b.open, k)
	if b.j == nil {
		return nil
	}
	return b.j.Discharge(id)
}

func (b *book) isOpen(k journal.Kind) bool {
	_, ok := b.open[k]
	return ok
}

// close ends the book. What is still open stays in the journal and in the
// repository for Recover.
func (b *book) close(ctx context.Context) error {
	var err error
	if len(b.open) == 0 && b.put {
		err = b.repo.DeleteNote(ctx, notePrefix+b.note.Run)
	}
	if b.j != nil {
		if cerr := b.j.Close(true); !errors.Is(cerr, journal.ErrOpen) {
			err = errors.Join(err, cerr)
		}
	}
	return err
}
