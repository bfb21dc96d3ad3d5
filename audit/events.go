package audit

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"
)

// Each event has one constructor in this file, with typed fields: action, resource and metadata
// names of an event stand in one place. Equal arguments give equal events, except for the time.

// newEvent makes an event with the outcome ok. pairs are names and values of the metadata.
func newEvent(t Type, who Actor, action, resource string, pairs ...string) Event {
	e := Event{Type: t, Actor: who, Action: action, Resource: resource, Outcome: "ok"}
	for i := 0; i < len(pairs); i += 2 {
		e = e.with(pairs[i], pairs[i+1])
	}
	return e
}

// with adds an entry to the metadata of an event with no other user.
func (e Event) with(name, value string) Event {
	if e.Metadata == nil {
		e.Metadata = make(map[string]string, 8)
	}
	e.Metadata[name] = value
	return e
}

// own returns an event with metadata of its own, free to change.
func (e Event) own() Event {
	e.Metadata = maps.Clone(e.Metadata)
	return e
}

// ended returns the event with another outcome.
func (e Event) ended(outcome string) Event {
	e.Outcome = outcome
	return e
}

func decimal[T ~int | ~int64 | ~uint32 | ~uint64](n T) string {
	if n < 0 {
		return strconv.FormatInt(int64(n), 10)
	}
	return strconv.FormatUint(uint64(n), 10)
}

// EpochEnd is where an epoch has ended.
type EpochEnd struct {
	Size uint64
	Root Hash
}

// NewEpochBegun is the first event of an epoch. before is the end of the epoch before; nil: there
// is none.
func NewEpochBegun(who Actor, epoch uint32, first uint64, before *EpochEnd) Event {
	e := newEvent(EpochBegun, who, "epoch", epochResource(epoch), "first", decimal(first))
	if before != nil {
		root := base64.StdEncoding.EncodeToString(before.Root[:])
		e = e.with("previous_size", decimal(before.Size)).with("previous_root", root)
	}
	return e
}

func epochResource(epoch uint32) string { return "epoch/" + decimal(epoch) }

// NewStarted and NewStopped are the daemon's own.
func NewStarted() Event { return newEvent(Started, Daemon(), "serve", "") }

func NewStopped() Event { return newEvent(Stopped, Daemon(), "serve", "") }

// Document is the part of a document in an event: enough to recognise the document, without any
// content.
type Document struct {
	Transcript string // the type
	Digest     [32]byte
	Nonce      [32]byte
	ExpiresAt  int64 // Unix seconds
}

// of adds a document to an event.
func (e Event) of(d Document) Event {
	return e.with("transcript", d.Transcript).with("digest", hex.EncodeToString(d.Digest[:])).
		with("nonce", hex.EncodeToString(d.Nonce[:])).with("expires_at", decimal(d.ExpiresAt))
}

// NewAdmission is the admission of a signature with a version of a key ("payments/3").
func NewAdmission(who Actor, key string, d Document) Event {
	admitted, _, _ := OfDocument(d.Transcript)
	return newEvent(admitted, who, "sign", key).of(d)
}

// NewOutcome says how the admission with a number ended; failed is the code of the failure, or "".
func NewOutcome(who Actor, key, transcript string, admission uint64, failed string) Event {
	_, created, failure := OfDocument(transcript)
	e := newEvent(created, who, "sign", key, "admission", decimal(admission))
	if failed != "" {
		e.Type, e.Outcome = failure, failed
	}
	return e
}

// NewVerification records a valid signature by a signer. key is the name of the key in the request,
// or "".
func NewVerification(who Actor, key string, d Document, signer [32]byte) Event {
	return newEvent(SignatureVerified, who, "verify", key).of(d).with("signer", hex.EncodeToString(signer[:]))
}

// AsReplay turns the event of an admission into the event of a spent nonce.
func (e Event) AsReplay(code string) Event {
	e.Type = ReplayRefused
	return e.ended(code)
}

// AsRejected is the event of a refusal, in place of the event of the admission.
func (e Event) AsRejected(code string) Event {
	e.Type = SignatureRejected
	return e.ended(code)
}

// Decided adds the SHA-256 of the deciding policy, and the digest of the inputs.
func (e Event) Decided(policy [32]byte, inputs string) Event {
	return e.own().with("policy", hex.EncodeToString(policy[:])).with("inputs", inputs)
}

// RefusedByGeneration marks a refusal by the ledger after policy had allowed the signature: the
// generation is not higher than the last one.
func (e Event) RefusedByGeneration() Event { return e.own().with("refused", "generation") }

// NewRejection records a request refused before the admission.
func NewRejection(who Actor, action, resource, code string) Event {
	return newEvent(SignatureRejected, who, action, resource).ended(code)
}

// Span counts repetitions from one time to another.
type Span struct {
	Count        uint64
	Since, Until time.Time
}

// NewCount aggregates events of one type: too many to record one by one.
func NewCount(t Type, action, resource, outcome string, s Span) Event {
	return newEvent(t, Daemon(), action, resource, "count", decimal(s.Count),
		"since", decimal(s.Since.UnixMilli()), "until", decimal(s.Until.UnixMilli())).ended(outcome)
}

// KeyFacts are the properties of a new version of a key in an event.
type KeyFacts struct {
	PublicKey  []byte
	Algorithm  string
	Custody    string
	Provenance string
	Token      string
	Envelope   string // SHA-256 of the sealed seed of a recoverable key, hexadecimal; or ""
}

// NewKeyCreated records version 1 of a key coming into use, made on a token or imported.
func NewKeyCreated(who Actor, key string, k KeyFacts, imported bool) Event {
	t, action := KeyCreated, "key create"
	if imported {
		t, action = KeyImported, "key import"
	}
	return k.in(newEvent(t, who, action, key, "algorithm", k.Algorithm, "public_key", hex.EncodeToString(k.PublicKey)))
}

// in returns an event with the facts about where the private key is.
func (k KeyFacts) in(e Event) Event {
	e = e.with("custody", k.Custody).with("provenance", k.Provenance).with("token", k.Token)
	if k.Envelope != "" {
		e = e.with("envelope", k.Envelope)
	}
	return e
}

// NewKeyCreationFailed records the removal of a version before any use.
func NewKeyCreationFailed(key, outcome string) Event {
	return newEvent(KeyCreationFailed, Daemon(), "key create", key).ended(outcome)
}

// NewKeyCommitted records the successor of a version: next is the SHA-256 of the public key.
func NewKeyCommitted(who Actor, key string, next [32]byte, k KeyFacts) Event {
	return k.in(newEvent(KeyCommitted, who, "key create", key, "next", hex.EncodeToString(next[:])))
}

// NewRecoveryCommitted records the recovery successor of a line whose version key is active: the
// number of its version, and the commitment to it. replaced is the recovery successor that is
// archived with its own successor, or "".
func NewRecoveryCommitted(
	who Actor, key string, version uint32, replaced string, commitment [32]byte, k KeyFacts,
) Event {
	e := k.in(newEvent(KeyCommitted, who, "key safeguard", key, "recovery", hex.EncodeToString(commitment[:]),
		"version", decimal(version)))
	if replaced != "" {
		e = e.with("replaces", replaced)
	}
	return e
}

// NewHoldersChanged records the set of recovery holders for keys that are made from now on. Each
// holder is a name, a blank and a public key.
func NewHoldersChanged(who Actor, number uint32, needed int, holders []string) Event {
	e := newEvent(HoldersChanged, who, "holders set", "", "number", decimal(number), "needed", decimal(needed),
		"of", decimal(len(holders)))
	for i, h := range holders {
		e = e.with("holder_"+decimal(i+1), h)
	}
	return e
}

// NewKeyReturned records that the private key of a version is on its token again, from the envelope
// with this SHA-256 (hexadecimal) and the shares of holders.
func NewKeyReturned(who Actor, key, token, envelope string, holders []string) Event {
	return newEvent(KeyReturned, who, "key return", key, "token", token, "envelope", envelope,
		"holders", strings.Join(holders, ", "))
}

// Failed is an event about the failure of what the event has announced.
func (e Event) Failed() Event { return e.ended("failed") }

// NewKeyRecovered records that a line goes on with its recovery successor: last is the version that
// was the last to sign, and retires the latest time of its archiving, zero for none. archived is
// the version that was to follow, or "": it is archived with all after it.
func NewKeyRecovered(who Actor, key, last, archived, reason string, publicKey []byte, retires time.Time) Event {
	e := newEvent(KeyRecovered, who, "key recover", key, "last", last, "reason", reason,
		"public_key", hex.EncodeToString(publicKey))
	if archived != "" {
		e = e.with("archived", archived)
	}
	if !retires.IsZero() {
		e = e.with("retires_at", decimal(retires.Unix()))
	}
	return e
}

// NewRotationRequested records a rotation that an operator has asked for, before anything is tried.
// Nothing is tried any more from until on.
func NewRotationRequested(who Actor, name string, activates, until time.Time) Event {
	return newEvent(RotationRequested, who, "key rotate", name,
		"activates_at", decimal(activates.Unix()), "until", decimal(until.Unix()))
}

// NewRotationGivenUp records a requested rotation that is not tried any more.
func NewRotationGivenUp(who Actor, name string, activates time.Time, cause error) Event {
	return newEvent(KeyRotationFailed, who, "key rotate", name,
		"activates_at", decimal(activates.Unix()), "cause", cause.Error()).ended("given_up")
}

// NewRotationAnnounced records the time at which the version after key will be active. instead is
// the time of the announcement that is replaced; zero: none is.
func NewRotationAnnounced(
	who Actor, key string, version uint32, activates, instead time.Time, k KeyFacts,
) Event {
	e := newEvent(RotationAnnounced, who, "key rotate", key, "version", decimal(version),
		"public_key", hex.EncodeToString(k.PublicKey), "activates_at", decimal(activates.Unix()),
		"custody", k.Custody, "provenance", k.Provenance)
	if k.Envelope != "" { // of a key without steps: it is made by its announcement
		e = e.with("envelope", k.Envelope)
	}
	if !instead.IsZero() {
		e = e.with("instead_of", decimal(instead.Unix()))
	}
	return e
}

// NewRotationCancelled records that the version after key does not become active at the time that
// was announced or asked for. The version stays the successor.
func NewRotationCancelled(who Actor, key string, version uint32, activates time.Time) Event {
	return newEvent(RotationCancelled, who, "key rotate cancel", key,
		"version", decimal(version), "activates_at", decimal(activates.Unix()))
}

// NewKeyRotated records a new active version. retires is the latest time of archiving for the
// version before; zero: no active version before.
func NewKeyRotated(who Actor, key string, publicKey []byte, retires time.Time) Event {
	e := newEvent(KeyRotated, who, "key rotate", key, "public_key", hex.EncodeToString(publicKey))
	if !retires.IsZero() {
		e = e.with("retires_at", decimal(retires.Unix()))
	}
	return e
}

// NewKeyRotationFailed records a rotation without any change.
func NewKeyRotationFailed(who Actor, key string, cause error) Event {
	return newEvent(KeyRotationFailed, who, "key rotate", key, "cause", cause.Error()).ended("failed")
}

// NewKeyStateChanged records another state of a version. The reason may be "".
func NewKeyStateChanged(who Actor, key, from, to, reason string) Event {
	e := newEvent(KeyStateChanged, who, "key state", key, "from", from, "to", to)
	if reason != "" {
		e = e.with("reason", reason)
	}
	return e
}

// NewRotationKnown records the acknowledgement of a version by a peer.
func NewRotationKnown(who Actor, key string, version uint32) Event {
	return newEvent(RotationKnown, who, "rotation.ack", key, "version", decimal(version))
}

// NewCompromiseKnown records the acknowledgement of the compromise of a version by a peer.
func NewCompromiseKnown(who Actor, key string, version uint32) Event {
	return newEvent(CompromiseKnown, who, "compromise.ack", key, "version", decimal(version))
}

// NewLineChanged records the settings of a key: settings are the bytes of the record. weaker names
// the settings that needed approval.
func NewLineChanged(who Actor, key string, settings []byte, presence time.Duration, weaker []string) Event {
	e := newEvent(LineChanged, who, "key set", key, "settings", string(settings),
		"presence", decimal(int64(presence/time.Second)))
	if len(weaker) > 0 {
		e = e.with("weaker", strings.Join(weaker, ","))
	}
	return e
}

// NewPresenceConfirmed says until when a key may sign on an operator's confirmation.
func NewPresenceConfirmed(who Actor, key string, until time.Time) Event {
	return newEvent(PresenceConfirmed, who, "key confirm", key, "until", decimal(until.Unix()))
}

// NewNoiseKeyAuthorized records the authorization of a Noise key by an identity, the name of a key.
func NewNoiseKeyAuthorized(who Actor, key, identity string) Event {
	return newEvent(NoiseKeyAuthorized, who, "noise authorize", key, "identity", identity)
}

// NewPeerAdded enrols a peer by name and Noise static public key.
func NewPeerAdded(who Actor, name string, publicKey [32]byte) Event {
	return newEvent(PeerAdded, who, "peer add", name, "public_key", hex.EncodeToString(publicKey[:]))
}

// NewPeerKeyAdded and NewPeerKeyRemoved change the Noise static keys of a peer.
func NewPeerKeyAdded(who Actor, name string, publicKey [32]byte) Event {
	return newEvent(PeerKeyAdded, who, "peer key add", name, "public_key", hex.EncodeToString(publicKey[:]))
}

func NewPeerKeyRemoved(who Actor, name string, publicKey [32]byte) Event {
	return newEvent(PeerKeyRemoved, who, "peer key remove", name, "public_key", hex.EncodeToString(publicKey[:]))
}

// NewPeerRemoved, NewPeerSuspended and NewPeerResumed say whether a peer is let in.
func NewPeerRemoved(who Actor, name string) Event {
	return newEvent(PeerRemoved, who, "peer remove", name)
}

func NewPeerSuspended(who Actor, name string) Event {
	return newEvent(PeerSuspended, who, "peer suspend", name)
}

func NewPeerResumed(who Actor, name string) Event {
	return newEvent(PeerResumed, who, "peer resume", name)
}

// NewPolicyChanged puts a version of the policy in force: hash and previous are SHA-256 in hex.
func NewPolicyChanged(who Actor, hash, previous string, version uint64) Event {
	return newEvent(PolicyChanged, who, "policy activate", "policy",
		"sha256", hash, "previous", previous, "version", decimal(version))
}

// NewGroupChanged has all members of a group of peers or of keys (of), in order, with a comma
// between two of them. replaces is SHA-256 in hex of the members before, or none.
func NewGroupChanged(who Actor, group, of, members, replaces string) Event {
	return newEvent(GroupChanged, who, "group set", group, "of", of, "members", members, "replaces", replaces)
}

// NewGroupRemoved ends a group. replaces is SHA-256 in hex of the members.
func NewGroupRemoved(who Actor, group, replaces string) Event {
	return newEvent(GroupRemoved, who, "group remove", group, "replaces", replaces)
}

// NewOperatorEnrolled is the first administrator, enrolled by root. record is the operator in JSON.
func NewOperatorEnrolled(who Actor, action, name string, record []byte) Event {
	return newEvent(OperatorEnrolled, who, action, name, "operator", string(record))
}

// NewOperatorChanged records a change of an operator. record is the operator after the change in
// JSON; nil: the operator was removed.
func NewOperatorChanged(who Actor, action, name, change string, record []byte) Event {
	e := newEvent(OperatorChanged, who, action, name, "change", change)
	if record != nil {
		e = e.with("operator", string(record))
	}
	return e
}

// NewApprovalsChanged says how many approvals an act needs.
func NewApprovalsChanged(who Actor, action string, needed int) Event {
	return newEvent(ApprovalsChanged, who, action, "approvals", "needed", decimal(needed))
}

// NewApproverKeysChanged says whether approvals must be by hardware keys: yes or no.
func NewApproverKeysChanged(who Actor, action, required string) Event {
	return newEvent(ApproverKeysChanged, who, action, "approvals", "required", required)
}

// NewOperatorSignedIn begins a session of an operator. roles are separated by commas.
func NewOperatorSignedIn(who Actor, session, credential, roles, channel string) Event {
	return newEvent(OperatorSignedIn, who, "sign in", "session/"+session,
		"credential", credential, "roles", roles, "channel", channel)
}

// NewOperatorSignedOut ends a session of an operator, by the operator or an administrator.
func NewOperatorSignedOut(who Actor, session, operator, channel string) Event {
	return newEvent(OperatorSignedOut, who, "sign out", "session/"+session,
		"operator", operator, "channel", channel)
}

// NewScraperAdded and NewScraperRemoved change the programs that read the metrics over HTTPS.
// digest is SHA-256 of the token in hex.
func NewScraperAdded(who Actor, name, digest string, expires time.Time) Event {
	return newEvent(ScraperAdded, who, "scraper add", name,
		"token_sha256", digest, "expires", expires.UTC().Format(time.RFC3339))
}

func NewScraperRemoved(who Actor, name string) Event {
	return newEvent(ScraperRemoved, who, "scraper remove", name)
}

// Refusal gives the purpose, the credential and the channel of a refused proof, and the cause. The
// subject is the key of a presence, or the proposal of an approval; "" for a sign-in. Request is
// the id of the request with the proof.
type Refusal struct{ Purpose, Subject, Credential, Channel, Cause, Request string }

// NewSignInRefused records a refused proof in the name of an operator.
func NewSignInRefused(operator, outcome string, r Refusal) Event {
	return newEvent(SignInRefused, Daemon().In(r.Request), "sign in", operator, "purpose", r.Purpose,
		"subject", r.Subject, "credential", r.Credential, "channel", r.Channel, "cause", r.Cause).ended(outcome)
}

// ProposalRef names a proposal in events by number and by the SHA-256 of the text.
type ProposalRef struct {
	ID     uint64
	Digest [32]byte
}

func (p ProposalRef) event(t Type, who Actor, action string) Event {
	return newEvent(t, who, action, "proposal/"+strconv.FormatUint(p.ID, 10), "digest", hex.EncodeToString(p.Digest[:]))
}

// NewProposalMade has the text to be approved.
func NewProposalMade(who Actor, p ProposalRef, text string) Event {
	return p.event(ProposalMade, who, "proposal make").with("text", text)
}

// NewApprovalGiven has the proof of an approver. credential is the id of a credential.
func NewApprovalGiven(who Actor, p ProposalRef, credential string, proof []byte) Event {
	return p.event(ApprovalGiven, who, "proposal approve").with("credential", credential).with("proof", string(proof))
}

// NewProposalRun records the beginning of the act of a proposal.
func NewProposalRun(who Actor, p ProposalRef) Event { return p.event(ProposalRun, who, "proposal run") }

// NewProposalDone records the end of the act of a proposal: failed is "", failed or interrupted.
func NewProposalDone(who Actor, p ProposalRef, failed, cause string) Event {
	e := p.event(ProposalDone, who, "proposal run")
	if failed != "" {
		e = e.ended(failed).with("cause", cause)
	}
	return e
}

// NewProposalWithdrawn ends a proposal without the act.
func NewProposalWithdrawn(who Actor, p ProposalRef) Event {
	return p.event(ProposalWithdrawn, who, "proposal withdraw")
}

// NewProposalExpired ends a proposal whose time is over (no cause), or whose proposer may not
// propose the act any more.
func NewProposalExpired(p ProposalRef, cause string) Event {
	e := p.event(ProposalExpired, Daemon(), "proposal expire")
	if cause != "" {
		e = e.with("cause", cause)
	}
	return e
}

// NewCertificateChanged records another certificate of the admin API; nil: a certificate by the CA
// of the appliance.
func NewCertificateChanged(who Actor, action, resource string, certificate []byte) Event {
	e := newEvent(CertificateChanged, who, action, resource)
	if certificate != nil {
		e = e.with("sha256", fmt.Sprintf("%x", sha256.Sum256(certificate)))
	}
	return e
}

// NewCertificateSigned records what the key of the certificate authority, or of the admin API, is
// about to sign: digest is SHA-256 of the signed part. what is "certificate" or
// "certificate-request".
func NewCertificateSigned(what, resource string, digest [32]byte) Event {
	return newEvent(CertificateSigned, Daemon(), what, resource, "digest", hex.EncodeToString(digest[:]))
}

// NewLocked and NewUnlocked stop and allow all signing and verifying.
func NewLocked(who Actor, reason string) Event {
	return newEvent(Locked, who, "lock", "", "reason", reason)
}

func NewUnlocked(who Actor) Event { return newEvent(Unlocked, who, "unlock", "") }

// NewRetentionChanged has the records of the retention before and after in JSON. proposed are the
// parameters of an approved proposal; nil: no operator has shortened the retention.
func NewRetentionChanged(who Actor, from, to []byte, proposed map[string]string) Event {
	e := newEvent(RetentionChanged, who, "retention", "retention", "from", string(from), "to", string(to))
	if proposed != nil {
		e = e.with("shortened", "yes")
		maps.Copy(e.Metadata, proposed)
	}
	return e
}

// NewEpochDropped is retention dropping an epoch.
func NewEpochDropped(epoch uint32, first uint64, end EpochEnd) Event {
	return newEvent(RetentionApplied, Daemon(), "retention", epochResource(epoch),
		"first", decimal(first), "size", decimal(end.Size), "root", end.Root.String())
}

// NewReceiptsDropped is retention dropping the receipts of before a time.
func NewReceiptsDropped(before time.Time) Event {
	return newEvent(RetentionApplied, Daemon(), "retention", "receipts", "before", decimal(before.Unix()))
}

// NewLegalHoldSet and NewLegalHoldReleased say which holds keep an epoch from being dropped.
func NewLegalHoldSet(who Actor, epoch uint32, name, reason string) Event {
	return newEvent(LegalHoldSet, who, "retention", epochResource(epoch), "hold", name, "reason", reason)
}

func NewLegalHoldReleased(who Actor, epoch uint32, name, reason string) Event {
	return newEvent(LegalHoldReleased, who, "retention", epochResource(epoch), "hold", name, "reason", reason)
}

// NewBackupMade records a backup by SHA-256 of its manifest (hexadecimal). The proof of the event
// is the backup's signature, so the event comes before the end of the file. The size is in bytes.
func NewBackupMade(who Actor, name, digest string, size int64, recipients int) Event {
	return newEvent(BackupMade, who, "backup create", name, "sha256", digest, "size", decimal(size),
		"recipients", decimal(recipients))
}

// NewBackupFailed records a backup that was not made, or that did not get its name.
func NewBackupFailed(who Actor, name string, cause error) Event {
	return newEvent(BackupFailed, who, "backup create", name, "cause", cause.Error()).ended("failed")
}

// NewBackupRestored records that the ledger comes from a backup (see NewBackupMade) of a time, and
// what it replaces. Documents with a timestamp of at most after (Unix seconds) are refused.
func NewBackupRestored(who Actor, digest string, made time.Time, replaces string, after int64) Event {
	return newEvent(BackupRestored, who, "backup restore", "", "sha256", digest,
		"made", made.UTC().Format(time.RFC3339), "replaces", replaces, "timestamp_after", decimal(after))
}

// NewFactoryResetBegun records that the appliance is about to be destroyed: the machine, what the
// ledger was, and which keys go. A log with this event and later ones was saved from a reset.
func NewFactoryResetBegun(who Actor, machine, ledger, keys string) Event {
	return newEvent(FactoryResetBegun, who, "factory reset", "", "machine", machine, "ledger", ledger, "keys", keys)
}

// NewMachineUpdateBegun records that the machine is about to install an image: its version, the one
// that runs, the SHA-256 of its manifest, and its rollback version.
func NewMachineUpdateBegun(who Actor, version, from, digest string, rollback uint64) Event {
	return newEvent(MachineUpdateBegun, who, "machine update", version, "from", from, "sha256", digest,
		"rollback_version", decimal(rollback))
}

// NewMachineUpdated records that the appliance works in a new image.
func NewMachineUpdated(version, from string) Event {
	return newEvent(MachineUpdated, Daemon(), "machine update", version, "from", from)
}

// NewMachineUpdateFailed records that the machine runs the image of before an update again.
func NewMachineUpdateFailed(version, from, cause string) Event {
	return newEvent(MachineUpdateFailed, Daemon(), "machine update", version, "from", from, "cause", cause)
}

// NewMachineResetBegun records that the machine is about to destroy its disk. A log with this event
// was copied before the end.
func NewMachineResetBegun(who Actor, appliance string) Event {
	return newEvent(MachineResetBegun, who, "machine reset", appliance)
}

// NewMachineConfigurationBegun records that the machine is about to put a configuration in force:
// its SHA-256 in hex, and that of the one before.
func NewMachineConfigurationBegun(who Actor, digest, from string) Event {
	return newEvent(MachineConfigurationBegun, who, "machine configure", digest, "from", from)
}

// NewMachineConfigured records that the daemon has come up with a configuration.
func NewMachineConfigured(digest string) Event {
	return newEvent(MachineConfigured, Daemon(), "machine configure", digest)
}

// NewMachineConfigurationFailed records that the daemon did not come up with a configuration, and
// that the one of before is in force again.
func NewMachineConfigurationFailed(digest, cause string) Event {
	return newEvent(MachineConfigurationFailed, Daemon(), "machine configure", digest, "cause", cause)
}

// NewMachineFileKept records a file that a configuration can name. size is in bytes; a hash would
// tell of a password.
func NewMachineFileKept(who Actor, name string, size int) Event {
	return newEvent(MachineFileKept, who, "machine file put", name, "size", decimal(size))
}

// NewMachineFileRemoved records that such a file is gone.
func NewMachineFileRemoved(who Actor, name string) Event {
	return newEvent(MachineFileRemoved, who, "machine file remove", name)
}

// NewBackupProven records a drill, which has restored a backup (see NewBackupMade) where nobody can
// reach the result: the events in the tree of the backup, the time that the ledger with its lists
// of writes reaches, and what was proven and what could not be. holders have brought the
// recoverable keys back in a drill with holders.
func NewBackupProven(
	who Actor, name, digest string, events uint64, reached time.Time, proven, unproven, holders []string,
) Event {
	e := newEvent(BackupProven, who, "backup drill", name, "sha256", digest, "events", decimal(events),
		"reached", reached.UTC().Format(time.RFC3339), "proven", strings.Join(proven, "; "),
		"unproven", strings.Join(unproven, "; "))
	if len(holders) > 0 {
		e = e.with("holders", strings.Join(holders, ", "))
	}
	return e
}

// NewDrillFailed records a drill that found a backup not to be good, or found none.
func NewDrillFailed(who Actor, name string, cause error) Event {
	return newEvent(DrillFailed, who, "backup drill", name, "cause", cause.Error()).ended("failed")
}

// NewBackupsPruned records that backups are about to be removed, by the rules of the configuration.
func NewBackupsPruned(who Actor, names []string) Event {
	return newEvent(BackupsPruned, who, "backup prune", "", "names", strings.Join(names, " "))
}

// NewLedgerCompacted records a compaction of the ledger's file.
func NewLedgerCompacted(who Actor) Event {
	return newEvent(LedgerCompacted, who, "ledger compact", "")
}

// NewAway records the failure of a resource: DeviceUnavailable of a token or the ledger's disk,
// ClockRefused of the clock. The cause may be nil.
func NewAway(t Type, resource string, cause error) Event {
	e := newEvent(t, Daemon(), "serve", resource).ended("unavailable")
	if cause != nil {
		e = e.with("cause", cause.Error())
	}
	return e
}

// NewBack records the recovery of a resource: DeviceRecovered or ClockRecovered.
func NewBack(t Type, resource string) Event { return newEvent(t, Daemon(), "serve", resource) }

// NewTokenRetried records the permission of an operator for one more login to a token.
func NewTokenRetried(who Actor, token string) Event {
	return newEvent(TokenRetried, who, "token retry", token)
}

// NewLogLevelChanged records another level of the daemon's log until a time; zero: the level of the
// configuration from now on.
func NewLogLevelChanged(who Actor, level string, until time.Time) Event {
	e := newEvent(LogLevelChanged, who, "log level", "", "level", level)
	if !until.IsZero() {
		e = e.with("until", decimal(until.Unix()))
	}
	return e
}

// NewLedgerBound binds the ledger to the counter of a token.
func NewLedgerBound(who Actor, token string, counter uint64) Event {
	return newEvent(LedgerBound, who, "bind", token, "counter", decimal(counter))
}

// NewRollbackDetected records a ledger with one value of the counter beside a counter with another.
func NewRollbackDetected(reason string, ledger, counter uint64) Event {
	return newEvent(RollbackDetected, Daemon(), "start", "",
		"reason", reason, "ledger", decimal(ledger), "counter", decimal(counter)).ended("refused")
}

// NewRollbackAccepted records the acceptance of a rollback by an operator.
func NewRollbackAccepted(who Actor, reason string, ledger, counter uint64) Event {
	return newEvent(RollbackAccepted, who, "rollback accept", "",
		"reason", reason, "ledger", decimal(ledger), "counter", decimal(counter))
}

// NewClockAccepted records an operator's order to set the ledger's time to the clock at once.
func NewClockAccepted(who Actor, ledger, clock time.Time) Event {
	return newEvent(ClockAccepted, who, "ledger accept-time", "",
		"ledger", ledger.UTC().Format(time.RFC3339), "clock", clock.UTC().Format(time.RFC3339))
}

// Message names a signed message of a webhook in the event that comes before the message: by its
// id, and by SHA-256 of its body. A message without an event is of somebody else than the
// appliance.
type Message struct {
	ID   string
	Body [32]byte
}

func (e Event) about(m Message) Event {
	return e.with("message", m.ID).with("digest", hex.EncodeToString(m.Body[:]))
}

// NewWebhookQueued records a message to webhooks about a version of a key.
func NewWebhookQueued(key string, m Message) Event {
	return newEvent(WebhookQueued, Daemon(), "webhook", key).about(m)
}

// NewAlertFiring records that an alert fires, or has another level: before is the level before, or
// "". since is the beginning of the alert, and text the details.
func NewAlertFiring(code, subject, level, before string, since time.Time, text string, m Message) Event {
	e := alertEvent(AlertFiring, Daemon(), "alert fire", code, subject).about(m).
		with("level", level).with("since", decimal(since.UnixMilli())).with("text", text)
	if before != "" {
		e = e.with("before", before)
	}
	return e
}

// NewAlertResolved records the end of an alert.
func NewAlertResolved(code, subject, level string, since time.Time, m Message) Event {
	return alertEvent(AlertResolved, Daemon(), "alert resolve", code, subject).about(m).
		with("level", level).with("since", decimal(since.UnixMilli()))
}

// NewAlertRepeated records that the receivers are told again of an alert that fires for long.
func NewAlertRepeated(code, subject, level string, since time.Time, m Message) Event {
	return alertEvent(AlertRepeated, Daemon(), "alert repeat", code, subject).about(m).
		with("level", level).with("since", decimal(since.UnixMilli()))
}

// NewAlertTested records that an operator has a test message sent to the receivers of alerts.
func NewAlertTested(who Actor, m Message) Event {
	return newEvent(AlertTested, who, "alert test", "alert").about(m)
}

// NewAlertAcknowledged records until when an operator has taken note of an alert. The reason may be
// "".
func NewAlertAcknowledged(who Actor, code, subject string, until time.Time, reason string) Event {
	e := alertEvent(AlertAcknowledged, who, "alert ack", code, subject).with("until", decimal(until.Unix()))
	if reason != "" {
		e = e.with("reason", reason)
	}
	return e
}

func alertEvent(t Type, who Actor, action, code, subject string) Event {
	e := newEvent(t, who, action, "alert/"+code)
	if subject != "" {
		e = e.with("subject", subject)
	}
	return e
}
