package appliance

import (
	"slices"
	"strings"
	"testing"

	"countersign/internal/keyring"
	"countersign/internal/meter"
)

// TestMeasuredValues compares the values of labels with the tables of the packages that they come
// from. A value that a table lacks would be counted as other.
func TestMeasuredValues(t *testing.T) {
	fixed := func(s *meter.Series) []string { return s.Labels[len(s.Labels)-1].Values }
	for reason := range refusalAdvice {
		if !slices.Contains(fixed(meter.Handshakes), string(reason)) {
			t.Errorf("no result of handshakes is %q", reason)
		}
	}
	for _, c := range []Condition{Operational, Degraded, LockedUp, RolledBack} {
		if !slices.Contains(fixed(meter.State), string(c)) {
			t.Errorf("no state is %q", c)
		}
	}
	for _, step := range keyring.Transitions {
		if step.To != "" && !slices.Contains(fixed(meter.Keys), string(step.To)) {
			t.Errorf("no state of a key is %q", step.To)
		}
	}
}

// TestEverySeriesIsServed scrapes an appliance: each series of the table has a value, except those
// that other packages set, and those of tokens without key workers.
func TestEverySeriesIsServed(t *testing.T) {
	r := newRig(t)
	shop := r.shop
	shop.walk = r.meter.Begin()
	r.sign(t, shop, message(1, "x"))
	shop.walk.End("sign", "")
	_, body, err := r.meter.Expose("")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range meter.All {
		elsewhere := []*meter.Series{
			meter.Proposals, meter.Sessions, meter.ProofsRefused, meter.WorkerUp, meter.WorkerCalls, meter.WorkerErrors,
			meter.WorkerRestarts, meter.WorkerSuccess, meter.WorkerMemory,
		}
		if !slices.Contains(elsewhere, s) && !strings.Contains(string(body), "# TYPE "+s.Name+" "+string(s.Kind)+"\n") {
			t.Errorf("%s is not served", s.Name)
		}
	}
	for _, line := range []string{
		`countersign_requests_total{op="sign",result="ok"} 1`,
		`countersign_ledger_nonces{use="sign"} 1`,
		`countersign_state{state="operational"} 1`,
		`countersign_peers{state="enrolled"} 2`,
		`countersign_requests_waiting{lane="peers",queue="processor"} 0`,
		`countersign_stage_seconds_count{stage="ledger"} 1`,
	} {
		if !strings.Contains(string(body), "\n"+line+"\n") {
			t.Errorf("no line %s", line)
		}
	}
}
