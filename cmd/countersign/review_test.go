package main

import (
	"strings"
	"testing"
	"unicode"

	"countersign/approval"
)

// TestShownHidesNothing shows texts in which a part is not to be seen: control characters, marks of
// direction, tabs, and thousands of spaces.
func TestShownHidesNothing(t *testing.T) {
	many := strings.Repeat(" ", 100_000)
	for text, want := range map[string]string{
		"\tpermit ()\n":        "    permit ()\n",
		"a\x1b[2Jb\r\nc":       `a\u{1b}[2Jb\u{d}` + "\nc",
		"\u202eab\u2066":       `\u{202e}ab\u{2066}`,
		"a" + many + "b":       `a\u{20}×100000b`,
		many:                   `\u{20}×100000`,
		"    a = 1":            "    a = 1",
		"\xff\ufffd\u00a0":     `\u{fffd}\u{fffd}` + "\u00a0",
		"zwischen\u200bdrin":   `zwischen\u{200b}drin`,
		"blank\u3164\u2800end": `blank\u{3164}\u{2800}end`,
	} {
		got := shown(text)
		if got != want {
			t.Errorf("%.40q is shown as %.60q, want %q", text, got, want)
		}
		hidden := func(r rune) bool { return r != '\n' && (approval.Hidden(r) || unicode.IsControl(r)) }
		if strings.ContainsFunc(got, hidden) {
			t.Errorf("%.40q is shown with hidden characters: %q", text, got)
		}
	}
}
