package kvm

import (
	"context"
	"encoding/xml"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

const testUUID = "6f9b1a1e-5d5e-4a4c-9d6a-0123456789ab"

// fakeConn is a daemon with one domain, for error paths that a real daemon
// produces too seldom. fail is asked before every call, by the call's name, and
// may also block.
type fakeConn struct {
	mu      sync.Mutex
	oldQEMU bool // older than 6.0: knows no set-action
	fail    func(ctx context.Context, call string) error
	calls   []string
	xml     string
	state0  int
	reason  int
	job     string // backup XML of the job that runs
	cps     map[string]string
	meta    map[uint32]string
	starts  int

	// begin, if set, judges a job before it begins.
	begin func(job *backupJob, cp string) error
	// gone: there is no domain until one is defined. other: there is a second one.
	gone, other bool
	// lost are disks whose bitmaps are gone from their images.
	lost []string
	// pools are directories by the name of their storage pool.
	pools map[string]string
	// agentReply answers agent commands.
	agentReply func(command string) (string, error)
	jobKind    int
}

func newFakeConn(xml string) *fakeConn {
	return &fakeConn{xml: xml, state0: stateRunning, cps: map[string]string{}, meta: map[uint32]string{}}
}

func (f *fakeConn) enter(ctx context.Context, call string) error {
	f.mu.Lock()
	f.calls = append(f.calls, call)
	fail := f.fail
	f.mu.Unlock()
	if fail != nil {
		if err := fail(ctx, call); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (f *fakeConn) called(call string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, c := range f.calls {
		if strings.HasPrefix(c, call) {
			n++
		}
	}
	return n
}

func vir(code int, format string, args ...any) error {
	return &virError{code: code, msg: fmt.Sprintf(format, args...)}
}

func (f *fakeConn) leaf() string { return "fake" }

func (f *fakeConn) versions(ctx context.Context) (uint64, uint64, error) {
	return 9000000, 7002022, f.enter(ctx, "versions")
}

func (f *fakeConn) hostname(ctx context.Context) (string, error) {
	return "host", f.enter(ctx, "hostname")
}

func (f *fakeConn) domains(ctx context.Context) ([]string, error) {
	var out []string
	if !f.gone {
		out = append(out, testUUID)
	}
	if f.other {
		out = append(out, otherUUID)
	}
	return out, f.enter(ctx, "domains")
}

func (f *fakeConn) lookupName(ctx context.Context, name string) (string, error) {
	if err := f.enter(ctx, "lookupName"); err != nil {
		return "", err
	}
	if name != "web1" || f.gone {
		return "", vir(virNoDomain, "Domain not found")
	}
	return testUUID, nil
}

func (f *fakeConn) find(ctx context.Context, call, uuid string) error {
	if err := f.enter(ctx, call); err != nil {
		return err
	}
	if uuid == otherUUID && f.other {
		return nil
	}
	if uuid != testUUID || f.gone {
		return vir(virNoDomain, "Domain not found: no domain with matching uuid '%s'", uuid)
	}
	return nil
}

func (f *fakeConn) domainXML(ctx context.Context, uuid string, flags uint32) (string, error) {
	err := f.find(ctx, "domainXML", uuid)
	if uuid == otherUUID && err == nil {
		return otherDomain, nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	which := uint32(affectConfig)
	if flags&xmlInactive == 0 && active(f.state0) {
		which = affectLive
	}
	meta := ""
	if m := f.meta[which]; m != "" {
		m = strings.TrimSuffix(strings.TrimPrefix(m, "<domain>"), "</domain>")
		meta = `<metadata><h:domain xmlns:h="` + metadataURI + `">` + m + `</h:domain></metadata>`
	}
	return strings.Replace(f.xml, "<!--metadata-->", meta, 1), err
}

func (f *fakeConn) state(ctx context.Context, uuid string) (int, int, error) {
	err := f.find(ctx, "state", uuid)
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state0, f.reason, err
}

func (f *fakeConn) persistent(ctx context.Context, uuid string) (bool, error) {
	return true, f.find(ctx, "persistent", uuid)
}

func (f *fakeConn) managedSave(ctx context.Context, uuid string) (bool, error) {
	return false, f.find(ctx, "managedSave", uuid)
}

func (f *fakeConn) capacity(ctx context.Context, uuid, _ string) (int64, error) {
	return 1 << 20, f.find(ctx, "capacity", uuid)
}

func (f *fakeConn) define(ctx context.Context, text string) (string, error) {
	if err := f.enter(ctx, "define"); err != nil {
		return "", err
	}
	dom, err := parseDomain(text)
	if err != nil {
		return "", err
	}
	n, err := notesOf(dom)
	if err != nil {
		return "", err
	}
	meta, err := n.render()
	if err != nil {
		return "", err
	}
	dom.UUID, dom.Metadata = testUUID, nil
	text, err = marshalDomain(dom)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.xml = strings.Replace(text, "</uuid>", "</uuid><!--metadata-->", 1)
	f.meta[affectConfig], f.state0, f.gone = meta, stateShutoff, false
	return testUUID, err
}

func (f *fakeConn) undefine(ctx context.Context, uuid string, _ uint32) error {
	if err := f.find(ctx, "undefine", uuid); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.gone = true
	return nil
}

func (f *fakeConn) start(ctx context.Context, uuid string, flags uint32) error {
	if err := f.find(ctx, "start", uuid); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state0 = statePaused
	if flags&startPaused == 0 {
		f.state0 = stateRunning
	}
	f.meta[affectLive] = f.meta[affectConfig]
	f.starts++
	return nil
}

func (f *fakeConn) destroy(ctx context.Context, uuid string) error {
	if err := f.find(ctx, "destroy", uuid); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state0, f.job = stateShutoff, ""
	return nil
}

func (f *fakeConn) shutdown(ctx context.Context, uuid string) error {
	if err := f.find(ctx, "shutdown", uuid); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state0, f.reason = stateShutoff, shutoffShutdown
	return nil
}

func (f *fakeConn) resume(ctx context.Context, uuid string) error {
	if err := f.find(ctx, "resume", uuid); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state0 = stateRunning
	return nil
}

func (f *fakeConn) setMetadata(ctx context.Context, uuid, xml string, flags uint32) error {
	if err := f.find(ctx, "setMetadata", uuid); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.meta[flags] = xml
	return nil
}

func (f *fakeConn) jobType(ctx context.Context, uuid string) (int, error) {
	err := f.find(ctx, "jobType", uuid)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.job != "" || f.jobKind != 0 {
		return 2, err
	}
	return jobNone, err
}

func (f *fakeConn) jobOperation(ctx context.Context, uuid string) (int, error) {
	err := f.find(ctx, "jobOperation", uuid)
	if f.jobKind != 0 {
		return f.jobKind, err
	}
	return jobOperationBackup, err
}

func (f *fakeConn) abortJob(ctx context.Context, uuid string) error {
	if err := f.find(ctx, "abortJob", uuid); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.job == "" {
		return vir(virOperationInvalid, "Requested operation is not valid: no job is active on the domain")
	}
	f.job = ""
	return nil
}

func (f *fakeConn) blockJob(ctx context.Context, uuid, _ string) (int, bool, error) {
	return 0, false, f.find(ctx, "blockJob", uuid)
}

func (f *fakeConn) backupBegin(ctx context.Context, uuid, job, cp string, _ uint32) error {
	if err := f.find(ctx, "backupBegin", uuid); err != nil {
		return err
	}
	j, err := parseJob(job)
	if err != nil {
		return err
	}
	if f.begin != nil {
		if err := f.begin(j, cp); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.job = job
	if cp == "" {
		return nil
	}
	c, err := parseCheckpoint(cp)
	if err != nil {
		return err
	}
	c.Created = 1700000000
	text, err := xml.Marshal(c)
	f.cps[c.Name] = string(text)
	return err
}

func (f *fakeConn) backupXML(ctx context.Context, uuid string) (string, error) {
	if err := f.find(ctx, "backupXML", uuid); err != nil {
		return "", err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.job == "" {
		return "", vir(virNoBackup, "Domain backup job id not found: no domain backup job present")
	}
	return f.job, nil
}

func (f *fakeConn) checkpoints(ctx context.Context, uuid string) ([]string, error) {
	err := f.find(ctx, "checkpoints", uuid)
	f.mu.Lock()
	defer f.mu.Unlock()
	var names []string
	for n := range f.cps {
		names = append(names, n)
	}
	slices.Sort(names)
	return names, err
}

func (f *fakeConn) checkpointXML(ctx context.Context, uuid, name string, _ uint32) (string, error) {
	if err := f.find(ctx, "checkpointXML", uuid); err != nil {
		return "", err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	text, ok := f.cps[name]
	if !ok {
		return "", vir(virNoCheckpoint, "Domain checkpoint not found: no domain checkpoint with matching name '%s'", name)
	}
	return text, nil
}

func (f *fakeConn) checkpointCreate(ctx context.Context, uuid, text string, _ uint32) error {
	if err := f.find(ctx, "checkpointCreate", uuid); err != nil {
		return err
	}
	c, err := parseCheckpoint(text)
	if err != nil {
		return err
	}
	if disk := f.lostOf(c); disk != "" {
		return vir(virCheckpointBroken, "checkpoint inconsistent: missing or broken bitmap '%s' for disk '%s'", c.Name, disk)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cps[c.Name] = text
	return nil
}

// lostOf names a disk of a checkpoint whose bitmap is lost.
func (f *fakeConn) lostOf(c *checkpoint) string {
	for _, disk := range c.tracked() {
		if slices.Contains(f.lost, disk) {
			return disk
		}
	}
	return ""
}

func (f *fakeConn) checkpointDelete(ctx context.Context, uuid, name string, flags uint32) error {
	if err := f.find(ctx, fmt.Sprintf("checkpointDelete/%d", flags), uuid); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	text, ok := f.cps[name]
	if !ok {
		return vir(virNoCheckpoint, "Domain checkpoint not found: no domain checkpoint with matching name '%s'", name)
	}
	if c, err := parseCheckpoint(text); flags&metadataOnly == 0 && (err != nil || f.lostOf(c) != "") {
		return vir(virCheckpointBroken, "checkpoint inconsistent: a bitmap of '%s' is lost", name)
	}
	delete(f.cps, name)
	return nil
}

func (f *fakeConn) agent(ctx context.Context, uuid, command string, _ int) (string, error) {
	if err := f.find(ctx, "agent "+command, uuid); err != nil {
		return "", err
	}
	if f.agentReply == nil {
		return "", vir(virAgentUnresponsive, "Guest agent is not responding: QEMU guest agent is not connected")
	}
	return f.agentReply(command)
}

// monitor ends the domain on system_reset; on quit too, but then the answer is lost,
// as QEMU and libvirt have it.
func (f *fakeConn) monitor(ctx context.Context, uuid, command string) (string, error) {
	if err := f.find(ctx, "monitor "+command, uuid); err != nil {
		return "", err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch command {
	case `{"execute":"set-action","arguments":{"reboot":"shutdown"}}`:
		if f.oldQEMU {
			return "", vir(virInternal, "unable to execute QEMU command: The command set-action has not been found")
		}
	case `{"execute":"system_reset"}`:
		f.state0, f.reason, f.job = stateShutoff, shutoffShutdown, ""
	case `{"execute":"quit"}`:
		f.state0, f.reason, f.job = stateShutoff, shutoffShutdown, ""
		return "", vir(virSystemError, "Unable to read from monitor: Connection reset by peer")
	default:
		return "", vir(virOperationInvalid, "the fake knows no %s", command)
	}
	return "{}", nil
}

func (f *fakeConn) networkExists(ctx context.Context, name string) (bool, error) {
	return name == "default", f.enter(ctx, "networkExists")
}

func (f *fakeConn) poolXML(ctx context.Context, name string) (string, error) {
	return "<pool type='dir'><target><path>" + f.pools[name] + "</path></target></pool>", f.enter(ctx, "poolXML")
}

func (f *fakeConn) close() error { return nil }

var _ conn = (*fakeConn)(nil)

const fakeDomain = `<domain type='qemu'><name>web1</name><uuid>` + testUUID + `</uuid><!--metadata-->
<memory unit='KiB'>65536</memory><vcpu>2</vcpu><os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os>
<devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/nowhere/a.qcow2'/><target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/nowhere/b.qcow2'/><target dev='vdb' bus='virtio'/></disk>
<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
</devices></domain>`

const otherUUID = "00000000-5d5e-4a4c-9d6a-0123456789ab"

const otherDomain = `<domain type='qemu'><name>other</name><uuid>` + otherUUID + `</uuid><memory unit='KiB'>65536</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>
<interface type='user'><mac address='52:54:00:00:00:99'/></interface></devices></domain>`

// fakeDriver is a driver on a fake daemon that counts as local.
func fakeDriver(t *testing.T, f *fakeConn) *Driver {
	t.Helper()
	ep, err := parseURI("qemu:///system")
	require.NoError(t, err)
	cfg, err := Config{URI: ep.raw, ScratchDir: t.TempDir(), StorageDir: t.TempDir(), ScratchMinFree: 1, ScratchReserve: 1, SocketDir: "/tmp"}.withDefaults()
	require.NoError(t, err)
	d, err := newDriver(t.Context(), cfg, ep, f)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	return d
}
