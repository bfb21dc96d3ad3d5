package operators

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/manage"
)

// TestActsOnOperators carries out each act on operators by an approved proposal.
func TestActsOnOperators(t *testing.T) {
	r := newRig(t, 1)
	admin := r.people[0]
	bob, key := newSigner(t, "bob"), newSigner(t, "")
	bob.credential.Added = 0
	parameters := func(values ...string) (p []approval.Parameter) {
		for i := 0; i < len(values); i += 2 {
			p = append(p, approval.Parameter{Name: values[i], Value: values[i+1]})
		}
		return p
	}
	spaced := " " + string(manage.Encode(bob.credential)) + " "
	for _, act := range []struct {
		name  string
		p     []approval.Parameter
		holds func() bool // after the act
	}{
		{"operator add", parameters("name", "bob", "roles", "approver,auditor", "credential", spaced), func() bool {
			o, err := r.Operator("bob")
			c, has := o.Credential(bob.credential.ID)
			return err == nil && slices.Equal(o.Roles, []approval.Role{approval.Auditor, approval.Approver}) &&
				has && c.Added > 0 && o.Added > 0
		}},
		{"operator roles", parameters("name", "bob", "roles", "approver,operator"), func() bool {
			o, _ := r.Operator("bob")
			return slices.Equal(o.Roles, []approval.Role{approval.OperatorRole, approval.Approver})
		}},
		{"credential add", parameters("name", "bob", "credential", string(manage.Encode(key.credential))), func() bool {
			o, _ := r.Operator("bob")
			return len(o.Credentials) == 2
		}},
		{"credential remove", parameters("name", "bob", "credential", key.credential.ID), func() bool {
			o, _ := r.Operator("bob")
			_, has := o.Credential(key.credential.ID)
			return len(o.Credentials) == 1 && !has
		}},
		{"approvals needed", parameters("needed", "2"), func() bool { return r.Needed() == 2 }},
		{"approvals needed", parameters("needed", "1"), func() bool { return r.Needed() == 1 }},
		{"operator remove", parameters("name", "bob"), func() bool {
			_, err := r.Operator("bob")
			return err != nil && len(r.Operators()) == 1
		}},
	} {
		s, _ := r.signIn(t, admin, root)
		needed := r.Needed()
		p := r.propose(t, s, act.name, act.p...)
		if act.holds() {
			t.Errorf("%s is carried out without approval", act.name)
		}
		after, err := r.approve(t, admin, p)
		if needed == 2 && err == nil {
			after, err = r.approve(t, bob, p)
		}
		if err != nil || after.State != Done || !act.holds() {
			t.Fatalf("%s: %v, %s %s; the operators are %s",
				act.name, err, after.State, after.Cause, manage.Encode(r.Operators()))
		}
		of := audit.OperatorChanged
		if act.name == "approvals needed" {
			of = audit.ApprovalsChanged
		}
		if _, e := r.events(t, of); e.Actor.Name != "o0" || e.Actor.Proposal != p.ID || e.Action != act.name {
			t.Errorf("%s: the event is %+v", act.name, e)
		}
		state := func() string { return string(manage.Encode(r.roster.people)) + fmt.Sprint(r.Needed()) }
		before := state()
		if r.reopen(t); state() != before {
			t.Errorf("%s: after a restart the operators are others", act.name)
		}
	}
	if report := r.replay(t); len(report.Proposals) != 7 || len(report.Proposals[0].Did) != 1 {
		t.Errorf("by the log there are %d proposals", len(report.Proposals))
	}
}

func TestRosterInvariants(t *testing.T) {
	r := newRig(t, 3)
	r.apply(t, setNeeded, "2")
	free, passkey := newSigner(t, ""), newPasskey(t, "p", 0)
	json := func(c approval.Credential) string { return string(manage.Encode(c)) }
	with := func(change func(*approval.Credential)) string {
		c := passkey.credential
		change(&c)
		return json(c)
	}
	elsewhere := with(func(c *approval.Credential) { c.RPID = "example.org" })
	renamed := with(func(c *approval.Credential) { c.ID = free.credential.ID })
	timed := with(func(c *approval.Credential) { c.Added = 1 })
	unused, taken := json(free.credential), json(r.people[1].credential)
	const rsaKey = `{"id":"","kind":"ssh","public_key":"ssh-rsa AAAA"}`
	otherCase := strings.Replace(json(free.credential), `"id"`, `"ID"`, 1)
	nameTwice := strings.Replace(json(free.credential), "{", `{"kind":"passkey",`, 1)
	unknownField := strings.Replace(json(free.credential), "{", `{"x":1,`, 1)
	for name, c := range map[string]struct {
		m      mutation
		values []string
		is     error
	}{
		"no credential left":           {removeCredential, []string{"o1", r.people[1].credential.ID}, ErrConflict},
		"no administrator":             {setRoles, []string{"o0", "approver"}, ErrConflict},
		"the administrator removed":    {removeOperator, []string{"o0"}, ErrConflict},
		"an administrator who can't":   {removeCredential, []string{"o0", r.people[0].credential.ID}, ErrConflict},
		"needed none":                  {setNeeded, []string{"0"}, ErrConflict},
		"needed more than there are":   {setNeeded, []string{"4"}, ErrConflict},
		"needed less than nothing":     {setNeeded, []string{"-1"}, ErrConflict},
		"needed is no number":          {setNeeded, []string{"two"}, ErrInvalid},
		"needed in another form":       {setNeeded, []string{"+2"}, ErrInvalid},
		"an unknown role":              {setRoles, []string{"o1", "approver,king"}, ErrInvalid},
		"a role twice":                 {setRoles, []string{"o1", "approver,approver"}, ErrInvalid},
		"no role":                      {setRoles, []string{"o1", ""}, ErrInvalid},
		"an operator there is none":    {setRoles, []string{"x", "approver"}, ErrNotFound},
		"to remove whom there is none": {removeOperator, []string{"x"}, ErrNotFound},
		"a credential there is none":   {removeCredential, []string{"o1", r.people[2].credential.ID}, ErrNotFound},
		"a name that is taken":         {r.addOperator, []string{"o1", "approver", json(free.credential)}, ErrExists},
		"a name that is none":          {r.addOperator, []string{"uid:0", "approver", unused}, ErrInvalid},
		"a credential of another":      {r.addOperator, []string{"x", "approver", taken}, ErrExists},
		"a credential twice":           {r.addCredential, []string{"o1", json(r.people[1].credential)}, ErrExists},
		"another's to add":             {r.addCredential, []string{"o1", json(r.people[2].credential)}, ErrExists},
		"a passkey for elsewhere":      {r.addCredential, []string{"o1", elsewhere}, ErrInvalid},
		"another id":                   {r.addCredential, []string{"o1", renamed}, ErrInvalid},
		"a time":                       {r.addCredential, []string{"o1", timed}, ErrInvalid},
		"an unknown field":             {r.addCredential, []string{"o1", unknownField}, ErrInvalid},
		"a name in another case":       {r.addCredential, []string{"o1", otherCase}, ErrInvalid},
		"a name twice":                 {r.addCredential, []string{"o1", nameTwice}, ErrInvalid},
		"two documents":                {r.addCredential, []string{"o1", json(free.credential) + "{}"}, ErrInvalid},
		"no credential":                {r.addCredential, []string{"o1", "{}"}, ErrInvalid},
		"an RSA key":                   {r.addCredential, []string{"o1", rsaKey}, ErrInvalid},
	} {
		before := string(manage.Encode(r.Operators()))
		n, _ := r.events(t, audit.OperatorChanged)
		if err := r.mutate(t, c.m, c.values...); err == nil {
			t.Errorf("%s: it is taken", name)
		} else {
			want(t, err, c.is)
		}
		after, _ := r.events(t, audit.OperatorChanged)
		if after != n || string(manage.Encode(r.Operators())) != before || r.Needed() != 2 {
			t.Errorf("%s: it has changed something", name)
		}
	}
	// A duplicate's refusal names the operator who has the credential.
	for to, of := range map[int]int{1: 2, 2: 1, 0: 0} {
		err := r.mutate(t, r.addCredential, r.people[to].name, json(r.people[of].credential))
		want := fmt.Sprintf("operator %q has it", r.people[of].name)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the credential of o%d for o%d: %v", of, to, err)
		}
	}
	r.apply(t, setRoles, "o2", "auditor") // two approvers are left, and two are needed
	want(t, r.mutate(t, setRoles, "o1", "auditor"), ErrConflict)
	want(t, r.mutate(t, removeOperator, "o1"), ErrConflict)
	want(t, r.mutate(t, removeCredential, "o1", r.people[1].credential.ID), ErrConflict)

	var err error
	n := 1
	for ; err == nil && n < 100; n++ {
		err = r.mutate(t, r.addCredential, "o2", json(newSigner(t, "").credential))
	}
	want(t, err, ErrConflict)
	if o, _ := r.Operator("o2"); len(manage.Encode(o)) >= maxRecord || n < 5 {
		t.Errorf("after %d credentials the operator has %d bytes", n, len(manage.Encode(o)))
	}
	_, e := r.events(t, audit.OperatorChanged)
	if o, _ := r.Operator("o2"); e.Metadata["operator"] != string(manage.Encode(o)) {
		t.Errorf("the event has not all of the operator: %s", e.Metadata["operator"])
	}
	r.reopen(t) // the roster on disk is valid, too
}

// TestLedgerDecides approves two acts at once. Each act alone leaves an administrator, and both
// together leave none: one of the acts must fail, or end with its proposer, who is an administrator
// no more.
func TestLedgerDecides(t *testing.T) {
	r := newRig(t, 3)
	r.apply(t, setRoles, "o1", "administrator,approver")
	s, _ := r.signIn(t, r.people[2], root)
	_, err := r.Propose(t.Context(), s, "operator remove", []approval.Parameter{{Name: "name", Value: "o0"}}, nil, 0)
	want(t, err, ErrNotAllowed) // an approver is no administrator
	s, _ = r.signIn(t, r.people[0], root)
	var both []Proposal
	for _, name := range []string{"o0", "o1"} {
		both = append(both, r.propose(t, s, "operator roles",
			approval.Parameter{Name: "name", Value: name}, approval.Parameter{Name: "roles", Value: "approver"}))
	}
	states := map[State]int{}
	me, _ := r.signIn(t, r.people[2], root)
	all(2, func(i int) {
		_, err := r.Approve(t.Context(), me, both[i].ID, r.people[2].sign(t, both[i].Text()))
		if err != nil && !errors.Is(err, ErrConflict) {
			t.Error(err)
		}
	})
	for _, p := range both {
		p, err := r.Proposal(p.ID)
		if err != nil || p.State != Done && p.Cause == "" {
			t.Errorf("%+v, %v", p, err)
		}
		states[p.State]++
	}
	if states[Done] != 1 || states[Failed]+states[Expired] != 1 {
		t.Errorf("they have ended as %v", states)
	}
}

func TestOwnActsAreChecked(t *testing.T) {
	r := newRig(t, 2)
	s, _ := r.signIn(t, r.people[0], root)
	name, roles := approval.Parameter{Name: "name", Value: "o1"}, approval.Parameter{Name: "roles", Value: "auditor"}
	for what, c := range map[string]struct {
		p       []approval.Parameter
		content string
	}{
		"none":          {nil, ""},
		"one missing":   {[]approval.Parameter{name}, ""},
		"another order": {[]approval.Parameter{roles, name}, ""},
		"one more":      {[]approval.Parameter{name, roles, {Name: "reason", Value: "x"}}, ""},
		"content":       {[]approval.Parameter{name, roles}, "x"},
		"a bad role":    {[]approval.Parameter{name, {Name: "roles", Value: "king"}}, ""},
	} {
		if _, err := r.Propose(t.Context(), s, "operator roles", c.p, []byte(c.content), 0); err == nil {
			t.Errorf("%s: it is proposed", what)
		} else {
			want(t, err, ErrInvalid)
		}
	}
	// An act that would fail now can't be proposed.
	_, err := r.Propose(t.Context(), s, "operator remove", []approval.Parameter{{Name: "name", Value: "o0"}}, nil, 0)
	want(t, err, ErrConflict)
	if len(r.Proposals()) != 0 {
		t.Error("there are proposals")
	}
}
