// The command of package tally: it writes docs/reliability.md from the records of a
// folder.
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/holdfast-backup/holdfast/internal/tally"
)

func main() {
	from := flag.String("from", "docs/reliability", "folder of records")
	to := flag.String("to", "docs/reliability.md", "page to write")
	flag.Parse()
	if err := run(*from, *to); err != nil {
		fmt.Fprintln(os.Stderr, "tally:", err)
		os.Exit(1) //nolint:forbidigo // only main exits
	}
}

func run(from, to string) error {
	all, err := tally.Read(os.DirFS(from))
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return fmt.Errorf("no records in %s", from)
	}
	return os.WriteFile(to, []byte(tally.Page(all)), 0o644)
}
