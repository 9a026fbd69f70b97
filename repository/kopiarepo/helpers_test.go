package kopiarepo_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
	"github.com/holdfast-backup/holdfast/secret"
)

const password = "correct horse battery staple"

// cheapKDF makes key slots quick to open.
var cheapKDF = kopiarepo.KDF{MemoryKiB: 64, Time: 1, Threads: 1}

// clock is a clock that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Now()} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Advance(d time.Duration) {
	c.mu.Lock()
	c.now = c.now.Add(d)
	c.mu.Unlock()
}

// seed returns the seed of a randomised test, and prints it.
func seed(t testing.TB) *rand.Rand {
	t.Helper()
	s := uint64(time.Now().UnixNano())
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		require.NoError(t, err)
		s = n
	}
	t.Logf("HOLDFAST_SEED=%d", s)
	h := fnv.New64a()
	_, _ = h.Write([]byte(t.Name()))
	return rand.New(rand.NewPCG(s, h.Sum64()))
}

func config(dir string) kopiarepo.Config {
	cfg := kopiarepo.Config{Dir: dir, Password: secret.New(password), KDF: cheapKDF, Reserve: -1}
	if os.Getenv("HOLDFAST_LOG") != "" {
		cfg.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	return cfg
}

func create(t testing.TB, cfg kopiarepo.Config) *kopiarepo.Repository {
	t.Helper()
	r, err := kopiarepo.Create(context.Background(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	return r
}

func open(t testing.TB, cfg kopiarepo.Config) *kopiarepo.Repository {
	t.Helper()
	r, err := kopiarepo.Open(context.Background(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	return r
}

// image is a sparse disk: the truth.
type image struct {
	size   int64
	bs     int
	blocks map[int64][]byte
}

func newImage(size int64, bs int) *image { return &image{size, bs, map[int64][]byte{}} }

func (m *image) clone() *image {
	c := newImage(m.size, m.bs)
	for i, b := range m.blocks {
		c.blocks[i] = b
	}
	return c
}

func (m *image) blockLen(i int64) int { return repository.BlockLen(m.size, m.bs, i) }
func (m *image) count() int64         { return repository.Blocks(m.size, m.bs) }

// fill puts random data, some of it zeros, into block i.
func (m *image) fill(rnd *rand.Rand, i int64) {
	b := make([]byte, m.blockLen(i))
	var s [32]byte
	for j := range s {
		s[j] = byte(rnd.Uint32())
	}
	src := rand.NewChaCha8(s)
	from, to := 0, len(b)
	if rnd.IntN(3) == 0 { // leave a part of it zeros
		from = rnd.IntN(len(b))
	}
	_, _ = src.Read(b[from:to])
	m.blocks[i] = b
}

func (m *image) zero(i int64) { delete(m.blocks, i) }

func (m *image) at(i int64) []byte {
	if b := m.blocks[i]; b != nil {
		return b
	}
	return make([]byte, m.blockLen(i))
}

// block makes what a pipeline hands to the engine.
func (m *image) block(h *digest.Hasher, i int64) repository.Block {
	b := m.blocks[i]
	if b == nil || digest.IsZero(b) {
		return repository.Block{Index: i}
	}
	return repository.Block{Index: i, Data: b, Leaves: h.Leaves(nil, b)}
}

type backupOptions struct {
	chain, run string
	parent     repository.PointID
	lock       repository.Lock
	changed    map[string][]int64 // per disk, with a parent
	files      map[string][]byte
	workers    int
}

// backup stores disks as one point.
func backup(ctx context.Context, r repository.Repository, disks map[string]*image, o backupOptions) (*repository.Proof, error) {
	w, err := r.Begin(ctx, &repository.PointSpec{Chain: o.chain, Name: "vm " + o.chain, Run: o.run, Parent: o.parent, Lock: o.lock})
	if err != nil {
		return nil, err
	}
	proof, err := backupInto(ctx, w, disks, o)
	if err != nil {
		return nil, err
	}
	return proof, w.Abort(ctx)
}

func backupInto(ctx context.Context, w repository.Writer, disks map[string]*image, o backupOptions) (_ *repository.Proof, err error) {
	defer func() {
		if err != nil {
			_ = w.Abort(ctx)
		}
	}()
	h := digest.New(w.DigestKey())
	for _, id := range sortedNames(disks) {
		m := disks[id]
		d, err := w.Disk(ctx, repository.DiskSpec{ID: id, Size: m.size, BlockSize: m.bs, Inherit: o.parent != ""})
		if err != nil {
			return nil, err
		}
		indexes := o.changed[id]
		if o.parent == "" {
			indexes = sortedIndexes(m.blocks)
		}
		if err := writeBlocks(ctx, d, h, m, indexes, max(o.workers, 1)); err != nil {
			return nil, err
		}
		if err := d.Close(ctx); err != nil {
			return nil, err
		}
	}
	for _, name := range sortedNames(o.files) {
		if err := w.File(ctx, name, newReader(o.files[name])); err != nil {
			return nil, err
		}
	}
	return w.Commit(ctx, &repository.CommitInfo{
		Created: time.Unix(1_700_000_000, 0), Labels: map[string]string{"vm": o.chain}, Meta: []byte(`{"hello":"world"}`),
	})
}

// writeBlocks writes blocks in windows of a few, with Advance between them.
func writeBlocks(ctx context.Context, d repository.DiskWriter, h *digest.Hasher, m *image, indexes []int64, workers int) error {
	for len(indexes) > 0 {
		n := min(len(indexes), 8*workers)
		window := indexes[:n]
		indexes = indexes[n:]
		errs := make(chan error, workers)
		for k := range workers {
			go func() {
				var err error
				for j := k; j < len(window) && err == nil; j += workers {
					err = d.WriteBlock(ctx, m.block(h, window[j]))
				}
				errs <- err
			}()
		}
		var first error
		for range workers {
			if err := <-errs; err != nil && first == nil {
				first = err
			}
		}
		if first != nil {
			return first
		}
		next := m.count()
		if len(indexes) > 0 {
			next = indexes[0]
		}
		if err := d.Advance(ctx, next); err != nil {
			return err
		}
	}
	return nil
}

// compare reads a point by blocks and says where it first differs from the truth.
func compare(ctx context.Context, r repository.Repository, id repository.PointID, disks map[string]*image) error {
	rd, err := r.Open(ctx, id)
	if err != nil {
		return err
	}
	defer rd.Close()
	h := digest.New(rd.DigestKey())
	for name, m := range disks {
		d, err := rd.Disk(ctx, name)
		if err != nil {
			return err
		}
		if d.Size() != m.size {
			return fmt.Errorf("disk %s has %d bytes, not %d", name, d.Size(), m.size)
		}
		if err := compareDisk(ctx, d, h, m); err != nil {
			return fmt.Errorf("disk %s: %w", name, err)
		}
	}
	return nil
}

func compareDisk(ctx context.Context, d repository.DiskReader, h *digest.Hasher, m *image) error {
	buf, zeros := make([]byte, d.BlockSize()), make([]byte, d.BlockSize())
	data := map[int64]bool{}
	for e, err := range d.Extents(ctx) {
		if err != nil {
			return err
		}
		for off := e.Offset; off < e.Offset+e.Length; off += int64(d.BlockSize()) {
			data[off/int64(d.BlockSize())] = true
		}
	}
	for i := int64(0); i < m.count(); i++ {
		if m.blocks[i] == nil && !data[i] && i%97 != 0 {
			continue // zeros by both accounts; sample them
		}
		want := m.blocks[i]
		if want == nil {
			want = zeros[:m.blockLen(i)]
		}
		b, err := d.ReadBlock(ctx, i, buf)
		if err != nil {
			return err
		}
		got := b.Data
		if got == nil {
			got = zeros[:m.blockLen(i)]
		}
		if len(got) != len(want) {
			return fmt.Errorf("block %d has %d bytes, not %d", i, len(got), len(want))
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("block %d differs at byte %d", i, firstDifference(got, want))
		}
		for k, l := range h.Leaves(nil, want) {
			if b.Leaves[k] != l {
				return fmt.Errorf("block %d, leaf %d: wrong digest", i, k)
			}
		}
		if !digest.IsZero(want) != data[i] {
			return fmt.Errorf("block %d: extents say data=%v", i, data[i])
		}
	}
	return nil
}

// firstDifference returns where a and b, which are equally long, differ first.
func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

// points lists, by ID.
func points(t testing.TB, r repository.Repository, q repository.Query) []*repository.Point {
	t.Helper()
	var out []*repository.Point
	for p, err := range r.Points(context.Background(), q) {
		require.NoError(t, err)
		out = append(out, p)
	}
	return out
}

// copyTree copies a repository, so that it can be damaged.
func copyTree(t testing.TB, from string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "repo")
	require.NoError(t, os.CopyFS(to, os.DirFS(from)))
	return to
}
func newReader(b []byte) io.Reader { return bytes.NewReader(b) }

func sortedNames[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func sortedIndexes(m map[int64][]byte) []int64 {
	out := make([]int64, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func joined(errs ...error) error { return errors.Join(errs...) }

func fnv32(b []byte) uint32 {
	h := fnv.New32a()
	_, _ = h.Write(b)
	return h.Sum32()
}
