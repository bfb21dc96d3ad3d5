package operators

import (
	"slices"
	"testing"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/manage"
)

// TestHardwareKeysAreRequired turns the demand for hardware keys on and off by proposals. While it
// is on, an approval by another key is refused, an earlier one does not count, and enough approvers
// keep a hardware key. The log alone shows the same.
func TestHardwareKeysAreRequired(t *testing.T) {
	r := newRig(t, 2)
	carol := newPasskey(t, "carol", 0)
	r.enrol(t, carol, "administrator,approver")
	anna, bob := r.people[0], r.people[1]
	s, _ := r.signIn(t, anna, root)
	demand := func(required string) Proposal {
		t.Helper()
		return r.propose(t, s, approval.ActHardwareKeys, approval.Parameter{Name: "required", Value: required})
	}
	approved := func(by *signer, p Proposal) Proposal {
		t.Helper()
		after, err := r.approve(t, by, p)
		if err != nil || after.State != Done {
			t.Fatalf("%s: %v, %s %s", p.Act, err, after.State, after.Cause)
		}
		return after
	}
	_, err := r.Propose(t.Context(), s, approval.ActHardwareKeys,
		[]approval.Parameter{{Name: "required", Value: "perhaps"}}, nil, 0)
	want(t, err, ErrInvalid)
	r.apply(t, setNeeded, "2")
	_, err = r.Propose(t.Context(), s, approval.ActHardwareKeys,
		[]approval.Parameter{{Name: "required", Value: "yes"}}, nil, 0)
	want(t, err, ErrConflict) // carol alone has a hardware key
	r.apply(t, setNeeded, "1")

	before := r.propose(t, s, "test")
	r.apply(t, setNeeded, "2")
	if _, err := r.approve(t, bob, before); err != nil { // counts until hardware keys are required
		t.Fatal(err)
	}
	r.apply(t, setNeeded, "1")
	p := demand("yes")
	_, err = r.approve(t, bob, p) // or else nobody might be able to approve any more
	want(t, err, ErrNotAllowed)
	if approved(carol, p); !r.Hardware() {
		t.Fatal("hardware keys are not required")
	}
	if _, e := r.events(t, audit.ApproverKeysChanged); e.Actor.Name != "o0" || e.Metadata["required"] != "yes" {
		t.Errorf("the event is %+v", e)
	}
	if r.reopen(t); !r.Hardware() {
		t.Error("a restart has forgotten the demand")
	}
	s, _ = r.signIn(t, anna, root) // a sign-in needs no hardware key
	if p, err := r.Proposal(before.ID); err != nil || p.Approvals[0].Counts {
		t.Errorf("an approval from before counts: %+v, %v", p.Approvals, err)
	}
	_, err = r.approve(t, anna, before)
	want(t, err, ErrNotAllowed)
	approved(carol, before)

	for name, m := range map[string]struct {
		m      mutation
		values []string
	}{
		"the role":       {setRoles, []string{"carol", "administrator"}},
		"the operator":   {removeOperator, []string{"carol"}},
		"a bigger M":     {setNeeded, []string{"2"}},
		"the credential": {removeCredential, []string{"carol", carol.credential.ID}},
	} {
		if name == "the credential" {
			r.apply(t, r.addCredential, "carol", string(manage.Encode(newSigner(t, "").credential)))
		}
		if err := r.mutate(t, m.m, m.values...); err == nil {
			t.Errorf("%s: nobody is left to approve", name)
		}
	}
	_, err = r.approve(t, bob, demand("no"))
	want(t, err, ErrNotAllowed)
	approved(carol, demand("no"))
	if r.Hardware() {
		t.Error("hardware keys are still required")
	}
	approved(bob, r.propose(t, s, "test"))
}

// TestAcceptedCredentials asks which keys the Registry accepts. Of an operator who does not exist,
// of a passkey and of keys that were not named, the answer says nothing.
func TestAcceptedCredentials(t *testing.T) {
	r := newRig(t, 2)
	carol := newPasskey(t, "carol", 0)
	r.enrol(t, carol, "auditor")
	mine, others := r.people[0].credential.ID, r.people[1].credential.ID
	for _, c := range []struct {
		operator   string
		some, want []string
	}{
		{"o0", []string{"x", others, mine}, []string{mine}},
		{"o0", []string{others}, nil},
		{"o0", nil, nil},
		{"nobody", []string{mine, others}, nil},
		{"carol", []string{carol.credential.ID}, nil},
	} {
		if got := r.Accepted(c.operator, c.some); !slices.Equal(got, c.want) {
			t.Errorf("of %q, %s has %q, want %q", c.some, c.operator, got, c.want)
		}
	}
}
