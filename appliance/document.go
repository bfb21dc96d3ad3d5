package appliance

import (
	"encoding/hex"
	"fmt"
	"maps"
	"strconv"
	"time"

	"countersign/audit"
	"countersign/ledger"
	"countersign/policy"
	"countersign/transcript"
	"countersign/wire"
)

// What the others see of a document: the transcript's rules, policy, the audit log, the peer.

// replayed tells a peer that the nonce is spent, and where it was its own request, by which event.
func replayed(a ledger.Admitted) error {
	if a.Own {
		return fmt.Errorf("%w: your own request for this document spent it, as event %d", errReplay, a.First)
	}
	return fmt.Errorf("%w", errReplay)
}

// documentOf is what the transcript judges.
func documentOf(d wire.Document) transcript.Request {
	return transcript.Request{Type: d.Type, Payload: d.Payload, Nonce: d.Nonce, Timestamp: d.Timestamp, ExpiresAt: d.ExpiresAt}
}

// decisionOf is what policy sees of a sign request.
func decisionOf(who Peer, key string, doc *transcript.Document) policy.Request {
	r := policy.Request{Peer: who.Name, Action: policy.Sign, Key: key, Context: maps.Clone(doc.Fields)}
	if r.Context == nil {
		r.Context = map[string]any{}
	}
	if doc.Unbound {
		r.Action = policy.SignRaw
	}
	r.Context["transcript"] = doc.Type
	r.Context["lifetime"] = doc.ExpiresAt - doc.Timestamp
	r.Context["size"] = int64(len(doc.Canonical))
	return r
}

// verdictEvent turns the event of an admission into that of a replay where the ledger found one.
func verdictEvent(admission audit.Event, v ledger.Verdict) []byte {
	if v == ledger.Replay {
		admission.Type, admission.Outcome = audit.ReplayRefused, wire.CodeReplay
	}
	return admission.Encode(time.Now())
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
