package client

import (
	"errors"
	"fmt"

	"countersign/wire"
)

// Calls without an answer. Where a call of Sign has failed so, the same document (see
// Document.Fill) may be sent again at any time: at most one signature of it exists.
var (
	// ErrUnreachable: the client could not connect. The request was not sent.
	ErrUnreachable = errors.New("the appliance can't be reached")
	// ErrHandshake: the appliance closed the connection during the handshake. Either the appliance
	// does not know the identity, or ServerKey is not, or no longer, its key. An appliance that has
	// too many connections, is stopping, or can't reach its token closes the connection too, and
	// does not give the reason. With RetryFor, the call tries again. The request was not sent.
	ErrHandshake = errors.New("the appliance refused the handshake")
	// ErrConnectionLost: the connection broke, and could not be replaced in RetryFor. The appliance
	// may have done what was asked.
	ErrConnectionLost = errors.New("connection lost")
	// ErrUnknownOutcome: a verify request was sent, and its outcome is unknown. The connection
	// broke, or the appliance took too long. The nonce may be spent. Test for ErrUnknownOutcome
	// before the refusals: an ErrUnavailable of Verify is one too.
	ErrUnknownOutcome = errors.New("the outcome of the verification is unknown: the nonce may be spent")
	// ErrClosed: Close was called.
	ErrClosed = errors.New("the client is closed")
)

// Answers that the client does not believe. The appliance has done what was asked: the nonce is
// spent, and the client withholds the signature. No refusal is found in these errors, whatever a
// further request, such as that for a proof, was answered.
var (
	// ErrWrongAnswer: the answer of the appliance, or of an impostor, is invalid.
	ErrWrongAnswer = errors.New("the appliance's answer is invalid")
	// ErrUnproven: the client could not get a valid proof that the event of the signature or
	// verification is in the audit log (Config.LogKey), or the steps of the line to the version
	// that has signed (Config.Lines). Sign may be called again with the same document.
	ErrUnproven = errors.New("the appliance has not proven its answer")
	// ErrForkedLog: the appliance's audit log does not continue the log that this client has seen.
	// The log was set back, for example by an old backup, or the appliance shows different logs to
	// different peers. The appliance may then have signed two documents under one nonce. Only
	// people may go on, with a new Config.LogCheckpoint. Errors that wrap ErrForkedLog also wrap
	// ErrUnproven, and a *LostEvents where the appliance has proven that the log ended earlier.
	ErrForkedLog = errors.New("the audit log does not continue the log that was seen before")
	// ErrBrokenLine: a version of a key does not follow from the pinned version. Signatures of the
	// version must not be trusted: a thief of the old key may have made the version. Only people
	// may pin the line anew.
	ErrBrokenLine = errors.New("the key's line is broken")
	// ErrCompromised: the private key of a version that the client has trusted may be in other
	// hands. Signatures of the version must not be trusted. Without a Config.OnCompromise, no later
	// version of a pinned line is used either, until people have pinned the line anew: `countersign
	// line follow` names the compromised version.
	ErrCompromised = errors.New("the key's version is compromised")
	// ErrUnauthorized: a new Noise key has no valid authorization by Config.ServerIdentity. The
	// client does not use the key. Only Rotation.Err and AuthorizedServerKey have this error.
	ErrUnauthorized = errors.New("the Noise key is not authorized by the appliance's identity")
)

// Refusals of the appliance, one for each code. errors.Is finds them in the *Error that a call
// returns, and errors.As gets that *Error, with a Message for people. A refused request has spent
// no nonce, except possibly with ErrUnavailable. SPEC, section 3, says which check gives which
// code.
var (
	// ErrDenied: policy does not allow the request to this peer.
	ErrDenied = refusal(wire.CodeDenied)
	// ErrReplay: the nonce is spent. For Verify: the document was verified before. For Sign:
	// another document, or another peer, has used the nonce.
	ErrReplay = refusal(wire.CodeReplay)
	// ErrRestored: the appliance was restored from a backup, and can't know whether it has admitted
	// the document before. A new document needs a Timestamp after Error.TimestampAfter.
	ErrRestored = refusal(wire.CodeRestored)
	// ErrNotConfirmed: an operator must confirm that the key may sign now.
	ErrNotConfirmed = refusal(wire.CodeNotConfirmed)

	// ErrUnknownKey: no signing key has the name.
	ErrUnknownKey = refusal(wire.CodeUnknownKey)
	// ErrKeyNotActive: no version of the key may sign now, or the version that signed the same
	// request before was taken out of use.
	ErrKeyNotActive = refusal(wire.CodeKeyNotActive)
	// ErrKeyRotated: the version of a Signer does not sign any more: make a new Signer.
	ErrKeyRotated = refusal(wire.CodeKeyRotated)

	// ErrExpired: ExpiresAt has passed.
	ErrExpired = refusal(wire.CodeExpired)
	// ErrNotYetValid: Timestamp lies in the future of the appliance's clock.
	ErrNotYetValid = refusal(wire.CodeNotYetValid)
	// ErrLifetimeTooLong: ExpiresAt less Timestamp is over the appliance's maximum.
	ErrLifetimeTooLong = refusal(wire.CodeLifetimeTooLong)
	// ErrInvalidSignature: the signature does not verify, or its public key is unusable.
	ErrInvalidSignature = refusal(wire.CodeInvalidSignature)
	// ErrWrongSigner: the document does not name the key as one of its signers (see
	// Client.SignAs), or the public key is not an accepted version of the key.
	ErrWrongSigner = refusal(wire.CodeWrongSigner)

	// ErrBusy and ErrRateLimited: send the same request again after Error.RetryAfter seconds. With
	// RetryFor, the client does so.
	ErrBusy        = refusal(wire.CodeBusy)
	ErrRateLimited = refusal(wire.CodeRateLimited)
	// ErrUnavailable: the appliance can't answer now. Sign may be called again with the same
	// document. For Verify, see ErrUnknownOutcome.
	ErrUnavailable = refusal(wire.CodeUnavailable)

	// ErrMalformed: the payload breaks the rules of its type, or the request is not of the
	// specified form.
	ErrMalformed = refusal(wire.CodeMalformed)
	// ErrUnsupported: the appliance does not know the type or the operation, or the type can't be
	// verified.
	ErrUnsupported = refusal(wire.CodeUnsupported)
	// ErrTooLarge: the request or its answer does not fit into a message, or a batch has no or too
	// many items.
	ErrTooLarge = refusal(wire.CodeTooLarge)
)

// LostEvents is part of an ErrForkedLog: the epoch has ended before the last event that the client
// has seen of it, as after a restore from a backup. The events of the epoch's tree from leaf From
// on and before leaf To are gone; the appliance may know none of their nonces.
type LostEvents struct {
	Epoch    uint32
	From, To uint64
}

func (l *LostEvents) Error() string {
	return fmt.Sprintf("the events of epoch %d from leaf %d on, up to leaf %d, are gone: "+
		"the appliance was restored from an older state", l.Epoch, l.From, l.To-1)
}

// Error is a refusal of the appliance. Its Code is one of the codes of package wire.
type Error = wire.Error

// refusal is what errors.Is looks for in an *Error: a code without a message.
func refusal(code string) error { return &Error{Code: code} }

// later is the error of a request that follows the caller's own, such as that for a proof. The
// appliance has done what the caller asked. So errors.Is and errors.As must find neither a refusal
// in the later error, nor that it was not sent.
type later struct{ err error }

func (l later) Error() string { return l.err.Error() }

func (l later) Is(target error) bool {
	switch target {
	case ErrUnreachable, ErrHandshake, ErrConnectionLost:
		return false
	}
	_, refusal := target.(*Error)
	return !refusal && errors.Is(l.err, target)
}

func (l later) As(target any) bool {
	lost, is := target.(**LostEvents)
	return is && errors.As(l.err, lost)
}
