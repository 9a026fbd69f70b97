package kopiarepo

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/object"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/secret"
)

// Everything here may come from a repository that somebody else can write to. What
// needs the keys is fuzzed without them as well: a second client, or an older one
// with a bug, has them.

func fuzzKeys(t testing.TB) *keys {
	k, err := newKeys(bytes.Repeat([]byte{7}, 32))
	require.NoError(t, err)
	return k
}

var fileTypes = []fileType{typeFormat, typeRecord, typeAnchor, typePacks, typeNote, typeLock, typeInventory}

// FuzzOwnFile: no bytes but those that the keys made are taken for a file of a type
// and name, and not even those for another type or name.
func FuzzOwnFile(f *testing.F) {
	k := fuzzKeys(f)
	rnd := rand.NewChaCha8([32]byte{1})
	const name = "records/vm/0000000001"
	good := map[fileType][]byte{}
	for _, t := range fileTypes {
		b, err := k.write(rnd, t, name, map[string]int{"seq": 1}, []byte("body"))
		require.NoError(f, err)
		good[t] = b
		f.Add(b)
		f.Add(bytes.ToUpper(b))
		f.Add(b[:len(b)-1])
		f.Add(append(slices.Clone(b), '\n'))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, kind := range fileTypes {
			_, body, err := k.read(kind, name, b)
			if err != nil {
				require.ErrorIs(t, err, repository.ErrDamaged)
				continue
			}
			require.Equal(t, string(good[kind]), string(b), "%s: a file that was never written is taken", kind)
			require.Equal(t, "body", string(body))
			_, _, err = k.read(kind, name+"1", b)
			require.ErrorIs(t, err, repository.ErrDamaged, "another name")
		}
	})
}

// FuzzKeySlot: what is taken for a slot is one to the last bit, and what it asks of
// this machine has bounds.
func FuzzKeySlot(f *testing.F) {
	rnd := rand.NewChaCha8([32]byte{2})
	slot, err := newSlot("r", bytes.Repeat([]byte{3}, 32), secret.New("password"), KDF{MemoryKiB: 64, Time: 1, Threads: 1}, rnd)
	require.NoError(f, err)
	f.Add(slot)
	f.Add(bytes.Replace(slot, []byte(`"time": 1`), []byte(`"time": 4000000000`), 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := parseSlot(b)
		if s == nil {
			return
		}
		again, err := json.MarshalIndent(s, "", " ")
		require.NoError(t, err)
		require.NotNil(t, parseSlot(again))
		if s.MemoryKiB > 1<<10 || s.Time > 2 {
			return // checked below; a derivation would take too long here
		}
		gcm, err := s.aead(secret.New("password"))
		if err != nil {
			require.ErrorIs(t, err, repository.ErrDamaged)
			return
		}
		require.Equal(t, 12, gcm.NonceSize())
	})
}

// TestKeySlotBounds: a slot cannot ask for any amount of memory or time.
func TestKeySlotBounds(t *testing.T) {
	ok := keySlot{KDF: "argon2id", MemoryKiB: 64, Time: 1, Threads: 1, Salt: make([]byte, 16)}
	_, err := ok.aead(secret.New("x"))
	require.NoError(t, err)
	for name, change := range map[string]func(*keySlot){
		"function": func(s *keySlot) { s.KDF = "md5" },
		"memory":   func(s *keySlot) { s.MemoryKiB = maxKDFMemory + 1 },
		"time":     func(s *keySlot) { s.Time = maxKDFTime + 1 },
		"no time":  func(s *keySlot) { s.Time = 0 },
		"threads":  func(s *keySlot) { s.Threads = 0 },
		"salt":     func(s *keySlot) { s.Salt = s.Salt[:15] },
	} {
		s := ok
		change(&s)
		_, err := s.aead(secret.New("x"))
		require.ErrorIs(t, err, repository.ErrDamaged, name)
	}
}

// FuzzRecord: a record is an entry of the chain and at the place that it was read
// from, or is refused.
func FuzzRecord(f *testing.F) {
	header, err := json.Marshal(recordHeader{Kind: kindPoint, Chain: "vm", Log: 1, ID: "p1", Seq: 1, Points: 1})
	require.NoError(f, err)
	body, err := json.Marshal(recordBody{Name: "vm", Run: "r", Created: time.Unix(1, 0), Disks: []diskBody{{ID: "d", Size: 1, BlockSize: 1 << 20}}})
	require.NoError(f, err)
	f.Add(header, body, true)
	f.Add(bytes.Replace(header, []byte(kindPoint), []byte(kindDeleted), 1), []byte(`{"target":{"log":1}}`), false)
	f.Add([]byte(`{"kind":"point","chain":"other","log":1}`), body, true)
	f.Add([]byte(`null`), []byte(`{"disks":[{"size":-1,"block_size":0}]}`), true)
	f.Fuzz(func(t *testing.T, header, body []byte, compressed bool) {
		if compressed {
			body = deflate(body)
		}
		e, err := parseRecord("vm", 1, &candidate{header: header, body: body})
		if err != nil {
			require.ErrorIs(t, err, repository.ErrDamaged)
			return
		}
		require.Equal(t, "vm", e.Chain)
		require.EqualValues(t, 1, e.Log)
		p := e.point()
		require.Equal(t, e.ID, p.ID)
		require.Len(t, p.Disks, len(e.body.Disks))
		ref := e.ref()
		require.Empty(t, ref.public().Name)
	})
}

// FuzzInflate: what was deflated comes back, and no bytes become more than the limit.
func FuzzInflate(f *testing.F) {
	f.Add([]byte("text"))
	f.Add(deflate(make([]byte, 1<<20)))
	f.Fuzz(func(t *testing.T, b []byte) {
		const limit = 1 << 12
		if out, err := inflate(b, limit); err == nil {
			require.LessOrEqual(t, len(out), limit)
		} else {
			require.ErrorIs(t, err, repository.ErrDamaged)
		}
		out, err := inflate(deflate(b), int64(len(b)))
		require.NoError(t, err)
		require.Equal(t, string(b), string(out))
	})
}

// FuzzSums: digests of segments are read as they were written.
func FuzzSums(f *testing.F) {
	f.Add(encodeSums(map[int64]repository.Digest{0: {1}, 1 << 40: {2}}))
	f.Add(make([]byte, 39))
	f.Fuzz(func(t *testing.T, b []byte) {
		sums, err := parseSums(b)
		if err != nil {
			require.ErrorIs(t, err, repository.ErrDamaged)
			return
		}
		require.LessOrEqual(t, len(sums), len(b)/40)
		again, err := parseSums(encodeSums(sums))
		require.NoError(t, err)
		require.Equal(t, sums, again)
	})
}

// FuzzIndex: an index that is taken describes exactly the blocks of its segment.
func FuzzIndex(f *testing.F) {
	f.Add([]byte(`{"stream":"kopia:indirect","entries":[{"l":1048576,"o":"`+strings.Repeat("ab", 16)+`"},{"s":1048576,"l":512,"o":"x`+strings.Repeat("cd", 16)+`"}]}`), int64(1<<20+512))
	f.Add([]byte(`{"entries":[null]}`), int64(1))
	f.Add([]byte(`{"entries":[{"s":-1,"l":-9223372036854775808}]}`), int64(digest.SegmentSpan))
	f.Fuzz(func(t *testing.T, b []byte, length int64) {
		if length < 1 || length > digest.SegmentSpan {
			return // segments have no other length
		}
		const blockSize = 1 << 20
		out, err := parseIndex(b, length, blockSize)
		if err == nil {
			require.Len(t, out, int(repository.Blocks(length, blockSize)))
		}
	})
}

// FuzzDirectory: a directory has no entries that are not there.
func FuzzDirectory(f *testing.F) {
	f.Add([]byte(`{"stream":"kopia:directory","entries":[{"name":"disk-a","type":"d","obj":"k` + strings.Repeat("ab", 16) + `"}]}`))
	f.Add([]byte(`{"entries":[null]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		byName, entries, err := parseDir(b)
		if err != nil {
			return
		}
		require.LessOrEqual(t, len(byName), len(entries))
		for name, e := range byName {
			require.Equal(t, name, e.Name)
		}
	})
}

// FuzzConfig: the configuration of a point cannot describe a disk that this program
// would divide by zero or allocate without end for.
func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"holdfast":1,"point":"p","disks":[{"id":"d","size":512,"block_size":1048576,"segment_bytes":1073741824,"zeros":["` + strings.Repeat("ab", 16) + `"]}]}`))
	f.Add([]byte(`{"disks":[{"size":-1},{"block_size":0},{"size":9223372036854775807,"block_size":1048576}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var cfg pointConfig
		if json.Unmarshal(b, &cfg) != nil {
			return
		}
		for _, d := range cfg.Disks {
			g := geometry{d.Size, d.BlockSize}
			if g.valid() != nil {
				continue
			}
			require.GreaterOrEqual(t, g.blocks(), int64(0))
			if n := g.segments(); n > 0 {
				last := g.segmentLen(n - 1)
				require.Positive(t, last)
				require.LessOrEqual(t, last, int64(digest.SegmentSpan))
				require.Positive(t, g.blockLen(g.blocks()-1))
			}
			for _, id := range d.Zeros {
				_, err := object.ParseID(id.String())
				require.NoError(t, err)
			}
		}
	})
}

// FuzzInventory: entries in any order and of any content leave an inventory that
// knows each blob once, and none that it calls deleted.
func FuzzInventory(f *testing.F) {
	f.Add([]byte(`{"seq":1,"full":true}`), []byte(`{"add":[{"n":"p1","s":5},{"n":"p1","s":6}],"del":["p1","p2"]}`), []byte(`{"add":[{"n":"p2"}]}`))
	f.Add([]byte(`{"seq":-1}`), []byte(`{"del":[""]}`), []byte(`null`))
	f.Fuzz(func(t *testing.T, header, first, second []byte) {
		v := newInventory(nil, time.Now)
		for i, body := range [][]byte{first, second} {
			e := &inventoryEntry{}
			if json.Unmarshal(header, &e.inventoryHeader) != nil || json.Unmarshal(body, &e.inventoryBody) != nil {
				e = nil
			}
			v.apply(int64(i+1), e)
		}
		seen := map[string]bool{}
		for _, b := range v.all() {
			require.False(t, seen[b.Name], "blob %q twice", b.Name)
			seen[b.Name] = true
			require.False(t, v.wasDeleted(b.Name), "blob %q is there and deleted", b.Name)
		}
	})
}

// FuzzNames: names of files are taken apart into what they are made of alone.
func FuzzNames(f *testing.F) {
	for _, s := range []string{"0000000000000000001", "n-audit_p1_00ff", "n-x", "-0000000000000000001", "+000000000000000001"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if strings.Contains(s, "/") {
			return // not a name of a file
		}
		if n, ok := parseNumber(s); ok {
			require.Equal(t, number(n), s)
		}
		if name, ok := noteName(s); ok {
			require.Equal(t, notesDir+"/"+s, noteFile(name))
		}
	})
}
