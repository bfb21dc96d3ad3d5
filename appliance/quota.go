package appliance

import (
	"context"
	"errors"

	"countersign/internal/cause"
	"countersign/internal/ledger"
	"countersign/internal/peers"
	"countersign/wire"
)

// The most bytes that one request makes the ledger keep, for any document, policy and name. The
// table of docs/OPERATIONS.md has typical bytes beside them.
const (
	mostKept    = 9 << 10 // admission: nonce, event, decision, windows; outcome: event, signature, receipt
	mostRefused = 8 << 10 // event and decision
)

// hashKept is the part of an event in the stored hashes of the log: some 2 of 32 bytes.
const hashKept = 64

// reservation returns the most bytes that a request makes the ledger keep. An acknowledgement is
// kept once for each version of a key, and other requests keep nothing, unless they are refused.
func reservation(request any) peers.Bytes {
	most := peers.Bytes{Refused: mostRefused}
	switch request.(type) {
	case *wire.Sign, *wire.Verify:
		most.Kept = mostKept
	}
	return most
}

// unused returns what a request gives back of its reservation. A quota without a reservation gives
// nothing back.
func unused(most, used peers.Bytes, kept, refused bool) (rest peers.Bytes) {
	if kept {
		rest.Kept = max(0, most.Kept-used.Kept)
	}
	if refused {
		rest.Refused = max(0, most.Refused-used.Refused)
	}
	return rest
}

// quotaCauses returns the peers that have too few bytes left for a signature or a verification.
func (a *Appliance) quotaCauses() (all []cause.Cause) {
	for _, p := range a.Peers.All() {
		if p.Used.Kept+mostKept > a.limits.BytesPerDay {
			all = append(all, cause.BytesFull.Of(p.Name, "%d of %d bytes are used", p.Used.Kept, a.limits.BytesPerDay))
		}
	}
	return all
}

// bill adds up what a request has made the ledger keep. A nil bill adds nothing.
type bill struct{ peers.Bytes }

// admitted adds the records of an admission, or of its refusal.
func (b *bill) admitted(a ledger.Admitted) {
	switch {
	case b == nil || a.Kept == 0:
	case a.Verdict == ledger.Fresh:
		b.Kept += int64(a.Kept) + hashKept
	default:
		b.Refused += int64(a.Kept) + hashKept
	}
}

// unknown adds the most bytes of an admission with an unknown verdict: the request has given up the
// wait, and the writer may still execute the admission. After other errors nothing was written, or
// the ledger has failed.
func (b *bill) unknown(err error) {
	if b != nil && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)) {
		b.Bytes = peers.Bytes{Kept: mostKept}
	}
}

// settled adds the records of an outcome.
func (b *bill) settled(event ledger.Event, signature []byte, receipt *ledger.Receipt) {
	if b == nil {
		return
	}
	b.Kept += int64(event.Size()) + hashKept
	if signature != nil {
		b.Kept += signatureKept
	}
	if receipt != nil {
		b.Kept += receiptKept
	}
}

// The bytes of the other records of an outcome, with their keys.
const (
	signatureKept = 8 + 64
	receiptKept   = 384 // with the index by id; a method has at most 64 bytes
)

// refused adds the event of a refusal.
func (b *bill) refused(event ledger.Event) {
	if b != nil {
		b.Refused += int64(event.Size()) + hashKept
	}
}
