// Package audit defines the audit log: events, the Merkle tree over the events, signed checkpoints
// of the tree, proofs, and verification by anyone without trust in the appliance. The ledger stores
// the bytes; this package gives the bytes their meaning. Begin reading at Event, then at Verify.
//
// The log is divided into epochs. Each epoch has a Merkle tree of its own (RFC 6962) in the form of
// C2SP tlog-tiles, with checkpoints in the form of C2SP tlog-checkpoint. Event numbers run through
// all epochs: after an epoch 0 of 1000 events, epoch 1 begins with event 1000. The first event of
// an epoch names the final size and root of the epoch before.
//
// An event contains digests, names and public keys only: no payload, no amount and no secret.
package audit

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"countersign/internal/ijson"

	strict "github.com/go-json-experiment/json"
)

// Type is the type of an event.
type Type string

// The types of events. A signature has two events. The admission (SignatureAdmitted, or
// PaymentInitiated for a payment) is on disk before the key is used. The outcome, for example
// SignatureCreated, records how the request ended. An admission without an outcome means that the
// appliance stopped in between: assume that the signature exists. Type.Kind tells the two apart.
const (
	EpochBegun          Type = "EpochBegun" // the first event of each epoch; names the end of the epoch before
	Started             Type = "Started"
	Stopped             Type = "Stopped"
	SignatureAdmitted   Type = "SignatureAdmitted"
	SignatureCreated    Type = "SignatureCreated"
	SignatureFailed     Type = "SignatureFailed"
	SubscriptionCreated Type = "SubscriptionCreated" // the signature of a subscription
	PaymentInitiated    Type = "PaymentInitiated"    // the admission of a payment
	PaymentCompleted    Type = "PaymentCompleted"    // the signature of a payment
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
	KeyRecovered        Type = "KeyRecovered"      // a line goes on with its recovery successor
	KeyReturned         Type = "KeyReturned"       // holders' shares have made a key on its token again
	HoldersChanged      Type = "HoldersChanged"    // metadata number, needed, of, holder_1 and so on
	KeyStateChanged     Type = "KeyStateChanged"   // metadata from and to
	KeyCommitted        Type = "KeyCommitted"      // a successor exists; metadata next: SHA-256 of its public key
	RotationRequested   Type = "RotationRequested" // by an operator; on disk before anything is tried
	RotationAnnounced   Type = "RotationAnnounced"
	RotationCancelled   Type = "RotationCancelled"
	RotationKnown       Type = "RotationKnown"   // a peer has acknowledged a rotation
	CompromiseKnown     Type = "CompromiseKnown" // a peer has acknowledged a compromise
	LineChanged         Type = "LineChanged"     // how a key is rotated, and whether operators must confirm its use
	NoiseKeyAuthorized  Type = "NoiseKeyAuthorized"
	PeerAdded           Type = "PeerAdded"
	PeerKeyAdded        Type = "PeerKeyAdded"   // metadata public_key
	PeerKeyRemoved      Type = "PeerKeyRemoved" // metadata public_key
	PeerRemoved         Type = "PeerRemoved"
	PeerSuspended       Type = "PeerSuspended"
	PeerResumed         Type = "PeerResumed"
	PolicyChanged       Type = "PolicyChanged"
	GroupChanged        Type = "GroupChanged"     // metadata of, members, replaces
	GroupRemoved        Type = "GroupRemoved"     // metadata replaces
	OperatorEnrolled    Type = "OperatorEnrolled" // the first administrator, by root
	OperatorChanged     Type = "OperatorChanged"  // metadata operator: the new record; absent after a removal
	OperatorSignedIn    Type = "OperatorSignedIn"
	OperatorSignedOut   Type = "OperatorSignedOut"
	SignInRefused       Type = "SignInRefused"
	ScraperAdded        Type = "ScraperAdded" // may read the metrics by a token; metadata token_sha256, expires
	ScraperRemoved      Type = "ScraperRemoved"
	PresenceConfirmed   Type = "PresenceConfirmed" // of an operator, for a key
	ApproverKeysChanged Type = "ApproverKeysChanged"
	ApprovalsChanged    Type = "ApprovalsChanged" // how many approvers an act needs
	ProposalMade        Type = "ProposalMade"     // metadata text: the text to approve; digest: the text's SHA-256
	ApprovalGiven       Type = "ApprovalGiven"    // metadata digest, credential, proof
	ProposalWithdrawn   Type = "ProposalWithdrawn"
	ProposalExpired     Type = "ProposalExpired"
	ProposalRun         Type = "ProposalRun"        // the proposal was approved, and its execution begins
	ProposalDone        Type = "ProposalDone"       // the execution's outcome
	CertificateChanged  Type = "CertificateChanged" // of the admin API; metadata sha256: of the certificate to install
	CertificateSigned   Type = "CertificateSigned"  // a certificate, or a request for one; metadata digest
	Locked              Type = "Locked"
	Unlocked            Type = "Unlocked"
	BackupMade          Type = "BackupMade" // metadata sha256: of the manifest
	BackupFailed        Type = "BackupFailed"
	BackupProven        Type = "BackupProven" // a drill has restored a backup
	DrillFailed         Type = "DrillFailed"
	BackupsPruned       Type = "BackupsPruned"       // metadata names
	BackupRestored      Type = "BackupRestored"      // metadata sha256, made, replaces, timestamp_after
	FactoryResetBegun   Type = "FactoryResetBegun"   // metadata machine, ledger, keys
	MachineUpdateBegun  Type = "MachineUpdateBegun"  // metadata from, sha256 (of the manifest), rollback_version
	MachineUpdated      Type = "MachineUpdated"      // the new image has proven itself; metadata from
	MachineUpdateFailed Type = "MachineUpdateFailed" // the image of before runs; metadata from, cause
	MachineResetBegun   Type = "MachineResetBegun"
	RetentionChanged    Type = "RetentionChanged"
	RetentionApplied    Type = "RetentionApplied" // names the dropped epoch, or the bound before which receipts go
	LegalHoldSet        Type = "LegalHoldSet"
	LegalHoldReleased   Type = "LegalHoldReleased"
	LedgerCompacted     Type = "LedgerCompacted"
	DeviceUnavailable   Type = "DeviceUnavailable" // a token, the ledger's disk, or the SFTP server of backups
	DeviceRecovered     Type = "DeviceRecovered"
	TokenRetried        Type = "TokenRetried"
	LogLevelChanged     Type = "LogLevelChanged"
	LedgerBound         Type = "LedgerBound" // to a monotonic counter
	RollbackDetected    Type = "RollbackDetected"
	RollbackAccepted    Type = "RollbackAccepted"
	ClockRefused        Type = "ClockRefused" // the clock is behind the ledger's time: no admissions
	ClockRecovered      Type = "ClockRecovered"
	ClockAccepted       Type = "ClockAccepted" // an operator confirmed the clock; the ledger's time follows
	AlertFiring         Type = "AlertFiring"   // metadata level; before: an alert has another level now
	AlertResolved       Type = "AlertResolved"
	AlertAcknowledged   Type = "AlertAcknowledged" // by an operator; metadata until
	AlertRepeated       Type = "AlertRepeated"     // receivers are told again of an alert that fires for long
	AlertTested         Type = "AlertTested"       // an operator has the receivers of alerts sent a test
	WebhookQueued       Type = "WebhookQueued"     // of a rotation or a compromise; metadata message, digest

	// The configuration of a machine that was booted from the image; resource: its SHA-256.
	MachineConfigurationBegun  Type = "MachineConfigurationBegun"  // metadata from
	MachineConfigured          Type = "MachineConfigured"          // the daemon came up with it
	MachineConfigurationFailed Type = "MachineConfigurationFailed" // the one of before is in force; metadata cause
	// A file that a configuration can name; resource: its name.
	MachineFileKept    Type = "MachineFileKept" // metadata size
	MachineFileRemoved Type = "MachineFileRemoved"
)

// Kind is the role of an event in the rules of the ledger.
type Kind int

const (
	Other     Kind = iota // no rule applies
	Admission             // a nonce was spent, and a signature may follow
	Outcome               // the admission in the metadata has ended
	Spent                 // a nonce was spent, and no outcome follows
)

// kinds lists all types with their kinds.
var kinds = map[Type]Kind{
	SignatureAdmitted: Admission, PaymentInitiated: Admission,
	SignatureCreated: Outcome, SignatureFailed: Outcome,
	SubscriptionCreated: Outcome, PaymentCompleted: Outcome, PaymentFailed: Outcome,
	SignatureVerified: Spent,

	EpochBegun: Other, Started: Other, Stopped: Other,
	SignatureRejected: Other, ReplayRefused: Other, RateLimitTriggered: Other, HandshakeRefused: Other,
	KeyCreated: Other, KeyImported: Other, KeyCreationFailed: Other,
	KeyRotated: Other, KeyRotationFailed: Other, KeyRecovered: Other, KeyReturned: Other, HoldersChanged: Other,
	KeyStateChanged: Other,
	KeyCommitted:    Other, RotationRequested: Other, RotationAnnounced: Other, RotationCancelled: Other,
	RotationKnown: Other, CompromiseKnown: Other, LineChanged: Other, NoiseKeyAuthorized: Other,
	PeerAdded: Other, PeerKeyAdded: Other, PeerKeyRemoved: Other, PeerRemoved: Other, PeerSuspended: Other,
	PeerResumed: Other, PolicyChanged: Other, GroupChanged: Other, GroupRemoved: Other,
	OperatorEnrolled: Other, OperatorChanged: Other, OperatorSignedIn: Other, OperatorSignedOut: Other,
	SignInRefused: Other, PresenceConfirmed: Other, ScraperAdded: Other, ScraperRemoved: Other,
	ApproverKeysChanged: Other, ApprovalsChanged: Other, ProposalMade: Other, ApprovalGiven: Other,
	ProposalWithdrawn: Other, ProposalExpired: Other, ProposalRun: Other, ProposalDone: Other,
	CertificateChanged: Other, CertificateSigned: Other,
	Locked: Other, Unlocked: Other, BackupMade: Other, BackupFailed: Other, BackupsPruned: Other, BackupProven: Other,
	DrillFailed:    Other,
	BackupRestored: Other, FactoryResetBegun: Other,
	MachineUpdateBegun: Other, MachineUpdated: Other, MachineUpdateFailed: Other, MachineResetBegun: Other,
	MachineConfigurationBegun: Other, MachineConfigured: Other, MachineConfigurationFailed: Other,
	MachineFileKept: Other, MachineFileRemoved: Other,
	RetentionChanged: Other, RetentionApplied: Other, LegalHoldSet: Other, LegalHoldReleased: Other,
	LedgerCompacted: Other, DeviceUnavailable: Other, DeviceRecovered: Other, TokenRetried: Other,
	LogLevelChanged: Other,
	LedgerBound:     Other, RollbackDetected: Other, RollbackAccepted: Other,
	ClockRefused: Other, ClockRecovered: Other, ClockAccepted: Other,
	AlertFiring: Other, AlertResolved: Other, AlertAcknowledged: Other, AlertRepeated: Other, AlertTested: Other,
	WebhookQueued: Other,
}

// Types lists all types in alphabetical order.
func Types() []Type { return slices.Sorted(maps.Keys(kinds)) }

// Known reports whether t is one of Types.
func (t Type) Known() bool { _, ok := kinds[t]; return ok }

// Kind returns the kind of events of this type: Other for an unknown type.
func (t Type) Kind() Kind { return kinds[t] }

// HasReceipt reports whether the ledger has a receipt for each event of this type: the signature of
// a document with a payment.
func (t Type) HasReceipt() bool { return t == PaymentCompleted || t == SubscriptionCreated }

// OfDocument returns the types of the admission and of the two outcomes for a document of a
// transcript type. Example: PaymentInitiated, PaymentCompleted and PaymentFailed for
// payment-request-v1.
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
	Action   string            `json:"action"`             // the request: sign, verify, key create, …
	Resource string            `json:"resource,omitempty"` // the object of the request: a key or a peer
	Outcome  string            `json:"outcome"`            // ok, or the code of the refusal
	Metadata map[string]string `json:"metadata,omitempty"`
}

// Actor is the origin of a request: a peer with its name and Noise key, an operator, or the daemon.
type Actor struct {
	Kind      string `json:"kind"` // peer, operator or daemon
	Name      string `json:"name"`
	PublicKey string `json:"public_key,omitempty"` // hex
	// Identity is the Ed25519 key, in hex, to which a peer of the profile pubky-noise-v1 has proven
	// a binding.
	Identity string `json:"identity,omitempty"`
	// Proposal is the number of the approved proposal that the operator's act executes.
	Proposal uint64 `json:"proposal,omitempty,omitzero"`
	// Request is the id of the request of a peer or operator. For an item of a batch, a dot and the
	// item's index follow. The answer to the request has the id too.
	Request string `json:"request,omitempty"`
}

// Peer returns the actor for a peer with a Noise public key.
func Peer(name string, publicKey [32]byte) Actor {
	return Actor{Kind: "peer", Name: name, PublicKey: hex.EncodeToString(publicKey[:])}
}

// Operator returns the actor for an operator.
func Operator(name string) Actor { return Actor{Kind: "operator", Name: name} }

// In returns the actor in a request with an id.
func (a Actor) In(request string) Actor {
	a.Request = request
	return a
}

// Daemon returns the actor for events that the daemon causes itself, for example Started.
func Daemon() Actor { return Actor{Kind: "daemon", Name: "countersignd"} }

// The largest sizes of a text in the metadata, in bytes. The cause of an error may be long, and an
// entry of the log has at most 65535 bytes.
const (
	maxText    = 2048
	maxMembers = 48 << 10 // of the members of a group, which must not be cut
)

// Encode encodes the event with the given time as JSON, by ijson.Encode. Equal events have equal
// encodings. A text of more than 2048 bytes in the metadata is cut, except the members of a group.
func (e Event) Encode(now time.Time) []byte {
	e.TimeMS = now.UnixMilli()
	for name, text := range e.Metadata {
		most := maxText
		if e.Type == GroupChanged && name == "members" {
			most = maxMembers
		}
		if len(text) > most {
			e.Metadata = maps.Clone(e.Metadata)
			e.Metadata[name] = strings.ToValidUTF8(text[:most-len("…")], "") + "…"
		}
	}
	return ijson.Encode(e)
}

// Decode decodes the JSON of Encode.
func Decode(b []byte) (Event, error) {
	var e Event
	if err := json.Unmarshal(b, &e); err != nil {
		return Event{}, fmt.Errorf("audit: event: %w", err)
	}
	return e, nil
}

// TypeOf returns the type of an encoded event, or "" for bytes that Encode has not made. TypeOf
// costs some nanoseconds, for readers that pass most events over.
func TypeOf(b []byte) Type {
	rest, ok := bytes.CutPrefix(b, []byte(`{"time_ms":`))
	at := bytes.IndexByte(rest, ',')
	if !ok || at < 0 {
		return ""
	}
	if rest, ok = bytes.CutPrefix(rest[at:], []byte(`,"type":"`)); !ok {
		return ""
	}
	name, _, ok := bytes.Cut(rest, []byte{'"'})
	if !ok {
		return ""
	}
	return Type(name)
}

// decodeStrict decodes an event and checks the schema: no unknown field, no duplicate field, a
// known type, an actor, an action, an outcome, a time.
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
		return Event{}, fmt.Errorf("its actor has the identity %q, want a peer with 64 hex digits", e.Actor.Identity)
	case e.Actor.Proposal != 0 && e.Actor.Kind != "operator":
		return Event{}, fmt.Errorf("its actor executes proposal %d and is no operator", e.Actor.Proposal)
	case e.Action == "" || e.Outcome == "":
		return Event{}, errors.New("it has no action or no outcome")
	}
	return e, nil
}
