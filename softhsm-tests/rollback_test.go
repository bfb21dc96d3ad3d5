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

// copyLedger reads the ledger's file, as a snapshot of the disk would.
func (s *system) copyLedger() []byte {
	s.t.Helper()
	b, err := os.ReadFile(s.path("ledger.db"))
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// restoreLedger replaces the ledger's file by a copy.
func (s *system) restoreLedger(b []byte) {
	s.t.Helper()
	if err := os.WriteFile(s.path("ledger.db"), b, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// code returns the code of a refusal, such as "unavailable", or "" if err is none.
func code(err error) string {
	var refusal *client.Error
	if !errors.As(err, &refusal) {
		return ""
	}
	return refusal.Code
}

// TestRollback replaces the ledger by an older copy. The appliance then signs nothing, across
// restarts too, until an operator accepts the rollback with a reason, which an event records. The
// danger of a rollback is that a nonce spent after the copy is fresh again.
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
	for range 2 { // the detection is durable: a restart does not clear the state
		p = s.serve()
		c := s.dial()
		for _, d := range []client.Document{d, message("BBBB")} {
			_, err := c.Sign(t.Context(), "payments", d)
			if code(err) != "unavailable" || strings.Contains(err.Error(), "TPM") {
				t.Errorf("a signature after a rollback of the ledger: %v", err)
			}
		}
		if out := s.must("admin", "rollback", "show"); !strings.Contains(out, "an older copy") {
			t.Errorf("rollback show: %s", out)
		}
		p.stop()
	}
	p = s.serve()
	// Acts that extend permissions are refused in this state.
	for _, args := range [][]string{
		{"key", "create", "invoices"}, {"peer", "add", "other", strings.Repeat("0a", 32)}, {"policy", "reload"},
	} {
		s.write("policy.cedar", "permit (principal, action, resource);")
		_, errOut, exit := s.cli("", append([]string{"admin"}, args...)...)
		if exit != 1 || !strings.HasPrefix(errOut, "countersign: error: rolled_back: ") {
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
				t.Errorf("the event has not the reason or the operator: %+v", ev)
			}
		}
	}
	if detected != 1 || accepted != 1 {
		t.Errorf("%d events RollbackDetected, %d events RollbackAccepted, want 1 and 1", detected, accepted)
	}
	p.stop()
	p = s.serve() // a restart does not detect the accepted rollback again
	if _, err := s.dial().Sign(t.Context(), "payments", message("DDDD")); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	if out := s.must("admin", "rollback", "show"); !strings.Contains(out, "no rollback") {
		t.Errorf("rollback show: %s", out)
	}
	p.stop()
}

// TestCounterRises has the daemon increment the TPM's monotonic counter while it serves, so that a
// recent copy of the ledger is detected too. A kill of the daemon at any moment is no rollback.
func TestCounterRises(t *testing.T) {
	e := tpmtest.New(t)
	s := newTPMSystem(t, e, "")
	s.edit("countersign.toml", "[tokens.main]", "rollback_interval = \"1s\"\n\n[tokens.main]")
	p := s.serve()
	s.enrol()
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Fatal(err)
	}
	older := s.copyLedger() // the daemon is running, as when a disk is snapshotted
	c := s.dial()
	sign := func() {
		t.Helper()
		if _, err := c.Sign(t.Context(), "payments", message("BBBB")); err != nil {
			t.Fatal(err)
		}
	}
	before := e.Counter(t)
	eventually(t, "two increments of the counter", func() bool { sign(); return e.Counter(t) >= before+2 })
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
		t.Errorf("a signature after a rollback of the ledger: %v", err)
	}
	p.stop()
}

// TestAnotherCounter changes the counter or the ledger's binding to the counter. The counter is set
// back, the counter's NV index is undefined, the binding is removed from the configuration, and the
// configuration binds a ledger that has no binding. Each change is detected.
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
	e.SetState(t, state) // a snapshot of the machine and its software TPM, but not of the ledger's disk
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
}

// TestCounterAway starts the daemon without the TPM of the counter. The ledger admits nothing until
// the TPM is back, and needs no restart then.
func TestCounterAway(t *testing.T) {
	e := tpmtest.New(t)
	s := newSystem(t) // keys in an HSM, the counter in a TPM
	p := s.serve()
	if out := s.must("admin", "rollback", "show"); !strings.Contains(out, "not known: the ledger has no counter") {
		t.Errorf("rollback show without a counter: %s", out)
	}
	p.stop()
	s.edit("countersign.toml", "[tokens.main]", fmt.Sprintf(`[tokens.anchor]
tpm = %q
state = "anchor"
deadline = "500ms"

[tokens.main]`, e.Socket))
	for _, bound := range []bool{true, false} { // the second init changes nothing
		out, exit := s.daemon("init")
		if exit != 0 || strings.Contains(out, "bound the ledger to the counter of the token anchor\n") != bound ||
			strings.Contains(out, "prepared the TPM of the token anchor") != bound ||
			strings.Contains(out, "nothing was changed") == bound {
			t.Fatalf("init: %d\n%s", exit, out)
		}
	}
	p = s.serve()
	public := strings.TrimSpace(s.must("keygen", s.path("demo.key")))
	s.must("admin", "peer", "add", "demo", public)
	if out := s.must("admin", "key", "create", "payments"); !strings.Contains(out, "on token main") {
		t.Errorf("the token of the counter has a key: %s", out)
	}
	if out := s.must("admin", "rollback", "show"); !strings.Contains(out, "the newest by the counter of token anchor") {
		t.Errorf("rollback show: %s", out)
	}
	p.stop()
	e.Stop()
	p = s.serve()
	c := s.dial()
	if _, err := c.Sign(t.Context(), "payments", message("AAAA")); code(err) != "unavailable" {
		t.Errorf("a signature without a look at the counter: %v", err)
	}
	e.Start()
	eventually(t, "a signature", func() bool {
		_, err := c.Sign(t.Context(), "payments", message("AAAA"))
		return err == nil
	})
	p.stop()
	older := s.copyLedger()
	p = s.serve()
	p.stop()
	s.restoreLedger(older)
	p = s.serve()
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); code(err) != "unavailable" {
		t.Errorf("a signature after a rollback of the ledger: %v", err)
	}
	p.stop()
}

// TestLostCounter has the TPM of the counter cleared beside an HSM. The daemon starts and admits
// nothing. A new folder, init and one approved acceptance bind the ledger to a new counter.
func TestLostCounter(t *testing.T) {
	e := tpmtest.New(t)
	s := newSystem(t)
	s.edit("countersign.toml", "[tokens.main]", fmt.Sprintf(`noise_token = "main"

[tokens.anchor]
tpm = %q
state = "anchor"
deadline = "500ms"

[tokens.main]`, e.Socket))
	init := func(args ...string) {
		t.Helper()
		if out, exit := s.daemon(append([]string{"init"}, args...)...); exit != 0 {
			t.Fatalf("init: %d\n%s", exit, out)
		}
	}
	init()
	p := s.serve()
	public := strings.TrimSpace(s.must("keygen", s.path("demo.key")))
	s.must("admin", "peer", "add", "demo", public)
	s.must("admin", "key", "create", "payments", "--token", "main")
	p.stop()
	e.Clear(t)
	p = s.serve() // the HSM's keys wait for the counter, and the daemon is up
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); code(err) != "unavailable" {
		t.Errorf("a signature without a counter: %v", err)
	}
	eventually(t, "what to do, in the state", func() bool { // the first key worker must have looked at the TPM
		out := s.must("admin", "state")
		return strings.Contains(out, "counter-unread") && strings.Contains(out, "--new-token puts them aside")
	})
	_, errOut, exit := s.cli("", "admin", "rollback", "accept", "--reason", "too early")
	if exit != 1 || !strings.Contains(errOut, "--new-token puts them aside") {
		t.Errorf("accepted before there is a counter: %d %s", exit, errOut)
	}
	p.stop()
	s.edit("countersign.toml", `state = "anchor"`, `state = "anchor-2"`)
	init("--token", "anchor")
	p = s.serve()
	if out := s.must("admin", "state"); !strings.Contains(out, "anchor-lost: the counter is gone") {
		t.Errorf("the state of a lost counter: %s", out)
	}
	if out := s.must("admin", "rollback", "show"); !strings.Contains(out, "the counter is gone") {
		t.Errorf("rollback show: %s", out)
	}
	s.must("admin", "rollback", "accept", "--reason", "the TPM was cleared")
	if out := s.must("admin", "state"); !strings.Contains(out, "operational") {
		t.Errorf("the state after the acceptance: %s", out)
	}
	for range 2 {
		if _, err := s.dial().Sign(t.Context(), "payments", message("BBBB")); err != nil {
			t.Errorf("with a new counter: %v", err)
		}
		p.stop()
		p = s.serve()
	}
	p.stop()
}
