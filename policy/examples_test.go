package policy_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"countersign/policy"
)

// The parts of a rule that TestExamples removes: the scope or a condition. The action stays,
// since a rule without one does not allow raw anyway.
var (
	scope  = regexp.MustCompile(`(principal|resource) (== (?:Peer|Key|Signer)|in (?:Key)?Group)::"[^"]*"([,)])`)
	clause = regexp.MustCompile(`(?m)^(when|unless) \{ (.*) \}(;?)$`)
)

// TestExamples sees that each example passes its cases, and that the cases are complete: without
// any one of its rules or conditions, an example fails a case.
func TestExamples(t *testing.T) {
	files, err := filepath.Glob("../examples/policies/*.cedar")
	if err != nil || len(files) != 6 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, file := range files {
		p, err := policy.Load(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range p.Warnings(nil) {
			t.Errorf("%s: %v", file, w)
		}
		table := strings.TrimSuffix(file, ".cedar") + ".csv"
		text, err := os.ReadFile(table)
		if err != nil {
			t.Fatal(err)
		}
		cases, err := policy.ParseCases(table, text)
		if err != nil {
			t.Fatal(err)
		}
		wrong := func(p *policy.Policy) (n int) {
			for _, c := range cases {
				if p.Decide(c.Request).Allowed != c.Allow {
					n++
				}
			}
			return n
		}
		if n := wrong(p); n != 0 {
			t.Errorf("%s: %d cases are wrong", file, n)
		}
		without := func(what, text string) {
			if p, err := policy.Parse(file, []byte(text)); err == nil && wrong(p) == 0 {
				t.Errorf("%s: no case fails without this: %s", file, what)
			}
		}
		for _, rule := range p.Rules() {
			if strings.HasPrefix(rule.ID, "line ") {
				t.Errorf("%s:%d: a rule without @id", file, rule.Line)
			}
			put := func(text string) string { return strings.Replace(string(p.Text), rule.Text, text, 1) }
			without(rule.ID, put(""))
			for _, m := range scope.FindAllStringSubmatchIndex(rule.Text, -1) {
				without(rule.ID+": "+rule.Text[m[0]:m[1]], put(rule.Text[:m[3]]+rule.Text[m[6]:]))
			}
			for _, m := range clause.FindAllStringSubmatchIndex(rule.Text, -1) {
				end := rule.Text[m[6]:m[7]]
				without(rule.ID+": "+rule.Text[m[0]:m[1]], put(rule.Text[:m[0]]+end+rule.Text[m[1]:]))
				for _, operator := range []string{" && ", " || "} {
					parts := strings.Split(rule.Text[m[4]:m[5]], operator)
					for i := range parts {
						if len(parts) > 1 {
							fewer := strings.Join(slices.Delete(slices.Clone(parts), i, i+1), operator)
							without(rule.ID+": "+parts[i], put(rule.Text[:m[4]]+fewer+rule.Text[m[5]:]))
						}
					}
				}
			}
		}
	}
}
