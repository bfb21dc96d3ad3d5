package main

import (
	"bytes"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// leaves calls visit for each command that does something.
func leaves(c *cobra.Command, visit func(*cobra.Command)) {
	for _, each := range c.Commands() {
		if each.Name() == "completion" || each.Name() == "help" {
			continue
		}
		if leaves(each, visit); !each.HasSubCommands() {
			visit(each)
		}
	}
}

// word is a word of a shell's command line. The text of $(...) is one word.
var word = regexp.MustCompile(`(?:"(?:\$\([^)]*\)|[^"])*"|'[^']*'|[^\s"'])+`)

// TestExamples: each command has an example in its help, and each example is right usage: the
// command, its flags, and the number of its arguments.
func TestExamples(t *testing.T) {
	root := (&tool{}).root()
	for path := range examples {
		if c, rest, err := root.Find(strings.Fields(path)); err != nil || len(rest) > 0 || c.HasSubCommands() {
			t.Errorf("examples: there is no command %q", path)
		}
	}
	checked := 0
	leaves(root, func(c *cobra.Command) {
		if c.Example == "" {
			t.Errorf("%s has no example: write one at the command, or into examples", c.CommandPath())
		}
		own := false
		for line := range strings.Lines(c.Example) {
			words := word.FindAllString(strings.TrimSpace(line), -1)
			if len(words) == 0 || words[0] != "countersign" {
				continue
			}
			end := slices.IndexFunc(words, func(w string) bool { return strings.ContainsAny(w[:1], "|&>") })
			if end >= 0 {
				words = words[:end]
			}
			for i := range words {
				words[i] = strings.Trim(words[i], `"'`)
			}
			of, rest, err := (&tool{}).root().Find(words[1:])
			if err == nil {
				err = of.ParseFlags(rest)
			}
			if err == nil {
				err = of.ValidateArgs(of.Flags().Args())
			}
			if err != nil {
				t.Errorf("%s: the example %q: %v", c.CommandPath(), line, err)
			}
			own = own || of.CommandPath() == c.CommandPath()
			checked++
		}
		if !own {
			t.Errorf("%s: its example does not call it:\n%s", c.CommandPath(), c.Example)
		}
	})
	if checked < 60 {
		t.Errorf("%d examples", checked)
	}
}

// TestStatesHaveColours: at a terminal, a column that is a state has a colour, and no other text.
func TestStatesHaveColours(t *testing.T) {
	text := "NAME    VERSION  STATE\nactive  1        active\nshop    2        compromised  x\n" +
		"state   locked\ncause   locked: by ann, not active\n"
	want := "NAME    VERSION  STATE\nactive  1        \x1b[32mactive\x1b[0m\n" +
		"shop    2        \x1b[31mcompromised\x1b[0m  x\nstate   \x1b[31mlocked\x1b[0m\n" +
		"cause   locked: by ann, not active\n"
	if got := string(colourStates([]byte(text))); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	t.Setenv("NO_COLOR", "1")
	if f, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0); err == nil {
		defer f.Close()
		if terminal(f) == nil || colours(f) {
			t.Error("NO_COLOR does not turn colours off at a terminal")
		}
		t.Setenv("NO_COLOR", "")
		t.Setenv("TERM", "xterm")
		if !colours(f) {
			t.Error("a terminal has no colours")
		}
	}
	var out bytes.Buffer
	show := func(w io.Writer) { io.WriteString(w, text) }
	if err := (&tool{stdout: &out}).print(nil, show); err != nil || colours(&out) {
		t.Error(err)
	}
	if out.String() != text {
		t.Errorf("%q", out.String())
	}
}

// TestWholeSeconds: a duration that is sent in seconds is never rounded to 0, which turns a setting
// off.
func TestWholeSeconds(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "0s": 0, "90s": 90, "2d": 172800, "500ms": -1, "1.5s": -1, "x": -1,
	} {
		if got, err := wholeSeconds(text); (err != nil) != (want < 0) || err == nil && got != want {
			t.Errorf("%q: %d, %v", text, got, err)
		}
	}
}

// TestForms: 32 bytes are read in each form in which they are written somewhere, and have one text
// in each.
func TestForms(t *testing.T) {
	want := [32]byte{31: 0xfe}
	want[0] = 0xfb
	for _, s := range []string{
		"fb000000000000000000000000000000000000000000000000000000000000fe",
		"FB000000000000000000000000000000000000000000000000000000000000FE",
		"+wAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAP4=", "+wAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAP4",
		"-wAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAP4", zBase32.EncodeToString(want[:]),
	} {
		if got, err := parse32(s); err != nil || got != want {
			t.Errorf("%s: %x, %v", s, got, err)
		}
		wrong := s[:len(s)-1] + "!"
		if _, err := parse32(wrong); err == nil || !strings.Contains(err.Error(), wrong) {
			t.Errorf("%s: %v", wrong, err)
		}
	}
	// The last characters have bits that belong to no byte.
	for _, s := range []string{
		"-wAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAP5", zBase32.EncodeToString(want[:])[:51] + "b", "", "ab",
	} {
		if got, err := parse32(s); err == nil {
			t.Errorf("%q: %x", s, got)
		}
	}
}
