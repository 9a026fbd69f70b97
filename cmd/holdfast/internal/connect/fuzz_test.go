package connect

import (
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"
)

// password matches a canary where a URL has its password.
var password = regexp.MustCompile(`^[^/?#@:]*://[^/?#@:]*:S3CRET@[^@]*$`)

// FuzzEndpoint: a URL with a password is refused and not repeated, and what is kept
// of any other is a URL again, with the scratch directory that it came with.
func FuzzEndpoint(f *testing.F) {
	for _, s := range []string{
		"qemu:///system", "qemu+ssh://root@host/system?keyfile=/k", "vsphere://u:S3CRET@host/", "qemu://u:S3CRET@h h/", "", "/etc/passwd", "%zz", "qemu:///system?%zz",
	} {
		f.Add(s, "/var/tmp")
		f.Add(s, "")
	}
	f.Fuzz(func(t *testing.T, s, scratch string) {
		out, err := Endpoint(HypervisorConfig{URL: s, ScratchDir: scratch})
		if err != nil {
			require.ErrorIs(t, err, ErrUsage)
			if password.MatchString(s) {
				require.NotContains(t, err.Error(), "S3CRET")
			}
			return
		}
		u, err := parse(out)
		require.NoError(t, err)
		_, set := u.User.Password()
		require.False(t, set)
		if scratch != "" {
			require.Equal(t, scratch, u.Query().Get(scratchParam))
		}
	})
}
