package operators

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"strconv"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// Bounds of proposals.
const (
	MinLifetime     = 5 * time.Minute
	DefaultLifetime = 24 * time.Hour
	MaxLifetime     = 7 * 24 * time.Hour
	MaxContent      = 256 << 10 // bytes that go with one
	maxPending      = 64        // that are open or running
	maxPendingOf    = 16        // of one proposer, so that nobody takes all places
	maxEnded        = 1000      // that are kept to be looked at; the audit log has all
)

// State is where a proposal is on its way.
type State string

const (
	Pending     State = "open"
	Running     State = "running"     // approved, and being carried out
	Done        State = "done"        // carried out
	Failed      State = "failed"      // carried out, with an error
	Expired     State = "expired"     // not approved in time
	Withdrawn   State = "withdrawn"   // by its proposer or an administrator
	Interrupted State = "interrupted" // it was begun, and nobody knows how far it has come
)

// Proposal is an act that was proposed, and what became of it. What approvers sign is its Text.
type Proposal struct {
	approval.Proposal
	State     State
	Approvals []Approval // in the order in which they came
	Required  int        // approvals: by the text, or by what is in force where that is more
	Content   []byte     // what goes with it, until it has ended. The parameter sha256 is its digest
	Ended     time.Time  // zero until then
	Cause     string     // why it failed or was interrupted
}

// Approval is one that was given.
type Approval struct {
	Operator   string
	Credential string
	At         time.Time
	Counts     bool // its operator is an approver now, and has the credential
}

// record is a proposal in the ledger, under its number.
type record struct {
	Text      string     `json:"text"`
	State     State      `json:"state"`
	Approvals []approved `json:"approvals,omitempty"`
	Content   []byte     `json:"content,omitempty"`
	Ended     int64      `json:"ended,omitempty"` // Unix seconds
	Cause     string     `json:"cause,omitempty"`

	proposal *approval.Proposal // Text, read
}

type approved struct {
	Operator   string `json:"operator"`
	Credential string `json:"credential"`
	At         int64  `json:"at"` // Unix seconds
}

func recordKey(id uint64) string { return fmt.Sprintf("%020d", id) }

func decodeRecord(key string, value []byte) (*record, error) {
	r := new(record)
	err := json.Unmarshal(value, r)
	if err == nil {
		r.proposal, err = approval.ParseText(r.Text)
	}
	if err == nil && recordKey(r.id()) != key {
		err = fmt.Errorf("its text is of proposal %d", r.id())
	}
	if err != nil {
		return nil, fmt.Errorf("proposal %s in the ledger: %w", key, err)
	}
	return r, nil
}

func (r *record) id() uint64 { return r.proposal.ID }

// actor is who carries it out.
func (r *record) actor() audit.Actor {
	a := audit.Operator(r.proposal.Proposer)
	a.Proposal = r.id()
	return a
}

// counting is how many approvals count by a roster.
func (r *record) counting(by *roster) (n int) {
	for _, a := range r.Approvals {
		if by.approver(a.Operator, a.Credential) {
			n++
		}
	}
	return n
}

func (r *roster) approver(name, credential string) bool {
	p := r.people[name]
	_, has := p.Credential(credential)
	return has && p.Has(approval.Approver)
}

// over says whether its time is over, by the clock or by the ledger's time, which nobody sets back.
func (d *Registry) over(r *record) bool {
	return !time.Now().Before(r.proposal.Expires) || !d.ledger.Time().Before(r.proposal.Expires)
}

// end lets a proposal end, and returns the event.
func (r *record) end(state State, cause string) audit.Event {
	r.State, r.Cause, r.Content, r.Ended = state, cause, nil, time.Now().Unix()
	switch state {
	case Expired:
		return audit.NewProposalExpired(r.ref())
	case Failed, Interrupted:
		return audit.NewProposalDone(r.actor(), r.ref(), string(state), cause)
	}
	return audit.NewProposalDone(r.actor(), r.ref(), "", "")
}

func (r *record) ref() audit.ProposalRef {
	return audit.ProposalRef{ID: r.id(), Digest: r.proposal.Digest()}
}

// update is one transaction on a proposal: change gets it as the ledger has it, and returns the events
// of the change. When it is on disk, then is called.
func (d *Registry) update(ctx context.Context, id uint64, change func(*ledger.Tx, *record) ([]audit.Event, error), then func(*record)) error {
	return d.write(ctx, "proposal "+strconv.FormatUint(id, 10), func(ctx context.Context) error {
		var r *record
		if err := d.ledger.Update(ctx, func(tx *ledger.Tx) (err error) {
			value := tx.Get(ledger.Proposals, recordKey(id))
			if len(value) == 0 {
				return fmt.Errorf("proposal: %w", ErrNotFound)
			}
			if r, err = decodeRecord(recordKey(id), value); err != nil {
				return err
			}
			events, err := change(tx, r)
			if err != nil {
				return err
			}
			return put(tx, r, events...)
		}); err != nil {
			return err
		}
		if then != nil {
			then(r)
		}
		return nil
	})
}

func put(tx *ledger.Tx, r *record, events ...audit.Event) error {
	err := tx.Put(ledger.Proposals, recordKey(r.id()), manage.Encode(r))
	for _, e := range events {
		err = errors.Join(err, tx.Append(ledger.EventOf(e)))
	}
	return err
}

// Propose writes down an act to be approved. A lifetime of 0 is DefaultLifetime. What goes with it has to be named by the parameter
// sha256, since the text is all that is approved.
func (d *Registry) Propose(ctx context.Context, s Session, act string, p []approval.Parameter, content []byte, lifetime time.Duration) (Proposal, error) {
	if _, err := d.alive(s); err != nil {
		return Proposal{}, err
	}
	a, known := d.Acts[act]
	if lifetime == 0 {
		lifetime = DefaultLifetime
	}
	switch {
	case !known:
		return Proposal{}, fmt.Errorf("proposal: %w: there is no such act", ErrInvalid)
	case lifetime < MinLifetime || lifetime > MaxLifetime:
		return Proposal{}, fmt.Errorf("proposal: %w: it lives from %v to %v", ErrInvalid, MinLifetime, MaxLifetime)
	case len(content) > MaxContent:
		return Proposal{}, fmt.Errorf("proposal: %w: no more than %d bytes go with it", ErrInvalid, MaxContent)
	}
	p, err := a.Check(slices.Clone(p), content)
	if err != nil {
		return Proposal{}, fmt.Errorf("proposal to %s: %w", act, err)
	}
	now := time.Now().Truncate(time.Second)
	r := &record{State: Pending, Content: slices.Clone(content)}
	err = d.write(ctx, "proposal", func(ctx context.Context) error {
		id, dropped, err := d.place(s.Operator)
		if err != nil {
			return err
		}
		return d.ledger.Update(ctx, func(tx *ledger.Tx) error {
			all, err := readRoster(tx.View)
			if err != nil {
				return err
			}
			who := all.people[s.Operator]
			if !who.Has(a.proposers()...) {
				return fmt.Errorf("proposal to %s: %w: it is for the role %s", act, ErrNotAllowed, joinRoles(a.proposers()))
			}
			made := &approval.Proposal{ID: id, Appliance: d.Appliance, Act: act, Parameters: p, Proposer: who.Name,
				Proposed: now.UTC(), Expires: now.Add(lifetime).UTC().Truncate(time.Second), Needed: all.needed, Nonce: random()}
			r.Text = made.Text()
			if err := made.Check(); err != nil {
				return fmt.Errorf("proposal to %s: %w: %w", act, ErrInvalid, err)
			}
			if r.proposal, err = approval.ParseText(r.Text); err != nil || !slices.Equal(r.proposal.Parameters, p) {
				return fmt.Errorf("proposal to %s: %w: its text does not say it", act, ErrInvalid)
			}
			if !r.whole() {
				return fmt.Errorf("proposal to %s: %w: the parameter sha256 is not the digest of what goes with it", act, ErrInvalid)
			}
			if len(tx.Get(ledger.Proposals, recordKey(id))) > 0 {
				return fmt.Errorf("proposal %d: %w", id, ErrExists)
			}
			for _, old := range dropped {
				if err := tx.Delete(ledger.Proposals, recordKey(old)); err != nil {
					return err
				}
			}
			return put(tx, r, audit.NewProposalMade(audit.Operator(who.Name), r.ref(), r.Text))
		})
	})
	if err != nil {
		return Proposal{}, err
	}
	return d.Proposal(r.id())
}

func (a *Act) proposers() []approval.Role {
	if len(a.Roles) == 0 {
		return []approval.Role{approval.Administrator}
	}
	return a.Roles
}

// whole says that what goes with a proposal is what its text says.
func (r *record) whole() bool {
	digest := sha256.Sum256(r.Content)
	return len(r.Content) == 0 || r.proposal.Parameter("sha256") == hex.EncodeToString(digest[:])
}

// place returns the number of the next proposal, and the ended ones that make room for it. The one with the highest number is always
// kept, so that no number comes twice. writing is held.
func (d *Registry) place(proposer string) (id uint64, dropped []uint64, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var pending, his int
	var ended []uint64
	for n, r := range d.proposals {
		if id = max(id, n); r.State != Pending && r.State != Running {
			ended = append(ended, n)
			continue
		}
		if pending++; r.proposal.Proposer == proposer {
			his++
		}
	}
	if pending >= maxPending || his >= maxPendingOf {
		return 0, nil, fmt.Errorf("proposal: %w: %d are open, of which %d are yours; there may be %d and %d: withdraw some", ErrConflict, pending, his, maxPending, maxPendingOf)
	}
	slices.Sort(ended)
	return id + 1, ended[:max(0, len(ended)-maxEnded)], nil
}

// Approve adds the approval of a session's operator, and carries the act out where that was the last one needed. It returns the
// proposal as it is then: still open, or as the act ended, or running where ctx ended before the act. That an act has failed is no
// error of Approve.
func (d *Registry) Approve(ctx context.Context, s Session, id uint64, p approval.Proof) (Proposal, error) {
	seen, err := d.alive(s)
	if err != nil {
		return Proposal{}, err
	}
	p = seen.named(p)
	now, err := d.Proposal(id)
	if err != nil {
		return Proposal{}, err
	}
	act, known := d.Acts[now.Act]
	if !known {
		return Proposal{}, fmt.Errorf("proposal %d: %w: this version does not know what it asks for", id, ErrConflict)
	}
	count, err := d.verify(seen, approval.ForProposal, now.Text(), p) // which names the proposal and the appliance
	if err != nil {
		d.refused(ctx, s.Channel, s.Operator, approval.ForProposal, p, err)
		return Proposal{}, fmt.Errorf("approval: %w", err)
	}
	var late bool
	var end chan struct{}
	err = d.update(ctx, id, func(tx *ledger.Tx, r *record) ([]audit.Event, error) {
		if d.stopping() {
			return nil, fmt.Errorf("approval: %w: the appliance stops", ErrUnavailable)
		}
		if late = r.State == Pending && d.over(r); late {
			return []audit.Event{r.end(Expired, "")}, nil
		}
		if r.State != Pending {
			return nil, fmt.Errorf("proposal %d: %w: it is %s", id, ErrConflict, r.State)
		}
		all, err := readRoster(tx.View)
		if err != nil {
			return nil, err
		}
		who, err := d.stillHas(tx, seen, p.Credential, count)
		if err != nil {
			return nil, err
		}
		if !all.approver(who.Name, p.Credential) {
			return nil, fmt.Errorf("approval: %w: it is for the role %s", ErrNotAllowed, approval.Approver)
		}
		var events []audit.Event
		given := slices.ContainsFunc(r.Approvals, func(a approved) bool { return a.Operator == who.Name })
		if !given {
			r.Approvals = append(r.Approvals, approved{who.Name, p.Credential, time.Now().Unix()})
			events = append(events, audit.NewApprovalGiven(audit.Operator(who.Name), r.ref(), p.Credential, manage.Encode(p)))
		}
		switch {
		case r.counting(&all) >= max(r.proposal.Needed, all.needed):
			r.State = Running // once: nothing leads back to open
			events = append(events, audit.NewProposalRun(r.actor(), r.ref()))
		case given: // which was worth to try: his approval, or another one, may count again
			return nil, fmt.Errorf("proposal %d: %w: you have approved it already, which can be done once", id, ErrConflict)
		}
		return events, nil
	}, func(r *record) { // it is on disk
		if r.State == Running {
			end = make(chan struct{})
			d.mu.Lock()
			d.ends[id] = end
			d.mu.Unlock()
			go d.carryOut(act, r, end)
		}
	})
	switch {
	case errors.Is(err, approval.ErrNotProven):
		d.refused(ctx, s.Channel, s.Operator, approval.ForProposal, p, err)
		return Proposal{}, err
	case err != nil:
		return Proposal{}, err
	case late:
		return Proposal{}, fmt.Errorf("proposal %d: %w: it has expired", id, ErrConflict)
	}
	if end != nil {
		select {
		case <-end:
		case <-ctx.Done(): // it goes on
		}
	}
	return d.Proposal(id)
}

// carryOut runs the act of a proposal that has become running, and writes down how it ended.
func (d *Registry) carryOut(act Act, r *record, end chan struct{}) {
	defer func() {
		d.mu.Lock()
		delete(d.ends, r.id())
		d.mu.Unlock()
		close(end)
	}()
	state, cause := d.run(act, r)
	log := d.Log.With("proposal", r.id(), "act", r.proposal.Act)
	for {
		err := d.update(context.Background(), r.id(), func(_ *ledger.Tx, r *record) ([]audit.Event, error) {
			if r.State != Running {
				return nil, fmt.Errorf("%w: it is %s", ErrConflict, r.State)
			}
			return []audit.Event{r.end(state, cause)}, nil
		}, nil)
		if !errors.Is(err, ledger.ErrDisk) {
			if err != nil {
				log.Error("how an approved act has ended was not written down: it will be interrupted", "state", state, "cause", cause, "err", err)
			}
			return
		}
		log.Error("how an approved act has ended is not written down yet", "state", state, "cause", cause, "err", err)
		select {
		case <-time.After(time.Second):
		case <-d.ledger.Failed():
		}
	}
}

// run carries an act out. That it panicked must not take the appliance with it; but nobody knows what it did.
func (d *Registry) run(act Act, r *record) (state State, cause string) {
	defer func() {
		if p := recover(); p != nil {
			d.Log.Error("an approved act has panicked", "proposal", r.id(), "act", r.proposal.Act, "panic", p, "stack", string(debug.Stack()))
			state, cause = Interrupted, "it has panicked: the log of the daemon says where"
		}
	}()
	if !r.whole() {
		return Failed, "what goes with it is not what was approved"
	}
	if err := act.Run(context.Background(), r.actor(), slices.Clone(r.proposal.Parameters), slices.Clone(r.Content)); err != nil {
		return Failed, err.Error()
	}
	return Done, ""
}

// endInterrupted ends what the ledger has as running: nobody here carries it out.
func (d *Registry) endInterrupted() error {
	for _, id := range slices.Sorted(maps.Keys(d.proposals)) {
		if d.proposals[id].State != Running {
			continue
		}
		if err := d.update(context.Background(), id, func(_ *ledger.Tx, r *record) ([]audit.Event, error) {
			e := r.end(Interrupted, "the appliance stopped while it was carried out: look at how far it has come")
			e.Actor = audit.Daemon()
			return []audit.Event{e}, nil
		}, nil); err != nil {
			return err
		}
		d.Log.Warn("an approved act was interrupted: look at how far it has come", "proposal", id, "act", d.proposals[id].proposal.Act)
	}
	return nil
}

// Withdraw ends an open proposal: its proposer can, and an administrator.
func (d *Registry) Withdraw(ctx context.Context, s Session, id uint64) error {
	if _, err := d.alive(s); err != nil {
		return err
	}
	var late bool
	err := d.update(ctx, id, func(tx *ledger.Tx, r *record) ([]audit.Event, error) {
		all, err := readRoster(tx.View)
		if err != nil {
			return nil, err
		}
		who := all.people[s.Operator]
		switch {
		case r.proposal.Proposer != s.Operator && !who.Has(approval.Administrator):
			return nil, fmt.Errorf("proposal %d: %w: its proposer and administrators can withdraw it", id, ErrNotAllowed)
		case r.State != Pending:
			return nil, fmt.Errorf("proposal %d: %w: it is %s", id, ErrConflict, r.State)
		}
		if late = d.over(r); late {
			return []audit.Event{r.end(Expired, "")}, nil
		}
		r.end(Withdrawn, "")
		return []audit.Event{audit.NewProposalWithdrawn(audit.Operator(s.Operator), r.ref())}, nil
	}, nil)
	if err == nil && late {
		err = fmt.Errorf("proposal %d: %w: it has expired", id, ErrConflict)
	}
	return err
}

// Expire ends the open proposals whose time is over. To be called once a minute; until then they can't be approved either.
func (d *Registry) Expire(ctx context.Context) error {
	d.mu.Lock()
	var due []uint64
	for id, r := range d.proposals {
		if r.State == Pending && d.over(r) {
			due = append(due, id)
		}
	}
	d.mu.Unlock()
	slices.Sort(due)
	for _, id := range due {
		err := d.update(ctx, id, func(_ *ledger.Tx, r *record) ([]audit.Event, error) {
			if r.State != Pending {
				return nil, ErrConflict
			}
			return []audit.Event{r.end(Expired, "")}, nil
		}, nil)
		if err != nil && !errors.Is(err, ErrConflict) { // it has ended in between
			return err
		}
	}
	return nil
}

// Proposals lists those that are kept, the newest first.
func (d *Registry) Proposals() (all []Proposal) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range d.proposals {
		all = append(all, d.show(r))
	}
	slices.SortFunc(all, func(x, y Proposal) int { return cmp.Compare(y.ID, x.ID) })
	return all
}

// Proposal returns that of a number, or ErrNotFound.
func (d *Registry) Proposal(id uint64) (Proposal, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r, there := d.proposals[id]
	if !there {
		return Proposal{}, fmt.Errorf("proposal: %w", ErrNotFound)
	}
	return d.show(r), nil
}

// show is a proposal as of now. mu is held.
func (d *Registry) show(r *record) Proposal {
	p := Proposal{Proposal: *r.proposal, State: r.State, Required: max(r.proposal.Needed, d.roster.needed), Content: slices.Clone(r.Content), Cause: r.Cause}
	p.Parameters = slices.Clone(r.proposal.Parameters)
	if p.State == Pending && d.over(r) {
		p.State = Expired // which Expire will write
	}
	if r.Ended != 0 {
		p.Ended = time.Unix(r.Ended, 0).UTC()
	}
	for _, a := range r.Approvals {
		p.Approvals = append(p.Approvals, Approval{a.Operator, a.Credential, time.Unix(a.At, 0).UTC(), d.roster.approver(a.Operator, a.Credential)})
	}
	return p
}
