package limit

import (
	"testing"
	"time"
)

// TestRemember checks that a remembered source is good for the rest of GoodFor and evicts no other
// source.
func TestRemember(t *testing.T) {
	c := usual
	c.Sources = 3
	h, at := limiter(c)
	h.Remember(ipv4(1), 23*time.Hour)
	h.Remember(ipv4(1), 23*time.Hour+30*time.Minute) // another peer behind the same address
	h.Remember(ipv4(2), 24*time.Hour)
	h.Remember(ipv4(3), -time.Hour) // the clock was set back
	begin(t, h, ipv4(4)).Good()
	h.Remember(ipv4(5), 0) // the table is full
	for n, want := range []bool{1: true, 2: false, 3: true, 4: true, 5: false} {
		if got := h.IsGood(ipv4(n)); got != want {
			t.Errorf("source %d: good %v, want %v", n, got, want)
		}
	}
	at.pass(time.Hour)
	if h.IsGood(ipv4(1)) || !h.IsGood(ipv4(3)) {
		t.Error("an hour later the first is not good any more, and the third is")
	}
	at.pass(23 * time.Hour)
	if h.IsGood(ipv4(3)) {
		t.Error("a clock that was set back made it good for longer")
	}
}
