package keyring

import (
	"fmt"
	"slices"
	"strings"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/manage"
)

// State is where a version of a key is in its life.
type State string

const (
	// absent: the ledger has no record of the version.
	absent State = ""
	// making: the version is written down and being made. It counts for nothing, and after a crash it is
	// cleared away.
	making State = "making"
	// Pending: made and proven, and the next version of its key. It is announced when it has a time from
	// which it will be active.
	Pending State = "pending"
	// Active: the version that signs. A key has one at the most.
	Active State = "active"
	// VerifyOnly: its successor signs; for its grace time its own signatures are good.
	VerifyOnly State = "verify-only"
	// Archived: out of use, and still on its token.
	Archived State = "archived"
	// Compromised: the private key may be in other hands. No signature of the version is believed any more.
	Compromised State = "compromised"
	// Destroyed: the private key is gone.
	Destroyed State = "destroyed"
)

// outOfUse reports that the private key of such a version is not used any more.
func (s State) outOfUse() bool { return s == Archived || s == Compromised || s == Destroyed }

// accepted reports that a signature of such a version is good under the key's name.
func (s State) accepted() bool { return s == Active || s == VerifyOnly }

// Transition is a step from one state of a version to another.
type Transition struct {
	From, To State
	By       string       // the actor that may cause it: "daemon", "operator" or both
	Events   []audit.Type // of which one is written in the same transaction; none: the step counts for nothing yet
	Act      string       // the approved proposal that it needs; "": none
}

const either = "operator or daemon"

// Transitions are all steps that the state of a version can take. Ring.change refuses every other one.
var Transitions = []Transition{
	{absent, making, either, nil, ""},
	{making, absent, "daemon", []audit.Type{audit.KeyCreationFailed}, ""},
	{making, Pending, either, []audit.Type{audit.KeyCommitted, audit.RotationAnnounced}, ""},
	{making, Active, "operator", []audit.Type{audit.KeyCreated, audit.KeyImported}, ""},
	{Pending, Active, either, []audit.Type{audit.KeyRotated}, ""},
	{Active, VerifyOnly, either, []audit.Type{audit.KeyRotated}, ""},
	{VerifyOnly, Archived, either, []audit.Type{audit.KeyStateChanged}, ""},
	{Active, Compromised, "operator", []audit.Type{audit.KeyStateChanged}, approval.ActKeyCompromise},
	{VerifyOnly, Compromised, "operator", []audit.Type{audit.KeyStateChanged}, approval.ActKeyCompromise},
	{Archived, Compromised, "operator", []audit.Type{audit.KeyStateChanged}, approval.ActKeyCompromise},
	{Archived, Destroyed, "operator", []audit.Type{audit.KeyStateChanged}, approval.ActKeyDestroy},
	{Compromised, Destroyed, "operator", []audit.Type{audit.KeyStateChanged}, approval.ActKeyDestroy},
}

// approved refuses a step to a state that needs an approved proposal, where the actor carries out none.
func approved(to State, who audit.Actor) error {
	needs := slices.ContainsFunc(Transitions, func(t Transition) bool { return t.To == to && t.Act != "" })
	if needs && who.Proposal == 0 {
		return manage.ErrNotApproved
	}
	return nil
}

// transition finds a step in the table, and holds the actor against it.
func transition(from, to State, who audit.Actor) (t Transition, err error) {
	if err := approved(to, who); err != nil {
		return t, err
	}
	i := slices.IndexFunc(Transitions, func(t Transition) bool { return t.From == from && t.To == to })
	if i < 0 {
		return t, fmt.Errorf("%w: it is %s, and must be %s", manage.ErrConflict, from, before(to))
	}
	if t = Transitions[i]; !strings.Contains(t.By, who.Kind) {
		return t, fmt.Errorf("%w: to become %s is for the %s to cause", manage.ErrConflict, to, t.By)
	}
	return t, nil
}

// writtenBy reports that one of the events of a step is written with it.
func (t Transition) writtenBy(events []audit.Event) bool {
	return len(t.Events) == 0 || slices.ContainsFunc(events, func(e audit.Event) bool { return slices.Contains(t.Events, e.Type) })
}

// before lists the states from which a version can come to one: "active or archived".
func before(to State) string {
	var from []string
	for _, t := range Transitions {
		if t.To == to {
			from = append(from, string(t.From))
		}
	}
	return strings.Join(from, " or ")
}
