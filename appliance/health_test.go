package appliance

import (
	"fmt"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/cause"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
)

// TestCausesOfOneSubject: a key that is missed at the start and in use is one cause. Other causes
// of one subject, such as the shares of a peer by use, are all shown.
func TestCausesOfOneSubject(t *testing.T) {
	r := newRig(t)
	r.Report(func() []cause.Cause {
		return []cause.Cause{
			cause.NoncesShare.Of("shop", "signatures"), cause.KeyMissing.Of("payments/1", "at the start"),
			cause.NoncesShare.Of("shop", "verifications"), cause.KeyMissing.Of("payments/1", "in use"),
		}
	})
	var shown []string
	for _, c := range r.Health().Causes {
		if c.Kind == cause.NoncesShare || c.Kind == cause.KeyMissing {
			shown = append(shown, c.Text)
		}
	}
	if len(shown) != 3 || shown[0] != "at the start" || shown[1] != "signatures" || shown[2] != "verifications" {
		t.Errorf("causes %q", shown)
	}
}

// TestConditionBesideGraverCauses: a locked appliance is locked, whatever other causes stop the
// admissions too, and a rolled back one is rolled back.
func TestConditionBesideGraverCauses(t *testing.T) {
	r := newRig(t)
	all := []cause.Cause{cause.Counter.Of("", "unread")}
	r.Report(func() []cause.Cause { return all })
	if got := r.Health().Condition; got != Degraded {
		t.Errorf("without a lock: %s", got)
	}
	if err := r.Lock(t.Context(), audit.Operator("ann"), "test"); err != nil {
		t.Fatal(err)
	}
	if got := r.Health().Condition; got != LockedUp {
		t.Errorf("locked, with a counter that is not read: %s", got)
	}
	all = append(all, cause.AnchorLost.Of("", "gone"))
	if got := r.Health().Condition; got != RolledBack {
		t.Errorf("locked, without its counter: %s", got)
	}
}

// TestEveryFullShareIsACause fills the shares of more peers than the state lists as the largest:
// each of them is a cause, and a peer with less is none.
func TestEveryFullShareIsACause(t *testing.T) {
	r := newRig(t)
	r.ledger.Close()
	l, err := ledgertest.Open(t, r.path, ledger.Options{Bounds: ledger.Bounds{Peer: 10}})
	if err != nil {
		t.Fatal(err)
	}
	if r.Appliance, err = r.new(t, l, kept); err != nil {
		t.Fatal(err)
	}
	const full, filling = 8, 2
	var all []Caller
	for i := range full + filling + 1 {
		all = append(all, r.enrol(t, fmt.Sprintf("peer-%02d", i), byte(20+i)))
	}
	for i, who := range all {
		nonces := 10 // the bound
		if i >= full {
			nonces = 8
		}
		if i == full+filling {
			nonces = 7
		}
		for n := range nonces {
			if _, err := l.Admit(t.Context(), ledger.Admission{
				Scope: ledger.KeyScope("payments"), Nonce: [32]byte{byte(i), byte(n)}, Peer: who.Name,
				ExpiresAt: time.Now().Add(time.Hour).Unix(),
			}, func(ledger.Verdict) []byte {
				return audit.NewRejection(who.actor(), "sign", "payments", "denied").Encode(time.Now())
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
	told := map[string]int{}
	for _, c := range r.Health().Causes {
		told[c.Code]++
	}
	if told[cause.NoncesShare.Code] != full || told[cause.NoncesFilling.Code] != filling {
		t.Errorf("the causes are %v", told)
	}
	if n := r.Nonces(); len(n.Largest) != maxLargest {
		t.Errorf("%d largest shares", len(n.Largest))
	}
}
