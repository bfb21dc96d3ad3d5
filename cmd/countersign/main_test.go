package main

import (
	"bytes"
	"fmt"
	"io"
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
