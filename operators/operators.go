// Package operators keeps the people who run an appliance: their credentials, sessions and proposals.
package operators

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/ledger"
)

// What callers tell apart. Proofs that do not hold are approval.ErrNotProven.
var (
	ErrNotFound      = errors.New("there is no such operator, session or proposal")
	ErrExists        = errors.New("it exists already")
	ErrInvalid       = errors.New("not valid")
	ErrSignedOut     = errors.New("not signed in")
	ErrNotAllowed    = errors.New("not allowed")
	ErrConflict      = errors.New("not possible in its state")
	ErrLimited       = errors.New("too many failed proofs")
	ErrUninitialised = errors.New("there are no operators yet: root enrols the first one on the Unix socket")
)

// Limited is ErrLimited with the time after which to try again.
type Limited struct{ RetryAfter time.Duration }

func (e *Limited) Error() string {
	return fmt.Sprintf("%v: try again in %v", ErrLimited, e.RetryAfter)
}
func (e *Limited) Unwrap() error { return ErrLimited }

// Config says what a desk is for.
type Config struct {
	Appliance string         // the name of the audit log, for the texts that are signed
	RPID      string         // the relying party of passkeys: "localhost"
	Origin    string         // from which passkeys answer: "https://localhost:7780"
	Acts      map[string]Act // what can be proposed, besides the acts on operators, which Open adds
	Changed   func()         // called when an operator or a credential was added, changed or removed
	Log       *slog.Logger
	Now       func() time.Time // default: time.Now
}

// Act is what a proposal can ask for.
type Act struct {
	Roles []approval.Role // who may propose it; none: administrators
	// Check judges what is proposed, and returns the parameters as they are to be approved: their names, their order, completed.
	Check func(p []approval.Parameter, content []byte) ([]approval.Parameter, error)
	// Run carries it out, once. who is the proposer, with the number of the proposal. ctx does not end when the caller leaves.
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
	UID    uint32 // of the caller, on Unix
	Source string // the address of the caller, on HTTPS; for people to read
}

// Challenge is what has to be signed, once, to prove to be an operator.
type Challenge struct {
	ID      string
	Text    string // its first line is the namespace of an SSHSIG; a passkey's challenge is SHA-256 of it
	Expires time.Time
	RPID    string
	Allowed []string // credential ids of passkeys, base64url; none for a sign-in, which is with a discoverable one
}

// Session is a person at work.
type Session struct {
	ID         string
	Operator   string
	Roles      []approval.Role
	Credential string // the id of that which it was begun with
	Channel    Channel
	Begun      time.Time
	Expires    time.Time // the end of it in any case
	LastUsed   time.Time
}

// The states of a proposal.
const (
	Pending     = "open"
	Running     = "running"
	Done        = "done"
	Failed      = "failed"
	Expired     = "expired"
	Withdrawn   = "withdrawn"
	Interrupted = "interrupted"
)

// Proposal is an act that was proposed, and what became of it. Its text is approval.Proposal.Text.
type Proposal struct {
	approval.Proposal
	State     string
	Approvals []Approval
	Required  int       // approvals, by the text and by what is in force
	Content   []byte    // what came with it; dropped when it has ended
	Ended     time.Time // zero while it has not
	Cause     string    // why it failed or was interrupted
}

// Approval is one that was given.
type Approval struct {
	Operator   string
	Credential string
	At         time.Time
	Counts     bool // as of now: its operator is an approver still, with that credential
}

// Desk is safe for concurrent use.
type Desk struct{}

// Open reads what the ledger has.
func Open(l *ledger.Ledger, c Config) (*Desk, error) { return nil, errors.ErrUnsupported }

// Close waits until the acts under way have ended. None begins any more.
func (d *Desk) Close(ctx context.Context) error { return errors.ErrUnsupported }

func (d *Desk) Begun() bool { return false }
func (d *Desk) EnrolFirst(ctx context.Context, ch Channel, name string, c approval.Credential) (approval.Operator, error) {
	return approval.Operator{}, errors.ErrUnsupported
}
func (d *Desk) Operators() []approval.Operator { return nil }
func (d *Desk) Operator(name string) (approval.Operator, error) {
	return approval.Operator{}, errors.ErrUnsupported
}
func (d *Desk) Needed() int { return 1 }

// Challenge: purpose is approval.ForSignIn or approval.ForPresence, whose subject is the name of a key.
func (d *Desk) Challenge(purpose, operator, subject string, ch Channel) (Challenge, error) {
	return Challenge{}, errors.ErrUnsupported
}
func (d *Desk) SignIn(ctx context.Context, ch Channel, challenge string, p approval.Proof) (Session, string, error) {
	return Session{}, "", errors.ErrUnsupported
}
func (d *Desk) Session(token string, ch Channel) (Session, error) {
	return Session{}, errors.ErrUnsupported
}
func (d *Desk) Sessions() []Session { return nil }

// Revoke ends a session: anyone his own, an administrator everyone's. SignOut ends the session itself.
func (d *Desk) Revoke(ctx context.Context, s Session, id string) error { return errors.ErrUnsupported }
func (d *Desk) SignOut(ctx context.Context, s Session) error           { return errors.ErrUnsupported }

// Prove: a fresh proof of the session's operator over a challenge for approval.ForPresence and that subject.
func (d *Desk) Prove(ctx context.Context, s Session, challenge, subject string, p approval.Proof) error {
	return errors.ErrUnsupported
}

// Propose: a lifetime of 0 is 24 h.
func (d *Desk) Propose(ctx context.Context, s Session, act string, p []approval.Parameter, content []byte, lifetime time.Duration) (Proposal, error) {
	return Proposal{}, errors.ErrUnsupported
}

// Approve returns the proposal as it is then: open, or as its act ended, or running where ctx ended first.
func (d *Desk) Approve(ctx context.Context, s Session, id uint64, p approval.Proof) (Proposal, error) {
	return Proposal{}, errors.ErrUnsupported
}
func (d *Desk) Withdraw(ctx context.Context, s Session, id uint64) error {
	return errors.ErrUnsupported
}

// Proposals lists those that the ledger has, the newest first.
func (d *Desk) Proposals() ([]Proposal, error)       { return nil, errors.ErrUnsupported }
func (d *Desk) Proposal(id uint64) (Proposal, error) { return Proposal{}, errors.ErrUnsupported }
func (d *Desk) Expire(ctx context.Context) error     { return errors.ErrUnsupported }
