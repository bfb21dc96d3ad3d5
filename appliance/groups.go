package appliance

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/requestid"
	"countersign/policy"
)

// Rules of the policy name groups of peers and of keys. The invariant:
//
//   - The members of a group change as a whole, in one transaction with an event that has all of
//     them, and the SHA-256 of the members before. So the log alone says who was in which group at
//     each event. A change that was approved is carried out on the members that the approvers saw,
//     or not at all.
//   - A decision sees the groups of the transaction that admits: memory follows each commit before
//     anything else is decided. The record has the groups of the request's own peer and key. So
//     record and policy give the decision again, whatever the groups are by then.
//   - A group has names, as the text of a policy has. So neither a suspension, nor a removal, nor
//     another key of a peer changes a group. A peer that is enrolled under the name of a member is
//     a member, and the act peer add warns of that. To take the name out with the removal was
//     rejected: a rule that forbids something to a group would end for the next peer of the name.
//   - A new member is an enrolled peer or an existing key at the moment of the change.
//   - A peer is in at most policy.MaxGroupsOf groups, and so is a key: a record has room for them.

// groups has the groups in memory.
type groups struct {
	mu  sync.RWMutex // a holder must not wait for the ledger
	all map[string]Group
	of  map[member][]string // names of the groups of each member, in order
}

type member struct{ of, name string }

// Group is a group of the ledger.
type Group struct {
	policy.Group
	Changed time.Time
}

// groupRecord is the ledger's record of a group, under the name.
type groupRecord struct {
	Of      string `json:"of"`
	Members string `json:"members"` // policy.Group.Text
	Changed int64  `json:"changed"` // Unix seconds
}

func decodeGroup(name string, value []byte) (g Group, err error) {
	var r groupRecord
	if err = json.Unmarshal(value, &r); err == nil {
		g.Group, err = policy.ParseGroup(name, r.Of, r.Members)
	}
	if err != nil {
		return g, fmt.Errorf("group %q in the ledger: %w", name, err)
	}
	g.Changed = time.Unix(r.Changed, 0).UTC()
	return g, nil
}

// take updates memory from the record of a group. The ledger's writer holds mu.
func (g *groups) take(name string, value []byte) error {
	before := g.all[name]
	for _, each := range before.Members {
		m := member{before.Of, each}
		if left := slices.DeleteFunc(slices.Clone(g.of[m]), func(s string) bool { return s == name }); len(left) > 0 {
			g.of[m] = left
		} else {
			delete(g.of, m)
		}
	}
	delete(g.all, name)
	if value == nil {
		return nil
	}
	after, err := decodeGroup(name, value)
	if err != nil {
		return err
	}
	g.all[name] = after
	for _, each := range after.Members {
		m := member{after.Of, each}
		names := append(slices.Clone(g.of[m]), name) // a decision may still read the old list
		slices.Sort(names)
		g.of[m] = names
	}
	return nil
}

// in returns the names of the groups of a peer or a key, in order. The caller must not change them.
func (g *groups) in(of, name string) []string {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.of[member{of, name}]
}

// Groups returns all groups in the order of their names.
func (a *Appliance) Groups() []Group {
	a.groups.mu.RLock()
	defer a.groups.mu.RUnlock()
	return slices.SortedFunc(maps.Values(a.groups.all), func(x, y Group) int { return strings.Compare(x.Name, y.Name) })
}

// Group returns a group, or manage.ErrNotFound.
func (a *Appliance) Group(name string) (Group, error) {
	a.groups.mu.RLock()
	defer a.groups.mu.RUnlock()
	g, there := a.groups.all[name]
	if !there {
		return Group{}, fmt.Errorf("group %q: %w", ijson.Clip(name), manage.ErrNotFound)
	}
	return g, nil
}

// GroupsOf returns the names of the groups of a peer (policy.OfPeers) or a key (policy.OfKeys).
func (a *Appliance) GroupsOf(of, name string) []string { return slices.Clone(a.groups.in(of, name)) }

// CheckGroup refuses a change that SetGroup would refuse. The members before must have the digest
// replaces.
func (a *Appliance) CheckGroup(g policy.Group, replaces string) error {
	a.groups.mu.RLock()
	defer a.groups.mu.RUnlock()
	before, there := a.groups.all[g.Name]
	switch {
	case before.Digest() != replaces:
		return replaced(before, replaces)
	case there && before.Of != g.Of:
		return fmt.Errorf("group %q: %w: it is a group of %s: remove it before", g.Name, manage.ErrConflict, before.Of)
	case !there && len(a.groups.all) >= policy.MaxGroups:
		return fmt.Errorf("group %q: %w: there are %d groups, the most that there may be: remove one",
			g.Name, manage.ErrConflict, len(a.groups.all))
	}
	entity := map[string]string{policy.OfPeers: "Peer", policy.OfKeys: "Key"}[g.Of]
	for _, name := range g.Members {
		if _, old := slices.BinarySearch(before.Members, name); old {
			continue
		}
		if !a.KnowsName(entity, name) {
			return fmt.Errorf("group %q: %w: there is no %s::%q: correct the name, or enrol or create it before",
				g.Name, manage.ErrInvalid, entity, name)
		}
		if in := a.groups.of[member{g.Of, name}]; len(in) >= policy.MaxGroupsOf {
			return fmt.Errorf("group %q: %w: %q is in %d groups, the most that it may be in: take it out of one",
				g.Name, manage.ErrConflict, name, len(in))
		}
	}
	return nil
}

// replaced refuses a change of other members than the group has.
func replaced(g Group, replaces string) error {
	return fmt.Errorf("group: %w: it has the members with SHA-256 %s, and the change is one of %s: "+
		"it was changed meanwhile, so propose anew", manage.ErrConflict, g.Digest(), replaces)
}

// RulesAbout returns the rules of the policy in force that name a group.
func (a *Appliance) RulesAbout(g policy.Group) ([]policy.Rule, error) {
	rules, err := a.policies.inForce()
	if err != nil {
		return nil, err
	}
	return rules.Naming(g.Of, g.Name), nil
}

// SetGroup replaces the members of a group, or makes the group (replaces: policy.NoGroup). When
// SetGroup returns, no decision sees the members before.
func (a *Appliance) SetGroup(ctx context.Context, who audit.Actor, g policy.Group, replaces string) error {
	log := a.log.With(requestid.Attr(who.Request))
	return a.policies.activating.Run(ctx, log, fmt.Sprintf("group %q", g.Name), func(ctx context.Context) error {
		return a.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := a.CheckGroup(g, replaces); err != nil {
				return err
			}
			rec := groupRecord{g.Of, g.Text(), time.Now().Unix()}
			if err := tx.Put(ledger.Groups, g.Name, manage.Encode(rec)); err != nil {
				return err
			}
			return tx.Append(ledger.EventOf(audit.NewGroupChanged(who, g.Name, g.Of, rec.Members, replaces)))
		})
	})
}

// RemoveGroup removes a group with the members of a digest. Rules about the group hold for nobody
// from then on.
func (a *Appliance) RemoveGroup(ctx context.Context, who audit.Actor, name, replaces string) error {
	log := a.log.With(requestid.Attr(who.Request))
	return a.policies.activating.Run(ctx, log, fmt.Sprintf("group %q", name), func(ctx context.Context) error {
		return a.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := a.CheckGroupRemoval(name, replaces); err != nil {
				return err
			}
			if err := tx.Delete(ledger.Groups, name); err != nil {
				return err
			}
			return tx.Append(ledger.EventOf(audit.NewGroupRemoved(who, name, replaces)))
		})
	})
}

// CheckGroupRemoval refuses a removal that RemoveGroup would refuse.
func (a *Appliance) CheckGroupRemoval(name, replaces string) error {
	g, err := a.Group(name)
	if err == nil && g.Digest() != replaces {
		err = replaced(g, replaces)
	}
	return err
}
