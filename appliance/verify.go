package appliance

import (
	"context"
	"errors"
	"fmt"
	"time"

	"countersign/internal/ledger"
	"countersign/transcript"
	"countersign/wire"
)

// Verify verifies a signed document and spends its nonce. The order is: the signature, the times,
// the signer, the nonce, the policy. A peer without the signer's private key therefore can't burn a
// nonce. A document is a replay the second time, also for the peer that asked first, because the
// nonce has to tell a repeated document.
func (a *Appliance) Verify(ctx context.Context, who Caller, r *wire.Verify) (*wire.Verified, error) {
	doc, err := a.parse(ctx, who, r.Document)
	if err != nil {
		return nil, err
	}
	if doc.Unbound {
		return nil, fmt.Errorf(
			"%w: the signature of a %s document does not cover its nonce, so a replay can't be told",
			transcript.ErrUnsupported, doc.Type)
	}
	if err := a.check(ctx, who, doc, r); err != nil {
		return nil, err
	}
	if err := doc.CheckTime(time.Now(), a.limits.ClockSkew, a.limits.MaxLifetime); err != nil {
		return nil, err
	}
	if err := doc.CheckSigner(r.PublicKey[:]); err != nil {
		return nil, err
	}
	may := func() error { return a.mayConfirm(who, r) }
	if err := may(); err != nil {
		return nil, err
	}
	d, err := a.verificationOf(who, r, doc)
	if err != nil {
		return nil, err
	}
	admitted, err := a.admit(ctx, who, d, ledger.Admission{
		Scope: ledger.SignerScope(r.PublicKey[:]), Nonce: doc.Nonce, Digest: doc.Digest(),
		Timestamp: doc.Timestamp, ExpiresAt: doc.ExpiresAt, Once: true, May: may,
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return nil, fmt.Errorf("%w: %w", errUnknownOutcome, err)
	} else if err != nil {
		return nil, err
	}
	return &wire.Verified{Valid: true, Event: admitted.Event}, nil
}

// mayConfirm refuses to confirm a signature at this moment: while the peer is not served, and for
// the public key of a compromised version.
func (a *Appliance) mayConfirm(who Caller, r *wire.Verify) error {
	if err := a.Peers.Serves(who.Peer); err != nil {
		return err
	}
	return a.Keys.CheckSigner(r.Key, r.PublicKey)
}
