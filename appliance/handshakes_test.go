package appliance

import (
	"context"
	"sync"
	"testing"
	"time"

	"countersign/internal/form"
	"countersign/internal/keyring"
	"countersign/noise"
)

// occupied holds the device of an edge that has room for one call, in a lane of its own, until
// release.
func (e *edge) occupied() (release func()) {
	e.t.Helper()
	entered, letGo := e.heldDevice()
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.Keys.Version("payments", 1).Sign(context.Background(), keyring.Lane("another"), form.NewCanary(), nil)
	}()
	eventually(e.t, "the device is occupied", func() bool { return entered.Load() == 1 })
	return func() {
		letGo()
		<-done
	}
}

// TestHandshakesThatWaitInVain: handshakes whose time ends while other calls have the device are no
// fault of the peer, and do not keep the peer out afterwards.
func TestHandshakesThatWaitInVain(t *testing.T) {
	e := newEdge(t, func(l *Limits) {
		l.Calls = map[string]int{"memory": 1}
		l.HandshakeTimeout = 300 * time.Millisecond
	})
	release := e.occupied()
	for range e.limits.Handshakes.PerSource {
		if conn, err := e.shake("127.0.0.1", e.shop); err == nil {
			conn.Close()
			t.Fatal("it shook hands without the device")
		}
	}
	release()
	e.session("127.0.0.1", e.shop)
}

// TestMessage1AtTheLastMoment: a client that sends message 1 when the time for the handshake is
// almost over has made the handshake fail itself, and the failure counts.
func TestMessage1AtTheLastMoment(t *testing.T) {
	e := newEdge(t, func(l *Limits) {
		l.Calls = map[string]int{"memory": 1}
		l.HandshakeTimeout = time.Second
	})
	release := e.occupied()
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
