package kopiarepo_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

// required reports whether a class of external things must be there.
func required(class string) bool {
	return slices.Contains(strings.Split(os.Getenv("HOLDFAST_REQUIRE"), ","), class)
}

// stockKopia returns the stock kopia program, run with a home of its own.
func stockKopia(t *testing.T) func(args ...string) []byte {
	t.Helper()
	bin, err := filepath.Abs("../../tools/bin/kopia")
	require.NoError(t, err)
	if _, err := os.Stat(bin); err != nil {
		if required("tools") {
			t.Fatal("the kopia program is missing: make kopia")
		}
		t.Skip("the kopia program is missing: make kopia")
	}
	home := t.TempDir()
	return func(args ...string) []byte {
		t.Helper()
		cmd := exec.Command(bin, args...)
		cmd.Env = []string{"HOME=" + home, "PATH=" + os.Getenv("PATH"), "KOPIA_PASSWORD=" + password, "KOPIA_CHECK_FOR_UPDATES=false"}
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		require.NoError(t, err, "kopia %s: %s", strings.Join(args, " "), stderr.String())
		return out
	}
}

// TestStockProgramRestores: the stock kopia program, with the password and nothing
// of ours, lists the points, checks them and restores a disk of several segments
// with a short tail from an incremental point.
func TestStockProgramRestores(t *testing.T) {
	kopia := stockKopia(t)
	ctx := context.Background()
	rnd := seed(t)
	dir := t.TempDir()
	r := create(t, config(dir))
	m := newImage(3*gib+17*mib+4321, mib)
	for range 30 {
		m.fill(rnd, rnd.Int64N(m.count()))
	}
	m.fill(rnd, m.count()-1)
	files := map[string][]byte{"nvram": []byte("nvram bytes")}
	proof, err := backup(ctx, r, map[string]*image{"vda": m}, backupOptions{chain: "vm-1", run: "r1", files: files})
	require.NoError(t, err)
	changed := []int64{}
	for range 6 {
		i := rnd.Int64N(m.count())
		m.fill(rnd, i)
		changed = append(changed, i)
	}
	m.zero(m.count() - 2)
	changed = dedupe(append(changed, m.count()-2))
	proof, err = backup(ctx, r, map[string]*image{"vda": m}, backupOptions{
		chain: "vm-1", run: "r2", parent: proof.Point().ID, changed: map[string][]int64{"vda": changed}, files: files,
	})
	require.NoError(t, err)
	require.NoError(t, r.Close())

	kopia("repository", "connect", "filesystem", "--path", dir, "--override-hostname", "holdfast", "--override-username", "backup", "--readonly")
	var list []struct {
		ID     string            `json:"id"`
		Tags   map[string]string `json:"tags"`
		Source struct{ Path string }
		Pins   []string
	}
	require.NoError(t, json.Unmarshal(kopia("snapshot", "list", "--json"), &list))
	require.Len(t, list, 2)
	snapshot := ""
	for _, s := range list {
		require.Equal(t, "/vm-1", s.Source.Path)
		require.Equal(t, []string{"holdfast"}, s.Pins)
		if s.Tags["tag:holdfast-point"] == string(proof.Point().ID) {
			snapshot = s.ID
		}
	}
	require.NotEmpty(t, snapshot, "%+v", list)
	kopia("snapshot", "verify", "--verify-files-percent=100")

	to := t.TempDir()
	kopia("snapshot", "restore", snapshot+"/disk-vda", to+"/vda")
	kopia("snapshot", "restore", snapshot+"/file-nvram", to+"/nvram")
	require.NoError(t, compareSegments(to+"/vda", m))
	b, err := os.ReadFile(to + "/nvram")
	require.NoError(t, err)
	require.Equal(t, files["nvram"], b)
}

// compareSegments concatenates the files under dir in name order and compares them
// with the truth.
func compareSegments(dir string, m *image) error {
	var names []string
	err := filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			names = append(names, p)
		}
		return err
	})
	if err != nil {
		return err
	}
	slices.Sort(names)
	if len(names) < 3 {
		return fmt.Errorf("%d segments", len(names))
	}
	var readers []io.Reader
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		readers = append(readers, f)
	}
	all := io.MultiReader(readers...)
	buf := make([]byte, m.bs)
	for i := range m.count() {
		n := m.blockLen(i)
		if _, err := io.ReadFull(all, buf[:n]); err != nil {
			return fmt.Errorf("block %d: %w", i, err)
		}
		if !bytes.Equal(buf[:n], m.at(i)) {
			return fmt.Errorf("block %d differs", i)
		}
	}
	if n, _ := all.Read(buf[:1]); n != 0 {
		return fmt.Errorf("the segments are longer than the disk")
	}
	return nil
}

// TestStockProgramLeavesPointsAlone: expiry and maintenance by the stock program
// remove nothing of a point.
func TestStockProgramLeavesPointsAlone(t *testing.T) {
	kopia := stockKopia(t)
	ctx := context.Background()
	rnd := seed(t)
	dir := t.TempDir()
	r := create(t, config(dir))
	m := newImage(5*mib, mib)
	m.fill(rnd, 2)
	var ids []repository.PointID
	for k := range 13 { // more than kopia's default policy keeps
		proof, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{chain: "vm", run: fmt.Sprintf("r%d", k)})
		require.NoError(t, err)
		ids = append(ids, proof.Point().ID)
	}
	require.NoError(t, r.Close())
	kopia("repository", "connect", "filesystem", "--path", dir, "--override-hostname", "holdfast", "--override-username", "backup")
	kopia("snapshot", "expire", "--all", "--delete")
	kopia("maintenance", "run", "--full")
	r = open(t, config(dir))
	for _, id := range ids {
		require.NoError(t, compare(ctx, r, id, map[string]*image{"d": m}))
	}
	rep, err := r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(t, err)
	require.Empty(t, rep.Damaged())
}
