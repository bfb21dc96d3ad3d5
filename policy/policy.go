// Package policy decides who may sign what with which key. The rules are Cedar policies (https://docs.cedarpolicy.com)
// in a file of the operator's; what they may talk about is in schema.cedarschema. Begin reading at Decide.
//
// The default is to deny. A decision is a pure function of the rules and its request, both of which are recorded: anyone can
// make it again, bit by bit (see Record). What keeps money safe whatever an operator
// writes (nonces, expiry, strict verification, limits) is not policy and is not here.
package policy

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
)

// Schema is the vocabulary, in Cedar's schema language.
//
//go:embed schema.cedarschema
var Schema []byte

// The actions.
const (
	Sign    = "sign"
	SignRaw = "sign_raw"
)

// ErrDenied is wrapped by every refusal of Decide.
var ErrDenied = errors.New("policy does not allow it")

// Request is what a decision is made from. Make it with NewRequest, then set Used.
type Request struct {
	Peer   string // the name under which the peer is enrolled
	Action string
	Key    string
	Used   Usage

	context cedar.Record // without what is used
	encoded []byte       // context in JSON
}

// NewRequest makes a request whose context has fields as the schema names them, but for what is used: strings and int64.
func NewRequest(peer, action, key string, fields map[string]any) (Request, error) {
	record := cedar.RecordMap{}
	for name, value := range fields {
		switch v := value.(type) {
		case string:
			record[cedar.String(name)] = cedar.String(v)
		case int64:
			record[cedar.String(name)] = cedar.Long(v)
		default:
			return Request{}, fmt.Errorf("%w: %s is a %T, which no rule can judge", ErrDenied, name, value)
		}
	}
	r := Request{Peer: peer, Action: action, Key: key, context: cedar.NewRecord(record)}
	var err error
	r.encoded, err = r.context.MarshalJSON()
	return r, err
}

// cedar is the request as Cedar has it, with what is used or without.
func (r Request) cedar(used bool) cedar.Request {
	context := r.context
	if used {
		fields := context.Map()
		fields["used"] = r.Used.record()
		context = cedar.NewRecord(fields)
	}
	return cedar.Request{
		Principal: cedar.NewEntityUID("Peer", cedar.String(r.Peer)),
		Action:    cedar.NewEntityUID("Action", cedar.String(r.Action)),
		Resource:  cedar.NewEntityUID("Key", cedar.String(r.Key)),
		Context:   context,
	}
}

// Check holds a request against the schema.
func (r Request) Check() error {
	if err := validate.New(vocabulary()).Request(r.cedar(true)); err != nil {
		return fmt.Errorf("policy: the request does not fit the schema: %s", oneLine(err))
	}
	return nil
}

// Decision is what the rules say about a request.
type Decision struct {
	Allowed bool
	// Rules are the ids of those that decided: the permits of what is allowed, or the forbids of what is not. None: nothing
	// permits it.
	Rules []string
	// Fault says why the rules could not be followed: one that can't be evaluated denies.
	Fault string
}

// Err is nil for what is allowed. It wraps ErrDenied, and is for the appliance's own log.
func (d Decision) Err() error {
	switch {
	case d.Allowed:
		return nil
	case d.Fault != "":
		return fmt.Errorf("%w: %s", ErrDenied, d.Fault)
	case len(d.Rules) > 0:
		return fmt.Errorf("%w: forbidden by %s", ErrDenied, strings.Join(d.Rules, ", "))
	}
	return fmt.Errorf("%w: no rule permits it", ErrDenied)
}

// Policy is a set of rules that fits the schema. It is safe for concurrent use.
type Policy struct {
	// Hash is the SHA-256 of the text: it says which rules decided.
	Hash  [32]byte
	Text  []byte
	rules *cedar.PolicySet
	// named says of each rule whether it names one principal, one action and one resource.
	named map[cedar.PolicyID]bool
	// counts says that the rules may ask what is used (or write it with an escape): only then it is made for them, since it takes
	// longer than all the rest.
	counts bool
}

// Load reads and validates a policy file.
func Load(path string) (*Policy, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	return Parse(path, b)
}

// vocabulary is the schema, resolved.
var vocabulary = sync.OnceValue(func() *resolved.Schema {
	var s schema.Schema
	if err := s.UnmarshalCedar(Schema); err != nil {
		panic("policy: the built-in schema is broken: " + err.Error())
	}
	r, err := s.Resolve()
	if err != nil {
		panic("policy: the built-in schema is broken: " + err.Error())
	}
	return r
})

// maxText bounds a policy file, in bytes.
const maxText = 1 << 20

// Parse validates rules against the schema. file is for error messages, which name the line.
func Parse(file string, text []byte) (*Policy, error) {
	if len(text) > maxText {
		return nil, fmt.Errorf("policy: %s: it has more than %d bytes", file, maxText)
	}
	rules, err := cedar.NewPolicySetFromBytes(file, text)
	if big, is := errors.AsType[*strconv.NumError](err); is { // the only error that cedar-go gives no place
		line := 1 + bytes.Count(text[:max(0, bytes.Index(text, []byte(strings.TrimPrefix(big.Num, "-"))))], []byte("\n"))
		return nil, fmt.Errorf("policy: %s:%d: the number %s is out of range", file, line, big.Num)
	} else if err != nil {
		return nil, fmt.Errorf("policy: %s", strings.ReplaceAll(oneLine(err), "<input>", file))
	}
	p := &Policy{Hash: sha256.Sum256(text), Text: text, rules: rules, named: map[cedar.PolicyID]bool{}, counts: bytes.Contains(text, []byte("used")) || bytes.Contains(text, []byte(`\`))}
	validator := validate.New(vocabulary())
	for _, id := range p.ids() {
		rule := rules.Get(id)
		tree := (*ast.Policy)(rule.AST())
		if err := validator.Policy(string(id), tree); err != nil {
			return nil, fmt.Errorf("policy: %s:%d: %s", file, rule.Position().Line, oneLine(err))
		}
		_, principal := tree.Principal.(ast.ScopeTypeEq)
		_, action := tree.Action.(ast.ScopeTypeEq)
		_, resource := tree.Resource.(ast.ScopeTypeEq)
		p.named[id] = principal && action && resource
	}
	return p, nil
}

// ids are the rules' ids in the order of the text.
func (p *Policy) ids() []cedar.PolicyID {
	return slices.SortedFunc(maps.Keys(p.rules.Map()), func(a, b cedar.PolicyID) int {
		return p.rules.Get(a).Position().Offset - p.rules.Get(b).Position().Offset
	})
}

// Rule is one rule of a policy as it is written.
type Rule struct {
	ID   string
	Line int
	Text string
}

// Rules lists them in the order of the text.
func (p *Policy) Rules() (all []Rule) {
	ids := p.ids()
	for i, id := range ids {
		from, to := p.rules.Get(id).Position(), len(p.Text)
		if i+1 < len(ids) {
			to = p.rules.Get(ids[i+1]).Position().Offset
		}
		text := string(p.Text[from.Offset:to])
		all = append(all, Rule{string(id), from.Line, text[:strings.LastIndexByte(text, ';')+1]})
	}
	return all
}

// Decide says what the rules say about a request. It is a pure function of the two.
func (p *Policy) Decide(r Request) Decision {
	decision, why := cedar.Authorize(p.rules, cedar.EntityMap{}, r.cedar(p.counts))
	var d Decision
	for _, reason := range why.Reasons {
		d.Rules = append(d.Rules, string(reason.PolicyID))
	}
	slices.Sort(d.Rules)
	switch {
	case len(why.Errors) > 0: // a forbid that fails must not let through what it was written against
		slices.SortFunc(why.Errors, func(a, b cedar.DiagnosticError) int { return strings.Compare(string(a.PolicyID), string(b.PolicyID)) })
		d.Fault = fmt.Sprintf("%s can't be evaluated: %s", why.Errors[0].PolicyID, oneLine(errors.New(why.Errors[0].Message)))
	case decision != cedar.Allow:
	case r.Action == SignRaw && !slices.ContainsFunc(why.Reasons, func(reason cedar.DiagnosticReason) bool { return p.named[reason.PolicyID] }):
		d.Fault = "raw needs a rule that names one peer, the action sign_raw and one key"
	default:
		d.Allowed = true
	}
	return d
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }
