// Package spectest holds tables of the documents against the tables that the code runs by.
package spectest

import (
	"flag"
	"os"
	"strings"
	"testing"
)

var write = flag.Bool("write", false, "write the tables of the tests into the documents")

// Writing reports whether the flag -write is given, for tests that write other generated files.
func Writing() bool { return *write }

// Table compares the table of a document below a header of two lines with rows, one line each. The
// path of the document begins at the folder of the test. With the flag -write, Table writes the
// rows into the document:
//
//	go test -run TestSpec ./internal/cause -args -write
func Table(t *testing.T, document, header, rows string) {
	t.Helper()
	b, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	before, after, found := strings.Cut(string(b), header)
	if !found {
		t.Fatalf("%s has no table with the columns\n%s", document, header)
	}
	got := ""
	for line := range strings.Lines(after) {
		if !strings.HasPrefix(line, "|") {
			break
		}
		got += line
	}
	if *write {
		if err := os.WriteFile(document, []byte(before+header+rows+after[len(got):]), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if got != rows {
		t.Errorf("%s has\n%s\nthe table is\n%s", document, got, rows)
	}
}
