package kopiarepo_test

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/tally"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
)

// reference makes a small repository with one file of each kind that there is.
func reference(t *testing.T) string {
	t.Helper()
	ctx := context.Background()
	rnd := seed(t)
	dir := t.TempDir() + "/repo"
	r := create(t, config(dir))
	for _, chain := range []string{"vm-0", "vm-1"} {
		m := newImage(2*repository.LeafSize+700, repository.LeafSize)
		m.blocks[0] = few(rnd, m.blockLen(0))
		o := backupOptions{chain: chain, run: "r0", files: map[string][]byte{"config": []byte("config of " + chain)}}
		proof, err := backup(ctx, r, map[string]*image{"d": m}, o)
		require.NoError(t, err)
		m.blocks[1] = few(rnd, m.blockLen(1))
		o.run, o.parent, o.changed = "r1", proof.Point().ID, map[string][]int64{"d": {1}}
		_, err = backup(ctx, r, map[string]*image{"d": m}, o)
		require.NoError(t, err)
	}
	require.NoError(t, r.PutNote(ctx, "open/obligation", []byte("thaw")))
	maintain(ctx, t, r)
	require.NoError(t, r.Close())
	return dir
}

// few returns a block with so few random bytes that each bit of it can be flipped.
func few(rnd *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range 36 << 10 {
		b[i] = byte(rnd.Uint32())
	}
	return b
}

// TestEveryBit flips single bits of a repository in place, as a disk does that
// forgets, and checks the file as verify does. HOLDFAST_FAULTS=all flips every bit
// there is; the default is one of 997.
func TestEveryBit(t *testing.T) {
	ctx := context.Background()
	dir := reference(t)
	index, of := tally.Shard(t)
	all := os.Getenv("HOLDFAST_FAULTS") == "all"
	step := int64(997)
	if all {
		step = int64(of)
	}
	type file struct {
		name string
		size int64
	}
	var list []file
	var unprotected []string
	r := open(t, config(dir))
	_, err := r.Verify(ctx, nil) // loads what it knows of its blobs
	require.NoError(t, err)
	require.NoError(t, filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		name := filepath.ToSlash(rel)
		found, known, err := r.VerifyFile(ctx, name)
		if err != nil || len(found) > 0 {
			return fmt.Errorf("%s before any damage: %w %v", name, err, found)
		}
		if !known {
			unprotected = append(unprotected, name)
			return nil
		}
		list = append(list, file{name, info.Size()})
		return nil
	}))
	for _, name := range unprotected {
		// Session markers and logs come and go, leases are replaced; nothing depends on them.
		require.True(t, strings.HasPrefix(name, "s/") || strings.HasPrefix(name, "_") || strings.Contains(name, "/locks/"), "%s is not protected", name)
	}
	require.Greater(t, len(list), 40)

	var mu sync.Mutex
	flips, bits, missed := int64(0), int64(0), 0
	const workers = 2
	t.Run("each", func(t *testing.T) {
		next := make(chan file, len(list))
		for _, f := range list {
			next <- f
			bits += 8 * f.size
		}
		close(next)
		for w := range workers {
			t.Run(fmt.Sprint(w), func(t *testing.T) {
				t.Parallel()
				own := copyTree(t, dir)
				r := open(t, config(own))
				_, err := r.Verify(ctx, nil)
				require.NoError(t, err)
				for f := range next {
					n, lost := rot(ctx, t, r, own, f.name, 8*f.size, step, int64(index))
					mu.Lock()
					flips += n
					missed += lost
					mu.Unlock()
				}
			})
		}
	})
	t.Logf("%d of %d bits in %d files, %d not noticed", flips, bits, len(list), missed)
	if t.Failed() {
		return
	}
	require.Greater(t, flips, bits/step-int64(len(list)))
	if all {
		require.Greater(t, bits, int64(2<<20), "the reference repository")
		tally.Record(t, tally.Campaign{
			Name:    "bits",
			About:   "Every single bit of a repository is flipped in place, and the file that holds it checked as verify does.",
			Command: "HOLDFAST_FAULTS=all go test -timeout 60m -run '^TestEveryBit$' ./repository/kopiarepo",
			Counts:  []tally.Count{{Name: "flipped bits", Value: flips}},
		})
	}
}

// rot flips bits of a file and returns how many, and how many of them nobody noticed.
func rot(ctx context.Context, t *testing.T, r *kopiarepo.Repository, dir, name string, bits, step, first int64) (flips int64, missed int) {
	t.Helper()
	path := filepath.Join(dir, filepath.FromSlash(name))
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	defer func() { require.NoError(t, f.Close()) }()
	for bit := first % max(1, min(step, bits)); bit < bits && missed == 0; bit += step {
		at := bit / 8
		_, err := f.WriteAt([]byte{b[at] ^ 1<<(bit%8)}, at)
		require.NoError(t, err)
		found, _, err := r.VerifyFile(ctx, name)
		require.NoError(t, err)
		if flips++; len(found) == 0 {
			missed++
			t.Errorf("bit %d of %s: not noticed", bit, name)
		}
		_, err = f.WriteAt(b[at:at+1], at)
		require.NoError(t, err)
	}
	found, _, err := r.VerifyFile(ctx, name)
	require.NoError(t, err)
	require.Empty(t, found, "%s is as it was", name)
	return flips, missed
}
