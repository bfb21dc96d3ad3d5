package appliance

import (
	"context"
	"fmt"
	"time"

	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/transcript"
	"countersign/wire"
)

// Sign is the protocol of a signature. Code that is no step of the protocol belongs elsewhere.
func (a *Appliance) Sign(ctx context.Context, who Caller, r *wire.Sign) (*wire.Signed, error) {
	// The request names a key that may sign, and has a document that obeys the rules of its type.
	key, err := a.Keys.Signing(r.Key)
	if err != nil {
		return nil, err
	}
	doc, err := a.parse(ctx, who, r.Document)
	if err != nil {
		return nil, err
	}
	if err := doc.CheckTime(time.Now(), a.limits.ClockSkew, a.limits.MaxLifetime); err != nil {
		return nil, err
	}
	if err := a.checkSigner(ctx, key, doc); err != nil {
		return nil, err
	}
	// The policy decides inside the admission, where the ledger counts earlier signatures.
	d, err := a.decisionOf(who, key, r.Version, doc)
	if err != nil {
		return nil, err
	}
	// Nothing has changed so far. After Admit the nonce is spent and the admission is on disk,
	// whatever happens later.
	admitted, err := a.admit(ctx, who, d, ledger.Admission{
		Scope: ledger.KeyScope(r.Key), Nonce: doc.Nonce, Digest: doc.Digest(),
		KeyVersion: key.Version, Timestamp: doc.Timestamp, ExpiresAt: doc.ExpiresAt, Monotonic: d.generation,
		May: func() error { return a.Peers.Serves(who.Peer) },
	})
	if err != nil {
		return nil, err
	}
	// A repeated request gets the version and the signature of its first admission. Ed25519 is
	// deterministic, so a signature made again is the same.
	if key, err = a.admittedVersion(r, key, admitted.KeyVersion); err != nil {
		return nil, err
	}
	// Every signature is verified before its release, from the device and from the ledger.
	verifies := func(signature []byte) bool { return key.Verify(doc.Message, signature) == nil }
	signature := admitted.Signature
	if signature == nil {
		signature, err = a.Keys.Sign(ctx, who.Peer, who.walk, key, doc.Input(), verifies)
	} else if !verifies(signature) {
		err = fmt.Errorf("%w: the signature that the ledger has for %v does not verify",
			keystore.ErrUnavailable, key.Ref())
	}
	if admitted.Signature == nil {
		if lost := a.settle(ctx, who, key, doc, admitted, signature, err); lost != nil {
			return nil, lost
		}
	}
	if err != nil {
		return nil, err
	}
	return &wire.Signed{
		Signature: signature, PublicKey: [32]byte(key.Info().PublicKey), Key: r.Key, Version: key.Version,
		Nonce: r.Nonce, Timestamp: r.Timestamp, ExpiresAt: r.ExpiresAt,
		Event: admitted.Event, Repeated: admitted.Verdict == ledger.Repeated, Receipt: receiptFor(doc, signature),
	}, nil
}

// settle records the outcome of an admission. The answer does not wait for the disk, because the
// admission is on disk and shows that a signature may exist. The record has a timeout of its own:
// the outcome must not be lost with the request's timeout.
func (a *Appliance) settle(
	ctx context.Context, who Caller, key *keyring.Key, doc *transcript.Document,
	admitted ledger.Admitted, signature []byte, failure error,
) error {
	if failure != nil && who.quiet && admitted.Verdict == ledger.Repeated {
		return nil // the first failure has been recorded
	}
	failed := ""
	if failure != nil {
		failed, signature = wire.CodeUnavailable, nil
	}
	e := audit.NewOutcome(who.actor(), key.Ref().String(), doc.Type, admitted.Event, failed)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.limits.RequestTimeout)
	defer cancel()
	event, receipt := ledger.EventOf(e), receiptRecord(doc, signature, admitted.Event)
	who.bill.settled(event, signature, receipt)
	return a.ledger.Settle(ctx, admitted, signature, event, receipt)
}
