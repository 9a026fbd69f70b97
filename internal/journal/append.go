package journal

import (
	"encoding/json"
	"fmt"
	"sync"
)

// Journal is the journal of a run that this process owns. All methods may be called
// concurrently; records that arrive together share one write and one fsync.
type Journal struct {
	opts *Options
	dir  string
	run  string

	token  chan struct{} // capacity 1; its holder is the only one to touch file and the fields below
	file   File
	off    int64  // end of the last good record
	seq    uint64 // its number
	synced uint64 // number of the last record known durable

	mu       sync.Mutex // guards the fields below; never held across a file operation
	st       *state     // what the acknowledged records add up to
	batch    *batch     // records that wait for a writer, nil when none do
	nextID   uint64
	size     int64 // off, for the limits
	failed   error // why the journal takes no more records
	closed   bool
	closeErr error
	closing  chan struct{} // closed when Close has finished
}

// batch is a group of records that become durable together.
type batch struct {
	records []record
	payload [][]byte
	sync    bool // one of them must be durable before it is acknowledged
	done    chan struct{}
	err     error // valid after done
}

func newJournal(opts *Options, dir, run string, f File) *Journal {
	return &Journal{
		opts: opts, dir: dir, run: run, file: f, st: newState(),
		token: make(chan struct{}, 1), closing: make(chan struct{}),
	}
}

// limitOf returns the file size beyond which r is refused.
func limitOf(r record) int64 {
	switch r.Op {
	case opEnter, opLeave, opNote:
		return maxChatter
	case opIntend:
		return maxIntend
	}
	return maxFile - (16 << 20) // leaves room for batches under way
}

// put appends r and returns when it is written, and durable if sync is set. prepare, when not
// nil, runs under the mutex before r is encoded.
func (j *Journal) put(r record, sync bool, prepare func(*record) error) error {
	r.At = j.opts.now()
	j.mu.Lock()
	if j.closed {
		j.mu.Unlock()
		return ErrClosed
	}
	b, err := j.enqueue(r, sync, prepare)
	j.mu.Unlock()
	if err != nil {
		return err
	}
	select {
	case <-b.done:
		return b.err
	case j.token <- struct{}{}:
	}
	j.flush()
	<-j.token
	<-b.done
	return b.err
}

// enqueue adds r to the waiting batch. The caller holds mu.
func (j *Journal) enqueue(r record, sync bool, prepare func(*record) error) (*batch, error) {
	switch {
	case j.failed != nil:
		return nil, fmt.Errorf("%w: %w", ErrBroken, j.failed)
	case j.size > limitOf(r):
		return nil, ErrFull
	}
	if prepare != nil {
		if err := prepare(&r); err != nil {
			return nil, err
		}
	}
	payload, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	if len(payload) > maxPayload {
		return nil, ErrTooLarge
	}
	if j.batch == nil {
		j.batch = &batch{done: make(chan struct{})}
	}
	b := j.batch
	b.records = append(b.records, r)
	b.payload = append(b.payload, payload)
	b.sync = b.sync || sync
	return b, nil
}

// flush writes the waiting batch, if there is one. The caller holds the token.
func (j *Journal) flush() {
	j.mu.Lock()
	b, failed := j.batch, j.failed
	j.batch = nil
	j.mu.Unlock()
	if b == nil {
		return
	}
	if failed != nil { // the batch before this one broke the journal
		b.err = fmt.Errorf("%w: %w", ErrBroken, failed)
		close(b.done)
		return
	}
	var fatal error
	b.err, fatal = j.write(b)

	j.mu.Lock()
	if fatal != nil {
		j.failed = fatal
	}
	if b.err == nil {
		for _, r := range b.records {
			_ = j.st.apply(r) // cannot fail: we made the record
		}
	}
	j.size = j.off
	j.mu.Unlock()
	close(b.done)
}

// write appends the frames of b. After a failed write the file is cut back to the last good
// record, so a full disk does not end the journal; a failed fsync does, because nobody knows what
// it left on the disk. The caller holds the token.
func (j *Journal) write(b *batch) (err, fatal error) {
	var buf []byte
	if j.seq == 0 {
		buf = append(buf, magic...)
	}
	seq := j.seq
	for _, p := range b.payload {
		seq++
		buf = appendFrame(buf, frame{seq: seq, synced: j.synced, payload: p})
	}
	if _, err := j.file.WriteAt(buf, j.off); err != nil {
		if cut := j.file.Truncate(j.off); cut != nil {
			return err, fmt.Errorf("%w (and cutting it back: %w)", err, cut)
		}
		return err, nil
	}
	if b.sync {
		if err := j.file.Sync(); err != nil {
			return err, err
		}
		j.synced = seq
	}
	j.off, j.seq = j.off+int64(len(buf)), seq
	return nil, nil
}

// Run returns the name of the run.
func (j *Journal) Run() string { return j.run }

// Header returns the header that the journal was created with.
func (j *Journal) Header() Header {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.st.head
}

// Open returns the acknowledged obligations that are not discharged, in undo order. The result
// belongs to the caller.
func (j *Journal) Open() []OpenObligation {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.st.undoOrder()
}

// Stage records that vm enters or leaves a stage. vm may be empty for the run as a whole. The
// record is written but not fsynced: it becomes durable with the next obligation.
func (j *Journal) Stage(name, vm string, entered bool) error {
	r := record{Op: opLeave, Stage: name, VM: vm}
	if entered {
		r.Op = opEnter
	}
	return opErr("stage", j.run, j.put(r, false, nil))
}

// Note records a remark, in the manner of Stage. text holds no secret.
func (j *Journal) Note(vm, text string) error {
	return opErr("note", j.run, j.put(record{Op: opNote, VM: vm, Text: text}, false, nil))
}

// Intend records o and returns when it is durable: call it before the side effect, and do not
// cause the effect if it fails. The ID in o is ignored; the one returned names the obligation.
// o is not retained.
func (j *Journal) Intend(o Obligation) (ID, error) {
	if !o.Kind.Valid() {
		return "", opErr("intend", j.run, fmt.Errorf("%w %q", ErrKind, o.Kind))
	}
	o = OpenObligation{Obligation: o}.clone().Obligation
	o.Endpoint = withoutPassword(o.Endpoint)
	err := j.put(record{Op: opIntend, Obligation: &o}, true, func(*record) error {
		j.nextID++
		o.ID = formatID(j.nextID)
		return nil
	})
	if err != nil {
		return "", opErr("intend", j.run, err)
	}
	return o.ID, nil
}

// Confirm records durably that the side effect of an open obligation has happened, with its
// handle (a moref, a snapshot reference, JSON: whatever the undo understands; no secret). A second
// Confirm replaces the handle. An ID that is not open is an ErrUnknown.
func (j *Journal) Confirm(id ID, handle string) error {
	err := j.put(record{Op: opConfirm, ID: id, Text: handle}, true, func(*record) error {
		if _, ok := j.st.open[id]; !ok {
			return fmt.Errorf("%w %q", ErrUnknown, id)
		}
		return nil
	})
	return opErr("confirm", j.run, err)
}

// Discharge records durably that an obligation is undone or kept on purpose. Discharging again
// is allowed and does nothing. An ID that this journal never gave is an ErrUnknown.
func (j *Journal) Discharge(id ID) error {
	j.mu.Lock()
	_, open := j.st.open[id]
	n, ok := id.number()
	known := ok && n <= j.st.lastID
	closed := j.closed
	j.mu.Unlock()
	switch {
	case closed:
		return opErr("discharge", j.run, ErrClosed)
	case open:
		return opErr("discharge", j.run, j.put(record{Op: opDischarge, ID: id}, true, nil))
	case known:
		return nil
	}
	return opErr("discharge", j.run, fmt.Errorf("%w %q", ErrUnknown, id))
}
