package hypervisor_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

func TestNames(t *testing.T) {
	n := hypervisor.Name{Repo: "0123abcd", Run: "20200229t120000z7", Kind: "snap"}
	require.Equal(t, "holdfast-0123abcd-20200229t120000z7-snap", n.String())
	got, err := hypervisor.ParseName(n.String())
	require.NoError(t, err)
	require.Equal(t, n, got)
	require.True(t, strings.HasPrefix(n.String(), hypervisor.RepoPrefix("0123abcd")))
}

func TestForeignNames(t *testing.T) {
	for _, s := range []string{
		"", "holdfast", "holdfast-", "holdfast-0123abcd-run1", "holdfast-0123ABCD-run1-snap",
		"holdfast-0123abc-run1-snap", "holdfast-0123abcde-run1-snap", "holdfast-0123abcd-Run1-snap",
		"holdfast-0123abcd--snap", "holdfast-0123abcd-run1-", "holdfast-0123abcd-run1-snap-1",
		" holdfast-0123abcd-run1-snap", "holdfast-0123abcd-run1-snap\n", "virtnbdbackup.0",
		"holdfast-0123abcd-" + strings.Repeat("a", 33) + "-snap", "holdfast-0123abcd-run1-" + strings.Repeat("k", 17),
	} {
		require.False(t, hypervisor.IsOurs(s), "%q", s)
		_, err := hypervisor.ParseName(s)
		require.Error(t, err, "%q", s)
	}
}

func TestValidDiskID(t *testing.T) {
	for id, want := range map[hypervisor.DiskID]bool{
		"vda": true, "scsi0.0_1-2": true, hypervisor.DiskID(strings.Repeat("x", 64)): true,
		"": false, ".": false, "..": false, ".hidden": false, "a/b": false, "a b": false, "a\n": false, "ä": false,
		hypervisor.DiskID(strings.Repeat("x", 65)): false,
	} {
		require.Equal(t, want, hypervisor.ValidDiskID(id), "%q", id)
	}
}

func FuzzParseName(f *testing.F) {
	f.Add("holdfast-0123abcd-run1-snap")
	f.Add("holdfast-0123abcd-run1-snap-1")
	f.Fuzz(func(t *testing.T, s string) {
		n, err := hypervisor.ParseName(s)
		if (err == nil) != hypervisor.IsOurs(s) || (err == nil && n.String() != s) {
			t.Fatalf("%q parses to %v, %v", s, n, err)
		}
	})
}

func TestConsistencyNames(t *testing.T) {
	for c, s := range map[hypervisor.Consistency]string{
		hypervisor.CrashConsistent: "crash", hypervisor.FilesystemConsistent: "filesystem", hypervisor.ApplicationConsistent: "application",
	} {
		require.Equal(t, s, c.String())
		text, err := c.MarshalText()
		require.NoError(t, err)
		var got hypervisor.Consistency
		require.NoError(t, got.UnmarshalText(text))
		require.Equal(t, c, got)
	}
	require.Less(t, hypervisor.CrashConsistent, hypervisor.FilesystemConsistent)
	require.Less(t, hypervisor.FilesystemConsistent, hypervisor.ApplicationConsistent)
	_, err := hypervisor.ParseConsistency("consistent")
	require.Error(t, err)
}
