package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"text/tabwriter"
	"unicode"

	"golang.org/x/term"
)

// print writes v as JSON with --json, and otherwise calls human with a writer that aligns columns
// at tabs. At a terminal, the states among the columns have colours.
func (t *tool) print(v any, human func(w io.Writer)) error {
	if t.json {
		e := json.NewEncoder(t.stdout)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	var text bytes.Buffer
	w := tabwriter.NewWriter(visible{&text}, 0, 0, 2, ' ', 0)
	human(w)
	w.Flush() // to memory
	out := text.Bytes()
	if colours(t.stdout) {
		out = colourStates(out)
	}
	_, err := t.stdout.Write(out)
	return err
}

// visible writes text for people. Others have chosen some of the text, for example the reason of a
// lock. Control and format characters come out as U+FFFD, so that text can't move the cursor of a
// terminal or hide.
type visible struct{ to io.Writer }

func (v visible) Write(b []byte) (int, error) {
	_, err := v.to.Write(bytes.Map(func(r rune) rune {
		if r != '\n' && unicode.In(r, unicode.Cc, unicode.Cf) {
			return unicode.ReplacementChar
		}
		return r
	}, b))
	return len(b), err
}

// terminal returns the terminal behind a reader or a writer, or nil.
func terminal(stream any) *os.File {
	if v, is := stream.(visible); is {
		stream = v.to
	}
	if f, is := stream.(*os.File); is && term.IsTerminal(int(f.Fd())) {
		return f
	}
	return nil
}

// interactive says whether stdin is a terminal.
func (t *tool) interactive() bool { return terminal(t.stdin) != nil }

// confirms asks a person at a terminal, and reports whether the answer is y or yes.
func (t *tool) confirms(question string) bool {
	fmt.Fprintf(t.stderr, "%s [y/N] ", question)
	answer, _ := bufio.NewReader(t.stdin).ReadString('\n') // no answer is a no
	answer = strings.ToLower(strings.TrimSpace(answer))
	return answer == "y" || answer == "yes"
}

// colours reports whether states written to w have colours (https://no-color.org).
func colours(w io.Writer) bool {
	if os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	f := terminal(w)
	return f != nil && ansi(f)
}

// The colours of states: SGR parameters of ECMA-48.
const (
	green  = "32"
	yellow = "33"
	red    = "31"
)

var colourOf = map[string]string{
	"operational": green, "active": green, "up": green, "enrolled": green, "done": green, "permitted": green,
	"degraded": yellow, "uninitialised": yellow, "pending": yellow, "making": yellow, "open": yellow,
	"running": yellow, "verify-only": yellow, "suspended": yellow, "expired": yellow, "withdrawn": yellow,
	"locked": red, "rolled-back": red, "down": red, "compromised": red, "destroyed": red, "failed": red,
	"interrupted": red, "denied": red,
}

// cell is a column other than the first one. The first column has names, which others choose.
var cell = regexp.MustCompile(`(?m)  [a-z-]+(, compromised)?`)

// colourStates colours each column that is a state and nothing else. A column ends at two spaces or
// at the end of the line.
func colourStates(text []byte) []byte {
	var out []byte
	last := 0
	for _, at := range cell.FindAllIndex(text, -1) {
		word, rest := string(text[at[0]+2:at[1]]), text[at[1]:]
		colour := colourOf[strings.TrimSuffix(word, ", compromised")]
		ends := len(rest) == 0 || rest[0] == '\n' || bytes.HasPrefix(rest, []byte("  "))
		if colour == "" || !ends || at[0] == 0 || text[at[0]-1] == '\n' {
			continue
		}
		out = fmt.Appendf(append(out, text[last:at[0]+2]...), "\x1b[%sm%s\x1b[0m", colour, word)
		last = at[1]
	}
	return append(out, text[last:]...)
}
