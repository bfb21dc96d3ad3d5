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

	"golang.org/x/crypto/ssh"
)

// scenario builds a log with valid signatures, event by event.
type scenario struct {
	t       testing.TB
	events  []audit.Event
	now     time.Time
	id      uint64 // of the newest proposal
	needed  int    // approvals
	signers map[string]ssh.Signer
	have    map[string]Credential // of operators, and of people who are not operators yet
	people  map[string]Operator
	texts   map[uint64]string // of proposals, by id
}

const testName = "countersign/0011223344556677"

func newScenario(t testing.TB) *scenario {
	return &scenario{
		t: t, now: time.Date(2026, 11, 24, 8, 0, 0, 0, time.UTC), needed: 1,
		signers: map[string]ssh.Signer{}, have: map[string]Credential{}, people: map[string]Operator{},
		texts: map[uint64]string{},
	}
}

// person makes a key for a person who is not an operator yet.
func (s *scenario) person(name string, n byte) {
	s.signers[name], s.have[name] = ed25519Person(s.t, n)
}

func (s *scenario) add(e audit.Event) {
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

// by is an operator who carries out a proposal.
func by(name string, proposal uint64) audit.Actor {
	a := audit.Operator(name)
	a.Proposal = proposal
	return a
}

func toJSON(v any) string { return string(must(json.Marshal(v))) }

// enrol adds the first administrator.
func (s *scenario) enrol(name string) {
	c := s.have[name]
	c.Added = s.now.Unix()
	roles := []Role{Administrator, OperatorRole, Auditor, Approver}
	s.people[name] = Operator{name, roles, []Credential{c}, s.now.Unix()}
	s.add(audit.Event{
		Type: audit.OperatorEnrolled, Actor: audit.Operator("uid:0"), Resource: name,
		Metadata: with("operator", toJSON(s.people[name])),
	})
}

func (s *scenario) propose(proposer, act string, parameters ...string) uint64 {
	s.id++
	p := &Proposal{
		ID: s.id, Appliance: testName, Act: act, Proposer: proposer,
		Proposed: s.now, Expires: s.now.Add(24 * time.Hour), Needed: s.needed, Nonce: fmt.Sprintf("%032x", s.id),
	}
	for i := 0; i < len(parameters); i += 2 {
		p.Parameters = append(p.Parameters, Parameter{parameters[i], parameters[i+1]})
	}
	if err := p.Check(); err != nil {
		s.t.Fatal(err)
	}
	s.texts[p.ID] = p.Text()
	s.add(audit.Event{
		Type: audit.ProposalMade, Actor: audit.Operator(proposer), Resource: resource(p.ID),
		Metadata: with("text", p.Text(), "digest", s.digest(p.ID)),
	})
	return p.ID
}

func (s *scenario) digest(id uint64) string {
	d := must(ParseText(s.texts[id])).Digest()
	return hex.EncodeToString(d[:])
}

func (s *scenario) approve(id uint64, names ...string) {
	for _, name := range names {
		p, err := signSSH(s.signers[name], s.have[name], ForProposal, s.texts[id])
		if err != nil {
			s.t.Fatal(err)
		}
		s.proof(id, name, p)
	}
}

func (s *scenario) proof(id uint64, name string, p Proof) {
	s.add(audit.Event{
		Type: audit.ApprovalGiven, Actor: audit.Operator(name), Resource: resource(id),
		Metadata: with("digest", s.digest(id), "credential", p.Credential, "proof", toJSON(p)),
	})
}

func (s *scenario) mark(t audit.Type, id uint64, who audit.Actor, outcome string) {
	s.add(audit.Event{
		Type: t, Actor: who, Resource: resource(id), Outcome: outcome, Metadata: with("digest", s.digest(id)),
	})
}

func (s *scenario) run(id uint64)  { s.mark(audit.ProposalRun, id, audit.Daemon(), "ok") }
func (s *scenario) done(id uint64) { s.mark(audit.ProposalDone, id, audit.Daemon(), "ok") }

// carryOut adds a proposal by anna, its approvals, and the event that the proposal permits.
func (s *scenario) carryOut(approvers []string, e audit.Event, act string, parameters ...string) uint64 {
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

// changeOf is the event of a change of an operator. A record without a name stands for a removal.
func changeOf(name, change string, o Operator) audit.Event {
	e := audit.Event{Type: audit.OperatorChanged, Resource: name, Metadata: with("change", change)}
	if o.Name != "" {
		e.Metadata["operator"] = toJSON(o)
	}
	return e
}

// changed is changeOf, and changes the scenario's people, too.
func (s *scenario) changed(name, change string, o Operator) audit.Event {
	if o.Name != "" {
		s.people[name] = o
	} else {
		delete(s.people, name)
	}
	return changeOf(name, change, o)
}

func (s *scenario) addOperator(approvers []string, name string, roles ...Role) {
	c := s.have[name]
	stored := c
	stored.Added = s.now.Unix()
	s.carryOut(approvers, s.changed(name, "added", Operator{name, roles, []Credential{stored}, s.now.Unix()}),
		"operator add", "name", name, "roles", joined(roles), "credential", toJSON(c))
}

func (s *scenario) setNeeded(approvers []string, n int) {
	text := strconv.Itoa(n)
	e := audit.Event{Type: audit.ApprovalsChanged, Resource: "approvals", Metadata: with("needed", text)}
	s.carryOut(approvers, e, "approvals needed", "needed", text)
	s.needed = n
}

func (s *scenario) seq() iter.Seq2[uint64, audit.Event] {
	return func(yield func(uint64, audit.Event) bool) {
		for i, e := range s.events {
			if !yield(uint64(i), e) {
				return
			}
		}
	}
}

// beginning is a log with three operators and a quorum of two: anna and bert are approvers, carl is
// an administrator only. dora has a key and is not an operator.
func beginning(t testing.TB) *scenario {
	s := newScenario(t)
	for i, name := range []string{"anna", "bert", "carl", "dora"} {
		s.person(name, byte(i+1))
	}
	s.add(audit.Event{Type: audit.EpochBegun})
	s.add(policyChanged("aa", audit.Daemon()))
	s.add(audit.Event{
		Type: audit.PeerAdded, Actor: audit.Operator("uid:0"), Resource: "before", Metadata: with("public_key", "00"),
	})
	s.enrol("anna")
	s.addOperator([]string{"anna"}, "bert", Approver)
	s.addOperator([]string{"anna"}, "carl", Administrator, OperatorRole)
	s.setNeeded([]string{"anna"}, 2)
	return s
}

func policyChanged(sha256 string, who audit.Actor) audit.Event {
	return audit.Event{Type: audit.PolicyChanged, Actor: who, Resource: "policy", Metadata: with("sha256", sha256)}
}

func with(pairs ...string) map[string]string {
	m := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	return m
}

var both = []string{"anna", "bert"}

// gatedAct is an act that needs approval, with the event that records the act.
type gatedAct struct {
	act        string
	parameters []string // names and values
	event      audit.Event
	before     func(*scenario) // extends the log first; may be nil
}

// gatedActs returns one case for each act that needs approval, for a log as beginning makes it. The
// first eleven cases change neither the operators nor the number of approvals.
func (s *scenario) gatedActs() []gatedAct {
	destroyed := audit.Event{
		Type: audit.KeyStateChanged, Resource: "payments/1", Metadata: with("from", "archived", "to", "destroyed"),
	}
	compromised := audit.Event{
		Type: audit.KeyStateChanged, Resource: "payments/2", Metadata: with("from", "active", "to", "compromised"),
	}
	archived := audit.Event{
		Type: audit.KeyStateChanged, Resource: "payments/1", Metadata: with("from", "verify-only", "to", "archived"),
	}
	weaker := audit.Event{
		Type: audit.LineChanged, Resource: "payments", Metadata: with("weaker", "grace,acknowledge,presence",
			"settings", `{"grace":1,"acknowledge":["all"]}`),
	}
	shortened := audit.Event{Type: audit.RetentionChanged, Metadata: with("shortened", "yes", "audit", "30d")}
	released := audit.Event{
		Type: audit.LegalHoldReleased, Resource: "epoch/3", Metadata: with("hold", "court", "reason", "court said so"),
	}
	dora := Operator{"dora", []Role{Auditor}, []Credential{s.have["dora"]}, 1}
	auditor, two, one := s.people["carl"], s.people["carl"], s.people["carl"] // carl after a change
	auditor.Roles = []Role{Administrator, Auditor}
	two.Credentials = append(slices.Clone(two.Credentials), s.have["dora"])
	one.Credentials = two.Credentials[1:]
	addSecond := func(s *scenario) {
		s.carryOut(both, changeOf("carl", "credential added", two),
			"credential add", "name", "carl", "credential", toJSON(s.have["dora"]))
	}
	shops := membersDigest("cafe,shop")
	groupMade := []string{"name", "shops", "of", "peers", "sha256", shops, "replaces", "none"}
	groupChanged := audit.Event{
		Type: audit.GroupChanged, Resource: "shops",
		Metadata: with("of", "peers", "members", "cafe,shop", "replaces", "none"),
	}
	return []gatedAct{
		{"peer add", []string{"name", "shop", "public_key", "ab"},
			audit.Event{Type: audit.PeerAdded, Resource: "shop", Metadata: with("public_key", "ab")}, nil},
		{"peer key add", []string{"name", "shop", "public_key", "cd"},
			audit.Event{Type: audit.PeerKeyAdded, Resource: "shop", Metadata: with("public_key", "cd")}, nil},
		{"group set", groupMade, groupChanged, nil},
		{"group remove", []string{"name", "shops", "replaces", shops},
			audit.Event{Type: audit.GroupRemoved, Resource: "shops", Metadata: with("replaces", shops)},
			func(s *scenario) { s.carryOut(both, groupChanged, "group set", groupMade...) }},
		{"policy activate", []string{"sha256", "bb"}, policyChanged("bb", audit.Actor{}), nil},
		{"key destroy", []string{"key", "payments", "version", "1"}, destroyed, nil},
		{"key compromise", []string{"key", "payments", "version", "2", "reason", "lost"}, compromised, nil},
		{"key archive", []string{"key", "payments", "version", "1"}, archived, nil},
		{"key safeguard", []string{"key", "payments", "token", "safe"}, audit.NewRecoveryCommitted(
			audit.Actor{}, "payments/1", 1000000, "", [32]byte{}, audit.KeyFacts{Token: "safe"}), nil},
		{"key recover", []string{"key", "payments", "reason", "it burnt"}, audit.NewKeyRecovered(
			audit.Actor{}, "payments/1000000", "payments/1", "payments/2", "it burnt", nil, time.Time{}), nil},
		{"key set", []string{"key", "payments", "grace", "1", "presence", "0", "acknowledge", "all"}, weaker, nil},
		{"holders set",
			[]string{"number", "1", "needed", "2", "of", "2", "holder_1", "ann age1a", "holder_2", "bob age1b"},
			audit.NewHoldersChanged(audit.Actor{}, 1, 2, []string{"ann age1a", "bob age1b"}), nil},
		{"retention shorten", []string{"audit", "30d"}, shortened, nil},
		{"hold release", []string{"epoch", "3", "name", "court", "reason", "court said so"}, released, nil},
		{"rollback accept", []string{"reason", "restored"},
			audit.Event{Type: audit.RollbackAccepted, Metadata: with("reason", "restored")}, nil},
		{"clock accept", nil, audit.Event{Type: audit.ClockAccepted}, nil},
		{"scraper add", []string{"name", "prometheus", "token_sha256", "ab", "expires", "2027-06-01T00:00:00Z"},
			audit.Event{Type: audit.ScraperAdded, Resource: "prometheus",
				Metadata: with("token_sha256", "ab", "expires", "2027-06-01T00:00:00Z")}, nil},
		{"backup restore", []string{"sha256", "ab", "replaces", "none"},
			audit.Event{Type: audit.BackupRestored, Metadata: with("sha256", "ab", "replaces", "none")}, nil},
		{"factory reset", []string{"machine", "pay-1", "ledger", "12 events", "keys", "main: 4"},
			audit.NewFactoryResetBegun(audit.Actor{}, "pay-1", "12 events", "main: 4"), nil},
		{"machine update", []string{"version", "0.3.0", "from", "0.2.0", "sha256", "ab"},
			audit.NewMachineUpdateBegun(audit.Actor{}, "0.3.0", "0.2.0", "ab", 2), nil},
		{"machine configure", []string{"from", "ab", "sha256", "cd"},
			audit.NewMachineConfigurationBegun(audit.Actor{}, "cd", "ab"), nil},
		{"machine reset", []string{"name", "pay-1"}, audit.NewMachineResetBegun(audit.Actor{}, "pay-1"), nil},
		{"approvals hardware", []string{"required", "no"},
			audit.Event{Type: audit.ApproverKeysChanged, Metadata: with("required", "no")}, nil},
		{"approvals needed", []string{"needed", "1"},
			audit.Event{Type: audit.ApprovalsChanged, Metadata: with("needed", "1")}, nil},
		{"operator add", []string{"name", "dora", "roles", "auditor", "credential", toJSON(s.have["dora"])},
			changeOf("dora", "added", dora), nil},
		{"operator roles", []string{"name", "carl", "roles", "administrator,auditor"},
			changeOf("carl", "roles", auditor), nil},
		{"operator remove", []string{"name", "carl"}, changeOf("carl", "removed", Operator{}), nil},
		{"credential add", []string{"name", "carl", "credential", toJSON(s.have["dora"])},
			changeOf("carl", "credential added", two), nil},
		{"credential remove", []string{"name", "carl", "credential", s.have["carl"].ID},
			changeOf("carl", "credential removed", one), addSecond},
	}
}

// TestReplayOfHolders: the recovery holders of the log are exactly those that were approved.
func TestReplayOfHolders(t *testing.T) {
	approved := []string{"number", "1", "needed", "2", "of", "2", "holder_1", "ann age1a", "holder_2", "bob age1b"}
	for name, e := range map[string]audit.Event{
		"one more":     audit.NewHoldersChanged(audit.Actor{}, 1, 2, []string{"ann age1a", "bob age1b", "eve age1e"}),
		"one less":     audit.NewHoldersChanged(audit.Actor{}, 1, 2, []string{"ann age1a"}),
		"another":      audit.NewHoldersChanged(audit.Actor{}, 1, 2, []string{"ann age1a", "bob age1e"}),
		"fewer needed": audit.NewHoldersChanged(audit.Actor{}, 1, 1, []string{"ann age1a", "bob age1b"}),
		"none":         {Type: audit.HoldersChanged, Metadata: with("number", "1", "needed", "2", "of", "2")},
	} {
		s := beginning(t)
		s.carryOut(both, e, "holders set", approved...)
		if _, err := Replay(s.seq(), ReplayOptions{}); err == nil {
			t.Errorf("%s: the log is believed", name)
		}
	}
}

// TestReplayOfGroups: the log says who is in which group. A change that replaces other members than
// the group has, or other members than were approved, is no valid log.
func TestReplayOfGroups(t *testing.T) {
	set := func(members, replaces string) audit.Event {
		return audit.Event{Type: audit.GroupChanged, Resource: "shops",
			Metadata: map[string]string{"of": "peers", "members": members, "replaces": replaces}}
	}
	parameters := func(members, replaces string) []string {
		return []string{"name", "shops", "of", "peers", "sha256", membersDigest(members), "replaces", replaces}
	}
	removal := audit.Event{Type: audit.GroupRemoved, Resource: "shops",
		Metadata: map[string]string{"replaces": membersDigest("cafe,shop")}}
	before := membersDigest("cafe,shop")
	for name, c := range map[string]struct {
		event      audit.Event
		act        string
		parameters []string
		want       string // the members after the last event, or the reason of the refusal
	}{
		"as approved":      {set("bar", before), "group set", parameters("bar", before), "bar"},
		"other members":    {set("bar,eve", before), "group set", parameters("bar", before), "its sha256 is"},
		"of other members": {set("bar", "ab"), "group set", parameters("bar", "ab"), "it replaces members"},
		"as a new group":   {set("bar", "none"), "group set", parameters("bar", "none"), "it replaces members"},
		"not in order":     {set("shop,bar", before), "group set", parameters("shop,bar", before), "not in order"},
		"no members":       {set("", before), "group set", parameters("", before), "not in order"},
		"removed":          {removal, "group remove", []string{"name", "shops", "replaces", before}, ""},
		"by another act":   {removal, "clock accept", nil, "it is group remove"},
		"another group":    {removal, "group remove", []string{"name", "others", "replaces", before}, "its name is"},
	} {
		s := beginning(t)
		s.carryOut(both, set("cafe,shop", "none"), "group set", parameters("cafe,shop", "none")...)
		s.carryOut(both, c.event, c.act, c.parameters...)
		r, err := Replay(s.seq(), ReplayOptions{})
		got := ""
		if err != nil {
			got = err.Error()
		} else if len(r.Groups) == 1 {
			got = strings.Join(r.Groups[0].Members, ",")
		}
		if err != nil && !strings.Contains(got, c.want) || err == nil && got != c.want || err != nil && c.want == "" {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// TestEveryActHasACase fails for an act in the table gates that gatedActs does not have. TestGates
// then checks the cases.
func TestEveryActHasACase(t *testing.T) {
	var cases []string
	for _, g := range beginning(t).gatedActs() {
		cases = append(cases, g.act)
	}
	slices.Sort(cases)
	if !slices.Equal(cases, Acts()) {
		t.Errorf("there are cases for %q, want %q", cases, Acts())
	}
}

func TestReplay(t *testing.T) {
	s := beginning(t)
	for _, g := range s.gatedActs()[:23] {
		s.carryOut(both, g.event, g.act, g.parameters...)
	}
	// Acts that do not widen a permission need no approval.
	s.add(audit.Event{
		Type: audit.KeyStateChanged, Resource: "payments/3", Metadata: with("from", "active", "to", "verify-only"),
	})
	s.add(audit.Event{
		Type: audit.KeyStateChanged, Resource: "payments/3", Metadata: with("from", "verify-only", "to", "archived"),
	})
	s.add(audit.Event{
		Type: audit.LineChanged, Actor: audit.Operator("carl"), Resource: "payments", Metadata: with("presence", "300"),
	})
	s.add(audit.Event{Type: audit.RetentionChanged, Actor: audit.Operator("carl"), Metadata: with("audit", "90d")})
	s.add(policyChanged("bb", audit.Daemon())) // at a start
	// Changes of operators.
	carl := s.people["carl"]
	carl.Roles = []Role{Administrator, Auditor}
	s.carryOut(both, s.changed("carl", "roles", carl),
		"operator roles", "name", "carl", "roles", "administrator,auditor")
	dora := s.have["dora"]
	carl.Credentials = append(slices.Clone(carl.Credentials), dora)
	carl.Credentials[1].Added = s.now.Unix()
	s.carryOut(both, s.changed("carl", "credential added", carl),
		"credential add", "name", "carl", "credential", toJSON(dora))
	carl.Credentials = carl.Credentials[1:]
	s.carryOut(both, s.changed("carl", "credential removed", carl),
		"credential remove", "name", "carl", "credential", s.have["carl"].ID)
	s.carryOut(both, s.changed("carl", "removed", Operator{}), "operator remove", "name", "carl")
	// A passkey approves, too.
	phone := newAuthenticator(t, "ES256")
	s.have["dora"] = phone.enrol(t)
	s.addOperator(both, "dora", Approver)
	id := s.propose("anna", "peer add", "name", "p", "public_key", "cd")
	s.proof(id, "dora", phone.get(t, s.have["dora"], s.texts[id]))
	s.approve(id, "bert")
	s.run(id)
	s.mark(audit.ProposalDone, id, audit.Daemon(), "failed")
	withdrawn, expired := s.propose("anna", "clock accept"), s.propose("anna", "clock accept")
	interrupted, open := s.propose("bert", "key rename", "key", "x"), s.propose("anna", "clock accept")
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
	if r.First.Operator.Name != "anna" || r.First.Event != 3 || r.Needed != 2 || len(r.Operators) != 3 ||
		r.Operators[2].Name != "dora" || len(r.Operators[2].Credentials) != 1 {
		t.Errorf("%+v", r)
	}
	states, acts := map[uint64]string{}, map[string]bool{}
	for _, p := range r.Proposals {
		states[p.ID] = p.State
		if p.State != "done" {
			continue
		}
		acts[p.Act] = true
		if len(p.Did) != 1 || len(p.Approvals) < 1 || p.Run.IsZero() || p.Ended.IsZero() {
			t.Errorf("%+v", p)
		}
	}
	if all := slices.Sorted(maps.Keys(acts)); !slices.Equal(all, Acts()) {
		t.Errorf("the log has the acts %q, want %q", all, Acts())
	}
	want := map[uint64]string{
		id: "failed", withdrawn: "withdrawn", expired: "expired", interrupted: "interrupted", open: "open",
	}
	for id := range states {
		if want[id] == "" {
			want[id] = "done"
		}
	}
	if !maps.Equal(states, want) || len(states) != int(s.id) || !slices.Equal(r.Others, []uint64{interrupted}) {
		t.Errorf("%v, want %v; %v", states, want, r.Others)
	}
	p := r.Proposals[3]
	if p.Act != "peer add" || p.Proposer != "anna" || p.Needed != 2 || len(p.Approvals) != 2 ||
		p.Approvals[1].Operator != "bert" || p.Approvals[1].Credential != s.have["bert"].ID ||
		s.events[p.Approvals[1].Event].Type != audit.ApprovalGiven || s.events[p.Event].Type != audit.ProposalMade ||
		s.events[p.Did[0].Event].Type != audit.PeerAdded {
		t.Errorf("%+v", p)
	}

	if _, err := Replay(maps.All(map[uint64]audit.Event{5: s.events[5]}), ReplayOptions{}); !errors.Is(err, ErrNoRoot) {
		t.Error(err)
	}
	wrongAt(t, "another first administrator", s, 3, ReplayOptions{Trusted: []string{s.have["bert"].ID}})
	wrongAt(t, "another appliance", s, 4, ReplayOptions{Appliance: "countersign/ffff"})
	// A log without an approval is wrong.
	gap := *s
	gap.events = slices.Delete(slices.Clone(s.events), 5, 6)
	if _, err := Replay(gap.seq(), ReplayOptions{}); err == nil {
		t.Error("an approval is missing, and the log is right")
	}
}

// wrongAt demands that a log is wrong at an event.
func wrongAt(t *testing.T, name string, s *scenario, event uint64, o ReplayOptions) {
	t.Helper()
	_, err := Replay(s.seq(), o)
	wrong, is := errors.AsType[*audit.Wrong](err)
	if !is || wrong.Event != event {
		t.Errorf("%s: %v, want wrong at event %d, %s", name, err, event, s.events[event].Type)
	}
}

// TestReplayLegacy checks that a log without operators needs no approvals.
func TestReplayLegacy(t *testing.T) {
	s := newScenario(t)
	s.add(audit.Event{Type: audit.EpochBegun})
	for _, g := range beginning(t).gatedActs()[:9] {
		g.event.Actor = audit.Operator("uid:0")
		s.add(g.event)
	}
	if r, err := Replay(s.seq(), ReplayOptions{}); err != nil || r.First != nil || len(r.Proposals) != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	id := uint64(1)
	s.texts[id] = sampleProposal().Text()
	s.add(audit.Event{
		Type: audit.ProposalMade, Actor: audit.Operator("anna"), Resource: "proposal/7",
		Metadata: with("text", s.texts[id], "digest", s.digest(id)),
	})
	wrongAt(t, "a proposal of nobody", s, uint64(len(s.events)-1), ReplayOptions{})
}

// TestGates checks that each event that needs approval is wrong without a proposal, and wrong with
// a proposal for another act or with another value.
func TestGates(t *testing.T) {
	for i, g := range beginning(t).gatedActs() {
		try := func(name string, extend func(s *scenario)) {
			s := beginning(t)
			g = s.gatedActs()[i]
			if g.before != nil {
				g.before(s)
			}
			extend(s)
			wrongAt(t, g.act+": "+name, s, uint64(len(s.events)-1), ReplayOptions{})
		}
		event := func(who audit.Actor) audit.Event {
			e := g.event
			e.Metadata = maps.Clone(e.Metadata)
			e.Actor = who
			return e
		}
		// running adds an approved proposal that is being carried out.
		running := func(s *scenario, act string, parameters []string) uint64 {
			id := s.propose("anna", act, parameters...)
			s.approve(id, both...)
			s.run(id)
			return id
		}
		try("by an operator", func(s *scenario) { s.add(event(audit.Operator("anna"))) })
		try("by root", func(s *scenario) { s.add(event(audit.Operator("uid:0"))) })
		if g.act != ActKeyArchive { // the daemon archives at the end of the grace time
			try("by the daemon", func(s *scenario) { s.add(event(audit.Daemon())) })
		}
		try("a proposal that is none", func(s *scenario) { s.add(event(by("anna", 99))) })
		try("not running", func(s *scenario) {
			id := s.propose("anna", g.act, g.parameters...)
			s.approve(id, both...)
			s.add(event(by("anna", id)))
		})
		try("done", func(s *scenario) {
			id := s.carryOut(both, event(audit.Actor{}), g.act, g.parameters...)
			s.add(event(by("anna", id)))
		})
		try("twice", func(s *scenario) {
			id := running(s, g.act, g.parameters)
			s.add(event(by("anna", id)))
			s.add(event(by("anna", id)))
		})
		try("by another than the proposer", func(s *scenario) {
			id := running(s, g.act, g.parameters)
			s.add(event(by("bert", id)))
		})
		try("another act", func(s *scenario) {
			other := "peer add"
			if g.act == other {
				other = "operator remove"
			}
			s.add(event(by("anna", running(s, other, g.parameters))))
		})
		for at := 1; at < len(g.parameters); at += 2 {
			if g.parameters[at-1] == "reason" && g.act == "key compromise" {
				continue // the event has a reason of its own
			}
			try("another "+g.parameters[at-1], func(s *scenario) {
				other := slices.Clone(g.parameters)
				other[at] += "2"
				s.add(event(by("anna", running(s, g.act, other))))
			})
		}
	}
}

// TestReplayRefuses breaks one rule at a time: the last event of each log is the wrong one.
func TestReplayRefuses(t *testing.T) {
	text := func(s *scenario, id uint64, old, new string) {
		s.texts[id] = strings.Replace(s.texts[id], old, new, 1)
		if err := second(ParseText(s.texts[id])); err != nil {
			t.Fatal(err)
		}
	}
	last := func(s *scenario) *audit.Event { return &s.events[len(s.events)-1] }
	proposed := func(s *scenario) uint64 { return s.propose("anna", "peer add", "name", "shop", "public_key", "ab") }
	approved := func(s *scenario) uint64 { id := proposed(s); s.approve(id, both...); return id }
	running := func(s *scenario) uint64 { id := approved(s); s.run(id); return id }
	zeros := strings.Repeat("0", 64)
	// approval adds a proposal with the approval of anna, and returns the event of the approval.
	approval := func(s *scenario) *audit.Event { s.approve(proposed(s), "anna"); return last(s) }
	// change adds a proposal of anna for one change of an operator, and an event with another
	// change.
	change := func(s *scenario, e audit.Event, act string, parameters ...string) {
		id := s.propose("anna", act, parameters...)
		s.approve(id, both...)
		s.run(id)
		e.Actor = by("anna", id)
		s.add(e)
	}
	for name, extend := range map[string]func(s *scenario){
		"enrolled twice":         func(s *scenario) { s.enrol("dora") },
		"proposal by a stranger": func(s *scenario) { s.propose("eve", "clock accept") },
		"proposal for another":   func(s *scenario) { proposed(s); last(s).Actor = audit.Operator("bert") },
		"proposal by a daemon":   func(s *scenario) { proposed(s); last(s).Actor = audit.Daemon() },
		"proposal id twice":      func(s *scenario) { proposed(s); s.id--; proposed(s) },
		"proposal resource":      func(s *scenario) { proposed(s); last(s).Resource = "proposal/99" },
		"proposal digest":        func(s *scenario) { proposed(s); last(s).Metadata["digest"] = zeros },
		"proposal form":          func(s *scenario) { proposed(s); last(s).Metadata["text"] += "\n" },
		"too few needed":         func(s *scenario) { s.needed = 1; proposed(s) },
		"too many needed":        func(s *scenario) { s.needed = 3; proposed(s) },
		"no such proposal":       func(s *scenario) { approval(s).Resource = "proposal/99" },
		"a proposal in another form": func(s *scenario) {
			id := proposed(s)
			s.approve(id, "anna")
			last(s).Resource = fmt.Sprintf("proposal/0%d", id)
		},
		"approval digest": func(s *scenario) { approval(s).Metadata["digest"] = zeros },
		"approval of another text": func(s *scenario) {
			id := proposed(s)
			was := s.texts[id]
			text(s, id, "shop", "shop2")
			s.approve(id, "anna")
			s.texts[id] = was
			last(s).Metadata["digest"] = s.digest(id)
		},
		"approval by another":     func(s *scenario) { approval(s).Actor = audit.Operator("bert") },
		"approval by no approver": func(s *scenario) { s.approve(proposed(s), "carl") },
		"approval by a stranger":  func(s *scenario) { s.approve(proposed(s), "dora") },
		"approval by a daemon": func(s *scenario) {
			approval(s).Actor = audit.Actor{Kind: "daemon", Name: "anna"}
		},
		"approval twice":           func(s *scenario) { s.approve(proposed(s), "anna", "anna") },
		"approval without a proof": func(s *scenario) { delete(approval(s).Metadata, "proof") },
		"approval names another":   func(s *scenario) { approval(s).Metadata["credential"] = s.have["bert"].ID },
		"approval with more in it": func(s *scenario) {
			e := approval(s)
			e.Metadata["proof"] = strings.Replace(e.Metadata["proof"], "{", `{"x":1,`, 1)
		},
		"approval for a sign-in": func(s *scenario) {
			id := proposed(s)
			text := ForSignIn + strings.TrimPrefix(s.texts[id], ForProposal)
			s.proof(id, "anna", must(signSSH(s.signers["anna"], s.have["anna"], ForSignIn, text)))
		},
		"approval too late": func(s *scenario) {
			id := proposed(s)
			s.now = s.now.Add(24 * time.Hour)
			s.approve(id, "anna")
		},
		"approval when withdrawn": func(s *scenario) {
			id := proposed(s)
			s.mark(audit.ProposalWithdrawn, id, audit.Operator("anna"), "ok")
			s.approve(id, "anna")
		},
		"approval when running": func(s *scenario) {
			id := running(s)
			s.approve(id, "anna")
		},
		"run without approvals": func(s *scenario) { s.run(proposed(s)) },
		"run with too few":      func(s *scenario) { id := proposed(s); s.approve(id, "anna"); s.run(id) },
		"run twice":             func(s *scenario) { id := running(s); s.run(id) },
		"run again":             func(s *scenario) { id := running(s); s.done(id); s.run(id) },
		"run after an interruption": func(s *scenario) {
			id := running(s)
			s.mark(audit.ProposalDone, id, audit.Daemon(), "interrupted")
			s.run(id)
		},
		"run too late": func(s *scenario) {
			id := approved(s)
			s.now = s.now.Add(24 * time.Hour)
			s.run(id)
		},
		"run when expired": func(s *scenario) {
			id := approved(s)
			s.mark(audit.ProposalExpired, id, audit.Daemon(), "ok")
			s.run(id)
		},
		"run digest":       func(s *scenario) { running(s); last(s).Metadata["digest"] = "" },
		"done without run": func(s *scenario) { s.done(proposed(s)) },
		"done twice":       func(s *scenario) { id := running(s); s.done(id); s.done(id) },
		"done somehow": func(s *scenario) {
			id := running(s)
			s.mark(audit.ProposalDone, id, audit.Daemon(), "maybe")
		},
		"expired twice": func(s *scenario) {
			id := proposed(s)
			s.mark(audit.ProposalExpired, id, audit.Daemon(), "ok")
			s.mark(audit.ProposalExpired, id, audit.Daemon(), "ok")
		},
		"expired, running": func(s *scenario) {
			id := running(s)
			s.mark(audit.ProposalExpired, id, audit.Daemon(), "ok")
		},
		"withdrawn, running": func(s *scenario) {
			id := running(s)
			s.mark(audit.ProposalWithdrawn, id, audit.Operator("anna"), "ok")
		},
		"withdrawn by another": func(s *scenario) {
			s.mark(audit.ProposalWithdrawn, proposed(s), audit.Operator("bert"), "ok")
		},
		"withdrawn by a daemon": func(s *scenario) {
			s.mark(audit.ProposalWithdrawn, proposed(s), audit.Actor{Kind: "daemon", Name: "anna"}, "ok")
		},
		"the approver was dismissed": func(s *scenario) {
			id := approved(s)
			s.addOperator(both, "dora", Approver)
			s.carryOut(both, s.changed("bert", "removed", Operator{}), "operator remove", "name", "bert")
			s.run(id)
		},
		"the approver is none any more": func(s *scenario) {
			id := approved(s)
			s.addOperator(both, "dora", Approver)
			bert := s.people["bert"]
			bert.Roles = []Role{Auditor}
			s.carryOut(both, s.changed("bert", "roles", bert), "operator roles", "name", "bert", "roles", "auditor")
			s.run(id)
		},
		"the credential is gone": func(s *scenario) {
			id := approved(s)
			bert := s.people["bert"]
			bert.Credentials = append(slices.Clone(bert.Credentials), s.have["dora"])
			s.carryOut(both, s.changed("bert", "credential added", bert),
				"credential add", "name", "bert", "credential", toJSON(s.have["dora"]))
			bert.Credentials = bert.Credentials[1:]
			s.carryOut(both, s.changed("bert", "credential removed", bert),
				"credential remove", "name", "bert", "credential", s.have["bert"].ID)
			s.run(id)
		},
		"proposed without its role": func(s *scenario) { s.propose("bert", "clock accept") },
		"the proposer was removed": func(s *scenario) {
			id := s.propose("carl", "clock accept")
			s.approve(id, both...)
			s.carryOut(both, s.changed("carl", "removed", Operator{}), "operator remove", "name", "carl")
			s.run(id)
		},
		"the proposer has lost the role": func(s *scenario) {
			id := s.propose("carl", "clock accept")
			s.approve(id, both...)
			carl := s.people["carl"]
			carl.Roles = []Role{OperatorRole}
			s.carryOut(both, s.changed("carl", "roles", carl), "operator roles", "name", "carl", "roles", "operator")
			s.run(id)
		},
		"more are needed now": func(s *scenario) {
			id := approved(s)
			s.addOperator(both, "dora", Approver)
			s.setNeeded(both, 3)
			s.run(id)
		},
		"more were needed then": func(s *scenario) {
			id := proposed(s)
			s.approve(id, "anna")
			s.setNeeded(both, 1)
			s.run(id)
		},
		"one key of two people": func(s *scenario) {
			s.have["dora"], s.signers["dora"] = s.have["anna"], s.signers["anna"]
			s.addOperator(both, "dora", Approver)
			id := proposed(s)
			s.approve(id, "anna", "dora")
			s.run(id)
		},
		"policy by the daemon": func(s *scenario) { s.add(policyChanged("bb", audit.Daemon())) },
		"more needed than approvers": func(s *scenario) {
			change(s, audit.Event{Type: audit.ApprovalsChanged, Metadata: with("needed", "3")},
				"approvals needed", "needed", "3")
		},
		"hardware keys, perhaps": func(s *scenario) {
			change(s, audit.Event{Type: audit.ApproverKeysChanged, Metadata: with("required", "perhaps")},
				"approvals hardware", "required", "perhaps")
		},
		"none needed": func(s *scenario) {
			change(s, audit.Event{Type: audit.ApprovalsChanged, Metadata: with("needed", "0")},
				"approvals needed", "needed", "0")
		},
		"an approver too few": func(s *scenario) {
			change(s, s.changed("bert", "removed", Operator{}), "operator remove", "name", "bert")
		},
		"no administrator": func(s *scenario) {
			s.carryOut(both, s.changed("carl", "removed", Operator{}), "operator remove", "name", "carl")
			anna := s.people["anna"]
			anna.Roles = []Role{Approver}
			change(s, s.changed("anna", "roles", anna), "operator roles", "name", "anna", "roles", "approver")
		},
		"a change that is none": func(s *scenario) {
			change(s, s.changed("carl", "renamed", s.people["carl"]),
				"operator roles", "name", "carl", "roles", "administrator")
		},
		"a record that is none": func(s *scenario) {
			e := s.changed("carl", "roles", s.people["carl"])
			e.Metadata["operator"] = "{}"
			change(s, e, "operator roles", "name", "carl", "roles", "administrator")
		},
		"a record with more": func(s *scenario) {
			e := s.changed("carl", "roles", s.people["carl"])
			e.Metadata["operator"] = strings.Replace(e.Metadata["operator"], "{", `{"x":1,`, 1)
			change(s, e, "operator roles", "name", "carl", "roles", "administrator,operator")
		},
		"removed with a record": func(s *scenario) {
			e := s.changed("carl", "removed", s.people["carl"])
			change(s, e, "operator remove", "name", "carl")
		},
		"other roles": func(s *scenario) {
			carl := s.people["carl"]
			carl.Roles = []Role{Administrator, Approver}
			change(s, s.changed("carl", "roles", carl), "operator roles", "name", "carl", "roles", "administrator")
		},
		"unknown roles": func(s *scenario) {
			carl := s.people["carl"]
			carl.Roles = []Role{Administrator, "king"}
			change(s, s.changed("carl", "roles", carl), "operator roles", "name", "carl", "roles", "administrator,king")
		},
		"roles and a credential": func(s *scenario) {
			carl := s.people["carl"]
			carl.Roles, carl.Credentials = []Role{Administrator}, append(slices.Clone(carl.Credentials), s.have["dora"])
			change(s, s.changed("carl", "roles", carl), "operator roles", "name", "carl", "roles", "administrator")
		},
		"a time that changes": func(s *scenario) {
			carl := s.people["carl"]
			carl.Roles = []Role{Administrator}
			carl.Added++
			change(s, s.changed("carl", "roles", carl), "operator roles", "name", "carl", "roles", "administrator")
		},
		"another credential": func(s *scenario) {
			carl := s.people["carl"]
			carl.Credentials = append(slices.Clone(carl.Credentials), s.have["bert"])
			change(s, s.changed("carl", "credential added", carl),
				"credential add", "name", "carl", "credential", toJSON(s.have["dora"]))
		},
		"another is removed": func(s *scenario) {
			carl := s.people["carl"]
			carl.Credentials = append(slices.Clone(carl.Credentials), s.have["dora"])
			s.carryOut(both, s.changed("carl", "credential added", carl),
				"credential add", "name", "carl", "credential", toJSON(s.have["dora"]))
			carl.Credentials = carl.Credentials[1:]
			change(s, s.changed("carl", "credential removed", carl),
				"credential remove", "name", "carl", "credential", s.have["dora"].ID)
		},
		"a credential that is not there": func(s *scenario) {
			change(s, s.changed("carl", "credential removed", s.people["carl"]),
				"credential remove", "name", "carl", "credential", s.have["dora"].ID)
		},
		"no credential is left": func(s *scenario) {
			carl := s.people["carl"]
			carl.Credentials = nil
			change(s, s.changed("carl", "credential removed", carl),
				"credential remove", "name", "carl", "credential", s.have["carl"].ID)
		},
		"added with other roles": func(s *scenario) {
			change(s, s.changed("dora", "added", Operator{"dora", Roles(), []Credential{s.have["dora"]}, 1}),
				"operator add", "name", "dora", "roles", "auditor", "credential", toJSON(s.have["dora"]))
		},
		"added with another key": func(s *scenario) {
			change(s, s.changed("dora", "added", Operator{"dora", []Role{Auditor}, []Credential{s.have["bert"]}, 1}),
				"operator add", "name", "dora", "roles", "auditor", "credential", toJSON(s.have["dora"]))
		},
		"a credential with a time in the proposal": func(s *scenario) {
			c := s.have["dora"]
			c.Added = 1
			change(s, s.changed("dora", "added", Operator{"dora", []Role{Auditor}, []Credential{c}, 1}),
				"operator add", "name", "dora", "roles", "auditor", "credential", toJSON(c))
		},
		"added where there is one": func(s *scenario) {
			carl := Operator{"carl", []Role{Administrator}, []Credential{s.have["dora"]}, 1}
			change(s, s.changed("carl", "added", carl),
				"operator add", "name", "carl", "roles", "administrator", "credential", toJSON(s.have["dora"]))
		},
		"changed where there is none": func(s *scenario) {
			change(s, s.changed("dora", "roles", Operator{"dora", []Role{Auditor}, []Credential{s.have["dora"]}, 1}),
				"operator roles", "name", "dora", "roles", "auditor")
		},
		"another's record": func(s *scenario) {
			e := s.changed("carl", "roles", s.people["carl"])
			e.Metadata["operator"] = toJSON(s.people["bert"])
			change(s, e, "operator roles", "name", "carl", "roles", "approver")
		},
	} {
		s := beginning(t)
		extend(s)
		wrongAt(t, name, s, uint64(len(s.events)-1), ReplayOptions{Appliance: testName})
	}
}

// TestEnrolRefuses checks that the first administrator has a valid record, and can approve
// proposals.
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
		s := newScenario(t)
		s.person("anna", 1)
		s.enrol("anna")
		o := s.people["anna"]
		change(&o)
		s.events[0].Metadata["operator"] = toJSON(o)
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
	text := toJSON(c)
	ids, err := Trusted([]byte(`["` + c.ID + `", ` + text + `]`))
	if err != nil || !slices.Equal(ids, []string{c.ID, c.ID}) {
		t.Error(ids, err)
	}
	for _, bad := range []string{"", "[]", "{}", `["x"]`, `[1]`, `[{}]`, text, `["` + c.ID + `"] x`} {
		if ids, err := Trusted([]byte(bad)); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v, %v", bad, ids, err)
		}
	}
}
