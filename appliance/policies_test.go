package appliance

import (
	"strings"
	"testing"
)

// TestPolicyFileIsNotBelieved: a policy file that was changed does nothing at a start, once there
// are operators.
func TestPolicyFileIsNotBelieved(t *testing.T) {
	r := newRig(t)
	start := func(text string) {
		t.Helper()
		r.policies.file = parsed(t, text)
		if err := r.policies.start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	inForce := func(want, otherwise string) {
		t.Helper()
		if rules, err := r.policies.inForce(); err != nil || string(rules.Text) != want {
			t.Errorf("%s: %v", otherwise, err)
		}
	}
	start(allowShop)
	const wide = `permit (principal, action, resource);`
	start(wide + "\n")
	inForce(wide+"\n", "before there are operators, the file counts")
	start(allowShop)
	r.governed(t)
	start(wide)
	inForce(allowShop, "a policy that no operator has approved is in force")
	if h := r.Health(); h.Condition != Degraded || !strings.Contains(strings.Join(h.Causes, ""), "policy") {
		t.Errorf("%+v", h)
	}
	_, err := r.Sign(t.Context(), r.cafe, message(1, "m"))
	r.refuses(t, "denied", err)
	if _, _, err := r.Activate(t.Context(), approved, parsed(t, wide)); err != nil {
		t.Fatal(err)
	}
	r.sign(t, r.cafe, message(1, "m"))
	if h := r.Health(); h.Condition != Operational {
		t.Errorf("%+v", h)
	}
}
