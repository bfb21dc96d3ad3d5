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

// Sign is the protocol. A new step that is not one of its own lines belongs somewhere else.
func (a *Appliance) Sign(ctx context.Context, who Caller, r *wire.Sign) (*wire.Signed, error) {
	// The request: a key that may sign, and a document that obeys the rules of its type.
	key, err := a.Keys.Signing(r.Key)
	if err != nil {
		return nil, err
	}
	doc, err := transcript.Parse(documentOf(r.Document))
	if err != nil {
		return nil, err
	}
	if err := doc.CheckTime(time.Now(), a.limits.ClockSkew, a.limits.MaxLifetime); err != nil {
		return nil, err
	}
	if err := doc.CheckSigner(key.Info().PublicKey); err != nil {
		return nil, err
	}
	// Whether this peer may have it: policy answers inside the admission, where earlier signatures are counted.
	d, err := a.decisionOf(who, key, doc)
	if err != nil {
		return nil, err
	}
	// Up to here nothing has changed. After the next line the nonce is spent and the admission is on disk, come what may.
	admitted, err := a.ledger.Admit(ctx, ledger.Admission{
		Scope: ledger.KeyScope(r.Key), Nonce: doc.Nonce, Digest: doc.Digest(), Peer: who.PublicKey, KeyVersion: key.Version,
		ExpiresAt: doc.ExpiresAt, Quiet: who.quiet, Member: who.member, Counts: d.counts, Monotonic: d.generation, Decide: d.decide,
	}, d.event)
	if err != nil {
		return nil, err
	}
	if err := refusal(admitted); err != nil {
		return nil, err
	}
	// A repetition is for the version that was admitted then, and gets the signature of then: Ed25519 is deterministic.
	if admitted.KeyVersion != key.Version {
		if key, err = a.Keys.Admitted(r.Key, admitted.KeyVersion); err != nil {
			return nil, err
		}
	}
	// No signature is released that a stranger would not accept, whatever has made it.
	verifies := func(signature []byte) bool { return key.Verify(doc.Message, signature) == nil }
	signature := admitted.Signature
	if signature == nil {
		signature, err = key.Sign(ctx, keyring.LaneOf(who.PublicKey), doc.Message, verifies)
	} else if !verifies(signature) {
		err = fmt.Errorf("%w: the signature that the ledger has for %v does not verify", keystore.ErrUnavailable, key.Ref())
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

// settle records how an admission ended. The answer does not wait for the disk: the admission is there,
// and says that a signature may exist. The ending has a time of its own, since it must not be lost
// because the time of the request is over.
func (a *Appliance) settle(
	ctx context.Context, who Caller, key *keyring.Key, doc *transcript.Document,
	admitted ledger.Admitted, signature []byte, failure error,
) error {
	if failure != nil && who.quiet && admitted.Verdict == ledger.Repeated {
		return nil // the first time has said so
	}
	failed := ""
	if failure != nil {
		failed, signature = wire.CodeUnavailable, nil
	}
	e := audit.NewOutcome(who.actor(), key.Ref().String(), doc.Type, admitted.Event, failed)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.limits.RequestTimeout)
	defer cancel()
	return a.ledger.Settle(ctx, admitted, signature, ledger.EventOf(e), receiptRecord(doc, signature, admitted.Event))
}
