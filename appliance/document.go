package appliance

import (
	"crypto/sha256"
	"encoding/hex"
	"strconv"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/transcript"
	"countersign/wire"
)

// What the others see of a document: the transcript's rules, policy, the audit log, the peer.

// documentOf is what the transcript judges.
func documentOf(d wire.Document) transcript.Request {
	return transcript.Request{Type: d.Type, Payload: d.Payload, Nonce: d.Nonce, Timestamp: d.Timestamp, ExpiresAt: d.ExpiresAt}
}

// verdictEvent turns the event of an admission into that of a replay where the ledger found one.
func verdictEvent(admission audit.Event, v ledger.Verdict) []byte {
	if v == ledger.Replay {
		admission.Type, admission.Outcome = audit.ReplayRefused, wire.CodeReplay
	}
	return admission.Encode(time.Now())
}

// A receipt's id and salt are made of the signature: the peer has it, and gets the same again when it asks again. The
// ledger has the signature as long as it has the nonce; after that, nobody can guess an amount from what it keeps.

func receiptPart(what string, signature []byte) []byte {
	sum := sha256.Sum256(append([]byte("countersign-receipt-"+what+"-v1\x00"), signature...))
	return sum[:16]
}

// receiptFor is what the peer gets; nil where the document is no payment.
func receiptFor(doc *transcript.Document, signature []byte) *wire.Receipt {
	if doc.Payment == nil {
		return nil
	}
	return &wire.Receipt{ID: receiptPart("id", signature), Salt: receiptPart("salt", signature)}
}

// receiptRecord is what the ledger keeps.
func receiptRecord(doc *transcript.Document, signature []byte, event uint64) *ledger.Receipt {
	if doc.Payment == nil || signature == nil {
		return nil
	}
	return &ledger.Receipt{
		ID: ledger.ReceiptID(receiptPart("id", signature)), TimeMS: time.Now().UnixMilli(),
		Commitment: commitment(receiptPart("salt", signature), doc.Payment), Method: doc.Payment.Method, Status: "completed", Event: event,
	}
}

// commitment hides an amount from who does not have the salt.
func commitment(salt []byte, p *transcript.Payment) []byte {
	b := append([]byte("countersign-receipt-v1\x00"), salt...)
	sum := sha256.Sum256(append(b, p.Amount+" "+p.Currency...))
	return sum[:]
}

// metadataOf is what an event keeps of a document: enough to recognise it, nothing of its content.
func metadataOf(doc *transcript.Document) map[string]string {
	digest := doc.Digest()
	return map[string]string{
		"transcript": doc.Type,
		"digest":     hex.EncodeToString(digest[:]),
		"nonce":      hex.EncodeToString(doc.Nonce[:]),
		"expires_at": strconv.FormatInt(doc.ExpiresAt, 10),
	}
}
