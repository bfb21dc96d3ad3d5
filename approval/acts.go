package approval

import (
	"slices"
	"strings"

	"countersign/audit"
)

// The acts that need approval, by the names that proposals call them: acts that destroy, that widen,
// or that accept a loss. Each is in the table gates.
const (
	ActPeerAdd          = "peer add"
	ActPolicyActivate   = "policy activate"
	ActRollbackAccept   = "rollback accept"
	ActHoldRelease      = "hold release"
	ActClockAccept      = "clock accept"
	ActKeyDestroy       = "key destroy"
	ActKeyCompromise    = "key compromise"
	ActKeyPresence      = "key presence"
	ActRetentionShorten = "retention shorten"
	ActOperatorAdd      = "operator add"
	ActOperatorRoles    = "operator roles"
	ActOperatorRemove   = "operator remove"
	ActCredentialAdd    = "credential add"
	ActCredentialRemove = "credential remove"
	ActApprovalsNeeded  = "approvals needed"
)

// gate says by which event an act is recognised in the log, and what its proposal must say.
type gate struct {
	act   string
	event audit.Type
	// does reports that an event of the type is this act; nil: always.
	does func(m map[string]string) bool
	// want are the parameters that the proposal must have, with the values of the event.
	want func(resource string, m map[string]string) []Parameter
}

// is reports that a metadata entry has a value.
func is(name, value string) func(m map[string]string) bool {
	return func(m map[string]string) bool { return m[name] == value }
}

func versionOf(resource string, _ map[string]string) []Parameter {
	key, version, _ := strings.Cut(resource, "/")
	return []Parameter{{"key", key}, {"version", version}}
}

func nameOf(resource string, _ map[string]string) []Parameter {
	return []Parameter{{"name", resource}}
}

// gates is the table of all acts that need approval. The replay of a log runs by it, and tests hold
// package operators, package admin and the transitions of keys against it.
var gates = []gate{
	{ActPeerAdd, audit.PeerAdded, nil, func(resource string, m map[string]string) []Parameter {
		return []Parameter{{"name", resource}, {"public_key", m["public_key"]}}
	}},
	{ActPolicyActivate, audit.PolicyChanged, nil, func(_ string, m map[string]string) []Parameter {
		return []Parameter{{"sha256", m["sha256"]}}
	}},
	{ActRollbackAccept, audit.RollbackAccepted, nil, func(_ string, m map[string]string) []Parameter {
		return []Parameter{{"reason", m["reason"]}}
	}},
	{ActHoldRelease, audit.LegalHoldReleased, nil, func(resource string, m map[string]string) []Parameter {
		return []Parameter{{"epoch", strings.TrimPrefix(resource, "epoch/")}, {"reason", m["reason"]}}
	}},
	{ActClockAccept, audit.ClockAccepted, nil, nil},
	{ActKeyDestroy, audit.KeyStateChanged, is("to", "destroyed"), versionOf},
	{ActKeyCompromise, audit.KeyStateChanged, is("to", "compromised"), versionOf},
	{ActKeyPresence, audit.LineChanged, is("presence_lowered", "yes"), func(resource string, m map[string]string) []Parameter {
		return []Parameter{{"key", resource}, {"seconds", m["presence"]}}
	}},
	{ActRetentionShorten, audit.RetentionChanged, is("shortened", "yes"), nil},
	{ActOperatorAdd, audit.OperatorChanged, is("change", ChangeAdded), nameOf},
	{ActOperatorRoles, audit.OperatorChanged, is("change", ChangeRoles), nameOf},
	{ActOperatorRemove, audit.OperatorChanged, is("change", ChangeRemoved), nameOf},
	{ActCredentialAdd, audit.OperatorChanged, is("change", ChangeCredentialAdded), nameOf},
	{ActCredentialRemove, audit.OperatorChanged, is("change", ChangeCredentialRemoved), nameOf},
	{ActApprovalsNeeded, audit.ApprovalsChanged, nil, func(_ string, m map[string]string) []Parameter {
		return []Parameter{{"needed", m["needed"]}}
	}},
}

// The changes of an operator that an event OperatorChanged can name.
const (
	ChangeAdded             = "added"
	ChangeRoles             = "roles"
	ChangeRemoved           = "removed"
	ChangeCredentialAdded   = "credential added"
	ChangeCredentialRemoved = "credential removed"
)

// Acts lists all acts that need approval, in alphabetical order.
func Acts() (all []string) {
	for _, g := range gates {
		all = append(all, g.act)
	}
	slices.Sort(all)
	return all
}

// NeedsApproval returns the act that an event carries out, or "" where the event needs no approval.
func NeedsApproval(e audit.Event) (act string) {
	g, _ := gateOf(e)
	return g.act
}

// gateOf finds the gate of an event. A change of an operator that no gate knows has a gate without an
// act, which no proposal fits.
func gateOf(e audit.Event) (g gate, gated bool) {
	for _, g := range gates {
		if g.event == e.Type && (g.does == nil || g.does(e.Metadata)) {
			return g, true
		}
	}
	return gate{}, e.Type == audit.OperatorChanged
}
