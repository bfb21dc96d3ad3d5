package policy

import "testing"

// TestUsedByAnotherSpelling: a rule that writes used with an escape counts all the same.
func TestUsedByAnotherSpelling(t *testing.T) {
	for _, name := range []string{`context.used`, `context["used"]`, `context["\u{75}sed"]`, `context["\x75sed"]`} {
		p, err := Parse("policy.cedar", []byte(`permit (principal, action, resource);
forbid (principal, action, resource) when { `+name+`.peer.day.signatures > 1 };`))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		cases, err := ParseCases("cases.csv", []byte("expect,peer,key,used.peer.day.signatures\nallow,shop,payments,1\ndeny,shop,payments,2\n"))
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range cases {
			if d := p.Decide(c.Request); d.Allowed != c.Allow || d.Fault != "" {
				t.Errorf("%s: line %d: %+v", name, c.Line, d)
			}
		}
	}
}
