package repository_test

import (
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

func TestBlocksCoverTheDisk(t *testing.T) {
	const bs = repository.DefaultBlockSize
	for _, c := range []struct{ size, blocks, last int64 }{
		{0, 0, 0},
		{1, 1, 1},
		{bs - 1, 1, bs - 1},
		{bs, 1, bs},
		{bs + 1, 2, 1},
		{5*bs + 7, 6, 7},
		{math.MaxInt64, math.MaxInt64/bs + 1, bs - 1},
	} {
		n := repository.Blocks(c.size, bs)
		require.Equal(t, c.blocks, n, "size %d", c.size)
		if n > 0 {
			require.Equal(t, int(c.last), repository.BlockLen(c.size, bs, n-1), "size %d", c.size)
		}
		if n > 1 {
			require.Equal(t, bs, repository.BlockLen(c.size, bs, 0))
		}
	}
}

func TestValidBlockSizes(t *testing.T) {
	valid := 0
	for n := range 2*repository.MaxBlockSize + 1 {
		if repository.ValidBlockSize(n) {
			valid++
			require.Zero(t, n%repository.LeafSize)
		}
	}
	require.Equal(t, 6, valid) // 256 KiB to 8 MiB
	require.True(t, repository.ValidBlockSize(repository.DefaultBlockSize))
	require.False(t, repository.ValidBlockSize(-repository.LeafSize))
	require.False(t, repository.ValidBlockSize(math.MinInt))
}

func TestDigestText(t *testing.T) {
	d := repository.Digest{0: 0xab, 31: 1}
	require.False(t, d.IsZero())
	require.True(t, repository.Digest{}.IsZero())
	raw, err := json.Marshal(map[string]repository.Digest{"d": d})
	require.NoError(t, err)
	require.Equal(t, `{"d":"ab`+strings.Repeat("0", 60)+`01"}`, string(raw))
	var back map[string]repository.Digest
	require.NoError(t, json.Unmarshal(raw, &back))
	require.Equal(t, d, back["d"])
	for _, bad := range []string{"", "ab", strings.Repeat("0", 66), strings.Repeat("x", 64)} {
		require.Error(t, d.UnmarshalText([]byte(bad)), "%q", bad)
	}
}

func TestDigestKeyIsSecret(t *testing.T) {
	spec := struct{ Key repository.DigestKey }{repository.DigestKey{0xde, 0xad}}
	for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
		require.NotContains(t, fmt.Sprintf(format, spec), "222", format)
		require.NotContains(t, fmt.Sprintf(format, spec), "dead", format)
		require.NotContains(t, fmt.Sprintf(format, spec), "0xde", format)
	}
}

func TestProofNeedsFacts(t *testing.T) {
	good := repository.ProofFacts{
		Point:  repository.Point{ID: "p1", Chain: "vm", Sequence: 1, State: repository.Committed},
		Record: repository.Digest{1}, BlobsChecked: 3,
	}
	proof, err := repository.NewProof(good)
	require.NoError(t, err)
	require.Equal(t, good.Point, proof.Point())
	require.Equal(t, good.Record, proof.Record())
	require.Equal(t, 3, proof.BlobsChecked())
	for name, spoil := range map[string]func(f *repository.ProofFacts){
		"no ID":         func(f *repository.ProofFacts) { f.Point.ID = "" },
		"no chain":      func(f *repository.ProofFacts) { f.Point.Chain = "" },
		"no sequence":   func(f *repository.ProofFacts) { f.Point.Sequence = 0 },
		"not committed": func(f *repository.ProofFacts) { f.Point.State = repository.Untrusted },
		"no record":     func(f *repository.ProofFacts) { f.Record = repository.Digest{} },
		"no inventory":  func(f *repository.ProofFacts) { f.BlobsChecked = 0 },
	} {
		bad := good
		spoil(&bad)
		proof, err := repository.NewProof(bad)
		require.Error(t, err, name)
		require.Nil(t, proof, name)
	}
}

func TestQueryMatch(t *testing.T) {
	p := &repository.Point{Chain: "c", Run: "r", Name: "n"}
	require.True(t, repository.Query{}.Match(p))
	require.True(t, repository.Query{Chain: "c", Run: "r", Name: "n"}.Match(p))
	for _, q := range []repository.Query{{Chain: "x"}, {Run: "x"}, {Name: "x"}, {Chain: "c", Run: "x"}} {
		require.False(t, q.Match(p), "%+v", q)
	}
}

func TestPointDisk(t *testing.T) {
	p := &repository.Point{Disks: []repository.Disk{{ID: "a", Size: 1}, {ID: "b", Size: 2}}}
	require.Same(t, &p.Disks[1], p.Disk("b"))
	require.Nil(t, p.Disk("c"))
}

func TestVerifyReportDamaged(t *testing.T) {
	r := &repository.VerifyReport{}
	require.True(t, r.OK())
	require.Empty(t, r.Damaged())
	r.Damages = []repository.Damage{{Points: []repository.PointID{"b", "a"}}, {}, {Points: []repository.PointID{"a", "c"}}}
	require.False(t, r.OK())
	require.Equal(t, []repository.PointID{"b", "a", "c"}, r.Damaged())
}

func TestLockedErrorMatches(t *testing.T) {
	err := fmt.Errorf("backup: %w", &repository.LockedError{Name: "vm-1", Holder: "host a", Until: time.Unix(0, 0)})
	require.ErrorIs(t, err, repository.ErrLocked)
	require.NotErrorIs(t, err, repository.ErrFenced)
	var locked *repository.LockedError
	require.ErrorAs(t, err, &locked)
	require.Equal(t, "host a", locked.Holder)
}

func TestRepo8(t *testing.T) {
	require.Equal(t, "01234567", repository.Info{ID: "0123456789abcdef"}.Repo8())
	require.Equal(t, "0123", repository.Info{ID: "0123"}.Repo8())
}
