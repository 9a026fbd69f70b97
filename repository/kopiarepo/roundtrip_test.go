package kopiarepo_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
	"github.com/holdfast-backup/holdfast/secret"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

func TestFullAndIncrementalComeBack(t *testing.T) {
	ctx := context.Background()
	rnd := seed(t)
	dir := t.TempDir()
	r := create(t, config(dir))
	disks := map[string]*image{
		"vda": newImage(3*gib+5*mib+12345, mib),
		"vdb": newImage(700_001, 256<<10),
		"vdc": newImage(2*gib, mib), // all zeros
	}
	for range 40 {
		disks["vda"].fill(rnd, rnd.Int64N(disks["vda"].count()))
	}
	disks["vda"].fill(rnd, disks["vda"].count()-1)
	disks["vdb"].fill(rnd, 2)
	files := map[string][]byte{"config": []byte("<domain/>"), "nvram": make([]byte, 5*mib), "..": []byte("dots")}
	proof, err := backup(ctx, r, disks, backupOptions{chain: "vm-1", run: "run1", files: files, workers: 4})
	require.NoError(t, err)
	p1 := proof.Point()
	require.Equal(t, int64(1), p1.Sequence)
	require.NoError(t, compare(ctx, r, p1.ID, disks))

	before := map[string]*image{}
	changed := map[string][]int64{}
	for name, m := range disks {
		before[name] = m.clone()
		set := map[int64][]byte{}
		for range 10 {
			i := rnd.Int64N(m.count())
			if rnd.IntN(4) == 0 {
				m.zero(i)
			} else {
				m.fill(rnd, i)
			}
			set[i] = nil
		}
		changed[name] = sortedIndexes(set)
	}
	proof, err = backup(ctx, r, disks, backupOptions{chain: "vm-1", run: "run2", parent: p1.ID, changed: changed, workers: 4})
	require.NoError(t, err)
	p2 := proof.Point()
	require.Equal(t, int64(2), p2.Sequence)
	require.Equal(t, p1.ID, p2.Parent)

	require.NoError(t, r.Close())
	r = open(t, config(dir))
	require.NoError(t, compare(ctx, r, p1.ID, before))
	require.NoError(t, compare(ctx, r, p2.ID, disks))
	list := points(t, r, repository.Query{Chain: "vm-1"})
	require.Len(t, list, 2)
	require.Equal(t, p1, *list[0])
	require.Equal(t, p2, *list[1])

	rd, err := r.Open(ctx, p1.ID)
	require.NoError(t, err)
	for name, want := range files {
		f, err := rd.File(ctx, name)
		require.NoError(t, err)
		got, err := io.ReadAll(f)
		require.NoError(t, err)
		require.True(t, string(want) == string(got), "file %s", name)
	}
	_, err = rd.File(ctx, "none")
	require.ErrorIs(t, err, repository.ErrNotFound)
}

func TestReadAtAgreesWithBlocks(t *testing.T) {
	ctx := context.Background()
	rnd := seed(t)
	r := create(t, config(t.TempDir()))
	m := newImage(9*mib+777, 256<<10)
	for i := range m.count() {
		if i%3 != 0 {
			m.fill(rnd, i)
		}
	}
	proof, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{chain: "c", run: "r"})
	require.NoError(t, err)
	rd, err := r.Open(ctx, proof.Point().ID)
	require.NoError(t, err)
	d, err := rd.Disk(ctx, "d")
	require.NoError(t, err)
	var truth []byte
	for i := range m.count() {
		truth = append(truth, m.at(i)...)
	}
	whole := make([]byte, len(truth)+10)
	n, err := d.ReadAt(whole, 0)
	require.ErrorIs(t, err, io.EOF)
	require.Equal(t, len(truth), n)
	require.True(t, string(truth) == string(whole[:n]))
	for range 200 {
		off := rnd.Int64N(m.size)
		p := make([]byte, rnd.IntN(mib))
		n, err := d.ReadAt(p, off)
		want := truth[off:min(off+int64(len(p)), m.size)]
		require.Equal(t, len(want), n)
		require.True(t, string(want) == string(p[:n]), "at %d", off)
		if n < len(p) {
			require.ErrorIs(t, err, io.EOF)
		} else {
			require.NoError(t, err)
		}
	}
}

func TestOpeningTellsWhatIsWrong(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	_, err := kopiarepo.Open(ctx, config(dir))
	require.ErrorIs(t, err, repository.ErrNotRepository)
	_, err = kopiarepo.Open(ctx, config(dir+"/absent"))
	require.ErrorIs(t, err, repository.ErrNotRepository)

	other := t.TempDir()
	require.NoError(t, os.WriteFile(other+"/diary.txt", []byte("dear diary"), 0o600))
	for _, f := range []func(context.Context, kopiarepo.Config) (*kopiarepo.Repository, error){
		kopiarepo.Open, kopiarepo.Create, kopiarepo.OpenOrCreate,
	} {
		_, err = f(ctx, config(other))
		require.ErrorIs(t, err, repository.ErrNotRepository)
	}
	entries, err := os.ReadDir(other)
	require.NoError(t, err)
	require.Len(t, entries, 1, "nothing was touched")

	_, err = kopiarepo.Open(ctx, config("s3://bucket/prefix"))
	require.ErrorContains(t, err, "s3:")

	r := create(t, config(dir))
	_, err = kopiarepo.Create(ctx, config(dir))
	require.ErrorIs(t, err, repository.ErrExists)
	cfg := config(dir)
	cfg.Password = secret.New("wrong")
	_, err = kopiarepo.OpenOrCreate(ctx, cfg)
	require.ErrorIs(t, err, repository.ErrPassword)
	again, err := kopiarepo.OpenOrCreate(ctx, config(dir))
	require.NoError(t, err)
	require.Equal(t, r.Info(), again.Info())
	require.NoError(t, again.Close())
	require.NoError(t, again.Close())
}

// TestNamesAreDurableBeforeTheRecord: the record of a point is created when the names of
// all that was put before it are durable.
func TestNamesAreDurableBeforeTheRecord(t *testing.T) {
	ctx := context.Background()
	rnd := seed(t)
	cfg := config(t.TempDir())
	var mu sync.Mutex
	var undurable []string // puts since the last sync
	records := 0
	cfg.StorageHook = func(_ context.Context, op kopiarepo.StorageOp) (func(error) error, error) {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case op.Kind == kopiarepo.OpPut:
			undurable = append(undurable, op.Name)
		case op.Kind == kopiarepo.OpSync:
			undurable = nil
		case op.Kind == kopiarepo.OpCreate && strings.HasPrefix(op.Name, "holdfast/records/"):
			records++
			if len(undurable) > 0 {
				return nil, fmt.Errorf("a power cut would take the names of %v", undurable)
			}
		}
		return nil, nil
	}
	r := create(t, cfg)
	m := newImage(3*mib+700, mib)
	m.fill(rnd, 1)
	_, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{chain: "vm", run: "r"})
	require.NoError(t, err)
	require.Equal(t, 1, records)
}
