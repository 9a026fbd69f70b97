// Command sbom prints the software bill of materials of a Go program:
//
//	go mod graph | go run ./.ci/sbom PROGRAM >holdfast.cdx.json
package main

import (
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/holdfast-backup/holdfast/internal/sbom"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1) //nolint:forbidigo // only main exits
	}
}

func run() error {
	if len(os.Args) != 2 {
		return errors.New("give it one program, and the output of go mod graph on stdin")
	}
	info, err := buildinfo.ReadFile(os.Args[1])
	if err != nil {
		return err
	}
	d, err := sbom.New(info, os.Stdin)
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return err
	}
	if err := sbom.Check(b); err != nil {
		return err
	}
	_, err = os.Stdout.Write(append(b, '\n'))
	return err
}
