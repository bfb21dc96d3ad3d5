// Package operators keeps the people who run an appliance: who they are, their sessions, and the acts that they propose and approve.
// What counts is in the ledger; challenges and sessions are in memory only, so that a restart signs everybody out. What an operator
// proves is judged by package approval. Begin reading at Registry.SignIn, then at Registry.Approve.
//
// # A proposal never runs twice
//
// Each step is one transaction of the ledger, with its event. This is on disk when
//
//	it was proposed            open, the text          ProposalMade
//	an approver approved       open, the approval      ApprovalGiven
//	and was the last needed    running                 ApprovalGiven, ProposalRun
//	its act has ended          done or failed          ProposalDone
//
// Only who has seen the transaction that made it running on disk carries it out, and there is one such transaction, since it begins at
// "open" and nothing leads back there. While it is running nobody else touches it. Where the daemon dies before that transaction
// counts, it is open, and nothing was done; where it dies after that, it is found running by the next Open, which does not know how far
// the act has come: it becomes interrupted, for people to look at, and never runs. What could not be written was not done: a disk
// that takes nothing leaves it open. Where the act has ended and the disk does not take that, it is written when the disk takes it
// again; until then it is running, and after a crash interrupted.
//
// # Who counts
//
// An approval counts while its operator is an approver and has the credential, by the ledger, in the transaction that makes the proposal
// run; one for each operator, and a credential belongs to one operator. An operator approves a proposal once: who has got another
// credential since does not count, and it is to be proposed again where he is needed. What is needed is the larger of what its text says and what is
// in force then.
package operators

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// What callers tell apart. A proof that does not hold is approval.ErrNotProven.
var (
	ErrNotFound      = errors.New("there is none such")
	ErrExists        = errors.New("it exists already")
	ErrInvalid       = errors.New("not valid")
	ErrSignedOut     = errors.New("not signed in: sign in again")
	ErrNotAllowed    = errors.New("not allowed")
	ErrConflict      = errors.New("not possible as it is now")
	ErrLimited       = errors.New("too many proofs have failed")
	ErrUnavailable   = manage.ErrUnavailable
	ErrUninitialised = errors.New("there are no operators yet: root enrols the first one on the Unix socket")
)

// Limited is ErrLimited with the time after which it is worth to try again, in whole seconds.
type Limited struct{ RetryAfter time.Duration }

func (e *Limited) Error() string { return fmt.Sprintf("%v: try again in %v", ErrLimited, e.RetryAfter) }
func (e *Limited) Unwrap() error { return ErrLimited }

// Config says what a desk is for.
type Config struct {
	Appliance string         // the name of the audit log, for the texts that are signed: what is approved here is good here only
	RPID      string         // the relying party of passkeys: "localhost"
	Origin    string         // of the pages that may ask passkeys: "https://localhost:7780"
	Acts      map[string]Act // what can be proposed, by name. Open adds the acts on operators
	// Changed is called when an operator or a credential was added, changed or removed, before the act has ended: confirmations of
	// presence die then.
	Changed func()
	Log     *slog.Logger
}

// Act is what a proposal can ask for.
type Act struct {
	Roles []approval.Role // that may propose it; none: administrator
	// Check judges what is proposed, and returns the parameters as they are to be approved: complete, in their order and form.
	Check func(p []approval.Parameter, content []byte) ([]approval.Parameter, error)
	// Run carries it out, once. who is the proposer, with the proposal's number. ctx goes on when who has approved has left, and ends
	// never: bound what needs it. Where it panics, nobody knows what it did.
	Run func(ctx context.Context, who audit.Actor, p []approval.Parameter, content []byte) error
}

// The kinds of channels.
const (
	Unix  = "unix"
	HTTPS = "https"
)

// Channel is how a caller came.
type Channel struct {
	Kind   string // Unix or HTTPS
	UID    uint32 // of the caller's process, on Unix
	Source string // the caller's address, on HTTPS; for people to read
}

// same says that it may be the same caller.
func (c Channel) same(other Channel) bool { return c.Kind == other.Kind && c.UID == other.UID }

func (c Channel) root() bool { return c.Kind == Unix && c.UID == 0 }

// String is for events: "unix uid 0", "https from 127.0.0.1".
func (c Channel) String() string {
	if c.Kind == Unix {
		return "unix uid " + strconv.FormatUint(uint64(c.UID), 10)
	}
	return c.Kind + " from " + c.Source
}

// Bounds of what is kept.
const (
	maxOperators = 256
	maxRecord    = 2000 // bytes of an operator in JSON: an event has room for it
	maxName      = 64
)

// Registry is where operators come to. It is safe for concurrent use.
type Registry struct {
	Config
	ledger  *ledger.Ledger
	writing manage.Lock // held while the ledger is written; never while an act is carried out

	// mu guards all of memory below. It is held for look-ups and changes of memory only; the ledger's
	// writer takes it to let memory follow.
	mu        sync.Mutex
	loaded    bool // the records of the start have been taken
	roster    roster
	proposals map[uint64]*record
	ends      map[uint64]chan struct{} // of those that are being carried out: closed when that is over
	closing   bool                     // nothing is carried out any more
	sessions  map[[32]byte]*Session    // by SHA-256 of the token
	used      used                     // challenges
	failures  failures
	secret    [32]byte // of the ids of challenges: a restart forgets it
}

// Open reads what the ledger has. What it finds running was interrupted, by a crash or a stop, and is written down as that: so no two
// desks may be open on one ledger.
func Open(l *ledger.Ledger, c Config) (*Registry, error) {
	d := &Registry{
		Config: c, ledger: l, writing: manage.NewLock(), roster: roster{map[string]person{}, 1}, proposals: map[uint64]*record{}, ends: map[uint64]chan struct{}{},
		sessions: map[[32]byte]*Session{}, used: used{}, failures: failures{each: map[failureKey]*bucket{}},
	}
	rand.Read(d.secret[:])
	if d.Acts = maps.Clone(c.Acts); d.Acts == nil {
		d.Acts = map[string]Act{}
	}
	for name, act := range d.ownActs() {
		if _, taken := d.Acts[name]; taken {
			return nil, fmt.Errorf("operators: the act %q is there twice", name)
		}
		d.Acts[name] = act
	}
	if err := l.Follow(context.Background(), &d.mu,
		ledger.Followed{Table: ledger.Operators, Take: d.takeOperator},
		ledger.Followed{Table: ledger.Meta, Take: d.takeNeeded},
		ledger.Followed{Table: ledger.Proposals, Take: d.takeProposal}); err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.loaded = true
	d.mu.Unlock()
	return d, d.endInterrupted()
}

// Close waits until the acts under way have ended and that is written down. No others begin. What has not ended when ctx does is found
// interrupted by the next Open.
func (d *Registry) Close(ctx context.Context) error {
	if err := d.write(ctx, "stop", func(context.Context) error { // after it, no proposal becomes running: see Approve
		d.mu.Lock()
		defer d.mu.Unlock()
		d.closing = true
		return nil
	}); err != nil {
		return err
	}
	d.mu.Lock()
	ends := slices.Collect(maps.Values(d.ends))
	d.mu.Unlock()
	for _, end := range ends {
		select {
		case <-end:
		case <-ctx.Done():
			return fmt.Errorf("an approved act has not ended: %w", ctx.Err())
		}
	}
	return nil
}

func (d *Registry) stopping() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.closing
}

// write has do change the ledger to the end, whether the caller waits or not.
func (d *Registry) write(ctx context.Context, what string, do func(context.Context) error) error {
	return d.writing.Run(ctx, d.Log, what, do)
}

// person is an operator as the ledger has it.
type person struct {
	approval.Operator
	// Counts are the last numbers of the credentials that count what they sign, by id. Those in the ledger count; memory does not follow.
	Counts map[string]uint32 `json:"counts,omitempty"`
}

// counted says whether a credential's next signature has the number n, and remembers it. Authenticators that do not count say 0.
// Another number than a higher one is that of a copy (WebAuthn section 6.1.1).
func (p *person) counted(credential string, n uint32) (changed bool, err error) {
	last := p.Counts[credential]
	if n == 0 && last == 0 {
		return false, nil
	}
	if n <= last {
		return false, fmt.Errorf("%w: the credential counts what it signs, and is at %d where %d was seen: there may be a copy of it", approval.ErrNotProven, n, last)
	}
	if p.Counts = maps.Clone(p.Counts); p.Counts == nil {
		p.Counts = map[string]uint32{}
	}
	p.Counts[credential] = n
	return true, nil
}

// Begun says whether there is an operator. Until then there is no work for a desk but EnrolFirst.
func (d *Registry) Begun() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.roster.people) > 0
}

// Operators lists them by name.
func (d *Registry) Operators() (all []approval.Operator) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range d.roster.people {
		all = append(all, p.Operator)
	}
	slices.SortFunc(all, func(x, y approval.Operator) int { return cmp.Compare(x.Name, y.Name) })
	return all
}

// Operator returns that of a name, or ErrNotFound.
func (d *Registry) Operator(name string) (approval.Operator, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p, ok := d.roster.people[name]
	if !ok {
		return approval.Operator{}, fmt.Errorf("operator: %w", ErrNotFound)
	}
	return p.Operator, nil
}

// Needed is how many approvals an act needs.
func (d *Registry) Needed() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.roster.needed
}

// takeOperator lets memory say what the record of an operator says. Sessions of an operator who is
// another one now have ended when it returns, and confirmations of presence have died. mu is held.
func (d *Registry) takeOperator(name string, value []byte) error {
	before, there := d.roster.people[name]
	if value == nil {
		delete(d.roster.people, name)
	} else {
		p, err := decodePerson(name, value)
		if err != nil {
			return err
		}
		d.roster.people[name] = p
		if there && string(manage.Encode(before.Operator)) == string(manage.Encode(p.Operator)) {
			return nil // a credential has counted a signature
		}
	}
	d.endSessions(name)
	if d.loaded && d.Changed != nil {
		d.Changed()
	}
	return nil
}

// takeNeeded lets memory say how many approvals an act needs. mu is held.
func (d *Registry) takeNeeded(key string, value []byte) (err error) {
	if key == neededKey {
		d.roster.needed, err = decodeNeeded(value)
	}
	return err
}

// takeProposal lets memory say what the record of a proposal says. mu is held.
func (d *Registry) takeProposal(key string, value []byte) error {
	if value == nil {
		id, err := strconv.ParseUint(key, 10, 64)
		delete(d.proposals, id)
		return err
	}
	r, err := decodeRecord(key, value)
	if err == nil {
		d.proposals[r.id()] = r
	}
	return err
}
