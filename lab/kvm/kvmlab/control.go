package kvmlab

import (
	"bufio"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// guestSh sends one command over the control port: a line "ID BASE64", answered by
// "ID STATUS BASE64".
func (l *Lab) guestSh(domain, command string, timeout time.Duration) (string, error) {
	path, err := l.controlSocket(domain)
	if err != nil {
		return "", err
	}
	conn, err := net.DialTimeout("unix", path, timeout)
	if err != nil {
		return "", err
	}
	out, err := converse(conn, command, timeout)
	return out, errors.Join(err, conn.Close())
}

func converse(conn net.Conn, command string, timeout time.Duration) (string, error) {
	now := time.Now()
	if err := conn.SetDeadline(now.Add(timeout)); err != nil {
		return "", err
	}
	// An answer to an earlier command, given up meanwhile, has another id.
	id := strconv.FormatInt(now.UnixNano(), 36)
	if _, err := fmt.Fprintf(conn, "%s %s\n", id, base64.StdEncoding.EncodeToString([]byte(command))); err != nil {
		return "", err
	}
	r := bufio.NewReader(io.LimitReader(conn, 64<<20))
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return "", fmt.Errorf("control port: %w", err)
		}
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != id {
			continue
		}
		var out []byte
		if len(f) > 2 {
			if out, err = base64.StdEncoding.DecodeString(f[2]); err != nil {
				return "", fmt.Errorf("control port: %w", err)
			}
		}
		if f[1] != "0" {
			return string(out), fmt.Errorf("exit status %s: %s", f[1], strings.TrimSpace(string(out)))
		}
		return string(out), nil
	}
}

// domainChannels is the part of a live definition that says where ports are.
type domainChannels struct {
	Channels []struct {
		Source struct {
			Path string `xml:"path,attr"`
		} `xml:"source"`
		Target struct {
			Name string `xml:"name,attr"`
		} `xml:"target"`
	} `xml:"devices>channel"`
	Serial []struct {
		Source struct {
			Path string `xml:"path,attr"`
		} `xml:"source"`
	} `xml:"devices>serial"`
}

func (l *Lab) channels(domain string) (domainChannels, error) {
	var d domainChannels
	text, err := l.Virsh("dumpxml", domain)
	if err != nil {
		return d, err
	}
	return d, xml.Unmarshal([]byte(text), &d)
}

func (l *Lab) controlSocket(domain string) (string, error) {
	d, err := l.channels(domain)
	if err != nil {
		return "", err
	}
	for _, c := range d.Channels {
		if c.Target.Name == controlPort && c.Source.Path != "" {
			return c.Source.Path, nil
		}
	}
	return "", fmt.Errorf("%s has no control port", domain)
}

// console collects what a guest prints on its serial line.
type console struct {
	mu   sync.Mutex
	text []byte
}

// watchConsole reads the serial line until QEMU closes it.
func (v *VM) watchConsole() {
	d, err := v.lab.channels(v.Name)
	if err != nil || len(d.Serial) == 0 || d.Serial[0].Source.Path == "" {
		return
	}
	tty, err := os.Open(d.Serial[0].Source.Path)
	if err != nil {
		return
	}
	c := &console{}
	v.mu.Lock()
	v.cons = c
	v.mu.Unlock()
	// Ends with the QEMU process, which cleanup ends at the latest.
	go func() {
		defer func() { _ = tty.Close() }()
		buf := make([]byte, 4096)
		for {
			n, err := tty.Read(buf)
			c.mu.Lock()
			c.text = append(c.text, buf[:n]...)
			if over := len(c.text) - 64<<10; over > 0 {
				c.text = append([]byte(nil), c.text[over:]...)
			}
			c.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
}

// Console returns the last 64 KiB that the guest printed since its last start.
func (v *VM) Console() string {
	v.mu.Lock()
	c := v.cons
	v.mu.Unlock()
	if c == nil {
		return ""
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.text)
}
