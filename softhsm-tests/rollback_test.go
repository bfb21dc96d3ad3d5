package softhsmtests

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"countersign/client"
	"countersign/tpm/tpmtest"
)

// copyLedger and restoreLedger are what a snapshot of the disk does.
func (s *system) copyLedger() []byte {
	s.t.Helper()
	b, err := os.ReadFile(s.path("ledger.db"))
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

func (s *system) restoreLedger(b []byte) {
	s.t.Helper()
	if err := os.WriteFile(s.path("ledger.db"), b, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

func code(err error) string {
	var refusal *client.Error
	if !errors.As(err, &refusal) {
		return ""
	}
	return refusal.Code
}

// TestRollback puts an older copy of the ledger in its place: nothing is signed, over restarts too, until an operator
// accepts that, with a reason that is written down; then a spent nonce of after the copy is fresh again, which is why.
func TestRollback(t *testing.T) {
	e := tpmtest.New(t)
	s := newTPMSystem(t, e, "")
	p := s.serve()
	s.enrol()
	p.stop()
	older := s.copyLedger()
	p = s.serve()
	d := message("AAAA").Fill(3600e9)
	if _, err := s.dial().Sign(t.Context(), "payments", d); err != nil {
		t.Fatal(err)
	}
	p.stop()
	s.restoreLedger(older)
	for range 2 { // it is latched
		p = s.serve()
		c := s.dial()
		for _, d := range []client.Document{d, message("BBBB")} {
			if _, err := c.Sign(t.Context(), "payments", d); code(err) != "unavailable" || strings.Contains(err.Error(), "TPM") {
				t.Errorf("signed by a ledger that was set back: %v", err)
			}
		}
		if out := s.must("admin", "rollback", "show"); !strings.Contains(out, "an older copy") {
			t.Errorf("rollback show: %s", out)
		}
		p.stop()
	}
	p = s.serve()
	for _, args := range [][]string{{"key", "create", "invoices"}, {"peer", "add", "other", strings.Repeat("0a", 32)}, {"policy", "reload"}} { // nothing is widened meanwhile
		s.write("policy.cedar", "permit (principal, action, resource);")
		if _, errOut, exit := s.cli("", append([]string{"admin"}, args...)...); exit != 1 || !strings.HasPrefix(errOut, "countersign: rolled_back: ") {
			t.Errorf("%v: %d %s", args, exit, errOut)
		}
	}
	if _, errOut, exit := s.cli("", "admin", "rollback", "accept"); exit == 0 || !strings.Contains(errOut, "reason") {
		t.Errorf("accepted without a reason: %d %s", exit, errOut)
	}
	s.must("admin", "rollback", "accept", "--reason", "disk replaced, copy of monday")
	if _, err := s.dial().Sign(t.Context(), "payments", message("CCCC")); err != nil {
		t.Errorf("after it was accepted: %v", err)
	}
	detected, accepted := 0, 0
	for _, ev := range s.events() {
		switch ev.Type {
		case "RollbackDetected":
			detected++
		case "RollbackAccepted":
			accepted++
			if ev.Metadata["reason"] != "disk replaced, copy of monday" || ev.Actor.Kind != "operator" {
				t.Errorf("the act is not written down: %+v", ev)
			}
		}
	}
	if detected != 1 || accepted != 1 {
		t.Errorf("%d events that it was detected, %d that it was accepted", detected, accepted)
	}
	p.stop()
	p = s.serve() // and that is the end of it
	if _, err := s.dial().Sign(t.Context(), "payments", message("DDDD")); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	if out := s.must("admin", "rollback", "show"); !strings.Contains(out, "no rollback") {
		t.Errorf("rollback show: %s", out)
	}
	p.stop()
}

// TestCounterRises: while it serves, so that a copy of a short time ago is noticed too; and killing the daemon at any moment is
// no rollback.
func TestCounterRises(t *testing.T) {
	e := tpmtest.New(t)
	s := newTPMSystem(t, e, "")
	s.edit("countersign.toml", "[tokens.main]", "rollback_interval = \"1s\"\n\n[tokens.main]")
	p := s.serve()
	s.enrol()
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Fatal(err)
	}
	older := s.copyLedger() // of a running daemon, as a snapshot would be
	c := s.dial()
	sign := func() {
		t.Helper()
		if _, err := c.Sign(t.Context(), "payments", message("BBBB")); err != nil {
			t.Fatal(err)
		}
	}
	before := e.Counter(t)
	eventually(t, "the counter has risen twice", func() bool { sign(); return e.Counter(t) >= before+2 })
	for range 5 {
		p.kill()
		p = s.serve()
		c = s.dial()
		sign()
	}
	p.kill()
	s.restoreLedger(older)
	p = s.serve()
	if _, err := s.dial().Sign(t.Context(), "payments", message("CCCC")); code(err) != "unavailable" {
		t.Errorf("signed by a ledger that was set back: %v", err)
	}
	p.stop()
}

// TestAnotherCounter: a ledger that is bound to none, a counter that is gone, and one that was set back are noticed too.
func TestAnotherCounter(t *testing.T) {
	e := tpmtest.New(t)
	s := newTPMSystem(t, e, "")
	p := s.serve()
	s.enrol()
	p.stop()
	state := e.State(t)
	p = s.serve()
	p.stop()
	e.Stop()
	e.SetState(t, state) // a snapshot of the machine, its TPM in software included, but not of the ledger's disk
	e.Start()
	refused := func(what, reason string) {
		t.Helper()
		p := s.serve()
		if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); code(err) != "unavailable" {
			t.Errorf("%s: %v", what, err)
		}
		if out := s.must("admin", "rollback", "show"); !strings.Contains(out, reason) {
			t.Errorf("%s: %s", what, out)
		}
		s.must("admin", "rollback", "accept", "--reason", what)
		if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
			t.Errorf("%s, after it was accepted: %v", what, err)
		}
		p.stop()
	}
	refused("the counter was set back", "behind the ledger")
	e.UndefineCounter(t)
	refused("the counter is gone", "the counter is gone")
	s.edit("countersign.toml", "[tokens.main]", "rollback_token = \"none\"\n\n[tokens.main]")
	refused("the binding was taken out of the configuration", "has no rollback_token")
	s.edit("countersign.toml", "rollback_token = \"none\"\n", "")
	refused("the ledger is bound to none", "countersignd init")
	_ = fmt.Sprint
}

// TestCounterAway: without its counter's TPM a ledger does not admit, and does so as soon as the TPM is back.
func TestCounterAway(t *testing.T) {
	e := tpmtest.New(t)
	s := newSystem(t) // keys in an HSM, the counter in a TPM
	s.edit("countersign.toml", "[tokens.main]", fmt.Sprintf("noise_token = \"main\"\n\n[tokens.anchor]\ntpm = %q\nstate = \"anchor\"\ndeadline = \"500ms\"\n\n[tokens.main]", e.Socket))
	if out, exit := s.daemon("init"); exit != 0 {
		t.Fatalf("init: %d\n%s", exit, out)
	}
	p := s.serve()
	public := strings.TrimSpace(s.must("keygen", s.path("demo.key")))
	s.must("admin", "peer", "add", "demo", public)
	s.must("admin", "key", "create", "payments", "--token", "main")
	p.stop()
	e.Stop()
	p = s.serve()
	c := s.dial()
	if _, err := c.Sign(t.Context(), "payments", message("AAAA")); code(err) != "unavailable" {
		t.Errorf("signed without having looked at the counter: %v", err)
	}
	e.Start()
	eventually(t, "it signs", func() bool { _, err := c.Sign(t.Context(), "payments", message("AAAA")); return err == nil })
	p.stop()
	older := s.copyLedger()
	p = s.serve()
	p.stop()
	s.restoreLedger(older)
	p = s.serve()
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); code(err) != "unavailable" {
		t.Errorf("signed by a ledger that was set back: %v", err)
	}
	p.stop()
}
