package kopiarepo_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/tally"
	"github.com/holdfast-backup/holdfast/repository"
)

const (
	soakWriters = 16
	soakReaders = 8
)

// soak runs the processes and hears what they say.
type soak struct {
	dir        string
	start, end time.Time

	mu    sync.Mutex
	acked map[repository.PointID]string // sums
	going map[repository.PointID]bool
	read  map[repository.PointID]string
	wrong []string
	reads int
	full  int      // maintenances that ended
	noise []string // what else was printed
}

// hear takes what one process prints; a line that its death cut short is not heard.
func (s *soak) hear(who string, out io.Reader) {
	r := bufio.NewReader(out)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimSpace(line)
		f := strings.Fields(line)
		s.mu.Lock()
		switch {
		case len(f) == 3 && f[0] == "acked":
			s.acked[repository.PointID(f[1])] = f[2]
		case len(f) == 2 && f[0] == "going":
			s.going[repository.PointID(f[1])] = true
		case len(f) == 3 && f[0] == "read":
			if old := s.read[repository.PointID(f[1])]; old != "" && old != f[2] {
				s.wrong = append(s.wrong, fmt.Sprintf("%s: point %s reads %s, and was %s", who, f[1], f[2], old))
			}
			s.read[repository.PointID(f[1])] = f[2]
			s.reads++
		case line == "maintained":
			s.full++
		case len(f) > 0 && f[0] == "wrong":
			s.wrong = append(s.wrong, line)
		case line != "" && line != "PASS":
			s.noise = append(s.noise, who+": "+line)
		}
		s.mu.Unlock()
	}
}

// process runs one until the end, and a new one whenever it was killed. Each that
// comes on kill ends it.
func (s *soak) process(exe, role string, number int, kill <-chan struct{}) (killed int, err error) {
	for time.Now().Before(s.end) {
		// There is one pruner: on a small machine the others would leave it nothing.
		name, args := exe, []string{"-test.run", "^TestSoakProcess$", "-test.timeout", "0"}
		if role != "pruner" {
			name, args = "nice", append([]string{"-n", "15", exe}, args...)
		}
		cmd := exec.Command(name, args...)
		cmd.Env = append(os.Environ(),
			fmt.Sprintf("%s=%s %d", soakRole, role, number), soakDir+"="+s.dir,
			fmt.Sprintf("%s=%d", soakStart, s.start.UnixNano()), fmt.Sprintf("%s=%d", soakEnd, s.end.UnixNano()),
			"GOMAXPROCS=1", "GOMEMLIMIT=96MiB")
		out, err := cmd.StdoutPipe()
		if err != nil {
			return killed, err
		}
		cmd.Stderr = cmd.Stdout
		if err := cmd.Start(); err != nil {
			return killed, err
		}
		heard := make(chan struct{})
		go func() {
			s.hear(fmt.Sprintf("%s %d", role, number), out)
			close(heard)
		}()
		died := false
		select {
		case <-kill:
			died = true
			killed++
			if err := cmd.Process.Kill(); err != nil {
				return killed, err
			}
			<-heard
		case <-heard:
		}
		if err := cmd.Wait(); err != nil && !died {
			return killed, fmt.Errorf("%s %d: %w", role, number, err)
		}
	}
	return killed, nil
}

// packs lists the packs of data that are there.
func packs(dir string) (map[string]bool, error) {
	out := map[string]bool{}
	err := filepath.WalkDir(filepath.Join(dir, "p"), func(p string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() && strings.HasSuffix(p, ".f") {
			out[p] = true
		}
		return nil //nolint:nilerr // maintenance is at work
	})
	return out, err
}

// TestSoak lets 16 writers, 8 readers and a pruner work on one repository, as
// processes of which one is killed every few seconds, on a clock that goes 6 hours a
// minute. HOLDFAST_SOAK says how long; without it, it is skipped.
func TestSoak(t *testing.T) {
	if os.Getenv("HOLDFAST_SOAK") == "" {
		t.Skip("HOLDFAST_SOAK=10m runs it")
	}
	if runtime.GOOS == "windows" {
		t.Skip("windows: processes are killed by signals")
	}
	long, err := time.ParseDuration(os.Getenv("HOLDFAST_SOAK"))
	require.NoError(t, err)
	ctx := context.Background()
	rnd := seed(t)
	exe, err := os.Executable()
	require.NoError(t, err)
	s := &soak{
		dir: t.TempDir() + "/repo", start: time.Now(),
		acked: map[repository.PointID]string{}, going: map[repository.PointID]bool{}, read: map[repository.PointID]string{},
	}
	s.end = s.start.Add(long)
	cfg := config(s.dir)
	cfg.Clock = func() time.Time { return s.start.Add(-48 * time.Hour) }
	r := create(t, cfg)
	for number := range soakWriters { // something that is old enough to go
		for n := range 5 {
			_, err := backup(ctx, r, map[string]*image{"d": imageOf(number, n)}, backupOptions{chain: fmt.Sprintf("vm-%d", number), run: fmt.Sprintf("r%dx", n)})
			require.NoError(t, err)
		}
	}
	require.NoError(t, r.Close())
	cfg.Clock = soakClock(s.start)

	var kills []chan struct{}
	var wait sync.WaitGroup
	killed := 0
	run := func(role string, number int) {
		kill := make(chan struct{})
		kills = append(kills, kill)
		wait.Add(1)
		go func() {
			defer wait.Done()
			n, err := s.process(exe, role, number, kill)
			s.mu.Lock()
			defer s.mu.Unlock()
			killed += n
			if err != nil {
				s.wrong = append(s.wrong, err.Error())
			}
		}()
	}
	for k := range soakWriters {
		run("writer", k)
	}
	for k := range soakReaders {
		run("reader", k)
	}
	run("pruner", 0)
	seen, gone := map[string]bool{}, map[string]bool{}
	for time.Now().Before(s.end) {
		wake := time.NewTimer(time.Second + time.Duration(rnd.Int64N(int64(3*time.Second))))
		<-wake.C
		there, err := packs(s.dir)
		require.NoError(t, err)
		for p := range seen {
			if !there[p] {
				gone[p] = true
			}
		}
		for p := range there {
			seen[p] = true
		}
		victim := rnd.IntN(len(kills))
		if victim == len(kills)-1 && rnd.IntN(3) > 0 {
			victim = 0 // the pruner dies more rarely, for it has to come to an end
		}
		select {
		case kills[victim] <- struct{}{}:
		default: // it is just being started, or has ended
		}
	}
	wait.Wait()

	r = open(t, cfg)
	rep, err := r.Verify(ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(t, err)
	require.Empty(t, rep.Damages)
	w := &soakWorker{}
	left := map[repository.PointID]bool{}
	for _, p := range points(t, r, repository.Query{}) {
		require.Equal(t, repository.Committed, p.State, "point %s: %s", p.ID, p.Detail)
		left[p.ID] = true
		sum, err := w.sumOf(ctx, r, p.ID)
		require.NoError(t, err)
		var number, n int
		_, err = fmt.Sscanf(p.Chain+" "+p.Run, "vm-%d r%dx", &number, &n)
		require.NoError(t, err)
		require.Equal(t, imageOf(number, n).sum(), sum, "point %s", p.ID)
	}
	for id, sum := range s.acked {
		require.True(t, left[id] || s.going[id], "point %s was acknowledged and is gone", id)
		if got := s.read[id]; got != "" {
			require.Equal(t, sum, got, "point %s as it was read", id)
		}
	}
	t.Logf("%d points acknowledged, %d deleted, %d reads, %d kills, %d maintenances, %d packs, of which they deleted %d",
		len(s.acked), len(s.going), s.reads, killed, s.full, len(seen), len(gone))
	require.Empty(t, strings.Join(s.noise[:min(len(s.noise), 30)], "\n"))
	require.Empty(t, strings.Join(s.wrong[:min(len(s.wrong), 30)], "\n"))
	require.Positive(t, s.reads)
	require.Positive(t, killed)
	if long < 10*time.Minute {
		return
	}
	require.NotEmpty(t, gone, "maintenance deleted no pack")
	tally.Record(t, tally.Campaign{
		Name:    "soak",
		About:   "16 writers, 8 readers and a pruner work on one repository for ten minutes, as processes of which one is killed every few seconds, on a clock that goes 6 hours a minute.",
		Command: "HOLDFAST_SOAK=10m go test -timeout 30m -run '^TestSoak$' ./repository/kopiarepo",
		Counts: []tally.Count{
			{Name: "points acknowledged", Value: int64(len(s.acked))},
			{Name: "points deleted", Value: int64(len(s.going))},
			{Name: "reads", Value: int64(s.reads)},
			{Name: "kills", Value: int64(killed)},
			{Name: "packs deleted by maintenance", Value: int64(len(gone))},
		},
	})
}
