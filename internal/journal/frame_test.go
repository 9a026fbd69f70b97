package journal

import (
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// sample returns a file of n records, each of them synced before the next is written, and the
// offset at which each begins.
func sample(n int) (b []byte, at []int) {
	b = []byte(magic)
	for i := range uint64(n) {
		at = append(at, len(b))
		b = appendFrame(b, frame{seq: i + 1, synced: i, payload: fmt.Appendf(nil, `{"op":"note","text":"%d"}`, i)})
	}
	return b, append(at, len(b))
}

func TestDecodeTruncatedAnywhere(t *testing.T) {
	b, at := sample(6)
	for n := range len(b) + 1 {
		c := decode(b[:n])
		want := 0
		for want < 6 && at[want+1] <= n {
			want++
		}
		require.Len(t, c.frames, want, "cut at %d", n)
		require.Nil(t, c.damage, "cut at %d", n)
		require.Equal(t, int64(n), c.end+c.torn)
	}
}

func TestDecodeFlippedAnywhere(t *testing.T) {
	b, at := sample(6)
	for i := range b {
		for bit := range 8 {
			bad := slices.Clone(b)
			bad[i] ^= 1 << bit
			c := decode(bad)
			hit := 0 // record hit; the magic counts as part of the first one
			for at[hit+1] <= i {
				hit++
			}
			if hit == 5 {
				require.Nil(t, c.damage, "byte %d", i)
				require.Len(t, c.frames, 5, "byte %d", i)
				continue
			}
			require.NotNil(t, c.damage, "byte %d bit %d", i, bit)
			if i >= len(magic) {
				require.Equal(t, DamageError{Offset: int64(at[hit]), Seq: uint64(hit + 1)}, *c.damage)
				require.Len(t, c.frames, 5, "all others are salvaged (byte %d)", i)
			}
		}
	}
}

// A batch that was never acknowledged may survive with a hole. That is no damage; the same hole
// in an acknowledged batch is.
func TestDecodeHoleInUnsyncedBatch(t *testing.T) {
	b, _ := sample(3)
	holed := slices.Clone(b)
	start := len(holed)
	for seq := uint64(4); seq <= 6; seq++ {
		holed = appendFrame(holed, frame{seq: seq, synced: 3, payload: []byte(`{"op":"note"}`)})
	}
	clear(holed[start : start+frameHead])
	c := decode(holed)
	require.Nil(t, c.damage)
	require.Len(t, c.frames, 3)
	require.Equal(t, int64(start), c.end)

	proven := appendFrame(slices.Clone(holed), frame{seq: 7, synced: 6, payload: []byte(`{"op":"note"}`)})
	c = decode(proven)
	require.Equal(t, &DamageError{Offset: int64(start), Seq: 4}, c.damage)
	require.Len(t, c.frames, 6)
}

func FuzzDecode(f *testing.F) {
	b, at := sample(4)
	f.Add(b)
	f.Add(b[:at[2]+7])
	f.Add(append(slices.Clone(b[:at[1]]), b[at[2]:]...))
	f.Add([]byte(magic))
	head := []byte(magic)
	for i, p := range []string{
		`{"op":"head","version":1,"head":{"run":"r"}}`,
		`{"op":"intend","obligation":{"id":"o1","kind":"snapshot"}}`,
		`{"op":"enter","stage":"s"}`, `{"op":"leave","stage":"s"}`,
		`{"op":"confirm","id":"o1","text":"h"}`, `{"op":"discharge","id":"o1"}`, `{"op":"what"}`, `{]}`,
	} {
		head = appendFrame(head, frame{seq: uint64(i + 1), synced: uint64(i), payload: []byte(p)})
	}
	f.Add(head)
	f.Fuzz(func(t *testing.T, b []byte) {
		c := decode(b)
		if c.end+c.torn != int64(len(b)) {
			t.Fatalf("end %d and torn %d of %d bytes", c.end, c.torn, len(b))
		}
		last := uint64(0)
		for _, fr := range c.frames {
			if fr.seq <= last {
				t.Fatalf("record %d after %d", fr.seq, last)
			}
			last = fr.seq
		}
		if c.damage == nil && last != uint64(len(c.frames)) {
			t.Fatal("a gap without damage")
		}
		var e Entry
		e.fill(c)
		if fresh, err := reframe(c, "r", nil); err != nil {
			t.Fatal(err)
		} else if again := decode(fresh); again.damage != nil || again.torn != 0 || len(again.frames) <= len(c.frames) {
			t.Fatal("the salvaged journal is not sound")
		}
		// What is sound can be continued after its torn tail is cut.
		if c.damage == nil && len(c.frames) > 0 {
			more := appendFrame(slices.Clone(b[:c.end]), frame{seq: last + 1, synced: last, payload: []byte("{}")})
			if got := decode(more); len(got.frames) != len(c.frames)+1 || got.damage != nil {
				t.Fatal("cannot be continued")
			}
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	buf, _ := sample(100000)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		if c := decode(buf); len(c.frames) != 100000 {
			b.Fatal(len(c.frames))
		}
	}
}
