package main

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// versionDoc is what holdfast version tells.
type versionDoc struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Go       string `json:"go"`
	System   string `json:"system"`
}

func (p *program) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the version of this program",
		Args:  exactly(0, ""),
		RunE: func(*cobra.Command, []string) error {
			v := versionDoc{Version: "unknown", Go: runtime.Version(), System: runtime.GOOS + "/" + runtime.GOARCH}
			if info, ok := debug.ReadBuildInfo(); ok {
				if info.Main.Version != "" {
					v.Version = info.Main.Version
				}
				for _, s := range info.Settings {
					if s.Key == "vcs.revision" {
						v.Revision = s.Value
					}
				}
			}
			if p.json {
				p.emit(v)
				return nil
			}
			p.say("holdfast %s %s (%s, %s)", v.Version, v.Revision, v.Go, v.System)
			return nil
		},
	}
}
