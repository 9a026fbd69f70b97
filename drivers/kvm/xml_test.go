package kvm

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

// validate holds a document against one of libvirt's schemas.
func validate(t *testing.T, schema, text string) {
	t.Helper()
	tool := kvmlab.NeedTool(t, "xmllint")
	rng := filepath.Join("/usr/share/libvirt/schemas", schema+".rng")
	if _, err := os.Stat(rng); err != nil {
		kvmlab.Missing(t, "tools", rng)
	}
	file := filepath.Join(t.TempDir(), "doc.xml")
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	out, err := exec.Command(tool, "--noout", "--relaxng", rng, file).CombinedOutput()
	require.NoError(t, err, "%s\n%s", out, text)
}

const hostileDomain = `<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>evil</name><uuid>` + testUUID + `</uuid><memory unit='KiB'>65536</memory><vcpu cpuset='0-3'>2</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><loader readonly='yes' type='pflash'>/etc/shadow</loader><kernel>/etc/passwd</kernel></os>
<cputune><vcpupin vcpu='0' cpuset='1'/></cputune>
<unheardof/>
<devices><emulator>/tmp/evil</emulator>
<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/sda'/><target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/etc/shadow'/><target dev='vdb' bus='virtio'/></disk>
<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='/etc/passwd'/><target dev='sda' bus='sata'/><readonly/></disk>
<hostdev mode='subsystem' type='pci' managed='yes'><source><address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source></hostdev>
<filesystem type='mount'><source dir='/'/><target dir='root'/></filesystem>
<serial type='file'><source path='/etc/cron.d/x'/><target port='0'/></serial>
<channel type='unix'><source mode='bind' path='/run/evil.sock'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<graphics type='vnc' port='5900' listen='0.0.0.0' passwd='x'/>
<rng model='virtio'><backend model='random'>/etc/shadow</backend></rng>
<shmem name='x'><model type='ivshmem-plain'/></shmem>
<novelty/>
</devices>
<qemu:commandline><qemu:arg value='-device'/></qemu:commandline></domain>`

func TestHostileDefinitionIsTamed(t *testing.T) {
	spec := &hypervisor.VMSpec{
		Name: "tame", Hardware: hypervisor.Hardware{CPUs: 2, MemoryBytes: 64 * mib, Firmware: hypervisor.UEFI},
		NICs:   []hypervisor.NIC{{ID: "nic0", Network: "user", Model: "virtio", Connected: true}},
		Native: &hypervisor.NativeConfig{Format: nativeFormat, Data: []byte(hostileDomain)},
	}
	disks := []plannedDisk{{DiskSpec: hypervisor.DiskSpec{ID: "vda", Size: mib}, dev: "vda", bus: "virtio", format: "qcow2", path: "/store/tame-vda.qcow2"}}
	n := &notes{Created: &createdNote{Owner: "holdfast-c0ffee00-r1-vm", Incomplete: "yes", Files: []fileNote{{Path: `/store/a"<b>&.qcow2`, Disk: "vda", Size: mib}}}}
	text, dropped, err := buildDomain(spec, disks, map[string]string{attachNVRAM: "/store/tame_VARS.fd"}, n)
	require.NoError(t, err)
	for _, bad := range []string{
		"/etc/", "/tmp/evil", "/dev/sda", "/run/evil", "hostdev", "filesystem", "shmem", "qemu:", "commandline",
		"0.0.0.0", "cpuset", "novelty", "unheardof", testUUID, "passwd",
	} {
		require.NotContains(t, text, bad)
	}
	for _, what := range []string{"qemu:commandline", "unheardof", "device novelty", "hostdev", "filesystem", "shmem", "cputune", "disk vdb", "medium in sda", "random number generator"} {
		require.True(t, slices.Contains(dropped, what), "%s is not reported: %v", what, dropped)
	}
	dom, err := parseDomain(text)
	require.NoError(t, err)
	back, err := notesOf(dom)
	require.NoError(t, err)
	require.Equal(t, n.Created, back.Created)
	validate(t, "domain", text)
}

func TestForeignHardwareIsValid(t *testing.T) {
	spec := &hypervisor.VMSpec{
		Name: "plain", Hardware: hypervisor.Hardware{CPUs: 4, CoresPerSocket: 2, MemoryBytes: 64 * mib, Firmware: hypervisor.UEFI, SecureBoot: true, Boot: []string{"sda"}},
		NICs: []hypervisor.NIC{{ID: "x", Network: "bridge:br0", Model: "vmxnet3"}},
	}
	disks := []plannedDisk{{DiskSpec: hypervisor.DiskSpec{ID: "sda", Size: mib}, dev: "sda", bus: "scsi", format: "raw", path: "/store/x.raw"}}
	text, dropped, err := buildDomain(spec, disks, nil, &notes{Created: &createdNote{Owner: "holdfast-c0ffee00-r1-vm"}})
	require.NoError(t, err)
	require.Empty(t, dropped)
	require.Contains(t, text, `order="1"`)
	validate(t, "domain", text)
}

func TestJobDocumentsAreValid(t *testing.T) {
	f := newFakeConn(fakeDomain)
	var job, cp string
	f.begin = func(j *backupJob, c string) (err error) {
		job, err = marshalXML(j)
		cp = c
		return err
	}
	d := fakeDriver(t, f)
	require.NoError(t, backup(t, d, &hypervisor.SnapshotOptions{ExcludeDisks: []hypervisor.DiskID{"vdb"}}))
	validate(t, "domainbackup", job)
	validate(t, "domaincheckpoint", cp)
	require.Contains(t, job, `<disk name="vdb" backup="no">`)
	require.Contains(t, cp, `<disk name="vdb" checkpoint="no">`)
	require.Contains(t, cp, `<disk name="sda" checkpoint="no">`)
}

func TestClassification(t *testing.T) {
	for name, c := range map[string]struct {
		xml    string
		snap   bool
		track  hypervisor.Tracking
		reason hypervisor.Reason
	}{
		"qcow2":          {`<disk type='file'><driver type='qcow2'/><source file='/x'/><target dev='vda' bus='virtio'/></disk>`, true, hypervisor.TrackingBlocks, ""},
		"qcow2 on block": {`<disk type='block'><driver type='qcow2'/><source dev='/dev/x'/><target dev='vda' bus='virtio'/></disk>`, true, hypervisor.TrackingBlocks, ""},
		"raw":            {`<disk type='file'><driver type='raw'/><source file='/x'/><target dev='vda' bus='virtio'/></disk>`, true, hypervisor.TrackingNone, hypervisor.ReasonNeverTracked},
		"no driver":      {`<disk type='file'><source file='/x'/><target dev='vda' bus='virtio'/></disk>`, true, hypervisor.TrackingNone, hypervisor.ReasonNeverTracked},
		"raw block":      {`<disk type='block'><driver type='raw'/><source dev='/dev/x'/><target dev='vda' bus='virtio'/></disk>`, true, hypervisor.TrackingNone, hypervisor.ReasonNeverTracked},
		"rbd":            {`<disk type='network'><driver type='raw'/><source protocol='rbd' name='p/i'/><target dev='vda' bus='virtio'/></disk>`, true, hypervisor.TrackingNone, hypervisor.ReasonNeverTracked},
		"cdrom":          {`<disk type='file' device='cdrom'><source file='/x.iso'/><target dev='sda' bus='sata'/><readonly/></disk>`, false, hypervisor.TrackingNone, hypervisor.ReasonCDROM},
		"floppy":         {`<disk type='file' device='floppy'><target dev='fda' bus='fdc'/></disk>`, false, hypervisor.TrackingNone, hypervisor.ReasonCDROM},
		"read-only":      {`<disk type='file'><driver type='qcow2'/><source file='/x'/><target dev='vda' bus='virtio'/><readonly/></disk>`, false, hypervisor.TrackingNone, hypervisor.ReasonReadOnly},
		"shareable":      {`<disk type='file'><driver type='raw'/><source file='/x'/><target dev='vda' bus='virtio'/><shareable/></disk>`, false, hypervisor.TrackingNone, hypervisor.ReasonShared},
		"lun":            {`<disk type='block' device='lun'><driver type='raw'/><source dev='/dev/x'/><target dev='sda' bus='scsi'/></disk>`, false, hypervisor.TrackingNone, hypervisor.ReasonPassthrough},
		"nvme":           {`<disk type='nvme'><driver type='raw'/><source type='pci' managed='yes' namespace='1'><address domain='0' bus='1' slot='0' function='0'/></source><target dev='vda' bus='virtio'/></disk>`, false, hypervisor.TrackingNone, hypervisor.ReasonPassthrough},
		"transient":      {`<disk type='file'><driver type='qcow2'/><source file='/x'/><target dev='vda' bus='virtio'/><transient/></disk>`, false, hypervisor.TrackingNone, hypervisor.ReasonIndependent},
		"hostile target": {`<disk type='file'><driver type='qcow2'/><source file='/x'/><target dev='../x' bus='virtio'/></disk>`, false, hypervisor.TrackingNone, hypervisor.ReasonRefused},
		"directory":      {`<disk type='dir'><driver type='fat'/><source dir='/x'/><target dev='vda' bus='virtio'/></disk>`, false, hypervisor.TrackingNone, hypervisor.ReasonRefused},
		"SCSI hostdev":   {`<hostdev mode='subsystem' type='scsi'><source><adapter name='scsi_host0'/><address bus='0' target='0' unit='0'/></source></hostdev>`, false, hypervisor.TrackingNone, hypervisor.ReasonPassthrough},
		"unknown PCI":    {`<hostdev mode='subsystem' type='pci'><source><address domain='0xffff' bus='0xff' slot='0x1f' function='0x7'/></source></hostdev>`, false, hypervisor.TrackingNone, hypervisor.ReasonPassthrough},
	} {
		dom, err := parseDomain("<domain><devices>" + c.xml + "</devices></domain>")
		require.NoError(t, err, name)
		list := hostDevices(dom, true)
		if len(dom.Devices.Disks) > 0 {
			list = []hypervisor.Disk{classify(&dom.Devices.Disks[0], 0, true)}
		}
		require.Len(t, list, 1, name)
		d := list[0]
		require.Equal(t, c.snap, d.Snapshottable, name)
		require.Equal(t, c.track, d.Tracking, name)
		require.Equal(t, c.reason, d.Reason, name)
		require.True(t, c.reason == "" || d.Detail != "", name)
	}
}

// qcow2Header makes the header of an image.
func qcow2Header(version uint32, incompatible uint64, backing string) []byte {
	b := make([]byte, 512)
	be := binary.BigEndian
	be.PutUint32(b, qcow2Magic)
	be.PutUint32(b[4:], version)
	be.PutUint64(b[24:], 1<<20)
	if version == 3 {
		be.PutUint64(b[72:], incompatible)
		be.PutUint32(b[100:], 104)
	}
	if backing != "" {
		be.PutUint64(b[8:], 256)
		be.PutUint32(b[16:], uint32(len(backing)))
		copy(b[256:], backing)
	}
	return b
}

func TestQcow2HeaderDecides(t *testing.T) {
	h, err := readHeader(bytes.NewReader(qcow2Header(3, 1<<1|1<<2, "base")))
	require.NoError(t, err)
	require.True(t, h.corrupt)
	require.True(t, h.dataFile)
	require.Equal(t, "base", h.backing)
	h, err = readHeader(bytes.NewReader(qcow2Header(2, 0, "")))
	require.NoError(t, err)
	track, reason, _ := tracking("qcow2", h)
	require.Equal(t, hypervisor.TrackingNone, track)
	require.Equal(t, hypervisor.ReasonNeverTracked, reason)
	for _, bad := range [][]byte{nil, make([]byte, 512), qcow2Header(4, 0, "")[:100]} {
		_, err := readHeader(bytes.NewReader(bad))
		require.Error(t, err)
	}
}

func FuzzParseDomain(f *testing.F) {
	f.Add(fakeDomain)
	f.Add(hostileDomain)
	f.Add("<domain><devices><disk><source/><address/></disk><interface type='x'/></devices></domain>")
	f.Fuzz(func(t *testing.T, text string) {
		dom, err := parseDomain(text)
		if err != nil {
			return
		}
		hardware(dom)
		nics(dom)
		agentChannel(dom)
		osinfo(dom)
		for i := range dom.Devices.Disks {
			classify(&dom.Devices.Disks[i], i, false)
		}
		hostDevices(dom, false)
		_, _ = notesOf(dom)
		spec := &hypervisor.VMSpec{Name: "x", Hardware: hypervisor.Hardware{CPUs: 1, MemoryBytes: mib}, Native: &hypervisor.NativeConfig{Format: nativeFormat, Data: []byte(text)}}
		out, _, err := buildDomain(spec, nil, nil, &notes{Created: &createdNote{Owner: "holdfast-c0ffee00-r1-vm"}})
		if err == nil && strings.Contains(out, "commandline") && !strings.Contains(text, "<description>") && !strings.Contains(text, "<title>") {
			if again, perr := parseDomain(out); perr == nil && again.QEMUCommandline != nil {
				t.Fatalf("a command line passed:\n%s", out)
			}
		}
	})
}

func FuzzQcow2Header(f *testing.F) {
	f.Add(qcow2Header(3, 0, "base"))
	f.Add(qcow2Header(2, 0, ""))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = readHeader(bytes.NewReader(b)) })
}

func FuzzToken(f *testing.F) {
	f.Add(`{"v":1,"created":1,"disks":["vda"],"content":"x","size":1}`)
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := parseToken(s)
		if err == nil && slices.ContainsFunc(tok.Disks, func(d string) bool { return !hypervisor.ValidDiskID(hypervisor.DiskID(d)) }) {
			t.Fatalf("disk names %q", tok.Disks)
		}
	})
}
