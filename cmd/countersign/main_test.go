package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"

	"countersign/client"
)

// TestPrintIsPlain checks that text of others can't send control characters to the reader's
// terminal.
func TestPrintIsPlain(t *testing.T) {
	var out bytes.Buffer
	show := func(w io.Writer) { fmt.Fprintf(w, "cause\t%s\nname\tJürgen ✓\n", "\x1b[2Kred\r\u009b1m\u202e\x00") }
	if err := (&tool{stdout: &out}).print(nil, show); err != nil {
		t.Fatal(err)
	}
	if want := "cause  �[2Kred��1m��\nname   Jürgen ✓\n"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
}

// TestConfirms: only y and yes on a line of their own are a yes, and no answer is a no.
func TestConfirms(t *testing.T) {
	for answer, want := range map[string]bool{
		"y\n": true, "Yes \r\n": true, "y": true, "": false, "\n": false, "n\n": false, "no, yes\n": false,
		"y and more\n": false, "\ny\n": false,
	} {
		var asked strings.Builder
		got := (&tool{stdin: strings.NewReader(answer), stderr: &asked}).confirms("Go on?")
		if got != want || asked.String() != "Go on? [y/N] " {
			t.Errorf("%q: %v after %q", answer, got, asked.String())
		}
	}
}

// TestForkedLogHasACode: scripts tell a log that was set back from a proof that is missing.
func TestForkedLogHasACode(t *testing.T) {
	for want, err := range map[string]error{
		"forked_log": fmt.Errorf("%w: %w", client.ErrUnproven, client.ErrForkedLog),
		"unproven":   client.ErrUnproven,
	} {
		if code, status := classify(failed{err}); code != want || status != 1 {
			t.Errorf("%v: %s, %d", err, code, status)
		}
	}
}
