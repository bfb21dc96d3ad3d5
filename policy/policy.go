// Package policy decides who may sign what with which key. The rules are Cedar policies (https://docs.cedarpolicy.com)
// in a file of the operator's; what they may talk about is in schema.cedarschema. Begin reading at Decide.
//
// The default is to deny. A decision is a pure function of its request. What keeps money safe whatever an operator
// writes (nonces, expiry, strict verification, limits) is not policy and is not here.
package policy

import (
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
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

// Request is what a decision is made from.
type Request struct {
	Peer    string // the name under which the peer is enrolled
	Action  string
	Key     string
	Context map[string]any // strings and int64, named as in the schema
}

// Policy is a set of rules that fits the schema. It is safe for concurrent use.
type Policy struct {
	// Hash is the SHA-256 of the file: it says which rules decided.
	Hash  [32]byte
	rules *cedar.PolicySet
	// named says of each rule whether it names one principal, one action and one resource.
	named map[cedar.PolicyID]bool
}

// Load reads and validates a policy file.
func Load(path string) (*Policy, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	return Parse(path, b)
}

// Parse validates rules against the schema. file is for error messages, which name the line.
func Parse(file string, text []byte) (*Policy, error) {
	var s schema.Schema
	if err := s.UnmarshalCedar(Schema); err != nil {
		panic("policy: the built-in schema is broken: " + err.Error())
	}
	resolved, err := s.Resolve()
	if err != nil {
		panic("policy: the built-in schema is broken: " + err.Error())
	}
	rules, err := cedar.NewPolicySetFromBytes(file, text)
	if err != nil {
		return nil, fmt.Errorf("policy: %s", strings.ReplaceAll(oneLine(err), "<input>", file))
	}
	p := &Policy{Hash: sha256.Sum256(text), rules: rules, named: map[cedar.PolicyID]bool{}}
	validator := validate.New(resolved)
	for id, rule := range rules.All() {
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

// Decide returns nil where the rules allow the request. The error wraps ErrDenied; what it says is for the appliance's
// own log. A rule that can't be evaluated denies: a forbid that fails must not let through what it was written against.
func (p *Policy) Decide(r Request) error {
	context := cedar.RecordMap{}
	for name, value := range r.Context {
		switch v := value.(type) {
		case string:
			context[cedar.String(name)] = cedar.String(v)
		case int64:
			context[cedar.String(name)] = cedar.Long(v)
		default:
			return fmt.Errorf("%w: %s is a %T, which no rule can judge", ErrDenied, name, value)
		}
	}
	decision, why := cedar.Authorize(p.rules, cedar.EntityMap{}, cedar.Request{
		Principal: cedar.NewEntityUID("Peer", cedar.String(r.Peer)),
		Action:    cedar.NewEntityUID("Action", cedar.String(r.Action)),
		Resource:  cedar.NewEntityUID("Key", cedar.String(r.Key)),
		Context:   cedar.NewRecord(context),
	})
	if len(why.Errors) > 0 {
		return fmt.Errorf("%w: %v", ErrDenied, why.Errors[0])
	}
	if decision != cedar.Allow {
		return fmt.Errorf("%w: Peer::%q, Action::%q, Key::%q (%d rules forbid it)", ErrDenied, r.Peer, r.Action, r.Key, len(why.Reasons))
	}
	if r.Action == SignRaw && !slices.ContainsFunc(why.Reasons, func(reason cedar.DiagnosticReason) bool { return p.named[reason.PolicyID] }) {
		return fmt.Errorf("%w: raw needs a rule that names Peer::%q, Action::%q and Key::%q", ErrDenied, r.Peer, r.Action, r.Key)
	}
	return nil
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }
