package appliance

import (
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"testing"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/policy"
	"countersign/transcript"
	"countersign/wire"
)

// foreign returns the request to verify a message that a foreign key has signed, and the public key
// in hex.
func foreign(t *testing.T, n byte) (*wire.Verify, string) {
	t.Helper()
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	m := message(n, "m")
	doc, err := transcript.Parse(documentOf(m.Document))
	if err != nil {
		t.Fatal(err)
	}
	public := [32]byte(key.Public().(ed25519.PublicKey))
	signed := &wire.Signed{PublicKey: public, Signature: ed25519.Sign(key, doc.Message)}
	return verifyOf(m, signed), hex.EncodeToString(public[:])
}

// verifies verifies for a peer, and expects a code; "" for a success.
func (r *rig) verifies(t *testing.T, who Caller, v *wire.Verify, code string) (event uint64) {
	t.Helper()
	got, err := r.Verify(t.Context(), who, v)
	if code != "" {
		r.refuses(t, code, err)
		return 0
	} else if err != nil {
		t.Error(err)
		return 0
	}
	return got.Event
}

// TestPolicyOfVerification: without a rule that names the action, every peer verifies and nothing
// is decided. With one, the rules decide by peer, by the appliance's key or another signer, and by
// the number of verifications. Each decision is recorded, and a denied nonce is not spent.
func TestPolicyOfVerification(t *testing.T) {
	r := newRig(t)
	n := byte(0)
	own := func() *wire.Verify {
		t.Helper()
		n++
		m := message(n, "m")
		return verifyOf(m, r.sign(t, r.shop, m))
	}
	other := func() *wire.Verify {
		n++
		v, _ := foreign(t, n)
		return v
	}
	_, signer := foreign(t, 0)
	decided := func(event uint64, key, signer string) {
		t.Helper()
		d, err := r.Decision(event)
		if err != nil {
			t.Error(err)
			return
		}
		rec, err := policy.ParseRecord(d.Record)
		if err != nil || rec.Action != policy.Verify || rec.Key != key || rec.Signer != signer {
			t.Errorf("%+v, %v", rec, err)
		}
		if err := r.policies.file.Replay(rec); err != nil {
			t.Error(err)
		}
		for _, e := range logOf(t, r.Appliance, event)[:1] {
			if e.Metadata["inputs"] != policy.Digest(d.Record) || e.Action != "verify" || e.Metadata["signer"] == "" {
				t.Errorf("%+v", e)
			}
		}
	}
	last := func() uint64 {
		t.Helper()
		stats, err := r.ledger.Stats()
		if err != nil {
			t.Fatal(err)
		}
		return stats.Events - 1
	}

	r.permits(t, allowShop+` forbid (principal == Peer::"cafe", action, resource);`)
	event := r.verifies(t, r.cafe, other(), "")
	if _, err := r.Decision(event); !errors.Is(err, manage.ErrNotFound) {
		t.Errorf("without a rule about it, a decision is kept: %v", err)
	}

	r.permits(t, allowShop+`
permit (principal, action == Action::"verify", resource is Key);
permit (principal == Peer::"cafe", action == Action::"verify", resource == Signer::"`+signer+`");`)
	decided(r.verifies(t, r.shop, own(), ""), "payments", "")
	named, payments := own(), "payments"
	named.Key = &payments
	decided(r.verifies(t, r.cafe, named, ""), "payments", "")
	decided(r.verifies(t, r.cafe, other(), ""), "", signer)
	denied := other()
	r.verifies(t, r.shop, denied, wire.CodeDenied)
	decided(last(), "", signer)
	if e := logOf(t, r.Appliance, last())[0]; e.Type != audit.SignatureRejected || e.Outcome != wire.CodeDenied {
		t.Errorf("%+v", e)
	}
	quiet := r.shop
	quiet.quiet = true
	before := last()
	r.verifies(t, quiet, other(), wire.CodeDenied)
	if last() != before {
		t.Error("a refusal beyond the limit is an event")
	}
	r.verifies(t, r.cafe, denied, "") // its nonce is not spent

	// A rule without an action is about verification, too, as soon as another rule names it.
	r.permits(t, allowShop+`permit (principal, action == Action::"verify", resource);
forbid (principal == Peer::"cafe", action, resource);`)
	r.verifies(t, r.shop, other(), "")
	r.verifies(t, r.cafe, other(), wire.CodeDenied)

	r.permits(t, `permit (principal, action == Action::"verify", resource)
when { context.used.peer.day.signatures <= 6 };`)
	for range 4 { // two before
		r.verifies(t, r.shop, other(), "")
	}
	r.verifies(t, r.shop, other(), wire.CodeDenied)
	r.verifies(t, r.cafe, other(), "")
}

// TestPolicyOfVerificationIsTheNewest: a verification that was prepared under a policy without
// rules about it is decided by the policy in force at the admission.
func TestPolicyOfVerificationIsTheNewest(t *testing.T) {
	r := newRig(t)
	v, signer := foreign(t, 1)
	doc, err := transcript.Parse(documentOf(v.Document))
	if err != nil {
		t.Fatal(err)
	}
	d, err := r.verificationOf(r.shop, v, doc)
	if err != nil || d.counts() != nil {
		t.Fatal(d.counts(), err)
	}
	r.permits(t, `forbid (principal, action == Action::"verify", resource == Signer::"`+signer+`");`)
	if counts := d.counts(); len(counts) != 1 {
		t.Errorf("%v", counts)
	}
	var one ledger.Used
	for w := range one {
		one[w] = d.series[0].Add
	}
	if record, err := d.decide([]ledger.Used{one}); !errors.Is(err, policy.ErrDenied) || record == nil {
		t.Errorf("%s, %v", record, err)
	}
}

// TestEveryVerificationFitsTheSchema: the context of every type of document that can be verified
// fits the schema of policies.
func TestEveryVerificationFitsTheSchema(t *testing.T) {
	r := newRig(t)
	r.permits(t, `permit (principal, action == Action::"verify", resource);`)
	seen := map[string]bool{}
	for _, v := range payloads(t) {
		doc, err := transcript.Parse(transcript.Request{
			Type: v.Type, Payload: v.Payload, Timestamp: 1, ExpiresAt: transcript.MaxTime,
		})
		if err != nil {
			t.Fatalf("%s: %v", v.Type, err)
		}
		seen[doc.Type] = true
		for _, public := range [][]byte{r.public, make([]byte, 32)} {
			if doc.Unbound {
				rule := fmt.Sprintf(`permit (principal, action == Action::"verify", resource)
when { context.transcript == %q };`, doc.Type)
				if _, err := policy.Offer("p", []byte(rule)); err == nil {
					t.Errorf("a rule about the verification of %s is accepted", doc.Type)
				}
				continue
			}
			d, err := r.verificationOf(r.shop, &wire.Verify{PublicKey: [32]byte(public)}, doc)
			if err != nil || d.request.Check() != nil {
				t.Errorf("%s: %v, %v", v.Type, err, d.request.Check())
			}
			record, err := d.decide(nil)
			if err != nil {
				t.Errorf("%s: %v", v.Type, err)
			}
			rec, err := policy.ParseRecord(record)
			if err != nil || rec.Key == "" != (rec.Signer != "") {
				t.Errorf("%s: %+v, %v", v.Type, rec, err)
			}
			possible(t, rec)
		}
	}
	for _, known := range transcript.Types() {
		if !seen[known.Name] {
			t.Errorf("there is no vector of %s", known.Name)
		}
	}
}
