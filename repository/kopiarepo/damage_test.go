package kopiarepo_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/tally"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
)

// shelf is a repository with points that share some blobs and not others.
type shelf struct {
	dir    string
	points []repository.PointID
	truth  []map[string]*image
}

func newShelf(t *testing.T) *shelf {
	t.Helper()
	ctx := context.Background()
	rnd := seed(t)
	s := &shelf{dir: t.TempDir() + "/repo"}
	r := create(t, config(s.dir))
	for c := range 2 {
		m := newImage(12*mib+700, 256<<10)
		for range 9 {
			m.fill(rnd, rnd.Int64N(m.count()))
		}
		parent := repository.PointID("")
		for k := range 3 {
			var changed []int64
			if k > 0 {
				m = m.clone()
				i := rnd.Int64N(m.count())
				m.fill(rnd, i)
				changed = []int64{i}
			}
			proof, err := backup(ctx, r, map[string]*image{"d": m}, backupOptions{
				chain: fmt.Sprintf("vm-%d", c), run: fmt.Sprintf("r%d", k), parent: parent, changed: map[string][]int64{"d": changed},
				files: map[string][]byte{"config": fmt.Appendf(nil, "config %d %d", c, k)},
			})
			require.NoError(t, err)
			parent = proof.Point().ID
			s.points = append(s.points, parent)
			s.truth = append(s.truth, map[string]*image{"d": m})
		}
	}
	require.NoError(t, r.PutNote(ctx, "open/obligation", []byte("thaw")))
	require.NoError(t, r.Close())
	return s
}

// files lists the stored files that protect something.
func (s *shelf) files(t *testing.T) []string {
	t.Helper()
	var out []string
	require.NoError(t, filepath.WalkDir(s.dir, func(p string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			rel, rerr := filepath.Rel(s.dir, p)
			if rerr != nil {
				return rerr
			}
			if !strings.Contains(rel, "/locks/") {
				out = append(out, rel)
			}
		}
		return err
	}))
	return out
}

// check verifies a damaged repository: the damage is found, the points that it
// names are exactly those that cannot be restored, and all others come back while
// it stands.
func (s *shelf) check(t *testing.T, dir, what string) {
	t.Helper()
	ctx := context.Background()
	r, err := kopiarepo.Open(ctx, config(dir))
	require.NoError(t, err, what)
	defer func() { require.NoError(t, r.Close()) }()
	rep, err := r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyBlobs})
	require.NoError(t, err, what)
	require.False(t, rep.OK(), "%s: not found", what)
	named := rep.Damaged()
	for i, id := range s.points {
		err := errors.Join(compare(ctx, r, id, s.truth[i]), s.compareFile(ctx, r, i))
		if slices.Contains(named, id) {
			require.ErrorIs(t, err, repository.ErrDamaged, "%s: point %d is named, but comes back", what, i)
		} else {
			require.NoError(t, err, "%s: point %d is not named", what, i)
		}
	}
	for n, err := range r.Notes(ctx, "") {
		require.NoError(t, err, what)
		require.Equal(t, "thaw", string(n.Value), what)
	}
}

// compareFile compares the file of a point with the truth.
func (s *shelf) compareFile(ctx context.Context, r repository.Repository, i int) error {
	rd, err := r.Open(ctx, s.points[i])
	if err != nil {
		return err
	}
	f, err := rd.File(ctx, "config")
	if err != nil {
		return err
	}
	b, err := io.ReadAll(f)
	if want := fmt.Sprintf("config %d %d", i/3, i%3); err == nil && string(b) != want {
		err = fmt.Errorf("the file holds %q, not %q", b, want)
	}
	return err
}

// harm is one thing that happens to stored files.
type harm struct {
	how   string
	name  string
	other string // swapped with, or replaced by
}

func (h harm) String() string { return fmt.Sprintf("%s of %s (%s)", h.how, h.name, h.other) }

// do damages a repository; undo takes it back. A swap of equal files is no damage.
func (h harm) do(dir string, rnd *rand.Rand) (undo func() error, damaged bool, err error) {
	p, other := filepath.Join(dir, h.name), filepath.Join(dir, h.other)
	old, err := os.ReadFile(p)
	if err != nil {
		return nil, false, err
	}
	info, err := os.Stat(p)
	if err != nil {
		return nil, false, err
	}
	undo = func() error {
		return joined(os.WriteFile(p, old, 0o600), os.Chtimes(p, info.ModTime(), info.ModTime()))
	}
	switch h.how {
	case "flip":
		b := slices.Clone(old)
		b[rnd.IntN(len(b))] ^= 1 << rnd.IntN(8)
		err = os.WriteFile(p, b, 0o600)
	case "empty":
		err = os.WriteFile(p, nil, 0o600)
	case "truncate":
		err = os.WriteFile(p, old[:rnd.IntN(len(old))], 0o600)
	case "one byte":
		err = os.WriteFile(p, old[:1], 0o600)
	case "shorter":
		err = os.WriteFile(p, old[:len(old)-1], 0o600)
	case "longer":
		err = os.WriteFile(p, append(slices.Clone(old), 0), 0o600)
	case "lost":
		err = os.Remove(p)
	case "replaced":
		b, rerr := os.ReadFile(other)
		if rerr != nil || string(b) == string(old) {
			return undo, false, rerr
		}
		err = os.WriteFile(p, b, 0o600)
	case "swap":
		b, rerr := os.ReadFile(other)
		if rerr != nil || string(b) == string(old) {
			return undo, false, rerr
		}
		first := undo
		undo = func() error { return joined(first(), os.WriteFile(other, b, 0o600)) }
		err = joined(os.WriteFile(other, old, 0o600), os.WriteFile(p, b, 0o600))
	}
	return undo, true, err
}

// kin returns another file of the same kind, or any other if there is none.
func kin(files []string, i int, rnd *rand.Rand) string {
	kind := func(name string) string {
		dir := filepath.Dir(name)
		if head, _, ok := strings.Cut(name, "/"); ok && len(head) == 1 {
			return head
		}
		return dir
	}
	var out []string
	for k, name := range files {
		if k != i && kind(name) == kind(files[i]) {
			out = append(out, name)
		}
	}
	if len(out) == 0 {
		return files[(i+1+rnd.IntN(len(files)-1))%len(files)]
	}
	return out[rnd.IntN(len(out))]
}

// TestDamageIsFoundAndNamed flips single bits, and empties, truncates, lengthens,
// removes, replaces and swaps stored files, one at a time. HOLDFAST_FAULTS=all tries
// 150 flips, spread over all files, and every file in some of the other ways; with
// HOLDFAST_NIGHTLY it is 2,000 flips, and all ways. The default is a tenth.
func TestDamageIsFoundAndNamed(t *testing.T) {
	s := newShelf(t)
	rnd := seed(t)
	files := s.files(t)
	nightly := os.Getenv("HOLDFAST_NIGHTLY") != "" && os.Getenv("HOLDFAST_FAULTS") == "all"
	flips, ways := 150, []string{"empty", "truncate", "lost", "swap"}
	if nightly {
		flips, ways = 2000, append(ways, "one byte", "shorter", "longer", "replaced")
	}
	var all []harm
	for i := range max(flips, len(files)) {
		all = append(all, harm{how: "flip", name: files[i%len(files)]})
	}
	for i, name := range files {
		for _, how := range ways {
			h := harm{how, name, ""}
			switch how {
			case "swap":
				h.other = files[(i+1+rnd.IntN(len(files)-1))%len(files)]
			case "replaced":
				h.other = kin(files, i, rnd)
			}
			all = append(all, h)
		}
	}
	rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	if nightly {
		_, of := tally.Shard(t)
		all = all[:(len(all)+of-1)/of] // each shard has a repository of its own
	} else if os.Getenv("HOLDFAST_FAULTS") != "all" {
		all = all[:len(all)/10]
	}
	const workers = 2
	var tried [workers]map[string]int
	t.Run("each", func(t *testing.T) {
		for k := range workers {
			dir, rnd := copyTree(t, s.dir), seed(t)
			tried[k] = map[string]int{}
			t.Run(strconv.Itoa(k), func(t *testing.T) {
				t.Parallel()
				for i := k; i < len(all); i += workers {
					undo, damaged, err := all[i].do(dir, rnd)
					require.NoError(t, err)
					if damaged {
						s.check(t, dir, all[i].String())
						tried[k][all[i].how]++
					}
					require.NoError(t, undo())
				}
				r := open(t, config(dir))
				rep, err := r.Verify(context.Background(), &repository.VerifyOptions{Level: repository.VerifyData})
				require.NoError(t, err)
				require.Empty(t, rep.Damages, "after all damage was taken back")
			})
		}
	})
	t.Logf("damages of %d files: %v and %v", len(files), tried[0], tried[1])
	if !nightly || t.Failed() {
		return
	}
	var counts []tally.Count
	for _, how := range append(ways, "flip") {
		counts = append(counts, tally.Count{Name: how, Value: int64(tried[0][how] + tried[1][how])})
	}
	tally.Record(t, tally.Campaign{
		Name:    "damage",
		About:   "Stored files are damaged one at a time, with 2,000 flipped bits: verify names the points that are hit, those alone cannot be restored, and all others come back.",
		Command: "HOLDFAST_NIGHTLY=1 HOLDFAST_FAULTS=all go test -timeout 90m -run '^TestDamageIsFoundAndNamed$' ./repository/kopiarepo",
		Counts:  counts,
	})
}

// TestRepairBringsBackFromCopies damages every file that has a copy, at once, and
// repairs into a new directory.
func TestRepairBringsBackFromCopies(t *testing.T) {
	ctx := context.Background()
	s := newShelf(t)
	rnd := seed(t)
	damaged := 0
	for _, name := range s.files(t) {
		twoCopies := strings.HasPrefix(name, "x") || strings.HasPrefix(name, "kopia.") || strings.HasPrefix(name, "q")
		if !twoCopies && !strings.HasPrefix(name, "holdfast/") || strings.HasSuffix(name, "keys/slot-1.b") {
			continue
		}
		p := filepath.Join(s.dir, name)
		b, err := os.ReadFile(p)
		require.NoError(t, err)
		damaged++
		switch rnd.IntN(3) {
		case 0:
			require.NoError(t, os.Remove(p))
		case 1:
			require.NoError(t, os.WriteFile(p, b[:len(b)/2], 0o600))
		default:
			b[rnd.IntN(len(b))] ^= 4
			require.NoError(t, os.WriteFile(p, b, 0o600))
		}
	}
	s.check(t, s.dir, fmt.Sprintf("%d files damaged", damaged))
	before := tree(t, s.dir)
	to := t.TempDir() + "/repaired"
	rep, err := kopiarepo.Repair(ctx, config(s.dir), to)
	require.NoError(t, err)
	require.NotEmpty(t, rep.Restored)
	require.Empty(t, rep.Lost)
	require.Empty(t, rep.Damaged)
	require.Empty(t, rep.Verify.Damages)
	require.Equal(t, before, tree(t, s.dir), "the damaged repository was not touched")
	r := open(t, config(to))
	for i, id := range s.points {
		require.NoError(t, compare(ctx, r, id, s.truth[i]))
	}
	full, err := r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(t, err)
	require.Empty(t, full.Damages)
	_, err = backup(ctx, r, s.truth[2], backupOptions{chain: "vm-0", run: "r9", parent: s.points[2]})
	require.NoError(t, err, "the repaired repository goes on")

	_, err = kopiarepo.Repair(ctx, config(s.dir), to)
	require.ErrorIs(t, err, repository.ErrExists)
}

// tree returns the digest-free outline of a directory: names and contents.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		out[p] = fmt.Sprintf("%d:%x", len(b), fnv32(b))
		return err
	}))
	return out
}

// TestLostDataIsStoredAgain: after a pack of data is lost or found damaged, a
// backup of the same data stores it again, and the new point can be read.
func TestLostDataIsStoredAgain(t *testing.T) {
	ctx := context.Background()
	rnd := seed(t)
	dir := t.TempDir()
	r := create(t, config(dir))
	m := newImage(6*mib, mib)
	for i := range m.count() {
		m.fill(rnd, i)
	}
	disks := map[string]*image{"d": m}
	proof, err := backup(ctx, r, disks, backupOptions{chain: "vm", run: "r1"})
	require.NoError(t, err)
	require.NoError(t, r.Close())
	packs, err := filepath.Glob(dir + "/p/*/*.f")
	require.NoError(t, err)
	require.NotEmpty(t, packs)
	for k, how := range []string{"lost", "truncated", "flipped"} {
		copyDir := copyTree(t, dir)
		for _, p := range packs {
			p = filepath.Join(copyDir, strings.TrimPrefix(p, dir))
			b, err := os.ReadFile(p)
			require.NoError(t, err)
			switch how {
			case "lost":
				require.NoError(t, os.Remove(p))
			case "truncated":
				require.NoError(t, os.Truncate(p, int64(len(b)/2)))
			case "flipped":
				for off := 1000; off < len(b); off += 100_000 {
					b[off] ^= 1
				}
				require.NoError(t, os.WriteFile(p, b, 0o600))
			}
		}
		r := open(t, config(copyDir))
		if how == "flipped" { // nobody can know before it is read
			rep, err := r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyBlobs})
			require.NoError(t, err)
			require.Equal(t, []repository.PointID{proof.Point().ID}, rep.Damaged())
		}
		_, err = r.Begin(ctx, &repository.PointSpec{Chain: "vm", Run: "child", Parent: proof.Point().ID})
		require.ErrorIs(t, err, repository.ErrDamaged, "%s: a damaged parent is refused", how)
		again, err := backup(ctx, r, disks, backupOptions{chain: "vm", run: fmt.Sprintf("again%d", k), workers: 3})
		require.NoError(t, err, how)
		require.NoError(t, r.Close())
		r = open(t, config(copyDir))
		require.NoError(t, compare(ctx, r, again.Point().ID, disks), how)
		require.NoError(t, compare(ctx, r, proof.Point().ID, disks), "%s: the old point is whole again", how)
	}
}

// TestRecordsCannotBeForgedOrRolledBack plays an attacker, or a careless restore,
// on records and their copies.
func TestRecordsCannotBeForgedOrRolledBack(t *testing.T) {
	ctx := context.Background()
	s := newShelf(t)
	record := func(prefix string, n int) string {
		names, err := filepath.Glob(fmt.Sprintf("%s/%s/records/vm-0/%012d*", s.dir, prefix, n))
		require.NoError(t, err)
		require.Len(t, names, 1)
		return names[0]
	}
	states := func(t *testing.T, cfg kopiarepo.Config) []repository.State {
		r := open(t, cfg)
		var out []repository.State
		for _, p := range points(t, r, repository.Query{Chain: "vm-0"}) {
			out = append(out, p.State)
			if p.State != repository.Committed {
				_, err := r.Open(ctx, p.ID)
				require.ErrorIs(t, err, repository.ErrDamaged)
				rep, err := r.Verify(ctx, nil)
				require.NoError(t, err)
				require.Contains(t, rep.Damaged(), p.ID)
			}
		}
		require.NoError(t, r.Close())
		return out
	}
	c, v, u := repository.Committed, repository.Vanished, repository.Untrusted
	clean := s.dir
	for _, tc := range []struct {
		name string
		do   func() error
		want []repository.State
	}{
		{"one lost", func() error { return os.Remove(record("holdfast", 2)) }, []repository.State{c, c, c}},
		{"both lost", func() error {
			return joined(os.Remove(record("holdfast", 2)), os.Remove(record("holdfast-2", 2)))
		}, []repository.State{c, v, c}},
		{"newest lost", func() error {
			return joined(os.Remove(record("holdfast", 3)), os.Remove(record("holdfast-2", 3)))
		}, []repository.State{c, c, v}},
		{"one byte", func() error { return flipByte(record("holdfast", 1)) }, []repository.State{c, c, c}},
		{"one byte in both", func() error {
			return joined(flipByte(record("holdfast", 1)), flipByte(record("holdfast-2", 1)))
		}, []repository.State{u, c, c}},
		{"another's record", func() error {
			b, err := os.ReadFile(record("holdfast", 1))
			return joined(err, os.WriteFile(record("holdfast", 2), b, 0o600), os.WriteFile(record("holdfast-2", 2), b, 0o600))
		}, []repository.State{c, u, c}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s.dir = copyTree(t, clean)
			require.NoError(t, tc.do())
			require.Equal(t, tc.want, states(t, config(s.dir)))
		})
	}
	t.Run("all rolled back", func(t *testing.T) {
		s.dir = copyTree(t, clean)
		cfg := config(s.dir)
		cfg.AnchorFile = t.TempDir() + "/anchors.json"
		require.Equal(t, []repository.State{c, c, c}, states(t, cfg))
		old := copyTree(t, s.dir)
		r := open(t, cfg)
		_, err := backup(ctx, r, s.truth[2], backupOptions{chain: "vm-0", run: "r9", parent: s.points[2]})
		require.NoError(t, err)
		require.NoError(t, r.Close())
		require.NoError(t, os.RemoveAll(s.dir))
		require.NoError(t, os.Rename(old, s.dir))
		require.Equal(t, []repository.State{c, c, c}, states(t, config(s.dir)), "without memory it cannot be known")
		require.Equal(t, []repository.State{c, c, c, v}, states(t, cfg))
	})
}

func flipByte(p string) error {
	b, err := os.ReadFile(p)
	if err != nil {
		return err
	}
	b[len(b)/2] ^= 1
	return os.WriteFile(p, b, 0o600)
}
