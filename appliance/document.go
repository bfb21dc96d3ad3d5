package appliance

import (
	"context"
	"crypto/sha256"
	"errors"
	"time"

	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/transcript"
	"countersign/wire"
)

// documentOf returns the document of a request for package transcript.
func documentOf(d wire.Document) transcript.Request {
	return transcript.Request{
		Type: d.Type, Payload: d.Payload, Nonce: d.Nonce, Timestamp: d.Timestamp, ExpiresAt: d.ExpiresAt,
	}
}

// checkSigner holds the parties of a document against the key. After a rotation, a repetition names
// the version of its admission: that version is the signer then, and Admit tells a repetition from
// a replay. A fresh nonce is for the active version only: see decision.decide.
func (a *Appliance) checkSigner(ctx context.Context, key *keyring.Key, doc *transcript.Document) error {
	refused := doc.CheckSigner(key.Info().PublicKey)
	if refused == nil {
		return nil
	}
	spent, err := a.ledger.Spent(ctx, ledger.KeyScope(key.Name), doc.Nonce)
	if errors.Is(err, ledger.ErrNotFound) {
		return refused
	} else if err != nil {
		return err
	}
	admitted := a.Keys.Version(key.Name, spent.KeyVersion)
	if admitted == nil {
		return refused
	}
	return doc.CheckSigner(admitted.Info().PublicKey)
}

// verdictEvent encodes the event of an admission, or of a replay if the verdict is Replay.
func verdictEvent(admission audit.Event, v ledger.Verdict) []byte {
	if v == ledger.Replay {
		admission = admission.AsReplay(wire.CodeReplay)
	}
	return admission.Encode(time.Now())
}

// receiptPart derives the id or the salt of a receipt from the signature. A repetition of the
// request therefore gives the same receipt. The ledger deletes the signature together with the
// nonce. From then on, the ledger's records do not allow to guess the amount.
func receiptPart(what string, signature []byte) []byte {
	sum := sha256.Sum256(append([]byte("countersign-receipt-"+what+"-v1\x00"), signature...))
	return sum[:16]
}

// receiptFor returns the receipt for the peer, or nil for a document that is no payment.
func receiptFor(doc *transcript.Document, signature []byte) *wire.Receipt {
	if doc.Payment == nil {
		return nil
	}
	return &wire.Receipt{ID: receiptPart("id", signature), Salt: receiptPart("salt", signature)}
}

// receiptRecord returns the receipt for the ledger, or nil without a payment or a signature.
func receiptRecord(doc *transcript.Document, signature []byte, event uint64) *ledger.Receipt {
	if doc.Payment == nil || signature == nil {
		return nil
	}
	// Without the salt the amount can't be guessed.
	commitment := receiptFor(doc, signature).Commitment(doc.Payment.Amount, doc.Payment.Currency)
	return &ledger.Receipt{
		ID: ledger.ReceiptID(receiptPart("id", signature)), TimeMS: time.Now().UnixMilli(),
		Commitment: commitment[:], Method: doc.Payment.Method, Status: "completed", Event: event,
	}
}
