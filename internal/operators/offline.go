package operators

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// Offline has the operators and the rules for approvals of a ledger that no daemon serves: that of
// a backup. The approvers sign the text of a proposal with their SSH keys, wherever they are, and
// the proposal with its approvals is written together with the act.
type Offline struct {
	appliance string
	people    roster
	next      uint64 // number of the next proposal
}

// ReadOffline reads the operators of a ledger. appliance is the name of its audit log.
func ReadOffline(v ledger.View, appliance string) (o Offline, err error) {
	o.appliance, o.next = appliance, 1
	if o.people, err = readRoster(v); err != nil {
		return o, err
	}
	return o, v.All(ledger.Proposals, func(key string, value []byte) error {
		rec, err := decodeRecord(key, value)
		if err == nil {
			o.next = max(o.next, rec.id()+1)
		}
		return err
	})
}

// Initialised reports whether there are operators. Without one, no act needs approval.
func (o Offline) Initialised() bool { return len(o.people.people) > 0 }

// Needed returns the number of approvals that an act needs.
func (o Offline) Needed() int { return o.people.needed }

// Approvers returns the names of those who can approve with an SSH key.
func (o Offline) Approvers() (names []string) {
	for _, name := range slices.Sorted(maps.Keys(o.people.people)) {
		if p := o.people.people[name]; p.Has(approval.Approver) && len(o.keys(p)) > 0 {
			names = append(names, name)
		}
	}
	return names
}

// keys returns the SSH keys of an operator. Where approvals must be by hardware keys, only those
// are left.
func (o Offline) keys(p person) (all []approval.Credential) {
	for _, c := range p.Credentials {
		if c.Kind == approval.SSH && (c.Hardware() || !o.people.hardware) {
			all = append(all, c)
		}
	}
	return all
}

// Propose returns a proposal for an act. The proposer must have one of the act's roles.
func (o Offline) Propose(
	act, proposer string, p []approval.Parameter, now time.Time, lifetime time.Duration,
) (*approval.Proposal, error) {
	who, is := o.people.people[proposer]
	if !is {
		return nil, fmt.Errorf("operator %q: %w: the operators are %s", proposer, ErrNotFound,
			strings.Join(slices.Sorted(maps.Keys(o.people.people)), ", "))
	}
	if roles := approval.Proposers(act); !who.Has(roles...) {
		return nil, fmt.Errorf("%s can't propose to %s: %w: it is for the role %s", proposer, act, ErrNotAllowed,
			joinRoles(roles))
	}
	now = now.UTC().Truncate(time.Second)
	made := &approval.Proposal{
		ID: o.next, Appliance: o.appliance, Act: act, Parameters: p, Proposer: proposer,
		Proposed: now, Expires: now.Add(lifetime), Needed: o.people.needed, Nonce: randomHex(),
	}
	return made, made.Check()
}

// Same returns an error unless a text is of a proposal that Propose would make now, apart from its
// times and its nonce, and is not over.
func (o Offline) Same(text string, now *approval.Proposal) (*approval.Proposal, error) {
	p, err := approval.ParseText(text)
	if err != nil {
		return nil, err
	}
	want := *now
	want.Proposed, want.Expires, want.Nonce = p.Proposed, p.Expires, p.Nonce
	if want.Text() != text {
		return nil, fmt.Errorf("%w: the text that was approved says something else than what would be done now:\n%s",
			manage.ErrConflict, want.Text())
	}
	if now.Proposed.Before(p.Proposed) || !now.Proposed.Before(p.Expires) {
		return nil, fmt.Errorf("%w: the text is valid from %s to %s, and now it is %s", manage.ErrConflict,
			p.Proposed.Format(time.RFC3339), p.Expires.Format(time.RFC3339), now.Proposed.Format(time.RFC3339))
	}
	return p, nil
}

// Signed is an approval by an SSH key.
type Signed struct {
	Operator  string
	PublicKey string // of the credential, as in authorized_keys
	proof     approval.Proof
	hardware  bool
}

// Approve verifies signatures (SSHSIG, armored) over the text of a proposal, each by another
// approver. The error says how many are missing.
func (o Offline) Approve(p *approval.Proposal, signatures []string) (all []Signed, err error) {
	for i, armored := range signatures {
		s, err := o.signer(p, armored)
		if err != nil {
			return nil, fmt.Errorf("signature %d: %w", i+1, err)
		}
		if slices.ContainsFunc(all, func(other Signed) bool { return other.Operator == s.Operator }) {
			return nil, fmt.Errorf("signature %d: %w: %s has approved already", i+1, manage.ErrConflict, s.Operator)
		}
		all = append(all, s)
	}
	if missing := o.people.needed - len(all); missing > 0 {
		return all, fmt.Errorf("%w: %d of %d approvals are missing; approvers are %s", manage.ErrNotApproved,
			missing, o.people.needed, strings.Join(o.Approvers(), ", "))
	}
	return all, nil
}

func (o Offline) signer(p *approval.Proposal, armored string) (Signed, error) {
	last := errors.New("no approver has the key")
	for _, name := range o.Approvers() {
		for _, c := range o.keys(o.people.people[name]) {
			proof := approval.Proof{Credential: c.ID, SSHSIG: armored}
			v, err := c.Verify(approval.ForProposal, p.Text(), proof)
			switch {
			case err == nil && p.NeedsHardware(o.people.hardware) && !v.Hardware:
				last = errors.New("it must be by a FIDO key that asks for its PIN")
			case err == nil:
				return Signed{name, c.PublicKey, proof.Canonical(), v.Hardware}, nil
			}
		}
	}
	return Signed{}, fmt.Errorf("%w: %w, or the signature is of another text (ssh-keygen -Y sign -n %s)",
		approval.ErrNotProven, last, approval.ForProposal)
}

// Write writes a proposal with its approvals, carries the act out, and writes that the act is done.
// do gets the actor of the act's event.
func (o Offline) Write(
	tx *ledger.Tx, p *approval.Proposal, approvals []Signed, do func(who audit.Actor) error,
) error {
	rec := &record{Text: p.Text(), State: Running, proposal: p}
	events := []audit.Event{audit.NewProposalMade(audit.Operator(p.Proposer), rec.ref(), rec.Text)}
	for _, a := range approvals {
		rec.Approvals = append(rec.Approvals, approved{
			Operator: a.Operator, Credential: a.proof.Credential, At: time.Now().Unix(), Hardware: a.hardware,
		})
		events = append(events, audit.NewApprovalGiven(audit.Operator(a.Operator), rec.ref(), a.proof.Credential,
			manage.Encode(a.proof)))
	}
	for _, e := range append(events, audit.NewProposalRun(rec.actor(), rec.ref())) {
		if err := tx.Append(ledger.EventOf(e)); err != nil {
			return err
		}
	}
	if err := do(rec.actor()); err != nil {
		return err
	}
	done := rec.end(Done, "")
	done.Actor = rec.actor()
	return put(tx, rec, done)
}

// offlineAct is an act that is approved and done without the daemon, by a command of countersignd.
func offlineAct(act, done, command string) Act {
	err := fmt.Errorf("%w: a running appliance is not %s: stop the daemon, then: countersignd %s", manage.ErrConflict,
		done, command)
	return Act{
		Roles: approval.Proposers(act),
		Check: func([]approval.Parameter, []byte) ([]approval.Parameter, error) { return nil, err },
		Run:   func(context.Context, audit.Actor, []approval.Parameter, []byte) error { return err },
	}
}
