package appliance

import (
	"crypto/sha256"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/transcript"
	"countersign/wire"
)

// documentOf is the part of a request that the transcript judges.
func documentOf(d wire.Document) transcript.Request {
	return transcript.Request{
		Type: d.Type, Payload: d.Payload, Nonce: d.Nonce, Timestamp: d.Timestamp, ExpiresAt: d.ExpiresAt,
	}
}

// verdictEvent encodes the event of an admission, or that of a replay where the ledger found one.
func verdictEvent(admission audit.Event, v ledger.Verdict) []byte {
	if v == ledger.Replay {
		admission = admission.AsReplay(wire.CodeReplay)
	}
	return admission.Encode(time.Now())
}

// The id and the salt of a receipt are made of the signature: the peer has the signature, and a
// repetition gives the same receipt. The ledger has the signature as long as it has the nonce; after
// that, no amount can be guessed from the records of the ledger.

func receiptPart(what string, signature []byte) []byte {
	sum := sha256.Sum256(append([]byte("countersign-receipt-"+what+"-v1\x00"), signature...))
	return sum[:16]
}

// receiptFor is the receipt that the peer gets; nil where the document is no payment.
func receiptFor(doc *transcript.Document, signature []byte) *wire.Receipt {
	if doc.Payment == nil {
		return nil
	}
	return &wire.Receipt{ID: receiptPart("id", signature), Salt: receiptPart("salt", signature)}
}

// receiptRecord is the receipt that the ledger keeps; nil where there is none.
func receiptRecord(doc *transcript.Document, signature []byte, event uint64) *ledger.Receipt {
	if doc.Payment == nil || signature == nil {
		return nil
	}
	return &ledger.Receipt{
		ID: ledger.ReceiptID(receiptPart("id", signature)), TimeMS: time.Now().UnixMilli(),
		Commitment: commitment(receiptPart("salt", signature), doc.Payment), Method: doc.Payment.Method,
		Status: "completed", Event: event,
	}
}

// commitment hides an amount: without the salt it can't be guessed.
func commitment(salt []byte, p *transcript.Payment) []byte {
	b := append([]byte("countersign-receipt-v1\x00"), salt...)
	sum := sha256.Sum256(append(b, p.Amount+" "+p.Currency...))
	return sum[:]
}
