package repositorytest

import (
	"errors"
	"io"
	"strings"
	"testing/iotest"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

func refusalChecks() []Check {
	return []Check{
		{"BadPointSpecRefused", checkBadSpec},
		{"BadDiskSpecRefused", checkBadDisk},
		{"DuplicateDiskRefused", checkDuplicateDisk},
		{"BadBlockRefused", checkBadBlock},
		{"DoubleWriteRefused", checkDoubleWrite},
		{"ConcurrentDoubleWriteRefused", checkConcurrentDoubleWrite},
		{"ClosedDiskRefuses", checkClosedDisk},
		{"ParentUnknownRefused", checkParentUnknown},
		{"ParentOfOtherChainRefused", checkParentChain},
		{"InheritMismatchRefused", checkInheritMismatch},
		{"InheritWithoutSourceRefused", checkInheritWithout},
	}
}

func fileChecks() []Check {
	return []Check{
		{"FilesRoundtrip", checkFiles},
		{"FileRefused", checkFileRefused},
		{"FileReadErrorSurfaces", checkFileError},
		{"FileLimit", checkFileLimit},
	}
}

func checkBadSpec(t T, h *Harness) {
	e := newEnv(t, h)
	for _, s := range []repository.PointSpec{
		{Chain: "", Run: "r"},
		{Chain: "VM", Run: "r"},
		{Chain: "a/b", Run: "r"},
		{Chain: "a b", Run: "r"},
		{Chain: strings.Repeat("x", 129), Run: "r"},
		{Chain: "ä", Run: "r"},
		{Chain: "vm", Run: ""},
		{Chain: "vm", Run: "R"},
		{Chain: "vm", Run: "r-1"},
		{Chain: "vm", Run: strings.Repeat("x", 33)},
	} {
		w, err := e.repo.Begin(e.ctx, &s)
		require.Error(t, err, "chain %q, run %q", s.Chain, s.Run)
		require.Nil(t, w)
	}
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{
		Chain: strings.Repeat("x", 125) + "._-", Run: strings.Repeat("9", 32), Name: "Größe / \x00 any name",
	})
	require.NoError(t, err)
	require.Regexp(t, `^[a-z0-9-]{1,64}$`, string(w.ID()))
	require.NoError(t, w.Abort(e.ctx))
	require.Empty(t, e.list(e.repo, repository.Query{}))
}

func checkBadDisk(t T, h *Harness) {
	e := newEnv(t, h)
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run()})
	require.NoError(t, err)
	for _, s := range []repository.DiskSpec{
		{ID: "", Size: small, BlockSize: small},
		{ID: "a/b", Size: small, BlockSize: small},
		{ID: strings.Repeat("x", 65), Size: small, BlockSize: small},
		{ID: "a b", Size: small, BlockSize: small},
		{ID: "d", Size: -1, BlockSize: small},
		{ID: "d", Size: small, BlockSize: 0},
		{ID: "d", Size: small, BlockSize: small - 1},
		{ID: "d", Size: small, BlockSize: 3 * small},
		{ID: "d", Size: small, BlockSize: small / 2},
		{ID: "d", Size: small, BlockSize: 2 * repository.MaxBlockSize},
		{ID: "d", Size: small, BlockSize: -small},
	} {
		_, err := w.Disk(e.ctx, s)
		require.Error(t, err, "%+v", s)
	}
	d, err := w.Disk(e.ctx, repository.DiskSpec{ID: "d", Size: small, BlockSize: repository.MaxBlockSize})
	require.NoError(t, err, "a refused disk leaves nothing behind")
	require.NoError(t, d.Close(e.ctx))
	require.NoError(t, w.Abort(e.ctx))
}

func checkDuplicateDisk(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(3*small, small, 1)
	plan := one(d)
	w, err := e.write(e.repo, plan)
	require.NoError(t, err)
	_, err = w.Disk(e.ctx, repository.DiskSpec{ID: "d1", Size: small, BlockSize: small})
	require.ErrorIs(t, err, repository.ErrExists)
	_, err = w.Commit(e.ctx, &plan.CommitInfo)
	require.NoError(t, err)
	e.expectOne(w.ID(), d)
}

// openDisk begins a point with one empty disk.
func (e *env) openDisk(size int64, bs int) (repository.Writer, repository.DiskWriter) {
	e.Helper()
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run()})
	require.NoError(e, err)
	dw, err := w.Disk(e.ctx, repository.DiskSpec{ID: "d1", Size: size, BlockSize: bs})
	require.NoError(e, err)
	return w, dw
}

func checkBadBlock(t T, h *Harness) {
	e := newEnv(t, h)
	const tail = small + 7
	d := e.random(2*normal+tail, normal, 1)
	w, dw := e.openDisk(d.size, d.bs)
	leaves := func(n int) []repository.Digest { return make([]repository.Digest, n) }
	full := make([]byte, normal)
	noise(e.rng, full)
	for what, b := range map[string]repository.Block{
		"negative index":         {Index: -1, Data: full, Leaves: leaves(4)},
		"index past the end":     {Index: 3, Data: full, Leaves: leaves(4)},
		"far index":              {Index: 1 << 61},
		"short data":             {Index: 0, Data: full[:normal-1], Leaves: leaves(4)},
		"long data":              {Index: 0, Data: append(full, 1), Leaves: leaves(5)},
		"empty data":             {Index: 0, Data: full[:0], Leaves: leaves(4)},
		"whole block as tail":    {Index: 2, Data: full, Leaves: leaves(4)},
		"short tail":             {Index: 2, Data: full[:tail-1], Leaves: leaves(2)},
		"too few leaves":         {Index: 0, Data: full, Leaves: leaves(3)},
		"too many leaves":        {Index: 0, Data: full, Leaves: leaves(5)},
		"no leaves":              {Index: 0, Data: full},
		"leaves of whole block":  {Index: 2, Data: full[:tail], Leaves: leaves(4)},
		"zeros, too many leaves": {Index: 0, Leaves: leaves(5)},
	} {
		require.Error(t, dw.WriteBlock(e.ctx, b), what)
	}
	hash := digest.New(w.DigestKey())
	for i := range d.count() {
		require.NoError(t, dw.WriteBlock(e.ctx, d.block(hash, i)), "a refused block %d leaves nothing behind", i)
	}
	require.NoError(t, dw.Close(e.ctx))
	_, err := w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	e.expectOne(w.ID(), d)
}

func checkDoubleWrite(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(4*small, small, 1)
	delete(d.blocks, 2)
	other := d.clone()
	other.fill(e.rng, 1)
	other.fill(e.rng, 2)
	w, dw := e.openDisk(d.size, d.bs)
	hash := digest.New(w.DigestKey())
	for i := range d.count() {
		require.NoError(t, dw.WriteBlock(e.ctx, d.block(hash, i)))
	}
	for _, i := range []int64{1, 2, 3} {
		require.Error(t, dw.WriteBlock(e.ctx, other.block(hash, i)), "block %d for the second time", i)
	}
	require.Error(t, dw.WriteBlock(e.ctx, repository.Block{Index: 0}), "zeros over data")
	require.NoError(t, dw.Close(e.ctx))
	_, err := w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	e.expectOne(w.ID(), d)
}

func checkConcurrentDoubleWrite(t T, h *Harness) {
	e := newEnv(t, h)
	a := e.random(8*small, small, 1)
	w, dw := e.openDisk(a.size, a.bs)
	hash := digest.New(w.DigestKey())
	const writers = 6
	wins := make([][writers]bool, a.count())
	require.NoError(t, together(writers, func(k int) error {
		for i := range a.count() {
			wins[i][k] = dw.WriteBlock(e.ctx, a.block(hash, i)) == nil
		}
		return nil
	}))
	for i := range wins {
		n := 0
		for _, won := range wins[i] {
			if won {
				n++
			}
		}
		require.Equal(t, 1, n, "block %d: so many writers succeeded", i)
	}
	require.NoError(t, dw.Close(e.ctx))
	_, err := w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	e.expectOne(w.ID(), a)
}

func checkClosedDisk(t T, h *Harness) {
	e := newEnv(t, h)
	d := e.random(3*small, small, 1)
	delete(d.blocks, 1)
	plan := one(d)
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run()})
	require.NoError(t, err)
	dw, err := w.Disk(e.ctx, repository.DiskSpec{ID: "d1", Size: d.size, BlockSize: d.bs})
	require.NoError(t, err)
	hash := digest.New(w.DigestKey())
	require.NoError(t, dw.WriteBlock(e.ctx, d.block(hash, 0)))
	require.NoError(t, dw.WriteBlock(e.ctx, d.block(hash, 2)))
	require.NoError(t, dw.Close(e.ctx))
	late := e.random(3*small, small, 1)
	require.Error(t, dw.WriteBlock(e.ctx, late.block(hash, 1)), "a block after Close")
	_, err = w.Commit(e.ctx, &plan.CommitInfo)
	require.NoError(t, err)
	e.expectOne(w.ID(), d)
}

func checkParentUnknown(t T, h *Harness) {
	e := newEnv(t, h)
	_, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run(), Parent: "no-such-point"})
	require.ErrorIs(t, err, repository.ErrNotFound)
	p := e.commit(one(e.random(small, small, 1)))
	e.deletePoint(p.ID)
	_, err = e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run(), Parent: p.ID})
	require.ErrorIs(t, err, repository.ErrNotFound, "a deleted parent")
}

func checkParentChain(t T, h *Harness) {
	e := newEnv(t, h)
	plan := one(e.random(small, small, 1))
	plan.Chain = "vm-a"
	p := e.commit(plan)
	_, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-b", Run: e.run(), Parent: p.ID})
	require.Error(t, err)
}

func checkInheritMismatch(t T, h *Harness) {
	e := newEnv(t, h)
	p := e.commit(one(e.random(4*normal, normal, 1)))
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run(), Parent: p.ID})
	require.NoError(t, err)
	for _, s := range []repository.DiskSpec{
		{ID: "d1", Size: 4*normal + 512, BlockSize: normal},
		{ID: "d1", Size: 4*normal - 512, BlockSize: normal},
		{ID: "d1", Size: 8 * normal, BlockSize: normal},
		{ID: "d1", Size: 4 * normal, BlockSize: small},
		{ID: "d1", Size: 4 * normal, BlockSize: 2 * normal},
	} {
		s.Inherit = true
		_, err := w.Disk(e.ctx, s)
		require.Error(t, err, "inherit as %+v", s)
	}
	// A grown disk is written in full beside the parent.
	grown := e.random(8*normal, normal, 0.5)
	require.NoError(t, writeDisk(e.ctx, w, "d1", diskPlan{truth: grown}))
	_, err = w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	e.expectOne(w.ID(), grown)
}

func checkInheritWithout(t T, h *Harness) {
	e := newEnv(t, h)
	p := e.commit(one(e.random(small, small, 1)))
	spec := repository.DiskSpec{ID: "d2", Size: small, BlockSize: small, Inherit: true}
	for _, parent := range []repository.PointID{"", p.ID} {
		w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run(), Parent: parent})
		require.NoError(t, err)
		_, err = w.Disk(e.ctx, spec)
		require.Error(t, err, "inherit disk d2 from parent %q", parent)
		require.NoError(t, w.Abort(e.ctx))
	}
}

func checkFiles(t T, h *Harness) {
	e := newEnv(t, h)
	files := map[string][]byte{
		"empty": {}, "domain.xml": []byte("<domain/>"), "A_b-c.1": make([]byte, 3<<20+17), strings.Repeat("n", 64): {0},
	}
	noise(e.rng, files["A_b-c.1"])
	plan := one(e.random(small, small, 1))
	plan.files = files
	p := e.commit(plan)
	require.Len(t, p.Files, len(files))
	for _, f := range p.Files {
		require.Contains(t, files, f.Name)
		require.Equal(t, int64(len(files[f.Name])), f.Size, f.Name)
	}
	require.NoError(t, e.compare(e.repo, p.ID, map[string]*disk{"d1": plan.disks["d1"].truth}, files))
	// A child does not inherit files.
	c := e.commit(child(p.ID, plan.disks["d1"].truth))
	require.Empty(t, c.Files)
	// A point of files alone is legal.
	p = e.commit(&pointPlan{files: map[string][]byte{"f": []byte("x")}})
	require.NoError(t, e.compare(e.repo, p.ID, nil, map[string][]byte{"f": []byte("x")}))
}

func checkFileRefused(t T, h *Harness) {
	e := newEnv(t, h)
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run()})
	require.NoError(t, err)
	for _, name := range []string{"", "a/b", "../x", "a b", strings.Repeat("n", 65), "ü"} {
		require.Error(t, w.File(e.ctx, name, strings.NewReader("x")), "name %q", name)
	}
	require.NoError(t, w.File(e.ctx, "f", strings.NewReader("first")))
	require.ErrorIs(t, w.File(e.ctx, "f", strings.NewReader("second")), repository.ErrExists)
	_, err = w.Commit(e.ctx, &repository.CommitInfo{})
	require.NoError(t, err)
	require.NoError(t, e.compare(e.repo, w.ID(), nil, map[string][]byte{"f": []byte("first")}))
}

func checkFileError(t T, h *Harness) {
	e := newEnv(t, h)
	boom := errors.New("source broke")
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run()})
	require.NoError(t, err)
	broken := io.MultiReader(strings.NewReader("half"), iotest.ErrReader(boom))
	require.ErrorIs(t, w.File(e.ctx, "f", broken), boom)
	require.NoError(t, w.File(e.ctx, "g", strings.NewReader("whole")))
	_, err = w.Commit(e.ctx, &repository.CommitInfo{})
	if err != nil {
		e.invisible(w.ID())
		return
	}
	rd, err := e.repo.Open(e.ctx, w.ID())
	require.NoError(t, err)
	defer func() { require.NoError(t, rd.Close()) }()
	_, err = rd.File(e.ctx, "f")
	require.ErrorIs(t, err, repository.ErrNotFound, "half a file was kept")
}

// zeroReader yields zeros for ever.
type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func checkFileLimit(t T, h *Harness) {
	e := newEnv(t, h)
	w, err := e.repo.Begin(e.ctx, &repository.PointSpec{Chain: "vm-1", Run: e.run()})
	require.NoError(t, err)
	require.Error(t, w.File(e.ctx, "endless", zeroReader{}))
	require.NoError(t, w.Abort(e.ctx))
}
