package operators

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"slices"
	"strconv"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/requestid"
)

// Limits of proposals.
const (
	MinLifetime     = 5 * time.Minute
	DefaultLifetime = 24 * time.Hour
	MaxLifetime     = 7 * 24 * time.Hour
	MaxContent      = 256 << 10 // bytes of a proposal's content
	maxPending      = 64        // open or running proposals
	maxPendingOf    = 16        // open or running proposals of one proposer, so that one can't use up maxPending
	maxEnded        = 1000      // ended proposals in the ledger; the audit log has all
)

// State is the state of a proposal.
type State string

const (
	Pending     State = "open"
	Running     State = "running"     // approved; the act is being carried out
	Done        State = "done"        // the act has succeeded
	Failed      State = "failed"      // the act has returned an error
	Expired     State = "expired"     // not approved in time, or not while its proposer could propose it
	Withdrawn   State = "withdrawn"   // by its proposer or an administrator
	Interrupted State = "interrupted" // the act has started; its effects are unknown
)

// Proposal is a proposed act with its approvals and its outcome. Approvers sign the proposal's
// Text.
type Proposal struct {
	approval.Proposal
	State     State
	Approvals []Approval // in the order of time
	Required  int        // approvals: the larger of the number in the text and the number in force
	Content   []byte     // until the end; for example a policy. The parameter sha256 is the content's digest
	Ended     time.Time  // zero before the end
	Cause     string     // of a failure, of an interruption, or of an end before the expiry
}

// Approval is an approval of a proposal.
type Approval struct {
	Operator   string
	Credential string
	At         time.Time
	Counts     bool // see roster.counts
}

// record is a proposal's record in the ledger. The key is the proposal's number.
type record struct {
	Text      string     `json:"text"`
	State     State      `json:"state"`
	Approvals []approved `json:"approvals,omitempty"`
	Content   []byte     `json:"content,omitempty"`
	Ended     int64      `json:"ended,omitempty"` // Unix seconds
	Cause     string     `json:"cause,omitempty"`

	proposal *approval.Proposal // parsed from Text
}

type approved struct {
	Operator   string `json:"operator"`
	Credential string `json:"credential"`
	At         int64  `json:"at"`                 // Unix seconds
	Hardware   bool   `json:"hardware,omitempty"` // see approval.Verified
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

// actor returns the actor of the act: the proposer, with the number of the proposal.
func (r *record) actor() audit.Actor {
	a := audit.Operator(r.proposal.Proposer)
	a.Proposal = r.id()
	return a
}

// countApprovals returns the number of approvals that are valid by a roster.
func (r *record) countApprovals(people *roster) (n int) {
	for _, a := range r.Approvals {
		if people.counts(r.proposal, a) {
			n++
		}
	}
	return n
}

// counts reports whether an approval of a proposal is valid by the present operators and rules.
func (r *roster) counts(p *approval.Proposal, a approved) bool {
	return r.isApprover(a.Operator, a.Credential) && (a.Hardware || !p.NeedsHardware(r.hardware))
}

// isApprover reports whether an operator exists, is an approver, and has the credential.
func (r *roster) isApprover(name, credential string) bool {
	p := r.people[name]
	_, has := p.Credential(credential)
	return has && p.Has(approval.Approver)
}

// expired reports whether a proposal has expired, by the system clock or by the ledger's time. The
// ledger's time is monotonic: a clock that is set back revives no proposal.
func (r *Registry) expired(rec *record) bool {
	return !time.Now().Before(rec.proposal.Expires) || !r.ledger.Time().Before(rec.proposal.Expires)
}

// end sets the final state of a proposal, and returns the event.
func (r *record) end(state State, cause string) audit.Event {
	r.State, r.Cause, r.Content, r.Ended = state, cause, nil, time.Now().Unix()
	switch state {
	case Expired:
		return audit.NewProposalExpired(r.ref(), cause)
	case Failed, Interrupted:
		return audit.NewProposalDone(r.actor(), r.ref(), string(state), cause)
	}
	return audit.NewProposalDone(r.actor(), r.ref(), "", "")
}

func (r *record) ref() audit.ProposalRef {
	return audit.ProposalRef{ID: r.id(), Digest: r.proposal.Digest()}
}

// update changes a proposal in one transaction. change gets the record of the ledger, and returns
// the events of the change. After the commit, update calls then; then may be nil.
func (r *Registry) update(
	ctx context.Context, request string, id uint64,
	change func(*ledger.Tx, *record) ([]audit.Event, error), then func(*record),
) error {
	return r.write(ctx, request, "proposal "+strconv.FormatUint(id, 10), func(ctx context.Context) error {
		var rec *record
		if err := r.ledger.Update(ctx, func(tx *ledger.Tx) (err error) {
			value := tx.Get(ledger.Proposals, recordKey(id))
			if len(value) == 0 {
				return fmt.Errorf("proposal %d: %w", id, ErrNotFound)
			}
			if rec, err = decodeRecord(recordKey(id), value); err != nil {
				return err
			}
			events, err := change(tx, rec)
			if err != nil {
				return err
			}
			return put(tx, rec, events...)
		}); err != nil {
			return err
		}
		if then != nil {
			then(rec)
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

// Propose adds a proposal for an act. A lifetime of 0 is DefaultLifetime. The parameter sha256 must
// be the digest of the content, because approvers sign only the text.
func (r *Registry) Propose(
	ctx context.Context, s Session, act string, p []approval.Parameter, content []byte, lifetime time.Duration,
) (Proposal, error) {
	if _, err := r.requireSession(s); err != nil {
		return Proposal{}, err
	}
	a, known := r.Acts[act]
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
	rec := &record{State: Pending, Content: slices.Clone(content)}
	err = r.write(ctx, s.Channel.Request, "proposal", func(ctx context.Context) error {
		id, evicted, err := r.nextNumber(s.Operator)
		if err != nil {
			return err
		}
		return r.ledger.Update(ctx, func(tx *ledger.Tx) error {
			people, err := readRoster(tx.View)
			if err != nil {
				return err
			}
			who := people.people[s.Operator]
			if !who.Has(a.Roles...) {
				return fmt.Errorf("proposal to %s: %w: it is for the role %s", act, ErrNotAllowed, joinRoles(a.Roles))
			}
			made := &approval.Proposal{
				ID: id, Appliance: r.Appliance, Act: act, Parameters: p, Proposer: who.Name,
				Proposed: now.UTC(), Expires: now.Add(lifetime).UTC().Truncate(time.Second),
				Needed: people.needed, Nonce: randomHex(),
			}
			rec.Text = made.Text()
			if err := made.Check(); err != nil {
				return fmt.Errorf("proposal to %s: %w: %w", act, ErrInvalid, err)
			}
			rec.proposal, err = approval.ParseText(rec.Text)
			if err != nil || !slices.Equal(rec.proposal.Parameters, p) {
				return fmt.Errorf("proposal to %s: %w: its text does not say it", act, ErrInvalid)
			}
			if !rec.contentMatches() {
				return fmt.Errorf("proposal to %s: %w: the parameter sha256 is not the digest of what goes with it",
					act, ErrInvalid)
			}
			if len(tx.Get(ledger.Proposals, recordKey(id))) > 0 {
				return fmt.Errorf("proposal %d: %w", id, ErrExists)
			}
			for _, old := range evicted {
				if err := tx.Delete(ledger.Proposals, recordKey(old)); err != nil {
					return err
				}
			}
			return put(tx, rec, audit.NewProposalMade(s.actor(), rec.ref(), rec.Text))
		})
	})
	if err != nil {
		return Proposal{}, err
	}
	return r.Proposal(rec.id())
}

// contentMatches reports whether the parameter sha256 is the digest of the content. A proposal
// without content always matches.
func (r *record) contentMatches() bool {
	digest := sha256.Sum256(r.Content)
	return len(r.Content) == 0 || r.proposal.Parameter("sha256") == hex.EncodeToString(digest[:])
}

// nextNumber returns the number of the next proposal, and the oldest ended proposals beyond
// maxEnded, to be evicted. The proposal with the highest number is never evicted, so that no number
// is used twice. The caller holds writing.
func (r *Registry) nextNumber(proposer string) (id uint64, evicted []uint64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var pending, own int
	var ended []uint64
	for n, rec := range r.proposals {
		if id = max(id, n); rec.State != Pending && rec.State != Running {
			ended = append(ended, n)
			continue
		}
		if pending++; rec.proposal.Proposer == proposer {
			own++
		}
	}
	if pending >= maxPending || own >= maxPendingOf {
		return 0, nil, fmt.Errorf("proposal: %w: %d are open, of which %d are yours; there may be %d and %d: "+
			"withdraw some", ErrConflict, pending, own, maxPending, maxPendingOf)
	}
	slices.Sort(ended)
	return id + 1, ended[:max(0, len(ended)-maxEnded)], nil
}

// Approve adds the approval of a session's operator. After the last needed approval, Approve
// carries the act out and waits for its end. Approve returns the proposal: open, or ended, or
// running if ctx has ended before the act. A failed act is no error of Approve.
func (r *Registry) Approve(ctx context.Context, s Session, id uint64, p approval.Proof) (Proposal, error) {
	seen, err := r.requireSession(s)
	if err != nil {
		return Proposal{}, err
	}
	p = seen.resolveCredential(p)
	now, err := r.Proposal(id)
	if err != nil {
		return Proposal{}, err
	}
	act, known := r.Acts[now.Act]
	if !known {
		return Proposal{}, fmt.Errorf("proposal %d: %w: this version does not know what it asks for", id, ErrConflict)
	}
	// The text has the names of the proposal and the appliance: the proof is valid for nothing
	// else.
	of := attempt{s.Channel, approval.ForProposal, s.Operator, "proposal/" + strconv.FormatUint(id, 10)}
	verified, err := r.verifyProof(seen, approval.ForProposal, now.Text(), p)
	if err != nil {
		r.recordRefusal(ctx, of, p, err)
		return Proposal{}, fmt.Errorf("approval: %w", err)
	}
	p = p.Canonical() // the log has the form that ssh-keygen writes
	var late bool
	var ended chan struct{}
	err = r.update(ctx, s.Channel.Request, id, func(tx *ledger.Tx, rec *record) ([]audit.Event, error) {
		if r.stopping() {
			return nil, fmt.Errorf("approval: %w: the appliance stops", ErrUnavailable)
		}
		if late = rec.State == Pending && r.expired(rec); late {
			return []audit.Event{rec.end(Expired, "")}, nil
		}
		if rec.State != Pending {
			return nil, fmt.Errorf("proposal %d: %w: it is %s", id, ErrConflict, rec.State)
		}
		people, err := readRoster(tx.View)
		if err != nil {
			return nil, err
		}
		who, err := r.recheckCredential(tx, seen, p.Credential, verified.SignCount)
		if err != nil {
			return nil, err
		}
		if !people.isApprover(who.Name, p.Credential) {
			return nil, fmt.Errorf("approval: %w: it is for the role %s", ErrNotAllowed, approval.Approver)
		}
		if rec.proposal.NeedsHardware(people.hardware) && !verified.Hardware {
			return nil, fmt.Errorf("approval: %w: it must be by a passkey, or by a FIDO key that asks for its PIN "+
				"(ssh-keygen -t ed25519-sk -O verify-required)", ErrNotAllowed)
		}
		var events []audit.Event
		given := slices.ContainsFunc(rec.Approvals, func(a approved) bool { return a.Operator == who.Name })
		if !given {
			rec.Approvals = append(rec.Approvals, approved{
				Operator: who.Name, Credential: p.Credential, At: time.Now().Unix(), Hardware: verified.Hardware,
			})
			events = append(events,
				audit.NewApprovalGiven(s.actor(), rec.ref(), p.Credential, manage.Encode(p)))
		}
		switch {
		case rec.countApprovals(&people) >= max(rec.proposal.Needed, people.needed):
			rec.State = Running // once: no transition leads back to open
			events = append(events, audit.NewProposalRun(rec.actor().In(s.Channel.Request), rec.ref()))
		case given: // an error only now, because an approval that did not count may count again
			return nil, fmt.Errorf("proposal %d: %w: you have approved it already, which can be done once",
				id, ErrConflict)
		}
		return events, nil
	}, func(rec *record) { // after the commit
		if rec.State == Running {
			ended = make(chan struct{})
			r.mu.Lock()
			r.executing[id] = ended
			r.mu.Unlock()
			go r.execute(act, rec, s.Channel.Request, ended)
		}
	})
	switch {
	case errors.Is(err, approval.ErrNotProven):
		r.recordRefusal(ctx, of, p, err)
		return Proposal{}, err
	case err != nil:
		return Proposal{}, err
	case late:
		return Proposal{}, fmt.Errorf("proposal %d: %w: it has expired", id, ErrConflict)
	}
	if ended != nil {
		select {
		case <-ended:
		case <-ctx.Done(): // the act goes on
		}
	}
	return r.Proposal(id)
}

// execute carries out the act of a proposal that has just become running, writes the end of the
// act, and closes ended. request is the id of the request with the last approval, which causes all
// this.
func (r *Registry) execute(act Act, rec *record, request string, ended chan struct{}) {
	defer func() {
		r.mu.Lock()
		delete(r.executing, rec.id())
		r.mu.Unlock()
		close(ended)
	}()
	log := r.Log.With("proposal", rec.id(), "act", rec.proposal.Act, requestid.Attr(request))
	who := rec.actor().In(request)
	state, cause := r.run(act, rec, who, log)
	for {
		err := r.update(context.Background(), "", rec.id(), func(_ *ledger.Tx, rec *record) ([]audit.Event, error) {
			if rec.State != Running {
				return nil, fmt.Errorf("%w: it is %s", ErrConflict, rec.State)
			}
			e := rec.end(state, cause)
			e.Actor = who
			return []audit.Event{e}, nil
		}, nil)
		if !errors.Is(err, ledger.ErrDisk) {
			if err != nil {
				log.Error("how an approved act has ended was not written down: it will be interrupted",
					"state", state, "cause", cause, "err", err)
			}
			return
		}
		log.Error("how an approved act has ended is not written down yet", "state", state, "cause", cause, "err", err)
		select {
		case <-time.After(time.Second):
		case <-r.ledger.Failed():
		}
	}
}

// run calls the act's Run. A panic must not end the appliance. The effects of the act are unknown
// after a panic.
func (r *Registry) run(act Act, rec *record, who audit.Actor, log *slog.Logger) (state State, cause string) {
	defer func() {
		if p := recover(); p != nil {
			log.Error("an approved act has panicked", "panic", p, "stack", string(debug.Stack()))
			state, cause = Interrupted, "it has panicked: the log of the daemon says where"
		}
	}()
	if !rec.contentMatches() {
		return Failed, "what goes with it is not what was approved"
	}
	err := act.Run(context.Background(), who, slices.Clone(rec.proposal.Parameters), slices.Clone(rec.Content))
	if err != nil {
		return Failed, err.Error()
	}
	return Done, ""
}

// endInterrupted marks the running proposals in the ledger as interrupted. Open calls
// endInterrupted before an act can start.
func (r *Registry) endInterrupted() error {
	for _, id := range slices.Sorted(maps.Keys(r.proposals)) {
		if r.proposals[id].State != Running {
			continue
		}
		if err := r.update(context.Background(), "", id, func(_ *ledger.Tx, rec *record) ([]audit.Event, error) {
			e := rec.end(Interrupted, "the appliance stopped while it was carried out: look at how far it has come")
			e.Actor = audit.Daemon()
			return []audit.Event{e}, nil
		}, nil); err != nil {
			return err
		}
		r.Log.Warn("an approved act was interrupted: look at how far it has come",
			"proposal", id, "act", r.proposals[id].proposal.Act)
	}
	return nil
}

// Withdraw ends an open proposal. The session must be of the proposer or an administrator.
func (r *Registry) Withdraw(ctx context.Context, s Session, id uint64) error {
	if _, err := r.requireSession(s); err != nil {
		return err
	}
	var late bool
	err := r.update(ctx, s.Channel.Request, id, func(tx *ledger.Tx, rec *record) ([]audit.Event, error) {
		people, err := readRoster(tx.View)
		if err != nil {
			return nil, err
		}
		who := people.people[s.Operator]
		switch {
		case rec.proposal.Proposer != s.Operator && !who.Has(approval.Administrator):
			return nil, fmt.Errorf("proposal %d: %w: its proposer and administrators can withdraw it",
				id, ErrNotAllowed)
		case rec.State != Pending:
			return nil, fmt.Errorf("proposal %d: %w: it is %s", id, ErrConflict, rec.State)
		}
		if late = r.expired(rec); late {
			return []audit.Event{rec.end(Expired, "")}, nil
		}
		rec.end(Withdrawn, "")
		return []audit.Event{audit.NewProposalWithdrawn(s.actor(), rec.ref())}, nil
	}, nil)
	if err == nil && late {
		err = fmt.Errorf("proposal %d: %w: it has expired", id, ErrConflict)
	}
	return err
}

// endOrphans ends the open proposals whose proposers may not propose them any more, in the
// transaction that changes the roster. So the act of an open proposal is never carried out in the
// name of a person who was removed, nor of the next person with that name. The caller holds
// writing: memory has all open proposals.
func (r *Registry) endOrphans(tx *ledger.Tx, people *roster) error {
	for _, id := range r.open(func(*record) bool { return true }) {
		rec, err := decodeRecord(recordKey(id), tx.Get(ledger.Proposals, recordKey(id)))
		if err != nil {
			return err
		}
		proposer, exists := people.people[rec.proposal.Proposer]
		act, known := r.Acts[rec.proposal.Act]
		cause := ""
		switch {
		case !exists:
			cause = fmt.Sprintf("its proposer %s is no operator any more", rec.proposal.Proposer)
		case known && !proposer.Has(act.Roles...):
			cause = fmt.Sprintf("its proposer %s has none of the roles %s any more",
				proposer.Name, joinRoles(act.Roles))
		default:
			continue
		}
		if err := put(tx, rec, rec.end(Expired, cause)); err != nil {
			return err
		}
	}
	return nil
}

// open lists the open proposals of a kind, the oldest first. The caller of is holds mu.
func (r *Registry) open(is func(*record) bool) (ids []uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, rec := range r.proposals {
		if rec.State == Pending && is(rec) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// Warnings lists the doubts about an open proposal: that its act would fail as things are now, or
// else what the act itself warns of.
func (r *Registry) Warnings(p Proposal) []string {
	act, known := r.Acts[p.Act]
	if !known || p.State != Pending {
		return nil
	}
	if _, err := act.Check(slices.Clone(p.Parameters), p.Content); err != nil {
		return []string{"as things are now, the act would fail: " + err.Error()}
	}
	if act.Warn == nil {
		return nil
	}
	return act.Warn(p.Parameters, p.Content)
}

// Expire ends the open proposals that have expired. The daemon calls Expire once a minute. An
// expired proposal can't be approved, even before that call.
func (r *Registry) Expire(ctx context.Context) error {
	for _, id := range r.open(r.expired) {
		err := r.update(ctx, "", id, func(_ *ledger.Tx, rec *record) ([]audit.Event, error) {
			if rec.State != Pending {
				return nil, ErrConflict
			}
			return []audit.Event{rec.end(Expired, "")}, nil
		}, nil)
		if err != nil && !errors.Is(err, ErrConflict) { // ErrConflict: the proposal has ended in between
			return err
		}
	}
	return nil
}

// Proposals lists the proposals in the ledger, the newest first.
func (r *Registry) Proposals() (all []Proposal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rec := range r.proposals {
		all = append(all, r.snapshot(rec))
	}
	slices.SortFunc(all, func(x, y Proposal) int { return cmp.Compare(y.ID, x.ID) })
	return all
}

// Proposal returns the proposal with a number, or ErrNotFound.
func (r *Registry) Proposal(id uint64) (Proposal, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec, exists := r.proposals[id]
	if !exists {
		return Proposal{}, fmt.Errorf("proposal %d: %w", id, ErrNotFound)
	}
	return r.snapshot(rec), nil
}

// snapshot returns a copy of a proposal as of now. The caller holds mu.
func (r *Registry) snapshot(rec *record) Proposal {
	p := Proposal{
		Proposal: *rec.proposal, State: rec.State, Required: max(rec.proposal.Needed, r.roster.needed),
		Content: slices.Clone(rec.Content), Cause: rec.Cause,
	}
	p.Parameters = slices.Clone(rec.proposal.Parameters)
	if p.State == Pending && r.expired(rec) {
		p.State = Expired // Expire will write the state
	}
	if rec.Ended != 0 {
		p.Ended = time.Unix(rec.Ended, 0).UTC()
	}
	for _, a := range rec.Approvals {
		at := time.Unix(a.At, 0).UTC()
		p.Approvals = append(p.Approvals, Approval{a.Operator, a.Credential, at, r.roster.counts(rec.proposal, a)})
	}
	return p
}
