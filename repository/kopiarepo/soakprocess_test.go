package kopiarepo_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
)

// A process of the soak test gets its task from these environment variables, and tells
// what it did in lines on its standard output: "acked POINT SUM", "going POINT",
// "read POINT SUM", "maintained", "wrong TEXT".
const (
	soakRole  = "HOLDFAST_TEST_SOAK_ROLE"  // writer, reader or pruner, and a number
	soakDir   = "HOLDFAST_TEST_SOAK_DIR"   // the repository
	soakStart = "HOLDFAST_TEST_SOAK_START" // Unix nanoseconds
	soakEnd   = "HOLDFAST_TEST_SOAK_END"
)

// soakClock goes 6 hours in a minute.
func soakClock(start time.Time) func() time.Time {
	return func() time.Time { return start.Add(360 * time.Since(start)) }
}

// soakWorker is what the processes have in common.
type soakWorker struct {
	role   string
	number int
	cfg    kopiarepo.Config
	end    time.Time
	rnd    *rand.Rand
}

// TestSoakProcess is the process of TestSoak, and nothing by itself.
func TestSoakProcess(t *testing.T) {
	if os.Getenv(soakRole) == "" {
		t.Skip("it is a process of TestSoak")
	}
	var w soakWorker
	var start, end int64
	_, err := fmt.Sscan(os.Getenv(soakRole)+" "+os.Getenv(soakStart)+" "+os.Getenv(soakEnd), &w.role, &w.number, &start, &end)
	require.NoError(t, err)
	w.end = time.Unix(0, end)
	w.rnd = rand.New(rand.NewPCG(uint64(os.Getpid()), uint64(time.Now().UnixNano())))
	w.cfg = config(os.Getenv(soakDir))
	w.cfg.Clock, w.cfg.Workers, w.cfg.ReadCache = soakClock(time.Unix(0, start)), 1, 4<<20
	ctx := context.Background()
	for time.Now().Before(w.end) {
		if err := w.work(ctx); err != nil && !errors.Is(err, repository.ErrLocked) {
			fmt.Printf("wrong %s %d: %s\n", w.role, w.number, strings.ReplaceAll(err.Error(), "\n", "; "))
		}
	}
}

// work opens the repository and works for some time, as long as a real one would.
func (w *soakWorker) work(ctx context.Context) (err error) {
	r, err := kopiarepo.Open(ctx, w.cfg)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	for range 1 + w.rnd.IntN(12) {
		if !time.Now().Before(w.end) {
			return nil
		}
		switch w.role {
		case "writer":
			err = w.write(ctx, r)
		case "reader":
			err = w.read(ctx, r)
		default:
			err = w.prune(ctx, r)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// imageOf is the content of a disk in its n-th version; a part of it is in the one
// before too, and a part of it other disks hold.
func imageOf(number, n int) *image {
	m := newImage(5*repository.LeafSize+700, repository.LeafSize)
	for i := range m.count() {
		version := n - (n-int(i))%int(m.count()) // each version changes one block
		h := fnv.New64a()
		if i == 0 {
			_, _ = fmt.Fprintf(h, "shared %d", version/7)
		} else {
			_, _ = fmt.Fprintf(h, "%d %d %d", number, i, version)
		}
		b := make([]byte, m.blockLen(i))
		rnd := rand.New(rand.NewPCG(h.Sum64(), 1))
		for k := range min(len(b), 12<<10) {
			b[k] = byte(rnd.Uint32())
		}
		m.blocks[i] = b
	}
	return m
}

func (m *image) sum() string {
	h := sha256.New()
	for i := range m.count() {
		h.Write(m.at(i))
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// write makes the next version of the disk a point, in full or on top of the newest.
func (w *soakWorker) write(ctx context.Context, r *kopiarepo.Repository) (err error) {
	chain := fmt.Sprintf("vm-%d", w.number)
	anybody := func(string) bool { return true } // a lease is of a process that was killed
	lock, err := r.Lock(ctx, chain, repository.LockOptions{Holder: chain, TTL: 24 * time.Hour, Takeover: anybody})
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	defer func() { err = errors.Join(err, lock.Release(ctx)) }()
	var newest *repository.Point
	n := 0
	for p, err := range r.Points(ctx, repository.Query{Chain: chain}) {
		if err != nil {
			return fmt.Errorf("list: %w", err)
		}
		if p.State != repository.Committed {
			return fmt.Errorf("point %s is %s: %s", p.ID, p.State, p.Detail)
		}
		newest = p
	}
	o := backupOptions{chain: chain, lock: lock}
	if newest != nil {
		if _, err := fmt.Sscanf(newest.Run, "r%dx", &n); err != nil {
			return err
		}
		n++
	}
	m := imageOf(w.number, n)
	o.run = fmt.Sprintf("r%dx%d", n, w.rnd.Uint32())
	if newest != nil && w.rnd.IntN(4) > 0 {
		o.parent, o.changed = newest.ID, map[string][]int64{"d": {int64(n) % m.count()}}
		old := imageOf(w.number, n-1)
		o.changed["d"] = o.changed["d"][:0]
		for i := range m.count() {
			if !bytes.Equal(old.at(i), m.at(i)) {
				o.changed["d"] = append(o.changed["d"], i)
			}
		}
	}
	proof, err := backup(ctx, r, map[string]*image{"d": m}, o)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	fmt.Printf("acked %s %s\n", proof.Point().ID, m.sum())
	return nil
}

// read reads some point in full, and sometimes verifies.
func (w *soakWorker) read(ctx context.Context, r *kopiarepo.Repository) error {
	if w.rnd.IntN(6) == 0 {
		rep, err := r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyLevel(w.rnd.IntN(2))})
		if err != nil {
			return fmt.Errorf("verify: %w", err)
		}
		if len(rep.Damages) > 0 {
			return fmt.Errorf("verify calls damaged: %v", rep.Damages)
		}
		return nil
	}
	var list []*repository.Point
	for p, err := range r.Points(ctx, repository.Query{}) {
		if err != nil {
			return fmt.Errorf("list: %w", err)
		}
		list = append(list, p)
	}
	if len(list) == 0 {
		return nil
	}
	p := list[w.rnd.IntN(len(list))]
	sum, err := w.sumOf(ctx, r, p.ID)
	if err != nil {
		rd, oerr := r.Open(ctx, p.ID)
		if errors.Is(oerr, repository.ErrNotFound) {
			return nil // it was deleted meanwhile
		}
		if oerr == nil {
			oerr = rd.Close()
		}
		return fmt.Errorf("read of point %s: %w", p.ID, errors.Join(err, oerr))
	}
	fmt.Printf("read %s %s\n", p.ID, sum)
	return nil
}

func (w *soakWorker) sumOf(ctx context.Context, r *kopiarepo.Repository, id repository.PointID) (string, error) {
	rd, err := r.Open(ctx, id)
	if err != nil {
		return "", err
	}
	defer func() { _ = rd.Close() }()
	d, err := rd.Disk(ctx, "d")
	if err != nil {
		return "", err
	}
	m := newImage(d.Size(), d.BlockSize())
	for i := range m.count() {
		b, err := d.ReadBlock(ctx, i, make([]byte, d.BlockSize()))
		if err != nil {
			return "", err
		}
		if b.Data != nil {
			m.blocks[i] = b.Data
		}
	}
	return m.sum(), nil
}

// prune deletes all but the newest points of each chain, and maintains.
func (w *soakWorker) prune(ctx context.Context, r *kopiarepo.Repository) (err error) {
	anybody := func(string) bool { return true } // there is one pruner at a time
	lock, err := r.Lock(ctx, repository.LockMaintenance, repository.LockOptions{Holder: "pruner", TTL: 24 * time.Hour, Takeover: anybody})
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	defer func() { err = errors.Join(err, lock.Release(ctx)) }()
	chains := map[string][]repository.PointID{}
	for p, err := range r.Points(ctx, repository.Query{}) {
		if err != nil {
			return fmt.Errorf("list: %w", err)
		}
		chains[p.Chain] = append(chains[p.Chain], p.ID)
	}
	for _, ids := range chains {
		for _, id := range ids[:max(0, len(ids)-3)] {
			fmt.Printf("going %s\n", id)
			if err := r.Delete(ctx, id, lock); err != nil {
				return fmt.Errorf("delete: %w", err)
			}
		}
	}
	if _, err := r.Maintain(ctx, lock, &repository.MaintainOptions{Full: w.rnd.IntN(2) == 0}); err != nil {
		return fmt.Errorf("maintenance: %w", err)
	}
	fmt.Println("maintained")
	return nil
}
