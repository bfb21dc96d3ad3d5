package appliance

import (
	"errors"
	"fmt"
	"testing"
)

func TestPeersThatAreNotThere(t *testing.T) {
	r := newRig(t)
	for what, err := range map[string]error{
		"remove":  r.RemovePeer(t.Context(), operator, "nobody"),
		"suspend": r.SuspendPeer(t.Context(), operator, "nobody"),
		"resume":  r.ResumePeer(t.Context(), operator, "nobody"),
	} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v, want %v", what, err, ErrNotFound)
		}
	}
}

// TestFloodAfterARestart: where peers have come from is known after a restart, so that strangers who came in between can't keep them
// out.
func TestFloodAfterARestart(t *testing.T) {
	e := newEdge(t, func(l *Limits) { l.Handshakes.Global, l.Handshakes.Kept, l.Handshakes.PerSource = 8, 2, 2 })
	conn := e.session("127.0.0.1", e.shop)
	conn.Close()
	e.restart()
	for n := range e.limits.Handshakes.Global {
		raw := e.raw(fmt.Sprintf("127.0.1.%d", n+1), "countersign-v1")
		raw.Write(nonsense)
		closes(t, raw)
	}
	e.staysOut("127.0.2.1", e.cafe)
	e.session("127.0.0.1", e.shop)
}
