package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"regexp"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	cedarast "github.com/cedar-policy/cedar-go/ast"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
)

// A group is a named set of peers, or of keys: Group::"shops" and KeyGroup::"invoices" in a rule. A
// decision depends on the groups of its own peer and key, and on no other member. So a Request has
// these names, a Record has them too, and a decision stays a pure function of rules and record.

// The kinds of groups, by what the members are.
const (
	OfPeers = "peers"
	OfKeys  = "keys"
)

// The bounds of groups. The members of a group are in one event of the audit log, which has at most
// 65,535 bytes. The groups of a peer and of a key are in a record of at most MaxRecord bytes.
const (
	MaxGroups       = 256      // in all
	MaxGroupsOf     = 8        // of one peer, and of one key
	MaxGroupName    = 40       // bytes
	MaxMembersBytes = 48 << 10 // of the text of a group: 1,600 names of 29 bytes
)

// Group is a set of peers or keys, by names.
type Group struct {
	Name    string
	Of      string   // OfPeers or OfKeys
	Members []string // in the order of bytes, each once, at least one
}

// NewGroup checks a group. The members may come in any order.
func NewGroup(name, of string, members []string) (Group, error) {
	fail := func(format string, args ...any) (Group, error) {
		return Group{}, fmt.Errorf("group %q: %w", clipName(name), fmt.Errorf(format, args...))
	}
	g := Group{Name: name, Of: of, Members: slices.Sorted(slices.Values(members))}
	switch {
	case len(name) > MaxGroupName || !memberForm.MatchString(name):
		return fail("the name of a group has 1 to %d lower-case letters, digits and hyphens, "+
			"and does not begin with a hyphen", MaxGroupName)
	case of != OfPeers && of != OfKeys:
		return fail("it is a group of %q: a group has %s or %s", clipName(of), OfPeers, OfKeys)
	case len(members) == 0:
		return fail("it has no member: remove the group instead")
	case len(g.Text()) > MaxMembersBytes:
		return fail("its names have %d bytes, and may have %d: divide it, since a peer may be in %d groups",
			len(g.Text()), MaxMembersBytes, MaxGroupsOf)
	}
	for i, member := range g.Members {
		if !memberForm.MatchString(member) {
			return fail("the member %q is not the name of a peer or a key", clipName(member))
		}
		if i > 0 && g.Members[i-1] == member {
			return fail("the member %q is there twice", member)
		}
	}
	return g, nil
}

var memberForm = regexp.MustCompile("^[a-z0-9][a-z0-9-]{0,63}$")

func clipName(name string) string { return name[:min(len(name), 64)] }

// ParseGroup reads the text of a group, and refuses every text that Text does not write.
func ParseGroup(name, of, text string) (Group, error) {
	g, err := NewGroup(name, of, strings.Split(text, ","))
	if err == nil && g.Text() != text {
		err = fmt.Errorf("group %q: its members are not in order", name)
	}
	return g, err
}

// Text returns the canonical text of the members, which approvers see: the names in order, with a
// comma between two of them.
func (g Group) Text() string { return strings.Join(g.Members, ",") }

// NoGroup stands in place of a digest for a group that does not exist.
const NoGroup = "none"

// Digest returns the SHA-256 of the text in hex, or NoGroup for a group without members.
func (g Group) Digest() string {
	if len(g.Members) == 0 {
		return NoGroup
	}
	sum := sha256.Sum256([]byte(g.Text()))
	return hex.EncodeToString(sum[:])
}

// groupsOf returns the names of the groups that have a member, in order. of is OfPeers or OfKeys.
func groupsOf(groups []Group, of, member string) (names []string) {
	for _, g := range groups {
		if _, is := slices.BinarySearch(g.Members, member); is && g.Of == of {
			names = append(names, g.Name)
		}
	}
	slices.Sort(names)
	return names
}

// InGroups returns the request with the groups of its peer and key among some.
func (r Request) InGroups(groups []Group) Request {
	r.PeerGroups, r.KeyGroups = groupsOf(groups, OfPeers, r.Peer), nil
	if r.Key != "" {
		r.KeyGroups = groupsOf(groups, OfKeys, r.Key)
	}
	return r
}

const (
	groupType    = types.EntityType("Group")
	keyGroupType = types.EntityType("KeyGroup")
)

// ancestors returns the groups of a peer or a key as entities.
func ancestors(of types.EntityType, names []string) []cedar.EntityUID {
	all := make([]cedar.EntityUID, len(names))
	for i, name := range names {
		all[i] = cedar.NewEntityUID(of, cedar.String(name))
	}
	return all
}

// heads are the rules of a policy by what their heads name. A head with ==, or with in and a group,
// holds for one peer, key or group only. The zero UID stands for a head that holds for all.
//
// The invariant: Decide evaluates each rule whose head can hold for the request. The head of any
// other rule is false, and Cedar evaluates no condition behind a false head: the rule neither
// decides nor fails.
type heads map[cedar.EntityUID]map[cedar.EntityUID][]ruled // by principal, by resource

type ruled struct {
	id cedar.PolicyID
	// rule is the rule without the parts of its head that have led to it: they hold.
	rule *cedar.Policy
}

func (h heads) add(id cedar.PolicyID, tree ast.Policy) {
	principal, resource := headOf(tree.Principal), headOf(tree.Resource)
	if !principal.IsZero() {
		tree.Principal = ast.ScopeTypeAll{}
	}
	if !resource.IsZero() {
		tree.Resource = ast.ScopeTypeAll{}
	}
	if h[principal] == nil {
		h[principal] = map[cedar.EntityUID][]ruled{}
	}
	rule := cedar.NewPolicyFromAST((*cedarast.Policy)(&tree))
	h[principal][resource] = append(h[principal][resource], ruled{id, rule})
}

// headOf returns the only entity for which, or for whose members, a part of a head holds; zero: the
// part holds for more.
func headOf(scope ast.IsScopeNode) cedar.EntityUID {
	switch s := scope.(type) {
	case ast.ScopeTypeEq:
		return s.Entity
	case ast.ScopeTypeIn:
		return s.Entity
	case ast.ScopeTypeIsIn:
		return s.Entity
	}
	return cedar.EntityUID{}
}

// rulesFor are the rules whose heads can hold for a request with some principals (the peer and its
// groups) and resources.
type rulesFor struct {
	heads                 heads
	principals, resources []cedar.EntityUID
}

// All implements cedar.PolicyIterator.
func (r rulesFor) All() iter.Seq2[cedar.PolicyID, *cedar.Policy] {
	return func(yield func(cedar.PolicyID, *cedar.Policy) bool) {
		for _, principal := range r.principals {
			byResource := r.heads[principal]
			if byResource == nil {
				continue
			}
			for _, resource := range r.resources {
				for _, each := range byResource[resource] {
					if !yield(each.id, each.rule) {
						return
					}
				}
			}
		}
	}
}

// members are the peer and the key of a request with their groups, for conditions that ask for
// groups. members implements cedar.EntityGetter.
type members [2]struct {
	uid    cedar.EntityUID
	groups []cedar.EntityUID
}

func (m members) Get(uid cedar.EntityUID) (cedar.Entity, bool) {
	for _, each := range m {
		if each.uid == uid {
			return cedar.Entity{UID: uid, Parents: cedar.NewEntityUIDSet(each.groups...)}, true
		}
	}
	return cedar.Entity{}, false
}

// entities returns the peer and the key of a request with their groups, and the rules whose heads
// can hold for the request.
func (p *Policy) entities(r Request, q cedar.Request) (members, rulesFor) {
	peerGroups, keyGroups := ancestors(groupType, r.PeerGroups), ancestors(keyGroupType, r.KeyGroups)
	return members{{q.Principal, peerGroups}, {q.Resource, keyGroups}}, rulesFor{
		heads:      p.heads,
		principals: slices.Concat(peerGroups, []cedar.EntityUID{{}, q.Principal}),
		resources:  slices.Concat(keyGroups, []cedar.EntityUID{{}, q.Resource}),
	}
}

// errMembership refuses a question about the groups of another entity than the peer or the key of
// the request: a decision does not know them.
var errMembership = errors.New(`a decision knows the groups of its own peer and key only: ` +
	`say principal in Group::"…", or resource in KeyGroup::"…"`)

// checkMembership finds a condition that asks for the groups of another entity.
func checkMembership(tree *ast.Policy) (err error) {
	own := func(left, right ast.IsNode) {
		variable, _ := left.(ast.NodeTypeVariable)
		for _, each := range append(elements(right), right) {
			if isGroup(each) && variable.Name != "principal" && variable.Name != "resource" {
				err = errMembership
			}
		}
	}
	for _, c := range tree.Conditions {
		ast.Inspect(ast.NewNode(c.Body), func(n ast.IsNode) bool {
			switch n := n.(type) {
			case ast.NodeTypeIn:
				own(n.Left, n.Right)
			case ast.NodeTypeIsIn:
				own(n.Left, n.Entity)
			}
			return err == nil
		})
	}
	return err
}

// isGroup reports whether an expression is the name of a group.
func isGroup(n ast.IsNode) bool {
	v, _ := n.(ast.NodeValue)
	uid, is := v.Value.(types.EntityUID)
	return is && (uid.Type == groupType || uid.Type == keyGroupType)
}

// Fitting returns the rules whose heads hold for a request, in the order of the text. The context
// of the request is not looked at.
func (p *Policy) Fitting(r Request) (all []Rule) {
	q := r.cedar(false)
	entities, rules := p.entities(r, q)
	texts := map[cedar.PolicyID]Rule{}
	for _, each := range p.Rules() {
		texts[cedar.PolicyID(each.ID)] = each
	}
	for id, rule := range rules.All() {
		tree := (*ast.Policy)(rule.AST())
		head := ast.Policy{
			Effect: tree.Effect, Principal: tree.Principal, Action: tree.Action, Resource: tree.Resource,
			Annotations: tree.Annotations, Position: tree.Position,
		}
		alone := head // as a permit, the head alone decides
		alone.Effect = ast.EffectPermit
		set := cedar.NewPolicySet()
		set.Add(id, cedar.NewPolicyFromAST((*cedarast.Policy)(&alone)))
		if decision, _ := cedar.Authorize(set, entities, q); decision == cedar.Allow {
			all = append(all, texts[id])
		}
	}
	slices.SortFunc(all, func(x, y Rule) int { return x.Line - y.Line })
	return all
}
