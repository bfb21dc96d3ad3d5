package appliance

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"countersign/internal/keystore"
	"countersign/noise"
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

// TestMessage1AtTheLastMoment: who sends message 1 when the time for the handshake is almost over has made it fail itself, and counts.
func TestMessage1AtTheLastMoment(t *testing.T) {
	e := newEdge(t, func(l *Limits) {
		l.Calls = map[string]int{"memory": 1}
		l.HandshakeTimeout = time.Second
	})
	release, err := e.turns["memory"].Acquire(t.Context(), "another")
	if err != nil {
		t.Fatal(err)
	}
	var ended sync.WaitGroup
	for range e.limits.Handshakes.PerSource {
		conn := e.raw("127.0.0.2", noise.CountersignV1)
		ended.Go(func() {
			time.Sleep(e.limits.HandshakeTimeout * 7 / 10)
			conn.Write(nonsense)
			closes(t, conn)
		})
	}
	ended.Wait()
	release()
	e.staysOut("127.0.0.2", e.shop)
}

// TestProofOfABusyPeer: who asks for a proof while its own requests wait for the device does not hold up the checkpoints that all
// others wait for.
func TestProofOfABusyPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := logRig(t)
		defer r.ledger.Close()
		r.turns["memory"] = newTurns(map[string]int{"memory": 1}, map[string]keystore.Store{"memory": r.store})["memory"]
		for _, k := range r.Keys() {
			k.turns = r.turns["memory"]
		}
		ctx := inLane(t.Context(), string(r.shop.PublicKey[:]))
		event := r.sign(t, r.shop, message(0, "m")).Event
		var order []string
		next := make(chan struct{})
		r.store.BeforeSign = func(ref keystore.Ref, _ []byte) error { <-next; order = append(order, ref.Name); return nil }
		for n := range byte(10) {
			go r.Sign(ctx, r.shop, message(n+1, "m"))
		}
		synctest.Wait()
		proven := make(chan error, 1)
		go func() { _, err := r.Proof(ctx, r.shop, event); proven <- err }()
		synctest.Wait()
		for range 11 {
			next <- struct{}{}
			synctest.Wait()
		}
		if err := <-proven; err != nil {
			t.Error(err)
		}
		if at := slices.Index(order, LogName); at < 0 || at > 2 { // after what was in the device, and one turn of the peer
			t.Errorf("the checkpoint was signed as number %d: %s", at, fmt.Sprint(order))
		}
	})
}
