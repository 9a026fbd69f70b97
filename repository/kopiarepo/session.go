package kopiarepo

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/compression"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"

	"github.com/holdfast-backup/holdfast/repository"
)

// session writes objects with one kopia writer, and knows every pack that they
// are in. It refuses to rely on a pack that is not stored in full: what is found
// in such a pack is stored again. It is safe for concurrent use.
type session struct {
	r     *Repository
	dr    repo.DirectRepository
	w     repo.DirectRepositoryWriter
	begun int64 // puts before this session

	mu    sync.Mutex
	packs map[blob.ID]packState
	seen  map[uint64]struct{} // contents written, to count repeats; bounded
	again sync.Mutex          // storing again is done by one at a time
}

type packState uint8

const (
	packFresh   packState = iota + 1 // being filled, or put, by this session
	packStored                       // was there before, in full
	packUnknown                      // is there, but nobody vouches for its bytes
	packBad                          // missing, truncated or quarantined
)

const maxSeen = 1 << 19

func (r *Repository) newSession(ctx context.Context, purpose string) (*session, error) {
	dr, err := r.eng.open(ctx)
	if err != nil {
		return nil, err
	}
	_, w, err := dr.NewDirectWriter(context.WithoutCancel(ctx), repo.WriteSessionOptions{Purpose: purpose})
	if err != nil {
		return nil, fmt.Errorf("storage engine: %w", err)
	}
	return &session{
		r: r, dr: dr, w: w, begun: r.store.putCount(),
		packs: map[blob.ID]packState{}, seen: map[uint64]struct{}{},
	}, nil
}

// flush stores everything that is pending.
func (s *session) flush(ctx context.Context) error {
	gctx, done := s.r.store.guard(ctx)
	return done(s.w.Flush(gctx))
}

func (s *session) close(ctx context.Context) error { return s.w.Close(ctx) }

// written says what became of one object.
type written struct {
	id     object.ID
	dup    bool
	stored int64 // bytes in packs
}

const maxRewrites = 4

// put stores an object. Prefix "" is data; a letter is metadata.
func (s *session) put(ctx context.Context, data []byte, prefix content.IDPrefix, compressor string) (written, error) {
	gctx, done := s.r.store.guard(ctx)
	out, err := s.putGuarded(gctx, data, prefix, compressor)
	return out, done(err)
}

func (s *session) putGuarded(ctx context.Context, data []byte, prefix content.IDPrefix, compressor string) (written, error) {
	for range maxRewrites {
		id, err := s.write(ctx, data, prefix, compressor)
		if err != nil {
			return written{}, err
		}
		out := written{id: id, dup: true}
		ids, err := s.contentsOf(ctx, id)
		if err != nil {
			return written{}, err
		}
		bad := false
		for _, cid := range ids {
			dup, n, err := s.account(ctx, cid)
			if errors.Is(err, errBadPack) {
				bad = true
				if err := s.discard(ctx, cid); err != nil {
					return written{}, err
				}
				continue
			}
			if err != nil {
				return written{}, err
			}
			out.dup = out.dup && dup
			out.stored += n
		}
		if !bad {
			return out, nil
		}
	}
	return written{}, fmt.Errorf("%w: data that is stored in a damaged blob could not be stored again", repository.ErrDamaged)
}

func (s *session) write(ctx context.Context, data []byte, prefix content.IDPrefix, compressor string) (object.ID, error) {
	ow := s.w.NewObjectWriter(ctx, object.WriterOptions{
		Prefix: prefix, Compressor: compression.Name(compressor), MetadataCompressor: DefaultCompressor, Splitter: "FIXED-8M",
	})
	defer func() { _ = ow.Close() }()
	if _, err := ow.Write(data); err != nil {
		return object.EmptyID, err
	}
	return ow.Result()
}

// contentsOf returns the contents of an object that this session can read.
func (s *session) contentsOf(ctx context.Context, id object.ID) ([]content.ID, error) {
	if cid, _, ok := id.ContentID(); ok {
		return []content.ID{cid}, nil
	}
	return object.VerifyObject(ctx, contents{s.w.ContentManager()}, id)
}

var errBadPack = errors.New("content is in a damaged pack")

// account notes the pack of a content that was just written.
func (s *session) account(ctx context.Context, id content.ID) (dup bool, stored int64, err error) {
	info, err := s.w.ContentManager().ContentInfo(ctx, id)
	if err != nil {
		return false, 0, err
	}
	pack := info.PackBlobID
	s.mu.Lock()
	state := s.packs[pack]
	s.mu.Unlock()
	if state == 0 {
		if state, err = s.judge(ctx, info); err != nil {
			return false, 0, err
		}
		s.mu.Lock()
		s.packs[pack] = state
		s.mu.Unlock()
	}
	switch state {
	case packBad:
		return false, 0, errBadPack
	case packUnknown:
		// A writer died before it told the inventory. Trust only what reads back.
		if _, err := s.dr.ContentReader().GetContent(ctx, id); err != nil {
			if ctx.Err() != nil {
				return false, 0, ctx.Err()
			}
			return false, 0, errBadPack
		}
		return true, 0, nil
	case packStored:
		return true, 0, nil
	}
	key := uint64(0)
	for _, b := range id.Hash()[:8] {
		key = key<<8 | uint64(b)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.seen[key]; ok {
		return true, 0, nil
	}
	if len(s.seen) < maxSeen {
		s.seen[key] = struct{}{}
	}
	return false, int64(info.PackedLength), nil
}

// judge decides about a pack that this session meets for the first time.
func (s *session) judge(ctx context.Context, info content.Info) (packState, error) {
	pack := info.PackBlobID
	if s.r.isQuarantined(pack) {
		return packBad, nil
	}
	if put, ok := s.r.store.wasPut(pack); ok {
		if put.order > s.begun {
			return packFresh, nil
		}
	} else {
		committed, err := s.dr.ContentReader().ContentInfo(ctx, info.ContentID)
		if errors.Is(err, content.ErrContentNotFound) || err == nil && committed.PackBlobID != pack {
			return packFresh, nil
		}
		if err != nil {
			return 0, err
		}
	}
	_, known, err := s.r.stored(ctx, pack)
	switch {
	case err != nil && ctx.Err() != nil:
		return 0, err
	case errors.Is(err, repository.ErrDamaged):
		s.r.cfg.Logger.Warn("data is stored again, because the blob that holds it is damaged", "blob", pack, "error", err)
		return packBad, nil
	case err != nil:
		return 0, err
	case !known:
		return packUnknown, nil
	}
	return packStored, nil
}

// discard makes the engine forget where a content is, so that writing it stores
// it again.
func (s *session) discard(ctx context.Context, id content.ID) error {
	s.again.Lock()
	defer s.again.Unlock()
	cm := s.w.ContentManager()
	info, err := cm.ContentInfo(ctx, id)
	if err != nil {
		return err
	}
	s.mu.Lock()
	state := s.packs[info.PackBlobID]
	s.mu.Unlock()
	if info.Deleted || state != packBad && state != packUnknown {
		return nil // somebody stored it again meanwhile
	}
	return cm.DeleteContent(ctx, id)
}

// used returns the packs that this session relies on.
func (s *session) used() map[blob.ID]packState {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[blob.ID]packState, len(s.packs))
	for id, state := range s.packs {
		if state != packBad {
			out[id] = state
		}
	}
	return out
}
