// Package audit is the audit log: what an event says, the Merkle tree over the events, the checkpoints that are signed of
// it, and what anyone needs to check all that without trusting the appliance. The ledger stores the bytes; this package
// gives them their meaning. Begin reading at Event, then at Verify.
//
// The log is cut into epochs, each a tree of its own (RFC 6962) in the form of C2SP tlog-tiles, with checkpoints in the form
// of C2SP tlog-checkpoint. Events are numbered through all epochs; the first event of an epoch names the end of the epoch before.
//
// An event holds no payload, no amount and no secret: digests, names and public keys only.
package audit

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	strict "github.com/go-json-experiment/json"
)

// Type says what happened.
type Type string

// The events. A signature leaves two marks: its admission is on disk before the key is used (SignatureAdmitted, or
// PaymentInitiated where the document is a payment); its outcome says how it ended. An admission without an outcome means
// that the appliance was cut off in between: assume that the signature exists. Kind says what is what.
const (
	EpochBegun          Type = "EpochBegun" // the first event of each epoch; it names the end of the one before
	Started             Type = "Started"
	Stopped             Type = "Stopped"
	SignatureAdmitted   Type = "SignatureAdmitted"
	SignatureCreated    Type = "SignatureCreated"
	SignatureFailed     Type = "SignatureFailed"
	SubscriptionCreated Type = "SubscriptionCreated" // the signature of a subscription
	PaymentInitiated    Type = "PaymentInitiated"    // the admission of a payment
	PaymentCompleted    Type = "PaymentCompleted"    // its signature
	PaymentFailed       Type = "PaymentFailed"
	SignatureVerified   Type = "SignatureVerified"
	SignatureRejected   Type = "SignatureRejected"
	ReplayRefused       Type = "ReplayRefused"
	RateLimitTriggered  Type = "RateLimitTriggered" // aggregated: metadata count, since, until
	HandshakeRefused    Type = "HandshakeRefused"   // aggregated
	KeyCreated          Type = "KeyCreated"
	KeyImported         Type = "KeyImported"
	KeyCreationFailed   Type = "KeyCreationFailed"
	KeyRotated          Type = "KeyRotated"
	KeyRotationFailed   Type = "KeyRotationFailed"
	KeyStateChanged     Type = "KeyStateChanged" // metadata from and to
	KeyCommitted        Type = "KeyCommitted"    // a version's successor is made: metadata next is SHA-256 of its public key
	RotationAnnounced   Type = "RotationAnnounced"
	RotationKnown       Type = "RotationKnown" // a peer has acknowledged a rotation
	LineChanged         Type = "LineChanged"   // how a key is rotated, and whether operators must confirm it
	NoiseKeyAuthorized  Type = "NoiseKeyAuthorized"
	PeerAdded           Type = "PeerAdded"
	PeerRemoved         Type = "PeerRemoved"
	PeerSuspended       Type = "PeerSuspended"
	PeerResumed         Type = "PeerResumed"
	PolicyChanged       Type = "PolicyChanged"
	OperatorEnrolled    Type = "OperatorEnrolled" // the first administrator, by root
	OperatorChanged     Type = "OperatorChanged"  // metadata operator: the record after it; none where it was removed
	OperatorSignedIn    Type = "OperatorSignedIn"
	OperatorSignedOut   Type = "OperatorSignedOut"
	SignInRefused       Type = "SignInRefused"
	PresenceConfirmed   Type = "PresenceConfirmed" // of an operator, for a key
	ApprovalsChanged    Type = "ApprovalsChanged"  // how many approvers an act needs
	ProposalMade        Type = "ProposalMade"      // metadata text, which is what is approved, and its digest
	ApprovalGiven       Type = "ApprovalGiven"     // metadata digest, credential, proof
	ProposalWithdrawn   Type = "ProposalWithdrawn"
	ProposalExpired     Type = "ProposalExpired"
	ProposalRun         Type = "ProposalRun"        // it was approved, and is carried out from here on
	ProposalDone        Type = "ProposalDone"       // and how that ended
	CertificateChanged  Type = "CertificateChanged" // of the admin API; metadata sha256 of what was to be installed
	Locked              Type = "Locked"
	Unlocked            Type = "Unlocked"
	BackupMade          Type = "BackupMade"
	BackupRestored      Type = "BackupRestored"
	RetentionChanged    Type = "RetentionChanged"
	RetentionApplied    Type = "RetentionApplied" // names the epoch that is dropped, or the time before which receipts are
	LegalHoldSet        Type = "LegalHoldSet"
	LegalHoldReleased   Type = "LegalHoldReleased"
	LedgerCompacted     Type = "LedgerCompacted"
	DeviceUnavailable   Type = "DeviceUnavailable" // a token, or the ledger's disk
	DeviceRecovered     Type = "DeviceRecovered"
	TokenRetried        Type = "TokenRetried"
	LedgerBound         Type = "LedgerBound" // to a counter that only rises
	RollbackDetected    Type = "RollbackDetected"
	RollbackAccepted    Type = "RollbackAccepted"
	ClockRefused        Type = "ClockRefused" // the clock is behind the ledger's time: nothing is admitted
	ClockRecovered      Type = "ClockRecovered"
	ClockAccepted       Type = "ClockAccepted" // an operator says that the clock is right, and the ledger's time follows it
)

// Kind is what an event means for the rules of the ledger.
type Kind int

const (
	Other     Kind = iota // it has no rule
	Admission             // a nonce was spent, and a signature may follow
	Outcome               // it ends the admission that it names
	Spent                 // a nonce was spent, and nothing follows
)

// kinds lists all types.
var kinds = map[Type]Kind{
	EpochBegun: Other, Started: Other, Stopped: Other,
	SignatureAdmitted: Admission, PaymentInitiated: Admission,
	SignatureCreated: Outcome, SignatureFailed: Outcome, SubscriptionCreated: Outcome, PaymentCompleted: Outcome, PaymentFailed: Outcome,
	SignatureVerified: Spent, SignatureRejected: Other, ReplayRefused: Other, RateLimitTriggered: Other, HandshakeRefused: Other,
	KeyCreated: Other, KeyImported: Other, KeyCreationFailed: Other, KeyRotated: Other, KeyRotationFailed: Other, KeyStateChanged: Other,
	KeyCommitted: Other, RotationAnnounced: Other, RotationKnown: Other, LineChanged: Other, NoiseKeyAuthorized: Other,
	PeerAdded: Other, PeerRemoved: Other, PeerSuspended: Other, PeerResumed: Other, PolicyChanged: Other,
	OperatorEnrolled: Other, OperatorChanged: Other, OperatorSignedIn: Other, OperatorSignedOut: Other, SignInRefused: Other, PresenceConfirmed: Other,
	ApprovalsChanged: Other, ProposalMade: Other, ApprovalGiven: Other, ProposalWithdrawn: Other, ProposalExpired: Other, ProposalRun: Other, ProposalDone: Other,
	CertificateChanged: Other, Locked: Other, Unlocked: Other, RetentionChanged: Other,
	BackupMade: Other, BackupRestored: Other, RetentionApplied: Other, LegalHoldSet: Other, LegalHoldReleased: Other, LedgerCompacted: Other,
	DeviceUnavailable: Other, DeviceRecovered: Other, TokenRetried: Other,
	LedgerBound: Other, RollbackDetected: Other, RollbackAccepted: Other, ClockRefused: Other, ClockRecovered: Other, ClockAccepted: Other,
}

// Types lists all types in alphabetical order.
func Types() []Type { return slices.Sorted(maps.Keys(kinds)) }

// Known says whether there is such a type, and Kind what it means.
func (t Type) Known() bool { _, ok := kinds[t]; return ok }

func (t Type) Kind() Kind { return kinds[t] }

// OfDocument returns the types of the three marks that a signature of a document leaves.
func OfDocument(transcript string) (admitted, created, failed Type) {
	switch transcript {
	case "payment-request-v1":
		return PaymentInitiated, PaymentCompleted, PaymentFailed
	case "paykit-subscription-v2":
		return SignatureAdmitted, SubscriptionCreated, SignatureFailed
	}
	return SignatureAdmitted, SignatureCreated, SignatureFailed
}

// Event is one entry of the log.
type Event struct {
	TimeMS   int64             `json:"time_ms"` // Unix milliseconds
	Type     Type              `json:"type"`
	Actor    Actor             `json:"actor"`
	Action   string            `json:"action"`             // what the actor asked for: sign, verify, key create, …
	Resource string            `json:"resource,omitempty"` // what it was to be done with: a key or a peer
	Outcome  string            `json:"outcome"`            // ok, or the code of the refusal
	Metadata map[string]string `json:"metadata,omitempty"`
}

// Actor is who asked: a peer by name and Noise key, an operator, or the daemon itself.
type Actor struct {
	Kind      string `json:"kind"` // peer, operator or daemon
	Name      string `json:"name"`
	PublicKey string `json:"public_key,omitempty"` // hex
	// Identity is the Ed25519 key, in hex, that a peer of the profile pubky-noise-v1 has proven to be bound to.
	Identity string `json:"identity,omitempty"`
	// Proposal is the number of the approved proposal that the operator's act carries out.
	Proposal uint64 `json:"proposal,omitempty"`
}

// Peer, Operator and Daemon name the actor of an event.
func Peer(name string, publicKey [32]byte) Actor {
	return Actor{Kind: "peer", Name: name, PublicKey: hex.EncodeToString(publicKey[:])}
}

func Operator(name string) Actor { return Actor{Kind: "operator", Name: name} }

func Daemon() Actor { return Actor{Kind: "daemon", Name: "countersignd"} }

// maxText bounds a text in the metadata: the cause of an error may be long, and an entry of the log has 65535 bytes at most.
const maxText = 2048

// Encode writes the event with the given time; equal events give equal bytes. Too long a text is cut.
func (e Event) Encode(now time.Time) []byte {
	e.TimeMS = now.UnixMilli()
	for name, text := range e.Metadata {
		if len(text) > maxText {
			e.Metadata = maps.Clone(e.Metadata)
			e.Metadata[name] = strings.ToValidUTF8(text[:maxText-len("…")], "") + "…"
		}
	}
	b, err := json.Marshal(e)
	if err != nil {
		panic("audit: an event that is not JSON: " + err.Error()) // strings and numbers always are
	}
	return b
}

// Decode reads what Encode wrote.
func Decode(b []byte) (Event, error) {
	var e Event
	if err := json.Unmarshal(b, &e); err != nil {
		return Event{}, fmt.Errorf("audit: event: %w", err)
	}
	return e, nil
}

// decodeStrict reads an event and holds it against the schema: no other fields, none twice, a known type, an actor, an action, an
// outcome, a time.
func decodeStrict(b []byte) (Event, error) {
	var e Event
	if err := strict.Unmarshal(b, &e, strict.RejectUnknownMembers(true)); err != nil {
		return Event{}, errors.New("it is not an event: " + strings.TrimPrefix(err.Error(), "json: "))
	}
	switch {
	case !e.Type.Known():
		return Event{}, fmt.Errorf("its type %q is unknown", e.Type)
	case e.TimeMS <= 0:
		return Event{}, errors.New("it has no time")
	case e.Actor.Kind != "peer" && e.Actor.Kind != "operator" && e.Actor.Kind != "daemon" || e.Actor.Name == "":
		return Event{}, errors.New("it has no actor")
	case e.Actor.Kind == "peer" && len(e.Actor.PublicKey) != 64:
		return Event{}, errors.New("its actor has no public key")
	case e.Actor.Identity != "" && (e.Actor.Kind != "peer" || len(e.Actor.Identity) != 64):
		return Event{}, errors.New("its actor has an identity that is none")
	case e.Actor.Proposal != 0 && e.Actor.Kind != "operator":
		return Event{}, errors.New("its actor carries out a proposal and is no operator")
	case e.Action == "" || e.Outcome == "":
		return Event{}, errors.New("it has no action or no outcome")
	}
	return e, nil
}
