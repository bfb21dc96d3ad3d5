package appliance

import (
	"context"
	"errors"
	"strings"

	"countersign/internal/anchor"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/peers"
	"countersign/policy"
	"countersign/transcript"
	"countersign/wire"
)

// The appliance's own refusals. Other packages have the refusals of their checks.
var (
	errInvalidSignature = errors.New("invalid signature")
	errReplay           = errors.New("the nonce is spent")
	errUnknownOutcome   = errors.New("the nonce may be spent")
	errNotYours         = errors.New("not yours")
	errNoTree           = errors.New("the audit log has no such tree")
)

// class is the meaning of an error for the peer and for the daemon.
type class int

const (
	refused     class = iota // the request is wrong or not allowed
	unavailable              // the peer may send the same request again
	fatal                    // the daemon stops
)

// Messages of several rows.
const (
	needsOperator  = "the appliance can't answer before an operator has acted"
	keyUnreachable = "the key can't be reached now; send the same request again"
)

// table translates errors into classes and codes. A row with a message replaces the error's text,
// which would tell a peer about the inside of the appliance. Without a message, the peer gets the
// error's text, which is about the peer's own request.
var table = []struct {
	err     error
	class   class
	code    string
	message string
}{
	{ledger.ErrUnknownState, fatal, wire.CodeUnavailable, "the appliance can't answer now"},
	{anchor.ErrRolledBack, unavailable, wire.CodeUnavailable, needsOperator},
	{ErrLocked, unavailable, wire.CodeUnavailable, needsOperator},
	{keyring.ErrNotConfirmed, refused, wire.CodeNotConfirmed, ""},
	{errUnknownOutcome, unavailable, wire.CodeUnavailable,
		"the appliance took too long; the nonce may be spent, and then the same request is a replay"},
	{transcript.ErrMalformed, refused, wire.CodeMalformed, ""},
	{transcript.ErrUnsupported, refused, wire.CodeUnsupported, ""},
	{transcript.ErrExpired, refused, wire.CodeExpired, ""},
	{transcript.ErrNotYetValid, refused, wire.CodeNotYetValid, ""},
	{transcript.ErrLifetimeTooLong, refused, wire.CodeLifetimeTooLong, ""},
	{transcript.ErrWrongSigner, refused, wire.CodeWrongSigner, ""},
	{keyring.ErrUnknown, refused, wire.CodeUnknownKey, ""},
	{keyring.ErrNotActive, refused, wire.CodeKeyNotActive, ""},
	{keyring.ErrRotated, refused, wire.CodeKeyRotated, ""},
	{errInvalidSignature, refused, wire.CodeInvalidSignature, ""},
	{errReplay, refused, wire.CodeReplay, ""},
	{ledger.ErrRestored, refused, wire.CodeRestored, ""},
	{errNotYours, refused, wire.CodeDenied, ""},
	{keystore.ErrForm, refused, wire.CodeDenied, ""},
	{errNoTree, refused, wire.CodeDenied, ""},
	{peers.ErrGone, unavailable, wire.CodeUnavailable, needsOperator}, // the peer's connections are closed
	{peers.ErrQuota, unavailable, wire.CodeBusy,
		"this peer has used up its bytes on the appliance's disk for now; send the same request again later"},
	{peers.ErrBusy, unavailable, wire.CodeBusy, "too many requests are being served; send the same request again"},
	{peers.ErrRate, unavailable, wire.CodeRateLimited, "too many requests a second; send the same request again"},
	{ledger.ErrNotHigher, refused, wire.CodeDenied, ""},
	{policy.ErrDenied, refused, wire.CodeDenied, "policy does not allow this to this peer"},
	{ledger.ErrDisk, unavailable, wire.CodeUnavailable,
		"the appliance can't write anything down now; send the same request again"},
	{ledger.ErrClock, unavailable, wire.CodeUnavailable,
		"the appliance's clock is not right; send the same request again"},
	{ledger.ErrShare, unavailable, wire.CodeBusy,
		"this peer has as many live nonces as it may; send the same request again when some have expired"},
	{ledger.ErrVerifying, unavailable, wire.CodeBusy,
		"too many nonces of verifications are alive; send the same request again when some have expired"},
	{ledger.ErrTooMany, unavailable, wire.CodeBusy,
		"too many nonces are alive; send the same request again when some have expired"},
	{ledger.ErrDropped, refused, wire.CodeDenied, "retention has dropped it"},
	{ledger.ErrClosed, unavailable, wire.CodeUnavailable, "the appliance is stopping"},
	{keystore.ErrUnavailable, unavailable, wire.CodeUnavailable, keyUnreachable},
	{keystore.ErrAuth, unavailable, wire.CodeUnavailable, keyUnreachable},
	{keystore.ErrJournal, unavailable, wire.CodeUnavailable, keyUnreachable},
	{keystore.ErrSealed, unavailable, wire.CodeUnavailable, keyUnreachable},
	{context.DeadlineExceeded, unavailable, wire.CodeUnavailable,
		"the appliance took too long; send the same request again"},
}

// refuse returns the class of an error and the answer to the peer. An error without a row is a
// fault of the appliance: the peer gets "unavailable", and the daemon's log gets the text.
func refuse(err error) (class, *wire.Error) {
	for _, row := range table {
		if errors.Is(err, row.err) {
			message := row.message
			if message == "" { // the code stands for the first part of the text
				message = strings.TrimPrefix(err.Error(), row.err.Error()+": ")
			}
			answer := &wire.Error{Code: row.code, Message: message}
			if row.code == wire.CodeBusy || row.code == wire.CodeRateLimited {
				answer.RetryAfter = retryAfter
			}
			if restored := new(ledger.RestoredError); errors.As(err, &restored) {
				answer.TimestampAfter = restored.After
			}
			return row.class, answer
		}
	}
	return unavailable, &wire.Error{Code: wire.CodeUnavailable, Message: "the appliance can't answer now"}
}
