// Package monitoring_test holds the dashboard and the rules against the table of metrics.
package monitoring_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"countersign/internal/cause"
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

// TestEveryRuleCanFail breaks all rules. With rules that never give a sample, the unit tests of
// each rule fail: a moment at which the rule holds is tested. With alerts that always fire, the
// unit tests of each alert fail where nothing is expected: a moment of silence is tested.
func TestEveryRuleCanFail(t *testing.T) {
	rules, tests := read(t, "rules.yml"), read(t, "rules_test.yml")
	promtool(t, "--version")
	if t.Failed() {
		return
	}
	failures := func(pattern, expr string) string {
		broken := regexp.MustCompile(pattern).ReplaceAllString(rules, "$1        expr: "+expr+"\n")
		dir := t.TempDir()
		for file, text := range map[string]string{
			"rules.yml": strings.ReplaceAll(broken, "        for: ", "        # for: "), "rules_test.yml": tests,
		} {
			if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		out, err := exec.Command("promtool", "test", "rules", filepath.Join(dir, "rules_test.yml")).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "FAILED") {
			t.Fatalf("promtool test rules: %v %s", err, out)
		}
		return string(out)
	}
	const expression = `(?:        #.*\n)?)        expr: .*\n(?:          .*\n)*`
	never := failures(`(?m)^(      - (?:alert|record): .*\n`+expression, "vector(1) < 0")
	always := failures(`(?m)^(      - alert: .*\n`+expression, "vector(1)")
	for _, each := range rule.FindAllStringSubmatch(rules, -1) {
		name := regexp.QuoteMeta(each[1])
		holds, silent := regexp.MustCompile(`expr: "`+name+`", time`), (*regexp.Regexp)(nil)
		if strings.Contains(each[0], "alert:") {
			holds = regexp.MustCompile(`alertname: ` + name + `, time: .*\n +exp:\[\n`)
			silent = regexp.MustCompile(`alertname: ` + name + `, time: .*\n +exp:\[\]`)
		}
		if !holds.MatchString(never) {
			t.Errorf("%s has no unit test that fails without the rule", each[1])
		}
		if silent != nil && !silent.MatchString(always) {
			t.Errorf("%s has no unit test that fails when the alert always fires", each[1])
		}
	}
}

// TestCodesOfCauses: the rules name codes of causes that exist. CountersignStopped fires for each
// cause that stops admissions without the will of an operator, and CountersignDegraded for each
// that no other alert names.
func TestCodesOfCauses(t *testing.T) {
	rules := read(t, "rules.yml")
	named := map[string][]string{} // by alert
	for part := range strings.SplitSeq(rules, "- alert: ") {
		name, _, _ := strings.Cut(part, "\n")
		for _, found := range code.FindAllStringSubmatch(part, -1) {
			named[name] = append(named[name], strings.Split(found[1], "|")...)
		}
	}
	var known, stops []string
	for _, k := range cause.Kinds {
		known = append(known, k.Code)
		if k.Stops && k != cause.Locked && k != cause.Starting {
			stops = append(stops, k.Code)
		}
	}
	elsewhere := []string{cause.Locked.Code}
	for name, codes := range named {
		for _, c := range codes {
			if !slices.Contains(known, c) {
				t.Errorf("%s names the code %s, which no cause has", name, c)
			}
		}
		if name != "CountersignDegraded" {
			elsewhere = append(elsewhere, codes...)
		}
	}
	for what, sets := range map[string][2][]string{
		"CountersignStopped":  {named["CountersignStopped"], stops},
		"CountersignDegraded": {named["CountersignDegraded"], elsewhere},
	} {
		for i := range sets {
			slices.Sort(sets[i])
		}
		if !slices.Equal(sets[0], sets[1]) {
			t.Errorf("%s names the codes\n%q, want\n%q", what, sets[0], sets[1])
		}
	}
}

// code is a condition on the codes of causes.
var code = regexp.MustCompile(`countersign_causes\{code[=!]~?"([^"]+)"`)

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
