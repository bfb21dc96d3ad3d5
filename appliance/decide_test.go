package appliance

import (
	"errors"
	"testing"

	"countersign/policy"
	"countersign/transcript"
)

// TestPolicyOfTheMoment: a request that began under a policy is decided by the one that is in force when it is decided, and its
// record and its event say so.
func TestPolicyOfTheMoment(t *testing.T) {
	r := newEdge(t, nil)
	key, err := r.signingKey("payments")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := transcript.Parse(documentOf(message(1, "m").Document))
	if err != nil {
		t.Fatal(err)
	}
	d, err := r.decisionOf(Peer{Name: "shop", PublicKey: r.shop.Public()}, key, doc)
	if err != nil {
		t.Fatal(err)
	}
	none, err := policy.Parse("policy.cedar", nil)
	if err != nil {
		t.Fatal(err)
	}
	version, _, err := r.Activate(t.Context(), operator, none)
	if err != nil {
		t.Fatal(err)
	}
	record, err := d.decide(nil)
	if !errors.Is(err, policy.ErrDenied) {
		t.Errorf("it was decided by a policy that is not in force any more: %v", err)
	}
	if _, err := r.Decision(1); !errors.Is(err, ErrNotFound) {
		t.Errorf("an event that is no decision: %v, want %v", err, ErrNotFound)
	}
	if rec, err := policy.ParseRecord(record); err != nil || rec.Version != version || none.Replay(rec) != nil {
		t.Errorf("the record says version %d, %v; want %d", rec.Version, err, version)
	}
}
