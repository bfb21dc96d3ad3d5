package appliance

import (
	"fmt"
	"testing"
	"testing/synctest"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/wire"
)

// TestPaceOfRubbish: what has no sound form counts too.
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

// TestFailuresAreLimited: a peer that repeats a request while the device fails at once grows the
// log no faster than one that is refused.
func TestFailuresAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRigWith(t, func(l *Limits) { l.RefusalsPerMinute = 10 })
		defer r.ledger.Close()
		shop := r.handler(t, "shop")
		r.store.BeforeSign = func(keystore.Ref, []byte) error { return fmt.Errorf("unplugged: %w", keystore.ErrUnavailable) }
		same := request(1, "m")
		for range 100 {
			if a := handled(t, r.Appliance, shop, same); codeOf(a.Error) != wire.CodeUnavailable {
				t.Fatalf("%v", a.Error)
			}
		}
		if n := countOf(logOf(t, r.Appliance, 1), audit.SignatureFailed); n < 1 || n > 11 {
			t.Errorf("%d failures of one admission are written down", n)
		}
		r.store.BeforeSign = nil
		if a := handled(t, r.Appliance, shop, same); a.Error != nil {
			t.Error(a.Error)
		}
		if n := countOf(logOf(t, r.Appliance, 1), audit.SignatureCreated); n != 1 {
			t.Errorf("%d signatures are written down", n)
		}
	})
}
