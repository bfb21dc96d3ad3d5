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

// The appliance's own refusals; the others are made in the packages that judge.
var (
	errInvalidSignature = errors.New("invalid signature")
	errReplay           = errors.New("the nonce is spent")
	errUnknownOutcome   = errors.New("the nonce may be spent")
	errNotYours         = errors.New("not yours")
)

// class is what an error means for the peer and for the daemon.
type class int

const (
	refused     class = iota // the request is wrong, or not allowed
	unavailable              // the same request may be sent again
	fatal                    // the daemon stops
)

// table translates errors into codes, once. A row has a message where the error's own text would tell a
// peer about the inside of the appliance; otherwise the text is about the peer's own request and may be
// told.
var table = []struct {
	err     error
	class   class
	code    string
	message string
}{
	{ledger.ErrUnknownState, fatal, wire.CodeUnavailable, "the appliance can't answer now"},
	{anchor.ErrRolledBack, unavailable, wire.CodeUnavailable, "the appliance can't answer before an operator has acted"},
	{ErrLocked, unavailable, wire.CodeUnavailable, "the appliance can't answer before an operator has acted"},
	{keyring.ErrNotConfirmed, refused, wire.CodeNotConfirmed, ""},
	{errUnknownOutcome, unavailable, wire.CodeUnavailable, "the appliance took too long; the nonce may be spent, and then the same request is a replay"},
	{transcript.ErrMalformed, refused, wire.CodeMalformed, ""},
	{transcript.ErrUnsupported, refused, wire.CodeUnsupported, ""},
	{transcript.ErrExpired, refused, wire.CodeExpired, ""},
	{transcript.ErrNotYetValid, refused, wire.CodeNotYetValid, ""},
	{transcript.ErrLifetimeTooLong, refused, wire.CodeLifetimeTooLong, ""},
	{transcript.ErrWrongSigner, refused, wire.CodeWrongSigner, ""},
	{keyring.ErrUnknown, refused, wire.CodeUnknownKey, ""},
	{keyring.ErrNotActive, refused, wire.CodeKeyNotActive, ""},
	{errInvalidSignature, refused, wire.CodeInvalidSignature, ""},
	{errReplay, refused, wire.CodeReplay, ""},
	{errNotYours, refused, wire.CodeDenied, ""},
	{peers.ErrBusy, unavailable, wire.CodeBusy, "too many requests are being served; send the same request again"},
	{peers.ErrRate, unavailable, wire.CodeRateLimited, "too many requests a second; send the same request again"},
	{ledger.ErrNotHigher, refused, wire.CodeDenied, ""},
	{policy.ErrDenied, refused, wire.CodeDenied, "policy does not allow this peer to sign this with this key"},
	{ledger.ErrDisk, unavailable, wire.CodeUnavailable, "the appliance can't write anything down now; send the same request again"},
	{ledger.ErrClock, unavailable, wire.CodeUnavailable, "the appliance's clock is not right; send the same request again"},
	{ledger.ErrTooMany, unavailable, wire.CodeBusy, "too many nonces are alive; send the same request again when some have expired"},
	{ledger.ErrDropped, refused, wire.CodeDenied, "the event was dropped by retention"},
	{ledger.ErrClosed, unavailable, wire.CodeUnavailable, "the appliance is stopping"},
	{keystore.ErrUnavailable, unavailable, wire.CodeUnavailable, "the key can't be reached now; send the same request again"},
	{keystore.ErrAuth, unavailable, wire.CodeUnavailable, "the key can't be reached now; send the same request again"},
	{keystore.ErrSealed, unavailable, wire.CodeUnavailable, "the key can't be reached now; send the same request again"},
	{context.DeadlineExceeded, unavailable, wire.CodeUnavailable, "the appliance took too long; send the same request again"},
}

// refuse gives an error its class and the answer to the peer. An error that is not in the table is a
// fault of ours: the peer gets "unavailable", the log gets all of it.
func refuse(err error) (class, *wire.Error) {
	for _, row := range table {
		if errors.Is(err, row.err) {
			message := row.message
			if message == "" { // the code says already what kind of error it is
				message = strings.TrimPrefix(err.Error(), row.err.Error()+": ")
			}
			answer := &wire.Error{Code: row.code, Message: message}
			if row.code == wire.CodeBusy || row.code == wire.CodeRateLimited {
				answer.RetryAfter = retryAfter
			}
			return row.class, answer
		}
	}
	return unavailable, &wire.Error{Code: wire.CodeUnavailable, Message: "the appliance can't answer now"}
}
