package main

import (
	"bytes"
	"io"
	"testing"

	"countersign/internal/logqueue"
)

// TestWrongCommandLine sees that a command line that no restart mends has status 2, and names what
// is wrong.
func TestWrongCommandLine(t *testing.T) {
	for _, args := range [][]string{
		{"nope"}, {"config", "x"}, {"check", "--nope"}, {"man"}, {"init", "x"}, {"serve", "--config"},
	} {
		var printed bytes.Buffer
		stderr := logqueue.New(&printed)
		code := run(t.Context(), args, io.Discard, stderr)
		stderr.Close(lastLines)
		if code != 2 || !bytes.HasPrefix(printed.Bytes(), []byte("countersignd: error: ")) {
			t.Errorf("%v: status %d, want 2; stderr %q", args, code, &printed)
		}
	}
}
