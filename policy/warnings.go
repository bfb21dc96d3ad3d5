package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// Warning is a doubt about a rule that may be right.
type Warning struct {
	Line int    `json:"line"`
	Rule string `json:"rule"`
	Text string `json:"text"`
}

func (w Warning) String() string {
	if at := fmt.Sprintf("line %d", w.Line); !strings.HasPrefix(w.Rule, at) {
		return fmt.Sprintf("%s, %s: %s", at, w.Rule, w.Text)
	}
	return w.Rule + ": " + w.Text
}

// maxWarnings bounds the warnings about a policy.
const maxWarnings = 100

// Warnings lists at most 100 doubts about rules, in the order of the text: an amount without its
// currency, a text with * that is compared by ==, and a name that does not exist. known reports
// whether there is an entity of a type (Peer, Key, Group, KeyGroup) and name. Without known, names
// are not looked up.
func (p *Policy) Warnings(known func(entity, name string) bool) (all []Warning) {
	for _, id := range p.ids() {
		rule := p.rules.Get(id)
		warn := func(format string, args ...any) {
			w := Warning{rule.Position().Line, string(id), fmt.Sprintf(format, args...)}
			if len(all) < maxWarnings && !slices.Contains(all, w) {
				all = append(all, w)
			}
		}
		tree := (*ast.Policy)(rule.AST())
		read, named := map[string]bool{}, map[types.EntityUID]bool{}
		ast.Inspect(expression(tree), func(n ast.IsNode) bool {
			if at := place(n); at != "" {
				read[at] = true
			}
			switch n := n.(type) {
			case ast.NodeValue:
				if uid, is := n.Value.(types.EntityUID); is {
					named[uid] = true
				}
			case ast.NodeTypeEquals:
				for _, side := range []ast.IsNode{n.Left, n.Right} {
					v, _ := side.(ast.NodeValue)
					if text, is := v.Value.(types.String); is && strings.Contains(string(text), "*") {
						warn(`== %q compares the * as a character: for any text in its place, say like`, string(text))
					}
				}
			}
			return true
		})
		for _, e := range environments(tree) {
			for at := range read {
				if with := e.with(at); with != "" && !read["context."+with] {
					warn("it judges %s in whatever %s: name the %[2]s in the same rule, since each %[2]s has "+
						"sums of its own", lastPart(at), with)
				}
			}
		}
		if known != nil {
			for uid := range named {
				if !known(string(uid.Type), string(uid.ID)) {
					warn("there is no %s: correct the name, or enrol, create or set it", uid)
				}
			}
		}
	}
	slices.SortStableFunc(all, func(a, b Warning) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return strings.Compare(a.Text, b.Text)
	})
	return all
}

// expression returns the head and the conditions of a rule as one expression.
func expression(tree *ast.Policy) ast.Node {
	whole := ast.True()
	for variable, s := range map[string]ast.IsScopeNode{"principal": tree.Principal, "resource": tree.Resource} {
		whole = whole.And(ast.NewNode(scopeCondition(variable, s)))
	}
	for _, c := range tree.Conditions {
		whole = whole.And(ast.NewNode(c.Body))
	}
	return whole
}

// Naming returns the rules that name a group of a kind (OfPeers or OfKeys), in the order of the
// text.
func (p *Policy) Naming(of, group string) (rules []Rule) {
	uid := types.NewEntityUID(groupType, types.String(group))
	if of == OfKeys {
		uid.Type = keyGroupType
	}
	for _, each := range p.Rules() {
		found := false
		ast.Inspect(expression((*ast.Policy)(p.rules.Get(types.PolicyID(each.ID)).AST())), func(n ast.IsNode) bool {
			v, _ := n.(ast.NodeValue)
			named, is := v.Value.(types.EntityUID)
			found = found || is && named == uid
			return true
		})
		if found {
			rules = append(rules, each)
		}
	}
	return rules
}

func lastPart(place string) string { return place[strings.LastIndexByte(place, '.')+1:] }

// with returns the annotation @with of the attribute at a place.
func (e *environment) with(place string) string {
	names := strings.Split(place, ".")
	attribute := resolved.Attribute{Type: e.context}
	for i, name := range names {
		if i == 0 {
			if name != "context" {
				return ""
			}
			continue
		}
		record, _ := attribute.Type.(resolved.RecordType)
		attribute = record[types.String(name)]
	}
	return string(attribute.Annotations["with"])
}
