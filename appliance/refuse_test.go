package appliance

import (
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/wire"
)

// TestCodesOfKeys: each refusal by the state of a key, or of an acknowledgement, has its code.
func TestCodesOfKeys(t *testing.T) {
	r := newRig(t)
	sign := func(code string, key string) {
		t.Helper()
		req := message(9, "m")
		req.Key = key
		_, err := r.Sign(t.Context(), r.shop, req)
		r.refuses(t, code, err)
	}
	acknowledge := func(code string, who Caller, version uint32) {
		t.Helper()
		_, err := r.Acknowledge(t.Context(), who, &wire.Ack{ID: "1", Op: wire.OpAck, Key: "payments", Version: version})
		r.refuses(t, code, err)
	}
	req := message(1, "m")
	signed := r.sign(t, r.shop, req)
	sign(wire.CodeUnknownKey, "nothing")
	presence := func(s *keyring.Settings) error { s.Presence = time.Hour; return nil }
	if _, err := r.Keys.Set(t.Context(), operator, "payments", presence); err != nil {
		t.Fatal(err)
	}
	sign(wire.CodeNotConfirmed, "payments")
	acknowledge(wire.CodeUnknownKey, r.shop, 2)
	if _, err := r.Keys.Rotate(t.Context(), operator, "payments", time.Now()); err != nil {
		t.Fatal(err)
	}
	forged := r.cafe
	forged.Name = "shop"
	acknowledge(wire.CodeDenied, forged, 2)
	if err := r.Peers.Remove(t.Context(), operator, "cafe"); err != nil {
		t.Fatal(err)
	}
	acknowledge(wire.CodeDenied, r.cafe, 2)
	if err := r.Keys.Archive(t.Context(), approved, "payments", 1); err != nil {
		t.Fatal(err)
	}
	verify := verifyOf(req, signed)
	verify.Key = new("payments")
	_, err := r.Verify(t.Context(), r.shop, verify)
	r.refuses(t, wire.CodeWrongSigner, err)
	if err := r.Keys.Compromise(t.Context(), approved, "payments", 1, "stolen"); err != nil {
		t.Fatal(err)
	}
	verify.Key = nil
	_, err = r.Verify(t.Context(), r.shop, verify)
	r.refuses(t, wire.CodeWrongSigner, err)
	_, err = r.Sign(t.Context(), r.shop, req)
	r.refuses(t, wire.CodeKeyNotActive, err) // a repetition of what the compromised version has signed
}

// TestRestored: after a restore, a document of before that the ledger does not know is refused, to
// sign and to verify, and the answer says which timestamps are accepted. A known request is
// answered as ever. The appliance signs its own documents.
func TestRestored(t *testing.T) {
	r := newRig(t)
	known := message(1, "known")
	signature := r.sign(t, r.shop, known).Signature
	after := known.Timestamp
	later := message(2, "of a later time")
	later.Timestamp++
	if err := r.ledger.Restore(t.Context(), after, audit.Daemon(), func(*ledger.Tx) error { return nil }); err != nil {
		t.Fatal(err)
	}
	again := r.sign(t, r.shop, known)
	if !again.Repeated || string(again.Signature) != string(signature) {
		t.Errorf("%+v", again)
	}
	lost := message(3, "lost")
	for _, who := range []Caller{r.shop, r.cafe} {
		_, err := r.Sign(t.Context(), who, lost)
		r.refuses(t, wire.CodeRestored, err)
		if _, refusal := refuse(err); refusal.TimestampAfter != after {
			t.Errorf("%+v", refusal)
		}
	}
	signed := r.sign(t, r.shop, later)
	_, err := r.Verify(t.Context(), r.shop, verifyOf(later, signed))
	if err != nil {
		t.Errorf("a document of a later time: %v", err)
	}
	_, err = r.Verify(t.Context(), r.shop, verifyOf(known, again))
	r.refuses(t, wire.CodeRestored, err)
	if _, err := r.Keys.Rotate(t.Context(), operator, "payments", time.Now()); err != nil {
		t.Errorf("a step of the appliance's own: %v", err)
	}
}
