package kvm

import (
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// password matches a canary where a URI has its password.
var password = regexp.MustCompile(`^[^/?#@:]*:(//[^/?#@:]*:)?S3CRET@[^@]*$`)

// FuzzURI: a URI is understood in full or refused, and whatever is said of it holds
// no password.
func FuzzURI(f *testing.F) {
	for _, s := range []string{
		"qemu:///system", "qemu:///session?socket=/tmp/s", "qemu+ssh://user@host:22/system?keyfile=/k&no_verify=1",
		"qemu+tls://u:S3CRET@host/system", "qemu+tls://u:S3CRET@ho st/system", "xen:///", "qemu+tcp:///system",
		"qemu+ssh://%zz:S3CRET@h/system", "qemu://u:S3CRET@:x/system",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		e, err := parseURI(s)
		if err != nil {
			if password.MatchString(s) {
				require.NotContains(t, err.Error(), "S3CRET")
			}
			return
		}
		require.Equal(t, "qemu", e.driver)
		require.Equal(t, e.url.Host == "", e.local, "a path of a remote host would be taken for one of this host")
		require.Contains(t, []string{"/system", "/session"}, e.url.Path)
		require.NotEmpty(t, e.sockets())
		require.NotEmpty(t, e.remoteURI())
		again, err := parseURI(e.public())
		require.NoError(t, err)
		require.Equal(t, e.transport, again.transport)
		require.Nil(t, again.url.User)
		if pw, set := e.url.User.Password(); set && len(pw) > 3 && !strings.Contains(e.url.Host+e.url.RawQuery+e.url.Fragment+e.url.Path+e.url.Scheme, pw) {
			require.NotContains(t, e.public(), pw)
		}
	})
}

// FuzzJob: a job is taken for ours only if every disk of it that is backed up writes
// to a scratch file of one owner of ours and of this domain.
func FuzzJob(f *testing.F) {
	const uuid = "6b3c2a50-5d4e-4f6a-9d7e-0123456789ab"
	const owner = "holdfast-c0ffee00-r1-snap"
	f.Add(`<domainbackup mode="pull"><server transport="unix" socket="/s"/><disks>` +
		`<disk name="vda" backup="yes"><scratch file="/x/` + scratchName(owner, uuid, "vda") + `"/></disk>` +
		`<disk name="vdb" backup="no"/></disks></domainbackup>`)
	f.Add(`<domainbackup mode="push"><disks><disk name="vda"/></disks></domainbackup>`)
	f.Add(`<domainbackup><disks><disk name="vda"><scratch file="` + scratchName("someone", uuid, "vda") + `"/></disk></disks></domainbackup>`)
	f.Add(`<domainbackup>` + strings.Repeat("<disks>", 200))
	f.Fuzz(func(t *testing.T, text string) {
		j, err := parseJob(text)
		if err != nil {
			return
		}
		name := j.owner(uuid)
		if name == "" {
			return
		}
		require.True(t, hypervisor.IsOurs(name))
		for _, d := range j.Disks {
			if d.Backup == "no" {
				continue
			}
			n, id, disk, ok := parseScratch(path.Base(d.Scratch.File))
			require.True(t, ok)
			require.Equal(t, name, n)
			require.Equal(t, uuid, id)
			require.Equal(t, path.Base(d.Scratch.File), scratchName(n, id, disk))
		}
	})
}

// FuzzCheckpoint: the baseline that is made of any checkpoint can be read back, or
// not at all, but never as something else.
func FuzzCheckpoint(f *testing.F) {
	f.Add(`<domaincheckpoint><name>holdfast-c0ffee00-r1-snap</name><description>{"v":1,"disks":{"vda":{"content":"c","size":512}}}</description>` +
		`<creationTime>1700000000</creationTime><disks><disk name="vda" checkpoint="bitmap" bitmap="b"/><disk name="vdb" checkpoint="no"/></disks></domaincheckpoint>`)
	f.Add(`<domaincheckpoint><description>{"v":2}</description><creationTime>-1</creationTime></domaincheckpoint>`)
	f.Add(`<domaincheckpoint><disks><disk name="../x"/></disks></domaincheckpoint>`)
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parseCheckpoint(text)
		if err != nil {
			return
		}
		require.True(t, slices.IsSorted(c.tracked()))
		b, err := baselineOf("vm", c, "vda")
		require.NoError(t, err)
		require.Equal(t, c.Name, b.Name)
		tok, err := parseToken(b.Token)
		if err != nil {
			return
		}
		require.Equal(t, c.Created, tok.Created)
		require.Equal(t, c.tracked(), tok.Disks)
		require.Equal(t, c.description().Disks["vda"].Size, tok.Size)
	})
}

// FuzzAgentAnswer: a guest is not trusted: whatever its agent says is an answer of
// the right form or an error.
func FuzzAgentAnswer(f *testing.F) {
	f.Add(`{"return":3}`)
	f.Add(`{"return":"thawed"}`)
	f.Add(`{"error":{"class":"GenericError","desc":"no"}}`)
	f.Add(`{"return":null}`)
	f.Add(`{}`)
	f.Add(`[]`)
	f.Fuzz(func(t *testing.T, text string) {
		for _, out := range []any{nil, new(int), new(string), new(struct{ Version string })} {
			_ = decodeAgent("guest-info", text, out)
		}
		var n int
		if decodeAgent("guest-fsfreeze-freeze", text, &n) == nil && n != 0 {
			require.Contains(t, text, "return")
		}
	})
}
