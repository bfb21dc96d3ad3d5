package approval

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"countersign/audit"

	"golang.org/x/crypto/ssh/agent"
)

// story is a log that a test tells, with real signatures.
type story struct {
	t      testing.TB
	events []audit.Event
	now    time.Time
	id     uint64
	needed int
	agents map[string]agent.Agent
	have   map[string]Credential
	people map[string]Operator
	texts  map[uint64]string
}

const testName = "countersign/0011223344556677"

func newStory(t testing.TB) *story {
	return &story{t: t, now: time.Date(2026, 11, 24, 8, 0, 0, 0, time.UTC), needed: 1, agents: map[string]agent.Agent{}, have: map[string]Credential{}, people: map[string]Operator{}, texts: map[uint64]string{}}
}

// person makes somebody with a key of their own.
func (s *story) person(name string, n byte) Credential {
	s.agents[name], s.have[name] = ed25519Person(s.t, n)
	return s.have[name]
}

func (s *story) add(e audit.Event) {
	s.now = s.now.Add(time.Second)
	e.TimeMS, e.Action = s.now.UnixMilli(), "test"
	if e.Outcome == "" {
		e.Outcome = "ok"
	}
	if e.Actor.Kind == "" {
		e.Actor = audit.Daemon()
	}
	s.events = append(s.events, e)
}

func by(name string, proposal uint64) audit.Actor {
	a := audit.Operator(name)
	a.Proposal = proposal
	return a
}

func (s *story) record(o Operator) string { return string(must(json.Marshal(o))) }

// enrol makes the first administrator.
func (s *story) enrol(name string) {
	c := s.have[name]
	c.Added = s.now.Unix()
	s.people[name] = Operator{name, []Role{Administrator, OperatorRole, Auditor, Approver}, []Credential{c}, s.now.Unix()}
	s.add(audit.Event{Type: audit.OperatorEnrolled, Actor: audit.Operator("uid:0"), Resource: name, Metadata: map[string]string{"operator": s.record(s.people[name])}})
}

func (s *story) propose(proposer, act string, parameters ...string) uint64 {
	s.id++
	p := &Proposal{ID: s.id, Appliance: testName, Act: act, Proposer: proposer, Proposed: s.now, Expires: s.now.Add(24 * time.Hour), Needed: s.needed, Nonce: fmt.Sprintf("%032x", s.id)}
	for i := 0; i < len(parameters); i += 2 {
		p.Parameters = append(p.Parameters, Parameter{parameters[i], parameters[i+1]})
	}
	if err := p.Check(); err != nil {
		s.t.Fatal(err)
	}
	s.texts[p.ID] = p.Text()
	s.add(audit.Event{Type: audit.ProposalMade, Actor: audit.Operator(proposer), Resource: resource(p.ID), Metadata: map[string]string{"text": p.Text(), "digest": s.digest(p.ID)}})
	return p.ID
}

func (s *story) digest(id uint64) string {
	d := must(ParseText(s.texts[id])).Digest()
	return hex.EncodeToString(d[:])
}

func (s *story) approve(id uint64, names ...string) {
	for _, name := range names {
		p, err := SignSSH(s.agents[name], s.have[name], ForProposal, s.texts[id])
		if err != nil {
			s.t.Fatal(err)
		}
		s.proof(id, name, p)
	}
}

func (s *story) proof(id uint64, name string, p Proof) {
	s.add(audit.Event{Type: audit.ApprovalGiven, Actor: audit.Operator(name), Resource: resource(id),
		Metadata: map[string]string{"digest": s.digest(id), "credential": p.Credential, "proof": string(must(json.Marshal(p)))}})
}

func (s *story) mark(t audit.Type, id uint64, who audit.Actor, outcome string) {
	s.add(audit.Event{Type: t, Actor: who, Resource: resource(id), Outcome: outcome, Metadata: map[string]string{"digest": s.digest(id)}})
}

func (s *story) run(id uint64)  { s.mark(audit.ProposalRun, id, audit.Daemon(), "ok") }
func (s *story) done(id uint64) { s.mark(audit.ProposalDone, id, audit.Daemon(), "ok") }

// act is a whole proposal, with what it does.
func (s *story) act(approvers []string, e audit.Event, act string, parameters ...string) uint64 {
	id := s.propose("anna", act, parameters...)
	s.approve(id, approvers...)
	s.run(id)
	e.Actor = by("anna", id)
	s.add(e)
	s.done(id)
	return id
}

func joined(roles []Role) string {
	var texts []string
	for _, r := range roles {
		texts = append(texts, string(r))
	}
	return strings.Join(texts, ",")
}

// changed is the event that an operator's record was changed; a record without a name is one that was removed.
func (s *story) changed(name, change string, o Operator) audit.Event {
	e := audit.Event{Type: audit.OperatorChanged, Resource: name, Metadata: map[string]string{"change": change}}
	if o.Name != "" {
		e.Metadata["operator"] = s.record(o)
		s.people[name] = o
	} else {
		delete(s.people, name)
	}
	return e
}

func (s *story) hire(approvers []string, name string, roles ...Role) {
	c := s.have[name]
	stored := c
	stored.Added = s.now.Unix()
	s.act(approvers, s.changed(name, "added", Operator{name, roles, []Credential{stored}, s.now.Unix()}),
		"operator add", "name", name, "roles", joined(roles), "credential", string(must(json.Marshal(c))))
}

func (s *story) setNeeded(approvers []string, n int) {
	s.act(approvers, audit.Event{Type: audit.ApprovalsChanged, Resource: "approvals", Metadata: map[string]string{"needed": strconv.Itoa(n)}}, "approvals needed", "needed", strconv.Itoa(n))
	s.needed = n
}

func (s *story) seq() iter.Seq2[uint64, audit.Event] {
	return func(yield func(uint64, audit.Event) bool) {
		for i, e := range s.events {
			if !yield(uint64(i), e) {
				return
			}
		}
	}
}

// beginning is a log with three operators, two of whom must approve. Anna and bert are approvers, carl is an administrator only.
func beginning(t testing.TB) *story {
	s := newStory(t)
	for i, name := range []string{"anna", "bert", "carl", "dora"} {
		s.person(name, byte(i+1))
	}
	s.add(audit.Event{Type: audit.EpochBegun})
	s.add(policyChanged("aa", audit.Daemon()))
	s.add(audit.Event{Type: audit.PeerAdded, Actor: audit.Operator("uid:0"), Resource: "before", Metadata: map[string]string{"public_key": "00"}})
	s.enrol("anna")
	s.hire([]string{"anna"}, "bert", Approver)
	s.hire([]string{"anna"}, "carl", Administrator, OperatorRole)
	s.setNeeded([]string{"anna"}, 2)
	return s
}

func policyChanged(sha256 string, who audit.Actor) audit.Event {
	return audit.Event{Type: audit.PolicyChanged, Actor: who, Resource: "policy", Metadata: map[string]string{"sha256": sha256}}
}

func with(pairs ...string) map[string]string {
	m := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	return m
}

var both = []string{"anna", "bert"}

// gated are acts with the events that they carry out.
func gated() []struct {
	act        string
	parameters []string
	event      audit.Event
} {
	return []struct {
		act        string
		parameters []string
		event      audit.Event
	}{
		{"peer add", []string{"name", "shop", "public_key", "ab"}, audit.Event{Type: audit.PeerAdded, Resource: "shop", Metadata: with("public_key", "ab")}},
		{"policy activate", []string{"sha256", "bb"}, policyChanged("bb", audit.Actor{})},
		{"key destroy", []string{"key", "payments", "version", "1"}, audit.Event{Type: audit.KeyStateChanged, Resource: "payments/1", Metadata: with("from", "archived", "to", "destroyed")}},
		{"key compromise", []string{"key", "payments", "version", "2", "reason", "lost"}, audit.Event{Type: audit.KeyStateChanged, Resource: "payments/2", Metadata: with("from", "active", "to", "compromised")}},
		{"key presence", []string{"key", "payments", "seconds", "0"}, audit.Event{Type: audit.LineChanged, Resource: "payments", Metadata: with("presence", "0", "presence_lowered", "yes")}},
		{"retention shorten", []string{"audit", "30d"}, audit.Event{Type: audit.RetentionChanged, Metadata: with("shortened", "yes", "audit", "30d")}},
		{"hold release", []string{"epoch", "3", "reason", "court said so"}, audit.Event{Type: audit.LegalHoldReleased, Resource: "epoch/3", Metadata: with("reason", "court said so")}},
		{"rollback accept", []string{"reason", "restored"}, audit.Event{Type: audit.RollbackAccepted, Metadata: with("reason", "restored")}},
		{"clock accept", nil, audit.Event{Type: audit.ClockAccepted}},
		{"approvals needed", []string{"needed", "1"}, audit.Event{Type: audit.ApprovalsChanged, Metadata: with("needed", "1")}},
	}
}

func TestReplay(t *testing.T) {
	s := beginning(t)
	for _, g := range gated()[:9] {
		s.act(both, g.event, g.act, g.parameters...)
	}
	// What does not widen needs no approval.
	s.add(audit.Event{Type: audit.KeyStateChanged, Resource: "payments/3", Metadata: with("from", "active", "to", "verify-only")})
	s.add(audit.Event{Type: audit.LineChanged, Actor: audit.Operator("carl"), Resource: "payments", Metadata: with("presence", "300")})
	s.add(audit.Event{Type: audit.RetentionChanged, Actor: audit.Operator("carl"), Metadata: with("audit", "90d")})
	s.add(policyChanged("bb", audit.Daemon())) // at a start
	// Operators.
	carl := s.people["carl"]
	carl.Roles = []Role{Administrator, Auditor}
	s.act(both, s.changed("carl", "roles", carl), "operator roles", "name", "carl", "roles", "administrator,auditor")
	dora := s.have["dora"]
	carl.Credentials = append(slices.Clone(carl.Credentials), dora)
	carl.Credentials[1].Added = s.now.Unix()
	s.act(both, s.changed("carl", "credential added", carl), "credential add", "name", "carl", "credential", string(must(json.Marshal(dora))))
	carl.Credentials = carl.Credentials[1:]
	s.act(both, s.changed("carl", "credential removed", carl), "credential remove", "name", "carl", "credential", s.have["carl"].ID)
	s.act(both, s.changed("carl", "removed", Operator{}), "operator remove", "name", "carl")
	// A passkey approves too.
	phone := newAuthenticator(t, "ES256")
	s.have["dora"] = phone.enrol(t)
	s.hire(both, "dora", Approver)
	id := s.propose("dora", "peer add", "name", "p", "public_key", "cd")
	s.proof(id, "dora", phone.get(t, s.have["dora"], s.texts[id]))
	s.approve(id, "bert")
	s.run(id)
	s.mark(audit.ProposalDone, id, audit.Daemon(), "failed")
	withdrawn, expired, interrupted, open := s.propose("bert", "clock accept"), s.propose("bert", "clock accept"), s.propose("bert", "key rename", "key", "x"), s.propose("anna", "clock accept")
	s.mark(audit.ProposalWithdrawn, withdrawn, audit.Operator("anna"), "ok")
	s.mark(audit.ProposalExpired, expired, audit.Daemon(), "ok")
	s.approve(interrupted, both...)
	s.run(interrupted)
	s.mark(audit.ProposalDone, interrupted, audit.Daemon(), "interrupted")
	s.approve(open, "anna")

	r, err := Replay(s.seq(), ReplayOptions{Appliance: testName, Trusted: []string{s.have["anna"].ID}})
	if err != nil {
		t.Fatal(err)
	}
	if r.First.Operator.Name != "anna" || r.First.Event != 3 || r.Needed != 2 || len(r.Operators) != 3 || r.Operators[2].Name != "dora" || len(r.Operators[2].Credentials) != 1 {
		t.Errorf("%+v", r)
	}
	states := map[uint64]string{}
	for _, p := range r.Proposals {
		states[p.ID] = p.State
		if p.State == "done" && (len(p.Did) != 1 || len(p.Approvals) < 1 || p.Run.IsZero() || p.Ended.IsZero()) {
			t.Errorf("%+v", p)
		}
	}
	want := map[uint64]string{id: "failed", withdrawn: "withdrawn", expired: "expired", interrupted: "interrupted", open: "open"}
	for id := range states {
		if want[id] == "" {
			want[id] = "done"
		}
	}
	if !maps.Equal(states, want) || len(states) != int(s.id) || !slices.Equal(r.Others, []uint64{interrupted}) {
		t.Errorf("%v, want %v; %v", states, want, r.Others)
	}
	p := r.Proposals[3]
	if p.Act != "peer add" || p.Proposer != "anna" || p.Needed != 2 || len(p.Approvals) != 2 || p.Approvals[1].Operator != "bert" || p.Approvals[1].Credential != s.have["bert"].ID ||
		s.events[p.Approvals[1].Event].Type != audit.ApprovalGiven || s.events[p.Event].Type != audit.ProposalMade || s.events[p.Did[0].Event].Type != audit.PeerAdded {
		t.Errorf("%+v", p)
	}

	if _, err := Replay(maps.All(map[uint64]audit.Event{5: s.events[5]}), ReplayOptions{}); !errors.Is(err, ErrNoRoot) {
		t.Error(err)
	}
	wrongAt(t, "another first administrator", s, 3, ReplayOptions{Trusted: []string{s.have["bert"].ID}})
	wrongAt(t, "another appliance", s, 4, ReplayOptions{Appliance: "countersign/ffff"})
	// Every event is needed: without one of those that matter, the log is wrong, or says less.
	gap := *s
	gap.events = slices.Delete(slices.Clone(s.events), 5, 6)
	if _, err := Replay(gap.seq(), ReplayOptions{}); err == nil {
		t.Error("an approval is missing, and the log is right")
	}
}

// wrongAt demands that a log is wrong at an event.
func wrongAt(t *testing.T, name string, s *story, event uint64, o ReplayOptions) {
	t.Helper()
	_, err := Replay(s.seq(), o)
	wrong, is := errors.AsType[*audit.Wrong](err)
	if !is || wrong.Event != event {
		t.Errorf("%s: %v, want wrong at event %d, %s", name, err, event, s.events[event].Type)
	}
}

// TestReplayLegacy: a log without operators has nothing to approve.
func TestReplayLegacy(t *testing.T) {
	s := newStory(t)
	s.add(audit.Event{Type: audit.EpochBegun})
	for _, g := range gated()[:9] {
		g.event.Actor = audit.Operator("uid:0")
		s.add(g.event)
	}
	if r, err := Replay(s.seq(), ReplayOptions{}); err != nil || r.First != nil || len(r.Proposals) != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	id := uint64(1)
	s.texts[id] = sampleProposal().Text()
	s.add(audit.Event{Type: audit.ProposalMade, Actor: audit.Operator("anna"), Resource: "proposal/7", Metadata: with("text", s.texts[id], "digest", s.digest(id))})
	wrongAt(t, "a proposal of nobody", s, uint64(len(s.events)-1), ReplayOptions{})
}

// TestGates: each event that needs approval is wrong without it, and where the proposal says something else.
func TestGates(t *testing.T) {
	for _, g := range gated() {
		try := func(name string, tell func(s *story)) {
			s := beginning(t)
			tell(s)
			wrongAt(t, g.act+": "+name, s, uint64(len(s.events)-1), ReplayOptions{})
		}
		event := func(who audit.Actor) audit.Event {
			e := g.event
			e.Metadata = maps.Clone(e.Metadata)
			e.Actor = who
			return e
		}
		try("by an operator", func(s *story) { s.add(event(audit.Operator("anna"))) })
		try("by root", func(s *story) { s.add(event(audit.Operator("uid:0"))) })
		try("by the daemon", func(s *story) { s.add(event(audit.Daemon())) })
		try("a proposal that is none", func(s *story) { s.add(event(by("anna", 99))) })
		try("not running", func(s *story) {
			id := s.propose("anna", g.act, g.parameters...)
			s.approve(id, both...)
			s.add(event(by("anna", id)))
		})
		try("done", func(s *story) { s.add(event(by("anna", s.act(both, event(audit.Actor{}), g.act, g.parameters...)))) })
		try("twice", func(s *story) {
			id := s.propose("anna", g.act, g.parameters...)
			s.approve(id, both...)
			s.run(id)
			s.add(event(by("anna", id)))
			s.add(event(by("anna", id)))
		})
		try("by another than the proposer", func(s *story) {
			id := s.propose("anna", g.act, g.parameters...)
			s.approve(id, both...)
			s.run(id)
			s.add(event(by("bert", id)))
		})
		try("another act", func(s *story) {
			other := "peer add"
			if g.act == other {
				other = "operator remove"
			}
			id := s.propose("anna", other, g.parameters...)
			s.approve(id, both...)
			s.run(id)
			s.add(event(by("anna", id)))
		})
		for i := 1; i < len(g.parameters); i += 2 {
			if g.parameters[i-1] == "reason" && g.act == "key compromise" {
				continue // the event says why in its own words
			}
			try("another "+g.parameters[i-1], func(s *story) {
				other := slices.Clone(g.parameters)
				other[i] += "2"
				id := s.propose("anna", g.act, other...)
				s.approve(id, both...)
				s.run(id)
				s.add(event(by("anna", id)))
			})
		}
	}
}

// TestReplayRefuses breaks one rule at a time: the last event of each story is the wrong one.
func TestReplayRefuses(t *testing.T) {
	text := func(s *story, id uint64, old, new string) {
		s.texts[id] = strings.Replace(s.texts[id], old, new, 1)
		if err := second(ParseText(s.texts[id])); err != nil {
			t.Fatal(err)
		}
	}
	last := func(s *story) *audit.Event { return &s.events[len(s.events)-1] }
	proposed := func(s *story) uint64 { return s.propose("anna", "peer add", "name", "shop", "public_key", "ab") }
	// record has anna propose a change of an operator that says one thing, and an event that says another.
	record := func(s *story, e audit.Event, act string, parameters ...string) {
		id := s.propose("anna", act, parameters...)
		s.approve(id, both...)
		s.run(id)
		e.Actor = by("anna", id)
		s.add(e)
	}
	for name, tell := range map[string]func(s *story){
		"enrolled twice":         func(s *story) { s.enrol("dora") },
		"proposal by a stranger": func(s *story) { s.propose("eve", "clock accept") },
		"proposal for another":   func(s *story) { proposed(s); last(s).Actor = audit.Operator("bert") },
		"proposal by a daemon":   func(s *story) { proposed(s); last(s).Actor = audit.Daemon() },
		"proposal id twice":      func(s *story) { proposed(s); s.id--; proposed(s) },
		"proposal resource":      func(s *story) { proposed(s); last(s).Resource = "proposal/99" },
		"proposal digest":        func(s *story) { proposed(s); last(s).Metadata["digest"] = strings.Repeat("0", 64) },
		"proposal form":          func(s *story) { proposed(s); last(s).Metadata["text"] += "\n" },
		"too few needed":         func(s *story) { s.needed = 1; proposed(s) },
		"too many needed":        func(s *story) { s.needed = 3; proposed(s) },
		"no such proposal":       func(s *story) { s.approve(proposed(s), "anna"); last(s).Resource = "proposal/99" },
		"a proposal in another form": func(s *story) {
			id := proposed(s)
			s.approve(id, "anna")
			last(s).Resource = fmt.Sprintf("proposal/0%d", id)
		},
		"approval digest": func(s *story) { s.approve(proposed(s), "anna"); last(s).Metadata["digest"] = strings.Repeat("0", 64) },
		"approval of another text": func(s *story) {
			id := proposed(s)
			was := s.texts[id]
			text(s, id, "shop", "shop2")
			s.approve(id, "anna")
			s.texts[id] = was
			last(s).Metadata["digest"] = s.digest(id)
		},
		"approval by another":     func(s *story) { s.approve(proposed(s), "anna"); last(s).Actor = audit.Operator("bert") },
		"approval by no approver": func(s *story) { s.approve(proposed(s), "carl") },
		"approval by a stranger":  func(s *story) { s.approve(proposed(s), "dora") },
		"approval by a daemon": func(s *story) {
			s.approve(proposed(s), "anna")
			last(s).Actor = audit.Actor{Kind: "daemon", Name: "anna"}
		},
		"approval twice":           func(s *story) { s.approve(proposed(s), "anna", "anna") },
		"approval without a proof": func(s *story) { s.approve(proposed(s), "anna"); delete(last(s).Metadata, "proof") },
		"approval names another":   func(s *story) { s.approve(proposed(s), "anna"); last(s).Metadata["credential"] = s.have["bert"].ID },
		"approval with more in it": func(s *story) {
			s.approve(proposed(s), "anna")
			last(s).Metadata["proof"] = strings.Replace(last(s).Metadata["proof"], "{", `{"x":1,`, 1)
		},
		"approval for a sign-in": func(s *story) {
			id := proposed(s)
			text := ForSignIn + strings.TrimPrefix(s.texts[id], ForProposal)
			s.proof(id, "anna", must(SignSSH(s.agents["anna"], s.have["anna"], ForSignIn, text)))
		},
		"approval too late": func(s *story) { id := proposed(s); s.now = s.now.Add(24 * time.Hour); s.approve(id, "anna") },
		"approval when withdrawn": func(s *story) {
			id := proposed(s)
			s.mark(audit.ProposalWithdrawn, id, audit.Operator("anna"), "ok")
			s.approve(id, "anna")
		},
		"approval when running": func(s *story) {
			id := proposed(s)
			s.approve(id, both...)
			s.run(id)
			s.approve(id, "anna")
		},
		"run without approvals": func(s *story) { s.run(proposed(s)) },
		"run with too few":      func(s *story) { id := proposed(s); s.approve(id, "anna"); s.run(id) },
		"run twice":             func(s *story) { id := proposed(s); s.approve(id, both...); s.run(id); s.run(id) },
		"run again":             func(s *story) { id := proposed(s); s.approve(id, both...); s.run(id); s.done(id); s.run(id) },
		"run after an interruption": func(s *story) {
			id := proposed(s)
			s.approve(id, both...)
			s.run(id)
			s.mark(audit.ProposalDone, id, audit.Daemon(), "interrupted")
			s.run(id)
		},
		"run too late": func(s *story) {
			id := proposed(s)
			s.approve(id, both...)
			s.now = s.now.Add(24 * time.Hour)
			s.run(id)
		},
		"run when expired": func(s *story) {
			id := proposed(s)
			s.approve(id, both...)
			s.mark(audit.ProposalExpired, id, audit.Daemon(), "ok")
			s.run(id)
		},
		"run digest":       func(s *story) { id := proposed(s); s.approve(id, both...); s.run(id); last(s).Metadata["digest"] = "" },
		"done without run": func(s *story) { s.done(proposed(s)) },
		"done twice":       func(s *story) { id := proposed(s); s.approve(id, both...); s.run(id); s.done(id); s.done(id) },
		"done somehow": func(s *story) {
			id := proposed(s)
			s.approve(id, both...)
			s.run(id)
			s.mark(audit.ProposalDone, id, audit.Daemon(), "maybe")
		},
		"expired twice": func(s *story) {
			id := proposed(s)
			s.mark(audit.ProposalExpired, id, audit.Daemon(), "ok")
			s.mark(audit.ProposalExpired, id, audit.Daemon(), "ok")
		},
		"expired, running": func(s *story) {
			id := proposed(s)
			s.approve(id, both...)
			s.run(id)
			s.mark(audit.ProposalExpired, id, audit.Daemon(), "ok")
		},
		"withdrawn, running": func(s *story) {
			id := proposed(s)
			s.approve(id, both...)
			s.run(id)
			s.mark(audit.ProposalWithdrawn, id, audit.Operator("anna"), "ok")
		},
		"withdrawn by another": func(s *story) { s.mark(audit.ProposalWithdrawn, proposed(s), audit.Operator("bert"), "ok") },
		"withdrawn by a daemon": func(s *story) {
			s.mark(audit.ProposalWithdrawn, proposed(s), audit.Actor{Kind: "daemon", Name: "anna"}, "ok")
		},
		"the approver was dismissed": func(s *story) {
			id := proposed(s)
			s.approve(id, both...)
			s.hire(both, "dora", Approver)
			s.act(both, s.changed("bert", "removed", Operator{}), "operator remove", "name", "bert")
			s.run(id)
		},
		"the approver is none any more": func(s *story) {
			id := proposed(s)
			s.approve(id, both...)
			s.hire(both, "dora", Approver)
			bert := s.people["bert"]
			bert.Roles = []Role{Auditor}
			s.act(both, s.changed("bert", "roles", bert), "operator roles", "name", "bert", "roles", "auditor")
			s.run(id)
		},
		"the credential is gone": func(s *story) {
			id := proposed(s)
			s.approve(id, both...)
			bert := s.people["bert"]
			bert.Credentials = append(slices.Clone(bert.Credentials), s.have["dora"])
			s.act(both, s.changed("bert", "credential added", bert), "credential add", "name", "bert", "credential", string(must(json.Marshal(s.have["dora"]))))
			bert.Credentials = bert.Credentials[1:]
			s.act(both, s.changed("bert", "credential removed", bert), "credential remove", "name", "bert", "credential", s.have["bert"].ID)
			s.run(id)
		},
		"more are needed now": func(s *story) {
			id := proposed(s)
			s.approve(id, both...)
			s.hire(both, "dora", Approver)
			s.setNeeded(both, 3)
			s.run(id)
		},
		"more were needed then": func(s *story) {
			id := proposed(s)
			s.approve(id, "anna")
			s.setNeeded(both, 1)
			s.run(id)
		},
		"one key of two people": func(s *story) {
			s.have["dora"], s.agents["dora"] = s.have["anna"], s.agents["anna"]
			s.hire(both, "dora", Approver)
			id := proposed(s)
			s.approve(id, "anna", "dora")
			s.run(id)
		},
		"policy by the daemon": func(s *story) { s.add(policyChanged("bb", audit.Daemon())) },
		"more needed than approvers": func(s *story) {
			record(s, audit.Event{Type: audit.ApprovalsChanged, Metadata: with("needed", "3")}, "approvals needed", "needed", "3")
		},
		"none needed": func(s *story) {
			record(s, audit.Event{Type: audit.ApprovalsChanged, Metadata: with("needed", "0")}, "approvals needed", "needed", "0")
		},
		"an approver too few": func(s *story) {
			record(s, s.changed("bert", "removed", Operator{}), "operator remove", "name", "bert")
		},
		"no administrator": func(s *story) {
			s.act(both, s.changed("carl", "removed", Operator{}), "operator remove", "name", "carl")
			anna := s.people["anna"]
			anna.Roles = []Role{Approver}
			record(s, s.changed("anna", "roles", anna), "operator roles", "name", "anna", "roles", "approver")
		},
		"a change that is none": func(s *story) {
			record(s, s.changed("carl", "renamed", s.people["carl"]), "operator roles", "name", "carl", "roles", "administrator")
		},
		"a record that is none": func(s *story) {
			e := s.changed("carl", "roles", s.people["carl"])
			e.Metadata["operator"] = "{}"
			record(s, e, "operator roles", "name", "carl", "roles", "administrator")
		},
		"a record with more": func(s *story) {
			e := s.changed("carl", "roles", s.people["carl"])
			e.Metadata["operator"] = strings.Replace(e.Metadata["operator"], "{", `{"x":1,`, 1)
			record(s, e, "operator roles", "name", "carl", "roles", "administrator,operator")
		},
		"removed with a record": func(s *story) {
			e := s.changed("carl", "removed", s.people["carl"])
			record(s, e, "operator remove", "name", "carl")
		},
		"other roles": func(s *story) {
			carl := s.people["carl"]
			carl.Roles = []Role{Administrator, Approver}
			record(s, s.changed("carl", "roles", carl), "operator roles", "name", "carl", "roles", "administrator")
		},
		"unknown roles": func(s *story) {
			carl := s.people["carl"]
			carl.Roles = []Role{Administrator, "king"}
			record(s, s.changed("carl", "roles", carl), "operator roles", "name", "carl", "roles", "administrator,king")
		},
		"roles and a credential": func(s *story) {
			carl := s.people["carl"]
			carl.Roles, carl.Credentials = []Role{Administrator}, append(slices.Clone(carl.Credentials), s.have["dora"])
			record(s, s.changed("carl", "roles", carl), "operator roles", "name", "carl", "roles", "administrator")
		},
		"a time that changes": func(s *story) {
			carl := s.people["carl"]
			carl.Roles = []Role{Administrator}
			carl.Added++
			record(s, s.changed("carl", "roles", carl), "operator roles", "name", "carl", "roles", "administrator")
		},
		"another credential": func(s *story) {
			carl := s.people["carl"]
			carl.Credentials = append(slices.Clone(carl.Credentials), s.have["bert"])
			record(s, s.changed("carl", "credential added", carl), "credential add", "name", "carl", "credential", string(must(json.Marshal(s.have["dora"]))))
		},
		"another is removed": func(s *story) {
			carl := s.people["carl"]
			carl.Credentials = append(slices.Clone(carl.Credentials), s.have["dora"])
			s.act(both, s.changed("carl", "credential added", carl), "credential add", "name", "carl", "credential", string(must(json.Marshal(s.have["dora"]))))
			carl.Credentials = carl.Credentials[1:]
			record(s, s.changed("carl", "credential removed", carl), "credential remove", "name", "carl", "credential", s.have["dora"].ID)
		},
		"a credential that is not there": func(s *story) {
			record(s, s.changed("carl", "credential removed", s.people["carl"]), "credential remove", "name", "carl", "credential", s.have["dora"].ID)
		},
		"no credential is left": func(s *story) {
			carl := s.people["carl"]
			carl.Credentials = nil
			record(s, s.changed("carl", "credential removed", carl), "credential remove", "name", "carl", "credential", s.have["carl"].ID)
		},
		"added with other roles": func(s *story) {
			record(s, s.changed("dora", "added", Operator{"dora", Roles(), []Credential{s.have["dora"]}, 1}), "operator add", "name", "dora", "roles", "auditor", "credential", string(must(json.Marshal(s.have["dora"]))))
		},
		"added with another key": func(s *story) {
			record(s, s.changed("dora", "added", Operator{"dora", []Role{Auditor}, []Credential{s.have["bert"]}, 1}), "operator add", "name", "dora", "roles", "auditor", "credential", string(must(json.Marshal(s.have["dora"]))))
		},
		"a credential with a time in the proposal": func(s *story) {
			c := s.have["dora"]
			c.Added = 1
			record(s, s.changed("dora", "added", Operator{"dora", []Role{Auditor}, []Credential{c}, 1}), "operator add", "name", "dora", "roles", "auditor", "credential", string(must(json.Marshal(c))))
		},
		"added where there is one": func(s *story) {
			record(s, s.changed("carl", "added", Operator{"carl", []Role{Administrator}, []Credential{s.have["dora"]}, 1}), "operator add", "name", "carl", "roles", "administrator", "credential", string(must(json.Marshal(s.have["dora"]))))
		},
		"changed where there is none": func(s *story) {
			record(s, s.changed("dora", "roles", Operator{"dora", []Role{Auditor}, []Credential{s.have["dora"]}, 1}), "operator roles", "name", "dora", "roles", "auditor")
		},
		"another's record": func(s *story) {
			e := s.changed("carl", "roles", s.people["carl"])
			e.Metadata["operator"] = s.record(s.people["bert"])
			record(s, e, "operator roles", "name", "carl", "roles", "approver")
		},
	} {
		s := beginning(t)
		tell(s)
		wrongAt(t, name, s, uint64(len(s.events)-1), ReplayOptions{Appliance: testName})
	}
}

// TestEnrolRefuses: the first administrator has a sound record, and can approve what follows.
func TestEnrolRefuses(t *testing.T) {
	for name, change := range map[string]func(*Operator){
		"as it is":         func(*Operator) {},
		"no administrator": func(o *Operator) { o.Roles = []Role{Approver} },
		"no approver":      func(o *Operator) { o.Roles = []Role{Administrator} },
		"roles twice":      func(o *Operator) { o.Roles = append(o.Roles, Approver) },
		"another order":    func(o *Operator) { slices.Reverse(o.Roles) },
		"no credential":    func(o *Operator) { o.Credentials = nil },
		"another name":     func(o *Operator) { o.Name = "bert" },
		"an unsound one":   func(o *Operator) { o.Credentials[0].ID = NewID("x") },
		"one twice":        func(o *Operator) { o.Credentials = append(o.Credentials, o.Credentials[0]) },
	} {
		s := newStory(t)
		s.person("anna", 1)
		s.enrol("anna")
		o := s.people["anna"]
		change(&o)
		s.events[0].Metadata["operator"] = s.record(o)
		if name == "as it is" {
			if _, err := Replay(s.seq(), ReplayOptions{}); err != nil {
				t.Error(err)
			}
			continue
		}
		wrongAt(t, name, s, 0, ReplayOptions{})
	}
}

func TestTrusted(t *testing.T) {
	_, c := ed25519Person(t, 1)
	text := string(must(json.Marshal(c)))
	if ids, err := Trusted([]byte(`["` + c.ID + `", ` + text + `]`)); err != nil || !slices.Equal(ids, []string{c.ID, c.ID}) {
		t.Error(ids, err)
	}
	for _, bad := range []string{"", "[]", "{}", `["x"]`, `[1]`, `[{}]`, text, `["` + c.ID + `"] x`} {
		if ids, err := Trusted([]byte(bad)); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v, %v", bad, ids, err)
		}
	}
}
