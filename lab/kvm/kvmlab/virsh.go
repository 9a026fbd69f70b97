package kvmlab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
)

// Virsh runs a command of virsh with a deadline of one minute, and returns what it
// prints, trimmed. One argument alone is a line of commands, separated by
// semicolons.
//
// A virsh of its own per command costs more than most commands (its libraries, the
// connection), and a test asks dozens of them. So a few that read commands from
// their input are kept until the process ends.
func (l *Lab) Virsh(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	if strings.Contains(strings.Join(args, ""), "\n") {
		return run(ctx, "virsh", append([]string{"-q", "-c", l.URI}, args...)...)
	}
	s, err := shells.take(l.URI)
	if err != nil {
		return "", err
	}
	out, err := s.do(ctx, args)
	if s.broken {
		s.close()
	} else {
		shells.give(l.URI, s)
	}
	if err != nil {
		err = fmt.Errorf("virsh %s: %w", strings.Join(args, " "), errors.Join(ctx.Err(), err))
	}
	return out, err
}

// shells are those that nobody uses now.
var shells = pool{idle: map[string][]*shell{}}

type pool struct {
	mu   sync.Mutex
	idle map[string][]*shell
}

func (p *pool) take(uri string) (*shell, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.idle[uri]); n > 0 {
		s := p.idle[uri][n-1]
		p.idle[uri] = p.idle[uri][:n-1]
		return s, nil
	}
	return openShell(uri)
}

func (p *pool) give(uri string, s *shell) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.idle[uri] = append(p.idle[uri], s)
}

// shell is a virsh that reads commands from its input. It ends with its input, and
// so with the process that opened it.
type shell struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	errs   *bufio.Reader
	next   int
	broken bool // what it prints next may be anything
}

func openShell(uri string) (*shell, error) {
	cmd := exec.Command("virsh", "-q", "-c", uri)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "LIBVIRT_AUTOSTART=0", "TERM=dumb", "INPUTRC=/dev/null", "VIRSH_HISTSIZE=0")
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	errs, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &shell{cmd: cmd, in: in, out: bufio.NewReader(out), errs: bufio.NewReader(errs)}, nil
}

func (s *shell) close() {
	_ = s.cmd.Process.Kill()
	_ = s.in.Close()
	_ = s.cmd.Wait()
}

// prompt is what virsh prints before it reads a command, which it then repeats, a
// long one in part.
const prompt = "virsh # "

// do runs one command. Where its output and its errors end, a mark shows that
// virsh is asked to print on both.
func (s *shell) do(ctx context.Context, args []string) (string, error) {
	s.next++
	mark := "end-of-" + strconv.Itoa(s.next)
	echo, echoErr := "echo "+mark, "echo --err "+mark
	defer context.AfterFunc(ctx, func() { _ = s.cmd.Process.Kill() })()

	type answer struct {
		text string
		err  error
	}
	failed := make(chan answer, 1)
	go func() {
		text, err := until(s.errs, "error: "+mark+"\n")
		failed <- answer{text, err}
	}()
	_, werr := io.WriteString(s.in, quoted(args)+"\n"+echo+"\n"+echoErr+"\n")
	out, rerr := until(s.out, prompt+echo+"\n"+mark)
	if rerr == nil {
		_, rerr = until(s.out, prompt+echoErr+"\n")
	}
	said := <-failed
	if err := errors.Join(werr, rerr, said.err); err != nil {
		s.broken = true
		return "", errors.Join(err, errors.New(strings.TrimSpace(said.text)))
	}
	_, out, _ = strings.Cut(out, "\n") // the command, repeated
	out = strings.TrimSpace(out)
	if strings.Contains(said.text, "error: ") {
		s.broken = strings.Contains(said.text, "Disconnected")
		return out, errors.New(strings.TrimSpace(said.text))
	}
	return out, nil
}

// until reads up to end, and returns what was before it.
func until(r *bufio.Reader, end string) (string, error) {
	var b bytes.Buffer
	last := end[len(end)-1]
	for {
		part, err := r.ReadSlice(last)
		b.Write(part)
		if text, ok := bytes.CutSuffix(b.Bytes(), []byte(end)); ok {
			return string(text), nil
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return b.String(), err
		}
	}
}

// quoted writes the arguments as a line that virsh takes apart again. One argument
// alone is such a line already, as it is on the command line of virsh.
func quoted(args []string) string {
	if len(args) == 1 {
		return args[0]
	}
	var out []string
	for _, a := range args {
		out = append(out, "'"+strings.ReplaceAll(a, "'", `'\''`)+"'")
	}
	return strings.Join(out, " ")
}
