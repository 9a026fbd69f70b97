package fakes_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// writePoint commits a point with disk "d" of the given blocks; nil: zeros.
func writePoint(ctx context.Context, r repository.Repository, spec repository.PointSpec, size int64, blocks map[int64][]byte) (repository.PointID, error) {
	w, err := r.Begin(ctx, &spec)
	if err != nil {
		return "", err
	}
	defer func() { _ = w.Abort(context.WithoutCancel(ctx)) }()
	d, err := w.Disk(ctx, repository.DiskSpec{ID: "d", Size: size, BlockSize: repository.DefaultBlockSize, Inherit: spec.Parent != ""})
	if err != nil {
		return "", err
	}
	h := digest.New(w.DigestKey())
	for i, b := range blocks {
		block := repository.Block{Index: i, Data: b}
		if b != nil {
			block.Leaves = h.Leaves(nil, b)
		}
		if err := d.WriteBlock(ctx, block); err != nil {
			return "", err
		}
	}
	if err := d.Close(ctx); err != nil {
		return "", err
	}
	_, err = w.Commit(ctx, &repository.CommitInfo{Created: time.Unix(1e9, 0)})
	return w.ID(), err
}

func readDisk(ctx context.Context, r repository.Repository, id repository.PointID) ([]byte, error) {
	rd, err := r.Open(ctx, id)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rd.Close() }()
	d, err := rd.Disk(ctx, "d")
	if err != nil {
		return nil, err
	}
	b := make([]byte, d.Size())
	if n, err := d.ReadAt(b, 0); err != nil && !(errors.Is(err, io.EOF) && n == len(b)) {
		return nil, err
	}
	return b, nil
}

func TestRepositoryOutlivesItsProcess(t *testing.T) {
	ctx := t.Context()
	store := fakes.NewStore()
	r, err := store.Open(ctx, fakes.RepositoryOptions{})
	require.NoError(t, err)
	a := bytes.Repeat([]byte("a"), repository.DefaultBlockSize)
	tail := bytes.Repeat([]byte("t"), 700)
	first, err := writePoint(ctx, r, repository.PointSpec{Chain: "vm", Run: "r1"}, 40*repository.DefaultBlockSize+700, map[int64][]byte{3: a, 40: tail})
	require.NoError(t, err)
	second, err := writePoint(ctx, r, repository.PointSpec{Chain: "vm", Run: "r2", Parent: first}, 40*repository.DefaultBlockSize+700, map[int64][]byte{17: a})
	require.NoError(t, err)

	again, err := store.Open(ctx, fakes.RepositoryOptions{})
	require.NoError(t, err)
	require.Equal(t, r.Info().ID, again.Info().ID)
	want := make([]byte, 40*repository.DefaultBlockSize+700)
	copy(want[3*repository.DefaultBlockSize:], a)
	copy(want[40*repository.DefaultBlockSize:], tail)
	got, err := readDisk(ctx, again, first)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))
	copy(want[17*repository.DefaultBlockSize:], a)
	got, err = readDisk(ctx, again, second)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))
	rep, err := again.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(t, err)
	require.Empty(t, rep.Damages)
}
