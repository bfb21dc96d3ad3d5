package appliance

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"math"
	"math/big"
	"sync/atomic"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/policy"
	"countersign/transcript"
	"countersign/wire"
)

// decision asks policy about a sign request, inside its admission, where what was signed before is counted, and makes the event
// that says what was decided.
type decision struct {
	inForce    *atomic.Pointer[rules]
	mayUse     func() error // whether the key may sign at this moment
	request    policy.Request
	payment    bool
	at         time.Time
	salt       [16]byte
	counts     []ledger.Count
	generation *ledger.Monotonic // nil: the document has none
	marks      audit.Event       // of the admission

	// What decide has found.
	rules   *rules
	refused error // by the key's state, before policy was asked
	allowed bool
	record  []byte
}

// decisionOf prepares what can be made without the ledger. What only the appliance itself may sign, and what no rule can judge,
// is refused here.
func (a *Appliance) decisionOf(who Peer, key *Key, doc *transcript.Document) (*decision, error) {
	if doc.Reserved {
		return nil, fmt.Errorf("%w: %s is made by the appliance only", errNotYours, doc.Type)
	}
	admitted, _, _ := audit.OfDocument(doc.Type)
	d := &decision{inForce: &a.rules, mayUse: func() error { return a.mayUse(key) }, payment: doc.Payment != nil, at: time.Now(), marks: audit.Event{
		Type: admitted, Actor: who.actor(), Action: "sign", Resource: key.Info().Ref.String(), Outcome: "ok", Metadata: metadataOf(doc),
	}}
	rand.Read(d.salt[:])
	fields := maps.Clone(doc.Fields)
	if fields == nil {
		fields = map[string]any{}
	}
	fields["transcript"] = doc.Type
	fields["lifetime"] = doc.ExpiresAt - doc.Timestamp
	fields["size"] = int64(len(doc.Canonical))
	policy.SetTime(fields, d.at)
	if who.Identity != "" {
		fields["identity"] = who.Identity
	}
	counterparty := hex.EncodeToString(doc.Counterparty(key.Info().PublicKey))
	if counterparty != "" {
		fields["counterparty"] = counterparty
	}
	var exact *big.Int
	if d.payment {
		exact = doc.Payment.Exact()
		amount, amountE8 := policy.Amounts(exact)
		if amount == math.MaxInt64 {
			return nil, fmt.Errorf("%w: the amount is larger than any rule can judge", policy.ErrDenied)
		}
		fields["amount"], fields["amount_e8"] = amount, amountE8
	}
	for i, subject := range []string{who.Name, key.Name, key.Name + "\x00" + counterparty} {
		if i == counterpartyIndex && counterparty == "" {
			break
		}
		series := policy.Counted[i] + "\x00" + subject
		d.counts = append(d.counts, ledger.Count{Series: "signatures\x00" + series, Add: big.NewInt(1)})
		if d.payment {
			d.counts = append(d.counts, ledger.Count{Series: "amount\x00" + series + "\x00" + doc.Payment.Currency, Add: exact})
		}
	}
	if doc.Generation != nil {
		d.generation = &ledger.Monotonic{Series: generations(doc.Type, key.Name), Value: *doc.Generation}
	}
	action := policy.Sign
	if doc.Type == "raw" {
		action = policy.SignRaw
	}
	var err error
	d.request, err = policy.NewRequest(who.Name, action, key.Name, fields)
	return d, err
}

// generations is the series of a number that must rise.
func generations(kind, key string) string { return "generation\x00" + kind + "\x00" + key }

const counterpartyIndex = 2 // in policy.Counted

// decide is asked by the ledger, with what each of counts has. The policy is that of this moment, so that none decides after another
// one is in force, however long the request has waited; asked again, it is all decided again.
func (d *decision) decide(used []ledger.Used) ([]byte, error) {
	d.rules, d.refused = d.inForce.Load(), d.mayUse()
	if d.refused != nil {
		return nil, d.refused
	}
	d.request.Used = policy.Usage{}
	for i := range policy.Counted {
		if len(used) == 0 {
			break
		}
		for w := range policy.Windows {
			d.request.Used[i][w].Signatures = used[0][w].Int64()
		}
		if used = used[1:]; d.payment {
			for w := range policy.Windows {
				window := &d.request.Used[i][w]
				window.Amount, window.AmountE8 = policy.Amounts(used[0][w])
			}
			used = used[1:]
		}
	}
	var decided policy.Decision
	decided, d.record = d.rules.Decided(d.rules.version, d.at.UnixMilli(), d.request, d.salt)
	d.allowed = decided.Allowed
	return d.record, decided.Err()
}

// event is what the ledger writes down.
func (d *decision) event(v ledger.Verdict) []byte {
	e := d.marks
	if v == ledger.Denied && d.refused != nil {
		_, answer := refuse(d.refused)
		e.Type, e.Outcome = audit.SignatureRejected, answer.Code
		return verdictEvent(e, v)
	}
	if v != ledger.Replay {
		e.Metadata = maps.Clone(e.Metadata)
		e.Metadata["policy"], e.Metadata["inputs"] = hex.EncodeToString(d.rules.Hash[:]), policy.Digest(d.record)
	}
	if v == ledger.Denied {
		e.Type, e.Outcome = audit.SignatureRejected, wire.CodeDenied
		if d.allowed {
			e.Metadata["refused"] = "generation" // by the ledger, not by policy
		}
	}
	return verdictEvent(e, v)
}

// writtenDown is a refusal that the ledger has recorded with its verdict.
type writtenDown struct{ error }

func (w writtenDown) Unwrap() error { return w.error }

// refusal is what an admission that was not admitted tells the peer: that policy does not allow it, or that the nonce is spent,
// and where it was the peer's own request, by which event.
func refusal(a ledger.Admitted) error {
	switch {
	case a.Verdict == ledger.Denied:
		return writtenDown{a.Denial}
	case a.Verdict == ledger.Replay && a.Own:
		return writtenDown{fmt.Errorf("%w: your own request for this document spent it, as event %d", errReplay, a.First)}
	case a.Verdict == ledger.Replay:
		return writtenDown{errReplay}
	}
	return nil
}
