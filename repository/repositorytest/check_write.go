package repositorytest

import (
	"fmt"
	"strings"
	"sync"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

func writeChecks() []Check {
	return []Check{
		{"RoundtripSmallBlocks", func(t T, h *Harness) { checkRoundtrip(t, h, small) }},
		{"RoundtripNormalBlocks", func(t T, h *Harness) { checkRoundtrip(t, h, normal) }},
		{"RoundtripZeroDisk", checkZeroDisk},
		{"RoundtripSparseHugeDisk", checkSparse},
		{"RoundtripAcrossSegments", checkSegments},
		{"RoundtripSeveralDisks", checkSeveralDisks},
		{"ConcurrentWriteBlock", checkConcurrentWrites},
		{"ConcurrentDisks", checkConcurrentDisks},
		{"AdvanceChangesNoContent", checkAdvance},
		{"AdvanceIsAPromise", checkAdvancePromise},
		{"WrittenDataIsNotRetained", checkNotRetained},
		{"StatsCount", checkStats},
		{"DedupStoresOnce", checkDedup},
	}
}

func checkRoundtrip(t T, h *Harness, bs int) {
	e := newEnv(t, h)
	for _, size := range []int64{1, 511, int64(bs) - 1, int64(bs), int64(bs) + 1, 6*int64(bs) + oddTail} {
		d := e.random(size, bs, 0.5)
		p := e.commit(one(d))
		e.expectOne(p.ID, d)
	}
}

func checkZeroDisk(t T, h *Harness) {
	e := newEnv(t, h)
	d := newDisk(7*small+oddTail, small)
	never := e.commit(one(d))
	e.expectOne(never.ID, d)
	plan := one(d)
	plan.disks["d1"] = diskPlan{truth: d, write: []int64{0, 1, 2, 3, 4, 5, 6, 7}}
	written := e.commit(plan)
	e.expectOne(written.ID, d)
	require.Equal(t, never.Disk("d1").Root, written.Disk("d1").Root)

	// Zeros given as data are legal; whether they read as data or as zeros is the
	// engine's choice, but they read as zero bytes.
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run()})
	require.NoError(t, err)
	dw, err := w.Disk(e.ctx, repository.DiskSpec{ID: "d1", Size: small, BlockSize: small})
	require.NoError(t, err)
	require.NoError(t, dw.WriteBlock(e.ctx, repository.Block{Data: make([]byte, small), Leaves: make([]repository.Digest, 1)}))
	require.NoError(t, dw.Close(e.ctx))
	proof, err := w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	require.Equal(t, newDisk(small, small).root(w.DigestKey()), proof.Point().Disks[0].Root)
	rd, err := e.repo.Open(e.ctx, w.ID())
	require.NoError(t, err)
	defer func() { require.NoError(t, rd.Close()) }()
	dr, err := rd.Disk(e.ctx, "d1")
	require.NoError(t, err)
	defer func() { require.NoError(t, dr.Close()) }()
	got := make([]byte, small)
	for i := range got {
		got[i] = 0xff
	}
	n, err := dr.ReadAt(got, 0)
	require.Equal(t, small, n, "%v", err)
	require.True(t, digest.IsZero(got))
}

func checkSparse(t T, h *Harness) {
	e := newEnv(t, h)
	const size = 8<<40 + 12_288 + 512
	d := newDisk(size, normal)
	n := d.count()
	for _, i := range []int64{0, 1, 1023, 1024, n / 2, n - 2, n - 1, e.rng.Int64N(n), e.rng.Int64N(n)} {
		d.fill(e.rng, i)
	}
	p1 := e.commit(one(d))
	e.expectOne(p1.ID, d)
	next := d.clone()
	next.fill(e.rng, n/3)
	delete(next.blocks, 1023)
	p2 := e.commit(child(p1.ID, next, 1023, n/3))
	e.expectOne(p2.ID, next)
	e.expectOne(p1.ID, d)
}

// checkSegments writes around the bounds of map segments, whatever their span.
func checkSegments(t T, h *Harness) {
	e := newEnv(t, h)
	for _, bs := range []int{small, normal} {
		seg := e.repo.Info().SegmentBytes / int64(bs) // at least as many blocks as a segment has
		d := newDisk(3*seg*int64(bs)+oddTail, bs)
		for _, i := range []int64{0, seg/4 - 1, seg / 4, seg - 1, seg, 2*seg - 1, 2 * seg, 3 * seg} {
			d.fill(e.rng, max(0, i))
		}
		plan := one(d)
		plan.disks["d1"] = diskPlan{truth: d, advance: true}
		p1 := e.commit(plan)
		e.expectOne(p1.ID, d)
		// Change one block of one segment: its others, and other segments, stay.
		next := d.clone()
		next.fill(e.rng, seg)
		delete(next.blocks, 2*seg)
		p2 := e.commit(child(p1.ID, next, seg, 2*seg))
		e.expectOne(p2.ID, next)
		e.expectOne(p1.ID, d)
	}
}

func checkSeveralDisks(t T, h *Harness) {
	e := newEnv(t, h)
	disks := map[string]*disk{
		"vda":       e.random(5*small+1, small, 0.5),
		"vdb":       e.random(3*normal+511, normal, 0.7),
		"sd_0.1-x":  e.random(1, normal, 1),
		"UPPERcase": newDisk(2*normal, normal),
	}
	plan := &pointPlan{disks: map[string]diskPlan{}, files: map[string][]byte{"config": []byte("c")}}
	for id, d := range disks {
		plan.disks[id] = diskPlan{truth: d}
	}
	p := e.commit(plan)
	e.expect(e.repo, p.ID, disks)
}

// together runs f(0) to f(n-1) at once and returns the first error.
func together(n int, f func(i int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = f(i) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func checkConcurrentWrites(t T, h *Harness) {
	e := newEnv(t, h)
	const workers = 8
	d := e.random(40*small+oddTail, small, 0.8)
	d.fill(e.rng, 0)
	d.blocks[1], d.blocks[2], d.blocks[23] = d.blocks[0], d.blocks[0], d.blocks[0] // equal blocks at once
	delete(d.blocks, 20)
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run()})
	require.NoError(t, err)
	dw, err := w.Disk(e.ctx, repository.DiskSpec{ID: "d1", Size: d.size, BlockSize: d.bs})
	require.NoError(t, err)
	hash := digest.New(w.DigestKey())
	err = together(workers, func(worker int) error {
		for i := int64(worker); i < d.count(); i += workers {
			if err := dw.WriteBlock(e.ctx, d.block(hash, i)); err != nil {
				return fmt.Errorf("block %d: %w", i, err)
			}
			dw.Stats()
		}
		return nil
	})
	require.NoError(t, err)
	require.NoError(t, dw.Close(e.ctx))
	_, err = w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	e.expectOne(w.ID(), d)
}

func checkConcurrentDisks(t T, h *Harness) {
	e := newEnv(t, h)
	truth := map[string]*disk{}
	for i := range 4 {
		truth[fmt.Sprint("d", i)] = e.random(int64(6+i)*small+int64(i), small, 0.6)
	}
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run()})
	require.NoError(t, err)
	err = together(8, func(i int) error {
		if id := fmt.Sprint("d", i); i < 4 {
			return writeDisk(e.ctx, w, id, diskPlan{truth: truth[id], advance: true})
		}
		return w.File(e.ctx, fmt.Sprint("f", i), strings.NewReader(fmt.Sprint("file ", i)))
	})
	require.NoError(t, err)
	_, err = w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	files := map[string][]byte{}
	for i := 4; i < 8; i++ {
		files[fmt.Sprint("f", i)] = []byte(fmt.Sprint("file ", i))
	}
	require.NoError(t, e.compare(e.repo, w.ID(), truth, files))
}

func checkAdvance(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(37*small+oddTail, small, 0.5)
	plain := e.commit(one(d))
	plan := one(d)
	plan.disks["d1"] = diskPlan{truth: d, advance: true}
	stepped := e.commit(plan)
	e.expectOne(stepped.ID, d)
	require.Equal(t, plain.Disk("d1").Root, stepped.Disk("d1").Root)

	// Skipping blocks, going back, staying, and going to the end are all legal.
	next := d.clone()
	next.fill(e.rng, 36)
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run(), Parent: plain.ID})
	require.NoError(t, err)
	dw, err := w.Disk(e.ctx, repository.DiskSpec{ID: "d1", Size: d.size, BlockSize: d.bs, Inherit: true})
	require.NoError(t, err)
	for _, to := range []int64{0, 20, 10, 20, 36} {
		require.NoError(t, dw.Advance(e.ctx, to), "advance to %d", to)
	}
	require.NoError(t, dw.WriteBlock(e.ctx, next.block(digest.New(w.DigestKey()), 36)))
	require.NoError(t, dw.Advance(e.ctx, d.count()))
	require.NoError(t, dw.Close(e.ctx))
	_, err = w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	e.expectOne(w.ID(), next)
}

func checkAdvancePromise(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(40*small, small, 1)
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run()})
	require.NoError(t, err)
	dw, err := w.Disk(e.ctx, repository.DiskSpec{ID: "d1", Size: d.size, BlockSize: d.bs})
	require.NoError(t, err)
	require.Error(t, dw.Advance(e.ctx, -1))
	hash := digest.New(w.DigestKey())
	require.NoError(t, dw.WriteBlock(e.ctx, d.block(hash, 39)), "blocks may come in any order")
	require.NoError(t, dw.Advance(e.ctx, 39))
	require.Error(t, dw.WriteBlock(e.ctx, d.block(hash, 5)), "a block that was promised not to come")
	require.NoError(t, dw.Close(e.ctx))
	_, err = w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	want := newDisk(d.size, d.bs)
	want.blocks[39] = d.blocks[39]
	e.expectOne(w.ID(), want)
}

func checkNotRetained(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(20*small, small, 1)
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run()})
	require.NoError(t, err)
	dw, err := w.Disk(e.ctx, repository.DiskSpec{ID: "d1", Size: d.size, BlockSize: d.bs})
	require.NoError(t, err)
	hash := digest.New(w.DigestKey())
	buf, leaves := make([]byte, d.bs), make([]repository.Digest, 1)
	for i := range d.count() {
		copy(buf, d.blocks[i])
		leaves[0] = hash.Leaf(buf)
		require.NoError(t, dw.WriteBlock(e.ctx, repository.Block{Index: i, Data: buf, Leaves: leaves}))
		clear(buf)
		clear(leaves)
	}
	require.NoError(t, dw.Close(e.ctx))
	_, err = w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	e.expectOne(w.ID(), d)
}

func checkStats(t T, h *Harness) {
	e := newEnv(t, h)
	d := newDisk(9*small+oddTail, small)
	for i := range d.count() {
		d.blocks[i] = make([]byte, repository.BlockLen(d.size, d.bs, i))
		noise(e.rng, d.blocks[i])
	}
	p1 := e.commit(one(d))
	s := p1.Disk("d1").Stats
	require.Equal(t, int64(10), s.Written)
	require.Zero(t, s.Zero)
	require.Zero(t, s.Inherited)
	require.Zero(t, s.Dedup)
	require.Equal(t, d.size, s.BytesIn)
	require.Positive(t, s.Stored)

	next := d.clone()
	next.fill(e.rng, 1)
	next.fill(e.rng, 9)
	delete(next.blocks, 4)
	p2 := e.commit(child(p1.ID, next, 1, 4, 9))
	s = p2.Disk("d1").Stats
	require.Equal(t, int64(2), s.Written)
	require.Equal(t, int64(1), s.Zero)
	require.Equal(t, int64(7), s.Inherited)
	require.Equal(t, int64(small+oddTail), s.BytesIn)
	e.expectOne(p2.ID, next)
}

func checkDedup(t T, h *Harness) {
	e := newEnv(t, h)
	d := newDisk(8*normal, normal)
	for i := range d.count() {
		d.blocks[i] = make([]byte, normal)
		noise(e.rng, d.blocks[i])
	}
	first := e.commit(one(d)).Disk("d1").Stats
	p := e.commit(one(d)) // no parent: the same bytes once more
	second := p.Disk("d1").Stats
	require.Equal(t, int64(8), second.Written)
	require.Equal(t, int64(8), second.Dedup)
	require.Less(t, second.Stored, first.Stored/4, "stored %d for bytes that were there, %d at first", second.Stored, first.Stored)
	e.expectOne(p.ID, d)
}
