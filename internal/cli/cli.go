// Package cli has what the command lines of both programs have in common: the version, manual
// pages that are made from the commands, durations and numbers. Begin reading at Add.
package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// Add adds the commands version and man to a program, and the flag --version. failed marks an error
// of a command whose usage was right. formats are those that the version names.
func Add(root *cobra.Command, formats map[string]int, failed func(error) error) {
	root.Version = Version()
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	man := &cobra.Command{
		Use: "man DIR", Short: "Write the manual pages of all commands to a folder", Args: cobra.ExactArgs(1),
		Example: "  " + root.Name() + " man /usr/local/share/man/man1",
		RunE: func(_ *cobra.Command, args []string) error {
			if err := WritePages(root, args[0]); err != nil {
				return failed(err)
			}
			return nil
		},
	}
	root.AddCommand(versionCommand(root, formats), man)
}

// Number is a type that Count takes.
type Number interface {
	~int | ~uint64 | ~int64 | ~uint32
}

// Count is a number with its noun, for example "1 event", "2 events", "3 entries" or "4 keys".
func Count[N Number](n N, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	if stem, is := strings.CutSuffix(noun, "y"); is && !strings.HasSuffix(stem, "e") {
		noun = stem + "ie"
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
