package policy

import (
	"strings"
	"testing"
)

// TestUsedByAnotherSpelling sees that a rule reads the field used of the context in any spelling
// of the name.
func TestUsedByAnotherSpelling(t *testing.T) {
	for _, name := range []string{`context.used`, `context["used"]`, `context["\u{75}sed"]`, `context["\x75sed"]`} {
		p, err := Parse("policy.cedar", []byte(`permit (principal, action, resource);
forbid (principal, action, resource) when { `+name+`.peer.day.signatures > 1 };`))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		cases, err := ParseCases("cases.csv", []byte("expect,peer,key,used.peer.day.signatures\n"+
			"allow,shop,payments,1\ndeny,shop,payments,2\n"))
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

// TestNumberOutOfRange sees that the error for a number out of range names the line.
func TestNumberOutOfRange(t *testing.T) {
	_, err := Parse("policy.cedar", []byte("// a comment\npermit (principal, action, resource)\n"+
		"when { context.size < 9223372036854775808 };"))
	if err == nil || !strings.Contains(err.Error(), "policy.cedar:3: the number 9223372036854775808") {
		t.Error(err)
	}
}

// TestImpossibleCases sees that a case with an impossible field is refused. Such a case could
// pass for another reason than the author of the case has in mind.
func TestImpossibleCases(t *testing.T) {
	for _, field := range []string{
		"weekday=sunday", "hour=24", "hour=-1", "amount=-5", "used.peer.day.signatures=-1", "lifetime=-1",
	} {
		name, value, _ := strings.Cut(field, "=")
		_, err := ParseCases("cases.csv", []byte("expect,peer,key,"+name+"\ndeny,shop,payments,"+value+"\n"))
		if err == nil || !strings.Contains(err.Error(), "cases.csv:2: "+name) {
			t.Errorf("%s: %v", field, err)
		}
	}
}
