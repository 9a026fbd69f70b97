package kopiarepo

import (
	"context"
	"crypto/cipher"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"

	"github.com/holdfast-backup/holdfast/repository"
)

// blobStore is the storage that kopia works on: a directory laid out as kopia's
// own file system storage does it, so that the stock program reads it. On top, it
// keeps the inventory, serves a critical blob from its copy when the blob itself
// is damaged or missing, and lets nothing be deleted but by maintenance.
type blobStore struct {
	blob.DefaultProviderImplementation
	guards

	dir     *dirStore
	inv     *inventory
	handle  string
	reserve int64

	mu       sync.Mutex
	schedule cipher.AEAD         // opens kopia's schedule of maintenance; nil: not known yet
	source   map[blob.ID]string  // critical blobs that were checked: the file that is good
	deferred map[blob.ID]bool    // not nil: in maintenance; deletions wait here
	put      map[blob.ID]putInfo // blobs put through this store
	puts     int64
}

var _ blob.Storage = (*blobStore)(nil)

const (
	blobSuffix   = ".f"
	shardsFile   = ".shards"
	shardsText   = `{"default":[1,3],"maxNonShardedLength":20}` + "\n"
	unsharded    = 20
	copiesDir    = "copies"
	maxSmallBlob = 256 << 20
)

// blobFile returns the file of a blob: one directory of one letter, one of three,
// unless the name is short.
func blobFile(id blob.ID) string {
	s := string(id)
	if len(s) <= unsharded {
		return s + blobSuffix
	}
	return s[:1] + "/" + s[1:4] + "/" + s[4:] + blobSuffix
}

// copiesOf returns the files that hold copies of a critical blob: two for what
// the whole repository needs, one for packs of metadata.
func copiesOf(id blob.ID) []string {
	first := mirror + copiesDir + "/" + string(id)
	if strings.HasPrefix(string(id), "q") {
		return []string{first}
	}
	return []string{first, primary + copiesDir + "/" + string(id)}
}

func validBlobID(id blob.ID) error {
	if id == "" || strings.ContainsAny(string(id), "/\\\x00") || strings.HasPrefix(string(id), ".") {
		return fmt.Errorf("invalid blob name %q", id)
	}
	return nil
}

// PutBlob implements blob.Storage.
func (s *blobStore) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, opts blob.PutOptions) error {
	if err := validBlobID(id); err != nil {
		return err
	}
	if opts.HasRetentionOptions() || opts.DoNotRecreate {
		return blob.ErrUnsupportedPutBlobOption
	}
	size := int64(data.Length())
	if err := s.checkSpace(id, size); err != nil {
		return err
	}
	if strings.HasPrefix(string(id), "x") {
		// An index must never be durable before the packs that it points to.
		if err := s.dir.sync(ctx); err != nil {
			return err
		}
	}
	mtime := opts.SetModTime
	h := sha256.New()
	err := s.dir.put(ctx, blobFile(id), mtime, func(w io.Writer) error {
		n, err := data.WriteTo(io.MultiWriter(w, h))
		if err == nil && n != size {
			err = io.ErrShortWrite
		}
		return err
	})
	if err != nil {
		return err
	}
	if mtime.IsZero() || opts.GetModTime != nil {
		_, stored, err := s.dir.stat(ctx, blobFile(id))
		if err != nil {
			return err
		}
		mtime = stored
	}
	if opts.GetModTime != nil {
		*opts.GetModTime = mtime
	}
	s.mu.Lock()
	s.puts++
	s.put[id] = putInfo{size, s.puts}
	delete(s.deferred, id)
	if critical(string(id)) {
		s.source[id] = blobFile(id)
	}
	s.mu.Unlock()
	if inventoried(string(id)) {
		s.inv.added(blobEntry{Name: string(id), Size: size, Sum: sum(h.Sum(nil)), Time: mtime.Unix()})
	}
	return nil
}

// checkSpace keeps data from taking the space that deletion needs.
func (s *blobStore) checkSpace(id blob.ID, size int64) error {
	if s.reserve < 0 || !strings.HasPrefix(string(id), "p") || s.isDeferring() {
		return nil
	}
	total, free, err := diskSpace(s.dir.root)
	if err != nil {
		return nil //nolint:nilerr // unknown is not full
	}
	if keep := min(s.reserve, total/16); free-size < keep {
		return fmt.Errorf("%w: %d bytes are free, of which %d are kept for deletion and maintenance",
			repository.ErrNoSpace, free, keep)
	}
	return nil
}

func (s *blobStore) isDeferring() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.deferred != nil
}

// locate returns the file to read a blob from.
func (s *blobStore) locate(ctx context.Context, id blob.ID) (string, error) {
	if err := validBlobID(id); err != nil {
		return "", err
	}
	s.mu.Lock()
	hidden := s.deferred[id]
	file, known := s.source[id]
	s.mu.Unlock()
	if hidden {
		return "", blob.ErrBlobNotFound
	}
	if known {
		return file, nil
	}
	if !critical(string(id)) {
		return blobFile(id), nil
	}
	want, ok := s.inv.lookup(string(id))
	if !ok {
		return blobFile(id), nil
	}
	for _, file := range append([]string{blobFile(id)}, copiesOf(id)...) {
		b, err := s.dir.get(ctx, file, maxSmallBlob)
		if err != nil && ctx.Err() != nil {
			return "", err
		}
		if err == nil && (sumOf(b) == want.Sum || s.authenticSchedule(id, b)) {
			s.mu.Lock()
			s.source[id] = file
			s.mu.Unlock()
			return file, nil
		}
	}
	// No good copy. The engine's own checks decide what can still be read.
	return blobFile(id), nil
}

const scheduleBlob = "kopia.maintenance"

// authenticSchedule reports whether b is a schedule of maintenance that kopia
// wrote. It changes with every step of maintenance, ahead of the inventory, so it
// is right if it is authentic.
func (s *blobStore) authenticSchedule(id blob.ID, b []byte) bool {
	s.mu.Lock()
	gcm := s.schedule
	s.mu.Unlock()
	if id != scheduleBlob || gcm == nil || len(b) < gcm.NonceSize() {
		return false
	}
	_, err := gcm.Open(nil, b[:gcm.NonceSize()], b[gcm.NonceSize():], []byte("maintenance"))
	return err == nil
}

// forgetSource makes critical blobs be checked again.
func (s *blobStore) forgetSource() {
	s.mu.Lock()
	s.source = map[blob.ID]string{}
	s.mu.Unlock()
}

// GetBlob implements blob.Storage.
func (s *blobStore) GetBlob(ctx context.Context, id blob.ID, offset, length int64, out blob.OutputBuffer) error {
	if offset < 0 {
		return blob.ErrInvalidRange
	}
	file, err := s.locate(ctx, id)
	if err != nil {
		return err
	}
	out.Reset()
	err = s.dir.readRange(ctx, file, offset, length, func(p []byte) error {
		_, err := out.Write(p)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return blob.ErrBlobNotFound
	}
	if err != nil {
		return err
	}
	return blob.EnsureLengthExactly(out.Length(), length)
}

// GetMetadata implements blob.Storage.
func (s *blobStore) GetMetadata(ctx context.Context, id blob.ID) (blob.Metadata, error) {
	file, err := s.locate(ctx, id)
	if err != nil {
		return blob.Metadata{}, err
	}
	size, mtime, err := s.dir.stat(ctx, file)
	if errors.Is(err, fs.ErrNotExist) {
		return blob.Metadata{}, blob.ErrBlobNotFound
	}
	if err != nil {
		return blob.Metadata{}, err
	}
	if e, ok := s.inv.lookup(string(id)); ok && file != blobFile(id) {
		mtime = time.Unix(e.Time, 0)
	}
	return blob.Metadata{BlobID: id, Length: size, Timestamp: mtime}, nil
}

// ListBlobs implements blob.Storage. A critical blob that is missing but has a
// copy is listed, since it can be read.
func (s *blobStore) ListBlobs(ctx context.Context, prefix blob.ID, cb func(blob.Metadata) error) error {
	seen := map[string]bool{}
	err := s.walk(ctx, string(prefix), func(bm blob.Metadata) error {
		if critical(string(bm.BlobID)) {
			seen[string(bm.BlobID)] = true
		}
		s.mu.Lock()
		hidden := s.deferred[bm.BlobID]
		s.mu.Unlock()
		if hidden {
			return nil
		}
		return cb(bm)
	})
	s.listed(ctx, err)
	if err != nil || prefix != "" && !critical(string(prefix)) && !strings.HasPrefix("kopia.", string(prefix)) {
		return err
	}
	for _, e := range s.inv.all() {
		if !critical(e.Name) || seen[e.Name] || !strings.HasPrefix(e.Name, string(prefix)) {
			continue
		}
		bm, err := s.GetMetadata(ctx, blob.ID(e.Name))
		if errors.Is(err, blob.ErrBlobNotFound) {
			continue
		}
		if err == nil {
			err = cb(bm)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// walk lists the blobs that are really stored, without copies.
func (s *blobStore) walk(ctx context.Context, prefix string, cb func(blob.Metadata) error) error {
	return s.walkDir(ctx, "", "", prefix, 0, cb)
}

func (s *blobStore) walkDir(ctx context.Context, dir, name, prefix string, depth int, cb func(blob.Metadata) error) error {
	entries, err := s.dir.list(ctx, strings.TrimSuffix(dir, "/"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		full := name + e.Name()
		if e.IsDir() {
			if depth >= 2 || depth == 0 && len(e.Name()) != 1 || depth == 1 && len(e.Name()) != 3 {
				continue
			}
			if strings.HasPrefix(full, prefix) || strings.HasPrefix(prefix, full) {
				if err := s.walkDir(ctx, dir+e.Name()+"/", full, prefix, depth+1, cb); err != nil {
					return err
				}
			}
			continue
		}
		id, ok := strings.CutSuffix(full, blobSuffix)
		if !ok || !strings.HasPrefix(id, prefix) || blobFile(blob.ID(id)) != dir+e.Name() {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := cb(blob.Metadata{BlobID: blob.ID(id), Length: info.Size(), Timestamp: info.ModTime()}); err != nil {
			return err
		}
	}
	return nil
}

// errDelete: kopia may delete only what comes and goes, outside of maintenance.
var errDelete = errors.New("blobs are deleted by maintenance alone")

// DeleteBlob implements blob.Storage. In maintenance it only takes note.
func (s *blobStore) DeleteBlob(ctx context.Context, id blob.ID) error {
	if err := validBlobID(id); err != nil {
		return err
	}
	s.mu.Lock()
	deferring := s.deferred != nil
	if deferring && inventoried(string(id)) {
		s.deferred[id] = true
		s.mu.Unlock()
		return nil
	}
	s.mu.Unlock()
	if !inventoried(string(id)) {
		return s.dir.remove(ctx, blobFile(id))
	}
	if _, ours := s.wasPut(id); !ours || s.inv.isSettled(string(id)) {
		return fmt.Errorf("%s: %w", id, errDelete)
	}
	// An index that kopia could not finish: nobody knows of it yet.
	s.inv.deleted([]string{string(id)})
	return s.erase(ctx, id)
}

// erase deletes a blob for good.
func (s *blobStore) erase(ctx context.Context, id blob.ID) error {
	s.mu.Lock()
	delete(s.put, id)
	delete(s.source, id)
	s.mu.Unlock()
	return s.dir.remove(ctx, blobFile(id))
}

// beginDeletes starts to collect deletions.
func (s *blobStore) beginDeletes() {
	s.mu.Lock()
	s.deferred = map[blob.ID]bool{}
	s.mu.Unlock()
}

// collected returns the deletions that were asked for.
func (s *blobStore) collected() []blob.ID {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]blob.ID, 0, len(s.deferred))
	for id := range s.deferred {
		out = append(out, id)
	}
	return out
}

// endDeletes forgets what was asked for; what was not done is not done.
func (s *blobStore) endDeletes() {
	s.mu.Lock()
	s.deferred = nil
	s.mu.Unlock()
}

// putInfo is the size of a blob that was put, and its place in the order of puts.
type putInfo struct{ size, order int64 }

// wasPut reports whether this handle stored the blob, and when in its order.
func (s *blobStore) wasPut(id blob.ID) (putInfo, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, ok := s.put[id]
	return p, ok
}

// putCount returns how many blobs were put so far.
func (s *blobStore) putCount() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.puts
}

// allPut returns what this handle stored.
func (s *blobStore) allPut() map[blob.ID]putInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.put)
}

// ConnectionInfo implements blob.Storage.
func (s *blobStore) ConnectionInfo() blob.ConnectionInfo {
	return blob.ConnectionInfo{Type: storageType, Config: &storageConfig{Handle: s.handle}}
}

// DisplayName implements blob.Storage.
func (s *blobStore) DisplayName() string { return s.dir.root }

// GetCapacity implements blob.Storage.
func (s *blobStore) GetCapacity(context.Context) (blob.Capacity, error) {
	size, free, err := diskSpace(s.dir.root)
	if err != nil {
		return blob.Capacity{}, blob.ErrNotAVolume
	}
	return blob.Capacity{SizeB: uint64(size), FreeB: uint64(free)}, nil
}
