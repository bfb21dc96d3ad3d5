// Package policy decides which peer may sign which document with which key. The rules are Cedar
// policies (https://docs.cedarpolicy.com) in a file of the operator. The schema of the rules is in
// schema.cedarschema. Begin reading at Decide.
//
// The default is to deny. A decision is a pure function of the rules and the request. Both are
// recorded, so anyone can repeat the decision (see Record). Nonces, expiry, strict verification and
// limits do not depend on the rules and are not part of this package: no rule can switch those
// protections off.
package policy

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"iter"
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

// Schema is the text of the schema, in Cedar's schema language.
//
//go:embed schema.cedarschema
var Schema []byte

// The actions of a request.
const (
	Sign    = "sign"     // sign a document of any type but raw
	SignRaw = "sign_raw" // sign a document of type raw
	Verify  = "verify"   // have a signature confirmed
)

// ErrDenied is wrapped by every refusal.
var ErrDenied = errors.New("policy does not allow it")

// Request is the input of a decision. NewRequest makes a Request; the caller then sets Used,
// PeerKey and the groups, and Signer for a verification without a key of the appliance.
type Request struct {
	Peer   string // the name under which the peer is enrolled
	Action string
	Key    string
	Signer string // another signer than the appliance, in place of Key: its public key in hex
	Used   Usage

	PeerKey    string   // hex of the peer's key in the session, for the record only: no rule sees it
	PeerGroups []string // names of the groups of the peer, in order
	KeyGroups  []string // names of the groups of the key, in order

	context cedar.Record // without the field used
	encoded []byte       // context in the form of a Record

	withheld []string // fields of a recorded context whose text is not known
}

// NewRequest makes a request with a context of the given fields. The schema defines the names; the
// values are strings and int64. The field used of the context comes from Request.Used.
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
	return Request{
		Peer: peer, Action: action, Key: key, context: cedar.NewRecord(record), encoded: recorded(fields),
	}, nil
}

// cedar returns the request in Cedar's form. With used, the context has the field used.
func (r Request) cedar(used bool) cedar.Request {
	context := r.context
	if used {
		fields := cedar.RecordMap{}
		maps.Copy(fields, context.Map())
		fields["used"] = r.Used.record()
		context = cedar.NewRecord(fields)
	}
	resource := cedar.NewEntityUID("Key", cedar.String(r.Key))
	if r.Signer != "" {
		resource = cedar.NewEntityUID("Signer", cedar.String(r.Signer))
	}
	return cedar.Request{
		Principal: cedar.NewEntityUID("Peer", cedar.String(r.Peer)),
		Action:    cedar.NewEntityUID("Action", cedar.String(r.Action)),
		Resource:  resource,
		Context:   context,
	}
}

// Check validates a request against the schema.
func (r Request) Check() error {
	if err := validate.New(resolvedSchema()).Request(r.cedar(true)); err != nil {
		return fmt.Errorf("policy: the request does not fit the schema: %s", oneLine(err))
	}
	return nil
}

// Decision is the result of the rules for a request.
type Decision struct {
	Allowed bool
	// Rules are the ids (see Rule) of the deciding rules: the permits of an allowed request, or the
	// forbids of a denied one. A denied request without Rules and Fault has no rule that permits
	// it. An allowed request without Rules is a verification that no rule is about: see
	// Policy.Verifies.
	Rules []string
	// Fault says why a request is denied in spite of its permits. A rule that can't be evaluated
	// denies.
	Fault string
}

// Err returns nil for an allowed request, and otherwise an error that wraps ErrDenied. The text
// is for the appliance's own log and not for peers.
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

// Policy is a set of rules that fits the schema. A Policy is safe for concurrent use.
type Policy struct {
	// Hash is the SHA-256 of Text. A record names its policy by the hash.
	Hash [32]byte
	Text []byte
	// Verifies says that a rule names Action::"verify". Without such a rule, every verification is
	// allowed, and no rule is asked about one.
	Verifies bool
	rules    *cedar.PolicySet
	heads    heads // the same rules
	// narrow says of each rule whether the scope names one principal, one action and one resource.
	narrow map[cedar.PolicyID]bool
	// readsUsed says that a rule may read the field used of the context. Without such a rule,
	// Decide saves the time to build the field, which takes longer than the rest of the decision.
	readsUsed bool
}

// Load reads the policy file, which is to come into force: see Offer.
func Load(path string) (*Policy, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	return Offer(path, b)
}

// Reader returns a Load that checks the file only when its bytes are others than at the last call,
// for a caller that asks every few seconds.
func Reader(path string) func() (*Policy, error) {
	var mu sync.Mutex // guards the variables below
	var last []byte
	var p *Policy
	err := errors.New("policy: not read yet")
	return func() (*Policy, error) {
		b, failed := os.ReadFile(path)
		if failed != nil {
			return nil, fmt.Errorf("policy: %w", failed)
		}
		mu.Lock()
		defer mu.Unlock()
		if last == nil || !bytes.Equal(b, last) {
			last = append([]byte{}, b...)
			p, err = Offer(path, b)
		}
		return p, err
	}
}

// resolvedSchema returns the parsed Schema.
var resolvedSchema = sync.OnceValue(func() *resolved.Schema {
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

// The limits of a policy file. Cedar's parser recurses for each bracket: without a limit, deep
// brackets would exhaust the stack, which ends the process.
const (
	maxText  = 256 << 10 // bytes
	maxDepth = 64        // nested brackets
)

// spans yields the first and the last offset of each string, comment and other byte of a text.
func spans(text []byte) iter.Seq2[int, int] {
	return func(yield func(int, int) bool) {
		for i := 0; i < len(text); i++ {
			end := i
			switch rest := text[i:]; {
			case bytes.HasPrefix(rest, []byte("//")):
				if end += bytes.IndexByte(rest, '\n'); end < i {
					return // the last line
				}
			case bytes.HasPrefix(rest, []byte("/*")):
				if n := bytes.Index(rest[2:], []byte("*/")); n >= 0 {
					end += n + 3
				}
			case rest[0] == '"':
				for end++; end < len(text) && text[end] != '"'; end++ {
					if text[end] == '\\' {
						end++
					}
				}
			}
			if !yield(i, end) {
				return
			}
			i = end
		}
	}
}

// code yields the bytes of a text outside of strings and comments, with their offsets.
func code(text []byte) iter.Seq2[int, byte] {
	return func(yield func(int, byte) bool) {
		for i, end := range spans(text) {
			if i == end && !yield(i, text[i]) {
				return
			}
		}
	}
}

// unbalanced returns a sentence about the first bracket without its other half, or about a string
// without its end, and the offset.
func unbalanced(text []byte) (at int, sentence string) {
	var open []int
	for i, end := range spans(text) {
		switch c := text[i]; c {
		case '"':
			if end >= len(text) {
				return i, "the string is not closed: a quote is missing at its end"
			}
		case '(', '[', '{':
			if open = append(open, i); len(open) > maxDepth {
				return i, fmt.Sprintf("brackets nest more than %d deep", maxDepth)
			}
		case ')', ']', '}':
			other := map[byte]byte{')': '(', ']': '[', '}': '{'}[c]
			if len(open) == 0 {
				return i, fmt.Sprintf("the bracket %c closes nothing: remove it, or add the opening %c", c, other)
			}
			last := open[len(open)-1]
			if open = open[:len(open)-1]; text[last] != other {
				return last, fmt.Sprintf("the bracket %c is not closed before a %c follows", text[last], c)
			}
		}
	}
	if len(open) > 0 {
		last := open[len(open)-1]
		return last, fmt.Sprintf("the bracket %c is not closed", text[last])
	}
	return 0, ""
}

// Parse reads rules and validates them against the schema. Errors name the line in file.
func Parse(file string, text []byte) (*Policy, error) {
	if len(text) > maxText {
		return nil, fmt.Errorf("policy: %s: it has more than %d bytes", file, maxText)
	}
	fail := func(line int, format string, args ...any) (*Policy, error) {
		return nil, fmt.Errorf("policy: %s:%d: %s", file, line, fmt.Sprintf(format, args...))
	}
	if bytes.HasPrefix(text, []byte("\ufeff")) {
		return fail(1, "the text begins with a byte order mark: save it as UTF-8 without one")
	}
	if at, sentence := unbalanced(text); sentence != "" {
		return fail(1+bytes.Count(text[:at], []byte("\n")), "%s", sentence)
	}
	list, err := cedar.NewPolicyListFromBytes(file, text)
	// A number out of range is the only error without a place from cedar-go.
	if large, is := errors.AsType[*strconv.NumError](err); is {
		at := max(0, bytes.Index(text, []byte(strings.TrimPrefix(large.Num, "-"))))
		return fail(1+bytes.Count(text[:at], []byte("\n")), "the number %s is out of range", large.Num)
	} else if err != nil {
		text := strings.TrimPrefix(strings.TrimPrefix(oneLine(err), "parser error: "), "parse error at ")
		return nil, fmt.Errorf("policy: %s", strings.Replace(text, "<input>", file, 1))
	}
	p := &Policy{
		Hash:   sha256.Sum256(text),
		Text:   text,
		rules:  cedar.NewPolicySet(),
		heads:  heads{},
		narrow: map[cedar.PolicyID]bool{},
	}
	p.readsUsed = p.mentions("used")
	unprintable := func(r rune) bool { return !strconv.IsPrint(r) }
	validator := validate.New(resolvedSchema())
	for _, rule := range list {
		tree, at := (*ast.Policy)(rule.AST()), rule.Position()
		id, given := rule.Annotations()["id"]
		switch {
		case !given && p.rules.Get(cedar.PolicyID(fmt.Sprintf("line %d", at.Line))) == nil:
			id = cedar.String(fmt.Sprintf("line %d", at.Line))
		case !given:
			id = cedar.String(fmt.Sprintf("line %d:%d", at.Line, at.Column))
		case id == "" || len(id) > maxID || strings.ContainsFunc(string(id), unprintable):
			return fail(at.Line, "@id must have 1 to %d bytes that can be printed", maxID)
		}
		if !p.rules.Add(cedar.PolicyID(id), rule) {
			return fail(at.Line, "another rule has the id %q already", string(id))
		}
		if err := validator.Policy(string(id), tree); err != nil {
			return fail(at.Line, "%s", mismatch(string(id), err))
		}
		if err := checkMembership(tree); err != nil {
			return fail(at.Line, "%v", err)
		}
		p.heads.add(cedar.PolicyID(id), *tree)
		p.Verifies = p.Verifies || names(tree, verifyAction)
		_, principal := tree.Principal.(ast.ScopeTypeEq)
		_, action := tree.Action.(ast.ScopeTypeEq)
		_, resource := tree.Resource.(ast.ScopeTypeEq)
		p.narrow[cedar.PolicyID(id)] = principal && action && resource
	}
	return p, nil
}

var verifyAction = cedar.NewEntityUID("Action", Verify)

// names reports whether the scope or a condition of a rule names an action.
func names(tree *ast.Policy, action cedar.EntityUID) (named bool) {
	all := ast.NewNode(scopeCondition("action", tree.Action))
	for _, c := range tree.Conditions {
		all = all.And(ast.NewNode(c.Body))
	}
	ast.Inspect(all, func(n ast.IsNode) bool {
		v, _ := n.(ast.NodeValue)
		named = named || v.Value == action
		return !named
	})
	return named
}

// mismatch returns the first reason why a rule does not fit the schema. The validator reports most
// reasons twice, once for each action.
func mismatch(id string, err error) string {
	text := strings.ReplaceAll(err.Error(), fmt.Sprintf("for policy `%s`, ", id), "")
	for _, action := range []string{SignRaw, Sign, Verify} {
		text = strings.ReplaceAll(text, fmt.Sprintf(` in context for Action::"%s"`, action), " in context")
	}
	reason, _, _ := strings.Cut(text, "\n")
	if _, name, found := strings.Cut(reason, "access to optional attribute `"); found {
		name, _, _ = strings.Cut(name, "`")
		return fmt.Sprintf("%s may be absent: say \"context has %s &&\" before it, in the same clause", name, name)
	}
	return reason
}

// ids returns the ids of the rules in the order of the text.
func (p *Policy) ids() []cedar.PolicyID {
	return slices.SortedFunc(maps.Keys(maps.Collect(p.rules.All())), func(a, b cedar.PolicyID) int {
		return p.rules.Get(a).Position().Offset - p.rules.Get(b).Position().Offset
	})
}

// maxID bounds the id in a rule's annotation @id, in bytes.
const maxID = 64

// Rule is the source of one rule of a policy.
type Rule struct {
	ID          string // from the annotation @id, or "line 12"
	Line        int
	Text        string
	Permits     bool // the rule permits; otherwise, it forbids
	Conditional bool // the rule has conditions, which depend on the document and on what was used
}

// Rules lists the rules in the order of the text.
func (p *Policy) Rules() (all []Rule) {
	for _, id := range p.ids() {
		tree := (*ast.Policy)(p.rules.Get(id).AST())
		at := tree.Position
		rule := Rule{
			ID: string(id), Line: at.Line, Permits: tree.Effect == ast.EffectPermit,
			Conditional: len(tree.Conditions) > 0,
		}
		for i, c := range code(p.Text[at.Offset:]) {
			if c == ';' { // a rule has one semicolon, at its end
				rule.Text = string(p.Text[at.Offset:][:i+1])
				break
			}
		}
		all = append(all, rule)
	}
	return all
}

// Decide applies the rules to a request. Decide is a pure function of the rules and the request,
// and Replay compares the texts in a Fault with recorded ones: a change of a text would break the
// replay of older records.
func (p *Policy) Decide(r Request) Decision {
	if r.Action == Verify && !p.Verifies {
		return Decision{Allowed: true}
	}
	q := r.cedar(p.readsUsed)
	entities, rules := p.entities(r, q)
	decision, why := cedar.Authorize(rules, entities, q)
	var d Decision
	for _, reason := range why.Reasons {
		d.Rules = append(d.Rules, string(reason.PolicyID))
	}
	slices.Sort(d.Rules)
	narrow := func(reason cedar.DiagnosticReason) bool { return p.narrow[reason.PolicyID] }
	switch {
	case len(why.Errors) > 0: // a forbid that can't be evaluated must not allow the requests that it forbids
		first := slices.MinFunc(why.Errors, func(a, b cedar.DiagnosticError) int {
			return strings.Compare(string(a.PolicyID), string(b.PolicyID))
		})
		reason := oneLine(errors.New(first.Message))
		d.Fault = clipFault(fmt.Sprintf("%s can't be evaluated: %s", first.PolicyID, reason))
	case decision != cedar.Allow:
	case r.Action == SignRaw && !slices.ContainsFunc(why.Reasons, narrow):
		d.Fault = "raw needs a rule that names one peer, the action sign_raw and one key"
	default:
		d.Allowed = true
	}
	if decision == cedar.Allow && !d.Allowed {
		d.Rules = nil // permits, which decide nothing beside a fault
	}
	return d
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }
