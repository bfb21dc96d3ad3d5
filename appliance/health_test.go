package appliance

import (
	"testing"

	"countersign/audit"
	"countersign/internal/cause"
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
