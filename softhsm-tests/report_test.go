package softhsmtests

import (
	"os"
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
			must(c.Sign(t.Context(), "payments", s.subscription()))(t)
		}
	}
	sign(5)
	middle := time.Now().UTC().Add(time.Millisecond).Format(time.RFC3339Nano)
	for time.Now().UTC().Format(time.RFC3339Nano) <= middle { // so that no payment shares the millisecond
	}
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
