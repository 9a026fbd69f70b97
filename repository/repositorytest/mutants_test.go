package repositorytest_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/repositorytest"
)

// mutant is a planted bug and the check that must find it.
type mutant struct {
	name string
	by   string
	wrap func(b *bench, r repository.Repository) repository.Repository
}

// TestMutants plants bugs in the memory repository, one at a time, and requires
// that the suite finds each. It prints the table.
func TestMutants(t *testing.T) {
	checks := map[string]repositorytest.Check{}
	for _, c := range repositorytest.Checks() {
		require.NotContains(t, checks, c.Name, "two checks of one name")
		checks[c.Name] = c
	}
	mutants := slices.Concat(writeMutants(), readMutants(), recordMutants(), lockMutants())
	require.GreaterOrEqual(t, len(mutants), 12)
	findings := make([]string, len(mutants))
	var wg sync.WaitGroup
	limit := make(chan struct{}, 4)
	for i, m := range mutants {
		c, ok := checks[m.by]
		require.True(t, ok, "mutant %q names check %q, which does not exist", m.name, m.by)
		limit <- struct{}{}
		wg.Go(func() {
			defer func() { <-limit }()
			err := c.Try(t.Context(), func(t repositorytest.T) *repositorytest.Harness { return fakeHarness(t, m.wrap) })
			if err != nil && !errors.Is(err, repositorytest.ErrSkipped) {
				findings[i] = err.Error()
			}
		})
	}
	wg.Wait()
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	for i, m := range mutants {
		verdict := "killed"
		if findings[i] == "" {
			verdict = "SURVIVED"
			t.Errorf("mutant %q survived check %s", m.name, m.by)
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", verdict, m.name, m.by, complaint(findings[i]))
	}
	require.NoError(t, w.Flush())
	t.Logf("%d mutants\n%s", len(mutants), &table)
}

// complaint returns the gist of what testify reported: the lines after "Error:"
// and "Messages:".
func complaint(finding string) string {
	var out []string
	for line := range strings.Lines(finding) {
		line = strings.TrimSpace(line)
		for _, head := range []string{"Error:", "Messages:"} {
			if rest, ok := strings.CutPrefix(line, head); ok {
				out = append(out, strings.TrimSpace(rest))
			}
		}
	}
	s := strings.Join(out, " / ")
	return s[:min(len(s), 110)]
}

// TestMutantsStartFromAPassingSuite shows that the checks which kill mutants pass
// without them, through taps that replace nothing.
func TestMutantsStartFromAPassingSuite(t *testing.T) {
	killers := map[string]bool{}
	for _, m := range slices.Concat(writeMutants(), readMutants(), recordMutants(), lockMutants()) {
		killers[m.by] = true
	}
	for _, c := range repositorytest.Checks() {
		if !killers[c.Name] {
			continue
		}
		err := c.Try(t.Context(), func(t repositorytest.T) *repositorytest.Harness {
			return fakeHarness(t, func(_ *bench, r repository.Repository) repository.Repository {
				r = withDiskReader(r, func(d repository.DiskReader) repository.DiskReader { return &diskReaderTap{DiskReader: d} })
				r = withDisk(r, func(_ repository.DiskSpec, d repository.DiskWriter) repository.DiskWriter {
					return &diskTap{DiskWriter: d}
				})
				return withLock(r, func(l repository.Lock) repository.Lock { return &lockTap{Lock: l} })
			})
		})
		require.NoError(t, err)
	}
}

func TestTryReportsWhatHappened(t *testing.T) {
	harness := func(t repositorytest.T) *repositorytest.Harness { return fakeHarness(t, nil) }
	boom := repositorytest.Check{Name: "Boom", Run: func(repositorytest.T, *repositorytest.Harness) { panic("boom") }}
	err := boom.Try(t.Context(), harness)
	require.ErrorContains(t, err, "boom")
	skip := repositorytest.Check{Name: "Skip", Run: func(t repositorytest.T, _ *repositorytest.Harness) { t.Skip("why") }}
	require.ErrorIs(t, skip.Try(t.Context(), harness), repositorytest.ErrSkipped)
	pass := repositorytest.Check{Name: "Pass", Run: func(repositorytest.T, *repositorytest.Harness) {}}
	require.NoError(t, pass.Try(t.Context(), harness))
	ctx, cancel := context.WithCancel(t.Context())
	hang := repositorytest.Check{Name: "Hang", Run: func(repositorytest.T, *repositorytest.Harness) {
		cancel()
		select {}
	}}
	require.ErrorIs(t, hang.Try(ctx, harness), context.Canceled)
}
