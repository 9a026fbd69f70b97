//go:build linux

package e2e

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/lab/kvm/kvmlab"
)

// TestB6ABitmapThatForgot makes a real QEMU lie: what the guest wrote is cleared
// from the dirty bitmap behind libvirt's back. A backup without an audit succeeds
// and is wrong; the audit finds it, at any offset of the pull job's export; the disk
// is read in full at once and by the next run, and the points are named.
func TestB6ABitmapThatForgot(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const size = 96*mib + 3*512
	vm := r.lab.VM(t, kvmlab.Spec{Name: "b6", Power: kvmlab.Running, Disks: []kvmlab.Disk{
		{Size: size, Data: []kvmlab.Range{{Len: 60 * mib}}, Seed: 6},
		{Size: 16 * mib, Data: []kvmlab.Range{{Len: 8 * mib}}, Seed: 7},
	}})
	first := r.backup(vm.Name, "--audit", "all")
	require.Zero(t, first.audited())
	honest := r.backup(vm.Name, "--audit", "all")
	require.Equal(t, int64(size+16*mib), honest.audited(), "every byte, the short last leaf too")
	require.Zero(t, honest.read())

	vm.Write("vda", 20*mib+512, 8*mib, 0xB6)
	vm.Write("vda", size-512, 512, 0xB7)
	node, err := vm.FormatNode("vda")
	require.NoError(t, err)
	bitmaps := vm.Bitmaps("vda")
	require.Len(t, bitmaps, 1)
	_, err = vm.TryQMP("block-dirty-bitmap-clear", map[string]any{"node": node, "name": bitmaps[0]})
	require.NoError(t, err)

	trusting := r.backup(vm.Name, "--audit", "off")
	require.Zero(t, trusting.read())
	truth := r.truth(vm, "vda", "vdb")
	require.False(t, r.equal(trusting.Point, "vda", truth["vda"]), "the lie was none")

	o := r.run(r.backupArgs(vm.Name, "--audit", "all")...)
	require.Equal(t, 3, o.code, "%s", o)
	caught := line(t, o)
	require.Equal(t, "degraded", caught.Status)
	require.Equal(t, map[string]string{"vda": "full audit-mismatch", "vdb": "incremental changed-blocks"}, caught.modes())
	r.same(caught.Point, truth)

	next := r.backup(vm.Name)
	require.Equal(t, map[string]string{"vda": "full audit-mismatch", "vdb": "incremental changed-blocks"}, next.modes())
	vm.Write("vda", 3*mib, 4096, 0xB8)
	last := r.backup(vm.Name, "--audit", "all")
	require.Equal(t, map[string]string{"vda": "incremental changed-blocks", "vdb": "incremental changed-blocks"}, last.modes())
	r.same(last.Point, r.truth(vm, "vda", "vdb"))

	named := map[string]bool{}
	for _, pt := range jsonLines(t, r.must("points", "--json", "--repo", r.repo).stdout) {
		if list, ok := pt["lying_tracker"].([]any); ok {
			for _, x := range list {
				named[pt["point"].(string)] = x.(map[string]any)["exact"].(bool)
			}
		}
	}
	// Nobody can say when the lie began, so all that trusted the tracking are named.
	require.Equal(t, map[string]bool{honest.Point: false, trusting.Point: false, caught.Point: true}, named)
	o = r.run("verify", "--json", "--repo", r.repo, "--level", "records")
	require.Equal(t, 3, o.code, "%s", o)
	require.Equal(t, "suspect", jsonLines(t, o.stdout)[0]["status"])
	require.Len(t, vm.Checkpoints(), 1)
	require.False(t, vm.JobActive())
}
