package cli

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// Release is the version of this source tree: semantic, and the newest heading of NEWS.md.
const Release = "0.2.0"

// The linker may set both (-X): release is the version of a package that is built from changed
// sources, and commit the commit of the sources where the build has no repository to ask.
var release, commit string

// Build describes the build of a program.
type Build struct {
	Program string `json:"program"`
	Version string `json:"version"`
	// Commit is the commit of the sources, with +dirty after other changes, or empty in a build
	// without a repository.
	Commit string `json:"commit"`
	// Formats are the formats of the program's files, by name.
	Formats  map[string]int `json:"formats,omitempty"`
	Go       string         `json:"go"`
	Platform string         `json:"platform"`
	// Settings are the settings of the Go toolchain for the build.
	Settings map[string]string `json:"settings"`
	// Modules are the Go modules in the program, with the sums of go.sum.
	Modules []Module `json:"modules"`
}

// Module is a Go module.
type Module struct {
	Path    string `json:"path"`
	Version string `json:"version"`
	Sum     string `json:"sum"`
}

// ReadBuild describes the build of this program.
func ReadBuild(program string, formats map[string]int) Build {
	b := Build{
		Program: program, Version: cmp.Or(release, Release), Commit: commit, Formats: formats,
		Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
		Settings: map[string]string{}, Modules: []Module{},
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	for _, s := range info.Settings {
		if !strings.HasPrefix(s.Key, "vcs") {
			b.Settings[s.Key] = s.Value
		}
	}
	b.Commit = cmp.Or(b.Commit, revision(info.Settings))
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		b.Modules = append(b.Modules, Module{m.Path, m.Version, m.Sum})
	}
	return b
}

// revision is the commit of a build in a repository.
func revision(settings []debug.BuildSetting) (text string) {
	for _, s := range settings {
		if s.Key == "vcs.revision" {
			text = s.Value
		}
	}
	if text != "" && slices.Contains(settings, debug.BuildSetting{Key: "vcs.modified", Value: "true"}) {
		text += "+dirty"
	}
	return text
}

// Version is the version of this program with its commit, compiler and platform, on one line.
func Version() string {
	b := ReadBuild("", nil)
	from := ""
	if b.Commit != "" {
		id, dirty, changed := strings.Cut(b.Commit, "+")
		from = "commit " + id[:min(12, len(id))]
		if changed {
			from += "+" + dirty
		}
		from += ", "
	}
	return fmt.Sprintf("%s (%s%s, %s)", b.Version, from, b.Go, b.Platform)
}

// versionCommand prints the version of a program.
func versionCommand(root *cobra.Command, formats map[string]int) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "version", Short: "Print the version of this program, and what built it", Args: cobra.NoArgs,
		Example: "  " + root.Name() + " version --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !asJSON {
				fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n", root.Name(), root.Version)
				for _, name := range slices.Sorted(maps.Keys(formats)) {
					fmt.Fprintf(cmd.OutOrStdout(), "format of the %s: %d\n", name, formats[name])
				}
				return nil
			}
			b, err := json.MarshalIndent(ReadBuild(root.Name(), formats), "", "  ")
			if err == nil {
				fmt.Fprintf(cmd.OutOrStdout(), "%s\n", b)
			}
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print version, commit, compiler, settings and modules as JSON")
	return c
}
