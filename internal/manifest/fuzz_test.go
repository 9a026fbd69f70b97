package manifest

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
)

// FuzzParse: a document that is taken agrees with the record of its point, and its
// disks have names that are no paths.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"version":1,"disks":[{"id":"vda","size":512,"mode":"full"}]}`))
	f.Add([]byte(`{"version":1,"disks":[{"id":"../x","size":512,"mode":"full"}]}`))
	f.Add([]byte(`{"version":1,"disks":[{"id":"vda","size":513,"mode":"incremental","audit":{"seed":"1","wrong":-1}}]}`))
	f.Add([]byte(`{"version":99}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p := &repository.Point{ID: "p", Meta: b, Disks: []repository.Disk{{ID: "vda", Size: 512}}}
		m, err := Parse(p)
		if err != nil {
			return
		}
		require.GreaterOrEqual(t, m.Version, 1)
		for i := range m.Disks {
			d := &m.Disks[i]
			require.True(t, hypervisor.ValidDiskID(d.ID))
			require.NotNil(t, m.Disk(d.ID))
			d.Audit.Lied()
			if d.Mode.Stored() {
				require.Equal(t, hypervisor.DiskID("vda"), d.ID)
				require.EqualValues(t, 512, d.Size)
			}
		}
	})
}

// FuzzChain: any identity of a VM gives the name of a chain that a repository takes,
// and that is no path.
func FuzzChain(f *testing.F) {
	f.Add("6B3C2A50-5d4e-4f6a-9d7e-0123456789ab", "vm-1")
	f.Add("", "../../etc")
	f.Fuzz(func(t *testing.T, uuid, id string) {
		name := Chain(hypervisor.KVM, &hypervisor.VM{UUID: uuid, ID: hypervisor.VMID(id)})
		require.Regexp(t, `^[a-z0-9._-]{4,128}$`, name)
		require.Equal(t, "kvm-", name[:4])
	})
}
