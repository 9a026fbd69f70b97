package kvm

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path"
	"strconv"
	"strings"
)

// endpoint is a libvirt connection URI taken apart.
type endpoint struct {
	raw       string // as given, for the official binding
	url       *url.URL
	driver    string // "qemu"
	transport string // "unix", "tcp", "tls", "ssh", "libssh", "libssh2"
	local     bool   // the daemon runs on this host: its files are ours too
}

// parseURI understands the URIs of the QEMU driver as libvirt writes them.
func parseURI(s string) (*endpoint, error) {
	u, err := url.Parse(s)
	if err != nil {
		if strings.Contains(s, "@") {
			err = errors.New("it cannot be parsed") // its text, or the reason, may hold a part of a password
		}
		return nil, fmt.Errorf("libvirt URI: %w", err)
	}
	if u.Opaque != "" {
		return nil, errors.New("libvirt URI: it is not of the form qemu+TRANSPORT://HOST/system") // user:password@host is none, and is not shown
	}
	driver, transport, explicit := strings.Cut(u.Scheme, "+")
	if driver != "qemu" {
		return nil, fmt.Errorf("libvirt URI %q: the driver is %q, not qemu", u.Redacted(), driver)
	}
	if !explicit {
		transport = "unix"
		if u.Host != "" {
			transport = "tls"
		}
	}
	switch transport {
	case "unix":
		if u.Host != "" {
			return nil, fmt.Errorf("libvirt URI %q: a unix transport has no host", u.Redacted())
		}
	case "tcp", "tls", "ssh", "libssh", "libssh2":
		if u.Host == "" {
			return nil, fmt.Errorf("libvirt URI %q: the %s transport needs a host", u.Redacted(), transport)
		}
	default:
		return nil, fmt.Errorf("libvirt URI %q: transport %q is not known", u.Redacted(), transport)
	}
	if u.Path != "/system" && u.Path != "/session" {
		return nil, fmt.Errorf("libvirt URI %q: the path is neither /system nor /session", u.Redacted())
	}
	return &endpoint{raw: s, url: u, driver: driver, transport: transport, local: transport == "unix"}, nil
}

// remoteURI is the URI that the daemon is asked to open.
func (e *endpoint) remoteURI() string {
	if name := e.url.Query().Get("name"); name != "" {
		return name
	}
	return e.driver + "://" + e.url.Path
}

// sockets returns the unix sockets to try, in order.
func (e *endpoint) sockets() []string {
	if s := e.url.Query().Get("socket"); s != "" {
		return []string{s}
	}
	dir := "/var/run/libvirt"
	if e.url.Path == "/session" {
		dir = path.Join("/run/user", strconv.Itoa(os.Getuid()), "libvirt")
	}
	return []string{path.Join(dir, "libvirt-sock"), path.Join(dir, "virtqemud-sock")}
}

// unverified names the parameter that turns the check of the daemon's certificate
// or host key off; empty: it is checked.
func (e *endpoint) unverified() string {
	q := e.url.Query()
	if v := q.Get("no_verify"); v != "" && v != "0" {
		return "no_verify"
	}
	if q.Get("known_hosts_verify") == "ignore" {
		return "known_hosts_verify"
	}
	return ""
}

// public is the URI without secrets.
func (e *endpoint) public() string {
	u := *e.url
	u.User = nil
	return u.String()
}
