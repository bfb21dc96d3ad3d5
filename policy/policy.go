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
		fields := cedar.RecordMap{}
		maps.Copy(fields, context.Map())
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
	// Rules are the ids (see Rule) of those that decided: the permits of what is allowed, or the forbids of what is not. None: nothing
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
	// counts says that the rules may ask what is used: only then it is made for them, since it takes longer than all the rest.
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

// Bounds of a policy file: its bytes, and how deep brackets nest. Cedar's parser calls itself for each bracket; without bounds
// a file could use up the stack, which ends the process.
const (
	maxText  = 256 << 10
	maxDepth = 64
)

// code yields the bytes of a text that are in no string and no comment, with their places.
func code(text []byte) iter.Seq2[int, byte] {
	return func(yield func(int, byte) bool) {
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
			if end > i {
				i = end
			} else if !yield(i, text[i]) {
				return
			}
		}
	}
}

// Parse validates rules against the schema. file is for error messages, which name the line.
func Parse(file string, text []byte) (*Policy, error) {
	if len(text) > maxText {
		return nil, fmt.Errorf("policy: %s: it has more than %d bytes", file, maxText)
	}
	fail := func(line int, format string, args ...any) (*Policy, error) {
		return nil, fmt.Errorf("policy: %s:%d: %s", file, line, fmt.Sprintf(format, args...))
	}
	if bytes.HasPrefix(text, []byte("\ufeff")) {
		return fail(1, "it begins with a byte order mark: save it as UTF-8 without one")
	}
	depth := 0
	for i, c := range code(text) {
		switch c {
		case '(', '[', '{':
			if depth++; depth > maxDepth {
				return fail(1+bytes.Count(text[:i], []byte("\n")), "brackets nest more than %d deep", maxDepth)
			}
		case ')', ']', '}':
			depth--
		}
	}
	list, err := cedar.NewPolicyListFromBytes(file, text)
	if large, is := errors.AsType[*strconv.NumError](err); is { // the only error that cedar-go gives no place
		at := max(0, bytes.Index(text, []byte(strings.TrimPrefix(large.Num, "-"))))
		return fail(1+bytes.Count(text[:at], []byte("\n")), "the number %s is out of range", large.Num)
	} else if err != nil {
		text := strings.TrimPrefix(strings.TrimPrefix(oneLine(err), "parser error: "), "parse error at ")
		return nil, fmt.Errorf("policy: %s", strings.Replace(text, "<input>", file, 1))
	}
	p := &Policy{Hash: sha256.Sum256(text), Text: text, rules: cedar.NewPolicySet(), named: map[cedar.PolicyID]bool{}}
	p.counts = bytes.Contains(text, []byte("used")) || bytes.Contains(text, []byte(`\`)) // with which a name can be written otherwise
	validator := validate.New(vocabulary())
	for _, rule := range list {
		tree, at := (*ast.Policy)(rule.AST()), rule.Position()
		id, given := rule.Annotations()["id"]
		switch {
		case !given && p.rules.Get(cedar.PolicyID(fmt.Sprintf("line %d", at.Line))) == nil:
			id = cedar.String(fmt.Sprintf("line %d", at.Line))
		case !given:
			id = cedar.String(fmt.Sprintf("line %d:%d", at.Line, at.Column))
		case id == "" || len(id) > maxID || strings.ContainsFunc(string(id), func(r rune) bool { return !strconv.IsPrint(r) }):
			return fail(at.Line, "@id must have 1 to %d bytes that can be printed", maxID)
		}
		if !p.rules.Add(cedar.PolicyID(id), rule) {
			return fail(at.Line, "another rule has the id %q already", string(id))
		}
		if err := validator.Policy(string(id), tree); err != nil {
			return fail(at.Line, "%s", misfit(string(id), err))
		}
		_, principal := tree.Principal.(ast.ScopeTypeEq)
		_, action := tree.Action.(ast.ScopeTypeEq)
		_, resource := tree.Resource.(ast.ScopeTypeEq)
		p.named[cedar.PolicyID(id)] = principal && action && resource
	}
	return p, nil
}

// misfit is the first reason why a rule does not fit the schema; the others are mostly the same again, for the other action.
func misfit(id string, err error) string {
	text := strings.ReplaceAll(err.Error(), fmt.Sprintf("for policy `%s`, ", id), "")
	for _, action := range []string{SignRaw, Sign} {
		text = strings.ReplaceAll(text, fmt.Sprintf(` in context for Action::"%s"`, action), " in context")
	}
	reason, _, _ := strings.Cut(text, "\n")
	if _, name, found := strings.Cut(reason, "access to optional attribute `"); found {
		name, _, _ = strings.Cut(name, "`")
		return fmt.Sprintf("%s may be absent: say \"context has %s &&\" before it, in the same clause", name, name)
	}
	return reason
}

// ids are the rules' ids in the order of the text.
func (p *Policy) ids() []cedar.PolicyID {
	return slices.SortedFunc(maps.Keys(maps.Collect(p.rules.All())), func(a, b cedar.PolicyID) int {
		return p.rules.Get(a).Position().Offset - p.rules.Get(b).Position().Offset
	})
}

// maxID bounds the id that a rule may be given with @id, in bytes.
const maxID = 64

// Rule is one rule of a policy as it is written.
type Rule struct {
	ID   string // of its annotation @id, or "line 12"
	Line int
	Text string
}

// Rules lists them in the order of the text.
func (p *Policy) Rules() (all []Rule) {
	for _, id := range p.ids() {
		at := p.rules.Get(id).Position()
		rule := Rule{ID: string(id), Line: at.Line}
		for i, c := range code(p.Text[at.Offset:]) {
			if c == ';' { // there is no other in a rule
				rule.Text = string(p.Text[at.Offset:][:i+1])
				break
			}
		}
		all = append(all, rule)
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
