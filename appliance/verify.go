package appliance

import (
	"context"
	"errors"
	"fmt"
	"time"

	"countersign/audit"
	"countersign/internal/eddsa"
	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/transcript"
	"countersign/wire"
)

// Verify judges a signature and spends its nonce, in this order: the signature, the times, the signer,
// and only then the nonce, so that no peer can burn a nonce without the signer's private key. The
// second time, the same document is a replay even for the peer that asked first: the nonce is there to
// tell that.
func (a *Appliance) Verify(ctx context.Context, who Caller, r *wire.Verify) (*wire.Verified, error) {
	doc, err := transcript.Parse(documentOf(r.Document))
	if err != nil {
		return nil, err
	}
	if doc.Unbound {
		return nil, fmt.Errorf("%w: the signature of a %s document does not cover its nonce, so a replay can't be told",
			transcript.ErrUnsupported, doc.Type)
	}
	if err := eddsa.Verify(r.PublicKey[:], doc.Message, r.Signature); err != nil {
		return nil, fmt.Errorf("%w: %w", errInvalidSignature, err)
	}
	if err := doc.CheckTime(time.Now(), a.limits.ClockSkew, a.limits.MaxLifetime); err != nil {
		return nil, err
	}
	if err := doc.CheckSigner(r.PublicKey[:]); err != nil {
		return nil, err
	}
	if err := a.Keys.CheckSigner(r.Key, r.PublicKey); err != nil {
		return nil, err
	}
	e := audit.NewVerification(who.actor(), r.KeyName(), keyring.DocumentOf(doc), r.PublicKey)
	admitted, err := a.ledger.Admit(ctx, ledger.Admission{
		Scope: ledger.SignerScope(r.PublicKey[:]), Nonce: doc.Nonce, Digest: doc.Digest(), Peer: who.PublicKey,
		ExpiresAt: doc.ExpiresAt, Once: true, Quiet: who.quiet, Member: who.member,
	}, func(v ledger.Verdict) []byte { return verdictEvent(e, v) })
	if errors.Is(err, context.DeadlineExceeded) {
		return nil, fmt.Errorf("%w: %w", errUnknownOutcome, err)
	} else if err != nil {
		return nil, err
	}
	if err := refusal(admitted); err != nil {
		return nil, err
	}
	return &wire.Verified{Valid: true, Event: admitted.Event}, nil
}
