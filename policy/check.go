package policy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"math/big"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cedar-policy/cedar-go"
	cedarast "github.com/cedar-policy/cedar-go/ast"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// Pointless reports a rule with a condition that has one result only, or a rule that never applies.
// Such a rule is a mistake: a forbid that stops nothing, or a permit without the intended limit.
type Pointless struct {
	File   string
	Line   int    // of the rule
	Expr   string // the condition in Cedar; empty for the whole rule
	Always bool   // the condition always holds; otherwise never
}

func (p *Pointless) Error() string {
	at, expr := fmt.Sprintf("policy: %s:%d: ", p.File, p.Line), p.Expr
	if len(expr) > maxExpr {
		expr = strings.ToValidUTF8(expr[:maxExpr], "") + "…"
	}
	switch {
	case p.Expr == "":
		return at + "the rule never applies, since its conditions can't hold together: correct or remove it"
	case p.Always:
		return at + expr + " always holds and limits nothing: compare the values with countersign policy schema"
	}
	return at + expr + " can never hold: compare the names and values with countersign policy schema"
}

// maxExpr bounds the condition in an error, in bytes.
const maxExpr = 300

// Offer reads a policy that is to come into force. Beside the errors of Parse, Offer refuses
// comments that only cedar-go knows, conditions with one possible result, and rules that never
// apply (see Pointless). A text that is in force already, or was, is read by Parse.
func Offer(file string, text []byte) (*Policy, error) {
	p, err := Parse(file, text)
	if err != nil {
		return nil, err
	}
	return p, p.Check(file)
}

// Check makes the additional checks of Offer.
func (p *Policy) Check(file string) error {
	for i := range spans(p.Text) {
		if bytes.HasPrefix(p.Text[i:], []byte("/*")) {
			return fmt.Errorf("policy: %s:%d: Cedar has no /* */ comments: begin each line of a comment with //",
				file, 1+bytes.Count(p.Text[:i], []byte("\n")))
		}
	}
	for _, id := range p.ids() {
		rule := p.rules.Get(id)
		if bad := checkRule((*ast.Policy)(rule.AST())); bad != nil {
			bad.File, bad.Line = file, rule.Position().Line
			return bad
		}
	}
	return nil
}

// checkRule finds the first pointless condition of a rule. The rule is judged for each action to
// which it may apply. A condition is refused only if no action gives it the other result.
func checkRule(tree *ast.Policy) *Pointless {
	var conditions []ast.IsNode
	for _, c := range tree.Conditions {
		atoms(c.Body, func(n ast.IsNode) { conditions = append(conditions, n) })
	}
	holds, fails := make([]bool, len(conditions)), make([]bool, len(conditions))
	applies := false
	for _, e := range environments(tree) {
		for i, n := range conditions {
			t, f := e.cond(n, e.base)
			holds[i], fails[i] = holds[i] || t != nil, fails[i] || f != nil
		}
		s := e.base
		for _, c := range tree.Conditions {
			if s == nil {
				break
			}
			t, f := e.cond(c.Body, s)
			if s = t; c.Condition == ast.ConditionUnless {
				s = f
			}
		}
		applies = applies || s != nil
	}
	for i, n := range conditions {
		if _, literal := n.(ast.NodeValue); literal {
			continue
		}
		if !holds[i] {
			return &Pointless{Expr: source(n)}
		}
		if !fails[i] && saysTooLittle(n) {
			return &Pointless{Expr: source(n), Always: true}
		}
	}
	if !applies {
		return &Pointless{}
	}
	return nil
}

// saysTooLittle reports whether a condition is a mistake if it always holds. A has of an attribute
// that is always there, or a comparison with the only value of the scope, is none.
func saysTooLittle(n ast.IsNode) bool {
	switch n := n.(type) {
	case ast.NodeTypeNotEquals, ast.NodeTypeLessThan, ast.NodeTypeLessThanOrEqual,
		ast.NodeTypeGreaterThan, ast.NodeTypeGreaterThanOrEqual:
		return true
	case ast.NodeTypeOr: // such as: weekday != "Saturday" || weekday != "Sunday"
		return saysTooLittle(n.Left) && saysTooLittle(n.Right)
	}
	return false
}

// atoms calls visit for each comparison in an expression, inner ones first, and for each chain of
// && or of ||. An element of a set is a comparison of its own.
func atoms(n ast.IsNode, visit func(ast.IsNode)) {
	each := func(all ...ast.IsNode) {
		for _, a := range all {
			atoms(a, visit)
		}
	}
	switch n := n.(type) {
	case ast.NodeTypeAnd: // the inner parts of a chain are not visited: long chains would take long
		each(chain(n, func(n ast.NodeTypeAnd) ast.BinaryNode { return n.BinaryNode })...)
	case ast.NodeTypeOr:
		each(chain(n, func(n ast.NodeTypeOr) ast.BinaryNode { return n.BinaryNode })...)
	case ast.NodeTypeNot:
		each(n.Arg)
		return
	case ast.NodeTypeIfThenElse:
		each(n.If)
		if isCondition(n.Then) && isCondition(n.Else) {
			each(n.Then, n.Else)
		}
		return
	case ast.NodeTypeContains:
		for _, element := range elements(n.Left) {
			visit(equals(element, n.Right))
		}
	case ast.NodeTypeIn:
		for _, element := range elements(n.Right) {
			visit(membership(n.Left, element))
		}
	case ast.NodeTypeIsIn:
		for _, element := range elements(n.Entity) {
			visit(membership(n.Left, element))
		}
	}
	if isCondition(n) {
		visit(n)
	}
}

// chain returns the parts of a chain such as a && b && c, which is a tree to the left.
func chain[N ast.IsNode](n N, sides func(N) ast.BinaryNode) []ast.IsNode {
	parts := []ast.IsNode{sides(n).Right}
	for left, more := sides(n).Left.(N); more; left, more = sides(n).Left.(N) {
		n, parts = left, append(parts, sides(left).Right)
	}
	parts = append(parts, sides(n).Left)
	slices.Reverse(parts)
	return parts
}

func isCondition(n ast.IsNode) bool {
	switch n := n.(type) {
	case ast.NodeValue:
		_, is := n.Value.(types.Boolean)
		return is
	case ast.NodeTypeAnd, ast.NodeTypeOr, ast.NodeTypeNot, ast.NodeTypeEquals, ast.NodeTypeNotEquals,
		ast.NodeTypeLessThan, ast.NodeTypeLessThanOrEqual, ast.NodeTypeGreaterThan,
		ast.NodeTypeGreaterThanOrEqual, ast.NodeTypeIn, ast.NodeTypeContains, ast.NodeTypeContainsAny,
		ast.NodeTypeContainsAll, ast.NodeTypeIsEmpty, ast.NodeTypeLike, ast.NodeTypeIs,
		ast.NodeTypeIsIn, ast.NodeTypeHas:
		return true
	}
	return false
}

func elements(n ast.IsNode) []ast.IsNode {
	set, _ := n.(ast.NodeTypeSet)
	return set.Elements
}

func equals(a, b ast.IsNode) ast.IsNode {
	return ast.NodeTypeEquals{BinaryNode: ast.BinaryNode{Left: a, Right: b}}
}

// membership returns the condition that an entity is an element of a set, or in a group of the set.
func membership(a, b ast.IsNode) ast.IsNode {
	if isGroup(b) {
		return ast.NodeTypeIn{BinaryNode: ast.BinaryNode{Left: a, Right: b}}
	}
	return equals(a, b)
}

// source returns an expression as Cedar text in one line.
func source(n ast.IsNode) string {
	rule := ast.Permit().When(ast.NewNode(n))
	text := string(cedar.NewPolicyFromAST((*cedarast.Policy)(rule)).MarshalCedar())
	_, text, _ = strings.Cut(text, "when {")
	return strings.Join(strings.Fields(strings.TrimSuffix(strings.TrimSpace(text), "};")), " ")
}

// domain is a set of values, or a larger set than the true one: nothing is refused because of a
// domain that is too large.
type domain struct {
	kind   byte // 'n' number, 's' text, 'e' entity, '?' anything, 'x' no value: the attribute is not there
	lo, hi int64
	entity types.EntityType
	only   []string // all texts; nil without a list
	not    []string // texts outside
	form   *regexp.Regexp
	whole  resolved.IsType // a record's type
}

var anything = domain{kind: '?'}

func one(text string) domain { return domain{kind: 's', only: []string{text}} }

func (d domain) has(text string) bool {
	return (d.only == nil || slices.Contains(d.only, text)) && !slices.Contains(d.not, text) &&
		(d.form == nil || d.form.MatchString(text))
}

// empty reports that no value is left.
func (d domain) empty() bool {
	switch d.kind {
	case 'n':
		return d.lo > d.hi
	case 's', 'e':
		return d.only != nil && len(d.left()) == 0
	}
	return d.kind == 'x'
}

// single returns the only text of a domain.
func (d domain) single() (string, bool) {
	if left := d.left(); len(left) > 0 && !slices.ContainsFunc(left, func(s string) bool { return s != left[0] }) {
		return left[0], true
	}
	return "", false
}

// left returns the listed texts that are not excluded.
func (d domain) left() []string {
	all := d
	all.only = nil
	return slices.DeleteFunc(slices.Clone(d.only), func(s string) bool { return !all.has(s) })
}

// meet returns the values that are in both domains.
func (d domain) meet(o domain) domain {
	switch {
	case d.kind == 'x' || o.kind == 'x':
		return domain{kind: 'x'}
	case d.kind == '?':
		return o
	case o.kind == '?':
		return d
	case d.kind != o.kind || d.entity != o.entity:
		return domain{kind: 'x'}
	case d.kind == 'n':
		d.lo, d.hi = max(d.lo, o.lo), min(d.hi, o.hi)
		return d
	}
	if o.only != nil {
		d, o = o, d
	}
	d.not = slices.Concat(d.not, o.not)
	if d.only != nil {
		d.only = slices.DeleteFunc(slices.Clone(d.only), func(s string) bool { return !o.has(s) })
	}
	return d
}

// without removes the value of a domain with one value.
func (d domain) without(o domain) domain {
	if text, is := o.single(); is && (d.kind == 's' || d.kind == 'e') && d.kind == o.kind && d.entity == o.entity {
		d.not = append(slices.Clone(d.not), text)
	} else if d.kind == 'n' && o.kind == 'n' && o.lo == o.hi {
		switch o.lo {
		case d.lo:
			if d.lo++; d.lo == math.MinInt64 {
				return domain{kind: 'x'}
			}
		case d.hi:
			d.hi--
		}
	}
	return d
}

// state has what is known of the places (such as context.hour) at a point of the evaluation. A
// place without an entry has all its values. nil: the point is never reached.
type state map[string]domain

func (s state) with(place string, d domain) state {
	if s == nil || d.empty() {
		return nil
	}
	if place == "" {
		return s
	}
	s = maps.Clone(s)
	s[place] = d
	return s
}

// join returns what holds in either of two states.
func (e *environment) join(a, b state) state {
	if a == nil || b == nil {
		if a == nil {
			return b
		}
		return a
	}
	both := state{}
	for place, x := range a {
		y, ok := b[place]
		switch {
		case !ok || x.kind != y.kind || x.entity != y.entity:
		case x.kind == 'n':
			x.lo, x.hi = min(x.lo, y.lo), max(x.hi, y.hi)
			both[place] = x
		case x.only != nil && y.only != nil:
			e.work -= len(x.only)*(1+len(x.not)) + len(y.only)*(1+len(y.not)+len(x.only))
			only := x.left()
			for _, s := range y.left() {
				if !slices.Contains(only, s) {
					only = append(only, s)
				}
			}
			both[place] = domain{kind: x.kind, entity: x.entity, only: only}
		case x.only == nil && y.only == nil:
			e.work -= len(x.not) * (1 + len(y.not))
			x.not = slices.DeleteFunc(slices.Clone(x.not), y.has)
			if x.form != y.form {
				x.form = nil
			}
			both[place] = x
		}
	}
	return both
}

// environment is a possible action with the types of its principal, resource and context.
type environment struct {
	action              types.EntityUID
	principal, resource types.EntityType
	context             resolved.RecordType
	base                state
	work                int // steps that are left of maxWork
}

// maxWork bounds the steps for a rule and an environment, some 0.1 s. The rest is then not
// judged, so that no policy can occupy the daemon.
const maxWork = 4_000_000

// neverOf has the transcript types of which no document comes to an action.
var neverOf = map[string][]string{
	Sign: {"raw"},
	// The signed bytes of these types do not have the nonce.
	Verify: {"raw", "paykit-http-signature-v1", "paykit-noise-key-authorization-v1"},
}

// environments lists the environments that a rule's scope allows.
func environments(tree *ast.Policy) (all []*environment) {
	for uid, action := range resolvedSchema().Actions {
		if action.AppliesTo == nil {
			continue
		}
		for _, principal := range action.AppliesTo.Principals {
			for _, resource := range action.AppliesTo.Resources {
				e := &environment{uid, principal, resource, action.AppliesTo.Context, state{}, maxWork}
				if transcript := e.get("context.transcript", e.base); transcript.kind == 's' {
					if never := neverOf[string(uid.ID)]; uid.ID == SignRaw {
						transcript = one("raw")
					} else {
						transcript.not = append(slices.Clone(transcript.not), never...)
					}
					e.base = e.base.with("context.transcript", transcript)
				}
				scopes := map[string]ast.IsScopeNode{
					"principal": tree.Principal, "action": tree.Action, "resource": tree.Resource,
				}
				for variable, scope := range scopes {
					if e.base == nil {
						break
					}
					e.base, _ = e.cond(scopeCondition(variable, scope), e.base)
				}
				if e.base != nil {
					all = append(all, e)
				}
			}
		}
	}
	return all
}

// scopeCondition returns a part of a rule's scope as a condition.
func scopeCondition(variable string, scope ast.IsScopeNode) ast.IsNode {
	v := ast.NewNode(ast.NodeTypeVariable{Name: types.String(variable)})
	switch s := scope.(type) {
	case ast.ScopeTypeEq:
		return v.Equal(ast.Value(s.Entity)).AsIsNode()
	case ast.ScopeTypeIn:
		return v.In(ast.Value(s.Entity)).AsIsNode()
	case ast.ScopeTypeInSet:
		var set []ast.Node
		for _, uid := range s.Entities {
			set = append(set, ast.Value(uid))
		}
		return v.In(ast.Set(set...)).AsIsNode()
	case ast.ScopeTypeIs:
		return v.Is(s.Type).AsIsNode()
	case ast.ScopeTypeIsIn:
		return v.IsIn(s.Type, ast.Value(s.Entity)).AsIsNode()
	}
	return ast.True().AsIsNode()
}

// forms has the compiled expressions of the annotation @form.
var forms sync.Map

// form returns the expression of @form, the same one for the same text.
func form(a resolved.Annotations) *regexp.Regexp {
	if a["form"] == "" {
		return nil
	}
	compiled, ok := forms.Load(a["form"])
	if !ok {
		compiled, _ = forms.LoadOrStore(a["form"], regexp.MustCompile(`^(?:`+string(a["form"])+`)$`))
	}
	return compiled.(*regexp.Regexp)
}

// domainOf returns the values of an attribute, by its type and annotations.
func domainOf(a resolved.Attribute) domain {
	switch t := a.Type.(type) {
	case resolved.LongType:
		d := domain{kind: 'n', lo: math.MinInt64, hi: math.MaxInt64}
		if lo, hi, ok := strings.Cut(string(a.Annotations["range"]), ".."); ok {
			d.lo, _ = strconv.ParseInt(lo, 10, 64)
			d.hi, _ = strconv.ParseInt(hi, 10, 64)
		}
		return d
	case resolved.StringType:
		d := domain{kind: 's', form: form(a.Annotations)}
		if values := a.Annotations["values"]; values != "" {
			d.only = strings.Fields(string(values))
		}
		return d
	case resolved.EntityType:
		entity := types.EntityType(t)
		return domain{kind: 'e', entity: entity, form: form(resolvedSchema().Entities[entity].Annotations)}
	case resolved.RecordType:
		return domain{kind: '?', whole: t}
	}
	return anything
}

// get returns the values of a place in a state.
func (e *environment) get(place string, s state) domain {
	if d, ok := s[place]; ok {
		return d
	}
	name, rest, inside := strings.Cut(place, ".")
	switch name {
	case "principal":
		return domainOf(resolved.Attribute{Type: resolved.EntityType(e.principal)})
	case "resource":
		return domainOf(resolved.Attribute{Type: resolved.EntityType(e.resource)})
	case "action":
		return domain{kind: 'e', entity: e.action.Type, only: []string{string(e.action.ID)}}
	}
	attribute := resolved.Attribute{Type: e.context}
	for inside {
		record, is := attribute.Type.(resolved.RecordType)
		if !is {
			return anything
		}
		name, rest, inside = strings.Cut(rest, ".")
		var ok bool
		if attribute, ok = record[types.String(name)]; !ok {
			return domain{kind: 'x'}
		}
	}
	return domainOf(attribute)
}

// place returns the name of the attribute or variable that an expression reads, or "".
func place(n ast.IsNode) string {
	switch n := n.(type) {
	case ast.NodeTypeVariable:
		return string(n.Name)
	case ast.NodeTypeAccess:
		if outer := place(n.Arg); outer != "" && !strings.Contains(string(n.Value), ".") {
			return outer + "." + string(n.Value)
		}
	}
	return ""
}

// value returns the values that an expression can have in a state.
func (e *environment) value(n ast.IsNode, s state) domain {
	if p := place(n); p != "" {
		if !strings.HasPrefix(p, "context") && strings.Contains(p, ".") {
			return anything
		}
		return e.get(p, s)
	}
	numbers := func(b ast.BinaryNode, op func(z, x, y *big.Int) *big.Int) domain {
		x, y := e.value(b.Left, s), e.value(b.Right, s)
		if x.kind != 'n' || y.kind != 'n' {
			return anything
		}
		d := domain{kind: 'n', lo: math.MaxInt64, hi: math.MinInt64}
		for _, v := range []int64{x.lo, x.hi} {
			for _, w := range []int64{y.lo, y.hi} { // a result that overflows is an error
				r := clamp(op(new(big.Int), big.NewInt(v), big.NewInt(w)))
				d.lo, d.hi = min(d.lo, r), max(d.hi, r)
			}
		}
		return d
	}
	switch n := n.(type) {
	case ast.NodeValue:
		switch v := n.Value.(type) {
		case types.Long:
			return domain{kind: 'n', lo: int64(v), hi: int64(v)}
		case types.String:
			return one(string(v))
		case types.EntityUID:
			return domain{kind: 'e', entity: v.Type, only: []string{string(v.ID)}}
		}
	case ast.NodeTypeAdd:
		return numbers(n.BinaryNode, (*big.Int).Add)
	case ast.NodeTypeSub:
		return numbers(n.BinaryNode, (*big.Int).Sub)
	case ast.NodeTypeMult:
		return numbers(n.BinaryNode, (*big.Int).Mul)
	case ast.NodeTypeNegate:
		zero := ast.NodeValue{Value: types.Long(0)}
		return numbers(ast.BinaryNode{Left: zero, Right: n.Arg}, (*big.Int).Sub)
	}
	return anything
}

func clamp(n *big.Int) int64 {
	switch {
	case n.IsInt64():
		return n.Int64()
	case n.Sign() < 0:
		return math.MinInt64
	}
	return math.MaxInt64
}

// cond returns the states in which a condition holds and in which it does not, each nil if there
// is none. Neither state has the evaluations that end with an error.
func (e *environment) cond(n ast.IsNode, s state) (t, f state) {
	if s == nil {
		return nil, nil
	}
	if e.work -= 1 + len(s); e.work < 0 {
		return s, s
	}
	any := func(left ast.IsNode, with []ast.IsNode) (t, f state) {
		f = s
		for _, each := range with {
			var holds state
			holds, f = e.cond(equals(left, each), f)
			t = e.join(t, holds)
		}
		return t, f
	}
	switch n := n.(type) {
	case ast.NodeValue:
		if v, is := n.Value.(types.Boolean); is && bool(v) {
			return s, nil
		} else if is {
			return nil, s
		}
	case ast.NodeTypeNot:
		t, f = e.cond(n.Arg, s)
		return f, t
	case ast.NodeTypeAnd:
		lt, lf := e.cond(n.Left, s)
		rt, rf := e.cond(n.Right, lt)
		return rt, e.join(lf, rf)
	case ast.NodeTypeOr:
		lt, lf := e.cond(n.Left, s)
		rt, rf := e.cond(n.Right, lf)
		return e.join(lt, rt), rf
	case ast.NodeTypeIfThenElse:
		it, in := e.cond(n.If, s)
		tt, tf := e.cond(n.Then, it)
		et, ef := e.cond(n.Else, in)
		return e.join(tt, et), e.join(tf, ef)
	case ast.NodeTypeEquals:
		return e.equal(n.Left, n.Right, s)
	case ast.NodeTypeNotEquals:
		f, t = e.equal(n.Left, n.Right, s)
		return t, f
	case ast.NodeTypeLessThan:
		return e.less(n.Left, n.Right, s)
	case ast.NodeTypeGreaterThan:
		return e.less(n.Right, n.Left, s)
	case ast.NodeTypeLessThanOrEqual:
		f, t = e.less(n.Right, n.Left, s)
		return t, f
	case ast.NodeTypeGreaterThanOrEqual:
		f, t = e.less(n.Left, n.Right, s)
		return t, f
	case ast.NodeTypeIn:
		return e.in(n.Left, n.Right, s)
	case ast.NodeTypeIs:
		return e.is(n, s)
	case ast.NodeTypeIsIn:
		it, in := e.is(n.NodeTypeIs, s)
		tt, tf := e.in(n.Left, n.Entity, it)
		return tt, e.join(in, tf)
	case ast.NodeTypeContains:
		if set, literal := n.Left.(ast.NodeTypeSet); literal {
			return any(n.Right, set.Elements)
		}
	case ast.NodeTypeIsEmpty:
		if set, literal := n.Arg.(ast.NodeTypeSet); literal && len(set.Elements) > 0 {
			return nil, s
		}
	case ast.NodeTypeHas:
		return e.hasAttribute(n, s)
	case ast.NodeTypeLike:
		return e.like(n, s)
	}
	return s, s
}

// in judges membership. Only groups have members (see Decide). Each peer may be in each group of
// peers, and in no group of keys. Without a group, in means equality.
func (e *environment) in(left, right ast.IsNode, s state) (t, f state) {
	set, literal := right.(ast.NodeTypeSet)
	if !literal {
		set.Elements = []ast.IsNode{right}
	}
	f = s
	for _, each := range set.Elements {
		if isGroup(each) && e.mayHave(left, each, f) { // f stays: the entity may be in no group
			t = e.join(t, f)
			continue
		}
		var holds state
		holds, f = e.equal(left, each, f)
		t = e.join(t, holds)
	}
	return t, f
}

// mayHave reports whether an entity has the type of a group's members.
func (e *environment) mayHave(member, group ast.IsNode, s state) bool {
	if s == nil {
		return false
	}
	m, g := e.value(member, s), e.value(group, s)
	return slices.Contains(resolvedSchema().Entities[m.entity].ParentTypes, g.entity)
}

func (e *environment) is(n ast.NodeTypeIs, s state) (t, f state) {
	switch v := e.value(n.Left, s); {
	case s == nil || v.kind != 'e':
		return s, s
	case v.entity == n.EntityType:
		return s, nil
	}
	return nil, s
}

func (e *environment) equal(left, right ast.IsNode, s state) (t, f state) {
	if s == nil {
		return nil, nil
	}
	l, r := e.value(left, s), e.value(right, s)
	lp, rp := place(left), place(right)
	e.work -= (1+len(l.only))*(1+len(l.not)+len(r.not)) + (1+len(r.only))*(1+len(r.not)+len(l.not)+len(l.only))
	if e.work < 0 {
		return s, s
	}
	if l.kind == 'x' || r.kind == 'x' {
		return nil, nil
	}
	if lp != "" && lp == rp {
		return s, nil
	}
	same := l.meet(r)
	t = s.with(lp, same).with(rp, same)
	if a, is := l.single(); is && l.kind == r.kind && l.entity == r.entity {
		if b, is := r.single(); is && a == b {
			return t, nil
		}
	}
	if l.kind == 'n' && r.kind == 'n' && l.lo == l.hi && l.lo == r.lo && r.lo == r.hi {
		return t, nil
	}
	return t, s.with(lp, l.without(r)).with(rp, r.without(l))
}

// less judges left < right.
func (e *environment) less(left, right ast.IsNode, s state) (t, f state) {
	if s == nil {
		return nil, nil
	}
	l, r := e.value(left, s), e.value(right, s)
	lp, rp := place(left), place(right)
	switch {
	case l.kind == 'x' || r.kind == 'x':
		return nil, nil
	case l.kind != 'n' || r.kind != 'n':
		return s, s
	case lp != "" && lp == rp:
		return nil, s
	}
	if l.lo < r.hi {
		a, b := l, r
		a.hi, b.lo = min(l.hi, r.hi-1), max(r.lo, l.lo+1)
		t = s.with(lp, a).with(rp, b)
	}
	if l.hi >= r.lo {
		a, b := l, r
		a.lo, b.hi = max(l.lo, r.lo), min(r.hi, l.hi)
		f = s.with(lp, a).with(rp, b)
	}
	return t, f
}

func (e *environment) hasAttribute(n ast.NodeTypeHas, s state) (t, f state) {
	outer := place(n.Arg)
	if outer == "principal" || outer == "resource" || outer == "action" {
		return nil, s // entities have no attributes (see Decide)
	}
	record, is := e.get(outer, s).whole.(resolved.RecordType)
	if outer == "" || !is {
		return s, s
	}
	attribute, known := record[n.Value]
	switch {
	case !known:
		return nil, s
	case !attribute.Optional:
		return s, nil
	}
	presence := "has " + outer + "." + string(n.Value)
	d, ok := s[presence]
	if !ok {
		d = domain{kind: 'n', lo: 0, hi: 1}
	}
	there, absent := domain{kind: 'n', lo: 1, hi: 1}, domain{kind: 'n'}
	t, f = s.with(presence, d.meet(there)), s.with(presence, d.meet(absent))
	const transcript = "context.transcript"
	if of := strings.Fields(string(attribute.Annotations["of"])); len(of) > 0 && e.get(transcript, s).kind == 's' {
		t = t.with(transcript, e.get(transcript, s).meet(domain{kind: 's', only: of}))
	}
	return t, f
}

func (e *environment) like(n ast.NodeTypeLike, s state) (t, f state) {
	v := e.value(n.Arg, s)
	if v.kind == 'x' {
		return nil, nil
	}
	if e.work -= 100 * (1 + len(v.only)) * len(n.Value.MarshalCedar()); e.work < 0 {
		return s, s
	}
	if v.kind == 's' && v.only == nil && v.form != nil && !canMatch(v.form, n.Value) {
		return nil, s
	}
	if v.kind != 's' || v.only == nil {
		return s, s
	}
	yes, no := v, v
	matches := func(text string) bool { return n.Value.Match(types.String(text)) }
	yes.only = slices.DeleteFunc(slices.Clone(v.only), func(text string) bool { return !matches(text) })
	no.only = slices.DeleteFunc(slices.Clone(v.only), matches)
	return s.with(place(n.Arg), yes), s.with(place(n.Arg), no)
}

// canMatch reports whether a text of a form can match a pattern of like. canMatch walks through all
// pairs of a place in the form's program and a place in the pattern that one text can reach.
func canMatch(form *regexp.Regexp, pattern types.Pattern) bool {
	tree, err := syntax.Parse(form.String(), syntax.Perl)
	if err != nil {
		return true
	}
	program, err := syntax.Compile(tree.Simplify())
	if err != nil {
		return true
	}
	const star = -1
	var want []rune
	var parts []any
	if b, err := pattern.MarshalJSON(); err != nil || json.Unmarshal(b, &parts) != nil {
		return true
	}
	for _, part := range parts {
		if literal, is := part.(map[string]any); is {
			want = append(want, []rune(literal["Literal"].(string))...)
		} else {
			want = append(want, star)
		}
	}
	type pair struct{ at, next int }
	seen, walk := map[pair]bool{}, []pair{{program.Start, 0}}
	for len(walk) > 0 {
		p := walk[len(walk)-1]
		if walk = walk[:len(walk)-1]; seen[p] {
			continue
		}
		if seen[p] = true; len(seen) > maxWalk {
			return true
		}
		inStar := p.next < len(want) && want[p.next] == star
		if inStar {
			walk = append(walk, pair{p.at, p.next + 1}) // the star ends
		}
		in := program.Inst[p.at]
		switch in.Op {
		case syntax.InstMatch:
			if p.next == len(want) {
				return true
			}
		case syntax.InstAlt, syntax.InstAltMatch:
			walk = append(walk, pair{int(in.Out), p.next}, pair{int(in.Arg), p.next})
		case syntax.InstCapture, syntax.InstEmptyWidth, syntax.InstNop:
			walk = append(walk, pair{int(in.Out), p.next})
		case syntax.InstRune, syntax.InstRune1, syntax.InstRuneAny, syntax.InstRuneAnyNotNL:
			if inStar {
				walk = append(walk, pair{int(in.Out), p.next})
			} else if p.next < len(want) && in.MatchRune(want[p.next]) {
				walk = append(walk, pair{int(in.Out), p.next + 1})
			}
		}
	}
	return false
}

// maxWalk bounds the work for one pattern. A larger pattern counts as one that can match.
const maxWalk = 100_000
