package connect

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/secret"
)

func TestHypervisorURLs(t *testing.T) {
	for in, want := range map[string]error{
		"":                              ErrUsage,
		"web1":                          ErrUsage,
		"/etc/passwd":                   ErrUsage,
		"vsphere://admin@vc":            errors.ErrUnsupported,
		"xen://root@pool":               errors.ErrUnsupported,
		"hyperv:":                       errors.ErrUnsupported,
		"fake:x":                        errors.ErrUnsupported,
		"http://host":                   errors.ErrUnsupported,
		"qemu+ssh://u:tiger@h/system":   ErrUsage,
		"vsphere://admin:tiger@vc":      ErrUsage,
		"qemu:///system\x7f://u:tiger@": ErrUsage,
	} {
		_, err := Hypervisor(context.Background(), HypervisorConfig{URL: in})
		require.ErrorIs(t, err, want, in)
		require.ErrorIs(t, err, ErrUsage, in)
		require.NotEmpty(t, hypervisor.Hint(err), in)
		require.NotContains(t, err.Error(), "tiger")
	}
	_, err := Hypervisor(context.Background(), HypervisorConfig{URL: "qemu:///system", CAFile: "ca.pem"})
	require.ErrorIs(t, err, errors.ErrUnsupported)
	_, err = Hypervisor(context.Background(), HypervisorConfig{URL: "qemu+unix:///system?socket=/does/not/exist"})
	require.ErrorIs(t, err, hypervisor.ErrUnavailable)
}

// An endpoint finds the same hypervisor and the same scratch directory again.
func TestEndpoint(t *testing.T) {
	e, err := Endpoint(HypervisorConfig{URL: "qemu+unix:///system?socket=/run/x", ScratchDir: "/big disk"})
	require.NoError(t, err)
	u, err := url.Parse(e)
	require.NoError(t, err)
	require.Equal(t, "/big disk", u.Query().Get(scratchParam))
	require.Equal(t, "/run/x", u.Query().Get("socket"))
	again, err := Endpoint(HypervisorConfig{URL: e})
	require.NoError(t, err)
	require.Equal(t, e, again)
	plain, err := Endpoint(HypervisorConfig{URL: "qemu:///system"})
	require.NoError(t, err)
	require.Equal(t, "qemu:///system", plain)
}

func TestLocations(t *testing.T) {
	dir := t.TempDir()
	got, err := Location("file://" + dir)
	require.NoError(t, err)
	require.Equal(t, dir, got)
	got, err = Location("store")
	require.NoError(t, err)
	require.True(t, filepath.IsAbs(got))
	for _, s := range []string{"", "s3://bucket/prefix", "azure://x", "sftp://u:tiger@host/x", "file://other/x", "file:"} {
		_, err := Location(s)
		require.ErrorIs(t, err, ErrUsage, s)
		require.NotContains(t, err.Error(), "tiger")
		_, err = Repository(context.Background(), RepositoryConfig{Location: s, Password: secret.New("x"), Create: true})
		require.ErrorIs(t, err, ErrUsage, s)
	}

	for name, want := range map[string]bool{dir: true, filepath.Join(dir, "missing"): true, filepath.Dir(dir): false} {
		empty, err := Empty(name)
		require.NoError(t, err)
		require.Equal(t, want, empty, name)
	}
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, err = Empty(file)
	require.ErrorIs(t, err, repository.ErrNotRepository)
}

func TestSecretsDoNotPrint(t *testing.T) {
	cfg := RepositoryConfig{Location: "x", Password: secret.New("tiger")}
	text, err := json.Marshal(cfg)
	require.NoError(t, err)
	for _, s := range []string{string(text), fmt.Sprintf("%v %+v %#v %s %q %x", cfg, cfg, cfg, cfg.Password, cfg.Password, cfg.Password), cfg.Password.String(), cfg.Password.LogValue().String()} {
		require.NotContains(t, s, "tiger")
		require.NotContains(t, s, "7469676572")
	}
}
