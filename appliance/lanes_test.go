package appliance

import (
	"testing"
	"time"
)

// TestHandshakesThatWaitInVain: handshakes whose time ends while others have the device are no fault of the peer's, and do not keep it
// out afterwards.
func TestHandshakesThatWaitInVain(t *testing.T) {
	e := newEdge(t, func(l *Limits) {
		l.Calls = map[string]int{"memory": 1}
		l.HandshakeTimeout = 300 * time.Millisecond
	})
	release, err := e.turns["memory"].Acquire(t.Context(), "another")
	if err != nil {
		t.Fatal(err)
	}
	for range e.limits.Handshakes.PerSource {
		if conn, err := e.shake("127.0.0.1", e.shop); err == nil {
			conn.Close()
			t.Fatal("it shook hands without the device")
		}
	}
	release()
	e.session("127.0.0.1", e.shop)
}
