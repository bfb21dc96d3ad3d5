package approval

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/audit"

	strict "github.com/go-json-experiment/json"
)

// Report is the result of a valid log: the operators, the proposals and their approvals.
type Report struct {
	First     *Enrolment         `json:"first,omitempty"` // nil: there are no operators, and no act needs approval
	Needed    int                `json:"needed"`          // approvals, after the last event
	Hardware  bool               `json:"hardware"`        // approvals must be by hardware keys, after the last event
	Operators []Operator         `json:"operators"`       // after the last event, by name
	Groups    []Group            `json:"groups"`          // after the last event, by name
	Proposals []*ProposalHistory `json:"proposals"`       // in the order of the events ProposalMade
	// Others are the ids of proposals for acts that this program does not know. Such a proposal
	// permits no known act either.
	Others []uint64 `json:"others,omitempty"`
}

// Group is a group of peers or of keys.
type Group struct {
	Name    string   `json:"name"`
	Of      string   `json:"of"` // peers or keys
	Members []string `json:"members"`
	Event   uint64   `json:"event"` // the change to these members
}

// Enrolment is the enrolment of the first administrator, the root of trust: the enrolment needs no
// approval, and the first administrator approves the next ones.
type Enrolment struct {
	Event    uint64    `json:"event"`
	Time     time.Time `json:"time"`
	Operator Operator  `json:"operator"`
}

// ProposalHistory is a proposal with its approvals and its outcome.
type ProposalHistory struct {
	ID         uint64      `json:"id"`
	Act        string      `json:"act"`
	Parameters []Parameter `json:"parameters"`
	Proposer   string      `json:"proposer"`
	Proposed   time.Time   `json:"proposed"`
	Expires    time.Time   `json:"expires"`
	Needed     int         `json:"needed"`
	Event      uint64      `json:"event"`
	Approvals  []Approval  `json:"approvals"`
	State      string      `json:"state"`           // open, running, done, failed, interrupted, withdrawn, expired
	Run        time.Time   `json:"run,omitzero"`    // the start of the execution
	Ended      time.Time   `json:"ended,omitzero"`  // the end of the execution, or of an open proposal
	Cause      string      `json:"cause,omitempty"` // of a failure, or of an end before the expiry
	Did        []Effect    `json:"did"`             // the events that needed this proposal

	Text string `json:"text"` // signed by the approvers

	digest   string    // SHA-256 of Text, hex
	proposal *Proposal // parsed from Text
}

// Approval is an approval whose proof was verified.
type Approval struct {
	Operator   string    `json:"operator"`
	Credential string    `json:"credential"` // its id
	PublicKey  string    `json:"public_key"` // of the credential at the time of the approval
	Event      uint64    `json:"event"`
	Time       time.Time `json:"time"`
	Hardware   bool      `json:"hardware"` // see Verified
	Proof      Proof     `json:"proof"`    // for other verifiers
}

// Effect is an event that a proposal has permitted.
type Effect struct {
	Event    uint64     `json:"event"`
	Type     audit.Type `json:"type"`
	Resource string     `json:"resource,omitempty"`
}

// ErrNoRoot is the error for a log without its first event. The first operators are unknown then.
var ErrNoRoot = errors.New("the log begins after its event 0, since retention has dropped epochs: " +
	"approvals can't be checked from their root, so use a copy of the log that was exported before")

// ReplayOptions are expectations of the verifier that the log itself can't prove.
type ReplayOptions struct {
	// Appliance is the name in proposals: the name of the appliance's log (audit.Log.Name). An
	// empty name is not checked.
	Appliance string
	// Trusted are ids of credentials. Each credential of the first administrator must be one of
	// them. A nil list is not checked.
	Trusted []string
}

// Chain verifies the approvals in a log, event by event from event 0 on. Each act that needs
// approval must have an approved proposal, by the signatures of operators who were approvers at
// that time; the statements of the appliance do not count. audit.Log.Verify must have verified
// before that the events are the events of the log. A malicious appliance can still carry out an
// act without any event.
type Chain struct {
	options   ReplayOptions
	next      uint64              // index of the next event
	operators map[string]Operator // by name
	proposals map[uint64]*ProposalHistory
	policy    string // hash of the policy in force
	groups    map[string]Group
	report    Report
}

// NewChain returns a chain without events.
func NewChain(o ReplayOptions) *Chain {
	return &Chain{
		options: o, operators: map[string]Operator{}, proposals: map[uint64]*ProposalHistory{},
		groups: map[string]Group{},
		report: Report{Proposals: []*ProposalHistory{}},
	}
}

// Replay verifies the approvals in all events of a log. The error is an *audit.Wrong for an event
// that breaks a rule, or ErrNoRoot.
func Replay(events iter.Seq2[uint64, audit.Event], o ReplayOptions) (*Report, error) {
	c := NewChain(o)
	for index, e := range events {
		if err := c.Follow(index, e); err != nil {
			return nil, err
		}
	}
	return c.Report(), nil
}

// Report returns the result for the events so far.
func (c *Chain) Report() *Report {
	r := c.report
	r.Operators = make([]Operator, 0, len(c.operators))
	for _, name := range slices.Sorted(maps.Keys(c.operators)) {
		r.Operators = append(r.Operators, c.operators[name])
	}
	r.Groups = make([]Group, 0, len(c.groups))
	for _, name := range slices.Sorted(maps.Keys(c.groups)) {
		r.Groups = append(r.Groups, c.groups[name])
	}
	return &r
}

// Follow verifies the next event. The error is an *audit.Wrong, or ErrNoRoot.
func (c *Chain) Follow(index uint64, e audit.Event) error {
	if c.next == 0 && index != 0 {
		return ErrNoRoot
	}
	if index != c.next {
		return fmt.Errorf("approval: event %d comes after event %d", index, c.next-1)
	}
	c.next++
	if err := c.follow(index, e); err != nil {
		return &audit.Wrong{Event: index, Reason: fmt.Sprintf("%s: %v", e.Type, err)}
	}
	return nil
}

func (c *Chain) follow(index uint64, e audit.Event) error {
	switch e.Type {
	case audit.OperatorEnrolled:
		return c.enrol(index, e)
	case audit.ProposalMade:
		return c.propose(index, e)
	case audit.ApprovalGiven:
		return c.approve(index, e)
	case audit.ProposalRun, audit.ProposalDone, audit.ProposalWithdrawn, audit.ProposalExpired:
		return c.transition(e)
	}
	if e.Type == audit.PolicyChanged {
		before := c.policy
		c.policy = e.Metadata["sha256"]
		if e.Actor.Kind == "daemon" && (before == "" || before == c.policy) {
			return nil // activated at a start: the same policy as before, or the first one
		}
	}
	if e.Type == audit.GroupChanged || e.Type == audit.GroupRemoved {
		if err := c.changeGroup(index, e); err != nil {
			return err
		}
	}
	g, gated := gateOf(e)
	if !gated || c.report.First == nil {
		return nil
	}
	p, err := c.permittedBy(e, g)
	if err != nil {
		return err
	}
	switch e.Type {
	case audit.OperatorChanged:
		err = c.changeOperator(e, p.proposal)
	case audit.ApprovalsChanged:
		err = c.setNeeded(e.Metadata["needed"])
	case audit.ApproverKeysChanged:
		err = c.setHardware(e.Metadata["required"])
	case audit.RetentionChanged:
		for _, each := range p.Parameters {
			if each.Name != "reason" && e.Metadata[each.Name] != each.Value {
				err = fmt.Errorf("proposal %d says %s %q", p.ID, each.Name, each.Value)
			}
		}
	}
	if err == nil {
		p.Did = append(p.Did, Effect{index, e.Type, e.Resource})
	}
	return err
}

// changeGroup follows the members of a group. A change names the members that it replaces, so that
// approvers have seen the very change.
func (c *Chain) changeGroup(index uint64, e audit.Event) error {
	before := "none"
	if g, there := c.groups[e.Resource]; there {
		before = membersDigest(strings.Join(g.Members, ","))
	}
	switch replaces := e.Metadata["replaces"]; {
	case replaces != before:
		return fmt.Errorf("it replaces members with SHA-256 %q, and group %q has %s", replaces, e.Resource, before)
	case e.Type == audit.GroupRemoved && before == "none":
		return fmt.Errorf("there is no group %q", e.Resource)
	case e.Type == audit.GroupRemoved:
		delete(c.groups, e.Resource)
		return nil
	}
	members := strings.Split(e.Metadata["members"], ",")
	if !slices.IsSorted(members) || members[0] == "" {
		return fmt.Errorf("the members of group %q are not in order", e.Resource)
	}
	c.groups[e.Resource] = Group{e.Resource, e.Metadata["of"], members, index}
	return nil
}

// permittedBy returns the proposal that permits an event. The proposal must be running, ask for the
// recorded act with the recorded values, and have permitted no event before.
func (c *Chain) permittedBy(e audit.Event, g gate) (*ProposalHistory, error) {
	p := c.proposals[e.Actor.Proposal]
	switch {
	case g.act == "":
		return nil, fmt.Errorf("it says that it is a change %q, which is unknown", e.Metadata["change"])
	case e.Actor.Kind != "operator" || e.Actor.Proposal == 0 || p == nil:
		return nil, fmt.Errorf("it needs an approved proposal (%s), and names none that there is", g.act)
	case p.State != "running":
		return nil, fmt.Errorf("it carries out proposal %d, which is %s", p.ID, p.State)
	case p.Act != g.act:
		return nil, fmt.Errorf("it is %s, and carries out proposal %d, which is %s", g.act, p.ID, p.Act)
	case e.Actor.Name != p.Proposer:
		return nil, fmt.Errorf("it is by %q, and proposal %d by %q", e.Actor.Name, p.ID, p.Proposer)
	case len(p.Did) > 0:
		return nil, fmt.Errorf("it carries out proposal %d, which event %d did already", p.ID, p.Did[0].Event)
	}
	if g.parameters == nil {
		return p, nil
	}
	for _, each := range g.parameters(e.Resource, e.Metadata) {
		if said := p.proposal.Parameter(each.Name); said != each.Value || said == "" {
			return nil, fmt.Errorf("its %s is %q, and proposal %d says %q", each.Name, each.Value, p.ID, said)
		}
	}
	return p, nil
}

// enrol adds the first administrator.
func (c *Chain) enrol(index uint64, e audit.Event) error {
	if c.report.First != nil {
		return fmt.Errorf("the first administrator was enrolled by event %d", c.report.First.Event)
	}
	o, err := readOperator(e)
	if err != nil {
		return err
	}
	for _, own := range o.Credentials {
		if c.options.Trusted != nil && !slices.Contains(c.options.Trusted, own.ID) {
			return fmt.Errorf("the first administrator %q has the credential %s, "+
				"which is not among those that you trust", o.Name, own.ID)
		}
	}
	if err := c.setState(map[string]Operator{o.Name: *o}, 1, false); err != nil {
		return err
	}
	c.report.First = &Enrolment{index, timeOf(e), *o}
	return nil
}

// setState replaces the operators, the number of approvals that an act needs, and whether approvals
// must be by hardware keys. setState refuses a state without an administrator, or with fewer
// approvers than needed approvals.
func (c *Chain) setState(operators map[string]Operator, needed int, hardware bool) error {
	administrators, approvers := 0, 0
	for _, o := range operators {
		if o.Has(Administrator) {
			administrators++
		}
		if o.CanApprove(hardware) {
			approvers++
		}
	}
	switch {
	case administrators == 0:
		return errors.New("it leaves no administrator")
	case needed < 1 || needed > approvers:
		return fmt.Errorf("it leaves %d approvers where %d approvals are needed", approvers, needed)
	}
	c.operators, c.report.Needed, c.report.Hardware = operators, needed, hardware
	return nil
}

func (c *Chain) setHardware(text string) error {
	hardware, err := ParseYes(text)
	if err != nil {
		return err
	}
	return c.setState(c.operators, c.report.Needed, hardware)
}

func (c *Chain) setNeeded(text string) error {
	needed, err := strconv.Atoi(text)
	if err != nil {
		return fmt.Errorf("the number of approvals is %q", text)
	}
	return c.setState(c.operators, needed, c.report.Hardware)
}

// readOperator decodes the record of an operator in an event.
func readOperator(e audit.Event) (*Operator, error) {
	o := new(Operator)
	if err := decodeJSON(e.Metadata["operator"], o); err != nil {
		return nil, errors.New("it has no record of an operator")
	}
	if o.Name != e.Resource || checkValue(o.Name) != nil {
		return nil, fmt.Errorf("it is about %q, and its record is of %q", e.Resource, o.Name)
	}
	if !slices.Equal(o.Roles, sortedRoles(o.Roles)) || len(o.Roles) == 0 {
		return nil, errors.New("its record has other roles than there are, or in another order")
	}
	seen := map[string]bool{}
	for _, c := range o.Credentials {
		if err := c.Check(); err != nil {
			return nil, err
		}
		if seen[c.ID] {
			return nil, fmt.Errorf("its record has the credential %s twice", c.ID)
		}
		seen[c.ID] = true
	}
	if len(seen) == 0 {
		return nil, errors.New("its record has no credential")
	}
	return o, nil
}

// decodeJSON decodes strict JSON: no duplicate names, no unknown fields, nothing after the value.
func decodeJSON(text string, v any) error {
	return strict.Unmarshal([]byte(text), v, strict.RejectUnknownMembers(true))
}

// sortedRoles returns the known roles of some, each once, in the order of Roles.
func sortedRoles(some []Role) []Role {
	return slices.DeleteFunc(Roles(), func(r Role) bool { return !slices.Contains(some, r) })
}

// changeOperator replaces an operator's record. The new record must be the former record with the
// change that the proposal names, and no other change.
func (c *Chain) changeOperator(e audit.Event, p *Proposal) error {
	before, there := c.operators[e.Resource]
	if added := e.Metadata["change"] == ChangeAdded; added && there {
		return fmt.Errorf("there is an operator %q", e.Resource)
	} else if !added && !there {
		return fmt.Errorf("there is no operator %q", e.Resource)
	}
	operators := maps.Clone(c.operators)
	if e.Metadata["change"] == ChangeRemoved {
		if e.Metadata["operator"] != "" {
			return errors.New("it has a record of an operator who is removed")
		}
		delete(operators, e.Resource)
		return c.setState(operators, c.report.Needed, c.report.Hardware)
	}
	after, err := readOperator(e)
	if err != nil {
		return err
	}
	want := Operator{before.Name, before.Roles, slices.Clone(before.Credentials), before.Added}
	setRoles := func() {
		want.Roles = nil
		for name := range strings.SplitSeq(p.Parameter("roles"), ",") {
			want.Roles = append(want.Roles, Role(name))
		}
	}
	// addCredential appends the credential of the proposal. The time in the new record counts.
	addCredential := func() error {
		c, err := ParseCredential(p.Parameter("credential"))
		if err != nil || c.Added != 0 {
			return fmt.Errorf("proposal %d has no credential", p.ID)
		}
		if i := slices.IndexFunc(after.Credentials, func(each Credential) bool { return each.ID == c.ID }); i >= 0 {
			c.Added = after.Credentials[i].Added
		}
		want.Credentials = append(want.Credentials, c)
		return nil
	}
	switch e.Metadata["change"] {
	case ChangeAdded:
		want.Name, want.Added = e.Resource, after.Added
		setRoles()
		err = addCredential()
	case ChangeRoles:
		setRoles()
	case ChangeCredentialAdded:
		err = addCredential()
	case ChangeCredentialRemoved:
		id := p.Parameter("credential")
		if _, has := before.Credential(id); !has {
			return fmt.Errorf("operator %q has no credential %s", e.Resource, id)
		}
		want.Credentials = slices.DeleteFunc(want.Credentials, func(c Credential) bool { return c.ID == id })
	}
	if err != nil {
		return err
	}
	if !reflect.DeepEqual(*after, want) {
		return fmt.Errorf("the record is not the former one with the change that proposal %d says", p.ID)
	}
	operators[e.Resource] = *after
	return c.setState(operators, c.report.Needed, c.report.Hardware)
}

func timeOf(e audit.Event) time.Time { return time.UnixMilli(e.TimeMS).UTC() }

func (c *Chain) propose(index uint64, e audit.Event) error {
	p, err := ParseText(e.Metadata["text"])
	if err != nil {
		return err
	}
	digest := p.Digest()
	h := &ProposalHistory{
		ID: p.ID, Act: p.Act, Parameters: append([]Parameter{}, p.Parameters...), Proposer: p.Proposer,
		Proposed: p.Proposed, Expires: p.Expires, Needed: p.Needed, Event: index,
		Approvals: []Approval{}, State: "open", Did: []Effect{},
		Text: p.Text(), digest: hex.EncodeToString(digest[:]), proposal: p,
	}
	switch before := c.proposals[p.ID]; {
	case before != nil:
		return fmt.Errorf("proposal %d was made by event %d", p.ID, before.Event)
	case e.Resource != resource(p.ID) || e.Metadata["digest"] != h.digest:
		return errors.New("its number or digest is not that of its text")
	case c.options.Appliance != "" && p.Appliance != c.options.Appliance:
		return fmt.Errorf("its text is for the appliance %q, and this log is that of %q",
			p.Appliance, c.options.Appliance)
	case e.Actor.Kind != "operator" || e.Actor.Name != p.Proposer || !c.mayPropose(p):
		return fmt.Errorf("it is by %q, who may not propose it or is not the one of its text", e.Actor.Name)
	case p.Needed != c.report.Needed:
		return fmt.Errorf("its text says that %d approvals are needed, where %d are", p.Needed, c.report.Needed)
	}
	c.proposals[p.ID], c.report.Proposals = h, append(c.report.Proposals, h)
	if !slices.Contains(Acts(), p.Act) {
		c.report.Others = append(c.report.Others, p.ID)
	}
	return nil
}

// mayPropose reports whether the proposer is an operator, with a role that may propose the act. The
// roles for an act that this program does not know are unknown.
func (c *Chain) mayPropose(p *Proposal) bool {
	o, there := c.operators[p.Proposer]
	roles := Proposers(p.Act)
	return there && (roles == nil || o.Has(roles...))
}

func resource(id uint64) string { return "proposal/" + strconv.FormatUint(id, 10) }

// proposalOf returns the proposal that an event names by its number and digest.
func (c *Chain) proposalOf(e audit.Event) (*ProposalHistory, error) {
	id, err := strconv.ParseUint(strings.TrimPrefix(e.Resource, "proposal/"), 10, 64)
	p := c.proposals[id]
	if err != nil || e.Resource != resource(id) || p == nil {
		return nil, fmt.Errorf("there is no %q", e.Resource)
	}
	if e.Metadata["digest"] != p.digest {
		return nil, fmt.Errorf("its digest is not that of proposal %d", id)
	}
	return p, nil
}

// expiredAt reports that an event comes after the second in which the proposal expires.
func (p *ProposalHistory) expiredAt(e audit.Event) bool { return timeOf(e).Unix() > p.Expires.Unix() }

func (c *Chain) approve(index uint64, e audit.Event) error {
	p, err := c.proposalOf(e)
	if err != nil {
		return err
	}
	if p.State != "open" {
		return fmt.Errorf("proposal %d is %s", p.ID, p.State)
	}
	if p.expiredAt(e) {
		return fmt.Errorf("proposal %d had expired", p.ID)
	}
	o, there := c.operators[e.Actor.Name]
	if e.Actor.Kind != "operator" || !there || !o.Has(Approver) {
		return fmt.Errorf("it is by %q, who is no approver", e.Actor.Name)
	}
	if slices.ContainsFunc(p.Approvals, func(other Approval) bool { return other.Operator == o.Name }) {
		return fmt.Errorf("%q has approved proposal %d already", o.Name, p.ID)
	}
	var proof Proof
	if err := decodeJSON(e.Metadata["proof"], &proof); err != nil || proof.Credential != e.Metadata["credential"] {
		return errors.New("it has no proof, or one by another credential than it names")
	}
	used, has := o.Credential(proof.Credential)
	if !has {
		return fmt.Errorf("%q has no credential %s", o.Name, proof.Credential)
	}
	v, err := used.Verify(ForProposal, p.Text, proof)
	if err != nil {
		return err
	}
	if p.proposal.NeedsHardware(c.report.Hardware) && !v.Hardware {
		return errors.New("it is not by a hardware key that has verified its user")
	}
	p.Approvals = append(p.Approvals, Approval{o.Name, used.ID, used.PublicKey, index, timeOf(e), v.Hardware, proof})
	return nil
}

// countApprovals returns the number of valid approvals after the last event. An approval is valid
// while its operator is an approver and has the credential, and is by a hardware key where that is
// required. Each operator and each credential counts once.
func (c *Chain) countApprovals(p *ProposalHistory) int {
	names, credentials := map[string]bool{}, map[string]bool{}
	for _, each := range p.Approvals {
		o := c.operators[each.Operator]
		_, has := o.Credential(each.Credential)
		has = has && (each.Hardware || !p.proposal.NeedsHardware(c.report.Hardware))
		if has && o.Has(Approver) && !credentials[each.Credential] {
			names[each.Operator], credentials[each.Credential] = true, true
		}
	}
	return len(names)
}

// transition changes the state of a proposal: from running for ProposalDone, from open for all
// others.
func (c *Chain) transition(e audit.Event) error {
	p, err := c.proposalOf(e)
	if err != nil {
		return err
	}
	from := "open"
	if e.Type == audit.ProposalDone {
		from = "running"
	}
	if p.State != from {
		return fmt.Errorf("proposal %d is %s, and not %s", p.ID, p.State, from)
	}
	switch e.Type {
	case audit.ProposalRun:
		if p.expiredAt(e) {
			return fmt.Errorf("proposal %d had expired", p.ID)
		}
		if n, needed := c.countApprovals(p), max(p.Needed, c.report.Needed); n < needed {
			return fmt.Errorf("proposal %d has %d approvals that count, and needs %d", p.ID, n, needed)
		}
		if !c.mayPropose(p.proposal) {
			return fmt.Errorf("proposal %d is by %q, who may not propose it any more", p.ID, p.Proposer)
		}
		p.State, p.Run = "running", timeOf(e)
		return nil
	case audit.ProposalDone:
		state := map[string]string{"ok": "done", "failed": "failed", "interrupted": "interrupted"}[e.Outcome]
		if state == "" {
			return fmt.Errorf("its outcome is %q", e.Outcome)
		}
		p.State, p.Cause = state, e.Metadata["cause"]
	case audit.ProposalWithdrawn:
		o := c.operators[e.Actor.Name]
		if e.Actor.Kind != "operator" || e.Actor.Name != p.Proposer && !o.Has(Administrator) {
			return fmt.Errorf("it is by %q, who is neither the proposer nor an administrator", e.Actor.Name)
		}
		p.State = "withdrawn"
	case audit.ProposalExpired:
		p.State, p.Cause = "expired", e.Metadata["cause"]
	}
	p.Ended = timeOf(e)
	return nil
}

// Trusted parses a JSON list of credentials, or of ids of credentials, and returns the ids.
func Trusted(b []byte) (ids []string, err error) {
	var list []json.RawMessage
	if err := strict.Unmarshal(b, &list); err != nil || len(list) == 0 {
		return nil, fmt.Errorf("%w: this is not a JSON list of ids of credentials", ErrInvalid)
	}
	for _, each := range list {
		var id string
		if decodeJSON(string(each), &id) != nil {
			c, err := ParseCredential(string(each))
			if err != nil {
				return nil, fmt.Errorf("%w: %s is neither the id of a credential nor a credential", ErrInvalid, each)
			}
			id = c.ID
		}
		if b, err := hex.DecodeString(id); err != nil || len(b) != 16 {
			return nil, fmt.Errorf("%w: %q is not the id of a credential, which has 32 hex digits", ErrInvalid, id)
		}
		ids = append(ids, id)
	}
	return ids, nil
}
