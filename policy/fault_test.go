package policy_test

import (
	"slices"
	"strings"
	"testing"

	"countersign/policy"
)

// TestRulesOfADecision compares the deciding rules with docs/SPEC.md section 8: the permits of an
// allowed request, the forbids of a denied one, and no permit beside a fault. A record of an older
// version, with the permits beside a fault, can be replayed.
func TestRulesOfADecision(t *testing.T) {
	const permit, forbid = `@id("p") permit (principal, action, resource);` + "\n",
		`@id("f") forbid (principal, action, resource) when { context.lifetime == 60 };` + "\n"
	const broken = `@id("b") forbid (principal, action, resource) when { context.lifetime + 9223372036854775807 > 0 };`
	for name, c := range map[string]struct {
		rules, action string
		want          []string
		fault         bool
	}{
		"allowed":               {permit, policy.Sign, []string{"p"}, false},
		"forbidden":             {permit + forbid, policy.Sign, []string{"f"}, false},
		"not permitted":         {forbid[:strings.Index(forbid, "==")] + "== 1 };", policy.Sign, nil, false},
		"fault":                 {permit + broken, policy.Sign, nil, true},
		"fault and forbidden":   {permit + forbid + broken, policy.Sign, []string{"f"}, true},
		"raw by no narrow rule": {permit, policy.SignRaw, nil, true},
	} {
		p := parse(t, c.rules)
		d, b := p.Decided(1, 2, ask(t, "shop", c.action, "payments", nil), [16]byte{})
		if !slices.Equal(d.Rules, c.want) || (d.Fault != "") != c.fault || d.Allowed != (name == "allowed") {
			t.Errorf("%s: %+v, want the rules %q", name, d, c.want)
		}
		rec, err := policy.ParseRecord(b)
		if err != nil || p.Replay(rec) != nil {
			t.Errorf("%s: %v, %v", name, err, p.Replay(rec))
		}
		if rec.Rules = append(rec.Rules, "p"); (p.Replay(rec) == nil) != (c.fault && c.want == nil) {
			t.Errorf("%s: with a permit more: %v", name, p.Replay(rec))
		}
	}
}
