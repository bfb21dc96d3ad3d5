// Package monitoring_test holds the dashboard and the rules against the table of metrics.
package monitoring_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"countersign/internal/meter"
)

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// promtool runs promtool, and fails the test with its output.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("promtool"); err != nil {
		if os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatal("promtool is missing: scripts/deps.sh test installs Debian's package prometheus")
		}
		t.Skip("promtool is missing")
	}
	if out, err := exec.Command("promtool", args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// TestRules runs the unit tests of the rules.
func TestRules(t *testing.T) {
	promtool(t, "check", "rules", "rules.yml")
	promtool(t, "test", "rules", "rules_test.yml")
}

var (
	rule   = regexp.MustCompile(`(?m)^ +- (?:alert|record): (\S+)$`)
	series = regexp.MustCompile(`\bcountersign_[a-z0-9_]+`)
	record = regexp.MustCompile(`\bcountersign:[a-z0-9_]+:[a-z0-9_]+`)
)

// TestEveryRuleIsTested: each rule has a unit test of its name, and each alert says what to do.
func TestEveryRuleIsTested(t *testing.T) {
	rules, tests := read(t, "rules.yml"), read(t, "rules_test.yml")
	all := rule.FindAllStringSubmatch(rules, -1)
	if len(all) < 30 {
		t.Fatalf("%d rules", len(all))
	}
	for _, each := range all {
		if !strings.Contains(tests, "\n  - name: "+each[1]+"\n") {
			t.Errorf("%s has no unit test", each[1])
		}
	}
	for part := range strings.SplitSeq(rules, "- alert: ") {
		name, _, _ := strings.Cut(part, "\n")
		if !strings.HasPrefix(name, "Countersign") {
			continue
		}
		for _, field := range []string{" summary: ", " do: ", " severity: "} {
			if !strings.Contains(part, field) && !strings.Contains(part, strings.Replace(field, " ", "{", 1)) {
				t.Errorf("alert %s has no%s", name, field)
			}
		}
	}
}

// TestQueriesNameSeries: the rules and the dashboard name only series of the table and records of
// the rules, and the dashboard shows each series.
func TestQueriesNameSeries(t *testing.T) {
	rules, dashboard := read(t, "rules.yml"), read(t, "dashboard.json")
	if !json.Valid([]byte(dashboard)) {
		t.Error("dashboard.json is no JSON")
	}
	for _, name := range series.FindAllString(rules+dashboard, -1) {
		base := name
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			base = strings.TrimSuffix(base, suffix)
		}
		if !slices.ContainsFunc(meter.All, func(s *meter.Series) bool {
			return s.Name == name || s.Kind == meter.Histogram && s.Name == base
		}) {
			t.Errorf("no series is %s", name)
		}
	}
	for _, name := range record.FindAllString(rules+dashboard, -1) {
		if !strings.Contains(rules, "record: "+name+"\n") {
			t.Errorf("no record is %s", name)
		}
	}
	// A series is shown by itself, or by a record of it.
	shown := dashboard
	for part := range strings.SplitSeq(rules, "- record: ") {
		if name, expr, _ := strings.Cut(part, "\n"); strings.Contains(dashboard, name) {
			shown += strings.Split(expr, "- alert:")[0]
		}
	}
	for _, s := range meter.All {
		if !strings.Contains(shown, s.Name) {
			t.Errorf("the dashboard does not show %s", s.Name)
		}
	}
}

// TestDashboardIsPlain: the dashboard has no identity of a machine or of a data source.
func TestDashboardIsPlain(t *testing.T) {
	var doc struct {
		Panels []struct {
			ID      int
			Title   string
			Targets []struct {
				Expr       string
				Datasource struct{ UID string }
			}
		}
	}
	if err := json.NewDecoder(bytes.NewReader([]byte(read(t, "dashboard.json")))).Decode(&doc); err != nil {
		t.Fatal(err)
	}
	ids := map[int]bool{}
	for _, p := range doc.Panels {
		if ids[p.ID] || p.Title == "" {
			t.Errorf("panel %d %q: the number is taken, or there is no title", p.ID, p.Title)
		}
		ids[p.ID] = true
		for _, q := range p.Targets {
			if !strings.Contains(q.Expr, `instance=~"$instance"`) || q.Datasource.UID != "${datasource}" {
				t.Errorf("%s: %s is not for the chosen appliance", p.Title, q.Expr)
			}
		}
	}
}
