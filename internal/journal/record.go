package journal

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// op is the verb of a record.
type op string

const (
	opHead      op = "head"
	opEnter     op = "enter"
	opLeave     op = "leave"
	opIntend    op = "intend"
	opConfirm   op = "confirm"
	opDischarge op = "discharge"
	opNote      op = "note"
	opAdopt     op = "adopt"
	opEnd       op = "end"
)

const formatVersion = 1

// record is the JSON payload of a frame.
type record struct {
	Op         op          `json:"op"`
	At         time.Time   `json:"at,omitzero"`
	Version    int         `json:"version,omitempty"` // head only
	Head       *Header     `json:"head,omitempty"`
	Obligation *Obligation `json:"obligation,omitempty"`
	ID         ID          `json:"id,omitempty"`
	Stage      string      `json:"stage,omitempty"`
	VM         string      `json:"vm,omitempty"`
	Text       string      `json:"text,omitempty"` // handle of a confirm, text of a note
}

// Stage is one passage of a VM through a stage of its run.
type Stage struct {
	Name    string
	VM      string
	Entered time.Time
	Left    time.Time // zero while Done is false
	Done    bool      // the stage was left in an orderly way
}

// Note is a remark in a journal.
type Note struct {
	At   time.Time
	VM   string // empty when it concerns the whole run
	Text string
}

// OpenObligation is an obligation that is not discharged.
type OpenObligation struct {
	Obligation
	Intended  time.Time // when it was recorded
	Confirmed bool      // false: the side effect may or may not have happened
	Handle    string    // what Confirm was given
}

// state is what the records of a journal add up to.
type state struct {
	born     bool
	head     Header
	lastID   uint64
	open     map[ID]OpenObligation
	stages   []Stage
	notes    []Note
	adopted  int
	finished time.Time
	err      error // first record that was not understood
}

func newState() *state { return &state{open: make(map[ID]OpenObligation)} }

func formatID(n uint64) ID { return ID("o" + strconv.FormatUint(n, 10)) }

func (id ID) number() (uint64, bool) {
	digits, ok := strings.CutPrefix(string(id), "o")
	n, err := strconv.ParseUint(digits, 10, 64)
	return n, ok && err == nil && n > 0 && formatID(n) == id
}

// replay applies all frames. It goes on after a record that it does not understand, since
// an obligation must not be hidden by it, and keeps the error.
func (s *state) replay(frames []frame) {
	for _, f := range frames {
		var r record
		err := json.Unmarshal(f.payload, &r)
		if err == nil {
			err = s.apply(r)
		}
		if err != nil && s.err == nil {
			s.err = fmt.Errorf("%w: record %d: %w", ErrFormat, f.seq, err)
		}
	}
}

func (s *state) apply(r record) error {
	switch r.Op {
	case opHead:
		if r.Head == nil {
			return fmt.Errorf("head is empty")
		}
		s.born, s.head = true, *r.Head
		if r.Version != formatVersion {
			return fmt.Errorf("version %d", r.Version)
		}
	case opEnter:
		s.stages = append(s.stages, Stage{Name: r.Stage, VM: r.VM, Entered: r.At})
	case opLeave:
		s.leave(r)
	case opIntend:
		if r.Obligation == nil {
			return fmt.Errorf("obligation is empty")
		}
		_, ok := r.Obligation.ID.number()
		s.open[r.Obligation.ID] = OpenObligation{Obligation: *r.Obligation, Intended: r.At}
		if !ok {
			return fmt.Errorf("obligation has the ID %q", r.Obligation.ID)
		}
		s.sawID(r.Obligation.ID)
		if !r.Obligation.Kind.Valid() {
			return fmt.Errorf("%w %q", ErrKind, r.Obligation.Kind)
		}
	case opConfirm:
		s.sawID(r.ID)
		if o, ok := s.open[r.ID]; ok {
			o.Confirmed, o.Handle = true, r.Text
			s.open[r.ID] = o
		}
	case opDischarge:
		s.sawID(r.ID)
		delete(s.open, r.ID)
	case opNote:
		s.notes = append(s.notes, Note{At: r.At, VM: r.VM, Text: r.Text})
	case opAdopt:
		s.adopted++
	case opEnd:
		s.finished = r.At
	default:
		return fmt.Errorf("operation %q", r.Op)
	}
	return nil
}

// sawID keeps an ID from being given again, even where its intent is lost.
func (s *state) sawID(id ID) {
	if n, ok := id.number(); ok {
		s.lastID = max(s.lastID, n)
	}
}

// leave closes the latest passage of the VM through the stage.
func (s *state) leave(r record) {
	for i := len(s.stages) - 1; i >= 0; i-- {
		if st := &s.stages[i]; st.Name == r.Stage && st.VM == r.VM && !st.Done {
			st.Done, st.Left = true, r.At
			return
		}
	}
	s.stages = append(s.stages, Stage{Name: r.Stage, VM: r.VM, Left: r.At, Done: true})
}

// undoOrder returns the open obligations, by kind, the latest first within a kind.
func (s *state) undoOrder() []OpenObligation {
	out := make([]OpenObligation, 0, len(s.open))
	for _, o := range s.open {
		out = append(out, o.clone())
	}
	slices.SortFunc(out, func(a, b OpenObligation) int {
		x, _ := a.ID.number()
		y, _ := b.ID.number()
		return cmp.Or(cmp.Compare(a.Kind.Order(), b.Kind.Order()), cmp.Compare(y, x), cmp.Compare(a.ID, b.ID))
	})
	return out
}

func (o OpenObligation) clone() OpenObligation {
	if o.Data != nil {
		data := make(map[string]string, len(o.Data))
		for k, v := range o.Data {
			data[k] = v
		}
		o.Data = data
	}
	return o
}
