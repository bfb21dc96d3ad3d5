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

// Report is what a log says of operators and approvals when all is well.
type Report struct {
	First     *Enrolment         `json:"first,omitempty"` // nil: there are no operators, and nothing needs approval
	Needed    int                `json:"needed"`          // approvals at the end
	Operators []Operator         `json:"operators"`       // at the end, by name
	Proposals []*ProposalHistory `json:"proposals"`       // in the order of their making
	// Others are the ids of proposals' acts that this program does not know. They gate nothing that it knows either.
	Others []uint64 `json:"others,omitempty"`
}

// Enrolment is that of the first administrator, which nobody had to approve: all that follows hangs on it.
type Enrolment struct {
	Event    uint64    `json:"event"`
	Time     time.Time `json:"time"`
	Operator Operator  `json:"operator"`
}

// ProposalHistory is what became of a proposal.
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
	Run        time.Time   `json:"run,omitzero"`    // when it began to be carried out
	Ended      time.Time   `json:"ended,omitzero"`  // when that, or the proposal, ended
	Cause      string      `json:"cause,omitempty"` // why it failed
	Did        []Effect    `json:"did"`             // the events that needed this proposal

	Text string `json:"text"` // what the approvers signed

	digest string
	says   *Proposal
}

// Approval is one that is proven.
type Approval struct {
	Operator   string    `json:"operator"`
	Credential string    `json:"credential"` // its id
	PublicKey  string    `json:"public_key"` // of the credential, as it was at that moment
	Event      uint64    `json:"event"`
	Time       time.Time `json:"time"`
	Proof      Proof     `json:"proof"` // so that others can check it
}

// Effect is an event that a proposal has allowed.
type Effect struct {
	Event    uint64     `json:"event"`
	Type     audit.Type `json:"type"`
	Resource string     `json:"resource,omitempty"`
}

// ErrNoRoot is a log whose beginning is not there: who its operators were can't be told.
var ErrNoRoot = errors.New("the log begins after its event 0, since retention has dropped epochs: approvals can't be checked from their root, so use a copy of the log that was exported before")

// ReplayOptions say what to hold the approvals against beside the log itself.
type ReplayOptions struct {
	Appliance string   // its name in proposals, which is that of its log (audit.Log.Name); "": not checked
	Trusted   []string // the ids of credentials of which the first administrator may have some, and no others; nil: not checked
}

// Chain follows the events of a log from event 0 on, and believes nothing that the appliance says of approvals: what needs one has
// it, by the signatures of those who were approvers at that moment. That the events are those of the log is what audit.Log.Verify
// checks. The appliance could still do what it does not write down.
type Chain struct {
	options   ReplayOptions
	next      uint64
	operators map[string]Operator // by name
	proposals map[uint64]*ProposalHistory
	policy    string // the hash of the one that is in force
	report    Report
}

// NewChain returns a chain that has seen nothing yet.
func NewChain(o ReplayOptions) *Chain {
	return &Chain{options: o, operators: map[string]Operator{}, proposals: map[uint64]*ProposalHistory{}, report: Report{Proposals: []*ProposalHistory{}}}
}

// Replay follows all events of a log. The error is a *audit.Wrong where an event is not as it must be.
func Replay(events iter.Seq2[uint64, audit.Event], o ReplayOptions) (*Report, error) {
	a := NewChain(o)
	for index, e := range events {
		if err := a.Follow(index, e); err != nil {
			return nil, err
		}
	}
	return a.Report(), nil
}

// Report says what was seen so far.
func (a *Chain) Report() *Report {
	r := a.report
	r.Operators = make([]Operator, 0, len(a.operators))
	for _, name := range slices.Sorted(maps.Keys(a.operators)) {
		r.Operators = append(r.Operators, a.operators[name])
	}
	return &r
}

// Follow takes the next event. The error is a *audit.Wrong, or ErrNoRoot.
func (a *Chain) Follow(index uint64, e audit.Event) error {
	if a.next == 0 && index != 0 {
		return ErrNoRoot
	}
	if index != a.next {
		return fmt.Errorf("approval: event %d comes after event %d", index, a.next-1)
	}
	a.next++
	if err := a.follow(index, e); err != nil {
		return &audit.Wrong{Event: index, Reason: fmt.Sprintf("%s: %v", e.Type, err)}
	}
	return nil
}

func (a *Chain) follow(index uint64, e audit.Event) error {
	switch e.Type {
	case audit.OperatorEnrolled:
		return a.enrol(index, e)
	case audit.ProposalMade:
		return a.propose(index, e)
	case audit.ApprovalGiven:
		return a.approve(index, e)
	case audit.ProposalRun, audit.ProposalDone, audit.ProposalWithdrawn, audit.ProposalExpired:
		return a.step(e)
	}
	if e.Type == audit.PolicyChanged {
		before := a.policy
		a.policy = e.Metadata["sha256"]
		if e.Actor.Kind == "daemon" && (before == "" || before == a.policy) {
			return nil // put in force at the start: the one that was, or the first one
		}
	}
	g, gated := gateOf(e)
	if !gated || a.report.First == nil {
		return nil
	}
	p, err := a.carriedOut(e, g)
	if err != nil {
		return err
	}
	switch e.Type {
	case audit.OperatorChanged:
		err = a.change(e, p.says)
	case audit.ApprovalsChanged:
		err = a.setNeeded(e.Metadata["needed"])
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

// carriedOut finds the proposal that an event carries out: it is running, says just that, and has not done it yet.
func (a *Chain) carriedOut(e audit.Event, g gate) (*ProposalHistory, error) {
	p := a.proposals[e.Actor.Proposal]
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
	if g.want == nil {
		return p, nil
	}
	for _, each := range g.want(e.Resource, e.Metadata) {
		if said := p.says.Parameter(each.Name); said != each.Value || said == "" {
			return nil, fmt.Errorf("its %s is %q, and proposal %d says %q", each.Name, each.Value, p.ID, said)
		}
	}
	return p, nil
}

// enrol takes the first administrator.
func (a *Chain) enrol(index uint64, e audit.Event) error {
	if a.report.First != nil {
		return fmt.Errorf("the first administrator was enrolled by event %d", a.report.First.Event)
	}
	o, err := readOperator(e)
	if err != nil {
		return err
	}
	for _, c := range o.Credentials {
		if a.options.Trusted != nil && !slices.Contains(a.options.Trusted, c.ID) {
			return fmt.Errorf("the first administrator %q has the credential %s, which is not among those that you trust", o.Name, c.ID)
		}
	}
	if err := a.put(map[string]Operator{o.Name: *o}, 1); err != nil {
		return err
	}
	a.report.First = &Enrolment{index, at(e), *o}
	return nil
}

// put takes a state of operators and of how many approvals are needed.
func (a *Chain) put(operators map[string]Operator, needed int) error {
	count := func(r Role) (n int) {
		for _, o := range operators {
			if o.Has(r) {
				n++
			}
		}
		return n
	}
	switch {
	case count(Administrator) == 0:
		return errors.New("it leaves no administrator")
	case needed < 1 || needed > count(Approver):
		return fmt.Errorf("it leaves %d approvers where %d approvals are needed", count(Approver), needed)
	}
	a.operators, a.report.Needed = operators, needed
	return nil
}

func (a *Chain) setNeeded(text string) error {
	needed, err := strconv.Atoi(text)
	if err != nil {
		return fmt.Errorf("the number of approvals is %q", text)
	}
	return a.put(a.operators, needed)
}

// readOperator reads the record in an event.
func readOperator(e audit.Event) (*Operator, error) {
	o := new(Operator)
	if err := read(e.Metadata["operator"], o); err != nil {
		return nil, errors.New("it has no record of an operator")
	}
	if o.Name != e.Resource || checkValue(o.Name) != nil {
		return nil, fmt.Errorf("it is about %q, and its record is of %q", e.Resource, o.Name)
	}
	if !slices.Equal(o.Roles, sorted(o.Roles)) || len(o.Roles) == 0 {
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

// read reads JSON with nothing else in it.
func read(text string, v any) error {
	return strict.Unmarshal([]byte(text), v, strict.RejectUnknownMembers(true))
}

// sorted returns the roles that there are of some, in the order of Roles.
func sorted(some []Role) []Role {
	return slices.DeleteFunc(Roles(), func(r Role) bool { return !slices.Contains(some, r) })
}

// change takes an operator's new record. It must be the former one with what the proposal says and nothing else.
func (a *Chain) change(e audit.Event, p *Proposal) error {
	before, there := a.operators[e.Resource]
	if added := e.Metadata["change"] == ChangeAdded; added && there {
		return fmt.Errorf("there is an operator %q", e.Resource)
	} else if !added && !there {
		return fmt.Errorf("there is no operator %q", e.Resource)
	}
	operators := maps.Clone(a.operators)
	if e.Metadata["change"] == ChangeRemoved {
		if e.Metadata["operator"] != "" {
			return errors.New("it has a record of an operator who is removed")
		}
		delete(operators, e.Resource)
		return a.put(operators, a.report.Needed)
	}
	after, err := readOperator(e)
	if err != nil {
		return err
	}
	want := Operator{before.Name, before.Roles, slices.Clone(before.Credentials), before.Added}
	roles := func() {
		want.Roles = nil
		for name := range strings.SplitSeq(p.Parameter("roles"), ",") {
			want.Roles = append(want.Roles, Role(name))
		}
	}
	// credential appends the one that the proposal has, as of the time that the record says.
	credential := func() (err error) {
		var c Credential
		if read(p.Parameter("credential"), &c) != nil || c.Added != 0 || c.Check() != nil {
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
		roles()
		err = credential()
	case ChangeRoles:
		roles()
	case ChangeCredentialAdded:
		err = credential()
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
	return a.put(operators, a.report.Needed)
}

func at(e audit.Event) time.Time { return time.UnixMilli(e.TimeMS).UTC() }

func (a *Chain) propose(index uint64, e audit.Event) error {
	p, err := ParseText(e.Metadata["text"])
	if err != nil {
		return err
	}
	digest := p.Digest()
	c := &ProposalHistory{ID: p.ID, Act: p.Act, Parameters: p.Parameters, Proposer: p.Proposer, Proposed: p.Proposed, Expires: p.Expires, Needed: p.Needed, Event: index,
		Approvals: []Approval{}, State: "open", Did: []Effect{}, Text: p.Text(), digest: hex.EncodeToString(digest[:]), says: p}
	_, operator := a.operators[e.Actor.Name]
	switch before := a.proposals[p.ID]; {
	case before != nil:
		return fmt.Errorf("proposal %d was made by event %d", p.ID, before.Event)
	case e.Resource != resource(p.ID) || e.Metadata["digest"] != c.digest:
		return errors.New("its number or digest is not that of its text")
	case a.options.Appliance != "" && p.Appliance != a.options.Appliance:
		return fmt.Errorf("its text is for the appliance %q, and this log is that of %q", p.Appliance, a.options.Appliance)
	case e.Actor.Kind != "operator" || e.Actor.Name != p.Proposer || !operator:
		return fmt.Errorf("it is by %q, who is no operator or not the one of its text", e.Actor.Name)
	case p.Needed != a.report.Needed:
		return fmt.Errorf("its text says that %d approvals are needed, where %d are", p.Needed, a.report.Needed)
	}
	if c.Parameters == nil {
		c.Parameters = []Parameter{}
	}
	a.proposals[p.ID], a.report.Proposals = c, append(a.report.Proposals, c)
	if !slices.Contains(Acts(), p.Act) {
		a.report.Others = append(a.report.Others, p.ID)
	}
	return nil
}

func resource(id uint64) string { return "proposal/" + strconv.FormatUint(id, 10) }

// of finds the proposal that an event is about.
func (a *Chain) of(e audit.Event) (*ProposalHistory, error) {
	id, err := strconv.ParseUint(strings.TrimPrefix(e.Resource, "proposal/"), 10, 64)
	p := a.proposals[id]
	if err != nil || e.Resource != resource(id) || p == nil {
		return nil, fmt.Errorf("there is no %q", e.Resource)
	}
	if e.Metadata["digest"] != p.digest {
		return nil, fmt.Errorf("its digest is not that of proposal %d", id)
	}
	return p, nil
}

// over says whether an event is later than a proposal may be used: after the second in which it expires.
func (c *ProposalHistory) over(e audit.Event) bool { return at(e).Unix() > c.Expires.Unix() }

func (a *Chain) approve(index uint64, e audit.Event) error {
	p, err := a.of(e)
	if err != nil {
		return err
	}
	if p.State != "open" {
		return fmt.Errorf("proposal %d is %s", p.ID, p.State)
	}
	if p.over(e) {
		return fmt.Errorf("proposal %d had expired", p.ID)
	}
	o, there := a.operators[e.Actor.Name]
	if e.Actor.Kind != "operator" || !there || !o.Has(Approver) {
		return fmt.Errorf("it is by %q, who is no approver", e.Actor.Name)
	}
	if slices.ContainsFunc(p.Approvals, func(other Approval) bool { return other.Operator == o.Name }) {
		return fmt.Errorf("%q has approved proposal %d already", o.Name, p.ID)
	}
	var proof Proof
	if err := read(e.Metadata["proof"], &proof); err != nil || proof.Credential != e.Metadata["credential"] {
		return errors.New("it has no proof, or one by another credential than it names")
	}
	c, has := o.Credential(proof.Credential)
	if !has {
		return fmt.Errorf("%q has no credential %s", o.Name, proof.Credential)
	}
	if _, err := c.Verify(ForProposal, p.Text, proof); err != nil {
		return err
	}
	p.Approvals = append(p.Approvals, Approval{o.Name, c.ID, c.PublicKey, index, at(e), proof})
	return nil
}

// counts is how many approvals count at this moment: those of approvers who have the credential still, each person and each
// credential once.
func (a *Chain) counts(p *ProposalHistory) int {
	names, credentials := map[string]bool{}, map[string]bool{}
	for _, each := range p.Approvals {
		o := a.operators[each.Operator]
		if _, has := o.Credential(each.Credential); has && o.Has(Approver) && !credentials[each.Credential] {
			names[each.Operator], credentials[each.Credential] = true, true
		}
	}
	return len(names)
}

// step takes what becomes of a proposal.
func (a *Chain) step(e audit.Event) error {
	p, err := a.of(e)
	if err != nil {
		return err
	}
	if from := map[bool]string{true: "running", false: "open"}[e.Type == audit.ProposalDone]; p.State != from {
		return fmt.Errorf("proposal %d is %s, and not %s", p.ID, p.State, from)
	}
	switch e.Type {
	case audit.ProposalRun:
		if p.over(e) {
			return fmt.Errorf("proposal %d had expired", p.ID)
		}
		if n, needed := a.counts(p), max(p.Needed, a.report.Needed); n < needed {
			return fmt.Errorf("proposal %d has %d approvals that count, and needs %d", p.ID, n, needed)
		}
		p.State, p.Run = "running", at(e)
		return nil
	case audit.ProposalDone:
		state := map[string]string{"ok": "done", "failed": "failed", "interrupted": "interrupted"}[e.Outcome]
		if state == "" {
			return fmt.Errorf("its outcome is %q", e.Outcome)
		}
		p.State, p.Cause = state, e.Metadata["cause"]
	case audit.ProposalWithdrawn:
		o := a.operators[e.Actor.Name]
		if e.Actor.Kind != "operator" || e.Actor.Name != p.Proposer && !o.Has(Administrator) {
			return fmt.Errorf("it is by %q, who is neither the proposer nor an administrator", e.Actor.Name)
		}
		p.State = "withdrawn"
	case audit.ProposalExpired:
		p.State = "expired"
	}
	p.Ended = at(e)
	return nil
}

// Trusted reads a list of credentials: their ids, or the credentials themselves, as JSON.
func Trusted(b []byte) (ids []string, err error) {
	var list []json.RawMessage
	if err := strict.Unmarshal(b, &list); err != nil || len(list) == 0 {
		return nil, fmt.Errorf("%w: this is not a JSON list of ids of credentials", ErrInvalid)
	}
	for _, each := range list {
		var id string
		var c Credential
		if read(string(each), &id) != nil {
			if read(string(each), &c) != nil || c.Check() != nil {
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
