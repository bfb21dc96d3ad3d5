package appliance

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/transcript"
	"countersign/wire"
)

// Sign is the protocol. Whatever adds a step to it belongs somewhere else.
func (a *Appliance) Sign(ctx context.Context, who Peer, r *wire.Sign) (*wire.Signed, error) {
	// What is asked for: a key that may sign, and a document that obeys the rules of its type.
	key, err := a.signingKey(r.Key)
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
	// Whether this peer may have it: policy answers inside the admission, where what was signed before is counted.
	d, err := a.decisionOf(who, key, doc)
	if err != nil {
		return nil, err
	}
	// Up to here nothing has changed. After the next line the nonce is spent and the admission is on disk, come what may.
	admitted, err := a.ledger.Admit(ctx, ledger.Admission{
		Scope: ledger.KeyScope(r.Key), Nonce: doc.Nonce, Digest: doc.Digest(), Peer: who.PublicKey, Quiet: who.quiet, KeyVersion: key.Version, ExpiresAt: doc.ExpiresAt,
		Member: who.member, Counts: d.counts, Monotonic: d.generation, Decide: d.decide,
	}, d.event)
	if err != nil {
		return nil, err
	}
	if err := refusal(admitted); err != nil {
		return nil, err
	}
	// A repetition is for the version that was admitted then, and gets the signature of then: Ed25519 is deterministic.
	if admitted.KeyVersion != key.Version {
		if key, err = a.keyVersion(r.Key, admitted.KeyVersion); err != nil {
			return nil, err
		}
	}
	// Nothing is released that a stranger would not accept, whoever made it.
	verifies := func(signature []byte) bool { return key.verify(doc.Message, signature) == nil }
	signature := admitted.Signature
	if signature == nil {
		signature, err = key.Sign(ctx, doc.Message, verifies)
	} else if !verifies(signature) {
		err = fmt.Errorf("%w: the signature that the ledger has for %v does not verify", keystore.ErrUnavailable, key.Info().Ref)
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
		Nonce: r.Nonce, Timestamp: r.Timestamp, ExpiresAt: r.ExpiresAt, Event: admitted.Event, Repeated: admitted.Verdict == ledger.Repeated,
		Receipt: receiptFor(doc, signature),
	}, nil
}

// settle records how an admission ended. The answer does not wait for the disk: the admission is there, and says that a
// signature may exist. What was admitted must not lose its ending because the request's time is over, hence a time of its own.
func (a *Appliance) settle(ctx context.Context, who Peer, key *Key, doc *transcript.Document, admitted ledger.Admitted, signature []byte, failure error) error {
	_, created, failed := audit.OfDocument(doc.Type)
	e := audit.Event{
		Type: created, Actor: who.actor(), Action: "sign", Resource: key.Info().Ref.String(), Outcome: "ok",
		Metadata: map[string]string{"admission": strconv.FormatUint(admitted.Event, 10)},
	}
	if failure != nil && who.quiet && admitted.Verdict == ledger.Repeated {
		return nil // the first time has said so
	} else if failure != nil {
		e.Type, e.Outcome, signature = failed, wire.CodeUnavailable, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.limits.RequestTimeout)
	defer cancel()
	return a.ledger.Settle(ctx, admitted, signature, entry(e), receiptRecord(doc, signature, admitted.Event))
}
