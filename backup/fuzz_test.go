package backup

import (
	"context"
	"iter"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

// noted is a repository of one note, which anybody may have written.
type noted struct {
	repository.Repository
	note repository.Note
}

func (n noted) Notes(context.Context, string) iter.Seq2[repository.Note, error] {
	return func(yield func(repository.Note, error) bool) { yield(n.note, nil) }
}

// FuzzAuditNote: what an audit found is taken in full and under its own name, or is
// reported as damaged; never passed over.
func FuzzAuditNote(f *testing.F) {
	n := auditNote{Version: auditNoteVersion, Parent: "p1", Disk: "vda"}
	f.Add(n.name(), []byte(`{"version":1,"parent":"p1","disk":"vda","seed":"7","wrong":1,"suspects":["p1"]}`))
	f.Add(n.name(), []byte(`{"version":1,"parent":"p2","disk":"vda","seed":"7"}`))
	f.Add("audit/x", []byte(`null`))
	f.Fuzz(func(t *testing.T, name string, value []byte) {
		notes, damaged, err := auditNotes(t.Context(), noted{note: repository.Note{Name: name, Value: value}})
		require.NoError(t, err)
		require.Equal(t, damaged == nil, len(notes) == 1)
		for i := range notes {
			require.Equal(t, name, notes[i].name())
		}
	})
}

// FuzzOptions: texts of options are understood as they are written back, or refused.
func FuzzOptions(f *testing.F) {
	for _, s := range []string{"auto", "off", "5%", "115MiB", "0", "-1", "101%", "1e400", "NaN%", "9999999999TiB"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if rate, err := ParseAuditRate(s); err == nil {
			require.NoError(t, rate.check())
			again, err := ParseAuditRate(rate.String())
			require.NoError(t, err)
			require.InDelta(t, rate.Share, again.Share, 1e-12)
			require.Equal(t, [2]any{rate.Off, rate.Bytes}, [2]any{again.Off, again.Bytes})
			const disk = 1 << 40
			n := rate.leaves(disk)
			require.GreaterOrEqual(t, n, int64(0))
			require.LessOrEqual(t, n, int64(disk/repository.LeafSize))
			require.Equal(t, rate.Off, n == 0)
		}
		if q, err := ParseQuiesce(s); err == nil {
			again, err := ParseQuiesce(q.String())
			require.NoError(t, err)
			require.Equal(t, q, again)
		}
	})
}
