package approval

import (
	"slices"
	"strings"

	"countersign/audit"
)

// The acts that need approval, by the names that proposals use: acts that destroy, that widen a
// permission, or that accept a loss. Each act is in the table gates.
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

// gate connects an act with the event that records the act in the log.
type gate struct {
	act   string
	event audit.Type
	// matches reports that an event of the type records the act. A nil function matches each event.
	matches func(m map[string]string) bool
	// parameters returns the parameters that the proposal must have, with the values of the event.
	// A nil function asks for no parameter.
	parameters func(resource string, m map[string]string) []Parameter
}

// is matches events whose metadata entry has a value.
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

// gates is the table of all acts that need approval. The replay of a log uses the table, and tests
// hold package operators, package admin and the transitions of keys against the table.
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
	{ActKeyPresence, audit.LineChanged, is("presence_lowered", "yes"),
		func(resource string, m map[string]string) []Parameter {
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

// NeedsApproval returns the act that an event records, or "" if the event needs no approval.
func NeedsApproval(e audit.Event) (act string) {
	g, _ := gateOf(e)
	return g.act
}

// gateOf finds the gate of an event. An unknown change of an operator has a gate without an act,
// and no proposal fits that gate.
func gateOf(e audit.Event) (g gate, gated bool) {
	for _, g := range gates {
		if g.event == e.Type && (g.matches == nil || g.matches(e.Metadata)) {
			return g, true
		}
	}
	return gate{}, e.Type == audit.OperatorChanged
}
