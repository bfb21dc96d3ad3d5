package appliance

import (
	"errors"
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
