package cli

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// WritePages writes a manual page of section 1 for each command into a folder, which must exist:
// for example countersign-admin-key-rotate.1.
func WritePages(root *cobra.Command, dir string) error {
	for _, c := range commands(root) {
		path := filepath.Join(dir, pageName(c)+".1")
		if err := os.WriteFile(path, page(c), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// commands returns the commands at and below one.
func commands(c *cobra.Command) []*cobra.Command {
	all := []*cobra.Command{c}
	for _, each := range children(c) {
		all = append(all, commands(each)...)
	}
	return all
}

// children returns the commands below one, without those that cobra adds.
func children(c *cobra.Command) []*cobra.Command {
	return slices.DeleteFunc(slices.Clone(c.Commands()), func(each *cobra.Command) bool {
		return !each.IsAvailableCommand() || each.Name() == "help" || each.Name() == "completion"
	})
}

func pageName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// page returns the manual page of a command, in the macros of man(7).
func page(c *cobra.Command) []byte {
	var b bytes.Buffer
	title := strings.ToUpper(pageName(c))
	fmt.Fprintf(&b, ".TH %q 1 \"\" %q\n", escape(title), escape(c.Root().Name()+" "+c.Root().Version))
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", escape(pageName(c)), escape(c.Short))
	fmt.Fprintf(&b, ".SH SYNOPSIS\n.nf\n%s\n.fi\n", lines(c.UseLine()))
	text := c.Long
	if text == "" {
		text = c.Short + "."
	}
	fmt.Fprintf(&b, ".SH DESCRIPTION\n%s\n", strings.ReplaceAll(lines(text), "\n\n", "\n.PP\n"))
	flags(&b, "OPTIONS", c.NonInheritedFlags())
	flags(&b, "OPTIONS OF THE COMMANDS ABOVE", c.InheritedFlags())
	if c.Example != "" {
		fmt.Fprintf(&b, ".SH EXAMPLES\n.nf\n%s\n.fi\n", lines(c.Example))
	}
	var related []string
	if c.HasParent() {
		related = append(related, reference(c.Parent()))
	}
	for _, each := range children(c) {
		related = append(related, reference(each))
	}
	if len(related) > 0 {
		fmt.Fprintf(&b, ".SH SEE ALSO\n%s\n", strings.Join(related, ",\n"))
	}
	return b.Bytes()
}

func reference(c *cobra.Command) string { return fmt.Sprintf("\\fB%s\\fR(1)", escape(pageName(c))) }

func flags(b *bytes.Buffer, title string, all *pflag.FlagSet) {
	if !all.HasAvailableFlags() {
		return
	}
	fmt.Fprintf(b, ".SH %s\n", title)
	all.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		value, usage := pflag.UnquoteUsage(f)
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		fmt.Fprintf(b, ".TP\n\\fB%s\\fR", escape(name))
		if value != "" {
			fmt.Fprintf(b, " \\fI%s\\fR", escape(value))
		}
		fmt.Fprintf(b, "\n%s\n", lines(usage))
	})
}

// lines escapes a text of several lines. A line that begins with a period or an apostrophe would be
// a request to the formatter.
func lines(text string) string {
	all := strings.Split(text, "\n")
	for i, line := range all {
		line = escape(line)
		if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
			line = `\&` + line
		}
		all[i] = line
	}
	return strings.Join(all, "\n")
}

func escape(text string) string {
	return strings.NewReplacer(`\`, `\e`, "-", `\-`, `"`, `\(dq`).Replace(text)
}
