package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
)

// emit writes one compact object on a line of stdout. It is called with --json
// alone.
func (p *program) emit(v any) { p.writeJSON(p.stdout, v) }

func (p *program) writeJSON(w io.Writer, v any) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		p.ended(exitFailed)
		b.Reset()
		fmt.Fprintf(&b, `{"status":"failed","error":{"code":"failed","message":%q}}`+"\n", err.Error())
	}
	p.write(w, b.Bytes())
}

// write puts a whole line out at once. Output that cannot be written makes the
// command fail, as its reader did not get it.
func (p *program) write(w io.Writer, b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, err := w.Write(b); err != nil && w == p.stdout && severity(exitFailed) > severity(p.worst) {
		p.worst = exitFailed
	}
}

// say prints a line for a person on stdout; nothing with --json.
func (p *program) say(format string, args ...any) {
	if !p.json {
		p.write(p.stdout, []byte(printable(fmt.Sprintf(format, args...))+"\n"))
	}
}

// note prints a line for a person on stderr; an event with --events.
func (p *program) note(text string) {
	if p.events {
		p.writeJSON(p.stderr, event{Event: eventNotice, Time: p.now(), Text: text})
		return
	}
	p.write(p.stderr, []byte(printable(text)+"\n"))
}

// complain prints an error and the next step on stderr; an event with --events.
func (p *program) complain(pr *problem) {
	if p.events {
		p.writeJSON(p.stderr, event{Event: eventError, Time: p.now(), Code: pr.Code, Text: pr.Message, Hint: pr.Hint})
		return
	}
	s := "error: " + pr.Message + "\n"
	if pr.Hint != "" {
		s += "hint: " + pr.Hint + "\n"
	}
	p.write(p.stderr, []byte(printable(s)))
}

// failure is the document of a command that failed as a whole.
type failure struct {
	Status string   `json:"status"`
	Error  *problem `json:"error"`
}

// Values of status in documents.
const (
	statusSuccess  = "success"
	statusDegraded = "degraded"
	statusFailed   = "failed"
)
