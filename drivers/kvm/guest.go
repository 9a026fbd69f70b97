package kvm

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"strings"
	"time"

	"libvirt.org/go/libvirtxml"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// probeTimeout is how long an inventory waits for a guest agent.
const probeTimeout = 2 * time.Second

// guest tells what is known of the system inside; probe asks the agent.
func (d *Driver) guest(ctx context.Context, m *machine, probe bool) hypervisor.GuestInfo {
	g := hypervisor.GuestInfo{OS: osinfo(m.dom)}
	g.Family = family(g.OS)
	present, state := agentChannel(m.dom)
	switch {
	case !present:
		g.AgentWhy = "the VM has no channel org.qemu.guest_agent.0"
	case !m.active():
		g.AgentWhy = "the VM is off"
	case m.state != stateRunning && m.state != stateBlocked:
		g.AgentWhy = "the VM is paused"
	case state == "disconnected":
		g.AgentWhy = "qemu-guest-agent does not run in the guest"
	case !probe:
		g.Agent = true // as far as the channel tells
	default:
		actx, cancel := context.WithTimeout(ctx, probeTimeout)
		defer cancel()
		info, err := d.guestOS(actx, m.UUID)
		if err != nil && !answered(err) {
			g.AgentWhy = "qemu-guest-agent does not answer: " + err.Error()
			return g
		}
		g.Agent = true
		if info.ID != "" {
			g.OS, g.Family = strings.TrimSpace(info.Name+" "+info.Version), info.family()
		}
	}
	return g
}

// guestOS is what the agent says of the guest's operating system.
type guestOS struct {
	ID      string `json:"id"`
	Name    string `json:"name"`
	Version string `json:"version"`
}

func (g guestOS) family() string {
	if g.ID == "mswindows" {
		return "windows"
	}
	return "linux"
}

func (d *Driver) guestOS(ctx context.Context, uuid string) (guestOS, error) {
	var info guestOS
	err := d.agentCall(ctx, uuid, "guest-get-osinfo", &info)
	return info, err
}

// agentError is an error that the agent itself answered.
type agentError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *agentError) Error() string { return "guest agent: " + e.Desc }

// answered reports whether err came from the agent, which therefore lives.
func answered(err error) bool {
	var ae *agentError
	if errors.As(err, &ae) {
		return true
	}
	switch virCode(err) {
	case virAgentCommandFailed:
		return true
	case virInternal:
		// Older daemons give an agent's error this number and these words.
		return strings.Contains(err.Error(), "unable to execute QEMU agent command")
	}
	return false
}

// agentCall sends a command without arguments to the guest agent and decodes its
// answer. The daemon is told to give up when ctx ends.
func (d *Driver) agentCall(ctx context.Context, uuid, command string, out any) error {
	seconds := 10
	if t, ok := ctx.Deadline(); ok {
		// Deadlines of contexts are in system time, whatever the clock is.
		seconds = max(int(time.Until(t)/time.Second), 1)
	}
	text, err := d.conn.agent(ctx, uuid, `{"execute":"`+command+`"}`, seconds)
	if err != nil {
		return err
	}
	return decodeAgent(command, text, out)
}

// decodeAgent decodes the answer to a command; out may be nil.
func decodeAgent(command, text string, out any) error {
	var reply struct {
		Return json.RawMessage `json:"return"`
		Error  *agentError     `json:"error"`
	}
	if err := json.Unmarshal([]byte(text), &reply); err != nil {
		return fmt.Errorf("answer of the guest agent to %s: %w", command, err)
	}
	if reply.Error != nil {
		return reply.Error
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(reply.Return, out); err != nil {
		return fmt.Errorf("answer of the guest agent to %s: %w", command, err)
	}
	return nil
}

// osinfo returns the operating system that the definition names in libosinfo's
// metadata, such as "http://microsoft.com/win/11".
func osinfo(dom *libvirtxml.Domain) string {
	if dom.Metadata == nil {
		return ""
	}
	dec := xml.NewDecoder(strings.NewReader(dom.Metadata.XML))
	for {
		tok, err := dec.Token()
		if err != nil {
			return ""
		}
		if s, ok := tok.(xml.StartElement); ok && s.Name.Local == "os" {
			for _, a := range s.Attr {
				if a.Name.Local == "id" {
					return a.Value
				}
			}
		}
	}
}

func family(os string) string {
	switch {
	case os == "":
		return ""
	case strings.Contains(os, "microsoft.com"):
		return "windows"
	case strings.Contains(os, "bsd"), strings.Contains(os, "solaris"), strings.Contains(os, "haiku"):
		return ""
	}
	return "linux"
}
