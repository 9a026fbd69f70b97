package kopiarepo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"

	"github.com/holdfast-backup/holdfast/repository"
)

// contents is what kopia's object functions read from.
type contents struct{ content.Reader }

func (contents) PrefetchContents(context.Context, []content.ID, string) []content.ID { return nil }

const (
	maxDirObject = 64 << 20
	maxIndex     = 64 << 20
	maxConfig    = 16 << 20
)

// damaged wraps an error of the engine while reading, unless the caller gave up.
func damaged(ctx context.Context, err error, what string) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, repository.ErrDamaged):
		return fmt.Errorf("%s: %w", what, err)
	}
	return fmt.Errorf("%s: %w: %w", what, repository.ErrDamaged, err)
}

// getContent reads one content. If it is not where the index says, the index is
// read anew: maintenance may have moved it.
func getContent(ctx context.Context, dr repo.DirectRepository, id content.ID) ([]byte, error) {
	s, ok := storeOf(dr)
	if !ok {
		return nil, errClosed
	}
	gctx, done := s.guard(ctx)
	b, err := getGuarded(gctx, dr, s, id)
	return b, done(err)
}

func getGuarded(ctx context.Context, dr repo.DirectRepository, s *blobStore, id content.ID) ([]byte, error) {
	b, err := dr.ContentReader().GetContent(ctx, id)
	if err == nil || ctx.Err() != nil || !id.HasPrefix() && !errors.Is(err, content.ErrContentNotFound) && !errors.Is(err, blob.ErrBlobNotFound) {
		return b, err
	}
	s.forgetSource() // a blob that was good may have gone bad: then its copy serves
	if rerr := dr.Refresh(ctx); rerr != nil {
		return nil, err
	}
	return dr.ContentReader().GetContent(ctx, id)
}

// storeOf returns the storage of ours under an engine.
func storeOf(dr repo.DirectRepository) (*blobStore, bool) {
	c, ok := dr.BlobReader().ConnectionInfo().Config.(*storageConfig)
	if !ok {
		return nil, false
	}
	openStores.mu.Lock()
	defer openStores.mu.Unlock()
	s, ok := openStores.all[c.Handle]
	return s, ok
}

// getObject reads a whole object of at most limit bytes.
func getObject(ctx context.Context, dr repo.DirectRepository, id object.ID, limit int64) ([]byte, error) {
	if cid, compressed, ok := id.ContentID(); ok && !compressed {
		b, err := getContent(ctx, dr, cid)
		if err == nil && int64(len(b)) > limit {
			return nil, fmt.Errorf("%w: object %s has %d bytes", repository.ErrDamaged, id, len(b))
		}
		return b, err
	}
	o, err := object.Open(ctx, contents{dr.ContentReader()}, id)
	if err != nil {
		return nil, err
	}
	defer func() { _ = o.Close() }()
	if o.Length() < 0 || o.Length() > limit {
		return nil, fmt.Errorf("%w: object %s has %d bytes", repository.ErrDamaged, id, o.Length())
	}
	b := make([]byte, o.Length())
	_, err = io.ReadFull(o, b)
	return b, err
}

// getDir reads a directory of a snapshot.
func getDir(ctx context.Context, dr repo.DirectRepository, id object.ID) (map[string]*snapshot.DirEntry, []*snapshot.DirEntry, error) {
	b, err := getObject(ctx, dr, id, maxDirObject)
	if err != nil {
		return nil, nil, err
	}
	byName, entries, err := parseDir(b)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: directory %s: %w", repository.ErrDamaged, id, err)
	}
	return byName, entries, nil
}

func parseDir(b []byte) (map[string]*snapshot.DirEntry, []*snapshot.DirEntry, error) {
	var m snapshot.DirManifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, nil, err
	}
	byName := make(map[string]*snapshot.DirEntry, len(m.Entries))
	for i, e := range m.Entries {
		if e == nil {
			return nil, nil, fmt.Errorf("entry %d is null", i)
		}
		byName[e.Name] = e
	}
	return byName, m.Entries, nil
}

// getIndex reads the blocks of a segment: an object with exactly one entry per
// block, each of the length that the disk's geometry says.
func getIndex(ctx context.Context, dr repo.DirectRepository, id object.ID, length int64, blockSize int) ([]object.ID, error) {
	blocks := repository.Blocks(length, blockSize)
	index, ok := id.IndexObjectID()
	if !ok {
		if blocks != 1 {
			return nil, fmt.Errorf("%w: segment %s is one block, not %d", repository.ErrDamaged, id, blocks)
		}
		return []object.ID{id}, nil
	}
	b, err := getObject(ctx, dr, index, maxIndex)
	if err != nil {
		return nil, err
	}
	out, err := parseIndex(b, length, blockSize)
	if err != nil {
		return nil, fmt.Errorf("%w: segment %s: %w", repository.ErrDamaged, id, err)
	}
	return out, nil
}

// parseIndex takes the bytes of an index apart.
func parseIndex(b []byte, length int64, blockSize int) ([]object.ID, error) {
	var ind struct {
		Entries []object.IndirectObjectEntry `json:"entries"`
	}
	if err := json.Unmarshal(b, &ind); err != nil {
		return nil, err
	}
	blocks := repository.Blocks(length, blockSize)
	if int64(len(ind.Entries)) != blocks {
		return nil, fmt.Errorf("it has %d blocks, not %d", len(ind.Entries), blocks)
	}
	out := make([]object.ID, blocks)
	for i, e := range ind.Entries {
		if e.Start != int64(i)*int64(blockSize) || e.Length != int64(repository.BlockLen(length, blockSize, int64(i))) {
			return nil, fmt.Errorf("entry %d does not fit", i)
		}
		out[i] = e.Object
	}
	return out, nil
}
