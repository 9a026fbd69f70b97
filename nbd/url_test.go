package nbd_test

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/nbd"
)

func TestParseURL(t *testing.T) {
	type target struct {
		network, address, export string
		tls                      string
	}
	rows := map[string]target{
		"nbd://example.com":                               {"tcp", "example.com:10809", "", ""},
		"nbd://example.com/disk":                          {"tcp", "example.com:10809", "disk", ""},
		"nbd://example.com:1//disk":                       {"tcp", "example.com:1", "/disk", ""},
		"nbd://example.com/hello%20world":                 {"tcp", "example.com:10809", "hello world", ""},
		"nbd://example.com/a/b%2Fc":                       {"tcp", "example.com:10809", "a/b/c", ""},
		"nbd:///x":                                        {"tcp", "localhost:10809", "x", ""},
		"nbd://[::1]:5/x":                                 {"tcp", "[::1]:5", "x", ""},
		"nbds://example.com/x":                            {"tcp", "example.com:10809", "x", "example.com"},
		"nbds://10.0.0.1/x?tls-hostname=h&tls-type=x509":  {"tcp", "10.0.0.1:10809", "x", "h"},
		"nbds://h/?tls-verify-peer=1":                     {"tcp", "h:10809", "", "h"},
		"nbd+unix:///?socket=/tmp/s":                      {"unix", "/tmp/s", "", ""},
		"nbd+unix:///vda?socket=%2Ftmp%2Fa%20b":           {"unix", "/tmp/a b", "vda", ""},
		"nbd+unix:///?socket=%00abstract":                 {"unix", "@abstract", "", ""},
		"nbds+unix:///vda?socket=s&tls-hostname=kvm1.lan": {"unix", "s", "vda", "kvm1.lan"},
	}
	for s, want := range rows {
		cfg, err := nbd.ParseURL(s)
		require.NoError(t, err, s)
		got := target{cfg.Network, cfg.Address, cfg.Export, ""}
		require.Equal(t, want.tls != "", cfg.RequireTLS, s)
		if cfg.TLS != nil {
			got.tls = cfg.TLS.ServerName
		}
		require.Equal(t, want, got, s)
	}
	for _, s := range []string{
		"", "x", "http://h/", "nbd+tcp://h", "nbd:host", "nbd://h:0/", "nbd://h:65536/", "nbd://h:x/",
		"nbd://u@h/", "nbd://u:p@h/", "nbd://h/#f", "nbd://h/?socket=s", "nbd://h/?x=1", "nbd://h/?%zz",
		"nbd://h/%00", "nbd+unix:///x", "nbd+unix:///?socket=", "nbd+unix://h/?socket=s",
		"nbd+unix:///?socket=a&socket=b", "nbd+unix:///?socket=a%00b", "nbds+unix:///?socket=s",
		"nbds://h/?tls-verify-peer=0", "nbds://h/?tls-type=psk", "nbds://h/?tls-certificates=/x",
		"nbd://h/?tls-hostname=x",
	} {
		_, err := nbd.ParseURL(s)
		require.Error(t, err, "%q", s)
	}
}

func TestConfigIsChecked(t *testing.T) {
	ok := nbd.Config{Network: "unix", Address: "/nowhere/at/all"}
	for name, change := range map[string]func(*nbd.Config){
		"no address": func(c *nbd.Config) { c.Address = "" },
		"export":     func(c *nbd.Config) { c.Export = "a\x00b" },
		"inflight":   func(c *nbd.Config) { c.Inflight = -1 },
		"many":       func(c *nbd.Config) { c.Connections = 1000 },
		"retries":    func(c *nbd.Config) { c.Retries = -1 },
		"context":    func(c *nbd.Config) { c.MetaContexts = []string{"nocolon"} },
	} {
		cfg := ok
		change(&cfg)
		cfg.Dialer = nil
		_, err := nbd.Dial(context.Background(), cfg)
		require.Error(t, err, name)
		require.NotErrorIs(t, err, nbd.ErrConnectionLost, name)
	}
	_, err := nbd.Dial(context.Background(), ok)
	require.ErrorIs(t, err, fs.ErrNotExist)
}

// The error numbers match the portable conditions of the standard library.
func TestErrnoMatches(t *testing.T) {
	require.ErrorIs(t, &nbd.RequestError{Errno: nbd.ENOTSUP}, errors.ErrUnsupported)
	require.ErrorIs(t, &nbd.RequestError{Errno: nbd.EPERM}, fs.ErrPermission)
	require.ErrorIs(t, &nbd.RequestError{Errno: nbd.EINVAL}, fs.ErrInvalid)
	require.NotErrorIs(t, &nbd.RequestError{Errno: nbd.EIO}, io.EOF)
}
