package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/planted"
)

// leastKilled is how many of a hundred removals the tests have to find.
const leastKilled = 95

// campaign is a run of removals.
type campaign struct {
	t       *planted.Tester
	reasons map[string]string
	file    string // results, so that a run can be resumed

	mu   sync.Mutex
	done map[string]planted.Removal
	err  error
}

func removals(ctx context.Context, args []string) error {
	c := &campaign{t: &planted.Tester{}}
	fs, atOnce := common("removals", c.t)
	n := fs.Int("n", 45, "how many to draw of each package")
	seed := fs.Uint64("seed", 1, "of the draw")
	only := fs.String("only", "", "remove only what this regular expression finds in: file function: text")
	shard := fs.String("shard", os.Getenv("HOLDFAST_SHARD"), "i/n: every n-th of what was drawn, from the i-th")
	fs.StringVar(&c.file, "results", filepath.Join("bin", "removals.jsonl"), "file that results are added to; what it has is not done again")
	again := fs.Bool("again", false, "do again what survived")
	fs.StringVar(&c.t.Seed, "tests-seed", "2", "seed of randomised tests")
	fs.DurationVar(&c.t.Timeout, "timeout", 4*time.Minute, "of each test binary")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	match, err := regexp.Compile(*only)
	if err != nil {
		return err
	}
	var i, of int
	if *shard == "" {
		i, of = 1, 1
	} else if k, err := fmt.Sscanf(*shard, "%d/%d", &i, &of); k != 2 || err != nil || i < 1 || i > of {
		return fmt.Errorf("shard %q is not i/n", *shard)
	}
	drawn, err := planted.Draw(os.DirFS(c.t.Root), planted.Suites(), *n, *seed)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(filepath.Join(c.t.Root, "internal", "planted", "testdata", "survivors.txt"))
	if err != nil {
		return err
	}
	if c.reasons, err = planted.ReadReasons(string(text)); err != nil {
		return err
	}
	if c.done, err = planted.ReadRemovals(c.file); err != nil {
		return err
	}
	if *again {
		for key, r := range c.done {
			if r.Verdict == planted.Survived {
				delete(c.done, key)
			}
		}
	}
	if err := os.MkdirAll(filepath.Dir(c.file), 0o755); err != nil {
		return err
	}
	var mine []planted.Drawn
	for k, d := range drawn {
		if k%of == i-1 && match.MatchString(d.Key()) {
			mine = append(mine, d)
		}
	}
	say("removals: %d of %d drawn with -seed %d -n %d\n", len(mine), len(drawn), *seed, *n)
	c.run(ctx, mine, *atOnce)
	return errors.Join(c.err, context.Cause(ctx), c.report(mine))
}

func (c *campaign) run(ctx context.Context, mine []planted.Drawn, atOnce int) {
	var g errgroup.Group
	g.SetLimit(max(1, atOnce))
	for _, d := range mine {
		if _, ok := c.done[d.Key()]; ok {
			continue
		}
		g.Go(func() error {
			if ctx.Err() != nil {
				return nil
			}
			r, err := c.t.Remove(ctx, d)
			c.mu.Lock()
			defer c.mu.Unlock()
			if err == nil {
				err = planted.AppendRemoval(c.file, r)
			}
			if err != nil {
				c.err = errors.Join(c.err, fmt.Errorf("%s: %w", d.Key(), err))
				return nil
			}
			c.done[r.Key] = r
			say("%-8s %6.1f s  %s:%d %s: %s  %s\n", r.Verdict, r.Seconds, d.File, d.Line, d.Func, d.Text, r.By)
			return nil
		})
	}
	_ = g.Wait() // errors are in c.err
}

// report lists the survivors and judges.
func (c *campaign) report(mine []planted.Drawn) error {
	var tried, killed, unexplained int
	by := map[string][2]int{} // package: killed, tried
	for _, d := range mine {
		r, ok := c.done[d.Key()]
		if !ok || r.Verdict == planted.None {
			continue
		}
		n := by[d.Suite.Pkg]
		n[1]++
		tried++
		if r.Verdict == planted.Killed {
			n[0]++
			killed++
		}
		by[d.Suite.Pkg] = n
	}
	say("\nSurvivors\n")
	for _, d := range mine {
		r := c.done[d.Key()]
		if r.Verdict != planted.Survived {
			continue
		}
		reason := c.reasons[d.Key()]
		if reason == "" {
			reason = "NO REASON YET"
			unexplained++
		}
		say("  line %d  %s => %s\n", d.Line, d.Key(), reason)
	}
	say("\n")
	for _, s := range planted.Suites() {
		if n := by[s.Pkg]; n[1] > 0 {
			say("%-26s %3d of %3d killed, %.1f %%\n", s.Pkg, n[0], n[1], 100*float64(n[0])/float64(n[1]))
		}
	}
	say("%-26s %3d of %3d killed, %.1f %%; %d survivors without a reason\n", "in all", killed, tried, 100*float64(killed)/float64(max(1, tried)), unexplained)
	switch {
	case tried == 0:
		return errors.New("nothing was removed")
	case killed*100 < tried*leastKilled:
		return fmt.Errorf("%d of %d removals were killed, less than %d %%", killed, tried, leastKilled)
	case unexplained > 0:
		return fmt.Errorf("%d removals survived without a reason in internal/planted/testdata/survivors.txt", unexplained)
	}
	return nil
}
