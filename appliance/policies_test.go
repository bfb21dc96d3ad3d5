package appliance

import (
	"testing"

	"countersign/internal/cause"
	"countersign/policy"
)

// TestPolicyFileIsNotBelieved: a policy file that was changed does nothing at a start, once there
// are operators.
func TestPolicyFileIsNotBelieved(t *testing.T) {
	r := newRig(t)
	start := func(text string) {
		t.Helper()
		r.policies.file = parsed(t, text)
		r.policies.load = func() (*policy.Policy, error) { return r.policies.file, nil }
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
	if h := r.Health(); h.Condition != Degraded || len(h.Causes) != 1 || h.Causes[0].Kind != cause.PolicyWaits {
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

// TestPolicyFileIsPutBack: the causes of a changed and of an unusable policy file are gone when the
// old file is back.
func TestPolicyFileIsPutBack(t *testing.T) {
	r := newRig(t)
	is := func(want ...*cause.Kind) {
		t.Helper()
		r.policies.look(r.policies.log)
		h := r.Health()
		for i, c := range h.Causes {
			if len(want) != len(h.Causes) || c.Kind != want[i] {
				t.Errorf("%+v", h)
			}
		}
		if (h.Condition == Operational) != (len(want) == 0) || len(h.Causes) != len(want) {
			t.Errorf("%+v", h)
		}
	}
	file, broken := allowShop, error(nil)
	r.policies.load = func() (*policy.Policy, error) {
		if broken != nil {
			return nil, broken
		}
		return policy.Parse("policy.cedar", []byte(file))
	}
	if err := r.policies.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	is()
	file = ""
	is(cause.PolicyWaits)
	file = allowShop
	is()
	_, broken = policy.Parse("policy.cedar", []byte("permit ("))
	is(cause.PolicyBroken)
	broken = nil
	is()
}
