package kvm

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"libvirt.org/go/libvirtxml"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// TestWhatIsNotRestoredIsNamed: each part of a definition that reaches into the host is left out
// alone, and named.
func TestWhatIsNotRestoredIsNamed(t *testing.T) {
	const domain = `<domain type='qemu'><name>x</name><memory>65536</memory><vcpu>1</vcpu><os><type>hvm</type>%s</os>%s<devices>%s</devices></domain>`
	for _, c := range []struct{ os, top, device, name string }{
		{name: ""},
		{top: `<memoryBacking><hugepages/></memoryBacking>`, name: "memoryBacking"},
		{top: `<blkiotune><weight>800</weight></blkiotune>`, name: "blkiotune"},
		{top: `<memtune><hard_limit>1</hard_limit></memtune>`, name: "memtune"},
		{top: `<cputune><shares>2</shares></cputune>`, name: "cputune"},
		{top: `<numatune><memory mode='strict' nodeset='0'/></numatune>`, name: "numatune"},
		{top: `<perf><event name='cmt' enabled='yes'/></perf>`, name: "perf"},
		{top: `<keywrap><cipher name='aes' state='off'/></keywrap>`, name: "keywrap"},
		{top: `<launchSecurity type='sev'><policy>1</policy></launchSecurity>`, name: "launchSecurity"},
		{top: `<sysinfo type='fwcfg'><entry name='opt/x'>1</entry></sysinfo>`, name: "sysinfo"},
		{os: `<dtb>/x</dtb>`, name: "device tree"},
		{os: `<acpi><table type='slic'>/x</table></acpi>`, name: "ACPI tables"},
		{os: `<shim>/x</shim>`, name: "shim"},
		{device: `<lease><lockspace>s</lockspace><key>k</key><target path='/x'/></lease>`, name: "lease"},
		{device: `<filesystem type='mount'><source dir='/'/><target dir='root'/></filesystem>`, name: "filesystem"},
		{device: `<smartcard mode='host'/>`, name: "smartcard"},
		{device: `<parallel type='pty'><target port='0'/></parallel>`, name: "parallel port"},
		{device: `<hostdev mode='subsystem' type='usb'><source><vendor id='0x1'/><product id='0x2'/></source></hostdev>`, name: "hostdev"},
		{device: `<shmem name='s'><model type='ivshmem-plain'/></shmem>`, name: "shmem"},
		{device: `<memory model='dimm'><target><size>1</size><node>0</node></target></memory>`, name: "memory device"},
		{device: `<crypto model='virtio' type='qemu'><backend model='builtin'/></crypto>`, name: "crypto device"},
		{device: `<pstore backend='acpi-erst'><path>/x</path></pstore>`, name: "pstore"},
		{device: `<vsock model='virtio'><cid auto='yes'/></vsock>`, name: "vsock"},
		{device: `<emulator>/home/x/qemu</emulator>`, name: "emulator /home/x/qemu"},
		{device: `<serial type='tcp'><source mode='connect' host='h' service='1'/><target port='0'/></serial>`, name: "backend of a serial port"},
		{device: `<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>`, name: "TPM"},
		{device: `<input type='evdev'><source dev='/dev/input/event1'/></input>`, name: "input evdev"},
		{device: `<graphics type='sdl'/>`, name: "display"},
		{device: `<redirdev bus='usb' type='tcp'><source mode='connect' host='h' service='1'/></redirdev>`, name: "redirdev"},
	} {
		old, err := parseDomain(fmt.Sprintf(domain, c.os, c.top, c.device))
		require.NoError(t, err, c.name)
		got := harmless(new(libvirtxml.Domain), old)
		if c.name == "" {
			require.Empty(t, got)
			continue
		}
		require.Equal(t, []string{c.name}, got)
	}
	if _, err := os.Stat("/dev/kvm"); err != nil {
		old, err := parseDomain(`<domain type='kvm'><name>x</name></domain>`)
		require.NoError(t, err)
		require.Contains(t, strings.Join(harmless(new(libvirtxml.Domain), old), ","), "hardware virtualisation")
	}
}

// TestMalformedDocuments: what a daemon, an agent or a token cannot say is an error, with its kind.
func TestMalformedDocuments(t *testing.T) {
	f := newFakeConn(fakeDomain)
	d := fakeDriver(t, f)
	var count int
	for _, answer := range []string{`{"return":`, `{"return":"text"}`, `{"return":5}`} {
		f.agentReply = func(string) (string, error) { return answer, nil }
		err := d.agentCall(t.Context(), testUUID, "guest-x", &count)
		if answer == `{"return":5}` {
			require.NoError(t, err)
			require.Equal(t, 5, count)
			continue
		}
		require.ErrorContains(t, err, "answer of the guest agent to guest-x")
	}
	_, err := parseDomain("<domain")
	require.ErrorContains(t, err, "domain XML")
	_, err = parseDomain(strings.Repeat(" ", maxDomainXML+1))
	require.ErrorContains(t, err, "bytes")
	_, err = parseJob("<domainbackup")
	require.ErrorContains(t, err, "backup XML")
	_, err = parseCheckpoint("<domaincheckpoint")
	require.ErrorContains(t, err, "checkpoint XML")
	for token, says := range map[string]string{
		"{": "baseline token:", `{"v":2,"created":1}`: "version 2", `{"v":1}`: "created 0", `{"v":1,"created":1,"disks":["/"]}`: `disk "/"`,
		strings.Repeat(" ", maxToken+1): "bytes",
	} {
		_, err := parseToken(token)
		require.ErrorContains(t, err, says)
	}
	for description, known := range map[string]bool{`{"v":1,"disks":{"vda":{"content":"c","size":1}}}`: true, `{"v":2,"disks":{"vda":{}}}`: false, `{"v":1,"disks":{"vda":{"size":"1"}}}`: false} {
		_, ok := (&checkpoint{Description: description}).description().Disks["vda"]
		require.Equal(t, known, ok, description)
	}
	for _, meta := range []string{"<a", "<a><b></a>", `<d:domain xmlns:d="` + metadataURI + `"><created incomplete="yes"></d:domain>`, `<d:domain xmlns:d="` + metadataURI + `"><created><file size="x"/></created></d:domain>`} {
		_, err := notesOf(&libvirtxml.Domain{Metadata: &libvirtxml.DomainMetadata{XML: meta}})
		require.ErrorContains(t, err, "domain metadata", meta)
	}
	// Damaged metadata of others hide no VM, but no note is written over it.
	f.xml = strings.Replace(fakeDomain, "<!--metadata-->", `<metadata><h:domain xmlns:h="`+metadataURI+`"><created><file size="x"/></created></h:domain></metadata>`, 1)
	vm, err := d.VM(t.Context(), vmID)
	require.NoError(t, err)
	require.Empty(t, vm.Owner)
	require.ErrorContains(t, d.editNotes(t.Context(), testUUID, affectLive, func(*notes) {}), "domain metadata")
	f.xml = "<domain"
	for name, call := range map[string]func() error{
		"inventory": func() error { _, err := d.VM(t.Context(), vmID); return err },
		"notes":     func() error { _, err := d.readNotes(t.Context(), testUUID, 0); return err },
	} {
		require.ErrorContains(t, call(), "domain XML", name)
	}
	f.xml = fakeDomain
	f.job = "<domainbackup"
	_, err = d.pendingName(t.Context(), testUUID)
	require.ErrorContains(t, err, "backup XML")
	f.cps["holdfast-c0ffee00-run1-snap"] = "<domaincheckpoint"
	_, err = d.checkpoint(t.Context(), testUUID, "holdfast-c0ffee00-run1-snap")
	require.ErrorContains(t, err, "checkpoint XML")
	f.job = ""
	_, err = collect(d.Baselines(t.Context(), vmID))
	require.ErrorContains(t, err, "checkpoint XML")
	spec := &hypervisor.VMSpec{Name: "x", Native: &hypervisor.NativeConfig{Format: nativeFormat, Data: []byte("<domain")}}
	_, _, err = buildDomain(spec, nil, nil, &notes{Created: &createdNote{}})
	require.ErrorContains(t, err, "definition in the restore point")
	spec.Native = nil
	_, _, err = buildDomain(spec, nil, nil, &notes{})
	require.ErrorContains(t, err, "no content")
}

// TestImageHeaders reads headers that are cut, damaged or lie.
func TestImageHeaders(t *testing.T) {
	header := func(edit func(b []byte) []byte) []byte {
		b := make([]byte, 4096)
		be := binary.BigEndian
		be.PutUint32(b, qcow2Magic)
		be.PutUint32(b[4:], 3)
		be.PutUint64(b[24:], 1<<20)
		be.PutUint32(b[100:], 104)
		return edit(b)
	}
	set32 := func(at int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { binary.BigEndian.PutUint32(b[at:], v); return b }
	}
	backing := func(off uint64, n uint32) func([]byte) []byte {
		return func(b []byte) []byte {
			binary.BigEndian.PutUint64(b[8:], off)
			binary.BigEndian.PutUint32(b[16:], n)
			return b
		}
	}
	extension := func(n uint32, cut int) func([]byte) []byte {
		return func(b []byte) []byte {
			binary.BigEndian.PutUint32(b[104:], extBackFormat)
			binary.BigEndian.PutUint32(b[108:], n)
			return b[:cut]
		}
	}
	for name, c := range map[string]struct {
		b    []byte
		says string
	}{
		"good":                {header(func(b []byte) []byte { return b }), ""},
		"short":               {header(func(b []byte) []byte { return b[:71] }), "71 bytes"},
		"short version 3":     {header(func(b []byte) []byte { return b[:80] }), "80 bytes"},
		"no magic":            {header(set32(0, 1)), "no magic"},
		"version":             {header(set32(4, 4)), "version 4"},
		"name outside":        {header(backing(8192, 10)), "backing file name"},
		"name too long":       {header(backing(200, 2000)), "2000 bytes"},
		"length":              {header(set32(100, 8)), "length 8"},
		"format name":         {header(extension(65, 4096)), "65 bytes"},
		"format name cut off": {header(extension(20, 116)), "backing format"},
		"bare":                {header(func(b []byte) []byte { return b[:104] }), ""},
	} {
		path := filepath.Join(t.TempDir(), "x")
		require.NoError(t, os.WriteFile(path, c.b, 0o600))
		_, err := headerOf(path)
		if c.says == "" {
			require.NoError(t, err, name)
			continue
		}
		require.ErrorContains(t, err, c.says, name)
	}
	_, err := headerOf(filepath.Join(t.TempDir(), "none"))
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = headerOf(t.TempDir())
	require.Error(t, err)
	dir := t.TempDir()
	top, bottom := filepath.Join(dir, "top"), filepath.Join(dir, "bottom")
	require.NoError(t, os.WriteFile(bottom, nil, 0o600))
	for next, want := range map[string]string{"bottom": bottom, "gone": top, "nbd:x": top} {
		b := header(backing(200, uint32(len(next))))
		copy(b[200:], next)
		require.NoError(t, os.WriteFile(top, b, 0o600))
		got, h := chainBottom(top, "qcow2")
		require.Equal(t, want, got)
		require.NotNil(t, h)
	}
	require.NoError(t, os.WriteFile(top, []byte("damaged"), 0o600))
	got, h := chainBottom(top, "qcow2")
	require.Equal(t, top, got)
	require.Nil(t, h)
}

// TestContentOfFiles: a file is what it is behind links; what cannot be looked at is its path.
func TestContentOfFiles(t *testing.T) {
	dir := t.TempDir()
	file, link := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	require.NoError(t, os.Symlink(file, link))
	id, err := fileIdentity(file)
	if err != nil {
		t.Skip("needs statx")
	}
	real, err := filepath.EvalSymlinks(file)
	require.NoError(t, err)
	require.Equal(t, "file:"+real+"#"+id, fileContent(file, true))
	require.Equal(t, fileContent(file, true), fileContent(link, true))
	require.Equal(t, "path:"+file, fileContent(file, false))
	require.Equal(t, "path:"+dir+"/none", fileContent(dir+"/none", true))
	require.Equal(t, "block:/dev/null", fileContent("/dev/null", true))
	_, err = fileIdentity(dir + "/none")
	require.ErrorIs(t, err, os.ErrNotExist)
	_, _, err = freeSpace(dir + "/none")
	require.ErrorIs(t, err, os.ErrNotExist)
	require.True(t, mayStore(dir+"/none", "08"))
	require.True(t, slices.Contains([]string{"kvm", "qemu"}, domainType()))
}

// TestOwnNames: names of others are refused.
func TestOwnNames(t *testing.T) {
	_, err := ownName("snapshot-1")
	require.Error(t, err)
	a, err := ownName("")
	require.NoError(t, err)
	b, err := ownName("")
	require.NoError(t, err)
	require.NotEqual(t, a, b)
	require.True(t, hypervisor.IsOurs(a))
}
