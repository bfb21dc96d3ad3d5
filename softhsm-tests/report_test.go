package softhsmtests

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestReportOfAPeriod has a daemon sign payments and write reports of several periods while it
// signs more. Each report is valid by the log's key alone, has the receipts of its payments and no
// other, and a report without one of its rows is refused.
func TestReportOfAPeriod(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	c := s.dial()
	vkey := strings.TrimSpace(s.must("admin", "audit", "key"))
	sign := func(n int) {
		for range n {
			noteReceipt(must(c.Sign(t.Context(), "payments", s.subscription()))(t))
		}
	}
	sign(5)
	at := time.Now().Add(time.Millisecond)
	for !time.Now().After(at) { // so that no payment shares the millisecond
	}
	middle := at.UTC().Format(time.RFC3339Nano)
	sign(7)
	s.must("admin", "audit", "end-epoch")
	sign(3)
	for dir, period := range map[string]struct {
		flags    []string
		receipts string
	}{
		"all":    {nil, "15 of 15 signed payments"},
		"before": {[]string{"--to", middle}, "5 of 5 signed payments"},
		"after":  {[]string{"--from", middle}, "10 of 10 signed payments"},
		"none":   {[]string{"--to", "2026-01-01"}, "0 of 0 signed payments"},
	} {
		out := s.must(append([]string{"admin", "audit", "report", s.path(dir)}, period.flags...)...)
		again := s.must("audit", "verify", s.path(dir), "--key", vkey)
		if !strings.Contains(out, period.receipts) || out != again {
			t.Errorf("%s: %s\n%s", dir, out, again)
		}
	}
	for _, name := range []string{"events.csv", "events.jsonl", "receipts.csv", "receipts.jsonl"} {
		path := filepath.Join(s.path("all"), name)
		whole := must(os.ReadFile(path))(t)
		lines := strings.SplitAfter(string(whole), "\n")
		cut := strings.Join(append(append([]string(nil), lines[:3]...), lines[4:]...), "")
		if err := os.WriteFile(path, []byte(cut), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, errOut, code := s.cli("", "audit", "verify", s.path("all"), "--key", vkey); code == 0 ||
			!strings.Contains(errOut, name) {
			t.Errorf("%s without a row: %d, %s", name, code, errOut)
		}
		if err := os.WriteFile(path, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p.stop()
}

// TestSpreadsheetRunsNothing has Python's csv module read the CSV of a report whose events have
// formulas where a peer or an operator chooses the text. No cell begins as a formula, all rows have
// the columns of the heading, and the cells give back the texts.
func TestSpreadsheetRunsNothing(t *testing.T) {
	needTool(t, "python3", "python3")
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	formulas := []string{"=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "'=1"}
	for _, text := range formulas {
		s.cli("", "admin", "lock", "--reason", text)
		s.cli("", "admin", "unlock", "--reason", text)
	}
	s.must("admin", "unlock")
	noteReceipt(must(s.dial().Sign(t.Context(), "payments", s.subscription()))(t))
	s.must("admin", "audit", "report", s.path("report"))
	const read = `
import csv, json, sys
for name in sys.argv[1:]:
    rows = list(csv.reader(open(name, newline="", encoding="utf-8"), strict=True))
    assert len(rows) > 1 and {len(r) for r in rows} == {len(rows[0])}, name
    for row in rows:
        for cell in row:
            assert cell == "" or cell[0] not in "=+-@\t\r", cell
print(json.dumps(rows))
`
	cmd := exec.Command("python3", "-c", read, s.path("report/receipts.csv"), s.path("report/events.csv"))
	out, err := cmd.CombinedOutput()
	var rows [][]string
	if err != nil || json.Unmarshal(out, &rows) != nil || len(rows) < len(formulas) {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, text := range formulas[:4] {
		if !strings.Contains(string(out), text) {
			t.Errorf("no row has the text %q", text)
		}
	}
	p.stop()
}
