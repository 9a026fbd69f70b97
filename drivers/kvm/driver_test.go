package kvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

const vmID hypervisor.VMID = testUUID

// backup makes a snapshot and releases it.
func backup(t *testing.T, d *Driver, opts *hypervisor.SnapshotOptions) error {
	t.Helper()
	s, err := d.CreateSnapshot(t.Context(), vmID, opts)
	if err != nil {
		return err
	}
	return s.Release(t.Context(), nil)
}

// goodAgent answers as a Linux guest that freezes and thaws.
func goodAgent() func(string) (string, error) {
	var frozen atomic.Bool
	return func(command string) (string, error) {
		switch {
		case strings.Contains(command, "fsfreeze-freeze"):
			frozen.Store(true)
			return `{"return":2}`, nil
		case strings.Contains(command, "fsfreeze-thaw"):
			frozen.Store(false)
			return `{"return":2}`, nil
		case strings.Contains(command, "fsfreeze-status"):
			if frozen.Load() {
				return `{"return":"frozen"}`, nil
			}
			return `{"return":"thawed"}`, nil
		case strings.Contains(command, "get-osinfo"):
			return `{"return":{"id":"debian","name":"Debian","version":"12"}}`, nil
		}
		return "", vir(virInternal, "unable to execute QEMU agent command: unknown command")
	}
}

// TestEveryFailedCallSurfacesAndLeavesNothing fails each call of a quiesced
// backup once.
func TestEveryFailedCallSurfacesAndLeavesNothing(t *testing.T) {
	opts := &hypervisor.SnapshotOptions{Quiesce: hypervisor.FilesystemConsistent, MinConsistency: hypervisor.FilesystemConsistent}
	f := newFakeConn(fakeDomain)
	f.agentReply = goodAgent()
	require.NoError(t, backup(t, fakeDriver(t, f), opts))
	total := len(f.calls)
	require.Greater(t, total, 20)
	for k := range total {
		f := newFakeConn(fakeDomain)
		f.agentReply = goodAgent()
		d := fakeDriver(t, f)
		n, planted := 0, errors.New("planted")
		var what string
		f.mu.Lock()
		f.calls = nil
		f.mu.Unlock()
		f.fail = func(_ context.Context, call string) error {
			f.mu.Lock()
			defer f.mu.Unlock()
			n++
			if n == k+1 {
				what = call
				return planted
			}
			return nil
		}
		s, err := d.CreateSnapshot(t.Context(), vmID, opts)
		if err != nil {
			require.ErrorIs(t, err, planted, "call %d %s", k, what)
		} else {
			if err = s.Release(t.Context(), nil); err != nil {
				require.ErrorIs(t, err, planted, "call %d %s", k, what)
				require.NoError(t, s.Release(t.Context(), nil), "release again after call %d %s", k, what)
			}
		}
		require.Empty(t, f.job, "call %d %s", k, what)
		require.Empty(t, f.cps, "call %d %s", k, what)
		status, aerr := f.agentReply("guest-fsfreeze-status")
		require.NoError(t, aerr)
		require.Contains(t, status, "thawed", "call %d %s", k, what)
	}
}

func TestOfflineStartIsUndoneWhenTheJobFails(t *testing.T) {
	f := newFakeConn(fakeDomain)
	f.state0, f.reason = stateShutoff, shutoffDestroyed
	f.begin = func(*backupJob, string) error { return vir(virSystemError, "Cannot create scratch") }
	d := fakeDriver(t, f)
	_, err := d.CreateSnapshot(t.Context(), vmID, nil)
	require.Error(t, err)
	require.Equal(t, 1, f.starts)
	require.Equal(t, stateShutoff, f.state0)
	require.Empty(t, f.meta[affectConfig], "no note stays")
}

// TestCleanEndIsKept: the end of a domain that had shut down is no destruction, even
// if the answer to quit is lost.
func TestCleanEndIsKept(t *testing.T) {
	for name, old := range map[string]bool{"reset": false, "quit": true} {
		t.Run(name, func(t *testing.T) {
			f := newFakeConn(fakeDomain)
			f.state0, f.reason, f.oldQEMU = stateShutoff, shutoffShutdown, old
			d := fakeDriver(t, f)
			for range 2 {
				s, err := d.CreateSnapshot(t.Context(), vmID, nil)
				require.NoError(t, err)
				require.Equal(t, hypervisor.ApplicationConsistent, s.Consistency().Level)
				require.NoError(t, s.Release(t.Context(), nil))
			}
			require.Zero(t, f.called("destroy"))
			require.Equal(t, old, f.called(`monitor {"execute":"quit"}`) > 0)
		})
	}
}

// TestStartedDomainInUseIsLeft: somebody resumed the domain that we started.
func TestStartedDomainInUseIsLeft(t *testing.T) {
	f := newFakeConn(fakeDomain)
	f.state0, f.reason = stateShutoff, shutoffShutdown
	d := fakeDriver(t, f)
	s, err := d.CreateSnapshot(t.Context(), vmID, nil)
	require.NoError(t, err)
	require.Equal(t, hypervisor.ApplicationConsistent, s.Consistency().Level)
	f.state0 = stateRunning
	require.NoError(t, s.Release(t.Context(), nil))
	require.Equal(t, stateRunning, f.state0)
	require.Zero(t, f.called("destroy"))
	require.Empty(t, f.meta[affectLive])
	require.Empty(t, f.meta[affectConfig])
}

func TestInvalidBaselineCostsOnlyItsDisk(t *testing.T) {
	f := newFakeConn(fakeDomain)
	d := fakeDriver(t, f)
	first, err := d.CreateSnapshot(t.Context(), vmID, nil)
	require.NoError(t, err)
	a, err := first.Baseline("vda")
	require.NoError(t, err)
	b, err := first.Baseline("vdb")
	require.NoError(t, err)
	require.NoError(t, first.Release(t.Context(), []hypervisor.DiskID{"vda", "vdb"}))
	f.begin = func(j *backupJob, _ string) error {
		if j.Disks[0].Incremental != "" {
			return vir(virCheckpointBroken, "checkpoint inconsistent: missing or broken bitmap '%s' for disk 'vda'", a.Name)
		}
		return nil
	}
	s, err := d.CreateSnapshot(t.Context(), vmID, &hypervisor.SnapshotOptions{Since: []hypervisor.Baseline{a, b}})
	require.NoError(t, err)
	j, err := parseJob(f.job)
	require.NoError(t, err)
	require.Equal(t, "full", j.Disks[0].Mode)
	require.Equal(t, "incremental", j.Disks[1].Mode)
	require.Equal(t, b.Name, j.Disks[1].Incremental)
	for _, err = range s.Extents(t.Context(), "vda", &a) {
	}
	require.Equal(t, hypervisor.ReasonInconsistent, hypervisor.BaselineReason(err))
	bogus := b
	bogus.Token += " "
	for _, err = range s.Extents(t.Context(), "vdb", &bogus) {
	}
	require.ErrorIs(t, err, hypervisor.ErrBaselineInvalid)
	require.NoError(t, s.Release(t.Context(), nil))
	// Forgetting one disk's baseline keeps the checkpoint for the other.
	require.NoError(t, d.ForgetBaseline(t.Context(), a))
	require.Len(t, f.cps, 1)
	require.NoError(t, d.ForgetBaseline(t.Context(), b))
	require.Empty(t, f.cps)
	require.NoError(t, d.ForgetBaseline(t.Context(), b))
}

func TestUntrackableDiskIsFoundOut(t *testing.T) {
	f := newFakeConn(fakeDomain)
	f.begin = func(_ *backupJob, cp string) error {
		c, err := parseCheckpoint(cp)
		if err != nil {
			return err
		}
		if len(c.tracked()) == 2 {
			return vir(virConfigUnsupported, "unsupported configuration: checkpoint for disk vdb unsupported for storage type qcow2")
		}
		return nil
	}
	d := fakeDriver(t, f)
	s, err := d.CreateSnapshot(t.Context(), vmID, nil)
	require.NoError(t, err)
	require.Equal(t, hypervisor.TrackingNone, s.VM().Disk("vdb").Tracking)
	_, err = s.Baseline("vdb")
	require.Equal(t, hypervisor.ReasonNeverTracked, hypervisor.BaselineReason(err))
	_, err = s.Baseline("vda")
	require.NoError(t, err)
	require.NoError(t, s.Release(t.Context(), nil))
}

func TestForeignJobIsNamed(t *testing.T) {
	f := newFakeConn(fakeDomain)
	d := fakeDriver(t, f)
	f.jobKind = 5
	_, err := d.CreateSnapshot(t.Context(), vmID, nil)
	require.ErrorIs(t, err, hypervisor.ErrBusy)
	require.ErrorContains(t, err, "outgoing migration")
	require.Zero(t, f.called("backupBegin"))
	f.jobKind = 0
	f.job = `<domainbackup mode='pull'><disks><disk name='vda' backup='yes'><scratch file='/x/other'/></disk></disks></domainbackup>`
	_, err = d.CreateSnapshot(t.Context(), vmID, nil)
	require.ErrorIs(t, err, hypervisor.ErrBusy)
	for range d.Snapshots(t.Context(), vmID) {
		require.Fail(t, "a foreign job is not ours")
	}
	require.NotEmpty(t, f.job)
}

func TestQuiesceOutcomes(t *testing.T) {
	silent := vir(virAgentUnresponsive, "Guest agent is not responding: guest agent didn't respond to synchronization within '5' seconds")
	for name, c := range map[string]struct {
		agent   func(string) (string, error)
		min     hypervisor.Consistency
		level   hypervisor.Consistency
		pending bool
		err     error
	}{
		"works": {agent: goodAgent(), level: hypervisor.FilesystemConsistent},
		"agent fails": {agent: func(c string) (string, error) {
			if strings.Contains(c, "freeze-freeze") {
				return `{"error":{"class":"GenericError","desc":"hook failed"}}`, nil
			}
			return goodAgent()(c)
		}},
		"agent fails below minimum": {agent: func(c string) (string, error) {
			if strings.Contains(c, "freeze-freeze") {
				return "", vir(virInternal, "unable to execute QEMU agent command 'guest-fsfreeze-freeze': failed")
			}
			return goodAgent()(c)
		}, min: hypervisor.FilesystemConsistent, err: hypervisor.ErrQuiesce},
		"agent silent": {agent: func(string) (string, error) { return "", silent }, pending: true},
		"agent silent below minimum": {
			agent: func(string) (string, error) { return "", silent },
			min:   hypervisor.FilesystemConsistent, err: hypervisor.ErrThawPending,
		},
		"guest thaws by itself": {agent: func(c string) (string, error) {
			if strings.Contains(c, "freeze-freeze") {
				return `{"return":1}`, nil
			}
			return goodAgent()(c) // thawed at once
		}},
		"nothing to freeze": {agent: func(c string) (string, error) {
			if strings.Contains(c, "freeze-freeze") {
				return `{"return":0}`, nil
			}
			return goodAgent()(c)
		}},
		"application cannot be proven": {agent: goodAgent(), min: hypervisor.ApplicationConsistent, err: hypervisor.ErrQuiesce},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFakeConn(fakeDomain)
			f.agentReply = c.agent
			d := fakeDriver(t, f)
			s, err := d.CreateSnapshot(t.Context(), vmID, &hypervisor.SnapshotOptions{
				Quiesce: max(hypervisor.FilesystemConsistent, c.min), MinConsistency: c.min, QuiesceTimeout: 2 * time.Second,
			})
			if c.err != nil {
				require.ErrorIs(t, err, c.err)
				require.Empty(t, f.job)
				require.Empty(t, f.cps)
				require.Zero(t, f.called("backupBegin"))
				return
			}
			require.NoError(t, err)
			got := s.Consistency()
			require.Equal(t, c.level, got.Level)
			require.Equal(t, c.pending, got.ThawPending)
			require.Equal(t, c.level < hypervisor.FilesystemConsistent, got.Reason != "")
			require.NoError(t, s.Release(t.Context(), nil))
			if c.pending {
				require.Contains(t, f.meta[affectLive], "freeze", "the obligation is noted")
				require.ErrorIs(t, d.Thaw(t.Context(), vmID), hypervisor.ErrThawPending)
				f.mu.Lock()
				f.agentReply = goodAgent()
				f.mu.Unlock()
				require.NoError(t, d.Thaw(t.Context(), vmID))
			}
			require.NotContains(t, f.meta[affectLive], "freeze")
		})
	}
}

func TestHungBeginIsBoundedByCleanup(t *testing.T) {
	f := newFakeConn(fakeDomain)
	d := fakeDriver(t, f)
	ctx, cancel := context.WithCancel(t.Context())
	f.fail = func(_ context.Context, call string) error {
		if call == "backupBegin" {
			cancel() // the caller gives up while the call is under way
		}
		return nil
	}
	_, err := d.CreateSnapshot(ctx, vmID, nil)
	require.ErrorIs(t, err, context.Canceled)
	require.Empty(t, f.job)
	require.Empty(t, f.cps)
}

func TestLeftScratchFilesAreOrphans(t *testing.T) {
	f := newFakeConn(fakeDomain)
	d := fakeDriver(t, f)
	name := "holdfast-c0ffee00-run1-snap"
	file := filepath.Join(d.cfg.ScratchDir, scratchName(name, testUUID, "vda"))
	other := filepath.Join(d.cfg.ScratchDir, scratchName(name, "00000000-0000-0000-0000-000000000000", "vda"))
	for _, p := range []string{file, other} {
		require.NoError(t, os.WriteFile(p, nil, 0o600))
	}
	var refs []hypervisor.SnapshotRef
	for r, err := range d.Snapshots(t.Context(), vmID) {
		require.NoError(t, err)
		refs = append(refs, r)
	}
	require.Len(t, refs, 1)
	require.Equal(t, name, refs[0].Name)
	s, err := d.OpenSnapshot(t.Context(), refs[0])
	require.NoError(t, err)
	_, err = s.OpenDisk(t.Context(), "vda")
	require.Error(t, err)
	require.NoError(t, s.Release(t.Context(), nil))
	require.NoFileExists(t, file)
	require.FileExists(t, other, "of another VM")
}

func TestRemoteDaemonSaysWhatItCannot(t *testing.T) {
	f := newFakeConn(fakeDomain)
	ep, err := parseURI("qemu+ssh://root@host/system")
	require.NoError(t, err)
	cfg, err := Config{URI: ep.raw}.withDefaults()
	require.NoError(t, err)
	d, err := newDriver(t.Context(), cfg, ep, f)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	require.NotContains(t, d.Info().Endpoint, "root")
	require.False(t, d.Info().Capabilities.ChangeTracking)
	vm, err := d.VM(t.Context(), vmID)
	require.NoError(t, err)
	require.Equal(t, "web1", vm.Name)
	_, err = d.CreateSnapshot(t.Context(), vmID, nil)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.NotEmpty(t, hypervisor.Hint(err))
	_, err = d.CreateVM(t.Context(), &hypervisor.VMSpec{Name: "x"})
	require.ErrorIs(t, err, errors.ErrUnsupported)
	_, err = d.OpenDisk(t.Context(), vmID, "vda")
	require.ErrorIs(t, err, errors.ErrUnsupported)
}

func TestErrorNumbersMatchConditions(t *testing.T) {
	for _, c := range []struct {
		code int
		msg  string
		want error
	}{
		{virNoDomain, "", hypervisor.ErrNotFound},
		{virNoCheckpoint, "", hypervisor.ErrNotFound},
		{virOperationTimeout, "cannot acquire state change lock (held by monitor=remoteDispatchDomainBackupBegin)", hypervisor.ErrBusy},
		{virUnsupported, "disk 'vda' already in active block job", hypervisor.ErrBusy},
		{virInternal, "internal error: disk 'vda' has a blockjob assigned", hypervisor.ErrBusy},
		{virAuthFailed, "", hypervisor.ErrAuth},
		{virAccessDenied, "", hypervisor.ErrAuth},
		{virOperationFailed, "operation failed: domain 'x' already exists with uuid 1", hypervisor.ErrExists},
		{virInternal, "internal error: ...: No space left on device", hypervisor.ErrNoSpace},
		{virNoSupport, "", errors.ErrUnsupported},
		{virRPC, "", hypervisor.ErrUnavailable},
	} {
		err := fmt.Errorf("wrapped: %w", &virError{code: c.code, msg: c.msg})
		require.ErrorIs(t, err, c.want, "%d %s", c.code, c.msg)
		for _, other := range []error{
			hypervisor.ErrNotFound, hypervisor.ErrBusy, hypervisor.ErrAuth, hypervisor.ErrExists, hypervisor.ErrNoSpace,
			errors.ErrUnsupported, hypervisor.ErrUnavailable, hypervisor.ErrQuiesce,
		} {
			if other != c.want { //nolint:errorlint // sentinels themselves are compared
				require.NotErrorIs(t, err, other, "%d %s", c.code, c.msg)
			}
		}
	}
	require.Zero(t, virCode(errors.New("x")))
}

func TestURIs(t *testing.T) {
	for uri, want := range map[string]struct {
		transport string
		local     bool
		remote    string
	}{
		"qemu:///system":                        {"unix", true, "qemu:///system"},
		"qemu:///session":                       {"unix", true, "qemu:///session"},
		"qemu+unix:///system?socket=/run/x":     {"unix", true, "qemu:///system"},
		"qemu+ssh://root@h/system":              {"ssh", false, "qemu:///system"},
		"qemu+tcp://h:1234/system":              {"tcp", false, "qemu:///system"},
		"qemu+tls://h/system":                   {"tls", false, "qemu:///system"},
		"qemu://h/system":                       {"tls", false, "qemu:///system"},
		"qemu+libssh2://h/session?name=qemu:/x": {"libssh2", false, "qemu:/x"},
	} {
		ep, err := parseURI(uri)
		require.NoError(t, err, uri)
		require.Equal(t, want.transport, ep.transport, uri)
		require.Equal(t, want.local, ep.local, uri)
		require.Equal(t, want.remote, ep.remoteURI(), uri)
	}
	for _, uri := range []string{"xen:///system", "qemu:///", "qemu+ssh:///system", "qemu+unix://h/system", "qemu+carrier://h/system", "%"} {
		_, err := parseURI(uri)
		require.Error(t, err, uri)
	}
	_, err := Open(t.Context(), Config{URI: "qemu+unix:///system?socket=/nonexistent/sock"})
	require.ErrorIs(t, err, hypervisor.ErrUnavailable)
	require.NotEmpty(t, hypervisor.Hint(err))
}
