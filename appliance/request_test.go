package appliance

import (
	"testing"
	"testing/synctest"

	"countersign/audit"
	"countersign/wire"
)

// TestPaceOfRubbish: malformed messages count for the requests per second.
func TestPaceOfRubbish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRigWith(t, func(l *Limits) { l.RequestsPerSecond, l.BatchItems = 10, 10 })
		defer r.ledger.Close()
		shop := r.handler(t, "shop")
		var got []string
		for range 12 {
			got = append(got, codeOf(handled(t, r.Appliance, shop, "{").Error))
		}
		if got[9] != wire.CodeMalformed || got[10] != wire.CodeRateLimited {
			t.Errorf("%v", got)
		}
	})
}

// TestFailuresAreLimited: a peer repeats a request while the device fails. The failures have no
// more events than refusals.
func TestFailuresAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRigWith(t, func(l *Limits) { l.RefusalsPerMinute = 10 })
		defer r.ledger.Close()
		shop := r.handler(t, "shop")
		r.store.BeforeSign = unplugged
		same := request(1, "m")
		for range 100 {
			if a := handled(t, r.Appliance, shop, same); codeOf(a.Error) != wire.CodeUnavailable {
				t.Fatalf("%v", a.Error)
			}
		}
		if n := countOf(logOf(t, r.Appliance, 1), audit.SignatureFailed); n < 1 || n > 11 {
			t.Errorf("one admission has %d events of failures", n)
		}
		r.store.BeforeSign = nil
		if a := handled(t, r.Appliance, shop, same); a.Error != nil {
			t.Error(a.Error)
		}
		if n := countOf(logOf(t, r.Appliance, 1), audit.SignatureCreated); n != 1 {
			t.Errorf("one admission has %d events of signatures", n)
		}
	})
}
