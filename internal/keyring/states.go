package keyring

import (
	"fmt"
	"slices"
	"strings"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/manage"
	"countersign/wire"
)

// State is the state of a version in its life cycle.
type State string

const (
	// absent is the state of a version without a record.
	absent State = ""
	// making is the state between the record and the key on the token. The version counts for
	// nothing, and Recover clears the version away after a crash.
	making State = "making"
	// Pending is the state of the next version of a key, made and proven. A pending version with a
	// time of activation is announced.
	Pending State = wire.StatePending
	// Active is the state of the version that signs. A key has at most one active version.
	Active State = wire.StateActive
	// VerifyOnly is the state of a version whose successor is active: for the grace time,
	// signatures of the version are accepted.
	VerifyOnly State = wire.StateVerifyOnly
	// Archived is the state of a version that is out of use and still on its token.
	Archived State = wire.StateArchived
	// Compromised is the state of a version whose private key may be in other hands. No signature
	// of the version is believed any more.
	Compromised State = wire.StateCompromised
	// Destroyed is the state of a version whose private key is gone.
	Destroyed State = wire.StateDestroyed
)

// outOfUse reports that no private key of a version in the state is used any more.
func (s State) outOfUse() bool { return s == Archived || s == Compromised || s == Destroyed }

// name is the state in error texts.
func (s State) name() string {
	if s == absent {
		return "absent"
	}
	return string(s)
}

// accepted reports that the signatures of a version in the state are accepted under the key's name.
func (s State) accepted() bool { return s == Active || s == VerifyOnly }

// Transition is a step from one state of a version to another.
type Transition struct {
	From, To State
	By       string       // kinds of actors that may cause the step: "daemon", "operator" or both
	Events   []audit.Type // one of them is in the same transaction; nil: none, since the step counts for nothing yet
	Act      string       // act of the approved proposal that an operator needs for the step; "": none
}

const either = "operator or daemon"

// Transitions are all steps between the states of a version. Ring.change refuses every other step.
// docs/SPEC.md has the table too.
var Transitions = []Transition{
	{absent, making, either, nil, ""},
	{making, absent, "daemon", []audit.Type{audit.KeyCreationFailed}, ""},
	{making, Pending, either, []audit.Type{audit.KeyCommitted, audit.RotationAnnounced}, ""},
	{making, Active, either, []audit.Type{audit.KeyCreated, audit.KeyImported}, ""},
	{Pending, Active, either, []audit.Type{audit.KeyRotated}, ""},
	{Pending, Active, "operator", []audit.Type{audit.KeyRecovered}, approval.ActKeyRecover},
	{Pending, Archived, "operator", []audit.Type{audit.KeyRecovered}, approval.ActKeyRecover},
	{Pending, Archived, "operator", []audit.Type{audit.KeyCommitted}, approval.ActKeySafeguard},
	{Active, VerifyOnly, either, []audit.Type{audit.KeyRotated}, ""},
	{Active, VerifyOnly, "operator", []audit.Type{audit.KeyRecovered}, approval.ActKeyRecover},
	{VerifyOnly, Archived, either, []audit.Type{audit.KeyStateChanged}, approval.ActKeyArchive},
	{Active, Compromised, "operator", []audit.Type{audit.KeyStateChanged}, approval.ActKeyCompromise},
	{VerifyOnly, Compromised, "operator", []audit.Type{audit.KeyStateChanged}, approval.ActKeyCompromise},
	{Archived, Compromised, "operator", []audit.Type{audit.KeyStateChanged}, approval.ActKeyCompromise},
	{Archived, Destroyed, "operator", []audit.Type{audit.KeyStateChanged}, approval.ActKeyDestroy},
	{Compromised, Destroyed, "operator", []audit.Type{audit.KeyStateChanged}, approval.ActKeyDestroy},
}

// approved refuses a step without an approved proposal, if the steps to the state with one of these
// events need one. The daemon has no proposals: the steps that it may cause follow from settings
// and time.
func approved(to State, who audit.Actor, with ...audit.Type) error {
	needs := slices.ContainsFunc(Transitions, func(t Transition) bool {
		return t.To == to && t.Act != "" && t.writtenBy(with)
	})
	if needs && who.Proposal == 0 && who.Kind != "daemon" {
		return manage.ErrNotApproved
	}
	return nil
}

// transition returns nil if the table has a step with one of these events for the actor.
func transition(from, to State, who audit.Actor, with ...audit.Type) error {
	if err := approved(to, who, with...); err != nil {
		return err
	}
	listed := func(t Transition) bool { return t.From == from && t.To == to }
	if !slices.ContainsFunc(Transitions, listed) {
		return fmt.Errorf("%w: it is %s, and must be %s", manage.ErrConflict, from.name(), before(to))
	}
	i := slices.IndexFunc(Transitions, func(t Transition) bool { return listed(t) && t.writtenBy(with) })
	if i < 0 {
		return fmt.Errorf("%w: from %s to %s without its event", manage.ErrInvalid, from.name(), to.name())
	}
	if t := Transitions[i]; !strings.Contains(t.By, who.Kind) {
		return fmt.Errorf("%w: to become %s is for the %s to cause", manage.ErrConflict, to.name(), t.By)
	}
	return nil
}

// writtenBy reports that events has one of the step's events.
func (t Transition) writtenBy(events []audit.Type) bool {
	isOwn := func(e audit.Type) bool { return slices.Contains(t.Events, e) }
	return len(t.Events) == 0 || slices.ContainsFunc(events, isOwn)
}

// before lists the states from which a step leads to a state: "active or archived".
func before(to State) string {
	var from []string
	for _, t := range Transitions {
		if t.To == to && !slices.Contains(from, t.From.name()) {
			from = append(from, t.From.name())
		}
	}
	return strings.Join(from, " or ")
}
