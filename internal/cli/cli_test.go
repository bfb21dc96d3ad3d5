package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func program() *cobra.Command {
	root := &cobra.Command{Use: "tool", Short: "Do things"}
	do := &cobra.Command{
		Use: "do NAME", Short: "Do a thing", Long: "Do a thing.\n\n.hidden is no \"request\" \\ here.",
		Example: "  tool do x --fast", Run: func(*cobra.Command, []string) {},
	}
	do.Flags().Bool("fast", false, "do it fast")
	do.Flags().String("with", "", "the `tool` to use")
	root.AddCommand(do)
	Add(root, map[string]int{"ledger": 7}, func(err error) error { return err })
	return root
}

// TestVersion: the command and the flag print the same first line, and the JSON names what built
// the program. The binary of a test has no modules: packaging has the test of those.
func TestVersion(t *testing.T) {
	run := func(args ...string) string {
		var out bytes.Buffer
		root := program()
		root.SetArgs(args)
		root.SetOut(&out)
		if err := root.Execute(); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	command, flag := run("version"), run("--version")
	if command != flag+"format of the ledger: 7\n" || !strings.HasPrefix(flag, "tool "+Release+" (") {
		t.Errorf("%q, %q", command, flag)
	}
	var b Build
	if err := json.Unmarshal([]byte(run("version", "--json")), &b); err != nil {
		t.Fatal(err)
	}
	if b.Program != "tool" || b.Version != Release || b.Formats["ledger"] != 7 || b.Go != runtime.Version() ||
		b.Settings["GOARCH"] != runtime.GOARCH || !strings.Contains(flag, b.Platform) {
		t.Errorf("%+v", b)
	}
}

// TestRevision: a build from changed sources says so.
func TestRevision(t *testing.T) {
	at := debug.BuildSetting{Key: "vcs.revision", Value: "0123456789abcdef"}
	changed := debug.BuildSetting{Key: "vcs.modified", Value: "true"}
	for want, settings := range map[string][]debug.BuildSetting{
		"": {changed}, "0123456789abcdef": {at}, "0123456789abcdef+dirty": {at, changed},
	} {
		if got := revision(settings); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestCount(t *testing.T) {
	for noun, want := range map[string]string{"event": "2 events", "entry": "2 entries", "key": "2 keys"} {
		if one, two := Count(1, noun), Count(uint64(2), noun); one != "1 "+noun || two != want {
			t.Errorf("%q and %q", one, two)
		}
	}
	if got := Count(0, "entry"); got != "0 entries" {
		t.Error(got)
	}
}

// TestPages: each command has a page that the formatter takes without a warning, with the text as
// it is in the help.
func TestPages(t *testing.T) {
	dir := t.TempDir()
	root := program()
	root.SetArgs([]string{"man", dir})
	if err := root.Execute(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"tool", "tool-do", "tool-version", "tool-man"} {
		if _, err := os.Stat(filepath.Join(dir, name+".1")); err != nil {
			t.Error(err)
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, "tool-do.1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`\&.hidden is no \(dqrequest\(dq \e here.`, `\fB\-\-with\fR \fItool\fR`,
		".SH EXAMPLES\n.nf\n  tool do x \\-\\-fast\n", `\fBtool\fR(1)`,
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %s in\n%s", want, b)
		}
	}
}
