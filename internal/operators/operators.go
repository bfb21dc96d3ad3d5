// Package operators manages the operators of an appliance: enrolment, sessions, and proposals with
// their approvals. The ledger has operators and proposals. Memory has challenges and sessions, so
// that a restart signs all operators out. Package approval verifies proofs. Begin reading at
// Registry.SignIn, then at Registry.Approve.
//
// # A proposal never runs twice
//
// Each change of a proposal is one transaction of the ledger, with its event. The disk then has
//
//	after Propose              open, the text          ProposalMade
//	after an approval          open, the approval      ApprovalGiven
//	after the last approval    running                 ApprovalGiven, ProposalRun
//	after the act              done or failed          ProposalDone
//
// Approve starts the act only after the commit of the transaction from open to running. There is
// one such transaction: no transition leads back to open, and no other transition starts while the
// proposal is running.
//
//   - A crash before that commit leaves the proposal open. The act has not started.
//   - A crash after that commit leaves the proposal running. The next Open can't know how far the
//     act has come: the proposal becomes interrupted, for people to look at, and never runs again.
//   - A disk that refuses that commit leaves the proposal open. The act has not started.
//   - A roster without the proposer, or without the proposer's role for the act, ends the open
//     proposal in the transaction of its own change.
//   - A disk that refuses the end of an act leaves the proposal running. The end is written again
//     every second until the disk accepts the write. A crash before makes the proposal interrupted.
//
// # Valid approvals
//
// The transaction that starts the act counts the approvals, by the state of the ledger. An approval
// counts while its operator is an approver and has the credential of the approval. Where hardware
// keys are required, it must be by one, and so must each approval that makes them required. Each
// operator counts once, and a credential belongs to one operator. An operator approves a proposal
// once: if the credential was replaced since, the approval does not count any more, and the act
// must be proposed again if that operator is needed. The quorum is the larger of the number in the
// proposal's text and the number in force.
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
	"countersign/internal/cause"
	"countersign/internal/ijson"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/requestid"
	"countersign/internal/secret"
)

// The errors of the package. The error for a proof that does not hold is approval.ErrNotProven.
var (
	ErrNotFound      = errors.New("does not exist")
	ErrExists        = errors.New("it exists already")
	ErrInvalid       = approval.ErrInvalid
	ErrSignedOut     = errors.New("not signed in: sign in again")
	ErrNotAllowed    = errors.New("not allowed")
	ErrConflict      = errors.New("not possible as it is now")
	ErrLimited       = errors.New("too many proofs have failed")
	ErrUnavailable   = manage.ErrUnavailable
	ErrUninitialised = errors.New("there are no operators yet: root enrols the first one on the Unix socket")
)

// Limited is ErrLimited with the time until the next attempt, in whole seconds.
type Limited struct{ RetryAfter time.Duration }

func (e *Limited) Error() string { return fmt.Sprintf("%v: try again in %v", ErrLimited, e.RetryAfter) }
func (e *Limited) Unwrap() error { return ErrLimited }

// Config is the configuration of a Registry.
type Config struct {
	// Appliance is the name of the audit log. Signed texts have the name, so that an approval is
	// valid at one appliance only.
	Appliance string
	// RPID is the relying party of passkeys: "localhost".
	RPID string
	// Origin is the origin of the pages that may use passkeys: "https://localhost:7780".
	Origin string
	// Acts are the acts that can be proposed, by name. Open adds the acts on operators.
	Acts map[string]Act
	// Changed is called after a change of an operator or a credential, before the act ends.
	// Confirmations of presence end then.
	Changed func()
	Log     *slog.Logger
}

// Act is an act that a proposal can ask for.
type Act struct {
	Roles []approval.Role // the proposer has one of them
	// Check validates the parameters and the content of a proposal, and returns the error that Run
	// would return now. Check returns the parameters to be approved: complete, in canonical order
	// and form.
	Check func(p []approval.Parameter, content []byte) ([]approval.Parameter, error)
	// Run carries the act out, once. who is the proposer, with the proposal's number. ctx never
	// ends, even if the last approver leaves: Run must set its own timeouts. After a panic, the
	// effects of the act are unknown.
	Run func(ctx context.Context, who audit.Actor, p []approval.Parameter, content []byte) error
	// Warn lists the doubts about parameters and content that have passed Check; nil: none.
	Warn func(p []approval.Parameter, content []byte) []string
}

// The kinds of channels.
const (
	Unix  = approval.ChannelUnix
	HTTPS = approval.ChannelHTTPS
)

// Channel is the connection of a caller.
type Channel struct {
	Kind   string // Unix or HTTPS
	UID    uint32 // of the caller's process, on Unix
	Source string // the caller's address, on HTTPS; for people to read

	Request string // id of the present request; see package requestid
}

// sameCaller reports whether both channels can be of one caller: the same kind and the same user.
func (c Channel) sameCaller(other Channel) bool { return c.Kind == other.Kind && c.UID == other.UID }

func (c Channel) root() bool { return c.Kind == Unix && c.UID == 0 }

// String returns the form for events: "unix uid 0", "https from 127.0.0.1".
func (c Channel) String() string {
	if c.Kind == Unix {
		return "unix uid " + strconv.FormatUint(uint64(c.UID), 10)
	}
	return c.Kind + " from " + c.Source
}

// Limits of records.
const (
	maxOperators = 256
	maxRecord    = 2000 // bytes of an operator's JSON: an event has room for it
	maxName      = 64   // bytes
)

// Registry has the operators, sessions and proposals of an appliance. A Registry is safe for
// concurrent use.
type Registry struct {
	Config
	ledger  *ledger.Ledger
	writing manage.Lock // held during a transaction of this package; never while an act is carried out

	// mu guards all fields below. mu is held for reads and changes of memory only, never while a
	// goroutine waits for the ledger: the ledger's writer takes mu to update the memory after a
	// commit.
	mu        sync.Mutex
	loaded    bool // the memory has all records that existed at the start
	roster    roster
	proposals map[uint64]*record
	executing map[uint64]chan struct{} // by proposal; closed after the end of the act
	closing   bool                     // no other act may start
	sessions  map[[32]byte]*Session    // by SHA-256 of the token
	scrapers  map[string]Scraper
	used      usedNonces // of challenges
	failures  failures
	refusals  refusals
	refused   map[string]int // refused proofs since the start, by attempt.purpose
	macKey    secret.Bytes   // of challenges' ids; new after each start
}

// Open returns the Registry of a ledger. A proposal that is running in the ledger was interrupted
// by a crash or a stop, and Open writes the interruption. Two Registries must not be open on one
// ledger: Open would interrupt the acts of the other one.
func Open(l *ledger.Ledger, c Config) (*Registry, error) {
	r := &Registry{
		Config: c, ledger: l, writing: manage.NewLock(),
		roster:    roster{people: map[string]person{}, needed: 1},
		proposals: map[uint64]*record{}, executing: map[uint64]chan struct{}{},
		sessions: map[[32]byte]*Session{}, scrapers: map[string]Scraper{}, used: usedNonces{},
		failures: failures{each: map[failureKey]*leakyBucket{}},
		refusals: refusals{pace: map[string]*leakyBucket{}}, refused: map[string]int{},
	}
	key := make([]byte, 32)
	rand.Read(key)
	r.macKey = secret.New(key)
	if r.Acts = maps.Clone(c.Acts); r.Acts == nil {
		r.Acts = map[string]Act{}
	}
	for name, act := range r.operatorActs() {
		if _, taken := r.Acts[name]; taken {
			return nil, fmt.Errorf("operators: the act %q is there twice", name)
		}
		r.Acts[name] = act
	}
	if err := l.Follow(context.Background(), &r.mu,
		ledger.Followed{Table: ledger.Operators, Take: r.takeOperator},
		ledger.Followed{Table: ledger.Meta, Take: r.takeMeta},
		ledger.Followed{Table: ledger.Proposals, Take: r.takeProposal}); err != nil {
		return nil, err
	}
	r.mu.Lock()
	r.loaded = true
	r.mu.Unlock()
	return r, r.endInterrupted()
}

// Close waits for the end of the acts that are carried out, and for the write of their ends. No
// other act starts. If ctx ends first, the next Open finds the remaining proposals interrupted.
func (r *Registry) Close(ctx context.Context) error {
	if err := r.RecordCount(ctx); err != nil {
		r.Log.Error("the end of the operators", "err", err)
	}
	// After this write no proposal becomes running: Approve checks stopping in its transaction.
	if err := r.write(ctx, "", "stop", func(context.Context) error {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.closing = true
		return nil
	}); err != nil {
		return err
	}
	r.mu.Lock()
	executing := slices.Collect(maps.Values(r.executing))
	r.mu.Unlock()
	for _, ended := range executing {
		select {
		case <-ended:
		case <-ctx.Done():
			return fmt.Errorf("an approved act has not ended: %w", ctx.Err())
		}
	}
	return nil
}

func (r *Registry) stopping() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closing
}

// write runs change under the lock writing, to its end, even if the caller's ctx ends first.
// request is the id of the caller's request, or "".
func (r *Registry) write(
	ctx context.Context, request, what string, change func(context.Context) error,
) error {
	return r.writing.Run(ctx, r.Log.With(requestid.Attr(request)), what, change)
}

// person is an operator's record in the ledger.
type person struct {
	approval.Operator
	// SignCounts are the last signature counters of authenticators, by the credential's id. Only
	// the counters in the ledger are compared: the memory can be behind.
	SignCounts map[string]uint32 `json:"counts,omitempty"`
}

// advanceCounter checks a credential's signature counter n, and records n. An authenticator without
// a counter always gives 0. Any other counter must be higher than the last one: otherwise there may
// be a copy of the credential (WebAuthn section 6.1.1).
func (p *person) advanceCounter(credential string, n uint32) (changed bool, err error) {
	last := p.SignCounts[credential]
	if n == 0 && last == 0 {
		return false, nil
	}
	if n <= last {
		return false, fmt.Errorf("%w: the credential counts what it signs, and is at %d where %d was seen: "+
			"there may be a copy of it", approval.ErrNotProven, n, last)
	}
	if p.SignCounts = maps.Clone(p.SignCounts); p.SignCounts == nil {
		p.SignCounts = map[string]uint32{}
	}
	p.SignCounts[credential] = n
	return true, nil
}

// Initialised reports whether there is an operator. Before, only EnrolFirst succeeds.
func (r *Registry) Initialised() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.roster.people) > 0
}

// Operators lists the operators by name.
func (r *Registry) Operators() (all []approval.Operator) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.roster.people {
		all = append(all, p.Operator)
	}
	slices.SortFunc(all, func(x, y approval.Operator) int { return cmp.Compare(x.Name, y.Name) })
	return all
}

// Operator returns the operator with a name, or ErrNotFound.
func (r *Registry) Operator(name string) (approval.Operator, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p, exists := r.roster.people[name]
	if !exists {
		return approval.Operator{}, fmt.Errorf("operator %q: %w", ijson.Clip(name), ErrNotFound)
	}
	return p.Operator, nil
}

// Needed returns the quorum: the number of approvals that an act needs.
func (r *Registry) Needed() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.roster.needed
}

// QuorumWarning returns a warning while the loss of one approver would leave no quorum; otherwise
// "".
func (r *Registry) QuorumWarning() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.roster.warning()
}

// Causes returns a cause if the quorum can't be reached any more.
func (r *Registry) Causes() []cause.Cause {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.roster.approvers(); len(r.roster.people) > 0 && n < r.roster.needed {
		return []cause.Cause{cause.Quorum.Of("", "%d of %d approvers", r.roster.needed, n)}
	}
	return nil
}

// Hardware reports whether approvals must be by hardware keys. See approval.Verified.
func (r *Registry) Hardware() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.roster.hardware
}

// takeOperator updates the memory after a change of an operator's record. takeOperator ends the
// sessions of the operator, and the confirmations of presence, unless only a signature counter has
// changed. The caller holds mu.
func (r *Registry) takeOperator(name string, value []byte) error {
	before, exists := r.roster.people[name]
	if value == nil {
		delete(r.roster.people, name)
	} else {
		p, err := decodePerson(name, value)
		if err != nil {
			return err
		}
		r.roster.people[name] = p
		if exists && string(manage.Encode(before.Operator)) == string(manage.Encode(p.Operator)) {
			return nil // only a signature counter has changed
		}
	}
	r.endSessions(name)
	if r.loaded && r.Changed != nil {
		r.Changed()
	}
	return nil
}

// takeMeta updates the memory after a change of the rules for approvals, or of a scraper. The
// caller holds mu.
func (r *Registry) takeMeta(key string, value []byte) (err error) {
	if name, ok := scraperOf(key); ok {
		return r.takeScraper(name, value)
	}
	switch key {
	case neededKey:
		r.roster.needed, err = decodeNeeded(value)
	case hardwareKey:
		r.roster.hardware, err = decodeHardware(value)
	}
	return err
}

// takeProposal updates the memory after a change of a proposal's record. The caller holds mu.
func (r *Registry) takeProposal(key string, value []byte) error {
	if value == nil {
		id, err := strconv.ParseUint(key, 10, 64)
		delete(r.proposals, id)
		return err
	}
	rec, err := decodeRecord(key, value)
	if err == nil {
		r.proposals[rec.id()] = rec
	}
	return err
}
