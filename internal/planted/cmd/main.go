// The command of package planted: it plants bugs, and removes error checks, and
// reports what the tests found.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/internal/planted"
)

const usage = `usage: planted bugs [flags]        plant the bugs of internal/planted/testdata
       planted removals [flags]    remove error checks and cleanups at random`

// say prints for people. What cannot be printed is lost.
func say(format string, args ...any) { _, _ = fmt.Fprintf(os.Stdout, format, args...) }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "planted:", err)
		os.Exit(1) //nolint:forbidigo // only main exits
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 {
		switch args[0] {
		case "bugs":
			return bugs(ctx, args[1:])
		case "removals":
			return removals(ctx, args[1:])
		}
	}
	return errors.New(usage)
}

func common(name string, t *planted.Tester) (*flag.FlagSet, *int) {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.StringVar(&t.Root, "root", ".", "root of the module")
	fs.StringVar(&t.Go, "go", "go", "the go command, with leading arguments if need be")
	return fs, fs.Int("p", runtime.NumCPU(), "how many at a time")
}

func bugs(ctx context.Context, args []string) error {
	t := &planted.Tester{}
	fs, atOnce := common("bugs", t)
	only := fs.String("only", "", "plant only bugs whose name matches this regular expression")
	sample := fs.Int("sample", 0, "plant about this many, evenly over their names; 0: all")
	write := fs.String("write", "", "the page to write")
	verbose := fs.Bool("v", false, "print the output of the tests")
	fs.StringVar(&t.Seed, "seed", "2", "seed of randomised tests")
	fs.DurationVar(&t.Timeout, "timeout", time.Minute, "of each test")
	if err := fs.Parse(args); err != nil {
		return err
	}
	match, err := regexp.Compile(*only)
	if err != nil {
		return err
	}
	all, err := planted.Load(os.DirFS(filepath.Join(t.Root, "internal", "planted", "testdata")))
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(p *planted.Patch) bool { return !match.MatchString(p.Name) })
	chosen := spread(all, *sample)
	if len(chosen) == 0 {
		return errors.New("no bug to plant")
	}
	if err := t.Sound(ctx, chosen); err != nil {
		return err
	}
	var failed []error
	findings := t.FindAll(ctx, chosen, *atOnce, func(f planted.Finding) {
		if f.Err != nil {
			failed = append(failed, f.Err)
			say("NOT FOUND %6.1f s  %v\n", f.Took, f.Err)
		} else {
			say("found     %6.1f s  %-28s %s %s\n                    %s\n                    %s\n",
				f.Took, f.Patch.Name, f.Patch.Pkg, f.Patch.Test, f.Patch.Title, f.Match)
		}
		if *verbose {
			say("%s\n", f.Output)
		}
	})
	say("%d of %d planted bugs found, seed %s\n", len(chosen)-len(failed), len(chosen), t.Seed)
	if err := errors.Join(failed...); err != nil {
		return err
	}
	if *write == "" {
		return nil
	}
	return os.WriteFile(*write, []byte(planted.Table(findings)), 0o644)
}

// spread picks about n patches, as far apart as can be; all for n = 0.
func spread(all []*planted.Patch, n int) (out []*planted.Patch) {
	if n <= 0 || n >= len(all) {
		return all
	}
	for i := range n {
		out = append(out, all[i*len(all)/n])
	}
	return out
}
