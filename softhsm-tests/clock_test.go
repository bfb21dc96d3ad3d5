package softhsmtests

import (
	"strings"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
	"countersign/wire"
)

// TestClockBehind lets the system's clock be behind the ledger's time by more than the tolerance.
// Meanwhile the daemon admits nothing and writes an event. When the clock has caught up, the daemon
// serves requests again without a restart.
func TestClockBehind(t *testing.T) {
	s := newSystem(t)
	s.edit("countersign.toml", "[tokens.main]", "[limits]\nclock_tolerance = \"1s\"\n\n[tokens.main]")
	p := s.serve()
	s.enrol()
	p.stop()
	// The ledger accepts a clock that is 8 s ahead, as if the system's clock had been wrong.
	const ahead = 8 * time.Second
	wall := func() time.Time { return time.Now().Add(ahead) }
	l, err := ledgertest.Open(t, s.path("ledger.db"), ledger.Options{Wall: wall})
	if err != nil {
		t.Fatal(err)
	}
	accepted := audit.Event{
		Type: audit.ClockAccepted, Actor: audit.Operator("test"), Action: "ledger accept-time", Outcome: "ok",
	}
	if err := l.AcceptTime(t.Context(), ledger.NewEvent(accepted.Encode(time.Now()))); err != nil {
		t.Fatal(err)
	}
	l.Close()
	p = s.serve()
	c := s.dial()
	d := message("AAAA").Fill(time.Hour)
	_, err = c.Sign(t.Context(), "payments", d)
	if code(err) != wire.CodeUnavailable || !strings.Contains(err.Error(), "clock") {
		t.Errorf("with a clock behind the ledger's time: %v", err)
	}
	eventually(t, "an event ClockRefused", func() bool { return s.hasEvent("ClockRefused", "clock") })
	if out := s.must("admin", "ledger", "stats"); !strings.Contains(out, "-") {
		t.Errorf("stats: %s", out)
	}
	eventually(t, "requests are served again", func() bool {
		signed, err := c.Sign(t.Context(), "payments", d)
		return err == nil && !signed.Repeated
	})
	eventually(t, "an event ClockRecovered", func() bool { return s.hasEvent("ClockRecovered", "clock") })
	p.stop()
}
