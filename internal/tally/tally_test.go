package tally

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParse(t *testing.T) {
	for text, want := range map[string][2]int{"": {0, 1}, "1/1": {0, 1}, "2/8": {1, 8}, "8/8": {7, 8}} {
		i, n, err := parse(text)
		require.NoError(t, err, text)
		require.Equal(t, want, [2]int{i, n}, text)
	}
	for _, text := range []string{"0/3", "4/3", "a/b", "2", "2/", "1/2/3", "-1/2"} {
		_, _, err := parse(text)
		require.Error(t, err, text)
	}
}

func TestEachItemIsOfOneShard(t *testing.T) {
	for _, key := range []string{"", "a", "full/3/before", "prune/9/kill"} {
		n := 0
		for i := range 7 {
			if Mine(i, 7, key) {
				n++
			}
		}
		require.Equal(t, 1, n, key)
	}
}

func TestRecordsAddUp(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(Folder, dir)
	one := Campaign{Name: "pairs", About: "Two faults.", Command: "go test ./x", Counts: []Count{{"pairs", 10}, {"calls", 1}}, Violations: 1}
	t.Setenv(Part, "1/2")
	Record(t, one)
	all, err := Read(os.DirFS(dir))
	require.NoError(t, err)
	require.Equal(t, []string{"2/2"}, all[0].Missing)

	one.Counts[0].Value = 5
	t.Setenv(Part, "2/2")
	Record(t, one)
	Record(t, one) // in place of the one before
	all, err = Read(os.DirFS(dir))
	require.NoError(t, err)
	require.Len(t, all, 1)
	require.Empty(t, all[0].Missing)
	require.Equal(t, []Count{{"pairs", 15}, {"calls", 2}}, all[0].Counts)
	require.EqualValues(t, 2, all[0].Violations)
	require.Contains(t, Page(all), "| pairs | 15 |")
}

func TestReadRefuses(t *testing.T) {
	dir := t.TempDir()
	for text, want := range map[string]error{
		"{":            ErrRecord,
		`{"name":"a"}`: ErrRecord,
		`{"name":"a","command":"c","counts":[{"name":"n","value":1}],"shard":"3/2"}`:            ErrRecord,
		`{"name":"a","command":"c","counts":[{"name":"n","value":1}],"shard":"1/1","more":"x"}`: ErrRecord,
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "a.json"), []byte(text), 0o600))
		_, err := Read(os.DirFS(dir))
		require.ErrorIs(t, err, want, text)
	}
}
