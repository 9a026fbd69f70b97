package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

const longHelp = `Holdfast backs up virtual machines while they run, and brings them back.

Every byte of a restore point is proven by a digest that was computed where it
left the hypervisor. A run that lost a byte, a disk or a consistency level never
reports plain success.

Start with: holdfast demo

Exit codes: 0 success; 1 failed, or damage found; 2 wrong usage; 3 finished but
degraded; 130 interrupted. Of several virtual machines the worst counts.

Passwords come from a file, from HOLDFAST_REPO_PASSWORD (repository) and
HOLDFAST_PASSWORD (hypervisor), or are asked for on a terminal.`

// root is the whole command tree.
func (p *program) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "holdfast",
		Short:         "Back up, restore and verify virtual machines",
		Long:          longHelp,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			hint := "see: holdfast --help"
			if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
				hint = "did you mean: holdfast " + strings.Join(s, ", holdfast ")
			}
			return usage(hint, fmt.Errorf("there is no command %q", args[0]))
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SuggestionsMinimumDistance = 2
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetIn(p.stdin)
	root.SetOut(p.stdout)
	root.SetErr(p.stderr)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage("see: "+cmd.CommandPath()+" --help", err)
	})
	pf := root.PersistentFlags()
	pf.BoolVar(&p.json, "json", false, "print one JSON object per line on stdout, and nothing else there")
	pf.BoolVar(&p.events, "events", false, "print what happens as JSON lines on stderr")
	pf.StringVar(&p.stateFlag, "state-dir", "", "`directory` of journals (default: HOLDFAST_STATE_DIR, XDG_STATE_HOME/holdfast, ~/.local/state/holdfast)")
	pf.SortFlags = false
	for _, c := range []*cobra.Command{
		p.demoCommand(), p.vmsCommand(), p.planCommand(), p.backupCommand(), p.pointsCommand(), p.restoreCommand(),
		p.verifyCommand(), p.pruneCommand(), p.recoverCommand(), p.repairCommand(), p.passwordCommand(), p.releaseCommand(),
		p.guardCommand(), p.versionCommand(),
	} {
		c.Flags().SortFlags = false
		c.DisableFlagsInUseLine = true
		root.AddCommand(c)
	}
	return root
}

// exactly wants n arguments that are named what.
func exactly(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < n:
			return usage("usage: "+cmd.UseLine(), fmt.Errorf("%s: %s is missing", cmd.Name(), what))
		case len(args) > n:
			return usage("usage: "+cmd.UseLine(), fmt.Errorf("%s: unexpected argument %q", cmd.Name(), args[n]))
		}
		return nil
	}
}

// atLeastOne wants arguments that are named what.
func atLeastOne(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usage("usage: "+cmd.UseLine(), fmt.Errorf("%s: %s is missing", cmd.Name(), what))
		}
		return nil
	}
}

// required wants a flag to be set.
func required(cmd *cobra.Command, name, value string) error {
	if value != "" {
		return nil
	}
	return usage("usage: "+cmd.UseLine(), fmt.Errorf("%s: --%s is missing", cmd.Name(), name))
}

var errNoState = errors.New("there is no place to keep state: neither HOME nor XDG_STATE_HOME is set")
