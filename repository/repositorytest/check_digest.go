package repositorytest

import (
	"fmt"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

func digestChecks() []Check {
	return []Check{
		{"DigestsReturnedAsGiven", checkDigestsAsGiven},
		{"DigestKeyTravelsWithTheChain", checkDigestKey},
		{"DigestKeyDoesNotPrint", checkDigestKeyPrint},
		{"RootIsTheTreeOfTheContent", checkRootReference},
		{"RootIndependentOfBlockSize", checkRootBlockSize},
		{"RootIndependentOfPath", checkRootPath},
	}
}

func checkDigestsAsGiven(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(2*normal+small+1, normal, 1)
	w, dw := e.openDisk(d.size, d.bs)
	given := map[int64][]repository.Digest{}
	for i := range d.count() {
		n := (repository.BlockLen(d.size, d.bs, i) + repository.LeafSize - 1) / repository.LeafSize
		leaves := make([]repository.Digest, n)
		for j := range leaves {
			noise(e.rng, leaves[j][:])
		}
		given[i] = append([]repository.Digest(nil), leaves...)
		require.NoError(t, dw.WriteBlock(e.ctx, repository.Block{Index: i, Data: d.blocks[i], Leaves: leaves}))
	}
	require.NoError(t, dw.Close(e.ctx))
	_, err := w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	rd, err := e.repo.Open(e.ctx, w.ID())
	require.NoError(t, err)
	defer func() { require.NoError(t, rd.Close()) }()
	dr, err := rd.Disk(e.ctx, "d1")
	require.NoError(t, err)
	defer func() { require.NoError(t, dr.Close()) }()
	for i := range d.count() {
		b, err := dr.ReadBlock(e.ctx, i, make([]byte, normal))
		require.NoError(t, err)
		require.Equal(t, given[i], b.Leaves)
		leaves, err := dr.Leaves(e.ctx, i)
		require.NoError(t, err)
		require.Equal(t, given[i], leaves)
	}
	// The deepest check is the one that compares data with digests.
	rep, err := e.repo.Verify(e.ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(t, err)
	require.Equal(t, []repository.PointID{w.ID()}, rep.Damaged(), "digests of other data")
}

func checkDigestKey(t T, h *Harness) {
	e := newEnv(t, h)
	p := e.commit(one(e.random(small, small, 1)))
	rd, err := e.repo.Open(e.ctx, p.ID)
	require.NoError(t, err)
	key := rd.DigestKey()
	require.NoError(t, rd.Close())
	require.NotEqual(t, repository.DigestKey{}, key)
	again := e.reopen()
	w, err := again.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run(), Parent: p.ID})
	require.NoError(t, err)
	require.True(t, key == w.DigestKey(), "the key of one chain changed")
	require.NoError(t, w.Abort(e.ctx))
	w, err = again.Begin(e.ctx, &repository.PointSpec{Chain: "vm-2", Run: e.run()})
	require.NoError(t, err)
	require.False(t, key == w.DigestKey(), "two chains share a key")
	require.NoError(t, w.Abort(e.ctx))
}

func checkDigestKeyPrint(t T, h *Harness) {
	e := newEnv(t, h)
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run()})
	require.NoError(t, err)
	defer func() { require.NoError(t, w.Abort(e.ctx)) }()
	for _, format := range []string{"%v", "%s", "%+v", "%#v"} {
		require.Equal(t, "[secret]", fmt.Sprintf(format, w.DigestKey()))
	}
}

func checkRootReference(t T, h *Harness) {
	e := newEnv(t, h)
	for _, size := range []int64{1, small, small + 1, 5*normal + oddTail, 3<<30 + 513} {
		d := newDisk(size, normal)
		for range 5 {
			d.fill(e.rng, e.rng.Int64N(d.count()))
		}
		w, err := e.write(e.repo, one(d))
		require.NoError(t, err)
		proof, err := w.Commit(e.ctx, &repository.CommitInfo{})
		require.NoError(t, err)
		require.Equal(t, d.root(w.DigestKey()), proof.Point().Disks[0].Root, "size %d", size)
	}
	// Equal content has equal roots, other content has others.
	d := e.random(4*small, small, 0.5)
	a, b := e.commit(one(d)), e.commit(one(d))
	d = d.clone()
	d.fill(e.rng, 0)
	c := e.commit(one(d))
	require.Equal(t, a.Disks[0].Root, b.Disks[0].Root)
	require.NotEqual(t, a.Disks[0].Root, c.Disks[0].Root)
	require.False(t, a.Disks[0].Root.IsZero())
}

func checkRootBlockSize(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(11*normal+oddTail, small, 0.4)
	want := e.commit(one(d)).Disks[0].Root
	for _, bs := range []int{2 * small, normal, 4 * normal, repository.MaxBlockSize} {
		r := d.reblock(bs)
		p := e.commit(one(r))
		e.expectOne(p.ID, r)
		require.Equal(t, want, p.Disks[0].Root, "block size %d", bs)
	}
}

func checkRootPath(t T, h *Harness) {
	e := newEnv(t, h)
	points, truths := e.generations(4)
	want := e.commit(one(truths[3])).Disks[0].Root
	require.Equal(t, want, points[3].Disks[0].Root, "full and incremental")
	// Backwards, and written in full with a parent.
	var write []int64
	for i := range truths[3].count() {
		write = append(write, i)
	}
	back := e.commit(child(points[0].ID, truths[3], write...))
	require.Equal(t, want, back.Disks[0].Root, "inherit and overwrite all")
}
