package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
)

// ParseURL turns an NBD URL into a Config:
//
//	nbd://host[:port]/export
//	nbds://host[:port]/export                  TLS, required
//	nbd+unix:///export?socket=/path/of/socket
//	nbds+unix:///export?socket=/path&tls-hostname=name
//
// The export name is the path without its first slash; the port defaults to 10809 and the host to
// localhost. With nbds the result has RequireTLS set and a TLS configuration holding the server name
// alone; add roots and certificates to it. Parameters that are not understood, or that would weaken
// verification, are errors.
func ParseURL(s string) (Config, error) {
	cfg, err := parseURL(s)
	if err != nil {
		return Config{}, fmt.Errorf("nbd: URL: %w", err)
	}
	return cfg, nil
}

func parseURL(s string) (Config, error) {
	u, err := url.Parse(s)
	if err != nil {
		return Config{}, err
	}
	var cfg Config
	secure, unix := false, false
	switch u.Scheme {
	case "nbd":
	case "nbds":
		secure = true
	case "nbd+unix":
		unix = true
	case "nbds+unix":
		secure, unix = true, true
	default:
		return cfg, fmt.Errorf("scheme %q is not one of nbd, nbds, nbd+unix, nbds+unix", u.Scheme)
	}
	if u.Opaque != "" || u.Fragment != "" {
		return cfg, errors.New("want scheme://host/export without a fragment")
	}
	if u.User != nil {
		return cfg, errors.New("a user is not supported")
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return cfg, err
	}
	params := make(map[string]string, len(query))
	for key, values := range query {
		if len(values) != 1 {
			return cfg, fmt.Errorf("parameter %q is given %d times", key, len(values))
		}
		params[key] = values[0]
	}
	if err := cfg.parseTarget(u, params, unix); err != nil {
		return cfg, err
	}
	cfg.Export = strings.TrimPrefix(u.Path, "/")
	if len(cfg.Export) > maxString || strings.ContainsRune(cfg.Export, 0) {
		return cfg, errors.New("export name is longer than 4096 bytes or contains NUL")
	}
	if secure {
		if err := cfg.parseTLS(u.Hostname(), params, unix); err != nil {
			return cfg, err
		}
	}
	for key := range params {
		return cfg, fmt.Errorf("parameter %q is not supported", key)
	}
	return cfg, nil
}

// parseTarget fills Network and Address.
func (c *Config) parseTarget(u *url.URL, params map[string]string, unix bool) error {
	if unix {
		socket := params["socket"]
		if socket == "" {
			return errors.New("parameter socket is required")
		}
		if u.Host != "" {
			return errors.New("a host makes no sense with a unix socket")
		}
		delete(params, "socket")
		c.Network, c.Address = "unix", socket
		if rest, ok := strings.CutPrefix(socket, "\x00"); ok {
			c.Address = "@" + rest // the abstract namespace, as package net spells it
		}
		if strings.ContainsRune(c.Address, 0) {
			return errors.New("socket contains NUL")
		}
		return nil
	}
	port := u.Port()
	if port == "" {
		port = defaultPort
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("port %q is not within 1..65535", port)
	}
	host := u.Hostname()
	if host == "" {
		host = "localhost"
	}
	c.Network, c.Address = "tcp", net.JoinHostPort(host, port)
	return nil
}

// parseTLS fills RequireTLS and TLS.
func (c *Config) parseTLS(host string, params map[string]string, unix bool) error {
	if v, ok := params["tls-type"]; ok && v != "x509" {
		return fmt.Errorf("tls-type %q is not supported", v)
	}
	if v, ok := params["tls-verify-peer"]; ok && v != "1" {
		return errors.New("verification of the server cannot be turned off in a URL")
	}
	name := params["tls-hostname"]
	if name == "" {
		name = host
	}
	if name == "" && !unix {
		name = "localhost"
	}
	if name == "" {
		return errors.New("parameter tls-hostname is required with a unix socket")
	}
	delete(params, "tls-type")
	delete(params, "tls-verify-peer")
	delete(params, "tls-hostname")
	c.RequireTLS = true
	c.TLS = &tls.Config{ServerName: name, MinVersion: tls.VersionTLS12}
	return nil
}

// URL writes the target of the configuration as an NBD URL that [ParseURL] and other NBD programs
// understand. Only Network, Address, Export, RequireTLS and the TLS server name are represented.
func (c Config) URL() string {
	u := url.URL{Scheme: "nbd", Path: "/" + c.Export}
	if c.RequireTLS {
		u.Scheme = "nbds"
	}
	query := url.Values{}
	host := c.Address
	if c.Network == "unix" {
		u.Scheme += "+unix"
		socket := c.Address
		if rest, ok := strings.CutPrefix(socket, "@"); ok {
			socket = "\x00" + rest
		}
		query.Set("socket", socket)
		host = ""
	} else {
		u.Host = c.Address
		if h, _, err := net.SplitHostPort(c.Address); err == nil {
			host = h
		}
	}
	if c.RequireTLS && c.TLS != nil && c.TLS.ServerName != host && c.TLS.ServerName != "" {
		query.Set("tls-hostname", c.TLS.ServerName)
	}
	u.RawQuery = query.Encode()
	return u.String()
}
